"""What was released so far, by region, and what it costs.

A release is written down before it happens, so that the ledger may hold one that never left its region, and never
lacks one that did. It is kept in the run folder (`privacy.json`) before each round and in every commit; a resumed run
goes on from the longer of the two, since rounds after the last commit were released all the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from xcloud.errors import PrivacyAccountingError, PrivacyBudgetError
from xcloud.kept import read_record, write_record
from xcloud.messages import PrivacyTerms
from xcloud.privacy.accounting import Mechanism, epsilon_of, gaussian_epsilon
from xcloud.privacy.skellam import composed_epsilon

__all__ = ["PrivacyLedger", "Release"]

FILE = "privacy.json"


class Release(BaseModel):
    """One region's releases in one round: `steps` noisy sums under the same terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int = Field(ge=1)
    region: str
    steps: int = Field(ge=0)
    terms: PrivacyTerms

    @property
    def mechanism(self) -> Mechanism:
        """The same for the accountant."""
        terms = self.terms
        return Mechanism(terms.sampling_probability, terms.noise_multiplier, self.steps, terms.sampler)


class PrivacyLedger(BaseModel):
    """All releases of a run. Immutable: recording gives a new one.

    Attributes:
        unit: what epsilon protects: one `example` (a training sequence of one region) or one whole `region`.
        delta: at which every epsilon here holds.
        budget: epsilon that no region may exceed; None: no bound.
        releases: oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    unit: Literal["example", "region"]
    delta: float = Field(gt=0, lt=1)
    budget: float | None = Field(default=None, gt=0)
    releases: tuple[Release, ...] = ()

    def epsilon(self, region: str) -> float:
        """What a region's units have paid so far."""
        own = [r for r in self.releases if r.region == region]
        gaussian = [r.mechanism for r in own if r.terms.skellam is None]
        skellam = [(*r.terms.skellam, r.steps) for r in own if r.terms.skellam is not None]
        if skellam and gaussian:
            raise PrivacyAccountingError(
                f"region {region!r} has released under Gaussian and under Skellam noise; expected one kind in a run"
            )
        if skellam:
            return composed_epsilon(skellam, self.delta)
        whole = [one for one in gaussian if one.sampling_probability == 1 and one.steps]
        if whole and len(whole) == sum(one.steps > 0 for one in gaussian):
            # Sums over everything compose to one Gaussian: exactly, where distributions on a grid would round up.
            return gaussian_epsilon(
                1 / math.sqrt(sum(o.steps / o.noise_multiplier**2 for o in whole)), self.delta
            )
        return epsilon_of(gaussian, self.delta)

    @property
    def total(self) -> float:
        """What any unit has paid at most: with disjoint data in the regions, the maximum over them."""
        return max((self.epsilon(name) for name in {r.region for r in self.releases}), default=0.0)

    def with_releases(self, releases: tuple[Release, ...]) -> PrivacyLedger:
        """The ledger with these too.

        Raises:
            PrivacyBudgetError: a region would exceed the budget; nothing may be released then.
        """
        after = self.model_copy(update={"releases": (*self.releases, *releases)})
        for release in releases if self.budget is not None else ():
            assert release.terms.unit == self.unit, (release, self.unit)
            spent, would = self.epsilon(release.region), after.epsilon(release.region)
            if would > (self.budget or 0.0):
                raise PrivacyBudgetError(
                    f"region {release.region!r}: round {release.round} would raise epsilon per {self.unit} from "
                    f"{spent:.4g} to {would:.4g} at delta {self.delta:g}, past the budget of {self.budget:g} "
                    "(dp.target_epsilon); training ends here, and nothing of the round was released"
                )
        return after

    def keep(self, folder: Path) -> None:
        """Write it into a run folder, so that it is on the disk when this returns."""
        write_record(folder / FILE, self)

    @classmethod
    def kept(cls, folder: Path) -> PrivacyLedger | None:
        """The ledger of a run folder; None if there is none.

        Raises:
            CheckpointError: it is damaged, so nobody knows what was released.
        """
        expected = "what was released is not known, so the run cannot go on"
        return read_record(folder / FILE, cls, "privacy ledger", expected)

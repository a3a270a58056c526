"""The job's section `secure_aggregation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xcloud.secure.member import minimum_survivors, threshold
from xcloud.secure.primitives import digest

__all__ = ["LEAST_GROUPS", "LEAST_IN_GROUP", "SecureConfig"]

LEAST_GROUPS = 3
"""Fewer have no median that leaves one out."""
LEAST_IN_GROUP = 4
"""Regions of a group, so that its sum still hides them when one is away."""


class SecureConfig(BaseModel):
    """Secure aggregation: updates leave a region masked, and only their sum is ever opened.

    Attributes:
        keys: folder with the roster and, on each machine, the private key of who runs there; null: keys are made for
            this run, which protects nobody from whoever started it.
        colluders: regions that may work together with the aggregator (c).
        minimum: fewest regions whose sum may be opened; null: 3, or colluders + 2 if that is more.
        verify: regions check the sum itself by tags, and not only that all have the same one.
        allow_two: let two regions merge, though each then learns the other's update from the sum.
        groups: regions are dealt into so many groups, anew in every round; each has a sum of its own, and what is applied is
            the median of the groups' means, coordinate by coordinate (arXiv 2110.02940). 1: one sum, and its mean.
        scheme: `masks`, or `ckks`: homomorphic encryption (`secure.ckks`), for the updates of adapters.
        most_parameters: the largest model that `ckks` takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: str | None = None
    colluders: Annotated[int, Field(ge=0)] = 0
    minimum: Annotated[int, Field(ge=2)] | None = None
    verify: bool = False
    allow_two: bool = False
    groups: Annotated[int, Field(ge=1)] = 1
    scheme: Literal["masks", "ckks"] = "masks"
    most_parameters: Annotated[int, Field(ge=1)] = 8_000_000

    @model_validator(mode="after")
    def _fits_scheme(self) -> SecureConfig:
        if self.scheme == "ckks" and self.colluders:
            raise ValueError(
                f"colluders is {self.colluders}, while scheme ckks gives every region the key that opens every update: one "
                "that works with the aggregator opens all; expected colluders 0, or scheme masks"
            )
        if self.scheme == "ckks" and self.verify:
            raise ValueError(
                "verify checks sums of integers to the last bit, while scheme ckks opens sums that are rounded; expected "
                "verify false, or scheme masks"
            )
        if self.scheme == "ckks" and self.groups > 1:
            raise ValueError(
                f"groups is {self.groups}, while with scheme ckks the regions of a group alone can open its sum; expected "
                "groups: 1, or scheme masks"
            )
        return self

    @property
    def survivors(self) -> int:
        """Fewest regions whose sum is opened."""
        return self.minimum or minimum_survivors(self.colluders, self.allow_two)

    def dealt(self, names: Sequence[str], job: str, round: int) -> list[list[str]]:
        """The groups of a round: of equal size but for one, by a hash that nobody chooses; a retry has the same.

        Args:
            names: of all regions of the job, so that nobody's absence moves another into a group of its own.
            job: its name; `round`: of the merge.
        """
        order = sorted(names, key=lambda name: digest("xcloud/groups/v1", job, round, name))
        return [sorted(order[group :: self.groups]) for group in range(self.groups)]

    def threshold(self, cohort: int) -> int:
        """Regions without which nothing is opened."""
        return threshold(cohort, self.colluders)

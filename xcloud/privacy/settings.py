"""The job's section `dp`. Light to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xcloud.errors import ConfigError
from xcloud.messages import PrivacyTerms
from xcloud.privacy.accounting import calibrated_noise_multiplier, gaussian_noise_multiplier
from xcloud.privacy.skellam import GridPlan, grid_dimension, plan_grid, smallest_block

__all__ = ["DPConfig"]


class DPConfig(BaseModel):
    """Differential privacy of the training data.

    Attributes:
        unit: what epsilon protects. `example`: one training sequence (`sequence_length` tokens) of one region. `region`: all
            data of one region.
        mechanism: of the noise. `gaussian`: with unit example DP-SGD in the region; with unit region the aggregation actor, which
            is trusted, clips each update and adds noise to their mean. `skellam`: each region adds its share to integers that
            are masked and summed, with unit region and `secure_aggregation` only.
        clip_norm: L2 norm to which each example's gradient, or each region's update, is clipped.
        noise_multiplier: standard deviation of the noise on a step's, or a merge's, sum, over `clip_norm`; null: as little as
            `target_epsilon` allows in the whole job.
        target_epsilon: the budget of each region's units, which ends the run before a round would exceed it; null: none.
        delta: at which epsilon holds; less than one over the number of a region's examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["example", "region"]
    mechanism: Literal["gaussian", "skellam"] = "gaussian"
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5

    @model_validator(mode="after")
    def _some_noise(self) -> DPConfig:
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError(
                "expected noise_multiplier, target_epsilon or both; without noise nothing is private"
            )
        if self.unit == "example" and self.mechanism == "skellam":
            raise ValueError(
                "mechanism skellam adds noise to a region's update, which hides the region and not its examples; "
                "expected unit: region, or mechanism: gaussian"
            )
        return self

    @property
    def central(self) -> bool:
        """Whether the aggregation actor adds the noise."""
        return self.unit == "region" and self.mechanism == "gaussian"

    @property
    def distributed(self) -> bool:
        """Whether regions add their shares of it to what they send."""
        return self.unit == "region" and self.mechanism == "skellam"

    def central_terms(self, merges: int) -> PrivacyTerms:
        """What each of so many merges releases of every region, where the aggregation actor adds the noise."""
        noise = self.noise_multiplier
        if noise is None:
            assert self.target_epsilon is not None
            noise = (1 + 1e-6) * gaussian_noise_multiplier(self.target_epsilon, self.delta, merges)
        return PrivacyTerms(unit="region", sampling_probability=1.0, noise_multiplier=noise)

    def grid(
        self, merges: int, lengths: Sequence[int], regions: int, survivors: int, colluders: int, bits: int
    ) -> GridPlan:
        """The grid on which regions add their shares, for chunks of these lengths; see `skellam.plan_grid`."""
        return plan_grid(
            clip_norm=self.clip_norm,
            dimension=grid_dimension(lengths),
            smallest=smallest_block(lengths),
            regions=regions,
            survivors=survivors,
            colluders=colluders,
            bits=bits,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            times=merges,
        )

    def terms(self, region: str, examples: int, batch: int, steps: int) -> PrivacyTerms:
        """What a region's training releases.

        Args:
            region: named in errors.
            examples: in its training data.
            batch: expected size of a step's Poisson sample.
            steps: of the whole job.

        Raises:
            ConfigError: the data is too small for the batch or for `delta`.
        """
        if batch > examples:
            raise ConfigError(
                f"dp: region {region!r} has {examples} training sequences, less than the {batch} of a step; expected "
                "fewer workers, a smaller micro_batch or gradient_accumulation, or more data"
            )
        if self.delta >= 1 / examples:
            raise ConfigError(
                f"dp.delta is {self.delta:g}, but region {region!r} has {examples} training sequences; expected less "
                f"than 1/{examples} = {1 / examples:.2g}, or single examples may be published whole"
            )
        probability, noise = batch / examples, self.noise_multiplier
        if noise is None:
            assert self.target_epsilon is not None
            noise = calibrated_noise_multiplier(self.target_epsilon, self.delta, probability, max(1, steps))
        return PrivacyTerms(
            unit=self.unit, sampler="poisson", sampling_probability=probability, noise_multiplier=noise
        )

"""The job's section `dp`. Light to import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xcloud.errors import ConfigError
from xcloud.messages import PrivacyTerms
from xcloud.privacy.accounting import calibrated_noise_multiplier

__all__ = ["DPConfig"]


class DPConfig(BaseModel):
    """Differential privacy of the training data.

    Attributes:
        unit: what epsilon protects. `example`: one training sequence (`sequence_length` tokens) of one region.
        clip_norm: L2 norm to which each example's gradient is clipped.
        noise_multiplier: standard deviation of the noise on a step's sum, over `clip_norm`; null: as little as
            `target_epsilon` allows in the whole job.
        target_epsilon: the budget of each region's units, which ends the run before a round would exceed it; null: none.
        delta: at which epsilon holds; less than one over the number of a region's examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["example"]
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
        return self

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

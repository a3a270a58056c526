"""The job's section `secure_aggregation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xcloud.secure.member import minimum_survivors, threshold

__all__ = ["SecureConfig"]


class SecureConfig(BaseModel):
    """Secure aggregation: updates leave a region masked, and only their sum is ever opened.

    Attributes:
        keys: folder with the roster and, on each machine, the private key of who runs there; null: keys are made for
            this run, which protects nobody from whoever started it.
        colluders: regions that may work together with the aggregator (c).
        minimum: fewest regions whose sum may be opened; null: 3, or colluders + 2 if that is more.
        verify: regions check the sum itself by tags, and not only that all have the same one.
        allow_two: let two regions merge, though each then learns the other's update from the sum.
        scheme: `masks`, or `ckks`: homomorphic encryption (`secure.ckks`), for the updates of adapters.
        most_parameters: the largest model that `ckks` takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: str | None = None
    colluders: Annotated[int, Field(ge=0)] = 0
    minimum: Annotated[int, Field(ge=2)] | None = None
    verify: bool = False
    allow_two: bool = False
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
        return self

    @property
    def survivors(self) -> int:
        """Fewest regions whose sum is opened."""
        return self.minimum or minimum_survivors(self.colluders, self.allow_two)

    def threshold(self, cohort: int) -> int:
        """Regions without which nothing is opened."""
        return threshold(cohort, self.colluders)

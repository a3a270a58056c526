"""Settings of where a pool runs. Light to import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xcloud.cloud.fallback import matches, parse_selector
from xcloud.cloud.node_types import MARKET

__all__ = ["MARKET_LABELS", "PlacementConfig"]

MARKET_LABELS = {"on_demand": "on-demand", "spot": "spot"}
"""Values of Ray's label for how a node was bought, by a pool's `market`."""


class PlacementConfig(BaseModel):
    """Where one pool's workers run.

    Attributes:
        accelerator: `cpu`, `gpu` (any) or a Ray accelerator type such as `H100`.
        workers: ranks, one accelerator (or `cpus` cores) each.
        cpus: CPU cores reserved for each worker; also its thread count on `cpu`.
        labels: node labels every worker's node must carry, in Ray's selector syntax.
        strategy: how a pool's workers spread over nodes (Ray's placement strategies).
        instance: the cloud's machine type that the workers run on, by which they are paid; null: not said.
        market: how its machines are bought. Spot machines are cheaper, and may be taken away. It is what they are paid as;
            which machines it gets, `labels` decide, and may not say otherwise.
        placement_timeout_s: seconds to wait for room before giving up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerator: Annotated[str, Field(min_length=1)] = "cpu"
    workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[int, Field(ge=1)] = 1
    labels: dict[str, str] = Field(default_factory=dict)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    instance: Annotated[str, Field(min_length=1)] | None = None
    market: Literal["on_demand", "spot"] = "on_demand"
    placement_timeout_s: Annotated[float, Field(gt=0)] = 300.0

    @model_validator(mode="after")
    def _one_market(self) -> PlacementConfig:
        if not self.allows(self.market):
            raise ValueError(
                f"labels.{MARKET} is {self.labels[MARKET]!r}, but market is {self.market}, by which the machines are paid; "
                f"expected market: {'spot' if self.allows('spot') else 'on_demand'}, or another label"
            )
        return self

    def allows(self, market: str) -> bool:
        """Whether the labels let the pool have machines that are bought like this: `on_demand` or `spot`."""
        selected = {MARKET: self.labels[MARKET]} if MARKET in self.labels else {}
        return matches(parse_selector(selected), {MARKET: MARKET_LABELS[market]})

    @property
    def on_gpu(self) -> bool:
        return self.accelerator.lower() != "cpu"

"""Settings of where a pool runs. Light to import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["PlacementConfig"]


class PlacementConfig(BaseModel):
    """Where one pool's workers run.

    Attributes:
        accelerator: `cpu`, `gpu` (any) or a Ray accelerator type such as `H100`.
        workers: ranks, one accelerator (or `cpus` cores) each.
        cpus: CPU cores reserved for each worker; also its thread count on `cpu`.
        labels: node labels every worker's node must carry, in Ray's selector syntax.
        strategy: how a pool's workers spread over nodes (Ray's placement strategies).
        instance: the cloud's machine type that the workers run on, by which they are paid; null: not said.
        market: how its machines are bought. Spot machines are cheaper, and may be taken away.
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

    @property
    def on_gpu(self) -> bool:
        return self.accelerator.lower() != "cpu"

"""The job's section `cost`: by which prices a run is billed, where it is led from, and what it may cost. Light to import."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from xcloud.prices import Market

__all__ = ["CostConfig", "HubConfig"]


class HubConfig(BaseModel):
    """Where driver and aggregation actors run: updates travel there and back.

    Attributes:
        cloud: the provider.
        location: the cloud's own name of the place.
        instance: the machine type that they run on, and that is paid for it; null: none is paid.
        market: how it is bought.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cloud: Annotated[str, Field(min_length=1)]
    location: Annotated[str, Field(min_length=1)]
    instance: Annotated[str, Field(min_length=1)] | None = None
    market: Market = "on_demand"


class CostConfig(BaseModel):
    """What a run costs, and may cost.

    Attributes:
        prices: a price file that goes before the prices that xcloud brings along; null: these alone.
        budget_usd: the run ends before the round that would exceed it; null: no limit.
        hub: where driver and aggregation actors run; null: at the first region.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prices: Annotated[str, Field(min_length=1)] | None = None
    budget_usd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    hub: HubConfig | None = None

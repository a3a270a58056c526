"""Predicts what a job takes: seconds, bytes on each way, dollars.

A lock-step round lasts as long as its slowest region trains, and then as long as everybody merges, evaluates and saves:

    round = max over regions (steps x tokens of a step / speed) + sync + what else the round does

With `balanced` regions the steps follow the speeds, so that all take (tokens of the round) / (sum of speeds); the first round
has equal steps, since nothing is measured before it. Machines are paid for all of it, bytes by where they go (`cost.bill`).
The speeds come from an earlier run or from the peak of the accelerators; nothing here knows which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xcloud.cost.bill import EgressPrice, Holding, Route, bill, cloud_hubs, routes_of
from xcloud.prices import Place

__all__ = ["Forecast", "Pace", "PoolLoad", "RegionForecast", "RegionLoad", "Scenario", "Wire", "predict"]

MONTH_S = 730 * 3600.0
GB = 10**9

Kind = tuple[bool, bool]
"""What a round does besides: whether it is evaluated, and whether it is saved."""


@dataclass(frozen=True)
class PoolLoad:
    """A pool: the tokens of one of its steps, and its speed in tokens/s."""

    tokens: int
    speed: float


@dataclass(frozen=True)
class RegionLoad:
    """A region: what it holds, and what its pools take for a step.

    Attributes:
        holding: its machines and their price.
        pools: at least one.
    """

    holding: Holding
    pools: tuple[PoolLoad, ...]

    @property
    def tokens(self) -> int:
        """Of one step of all pools."""
        return sum(pool.tokens for pool in self.pools)

    def step_s(self, balanced: bool) -> float:
        """Seconds of a step of all pools: of the slowest, or, where they share a region's work by speed, of all together."""
        if balanced:
            return self.tokens / math.fsum(pool.speed for pool in self.pools)
        return max(pool.tokens / pool.speed for pool in self.pools)


@dataclass(frozen=True)
class Wire:
    """Bytes of one update: from a region, to a region, and of a cloud's mean on its way to the hub."""

    up: int
    down: int
    relay: int


@dataclass(frozen=True)
class Pace:
    """Seconds of a run beside training.

    Attributes:
        setup_s: from its start to the first round.
        first_s: by which the first round is longer than others.
        sync_s: of a round, when `sync_bytes` are on the longest way.
        sync_bytes: bytes up and down, see `sync_s`.
        bandwidth: bytes/s between a region and where its updates meet.
        else_s: of a round beside training and sync, by what it does.
        end_s: after the last round.
    """

    setup_s: float
    first_s: float
    sync_s: float
    sync_bytes: int
    bandwidth: float
    else_s: Mapping[Kind, float]
    end_s: float

    def beside(self, kind: Kind) -> float:
        """Seconds beside training and sync; of a kind that nobody has seen, those of the most that was."""
        known = self.else_s.get(kind)
        return max(self.else_s.values(), default=0.0) if known is None else known


@dataclass(frozen=True)
class Scenario:
    """A job as far as its costs go.

    Attributes:
        rounds: of the job.
        steps: inner steps of a region in a round.
        regions: in the job's order.
        hub: where updates meet.
        paid_hub: its machine; None: none is paid.
        wire: bytes of an update, all fragments in turn.
        pace: seconds beside training.
        by_cloud: whether the regions of a cloud merge in it first.
        balanced: whether the steps of regions follow their speeds.
        balanced_pools: whether the steps of a region's pools do.
        overlap: steps of the next round beside which a merge is on its way; 0: regions wait for it.
        evaluate_every: rounds; 0: never.
        save_every: rounds; 0: at the end only.
        stored_bytes: of the checkpoints that are kept.
        storage_usd: for a GB and month; None: they lie where nothing is paid for them, or nobody knows.
    """

    rounds: int
    steps: int
    regions: Mapping[str, RegionLoad]
    hub: Place
    paid_hub: Holding | None
    wire: Wire
    pace: Pace
    by_cloud: bool = False
    balanced: bool = False
    balanced_pools: bool = False
    overlap: int = 0
    evaluate_every: int = 1
    save_every: int = 1
    stored_bytes: int = 0
    storage_usd: float | None = None

    @property
    def places(self) -> dict[str, Place]:
        return {name: region.holding.place for name, region in self.regions.items()}

    @property
    def near(self) -> dict[str, Place]:
        """Where the updates of each cloud with several regions meet first."""
        return cloud_hubs(self.places) if self.by_cloud else {}

    @property
    def tokens(self) -> int:
        """Of a round."""
        return self.steps * sum(region.tokens for region in self.regions.values())

    @property
    def longest_way(self) -> int:
        """Bytes up and down on the way of the region that waits longest; none where all is in one place."""
        near = self.near
        ways = [0]
        for place in self.places.values():
            relayed = place.cloud in near
            if (near[place.cloud] if relayed else place) != self.hub:
                ways.append((self.wire.relay if relayed else self.wire.up) + self.wire.down)
        return max(ways)

    @property
    def routes(self) -> list[Route]:
        """Of one round."""
        near = self.near
        up, down = dict.fromkeys(self.regions, self.wire.up), dict.fromkeys(self.regions, self.wire.down)
        return routes_of(self.places, self.hub, up, down, self.wire.relay * len(near), near)


@dataclass(frozen=True)
class RegionForecast:
    """What one region does and costs; totals of the job.

    Attributes:
        steps: of a usual round.
        train_s: seconds of a usual round in which it trains.
        idle_share: of the job's seconds, that it waits for others: not of sync or anything that all do.
        machines_usd: None: some machine has no price.
        egress_bytes: up and down, of its updates, that left a place.
        egress_usd: None: some way has no price.
    """

    steps: float
    train_s: float
    idle_share: float
    machines_usd: float | None
    egress_bytes: int
    egress_usd: float | None


@dataclass(frozen=True)
class Forecast:
    """What a job takes in all. Sums of dollars are as far as prices are known; `unpriced` names what is not.

    Attributes:
        seconds: of wall time, set-up included.
        round_s: of a usual round.
        tokens: of all regions.
        egress: bytes by `SOURCE -> DESTINATION`.
        storage_usd: of the kept checkpoints while the job runs; None: see `Scenario.storage_usd`.
    """

    seconds: float
    round_s: float
    tokens: int
    machines_usd: float
    egress_usd: float
    storage_usd: float | None
    unpriced: tuple[str, ...]
    egress: dict[str, int]
    regions: dict[str, RegionForecast] = field(default_factory=dict)

    @property
    def usd(self) -> float:
        return self.machines_usd + self.egress_usd + (self.storage_usd or 0.0)


def predict(scenario: Scenario, price: EgressPrice) -> Forecast:
    """What a scenario takes.

    Args:
        scenario: the job.
        price: USD for a GB on a way; None: unknown.

    Raises:
        ValueError: a speed or a number of rounds is not positive.
    """
    if scenario.rounds < 1 or any(p.speed <= 0 for r in scenario.regions.values() for p in r.pools):
        raise ValueError("rounds and speeds must be positive")
    pace = scenario.pace
    equal = {
        name: scenario.steps * region.step_s(balanced=False) for name, region in scenario.regions.items()
    }
    steps, usual = _usual(scenario)
    first_s, usual_s = max(equal.values()), max(usual.values())
    sync_s = _sync_s(scenario, usual_s)
    seconds = pace.setup_s + pace.first_s + pace.end_s
    measured = (
        2 if scenario.balanced or scenario.balanced_pools else 1
    )  # from which round on steps follow speed
    waits = dict.fromkeys(scenario.regions, 0.0)
    for number in range(1, scenario.rounds + 1):
        trained, longest = (equal, first_s) if number < measured else (usual, usual_s)
        seconds += longest + sync_s + pace.beside(_kind(scenario, number))
        for name, taken in trained.items():
            waits[name] += longest - taken
    total = bill(
        {name: region.holding for name, region in scenario.regions.items()},
        scenario.paid_hub,
        seconds,
        [_times(route, scenario.rounds) for route in scenario.routes],
        price,
    )
    storage = None
    if scenario.storage_usd is not None:
        storage = scenario.stored_bytes / GB * scenario.storage_usd * seconds / MONTH_S
    return Forecast(
        seconds=seconds,
        round_s=usual_s + sync_s + pace.beside(_kind(scenario, 1)),
        tokens=scenario.rounds * scenario.tokens,
        machines_usd=total.machines_usd,
        egress_usd=total.egress_usd,
        storage_usd=storage,
        unpriced=total.unpriced,
        egress=total.egress,
        regions={
            name: RegionForecast(
                steps=steps[name],
                train_s=usual[name],
                idle_share=waits[name] / seconds,
                machines_usd=part.machines_usd,
                egress_bytes=part.egress_bytes,
                egress_usd=part.egress_usd,
            )
            for name, part in total.regions.items()
        },
    )


def _usual(scenario: Scenario) -> tuple[dict[str, float], dict[str, float]]:
    """Steps of each region in a usual round, and the seconds of them."""
    each = {name: region.step_s(scenario.balanced_pools) for name, region in scenario.regions.items()}
    if not scenario.balanced:
        return dict.fromkeys(each, float(scenario.steps)), {n: scenario.steps * s for n, s in each.items()}
    speed = math.fsum(region.tokens / each[name] for name, region in scenario.regions.items())
    together = scenario.tokens / speed
    steps = {name: float(max(1, round(together / one))) for name, one in each.items()}
    return steps, {name: steps[name] * one for name, one in each.items()}


def _sync_s(scenario: Scenario, usual_s: float) -> float:
    """Seconds of a merge that nobody trains beside."""
    pace = scenario.pace
    merge_s = max(0.0, pace.sync_s + (scenario.longest_way - pace.sync_bytes) / pace.bandwidth)
    hidden = usual_s * scenario.overlap / scenario.steps if scenario.steps else 0.0
    return max(0.0, merge_s - hidden)


def _kind(scenario: Scenario, number: int) -> Kind:
    last = number == scenario.rounds
    every, save = scenario.evaluate_every, scenario.save_every
    return bool(every) and (last or number % every == 0), bool(save) and number % save == 0


def _times(route: Route, rounds: int) -> Route:
    return Route(route.source, route.destination, rounds * route.size, route.region)


Change = Callable[[Scenario], Scenario]
"""What an alternative does to a scenario."""

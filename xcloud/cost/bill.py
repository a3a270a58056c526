"""The arithmetic of a run's costs: held machines by the hour, sent bytes by the gigabyte, and what they come to.

A region's machines are paid from the start of the run to its end, whatever they do: train, wait for others, evaluate,
write checkpoints. A price that nobody knows adds nothing to a sum, and the sum names what it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from xcloud.kept import read_record, write_record
from xcloud.prices import Place

__all__ = [
    "CostRow",
    "Holding",
    "RegionCost",
    "Route",
    "Spent",
    "bill",
    "cloud_hubs",
    "nodes_of",
    "routes_of",
]

FILE = "cost.json"
GB = 10**9
HOUR = 3600.0
RECENT = 3
"""Rounds by whose costs the next one's is judged."""

EgressPrice = Callable[[Place, Place], float | None]
"""USD for a GB from one place to another; None: unknown."""


def nodes_of(workers: int, per_node: int, apart: bool) -> int:
    """Whole machines that a pool's workers take.

    Args:
        workers: of the pool.
        per_node: workers that one machine has room for, at least 1.
        apart: each on a machine of its own.
    """
    return workers if apart else -(-workers // per_node)


@dataclass(frozen=True)
class Holding:
    """Machines that a region, or the hub, holds as long as the run goes on.

    Attributes:
        place: where they are.
        accelerators: that work.
        cores: that work in pools without accelerators.
        instances: machines that are paid.
        usd_per_hour: of all of them; None: of some it is not known.
    """

    place: Place
    accelerators: int = 0
    cores: int = 0
    instances: int = 0
    usd_per_hour: float | None = None


@dataclass(frozen=True)
class Route:
    """Bytes of one region on one way in one round; `region` is None for those of a whole cloud."""

    source: Place
    destination: Place
    size: int
    region: str | None = None


def cloud_hubs(places: Mapping[str, Place]) -> dict[str, Place]:
    """Where the aggregator of each cloud that has several of these regions is taken to be: at its first region."""
    clouds: dict[str, list[Place]] = {}
    for place in places.values():
        clouds.setdefault(place.cloud, []).append(place)
    return {cloud: found[0] for cloud, found in clouds.items() if len(found) > 1}


def routes_of(
    places: Mapping[str, Place],
    hub: Place,
    up: Mapping[str, int],
    down: Mapping[str, int],
    relayed_up: int = 0,
    near: Collection[str] = (),
) -> list[Route]:
    """Where a round's bytes went.

    Args:
        places: of all regions, in the job's order.
        hub: where updates meet.
        up: bytes of each region's update.
        down: bytes of the merged update that each region took.
        relayed_up: bytes of clouds' means on their way to the hub, all clouds together.
        near: clouds that merged inside, and took one copy for all their regions.
    """
    inner = {cloud: place for cloud, place in cloud_hubs(places).items() if cloud in near}
    routes = []
    for name, place in places.items():
        meeting = inner.get(place.cloud, hub)
        routes.append(Route(place, meeting, up.get(name, 0), name))
        routes.append(Route(meeting, place, down.get(name, 0), name))
    for index, (cloud, place) in enumerate(inner.items()):
        # All clouds' means have one length; the first takes what a division leaves over.
        share = relayed_up // len(inner) + (relayed_up % len(inner) if index == 0 else 0)
        copy = max((down.get(name, 0) for name, at in places.items() if at.cloud == cloud), default=0)
        routes += [Route(place, hub, share), Route(hub, place, copy)]
    return routes


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RegionCost(_Row):
    """What one region, or the hub, cost in one round.

    Attributes:
        accelerator_hours: of accelerators that workers have.
        core_hours: of cores that workers of CPU pools have.
        instance_hours: of machines that are paid.
        machines_usd: None: some machine has no price.
        egress_bytes: that left a place for another, up and down, on this region's account.
        egress_usd: None: some way has no price.
    """

    accelerator_hours: float
    core_hours: float
    instance_hours: float
    machines_usd: float | None
    egress_bytes: int = 0
    egress_usd: float | None = 0.0


class CostRow(_Row):
    """What one round cost, with all since the round before: set-up, evaluation, checkpoints, retries. USD.

    Attributes:
        seconds: that the machines were held.
        machines_usd: of all regions and the hub, as far as prices are known.
        egress_usd: the same of traffic.
        spent_usd: of the run so far, this round and earlier starts of the run included.
        unpriced: what has no price, so that the sums are too small; empty: they are whole.
        egress: bytes by `SOURCE -> DESTINATION`.
        regions: every region of the job, whether it took part or not.
        hub: None: no machine is paid for it.
    """

    seconds: float
    machines_usd: float
    egress_usd: float
    spent_usd: float
    unpriced: tuple[str, ...] = ()
    egress: dict[str, int] = Field(default_factory=dict)
    regions: dict[str, RegionCost]
    hub: RegionCost | None = None

    @property
    def usd(self) -> float:
        return self.machines_usd + self.egress_usd


class Spent(_Row):
    """What a run has cost so far, over all its starts. Kept in the run folder and in each commit.

    Attributes:
        recent: USD of the last rounds, without set-up; newest last.
        unpriced: what had no price at some time.
    """

    format: Literal[1] = 1
    seconds: float = 0.0
    accelerator_hours: float = 0.0
    core_hours: float = 0.0
    instance_hours: float = 0.0
    machines_usd: float = 0.0
    egress_bytes: int = 0
    egress_usd: float = 0.0
    recent: tuple[float, ...] = ()
    unpriced: tuple[str, ...] = ()

    @property
    def usd(self) -> float:
        return self.machines_usd + self.egress_usd

    @property
    def next_usd(self) -> float:
        """What the next round may cost: the dearest of the last ones; 0 before the first."""
        return max(self.recent, default=0.0)

    def plus(self, row: CostRow, round_usd: float | None = None) -> Spent:
        """With a row; `round_usd` is what of it belongs to a round, None: nothing."""
        parts = [*row.regions.values(), *([row.hub] if row.hub else [])]
        recent = self.recent if round_usd is None else (*self.recent, round_usd)[-RECENT:]
        return Spent(
            seconds=self.seconds + row.seconds,
            accelerator_hours=self.accelerator_hours + math.fsum(p.accelerator_hours for p in parts),
            core_hours=self.core_hours + math.fsum(p.core_hours for p in parts),
            instance_hours=self.instance_hours + math.fsum(p.instance_hours for p in parts),
            machines_usd=self.machines_usd + row.machines_usd,
            egress_bytes=self.egress_bytes + sum(row.egress.values()),
            egress_usd=self.egress_usd + row.egress_usd,
            recent=recent,
            unpriced=tuple(dict.fromkeys((*self.unpriced, *row.unpriced))),
        )

    def keep(self, folder: Path) -> None:
        """Write it into a run folder, so that it is on the disk when this returns."""
        write_record(folder / FILE, self)

    @classmethod
    def kept(cls, folder: Path) -> Spent | None:
        """What the run in a folder has cost; None: it is not billed.

        Raises:
            CheckpointError: the file is damaged, so nobody knows what was spent.
        """
        expected = "restore it, or delete it to count anew from the last commit"
        return read_record(folder / FILE, cls, "record of costs", expected)


def bill(
    regions: Mapping[str, Holding],
    hub: Holding | None,
    seconds: float,
    routes: Sequence[Route],
    price: EgressPrice,
    before_usd: float = 0.0,
) -> CostRow:
    """The costs of a stretch of time.

    Args:
        regions: what each holds.
        hub: what is paid for driver and aggregation actors; None: nothing.
        seconds: how long.
        routes: what was sent meanwhile.
        price: of a GB on a way.
        before_usd: spent before.
    """
    unpriced: list[str] = []
    rows = {}
    for name, holding in regions.items():
        mine = [route for route in routes if route.region == name]
        rows[name] = _part(name, holding, seconds, mine, price, unpriced)
    paid = _part("hub", hub, seconds, [], price, unpriced) if hub is not None else None
    shared = [route for route in routes if route.region is None]
    traffic = _egress(shared, price, unpriced)
    sent: dict[str, int] = {}
    for route in routes:
        if route.source != route.destination and route.size:
            way = f"{route.source} -> {route.destination}"
            sent[way] = sent.get(way, 0) + route.size
    machines = math.fsum(r.machines_usd or 0.0 for r in (*rows.values(), *([paid] if paid else [])))
    egress = math.fsum([r.egress_usd or 0.0 for r in rows.values()] + [traffic or 0.0])
    return CostRow(
        seconds=seconds,
        machines_usd=machines,
        egress_usd=egress,
        spent_usd=before_usd + machines + egress,
        unpriced=tuple(dict.fromkeys(unpriced)),
        egress=sent,
        regions=rows,
        hub=paid,
    )


def _part(
    name: str,
    holding: Holding,
    seconds: float,
    routes: Sequence[Route],
    price: EgressPrice,
    unpriced: list[str],
) -> RegionCost:
    hours = seconds / HOUR
    if holding.usd_per_hour is None:
        unpriced.append(f"machines of {name}")
    return RegionCost(
        accelerator_hours=holding.accelerators * hours,
        core_hours=holding.cores * hours,
        instance_hours=holding.instances * hours,
        machines_usd=None if holding.usd_per_hour is None else holding.usd_per_hour * hours,
        egress_bytes=sum(route.size for route in routes if route.source != route.destination),
        egress_usd=_egress(routes, price, unpriced),
    )


def _egress(routes: Sequence[Route], price: EgressPrice, unpriced: list[str]) -> float | None:
    """USD of some ways; None, and what is not known, if one has no price."""
    total: float | None = 0.0
    for route in routes:
        if not route.size:
            continue
        each = price(route.source, route.destination)
        if each is None:
            unpriced.append(f"egress {route.source} -> {route.destination}")
            total = None
        elif total is not None:
            total += route.size / GB * each
    return total

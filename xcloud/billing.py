"""A job's machines and ways with their prices, and the biller that books what a run costs.

`tariff` checks the job against the price book, before anything starts. `Biller` is the ledger's: it looks at the clock
whenever a round is closed and books the time since it looked last, so that no second that machines are held is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xcloud.cloud.node_types import CLOUD, REGION
from xcloud.config import JobConfig, PoolConfig, RegionConfig
from xcloud.cost.bill import CostRow, Holding, Route, Spent, bill, cloud_hubs, nodes_of, routes_of
from xcloud.cost.settings import CostConfig
from xcloud.errors import ConfigError
from xcloud.prices import Place, PriceBook, load_prices

__all__ = ["Biller", "Tariff", "elsewhere", "machines_of", "place_of", "price_file", "tariff"]


def place_of(region: RegionConfig) -> Place:
    """Where a region lies."""
    return Place(region.cloud, region.location or region.name)


def elsewhere(hub: Place, labels: Mapping[str, str]) -> Place | None:
    """Where the driver is, if its node's labels say another place than the hub's; what they do not say is taken to be right."""
    here = Place(labels.get(CLOUD, hub.cloud), labels.get(REGION, hub.location))
    return here if here != hub else None


def price_file(job: JobConfig) -> Path | None:
    """The user's own prices, if the job names some."""
    return Path(job.cost.prices) if job.cost is not None and job.cost.prices is not None else None


@dataclass(frozen=True)
class Tariff:
    """What a job's regions and hub hold, and where they lie.

    Attributes:
        book: the prices.
        regions: in the job's order.
        hub: where updates meet.
        paid_hub: its machine; None: none is paid.
        unpriced: machines and ways that have no price, by key.
    """

    book: PriceBook
    regions: Mapping[str, Holding]
    hub: Place
    paid_hub: Holding | None
    unpriced: tuple[str, ...]

    @property
    def places(self) -> dict[str, Place]:
        """Where each region lies."""
        return {name: holding.place for name, holding in self.regions.items()}

    @property
    def hub_of_cloud(self) -> dict[str, Place]:
        """Where the aggregator of each cloud with several regions is taken to be."""
        return cloud_hubs(self.places)

    def egress(self, source: Place, destination: Place) -> float | None:
        """USD for a GB on a way; None: unknown."""
        found = self.book.egress_per_gb(source, destination)
        return None if found is None else found.usd


def tariff(job: JobConfig, always: bool = False) -> Tariff | None:
    """The prices of a job; None where it neither asks for costs nor says what its machines are, unless `always`.

    Raises:
        ConfigError: an instance type is unknown or does not fit its pool, the price file is wrong, or there is a budget
            and something has no price; names the key.
    """
    named = any(pool.instance for region in job.regions for pool in region.pools)
    if job.cost is None and not named and not always:
        return None
    cost = job.cost or CostConfig()
    book = load_prices(price_file(job))
    unpriced: list[str] = []
    regions = {
        region.name: _holding(book, region, f"regions[{index}]", unpriced)
        for index, region in enumerate(job.regions)
    }
    hub = place_of(job.regions[0]) if cost.hub is None else Place(cost.hub.cloud, cost.hub.location)
    paid = None
    if cost.hub is not None and cost.hub.instance is not None:
        usd = _per_hour(book, hub, cost.hub.instance, cost.hub.market, "cost.hub.instance", unpriced)
        paid = Holding(hub, instances=1, usd_per_hour=usd)
    made = Tariff(book, regions, hub, paid, ())
    unpriced += [f"egress {a} -> {b} has no price" for a, b in _ways(job, made) if made.egress(a, b) is None]
    if cost.budget_usd is not None and unpriced:
        raise ConfigError(
            f"cost.budget_usd: {'; '.join(unpriced)}; a budget needs every price: name a known 'instance' in each pool, or add "
            "what is missing to a price file (cost.prices)"
        )
    return Tariff(book, regions, hub, paid, tuple(unpriced))


def machines_of(book: PriceBook, cloud: str, pool: PoolConfig, key: str) -> int:
    """Whole machines that a pool with an instance type takes.

    Raises:
        ConfigError: the type is unknown, has another accelerator, or is too small for a worker.
    """
    assert pool.instance is not None
    try:
        machine = book.instance(cloud, pool.instance)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None
    if pool.on_gpu and machine.accelerator is None:
        raise ConfigError(
            f"{key}.instance {machine.name!r} has no accelerator, but the pool's accelerator is {pool.accelerator}"
        )
    if pool.on_gpu and pool.accelerator.lower() not in ("gpu", str(machine.accelerator).lower()):
        raise ConfigError(
            f"{key}.instance {machine.name!r} has {machine.count} x {machine.accelerator}, but the pool's accelerator is "
            f"{pool.accelerator}"
        )
    room = machine.cpus // pool.cpus
    if pool.on_gpu:
        room = min(room, machine.count)
    if room < 1:
        raise ConfigError(
            f"{key}.instance {machine.name!r} has {machine.cpus} cores, but a worker of the pool takes {pool.cpus}"
        )
    if pool.strategy == "STRICT_PACK" and room < pool.workers:
        raise ConfigError(
            f"{key}.instance {machine.name!r} has room for {room} of the pool's {pool.workers} workers, but strategy is "
            "STRICT_PACK, all on one machine"
        )
    return nodes_of(pool.workers, room, pool.strategy == "STRICT_SPREAD")


def _holding(book: PriceBook, region: RegionConfig, key: str, unpriced: list[str]) -> Holding:
    place, total, instances = place_of(region), 0.0, 0
    known = True
    for index, pool in enumerate(region.pools):
        at = f"{key}.pools[{index}]"
        if pool.instance is None:
            unpriced.append(f"{at} names no instance")
            known = False
            continue
        nodes = machines_of(book, region.cloud, pool, at)
        usd = _per_hour(book, place, pool.instance, pool.market, f"{at}.instance", unpriced)
        instances += nodes
        if usd is None:
            known = False
        else:
            total += nodes * usd
    return Holding(
        place,
        accelerators=sum(pool.workers for pool in region.pools if pool.on_gpu),
        cores=sum(pool.workers * pool.cpus for pool in region.pools if not pool.on_gpu),
        instances=instances,
        usd_per_hour=total if known else None,
    )


def _per_hour(
    book: PriceBook, place: Place, instance: str, market: str, key: str, unpriced: list[str]
) -> float | None:
    assert market in ("on_demand", "spot")
    try:
        found = book.per_hour(
            place.cloud, place.location, instance, "spot" if market == "spot" else "on_demand"
        )
    except ConfigError as error:
        raise ConfigError(f"{key.removesuffix('instance')}{error}") from None
    if found is None:
        unpriced.append(f"{key} {instance!r} has no {market} price in {place}")
        return None
    return found.usd


def _ways(job: JobConfig, made: Tariff) -> list[tuple[Place, Place]]:
    """All ways that updates take, if all regions take part."""
    near = [] if job.hierarchy.type == "flat" else made.hub_of_cloud
    every = dict.fromkeys(made.regions, 1)
    routes = routes_of(made.places, made.hub, every, every, 1, near)
    return list(dict.fromkeys((route.source, route.destination) for route in routes))


class Biller:
    """Books what a run costs; does nothing for a job without costs.

    Args:
        job: the whole job.
        folder: the run folder, in which `cost.json` is kept.
        clock: seconds.
    """

    def __init__(self, job: JobConfig, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.job, self.folder, self.clock = job, folder, clock
        self.tariff = tariff(job)
        self.spent = (Spent.kept(folder) if self.tariff is not None else None) or Spent()
        self._booked = self._noted = clock()
        self._vain: list[Route] = []
        """What was sent since the last booking, in rounds that were taken back."""
        self._apart_usd = 0.0
        """What of the time and traffic since the last booking belongs to no round."""
        self._latest: tuple[Mapping[str, int], int, Collection[str]] | None = None
        """How the last round's merged update travelled: `down`, `relayed_up` and `near` of `routes_of`."""

    def resume(self, spent: Spent | None) -> None:
        """Go on from what earlier starts of the run have cost: of commit and run folder the larger, since what was spent
        on rounds that were lost was spent."""
        if spent is not None:
            self.spent = max(self.spent, spent, key=lambda one: (one.usd, one.seconds))

    def apart(self) -> None:
        """All that was not booked yet belongs to no round: set-up, or a round of which nothing is kept."""
        if self.tariff is not None:
            self._apart_usd = self._unbooked().usd

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is spent inside belongs to no round; nothing may be booked meanwhile."""
        began = self._unbooked().usd if self.tariff is not None else 0.0
        try:
            yield
        finally:
            if self.tariff is not None:
                self._apart_usd += self._unbooked().usd - began

    def round(
        self,
        up: Mapping[str, int],
        down: Mapping[str, int],
        relayed_up: int = 0,
        near: Collection[str] = (),
    ) -> CostRow | None:
        """Book a round, and all time since the last booking; see `cost.bill.routes_of`."""
        if self.tariff is None:
            return None
        self._latest = down, relayed_up, near
        row = self._book(self._routes(up, down, relayed_up, near))
        self.spent = self.spent.plus(row, row.usd - self._apart_usd)
        self._apart_usd = 0.0
        self._keep(self.spent)
        return row

    def rejected(
        self,
        up: Mapping[str, int],
        down: Mapping[str, int],
        relayed_up: int = 0,
        near: Collection[str] = (),
    ) -> None:
        """A round was taken back: what it sent was sent. It is booked with the next round, or at the end."""
        if self.tariff is not None:
            self._vain += self._routes(up, down, relayed_up, near)
            self.apart()

    def settle(self) -> Spent | None:
        """Book all that was not booked yet; what the run has cost until now, None: it is not billed."""
        if self.tariff is None:
            return None
        self.spent = self.spent.plus(self._book([]))
        self._apart_usd = 0.0
        self._keep(self.spent)
        return self.spent

    def note(self, at_most_every_s: float = 0.0) -> None:
        """Write what the run has cost until now into the run folder, unless that was done just now. Nothing is booked;
        whoever is killed without warning leaves this behind."""
        if (standing := self.standing) is not None and self.clock() - self._noted >= at_most_every_s:
            self._keep(standing)

    @property
    def standing(self) -> Spent | None:
        """What the run has cost until now; nothing is booked. None: it is not billed."""
        return None if self.tariff is None else self.spent.plus(self._unbooked())

    def exhausted(self, up: Mapping[str, int] | None = None, most: int = 0) -> bool:
        """Whether the next round might exceed the budget.

        Args:
            up: bytes of each region's update in a round that was trained and is not merged yet; None: there is none.
            most: bytes that such a round's merged update has at most. Where a round was merged before, its size is
                expected again.
        """
        if self._budget is None or self.tariff is None:
            return False
        if up is None:
            return self.spent.usd + self._unbooked().usd + self.spent.next_usd > self._budget
        routes = self._routes(up, *(self._latest or (dict.fromkeys(up, most), 0, ())))
        unbooked = self._unbooked(routes).usd
        following = max(self.spent.next_usd, unbooked - self._apart_usd)
        return self.spent.usd + unbooked + following > self._budget

    @property
    def overspent(self) -> bool:
        """Whether the budget is exceeded already, so that there is nothing left to wait with."""
        if self._budget is None or self.tariff is None:
            return False
        return self.spent.usd + self._unbooked().usd > self._budget

    @property
    def _budget(self) -> float | None:
        return self.job.cost.budget_usd if self.job.cost is not None else None

    def _routes(
        self, up: Mapping[str, int], down: Mapping[str, int], relayed_up: int, near: Collection[str]
    ) -> list[Route]:
        assert self.tariff is not None
        return routes_of(self.tariff.places, self.tariff.hub, up, down, relayed_up, near)

    def _book(self, routes: list[Route]) -> CostRow:
        now = self.clock()
        row = self._bill(now - self._booked, [*self._vain, *routes])
        self._booked, self._vain = now, []
        return row

    def _unbooked(self, routes: Sequence[Route] = ()) -> CostRow:
        return self._bill(self.clock() - self._booked, [*self._vain, *routes])

    def _bill(self, seconds: float, routes: list[Route]) -> CostRow:
        assert self.tariff is not None
        return bill(
            self.tariff.regions,
            self.tariff.paid_hub,
            seconds,
            routes,
            self.tariff.egress,
            self.spent.usd,
        )

    def _keep(self, spent: Spent) -> None:
        spent.keep(self.folder)
        self._noted = self.clock()

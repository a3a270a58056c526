"""A job's machines and ways with their prices, and what of it is refused before anything starts."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import yaml

from xcloud.billing import Biller, elsewhere, tariff
from xcloud.config import JobConfig
from xcloud.cost.bill import Spent, routes_of
from xcloud.errors import ConfigError
from xcloud.prices import Place

DATA = {"type": "stdlib", "kind": "modules"}
H100 = {"accelerator": "H100", "workers": 8, "cpus": 8, "instance": "p5.48xlarge"}


def pool(**changes: Any) -> dict[str, Any]:
    return H100 | changes


def job_of(*regions: tuple[str, str, list[dict[str, Any]]], **changes: Any) -> JobConfig:
    raw = {
        "name": "billed",
        "rounds": 2,
        "model": {"config": {"model_type": "llama"}},
        "regions": [
            {"name": name, "cloud": cloud, "data": DATA, "pools": pools} for name, cloud, pools in regions
        ],
    }
    return JobConfig.model_validate(raw | changes)


def aws(*pools: dict[str, Any], **changes: Any) -> JobConfig:
    return job_of(("us-east-1", "aws", list(pools)), **changes)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_job_that_names_no_machines_is_not_billed() -> None:
    assert tariff(aws({"workers": 2})) is None


@pytest.mark.parametrize(
    ("changes", "machines", "usd"),
    [
        ({}, 1, 55.04),
        ({"workers": 9}, 2, 110.08),
        ({"workers": 2}, 1, 55.04),
        ({"workers": 2, "strategy": "STRICT_SPREAD"}, 2, 110.08),
        ({"cpus": 48}, 2, 110.08),  # four workers of 48 cores fill its 192
        ({"accelerator": "gpu"}, 1, 55.04),
        ({"market": "spot"}, 1, 27.5),
        ({"accelerator": "cpu", "workers": 200, "cpus": 1}, 2, 110.08),
    ],
)
def test_whole_machines_are_paid(changes: dict[str, Any], machines: int, usd: float) -> None:
    found = tariff(aws(pool(**changes)))
    assert found is not None
    held = found.regions["us-east-1"]
    assert (held.instances, held.usd_per_hour) == (machines, pytest.approx(usd))
    assert held.place == Place("aws", "us-east-1")
    assert found.unpriced == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"instance": "p5.48xlrge"},
            r"regions\[0\]\.pools\[0\]\.instance 'p5\.48xlrge': .* did you mean 'p5\.48xlarge'",
        ),
        (
            {"accelerator": "A100"},
            r"regions\[0\]\.pools\[0\]\.instance 'p5\.48xlarge' has 8 x H100, but .* is A100",
        ),
        ({"instance": "m7i.xlarge"}, r"regions\[0\]\.pools\[0\]\.instance 'm7i\.xlarge' has no accelerator"),
        ({"cpus": 193}, r"has 192 cores, but a worker of the pool takes 193"),
        (
            {"workers": 9, "strategy": "STRICT_PACK"},
            r"room for 8 of the pool's 9 workers, but strategy is STRICT_PACK",
        ),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_by_key(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        tariff(aws(pool(**changes)))


def test_the_location_may_have_another_name_than_the_region() -> None:
    job = aws(pool())
    region = job.regions[0].model_copy(update={"name": "site-1", "location": "us-west-2"})
    found = tariff(job.model_copy(update={"regions": (region,)}))
    assert found is not None
    assert found.regions["site-1"].place == Place("aws", "us-west-2")
    assert found.hub == Place("aws", "us-west-2")


def test_what_has_no_price_is_named_and_a_budget_needs_it() -> None:
    regions = [("us-east-1", "aws", [pool(), {"workers": 1}]), ("cellar", "lab", [{"workers": 1}])]
    found = tariff(job_of(*regions))
    assert found is not None
    assert found.regions["us-east-1"].usd_per_hour is None
    assert found.unpriced == (
        "regions[0].pools[1] names no instance",
        "regions[1].pools[0] names no instance",
        "egress lab/cellar -> aws/us-east-1 has no price",
    )
    with pytest.raises(
        ConfigError, match=r"cost\.budget_usd: regions\[0\]\.pools\[1\] names no instance; .*lab/cellar"
    ):
        tariff(job_of(*regions, cost={"budget_usd": 10}))
    with pytest.raises(ConfigError, match=r"'p5en\.48xlarge' has no spot price in aws/us-east-1"):
        tariff(aws(pool(instance="p5en.48xlarge", accelerator="H200", market="spot"), cost={"budget_usd": 1}))


def test_a_price_file_and_a_hub(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    node = {"cpus": 64, "memory_gb": 512, "locations": {"any": {"on_demand": 2.5}}}
    free = {"any": {"same_location": 0, "internet": 0.01}}
    lab = {"as_of": dt.date(2026, 1, 1), "instances": {"node": node}, "egress": free}
    prices.write_text(yaml.safe_dump({"lab": lab}))
    cost = {
        "prices": str(prices),
        "budget_usd": 5,
        "hub": {"cloud": "aws", "location": "us-east-1", "instance": "m7i.xlarge", "market": "spot"},
    }
    regions = [
        ("us-east-1", "aws", [pool()]),
        ("cellar", "lab", [{"workers": 4, "cpus": 16, "instance": "node"}]),
    ]
    found = tariff(job_of(*regions, cost=cost))
    assert found is not None
    assert found.regions["cellar"].usd_per_hour == 2.5
    assert found.paid_hub is not None
    assert found.paid_hub.usd_per_hour == 0.08
    assert found.egress(Place("lab", "cellar"), found.hub) == 0.01
    wrong = {"cloud": "aws", "location": "us-east-1", "instance": "m7i.xlrge"}
    with pytest.raises(ConfigError, match=r"cost\.hub\.instance 'm7i\.xlrge'"):
        tariff(job_of(*regions, cost=cost | {"hub": wrong}))


def test_updates_of_one_cloud_meet_in_it_and_cross_once() -> None:
    regions = [
        ("us-east-1", "aws", [pool()]),
        ("us-west-2", "aws", [pool()]),
        ("europe-west4", "gcp", [{"workers": 1, "instance": "e2-standard-4"}]),
    ]
    gcp = {"hub": {"cloud": "gcp", "location": "europe-west4"}}
    job = job_of(*regions, hierarchy="cloud", cost=gcp)
    made = tariff(job)
    assert made is not None
    up, down = dict.fromkeys(made.regions, 100), dict.fromkeys(made.regions, 80)
    east, west, west4 = (holding.place for holding in made.regions.values())

    def sent(routes: list[Any]) -> dict[tuple[Place, Place], int]:
        found: dict[tuple[Place, Place], int] = {}
        for route in routes:
            found[route.source, route.destination] = (
                found.get((route.source, route.destination), 0) + route.size
            )
        return {way: size for way, size in found.items() if way[0] != way[1] and size}

    tree = sent(routes_of(made.places, made.hub, up, down, relayed_up=50, near=("aws",)))
    assert tree == {(west, east): 100, (east, west): 80, (east, west4): 50, (west4, east): 80}
    flat = sent(routes_of(made.places, made.hub, up, down, relayed_up=0, near=()))
    assert flat == {(east, west4): 100, (west, west4): 100, (west4, east): 80, (west4, west): 80}


def test_no_second_is_left_out_and_set_up_is_in_no_round_s_cost(tmp_path: Path) -> None:
    clock = Clock()
    biller = Biller(aws(pool()), tmp_path, clock)
    clock.now += 360  # set-up
    biller.apart()
    clock.now += 36
    first = biller.round({}, {})
    clock.now += 72  # a round, after the checkpoint of the one before
    second = biller.round({}, {})
    clock.now += 10
    assert first is not None
    assert second is not None
    assert (first.seconds, second.seconds) == (396.0, 72.0)
    assert second.spent_usd == pytest.approx(468 / 3600 * 55.04)
    assert biller.spent.recent == pytest.approx((36 / 3600 * 55.04, 72 / 3600 * 55.04))
    standing = biller.standing
    assert standing is not None
    assert standing.seconds == 478
    assert biller.spent.seconds == 468  # nothing was booked
    settled = biller.settle()
    assert settled is not None
    assert settled.seconds == 478
    assert Spent.kept(tmp_path) == settled


def test_what_was_spent_on_lost_rounds_was_spent(tmp_path: Path) -> None:
    clock = Clock()
    biller = Biller(aws(pool()), tmp_path, clock)
    clock.now += 100
    biller.round({}, {})
    committed = biller.standing
    clock.now += 100
    biller.round({}, {})  # and then it died
    again = Biller(aws(pool()), tmp_path, clock)
    again.resume(committed)
    assert again.spent.seconds == 200
    elsewhere = Biller(aws(pool()), tmp_path / "other", clock)
    elsewhere.resume(committed)
    assert elsewhere.spent == committed


def test_the_budget_counts_what_the_next_round_may_cost(tmp_path: Path) -> None:
    clock = Clock()
    biller = Biller(aws(pool(), cost={"budget_usd": 55.04}), tmp_path, clock)  # one hour
    biller.apart()
    for _ in range(3):
        assert not biller.exhausted()
        clock.now += 1100
        biller.round({}, {})
    assert biller.exhausted()  # 3300 + 1100 seconds are more than an hour


def test_a_note_books_nothing_and_is_not_written_too_often(tmp_path: Path) -> None:
    clock = Clock()
    biller = Biller(aws(pool()), tmp_path, clock)
    clock.now += 30
    biller.note(60)
    assert Spent.kept(tmp_path) is None
    clock.now += 30
    biller.note(60)
    noted = Spent.kept(tmp_path)
    assert noted is not None
    assert (noted.seconds, biller.spent.seconds) == (60, 0)
    row = biller.round({}, {})
    assert row is not None
    assert (row.seconds, biller.spent.seconds) == (60, 60)


def test_a_wait_and_a_lost_round_are_in_no_round_s_cost(tmp_path: Path) -> None:
    clock = Clock()
    biller = Biller(aws(pool()), tmp_path, clock)
    hourly = 55.04
    clock.now += 3600
    biller.apart()  # of a round nothing is kept
    clock.now += 1800
    with biller.waiting():
        clock.now += 7200
    clock.now += 1800
    row = biller.round({}, {})
    assert row is not None
    assert row.usd == pytest.approx(4 * hourly)
    assert biller.spent.recent == pytest.approx((hourly,))


def test_an_update_that_is_still_to_be_merged_counts_both_ways(tmp_path: Path) -> None:
    regions = [("us-east-1", "aws", [pool()]), ("us-west-2", "aws", [pool()])]
    clock, gb = Clock(), 10**9
    job = job_of(*regions, cost={"budget_usd": 1000})
    biller = Biller(job, tmp_path, clock)
    usd = biller._unbooked(biller._routes({"us-west-2": gb}, {"us-west-2": 4 * gb}, 0, ())).usd
    assert usd > 0

    def with_budget(factor: float) -> Biller:
        return Biller(job_of(*regions, cost={"budget_usd": factor * usd}), tmp_path, clock)

    up = {"us-west-2": gb}
    assert not with_budget(1.9).exhausted()  # nothing is known of a first round
    assert with_budget(1.9).exhausted(up, 4 * gb)  # it, and one more like it
    assert not with_budget(2.1).exhausted(up, 4 * gb)


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        ({}, None),
        ({"cloud": "aws"}, None),
        ({"cloud": "aws", "ray.io/region": "us-east-1"}, None),
        ({"ray.io/region": "us-west-2"}, "aws/us-west-2"),
        ({"cloud": "gcp", "ray.io/region": "europe-west4"}, "gcp/europe-west4"),
    ],
)
def test_a_driver_that_is_not_at_the_hub_is_seen_by_its_node_s_labels(
    labels: dict[str, str], place: str | None
) -> None:
    found = elsewhere(Place("aws", "us-east-1"), labels)
    assert place == (None if found is None else str(found))

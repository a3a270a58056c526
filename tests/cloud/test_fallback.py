from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.cloud.fallback import (
    Backoff,
    Bundle,
    CloudLimits,
    NodeType,
    Room,
    Usage,
    matches,
    parse_selector,
    served_instead,
    substitutes,
)

SPOT = NodeType(
    "spot",
    "aws",
    {"CPU": 8, "GPU": 1},
    {"ray.io/region": "us-east-1", "ray.io/market-type": "spot"},
    max_workers=4,
    usd_per_hour=2.0,
    fallback=("on_demand", "gcp", "unpriced"),
)
ON_DEMAND = NodeType(
    "on_demand",
    "aws",
    {"CPU": 8, "GPU": 1},
    {"ray.io/region": "us-east-1", "ray.io/market-type": "on-demand"},
    max_workers=4,
    usd_per_hour=5.0,
)
GCP = NodeType(
    "gcp", "gcp", {"CPU": 12, "GPU": 1}, {"ray.io/region": "europe-west4"}, max_workers=4, usd_per_hour=3.0
)
UNPRICED = NodeType("unpriced", "gcp", {"CPU": 8, "GPU": 1}, {}, max_workers=4)
TYPES = {one.name: one for one in (SPOT, ON_DEMAND, GCP, UNPRICED)}


def wanting(count: int = 1, **labels: str) -> Bundle:
    keys = {"region": "ray.io/region", "market": "ray.io/market-type"}
    selector = parse_selector({keys[key]: value for key, value in labels.items()})
    return Bundle({"CPU": 4, "GPU": 1}, (selector,) if selector else (), count)


@pytest.mark.parametrize(
    ("text", "value", "selected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", "a", False),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", "a", False),
    ],
)
def test_selectors_are_rays(text: str, value: str | None, selected: bool) -> None:
    labels = {} if value is None else {"key": value}
    assert matches(parse_selector({"key": text}), labels) is selected


def test_substitutes_come_cheapest_first_and_unpriced_last() -> None:
    assert [one.name for one in substitutes(SPOT, TYPES)] == ["gcp", "on_demand", "unpriced"]


def test_a_substitute_serves_only_what_asks_for_nothing_it_lacks() -> None:
    """A pool that pins its market or its region gets no node of another."""
    pinned = wanting(region="us-east-1", market="spot")
    regional = wanting(2, region="us-east-1")
    anywhere = wanting(3)
    waiting = [pinned, regional, anywhere]
    assert served_instead(waiting, SPOT, ON_DEMAND) == 5
    assert served_instead(waiting, SPOT, GCP) == 3
    assert served_instead([pinned], SPOT, ON_DEMAND) == 0
    assert served_instead([], SPOT, ON_DEMAND) == 0  # a minimum of workers is for its own type
    assert served_instead([Bundle({"CPU": 16})], SPOT, GCP) == 0


def test_any_of_several_selectors_will_do() -> None:
    either = Bundle({"CPU": 1}, (parse_selector({"ray.io/region": "nowhere"}), parse_selector({})))
    assert either.fits(SPOT)


def test_what_every_node_has_is_not_compared() -> None:
    assert Bundle({"node:10.0.0.1": 0.001, "object_store_memory": 1e9, "CPU": 1}).fits(SPOT)


@pytest.mark.parametrize(
    ("limits", "workers", "room", "limit"),
    [
        (CloudLimits(), {}, 3, ""),
        (CloudLimits(max_workers=4), {"on_demand": 2}, 2, "max_workers 4 of the cloud"),
        (CloudLimits(max_workers=1), {"on_demand": 2}, 0, "max_workers 1 of the cloud"),
        (CloudLimits(), {"spot": 3}, 1, "max_workers 4 of the node type"),
        (CloudLimits(budget_usd_per_hour=9.0), {"on_demand": 1}, 2, "its nodes cost 5, one more 2"),
        (CloudLimits(budget_usd_per_hour=5.0), {"on_demand": 1}, 0, "budget_usd_per_hour 5 of the cloud"),
    ],
)
def test_room_is_what_the_tightest_limit_leaves(
    limits: CloudLimits, workers: dict[str, int], room: int, limit: str
) -> None:
    found = Room.of(SPOT, 3, Usage(workers), limits, TYPES)
    assert found.nodes == room
    assert limit in found.limit
    assert bool(found.limit) is (room < 3)


def test_the_head_costs_too() -> None:
    usage = Usage({}, head="on_demand")
    assert usage.usd_per_hour(TYPES) == 5.0
    assert Room.of(SPOT, 3, usage, CloudLimits(budget_usd_per_hour=7.0), TYPES).nodes == 1


@given(
    st.integers(0, 6),
    st.dictionaries(st.sampled_from(["spot", "on_demand"]), st.integers(0, 6)),
    st.none() | st.integers(0, 10),
    st.none() | st.floats(0, 60),
)
def test_no_launch_exceeds_a_limit(
    count: int, workers: dict[str, int], most: int | None, budget: float | None
) -> None:
    room = Room.of(SPOT, count, Usage(workers), CloudLimits(most, budget), TYPES)
    assert 0 <= room.nodes <= count
    if room.nodes:
        after = {**workers, "spot": workers.get("spot", 0) + room.nodes}
        assert most is None or sum(after.values()) <= most
        assert after["spot"] <= SPOT.max_workers
        assert budget is None or Usage(after).usd_per_hour(TYPES) <= budget + 1e-6


def test_back_off_doubles_up_to_its_most_and_forgets_on_success() -> None:
    backoff = Backoff(first_s=10, most_s=60)
    assert not backoff.closed(0.0)
    assert [backoff.fail("full", 100.0) for _ in range(5)] == [10, 20, 40, 60, 60]
    assert backoff.closed(159.9)
    assert not backoff.closed(160.0)
    for _ in range(5000):
        assert math.isfinite(backoff.fail("full", 0.0))
    backoff.succeed()
    assert (backoff.failures, backoff.reason, backoff.closed(0.0)) == (0, "", False)

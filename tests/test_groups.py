"""Groups under masks: each has a sum of its own, and the median of their means leaves one bad group out."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.merging import LAYOUT, encodings, job_of
from tests.strategies import Array, quick
from tests.test_masking import World, region_of, updates_of
from xcloud.errors import ConfigError, RegionError, SecurityError
from xcloud.messages import RoundSum
from xcloud.secure.messages import Proof, SyncPlan
from xcloud.secure.settings import SecureConfig

TWELVE = [f"r{i}" for i in range(12)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, count=12, groups=3)


def groups_of(world: World, number: int = 1) -> list[list[str]]:
    return world.config.dealt(world.names, "m", number)


def applied(world: World, name: str, total: RoundSum, handles: list[Any]) -> Array:
    """What a region's rank takes for the merged update."""
    region = region_of(world, name)
    worker = importlib.import_module("xcloud.training.worker")  # torch takes its time
    rank = worker.RankWorker(SimpleNamespace(region=name, hashed=True), world.store)
    rank.path = world.path(name)
    sums = region._sums(total, handles)
    gradient = rank._median([rank._opened(s.total, s.merged, s.hashes, s.openings) for s in sums])
    found: Array = np.concatenate([gradient(chunk) for chunk in total.chunks])
    return found


def mean_of(world: World, updates: dict[str, Any]) -> Array:
    """The mean of these encodings in the clear."""
    path, summed = world.path("r0"), world.exact(updates)
    total = RoundSum(
        round=1, attempt=1, regions=tuple(updates), weights=(), chunk_bytes=(), norm=None, fold_s=0, summed=True,
        total_share=len(updates),
    )  # fmt: skip
    return np.concatenate(
        [path.decode(c, np.frombuffer(data, np.uint8), total) for c, data in summed.items()]
    )


@quick
@given(st.integers(3, 6), st.integers(4, 9), st.integers(1, 2**40))
def test_groups_are_a_partition_of_equal_parts(groups: int, size: int, number: int) -> None:
    names = [f"r{i}" for i in range(groups * size + groups // 2)]
    dealt = SecureConfig(groups=groups).dealt(names, "m", number)
    assert sorted(name for group in dealt for name in group) == sorted(names)
    assert {len(group) for group in dealt} <= {size, size + 1}
    assert SecureConfig(groups=groups).dealt(names[::-1], "m", number) == dealt


def test_groups_change_with_the_round_and_not_with_the_attempt() -> None:
    config = SecureConfig(groups=3)
    together = Counter(tuple(group) for number in range(200) for group in config.dealt(TWELVE, "m", number))
    assert max(together.values()) < 20  # of 200


def test_every_region_takes_the_median_of_the_groups(world: World) -> None:
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert total.regions == tuple(world.names)
    assert total.total_share == 12
    means = [mean_of(world, {name: updates[name] for name in group}) for group in groups_of(world)]
    expected = np.median(means, axis=0).astype(np.float32)
    for name in world.names[:5]:
        assert np.array_equal(applied(world, name, total, handles), expected)


def test_one_bad_group_moves_nothing_beyond_the_others(world: World) -> None:
    """The mean would be moved by as much as the bad region likes."""
    updates = updates_of(world)
    bad = groups_of(world)[1][0]
    honest = dict(updates)
    updates[bad] = 1e3 * updates[bad]
    total, handles = world.play(updates)
    found = applied(world, "r0" if bad != "r0" else "r1", total, handles)
    means = [
        mean_of(world, {name: honest[name] for name in group})
        for group in groups_of(world)
        if bad not in group
    ]
    low, high = np.minimum(*means) - 1e-9, np.maximum(*means) + 1e-9
    assert ((low <= found) & (found <= high)).all()
    moved = mean_of(world, updates)
    assert ((moved < low) | (moved > high)).mean() > 0.2


def test_a_region_that_is_away_costs_its_own_update(world: World) -> None:
    updates = updates_of(world)
    world.faults["open", "r3"] = "silent"
    del updates["r3"]
    total, handles = world.play(updates)
    assert "r3" not in total.regions
    assert applied(world, "r0", total, handles).size == sum(c.length for c in LAYOUT)


def test_two_groups_are_too_few(world: World) -> None:
    group = groups_of(world)[2]
    updates = {name: update for name, update in updates_of(world).items() if name not in group[:2]}
    for name in group[:2]:
        world.faults["open", name] = "silent"
    with pytest.raises(SecurityError, match="2 good adverts, expected at least 3"):
        world.play(updates)


def test_a_group_that_is_lost_on_the_way_has_the_round_tried_again(world: World) -> None:
    updates = updates_of(world)
    for name in groups_of(world)[0][:2]:
        world.faults["unmask", name] = "silent"
    with pytest.raises(RegionError, match="the cohort"):
        world.play(updates)
    world.faults.clear()
    total, _ = world.play(updates, world.plan(attempt=2))
    assert len(total.groups) == 3


def test_each_group_opens_its_own_sum_and_no_other(world: World) -> None:
    updates = updates_of(world)
    total, handles = world.play(updates)
    at = 0
    for one, group in zip(total.groups, groups_of(world), strict=True):
        assert sorted(one.regions) == group
        found = encodings(world.store, one, handles[at : at + len(one.parts)])
        assert found == world.exact({name: updates[name] for name in world.names if name in group})
        at += len(one.parts)


def lies(total: RoundSum) -> list[RoundSum]:
    """Sums that no region may take."""
    one, two, three = total.groups

    def changed(group: RoundSum, **changes: Any) -> RoundSum:
        proof = Proof.from_wire(group.proof.encode(), "aggregator")
        return group.model_copy(update={"proof": proof.model_copy(update=changes).to_wire().decode()})

    result = Proof.from_wire(two.proof.encode(), "a").result
    altered = result.model_copy(update={"hashes": (b"x" * 32, *result.hashes[1:])})
    heavier = result.model_copy(update={"weight": result.weight + 1})
    quorum = Proof.from_wire(two.proof.encode(), "a").quorum
    few = quorum.model_copy(update={"signatures": dict(list(quorum.signatures.items())[:2])})
    wrong = [
        (one, two),
        (one, two, two),
        (one, one, three),
        (one, two, three, three),
        (one, changed(two, plan=None), three),
        (one, changed(two, result=altered), three),
        (one, changed(two, result=heavier), three),
        (one, changed(two, quorum=few), three),
        (one, changed(two, second=b"y" * 32), three),
        (one, two.model_copy(update={"total_share": two.total_share / 2}), three),
    ]
    return [total.model_copy(update={"groups": groups}) for groups in wrong]


@pytest.mark.parametrize("which", range(10))
def test_a_sum_of_another_group_is_taken_only_as_it_was_signed(world: World, which: int) -> None:
    total, handles = world.play(updates_of(world))
    name = total.groups[0].regions[0]
    with pytest.raises(SecurityError):
        region_of(world, name)._sums(lies(total)[which], handles)


def test_a_sum_of_an_earlier_round_is_not_taken(world: World) -> None:
    updates = updates_of(world)
    old, _ = world.play(updates)
    total, handles = world.play(updates, world.plan(number=2))
    mine = next(group for group in total.groups if "r0" in group.regions)
    replayed = [group for group in old.groups if not set(group.regions) & set(mine.regions)]
    others = [group for group in total.groups if group is not mine]
    for stale in replayed:
        lie = total.model_copy(update={"groups": (mine, others[0], stale)})
        with pytest.raises(SecurityError):
            region_of(world, "r0")._sums(lie, handles)


@pytest.mark.parametrize("which", ["no regions", "cut", "another round", "another attempt"])
def test_a_header_that_says_otherwise_than_its_groups_is_refused(world: World, which: str) -> None:
    total, handles = world.play(updates_of(world))
    name = total.groups[0].regions[0]
    own = next(group for group in total.groups if name in group.regions)
    stale = tuple(
        g if g is own else g.model_copy(update={"round": 2 if which == "another round" else 1, "attempt": 9})
        for g in total.groups
    )
    changes: dict[str, Any] = {
        "no regions": {"regions": (), "groups": (own,)},
        "cut": {"chunk_bytes": total.chunk_bytes[:2], "parts": ((0, 2),)},
        "another round": {"groups": stale},
        "another attempt": {"groups": stale},
    }[which]
    with pytest.raises(SecurityError):
        region_of(world, name)._sums(total.model_copy(update=changes), handles)


def test_a_driver_does_not_deal(world: World) -> None:
    signed = world.merging._signed
    world.merging._start = 1
    region = region_of(world, "r0")
    region.manifest_digest = region.model_digest = ""
    own = next(group for group in groups_of(world) if "r0" in group)
    good = SyncPlan.from_wire(signed(world.plan(), own).plan, "driver")
    region._check(good)
    for cohort in (world.names[:4], [*own[:3], next(n for n in world.names if n not in own)]):
        if set(cohort) <= set(own):
            continue
        with pytest.raises(SecurityError, match="its cohort is none of the groups that were dealt"):
            region._check(SyncPlan.from_wire(signed(world.plan(), cohort).plan, "driver"))


REFUSED = [
    ({"groups": 2}, "groups is 2, whose median is their mean"),
    ({"groups": 4}, "a group would hold 3; expected at least 4 in each"),
    ({"groups": 3, "minimum": 5}, "a group would hold 4; expected at least 5 in each"),
]


@pytest.mark.parametrize(("secure", "said"), REFUSED)
def test_what_cannot_be_grouped_is_refused(secure: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(["c"] * 12, codec="fixed", secure_aggregation=secure)


def test_groups_are_not_delivered_while_the_next_round_trains() -> None:
    with pytest.raises(ConfigError, match=r"secure_aggregation.groups .* streaming.overlap"):
        job_of(
            ["c"] * 12,
            codec="fixed",
            secure_aggregation={"groups": 3},
            streaming={"overlap": 1},
            inner={"steps": 4},
        )

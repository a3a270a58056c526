"""The merge of a round over folders in this process: what is folded, by whom, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.merging import (
    LAYOUT,
    LENGTHS,
    LocalCrew,
    Store,
    encodings,
    job_of,
    merge,
    noise,
    open_sum,
    plan_of,
    send,
)
from tests.strategies import Array
from xcloud import folding
from xcloud.aggregation import Aggregation
from xcloud.errors import AggregationError, ConfigError, NonFiniteUpdateError, RegionError
from xcloud.transport.blobs import Copies

OPENED = ["identity", "bf16", {"type": "block", "bits": 8}, "topk"]
ADDING = [{"type": "fixed", "bits": 8}, {"type": "random_k", "fraction": 0.5}]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks in an outgoing part, so that there are several."""
    monkeypatch.setattr(folding, "PART_BYTES", 40_000)


def merged(job: Any, updates: list[Array], **options: Any) -> Array:
    """The merged update, decoded."""
    store = Store()
    return open_sum(job, store, *merge(job, updates, store, **options))


# -- the mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", OPENED)
@pytest.mark.parametrize("tokens", [(100, 100, 100), (100, 250, 0)])
def test_the_mean_is_that_of_what_was_sent(codec: Any, tokens: tuple[int, ...]) -> None:
    """Each region alone says what its encoding decodes to; the fold adds nothing of its own."""
    job, updates = job_of(codec=codec), noise(3)
    alone = [merged(job_of(("aws",), codec=codec), [update]).astype(np.float64) for update in updates]
    if codec == {"type": "block", "bits": 8}:  # its rounding is drawn for each region by its name
        alone = [u.astype(np.float64) for u in updates]
    expected = sum(t / sum(tokens) * u for t, u in zip(tokens, alone, strict=True))
    tolerance = 4e-5 if isinstance(codec, dict) else 1e-9
    np.testing.assert_allclose(merged(job, updates, tokens=tokens), expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("codec", OPENED)
def test_folding_one_by_one_equals_combining_side_by_side(
    codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: a plugin's aggregator may be taken either way."""
    job, updates = job_of(codec=codec), noise(3)
    streamed = merged(job, updates)
    monkeypatch.setattr(type(job.aggregator.build()), "additive", False)
    assert np.array_equal(merged(job, updates), streamed)


@pytest.mark.parametrize("codec", ADDING)
def test_what_adds_is_not_opened(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the step of the public scale, which starts from a guess."""
    job, updates, store = job_of(codec=codec), noise(3), Store()
    monkeypatch.setattr(folding.Folder, "_opened", None)
    total, handles = merge(job, updates, store)
    assert total.summed
    assert total.norm is None
    found, mean = open_sum(job, store, total, handles), np.mean(updates, axis=0)
    sent = found != 0
    assert np.abs(found - mean)[sent].max() < 1e-4


def test_a_median_has_all_updates_side_by_side_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it opens at once is bounded: by the budget two threads share, else by one chunk of each update."""
    seen: set[int] = set()
    opened = folding.Folder._opened

    def spy(self: Any, *args: Any) -> Array:
        seen.add(threading.get_ident())
        return opened(self, *args)

    monkeypatch.setattr(folding.Folder, "_opened", spy)
    job, updates = job_of(aggregator="median", codec="bf16"), noise(3)
    roomy = merged(job, updates)
    assert threading.get_ident() not in seen
    seen.clear()
    monkeypatch.setattr(folding, "OPENED_BYTES", 2 * 3 * 4 * max(LENGTHS) - 1)
    assert np.array_equal(merged(job, updates), roomy)
    assert seen == {threading.get_ident()}
    np.testing.assert_allclose(roomy, np.median(updates, axis=0), rtol=2**-8, atol=0)


# -- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["mean", "median", "norm_bound"])
def test_who_sends_what_is_not_finite_is_named(aggregator: str) -> None:
    updates = noise(3)
    updates[1][5000 * 3 + 7] = np.nan
    if aggregator == "median":  # one of three it survives
        updates[2][5000 * 3 + 7] = np.nan
    with pytest.raises(NonFiniteUpdateError, match="'r1': chunk 3 of its update holds NaN or Inf"):
        merge(job_of(aggregator=aggregator), updates)


def test_multi_krum_merges_without_a_hostile_region() -> None:
    updates = noise(5)
    updates[2][:] = np.nan
    job = job_of(["aws"] * 5, aggregator={"type": "multi_krum", "faulty": 1})
    expected = np.mean([updates[i] for i in (0, 1, 3, 4)], axis=0)
    np.testing.assert_allclose(merged(job, updates), expected, rtol=1e-5, atol=1e-9)


def test_a_sum_that_overflows_is_nobodys_alone() -> None:
    huge = [np.full(sum(LENGTHS), 3e38, np.float32)] * 2
    with pytest.raises(AggregationError, match="the merged update is not finite in chunk 0"):
        merge(job_of(("aws", "gcp")), huge, tokens=(1, 1))


def test_a_norm_too_large_for_fp32_is_told_all_the_same() -> None:
    large = [np.full(sum(LENGTHS), 1e20, np.float32)] * 2
    total, _ = merge(job_of(("aws", "gcp")), large)
    assert total.norm == pytest.approx(1e20 * sum(LENGTHS) ** 0.5)


def test_a_lost_part_names_its_region() -> None:
    job, store = job_of(), Store()
    offers = [send(job, store, f"r{i}", update, 1) for i, update in enumerate(noise(3))]
    del store.kept[offers[1][1][1]]
    reports, handles = zip(*offers, strict=True)
    with pytest.raises(RegionError, match=r"'r1': chunk 2 of its update is lost \(OwnerDiedError\)"):
        Aggregation(job, LocalCrew(job, store)).merge(plan_of(), LAYOUT, reports, handles)


def test_a_folder_is_good_for_the_next_merge_after_a_failure() -> None:
    job, store, updates = job_of(), Store(), noise(3)
    crew = LocalCrew(job, store)
    offers = [send(job, store, f"r{i}", update, 1) for i, update in enumerate(updates)]
    reports, handles = zip(*offers, strict=True)
    lost = store.kept.pop(handles[2][-1])
    with pytest.raises(RegionError):
        Aggregation(job, crew).merge(plan_of(), LAYOUT, reports, handles)
    store.kept[handles[2][-1]] = lost
    again = Aggregation(job, crew).merge(plan_of(), LAYOUT, reports, handles)
    np.testing.assert_allclose(open_sum(job, store, *again), np.mean(updates, axis=0), atol=1e-9)


# -- fragments ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(0, 3), (2, 5), (6, 7)])
@pytest.mark.parametrize(
    "changes", [{}, {"aggregator": "rda"}, {"codec": ADDING[0]}, {"aggregation_actors": 2}]
)
def test_a_fragment_is_merged_as_the_whole_would_be(chunks: tuple[int, int], changes: Any) -> None:
    job, updates, whole, part = job_of(**changes), noise(3), Store(), Store()
    if "aggregator" in changes:  # weights are taken over what is merged
        updates = [np.tile(update[:1000], 40)[: update.size] for update in updates]
    all_of_it = encodings(whole, *merge(job, updates, whole))
    total, handles = merge(job, updates, part, chunks=chunks)
    assert total.parts[0][0] == chunks[0]
    found = encodings(part, total, handles)
    assert list(found) == list(range(*chunks))
    if "aggregator" not in changes:
        assert found == {chunk: all_of_it[chunk] for chunk in found}


@pytest.mark.parametrize(
    ("sent", "planned", "told"),
    [
        ((0, 7), (2, 5), r"sent 7 chunks \(0..1, 2..3, 4..6\) in 3 buffers, expected chunks 2..4"),
        ((1, 4), (2, 5), r"sent 3 chunks \(1..2, 3..3\)"),
        ((2, 4), (2, 5), r"sent 2 chunks \(2..3\)"),
        ((2, 5), None, r"sent 3 chunks \(2..3, 4..4\) in 2 buffers, expected chunks 0..6"),
    ],
)
def test_other_chunks_than_planned_are_refused(
    sent: tuple[int, int], planned: tuple[int, int] | None, told: str
) -> None:
    job, store = job_of(("aws",)), Store()
    header, handles = send(job, store, "r0", noise(1)[0], 1, range(*sent))
    with pytest.raises(RegionError, match=told):
        Aggregation(job, LocalCrew(job, store)).merge(plan_of(planned), LAYOUT, [header], [handles])


def test_parts_with_a_gap_are_refused() -> None:
    job, store = job_of(("aws",)), Store()
    header, handles = send(job, store, "r0", noise(1)[0], 1)
    bad = header.model_copy(update={"parts": ((0, 2), (3, 2), (5, 2))})
    with pytest.raises(RegionError, match=r"sent 7 chunks \(0..1, 3..4, 5..6\)"):
        Aggregation(job, LocalCrew(job, store)).merge(plan_of(), LAYOUT, [bad], [handles])


# -- what is on its way -------------------------------------------------------------------


def test_parts_are_sent_for_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a single thread the order is fixed: whatever is read was sent for, and never many parts before."""
    monkeypatch.setattr(folding, "OPENED_BYTES", 0)
    monkeypatch.setattr(folding, "AHEAD", 2)
    job, store = job_of(aggregator="median", codec="bf16"), Store()
    merge(job, noise(3), store)
    waiting: set[int] = set()
    most = 0
    seen: set[int] = set()
    for what, handle in store.log:
        if what == "prefetch":
            assert handle not in seen
            seen.add(handle)
            waiting.add(handle)
        waiting -= {handle} if what == "get" else set()
        most = max(most, len(waiting))
    read = {handle for what, handle in store.log if what == "get"}
    assert seen <= read
    assert len(seen) >= len(read) - 2  # two spans are sent for in full, of the later ones two parts of three
    assert most <= folding.THREADS * 3 + folding.AHEAD


# -- several aggregators ------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, (1, 6)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec": "topk", "downlink": "sparse"},
        {"codec": ADDING[0]},
        {"codec": "bf16", "aggregator": "rda", "downlink": {"type": "block", "bits": 8}},
        {"aggregator": "norm_bound"},
        {"aggregator": "multi_krum"},
        {"aggregator": "median"},
    ],
)
def test_several_aggregators_give_the_bits_of_one(changes: Any, chunks: tuple[int, int] | None) -> None:
    updates, results = noise(3), []
    updates[2] *= 5
    for count in (1, 2, 3, 20):
        store = Store()
        total, handles = merge(job_of(aggregation_actors=count, **changes), updates, store, chunks=chunks)
        header = total.model_copy(update={"parts": (), "fold_s": 0.0})
        results.append((header, encodings(store, total, handles)))
    assert all(result == results[0] for result in results)


# -- hierarchy ----------------------------------------------------------------------------

TWO_AND_TWO = ("aws", "gcp", "aws", "gcp")
TWO_AND_ONE = ("aws", "aws", "gcp")


@pytest.mark.parametrize("clouds", [TWO_AND_TWO, TWO_AND_ONE, ("aws", "aws", "aws")])
@pytest.mark.parametrize("codec", ADDING)
def test_totals_of_clouds_add_up_to_the_total(codec: Any, clouds: tuple[str, ...]) -> None:
    """The same integers in the same ring: exactly. (fp32 sums of `random_k` differ by their rounding.)"""
    updates, flat, tree = noise(len(clouds)), Store(), Store()
    flat_job, tree_job = job_of(clouds, codec=codec), job_of(clouds, codec=codec, hierarchy="cloud")
    one, two = merge(flat_job, updates, flat), merge(tree_job, updates, tree)
    if codec is ADDING[0]:
        assert encodings(flat, *one) == encodings(tree, *two)
    np.testing.assert_allclose(
        open_sum(flat_job, flat, *one), open_sum(tree_job, tree, *two), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("clouds", [TWO_AND_TWO, TWO_AND_ONE])
@pytest.mark.parametrize("aggregator", ["mean", "dynamic", "fednova", "loss_over_size"])
@pytest.mark.parametrize(("relay", "error"), [("identity", 1e-6), ("bf16", 2**-8), (None, 2**-8)])
def test_a_merge_by_cloud_equals_the_flat_one(
    clouds: tuple[str, ...], aggregator: str, relay: str | None, error: float
) -> None:
    updates = noise(len(clouds))
    flat = merged(job_of(clouds, aggregator=aggregator), updates)
    tree = merged(job_of(clouds, aggregator=aggregator, hierarchy={"type": "cloud", "codec": relay}), updates)
    bound = error * np.sum(np.abs(updates), axis=0)
    assert (np.abs(tree - flat) <= bound).all()
    assert np.abs(tree - flat).max() > 0 or relay == "identity"


def test_a_cloud_without_weight_does_not_count() -> None:
    job = job_of(TWO_AND_ONE, hierarchy="cloud")
    updates = noise(3)
    assert np.array_equal(merged(job, updates, tokens=(0, 0, 5)), updates[2])


def test_what_crosses_between_clouds_is_counted_apart() -> None:
    flat, tree = job_of(TWO_AND_ONE), job_of(TWO_AND_ONE, hierarchy="cloud")
    store, updates, size = Store(), noise(3), 4 * sum(LENGTHS)
    assert merge(flat, updates)[0].egress_up == 3 * size
    total, handles = merge(tree, updates, store)
    assert total.egress_up == size + size // 2  # gcp's only region as it is, aws' mean in bf16
    assert total.near == ("aws",)
    for handle in handles:  # a region of aws reads the copy of its own cloud, gcp's the root's
        assert isinstance(handle, Copies)
        assert list(handle.near) == ["aws"]
        assert store.kept[handle.near["aws"]].tobytes() == store.kept[handle.first].tobytes()
        assert handle.seen_from("aws") != handle.seen_from("gcp") == handle.seen_from(None) == handle.first
    added, _ = merge(job_of(TWO_AND_ONE, hierarchy="cloud", codec=ADDING[0]), updates)
    assert added.egress_up == 2 * added.bytes_down


def test_a_region_alone_in_its_cloud_is_passed_through() -> None:
    """The other one of its cloud did not answer: the round is the flat one, bit for bit."""
    clouds = ("aws", "gcp", "aws")
    updates, flat, tree = noise(2), Store(), Store()
    one = merge(job_of(clouds), updates, flat)
    two = merge(job_of(clouds, hierarchy="cloud"), updates, tree)
    assert encodings(flat, *one) == encodings(tree, *two)
    assert two[0].near == ()
    assert two[0].egress_up == one[0].egress_up


def test_who_fails_inside_a_cloud_is_named() -> None:
    job, store, updates = job_of(TWO_AND_ONE, hierarchy="cloud"), Store(), noise(3)
    updates[1][3] = np.nan
    with pytest.raises(NonFiniteUpdateError, match="'r1': chunk 0 of its update holds NaN or Inf"):
        merge(job, updates, store)
    offers = [send(job, store, f"r{i}", update, 1) for i, update in enumerate(noise(3))]
    del store.kept[offers[0][1][0]]
    reports, handles = zip(*offers, strict=True)
    with pytest.raises(RegionError, match="'r0': chunk 0 of its update is lost"):
        Aggregation(job, LocalCrew(job, store)).merge(plan_of(), LAYOUT, reports, handles)


def test_a_fragment_by_cloud_with_several_aggregators() -> None:
    changes = {"hierarchy": {"type": "cloud", "codec": "identity"}}
    updates, one, two = noise(4), Store(), Store()
    whole = encodings(one, *merge(job_of(TWO_AND_TWO, **changes), updates, one))
    job = job_of(TWO_AND_TWO, aggregation_actors=2, **changes)
    part = encodings(two, *merge(job, updates, two, chunks=(1, 6)))
    assert part == {chunk: whole[chunk] for chunk in range(1, 6)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hierarchy": "cloud", "aggregator": "median"}, "hierarchy 'cloud' .* aggregator 'median'"),
        ({"hierarchy": "cloud", "aggregator": "rda"}, "hierarchy 'cloud' .* aggregator 'rda'"),
        ({"hierarchy": {"type": "cloud", "codec": "fixed"}}, "hierarchy.codec 'fixed' takes its scale"),
        (
            {"hierarchy": {"type": "cloud", "codec": "bf16"}, "codec": "fixed"},
            "hierarchy.codec 'bf16' has nothing to do: encodings of codec 'fixed'",
        ),
        ({"hierarchy": {"codec": "bf16"}}, "hierarchy.codec has nothing to do with type 'flat'"),
        ({"hierarchy": "region"}, "hierarchy.type: Input should be 'flat' or 'cloud'"),
        ({"hierarchy": {"type": "cloud", "codek": 1}}, "hierarchy.codek: unknown key; did you mean 'codec'"),
        ({"aggregation_actors": 0}, "aggregation_actors: Input should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_merged_so_is_refused_when_the_job_is_read(changes: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        job_of(**changes)


# -- early parts, and updates of different rounds -----------------------------------------


def test_parts_that_are_stored_early_are_sent_for_and_no_more_than_a_few() -> None:
    job, store = job_of(), Store()
    folder = LocalCrew(job, store).folder(0)
    for handle in range(folding.AHEAD + 3):
        folder.arriving([handle])
    assert store.log == [("prefetch", handle) for handle in range(folding.AHEAD)]


@pytest.mark.parametrize("codec", ["identity", {"type": "block", "bits": 8}])
def test_buffered_updates_are_opened_in_their_own_round_and_weigh_less(codec: Any) -> None:
    """`block` rotates with a seed of the round: opened in another one, an update would be noise."""
    job = job_of(codec=codec, buffer={"goal": 2, "power": 1.0})
    store, updates = Store(), noise(2)
    fresh = send(job, store, "r0", updates[0], 10, round=5)
    stale = send(job, store, "r1", updates[1], 10, round=2)
    stale = stale[0].model_copy(update={"staleness": 3}), stale[1]
    reports, handles = zip(fresh, stale, strict=True)
    plan = plan_of().model_copy(update={"round": 5})
    total, merged = Aggregation(job, LocalCrew(job, store)).merge(plan, LAYOUT, reports, handles)
    assert total.weights == pytest.approx((0.5, 0.5 / 4))
    expected = 0.5 * updates[0] + 0.125 * updates[1]
    np.testing.assert_allclose(open_sum(job, store, total, merged), expected, atol=4e-5)


def test_updates_of_later_rounds_are_refused_even_then() -> None:
    job, store = job_of(buffer={"goal": 2}), Store()
    report, handles = send(job, store, "r0", noise(1)[0], 10, round=3)
    with pytest.raises(AggregationError, match="reports round 3, expected 1"):
        Aggregation(job, LocalCrew(job, store)).merge(plan_of(), LAYOUT, [report], [handles])

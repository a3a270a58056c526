"""A whole region hidden in a merge: clipped as it arrived, noise measured on what comes out, and nothing of it on a wrapped ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.merging import LAYOUT, LENGTHS, LocalCrew, Store, job_of, noise, open_sum, plan_of, send
from tests.strategies import Array, quick
from tests.test_masking import World
from xcloud.aggregation import Aggregation
from xcloud.checkpoint import CheckpointStore
from xcloud.codecs import Frame, Grid, ring_of
from xcloud.config import JobConfig
from xcloud.errors import (
    ConfigError,
    NonFiniteUpdateError,
    PrivacyAccountingError,
    PrivacyBudgetError,
)
from xcloud.ledger import Ledger
from xcloud.messages import PrivacyTerms, RoundSum
from xcloud.privacy import PrivacyLedger, Release
from xcloud.privacy.accounting import gaussian_epsilon
from xcloud.privacy.noise import SecureRandom
from xcloud.privacy.skellam import (
    ROTATED,
    GridPlan,
    Skellam,
    grid_dimension,
    plan_grid,
    skellam_epsilon,
    smallest_block,
)
from xcloud.update import Framing, UpdatePath, exact_norm_squared

SIZE = sum(LENGTHS)
EQUAL = {"type": "mean", "weigh_by": "equal"}


def job(count: int = 3, **changes: Any) -> JobConfig:
    dp = {"unit": "region", "clip_norm": 0.5, "noise_multiplier": 2.0} | changes.pop("dp", {})
    quiet = {"sequences": 0}
    return job_of(["c"] * count, dp=dp, aggregator=EQUAL, evaluation=quiet, **changes)


def merged(job: JobConfig, updates: Sequence[Array], actors: int = 1) -> tuple[RoundSum, Array]:
    store, crew_job = Store(), job.model_copy(update={"aggregation_actors": actors})
    offers = [send(job, store, f"r{i}", update, 100 + i) for i, update in enumerate(updates)]
    reports, handles = zip(*offers, strict=True)
    total, out = Aggregation(crew_job, LocalCrew(crew_job, store)).merge(plan_of(), LAYOUT, reports, handles)
    return total, open_sum(job, store, total, out)


# -- central Gaussian --------------------------------------------------------------------------


@pytest.mark.parametrize("actors", [1, 3])
def test_the_noise_that_comes_out_is_that_of_the_accounting(actors: int) -> None:
    """Standard deviation noise_multiplier x clip_norm / n on each coordinate, independent from merge to merge."""
    private, zero = job(), [np.zeros(SIZE, np.float32)] * 3
    (_, one), (_, two) = merged(private, zero, actors), merged(private, zero, actors)
    expected = 2.0 * 0.5 / 3
    for found in (one, two):
        assert abs(found.std() / expected - 1) < 5 / math.sqrt(2 * SIZE)
        assert abs(found.mean()) < 5 * expected / math.sqrt(SIZE)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_a_huge_update_counts_no_more_than_the_clip_norm() -> None:
    quiet = job(dp={"noise_multiplier": 1e-6})
    honest = noise(3)
    loud = [honest[0], honest[1], 1e6 * honest[2]]
    _, found = merged(quiet, loud)
    clipped = [u * min(1.0, 0.5 / np.linalg.norm(u)) for u in loud]
    assert np.abs(found - sum(clipped) / 3).max() < 1e-5
    _, without = merged(quiet, loud[:2])
    assert np.linalg.norm(found - without) <= 0.5 / 3 + 1e-4  # what one region changes, at most


@quick
@given(st.floats(1e-6, 1e6), st.integers(0, 2))
def test_one_region_changes_the_merge_by_its_share_of_the_clip_norm(length: float, which: int) -> None:
    quiet, updates = job(dp={"noise_multiplier": 1e-9}), noise(3)
    updates[which] = (length * updates[which]).astype(np.float32)
    _, whole = merged(quiet, updates)
    _, rest = merged(quiet, [u if i != which else 0 * u for i, u in enumerate(updates)])
    assert np.linalg.norm(whole - rest) <= 0.5 / 3 * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("codec", ["bf16", {"type": "block", "bits": 4}, "topk"])
def test_what_is_clipped_is_what_arrived(codec: Any) -> None:
    """A codec's error could make an update longer than the region had clipped it to."""
    quiet = job(dp={"noise_multiplier": 1e-9}, codec=codec)
    loud = [1e4 * update for update in noise(3)]
    _, whole = merged(quiet, loud)
    _, rest = merged(quiet, [loud[0], loud[1], 0 * loud[2]])
    assert np.linalg.norm(whole - rest) <= 0.5 / 3 * (1 + 1e-6)


def test_the_denominator_is_the_number_of_the_jobs_regions() -> None:
    quiet, updates = job(dp={"noise_multiplier": 1e-13, "clip_norm": 1e3}), noise(3)
    _, found = merged(quiet, updates[:2])
    assert np.abs(found - (updates[0] + updates[1]) / 3).max() < 1e-6


def test_regions_are_not_told_how_long_the_others_updates_were() -> None:
    total, _ = merged(job(), [noise(3)[0], 100 * noise(3)[1], noise(3)[2]])
    assert total.weights == (1 / 3,) * 3


def test_an_update_without_a_norm_is_named() -> None:
    updates = noise(3)
    updates[1][77] = np.nan
    with pytest.raises(NonFiniteUpdateError) as told:
        merged(job(), updates)
    assert told.value.region == "r1"


def test_terms_cost_what_the_analytic_gaussian_says() -> None:
    terms = job(dp={"noise_multiplier": 1.0}).dp.central_terms(1)  # type: ignore[union-attr]
    ledger = PrivacyLedger(unit="region", delta=1e-5)
    ledger = ledger.with_releases((Release(round=1, region="r0", steps=1, terms=terms),))
    assert ledger.epsilon("r0") == pytest.approx(4.377178, abs=2e-3)
    calibrated = job(dp={"noise_multiplier": None, "target_epsilon": 1.0}).dp.central_terms(1)  # type: ignore[union-attr]
    assert calibrated.noise_multiplier == pytest.approx(3.7306316, rel=1e-4)
    assert gaussian_epsilon(3.7306316, 1e-5) == pytest.approx(1.0, abs=1e-5)


# -- distributed Skellam -----------------------------------------------------------------------


def grid_of(**changes: Any) -> GridPlan:
    facts: dict[str, Any] = {
        "clip_norm": 1.0,
        "dimension": 1 << 17,
        "regions": 4,
        "survivors": 3,
        "colluders": 0,
        "bits": 16,
        "noise_multiplier": 1.0,
        "target_epsilon": None,
        "delta": 1e-5,
        "times": 10,
    }
    return plan_grid(**facts | changes)


@quick
@given(
    st.integers(10, 27),
    st.integers(3, 64),
    st.floats(0.3, 20),
    st.floats(1e-4, 1e4),
    st.integers(0, 1),
)
def test_the_sum_fits_the_ring_and_the_shares_make_the_noise(
    log_dimension: int, regions: int, multiplier: float, clip: float, colluders: int
) -> None:
    facts = {
        "dimension": 1 << log_dimension,
        "regions": regions,
        "survivors": max(3, colluders + 2),
        "colluders": colluders,
        "bits": 32,
        "noise_multiplier": multiplier,
        "clip_norm": clip,
    }
    grid = grid_of(**facts)
    all_noise = math.sqrt(regions * grid.share)
    assert regions * grid.limit + 8 * all_noise <= (1 << 31) - 1
    assert grid.share * (facts["survivors"] - colluders) == pytest.approx(grid.variance)
    assert grid.l2 >= clip / grid.step
    assert math.sqrt(grid.variance) == pytest.approx(multiplier * grid.l2)
    assert Skellam(min(grid.share, 1e4)).variance > 0


def test_a_ring_that_is_too_small_is_refused() -> None:
    with pytest.raises(PrivacyAccountingError, match=r"a ring of 16 bits is too small .* codec.ring: 32"):
        grid_of(dimension=1 << 26, noise_multiplier=5.0)


def test_a_target_is_met() -> None:
    grid = grid_of(noise_multiplier=None, target_epsilon=6.0)
    spent = skellam_epsilon(grid.variance, grid.l1, grid.l2, 1e-5, times=10)
    assert 5.9 < spent <= 6.0


@quick
@given(st.integers(0, 2**32), st.integers(1, 9000), st.floats(0.01, 100))
def test_an_encoding_is_no_longer_than_the_sensitivity(seed: int, length: int, stretch: float) -> None:
    """Of integers, whatever the update: clipping, rotation and rounding together."""
    dimension = grid_dimension([length])
    grid = grid_of(dimension=dimension, clip_norm=0.25)
    codec, frame = Grid(16, grid.step, grid.limit), Frame(shared=seed)
    update = np.random.default_rng(seed).standard_normal(length).astype(np.float32) * np.float32(stretch)
    update *= np.float32(min(1.0, 0.25 / float(np.linalg.norm(update))))
    integers = codec.encode(update, frame).view("<i2").astype(np.float64)
    assert integers.size == dimension
    assert np.linalg.norm(integers) <= grid.l2 * (1 + 1e-6)
    assert np.abs(integers).sum() <= grid.l1 * (1 + 1e-6)
    assert np.abs(integers).max() <= grid.limit


@pytest.mark.parametrize("bits", [16, 32])
def test_the_noise_on_the_grid_is_that_of_the_accounting(bits: Any) -> None:
    grid = grid_of(bits=bits, dimension=SIZE, regions=3)
    shares = [Grid(bits, grid.step, grid.limit, Sampler(grid.share)) for _ in range(3)]
    plain, frame = Grid(bits, grid.step, grid.limit), Frame(shared=5, members=3)
    updates = [1e-3 * u[:5000] / np.linalg.norm(u[:5000]) for u in noise(3)]
    total = shares[0].encode(updates[0], frame)
    for codec, update in zip(shares[1:], updates[1:], strict=True):
        plain.add(total, codec.encode(update, frame), frame)
    exact = sum(plain.encode(u, frame).view(f"<i{bits // 8}").astype(np.int64) for u in updates)
    found = total.view(f"<i{bits // 8}").astype(np.int64) - exact
    assert abs(found.var() / grid.variance - 1) < 5 * math.sqrt(2 / found.size)
    decoded = plain.decode(total, 5000, frame)
    assert decoded.std() == pytest.approx(grid.step * math.sqrt(grid.variance), rel=0.05)


class Sampler:
    """A region's share, as ranks draw it."""

    def __init__(self, variance: float) -> None:
        self.noise, self.random = Skellam(variance), SecureRandom()

    def __call__(self, count: int) -> Any:
        return self.noise.sample(self.random, count)


def test_masked_sums_on_the_grid_are_exact(tmp_path: Path) -> None:
    """The protocol of masks knows the ring and nothing else of the codec."""
    dp = {"unit": "region", "mechanism": "skellam", "noise_multiplier": 1.0}
    world = World(
        tmp_path,
        codec={"type": "grid"},
        dp=dp,
        aggregator=EQUAL,
        evaluation={"sequences": 0},
    )
    grid = grid_of(dimension=grid_dimension(LENGTHS))
    kept: dict[str, list[Any]] = {}

    def path(name: str) -> UpdatePath:
        framing = Framing("m", world.job.seed, len(world.names), name)
        codec = Grid(16, grid.step, grid.limit, Sampler(grid.share))
        found = UpdatePath(codec, world.job.downlink.build(), framing, LAYOUT, range(len(LAYOUT)), divisor=4)
        encode = found.encode

        def once(number: int, chunk: int, delta: Array, share: float) -> Any:
            out = encode(number, chunk, delta, share)
            kept.setdefault(name, []).append(out.copy())
            return out

        found.encode = once  # type: ignore[method-assign]
        return found

    world.path = path  # type: ignore[method-assign]
    updates = dict(zip(world.names, noise(4), strict=True))
    total, handles = world.play(updates)
    sums = [sum(kept[n][c].view("<u2").astype(np.int64) for n in world.names) for c in range(len(LAYOUT))]
    expected = [(s % 65536).astype("<u2").tobytes() for s in sums]
    from tests.merging import encodings  # noqa: PLC0415

    assert list(encodings(world.store, total, handles).values()) == expected
    assert path("r0").decode(0, np.frombuffer(expected[0], np.uint8), total).size == LENGTHS[0]


def test_the_divisor_is_fixed_whoever_is_in_the_sum() -> None:
    framing = Framing("m", 0, 4, "r0")
    codec = Grid(16, 1.0, 1000)
    path = UpdatePath(codec, job_of().downlink.build(), framing, LAYOUT, range(1), divisor=4)
    frame = framing.frame(1, 0, LAYOUT[0])
    data = codec.encode(np.full(LENGTHS[0], 8.0, np.float32), frame)
    for survivors in (3, 4):
        total = RoundSum(
            round=1, attempt=1, regions=("r0",) * survivors, weights=(), chunk_bytes=(), norm=None, fold_s=0,
            summed=True, total_share=survivors,
        )  # fmt: skip
        whole = codec.decode(data, LENGTHS[0], frame)
        assert np.allclose(path.decode(0, data, total), whole / 4)


def test_a_grid_says_nothing_but_its_integers() -> None:
    ring = ring_of(Grid(16), 5000, Frame())
    assert ring is not None
    assert (ring.front, ring.width) == (0, 16)
    assert ring.size == 2 * grid_dimension([5000])
    assert Grid(16).next_scale(np.zeros(4, np.float32), np.zeros(8, np.uint8), 3, Frame()) is None
    assert ROTATED == 4096


# -- ledger ------------------------------------------------------------------------------------


def test_skellam_releases_are_composed_and_stop_at_the_budget() -> None:
    grid = grid_of()
    terms = PrivacyTerms(
        unit="region",
        sampling_probability=1.0,
        noise_multiplier=1.0,
        skellam=(grid.variance, grid.l1, grid.l2),
    )
    budget = skellam_epsilon(grid.variance, grid.l1, grid.l2, 1e-5, times=3) * 1.0001
    ledger = PrivacyLedger(unit="region", delta=1e-5, budget=budget)
    for number in (1, 2, 3):
        release = Release(round=number, region="r0", steps=1, terms=terms)
        ledger = ledger.with_releases((release,))
    assert ledger.epsilon("r0") == pytest.approx(budget / 1.0001)
    with pytest.raises(PrivacyBudgetError, match=r"epsilon per region from .* past the budget"):
        ledger.with_releases((Release(round=4, region="r0", steps=1, terms=terms),))
    gaussian = terms.model_copy(update={"skellam": None})
    mixed = ledger.model_copy(
        update={"releases": (*ledger.releases, Release(round=4, region="r0", steps=1, terms=gaussian))}
    )
    with pytest.raises(PrivacyAccountingError, match="under Gaussian and under Skellam noise"):
        mixed.epsilon("r0")


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("rounds", [1, 4, 16, 100])
def test_a_calibrated_job_may_play_all_its_rounds(target: float, rounds: int) -> None:
    dp = job(dp={"noise_multiplier": None, "target_epsilon": target}).dp
    assert dp is not None
    terms = dp.central_terms(rounds)
    ledger = PrivacyLedger(unit="region", delta=dp.delta, budget=target)
    for number in range(1, rounds + 1):
        ledger = ledger.with_releases((Release(round=number, region="r0", steps=1, terms=terms),))
    assert 0.999 * target < ledger.epsilon("r0") <= target
    with pytest.raises(PrivacyBudgetError):
        ledger.with_releases((Release(round=rounds + 1, region="r0", steps=1, terms=terms),))


def test_a_merge_under_masks_that_is_tried_again_is_booked_for_what_it_may_cost(tmp_path: Path) -> None:
    """One region's change under its own shares alone: 2 x sensitivity over 2 shares of the noise."""
    dp = {"unit": "region", "mechanism": "skellam", "noise_multiplier": 4.0}
    skellam = job_of(
        ["c"] * 4, dp=dp, codec="grid", secure_aggregation={}, aggregator=EQUAL, evaluation={"sequences": 0}
    )
    ledger = Ledger(skellam, CheckpointStore(tmp_path), tmp_path)
    grid = grid_of(noise_multiplier=4.0)
    terms = PrivacyTerms(
        unit="region", sampling_probability=1.0, noise_multiplier=4.0, skellam=(grid.variance, grid.l1, grid.l2)
    )  # fmt: skip
    ledger.terms = {"r0": terms}
    ledger.privacy = PrivacyLedger(unit="region", delta=1e-5)
    plan = plan_of()
    ledger.spend(plan, [])
    ledger.spend(plan.model_copy(update={"attempt": 2}), [])
    assert [release.steps for release in ledger.privacy.releases] == [1, 6]
    change = skellam_epsilon(2 * grid.share, 2 * grid.l1, 2 * grid.l2, 1e-5)
    assert ledger.privacy.epsilon("r0") >= change


@pytest.mark.parametrize("length", [37, 5000, (1 << 22) + 3])
def test_norms_are_not_taken_too_small(length: int) -> None:
    values = (0.1 + 0.01 * np.random.default_rng(length).standard_normal(length)).astype(np.float32)
    exact = math.fsum(float(v) * float(v) for v in values[:: max(1, length // 5000)])
    taken = exact_norm_squared(values[:: max(1, length // 5000)])
    assert taken == pytest.approx(exact, rel=1e-12)
    whole = np.sum(values.astype(np.longdouble) ** 2)
    assert exact_norm_squared(values) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("length", [1, 37, 100, 4097])
def test_a_short_block_that_holds_the_whole_update_is_not_cut(length: int) -> None:
    grid = grid_of(dimension=grid_dimension([length, 1 << 17]), smallest=smallest_block([length, 1 << 17]))
    codec, frame = Grid(16, grid.step, grid.limit), Frame(shared=3)
    update = np.zeros(length, np.float32)
    update[-min(length, 37) :] = 1.0
    update *= np.float32((1 - 1e-5) / np.linalg.norm(update))
    back = codec.decode(codec.encode(update, frame), length, frame)
    assert np.linalg.norm(back) > 0.99


# -- the job file ------------------------------------------------------------------------------

SKELLAM = {"mechanism": "skellam"}
MASKS = {"secure_aggregation": {}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"aggregator": "mean"}, "expected aggregator: {type: mean, weigh_by: equal}"),
    ({"aggregator": "median"}, "expected aggregator: {type: mean, weigh_by: equal}"),
    ({"hierarchy": "cloud"}, "expected hierarchy flat"),
    ({"buffer": {"goal": 2}}, "dp.unit region books a merge before its round begins, while buffer"),
    ({"streaming": {"overlap": 1}, "inner": {"steps": 4}}, "while streaming.overlap"),
    ({"guards": {"norm": 4}, "checkpoint": {"every": 1}}, "guards look at losses and norms"),
    ({"evaluation": {"sequences": 4}}, "expected evaluation.sequences: 0, or evaluate_on with public text"),
    (
        {"secure_aggregation": {}, "codec": "fixed"},
        "expected dp.mechanism: skellam, or no secure_aggregation",
    ),
    ({"codec": "fixed"}, "expected a codec that is opened"),
    ({"codec": "sparse"}, "codec sparse sends more bytes for some updates than for others"),
    ({"dp": SKELLAM, "codec": "grid"}, "expected secure_aggregation, or dp.mechanism: gaussian"),
    ({"dp": SKELLAM, "codec": "fixed", **MASKS}, "expected codec grid"),
    ({"codec": "grid"}, "codec grid takes its step and its noise from dp"),
    ({"dp": SKELLAM | {"unit": "example"}}, "expected unit: region, or mechanism: gaussian"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=str)
def test_what_cannot_be_combined_is_refused(changes: dict[str, Any], said: str) -> None:
    dp = {"unit": "region", "noise_multiplier": 1.0} | changes.get("dp", {})
    facts = {"aggregator": EQUAL, "evaluation": {"sequences": 0}} | changes | {"dp": dp}
    with pytest.raises(ConfigError) as told:
        job_of(["c"] * 4, **facts)
    assert said in str(told.value)

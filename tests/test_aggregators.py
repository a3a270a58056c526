"""What every aggregator promises, checked on all of them.

A new aggregator needs an entry in `REFERENCE`: the same algorithm in float64, as plainly as it can be written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Array, quick, report, reports, updates
from xcloud.aggregators import AGGREGATORS, Aggregator, Gram, MeanConfig
from xcloud.errors import AggregationError
from xcloud.messages import RegionReport

Double = npt.NDArray[np.float64]


def plain_mean(values: Sequence[Double], weights: Sequence[float]) -> Double:
    """`sum(w * u)`."""
    return np.sum([w * u for w, u in zip(weights, values, strict=True)], axis=0)  # type: ignore[no-any-return]


def plain_median(values: Sequence[Double], weights: Sequence[float]) -> Double:
    """Of each coordinate."""
    del weights
    return np.median(values, axis=0)  # type: ignore[no-any-return]


def plain_trimmed(values: Sequence[Double], weights: Sequence[float]) -> Double:
    """A fifth of the regions left out at each end."""
    del weights
    cut = len(values) // 5
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)  # type: ignore[no-any-return]


REFERENCE: dict[str, Callable[[Sequence[Double], Sequence[float]], Double]] = {
    "mean": plain_mean,
    "dynamic": plain_mean,
    "loss_over_size": plain_mean,
    "rda": plain_mean,
    "norm_bound": plain_mean,
    "fednova": plain_mean,
    "multi_krum": plain_mean,
    "trimmed_mean": plain_trimmed,
    "median": plain_median,
}

SUM_TO_ONE = sorted(set(REFERENCE) - {"rda", "norm_bound", "fednova"})


def gram_of(values: Sequence[Array]) -> Gram:
    """Inner products, as the aggregation takes them."""
    stacked = np.stack([v.astype(np.float64) for v in values])
    return stacked @ stacked.T


def noise(count: int) -> list[Array]:
    """Updates of so many regions."""
    return [np.random.default_rng(i).standard_normal(9).astype(np.float32) for i in range(count)]


every_aggregator = pytest.mark.parametrize("name", AGGREGATORS.names)


def aggregator(name: str) -> Aggregator:
    """The aggregator with its default settings."""
    return AGGREGATORS.parse(name).build()  # type: ignore[no-any-return]


def combine(name: str, values: Sequence[Array], weights: Sequence[float]) -> Array:
    """One chunk, combined by a fresh aggregator into memory that holds something else."""
    out = np.full_like(values[0], np.nan)
    aggregator(name).combine(values, weights, out)
    return out


def test_every_aggregator_is_tested() -> None:
    assert set(REFERENCE) == set(AGGREGATORS.names)


@pytest.mark.parametrize("name", SUM_TO_ONE)
@quick
@given(sent=reports())
def test_weights_sum_to_one(name: str, sent: list[RegionReport]) -> None:
    weights = aggregator(name).weights(sent, gram_of(noise(len(sent))))
    assert len(weights) == len(sent)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert all(w >= 0 for w in weights)


@every_aggregator
@quick
@given(values=updates(), data=st.data())
def test_equals_a_float64_reference(name: str, values: list[Array], data: st.DataObject) -> None:
    weights = aggregator(name).weights(data.draw(reports(len(values))), gram_of(values))
    expected = REFERENCE[name]([v.astype(np.float64) for v in values], weights)
    # relative to the largest term: a sum whose terms cancel is no more exact than they are
    terms = [max(1.0, abs(w)) * np.abs(v).astype(np.float64) for w, v in zip(weights, values, strict=True)]
    scale = np.sum(terms, axis=0)
    assert (np.abs(combine(name, values, weights) - expected) <= 1e-6 * scale + 1e-38).all()


@every_aggregator
def test_equals_a_float64_reference_on_a_large_chunk(name: str) -> None:
    numbers = np.random.default_rng(3)
    values = [numbers.standard_normal(200_003).astype(np.float32) for _ in range(7)]
    weights = aggregator(name).weights([report(f"r{i}", 10 + i) for i in range(7)], gram_of(values))
    expected = REFERENCE[name]([v.astype(np.float64) for v in values], weights)
    off = np.linalg.norm(combine(name, values, weights) - expected) / np.linalg.norm(expected)
    assert off <= 1e-6


@every_aggregator
@quick
@given(values=updates(), data=st.data())
def test_is_the_same_bit_for_bit(name: str, values: list[Array], data: st.DataObject) -> None:
    """Twice by one aggregator, and by another one: nothing is carried from call to call."""
    weights = aggregator(name).weights(data.draw(reports(len(values))), gram_of(values))
    first, second, used = np.empty_like(values[0]), np.empty_like(values[0]), aggregator(name)
    used.combine(values, weights, first)
    used.combine(values, weights, second)
    assert first.tobytes() == second.tobytes() == combine(name, values, weights).tobytes()


@every_aggregator
@pytest.mark.parametrize("block", [1, 7, 64, 1000, 5000])
def test_does_not_depend_on_the_block_size(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(block)
    values = [numbers.standard_normal(1000).astype(np.float32) for _ in range(4)]
    weights = aggregator(name).weights([report(f"r{i}", 10 + i) for i in range(4)], gram_of(values))
    expected = combine(name, values, weights)
    monkeypatch.setattr(sys.modules[type(aggregator(name)).__module__], "BLOCK", block, raising=False)
    assert combine(name, values, weights).tobytes() == expected.tobytes()


@every_aggregator
@quick
@given(values=updates(max_regions=1))
def test_one_region_alone_is_taken_as_it_is(name: str, values: list[Array]) -> None:
    weights = aggregator(name).weights([report("alone", 17)], gram_of(values))
    assert weights == [1.0]
    assert combine(name, values, weights).tobytes() == values[0].tobytes()


@every_aggregator
@quick
@given(values=updates(), data=st.data())
def test_leaves_the_updates_alone(name: str, values: list[Array], data: st.DataObject) -> None:
    """They are read-only views of what the regions sent."""
    for value in values:
        value.flags.writeable = False
    before = [value.tobytes() for value in values]
    combine(name, values, aggregator(name).weights(data.draw(reports(len(values))), gram_of(values)))
    assert [value.tobytes() for value in values] == before


def test_mean_weighs_by_tokens_unless_told_otherwise() -> None:
    sent = [report("a", 300), report("b", 100), report("c", 0)]
    assert MeanConfig().build().weights(sent) == [0.75, 0.25, 0.0]
    assert MeanConfig(weigh_by="equal").build().weights(sent) == [1 / 3] * 3


def test_mean_of_regions_that_trained_on_nothing() -> None:
    """No inner steps: equal weights rather than a division by zero."""
    assert MeanConfig().build().weights([report("a", 0), report("b", 0)]) == [0.5, 0.5]


def test_mean_lets_nothing_that_is_not_finite_disappear() -> None:
    """The aggregation actor refuses such a sum; a mean that hid it would commit it."""
    out = np.empty(3, np.float32)
    bad = np.array([np.nan, np.inf, 1.0], np.float32)
    MeanConfig().build().combine([np.ones(3, np.float32), bad], [0.5, 0.5], out)
    assert np.isnan(out[0])
    assert np.isinf(out[1])
    assert out[2] == 1.0


@pytest.mark.parametrize("hostile", [np.nan, np.inf, 1e30])
def test_multi_krum_leaves_out_what_is_not_a_number(hostile: float) -> None:
    """A NaN has no distance, so it is the farthest; and its weight of 0 keeps it out of the sum."""
    values, sent = noise(5), [report(f"r{i}", 1) for i in range(5)]
    values[1][3] = hostile
    krum = AGGREGATORS.parse({"type": "multi_krum", "faulty": 1}).build()
    with np.errstate(invalid="ignore"):
        weights = krum.weights(sent, gram_of(values))
    assert weights == [0.25, 0, 0.25, 0.25, 0.25]
    merged = np.empty(9, np.float32)
    krum.combine(values, weights, merged)
    np.testing.assert_allclose(
        merged, np.mean([values[i] for i in (0, 2, 3, 4)], axis=0), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("weights", [[0.0, 0.7, 0.3], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]])
def test_mean_leaves_out_what_has_no_weight(weights: list[float]) -> None:
    bad, *good = noise(3)
    bad[:] = np.nan
    out = np.empty(9, np.float32)
    MeanConfig().build().combine([bad, *good], weights, out)
    expected = weights[1] * good[0] + weights[2] * good[1]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


@every_aggregator
def test_threads_may_share_an_aggregator(name: str) -> None:
    """The aggregation actor folds several chunks side by side with one of it."""
    numbers, used = np.random.default_rng(5), aggregator(name)
    chunks = [[numbers.standard_normal(40_001).astype(np.float32) for _ in range(3)] for _ in range(8)]
    weights = used.weights([report(f"r{i}", 10 + i) for i in range(3)], gram_of(noise(3)))
    outs = [np.empty_like(values[0]) for values in chunks]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: used.combine(pair[0], weights, pair[1]), zip(chunks, outs, strict=True)))
    for values, out in zip(chunks, outs, strict=True):
        assert out.tobytes() == combine(name, values, weights).tobytes()


def test_dynamic_leans_towards_the_higher_loss() -> None:
    sent = [report("a", 100, train_loss=1.0), report("b", 100, train_loss=3.0)]
    assert AGGREGATORS.parse("dynamic").build().weights(sent) == pytest.approx([0.25, 0.75])
    plain = AGGREGATORS.parse({"type": "dynamic", "temperature": 0.0}).build()
    assert plain.weights(sent) == pytest.approx([0.5, 0.5])


def test_loss_over_size_is_its_formula() -> None:
    """compute_s is 1, so a region's throughput is its tokens."""
    sent = [report("a", 100, train_loss=1.0), report("b", 400, train_loss=3.0)]
    raw = [1.0 / (100 * 100**0.5), 3.0 / (400 * 400**0.5)]
    expected = [value / sum(raw) for value in raw]
    assert AGGREGATORS.parse("loss_over_size").build().weights(sent) == pytest.approx(expected)


def test_rda_keeps_the_mean_length() -> None:
    """Two updates at right angles: the plain mean is shorter than either, this one is not."""
    values = [np.array([3.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)]
    sent = [report("a", 100), report("b", 100)]
    merged = combine("rda", values, aggregator("rda").weights(sent, gram_of(values)))
    np.testing.assert_allclose(merged, 2.0 * np.array([1.0, 1.0]) / np.sqrt(2), rtol=1e-6)
    opposite = [values[0], -values[0]]
    assert aggregator("rda").weights(sent, gram_of(opposite)) == [0.5, 0.5]


def test_norm_bound_scales_to_the_median_norm() -> None:
    values = [np.array([length], np.float32) for length in (1.0, 2.0, 10.0)]
    sent = [report(f"r{i}", 100) for i in range(3)]
    weights = aggregator("norm_bound").weights(sent, gram_of(values))
    assert weights == pytest.approx([1 / 3, 1 / 3, 1 / 15])


def test_multi_krum_leaves_out_what_lies_apart() -> None:
    """Against every subset by brute force: the kept ones have the smallest sums of distances."""
    values = noise(7)
    values[2] = values[2] + 50
    krum = AGGREGATORS.parse({"type": "multi_krum", "faulty": 1, "keep": 3}).build()
    weights = krum.weights([report(f"r{i}", 1) for i in range(7)], gram_of(values))
    scores = []
    for one in values:
        near = sorted(float(np.sum((one - other) ** 2)) for other in values)[1:]
        scores.append(sum(near[: 7 - 1 - 2]))
    best = sorted(range(7), key=lambda i: scores[i])[:3]
    assert [w > 0 for w in weights] == [i in best for i in range(7)]
    assert weights[2] == 0
    with pytest.raises(AggregationError, match="faulty: 1 needs at least 5 regions, 4 answered"):
        krum.weights([report(f"r{i}", 1) for i in range(4)], gram_of(values[:4]))


def test_fednova_makes_steps_count_alike() -> None:
    """Three steps against one: each update is divided by its own steps, the mean multiplied by their mean."""
    slow, fast = report("a", 100), report("b", 100)
    pool = fast.pools[0].model_copy(update={"steps": 3})
    weights = aggregator("fednova").weights([slow, fast.model_copy(update={"pools": (pool,)})])
    assert weights == pytest.approx([0.5 * 2 / 1, 0.5 * 2 / 3])


def test_an_update_that_vanishes_has_no_direction() -> None:
    """`rda` would stretch it by more than fp32 holds."""
    values = [np.array([16.0], np.float32), np.array([1e-38], np.float32)]
    weights = aggregator("rda").weights([report("a", 1), report("b", 1)], gram_of(values))
    assert weights == [0.5, 0.5]

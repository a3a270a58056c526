"""Secure aggregation opens the exact sum of the survivors, whoever drops out at whatever stage, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.secure.cohort import Cohort
from xcloud.codecs import FixedConfig, RandomKConfig
from xcloud.errors import SecurityError
from xcloud.secure.member import threshold

STAGES = ["advert", "share", "upload", "agree", "unmask", "confirm"]
BEFORE_UPLOAD = STAGES[:3]


def same(totals: list[Any], expected: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(totals, expected, strict=True))


@pytest.mark.parametrize(
    ("count", "colluders", "expected"), [(3, 0, 2), (4, 1, 3), (8, 2, 6), (16, 5, 11), (64, 21, 43)]
)
def test_the_threshold_is_the_smallest_with_one_honest_region_in_two_sets(
    count: int, colluders: int, expected: int
) -> None:
    assert threshold(count, colluders) == expected
    assert 2 * (expected - 1) <= count + colluders < 2 * expected


@pytest.mark.parametrize(
    "codec",
    [
        FixedConfig(bits=8),
        FixedConfig(bits=4),
        FixedConfig(bits=2, rounding="nearest"),
        FixedConfig(ring=16),
        FixedConfig(ring=8, rotate=False),
        RandomKConfig(bits=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("gone", [[], ["r01"]])
def test_the_sum_is_exact_in_every_ring(codec: Any, gone: list[str]) -> None:
    cohort = Cohort(5, codec=codec.build())
    totals, result = cohort.run({"upload": gone})
    assert same(totals, cohort.exact(result.names))
    assert set(cohort.names) - set(result.names) == set(gone)
    assert result.weight == sum(cohort.weights[name] for name in result.names)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dropout_at_any_stage_costs_at_most_its_own_update(stage: str) -> None:
    cohort = Cohort(8, 2)
    totals, result = cohort.run({stage: ["r03"]})
    counted = set(cohort.names) - ({"r03"} if stage in BEFORE_UPLOAD else set())
    assert set(result.names) == counted
    assert same(totals, cohort.exact(counted))


def test_dropouts_at_several_stages_add_up() -> None:
    cohort = Cohort(16, 5)
    silent = dict(zip(STAGES[:5], (["r00"], ["r01"], ["r02"], ["r03"], ["r04"]), strict=True))
    totals, result = cohort.run(silent)
    assert same(totals, cohort.exact(set(cohort.names) - {"r00", "r01", "r02"}))
    assert result.weight == sum(cohort.weights[name] for name in result.names)


@pytest.mark.parametrize("stage", STAGES)
def test_more_dropouts_than_the_threshold_allows_end_the_sync(stage: str) -> None:
    cohort = Cohort(8, 2)
    with pytest.raises(SecurityError, match=r"round 1: 5 good .*, expected at least 6"):
        cohort.run({stage: ["r00", "r02", "r05"]})
    if stage not in ("unmask", "confirm"):
        assert not any(memory.unmasked for memory in cohort.memories.values())


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_cohort_with_any_dropouts_gives_the_exact_sum_or_nothing(data: Any) -> None:
    count = data.draw(st.integers(3, 9), "regions")
    colluders = data.draw(st.integers(0, (count - 1) // 3), "colluders")
    lengths = tuple(data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=3), "chunks"))
    bits = data.draw(st.sampled_from([2, 4, 8]), "bits")
    cohort = Cohort(count, colluders, FixedConfig(bits=bits).build(), seed=count, lengths=lengths)
    silent: dict[str, list[str]] = {}
    for name in cohort.names:
        stage = data.draw(st.sampled_from([*STAGES, None, None, None]), name)
        if stage:
            silent.setdefault(stage, []).append(name)
    needed = max(threshold(count, colluders), 3, colluders + 2)
    there, enough, counted = set(cohort.names), True, set(cohort.names)
    for stage in STAGES:
        there -= set(silent.get(stage, ()))
        if stage in BEFORE_UPLOAD:
            counted = set(there)
        wanted = needed if stage in BEFORE_UPLOAD else threshold(count, colluders)
        enough = enough and len(there) >= wanted
    if not enough:
        with pytest.raises(SecurityError, match="expected at least"):
            cohort.run(silent)
        return
    totals, result = cohort.run(silent)
    assert set(result.names) == counted
    assert same(totals, cohort.exact(counted))


def test_what_is_sent_says_nothing_of_an_update() -> None:
    """Masked bytes are uniform: their correlation with the update is that of chance."""
    cohort = Cohort(4, lengths=(1 << 16,), codec=FixedConfig(bits=8, rotate=False).build())
    cohort.run()
    ring = cohort.ring(0)
    for name in cohort.names:
        plain = cohort.encoded(name, 0)[ring.front :].astype(np.float64)
        masked = cohort.masked[name][0][ring.front :].astype(np.float64)
        assert abs(np.corrcoef(plain, masked)[0, 1]) < 0.01
        counts = np.bincount(cohort.masked[name][0], minlength=256)
        assert (
            (counts - counts.mean()) ** 2 / counts.mean()
        ).sum() < 400  # chi-squared, 255 degrees of freedom


def test_two_syncs_of_the_same_update_look_unlike() -> None:
    cohort = Cohort(4)
    cohort.run()
    once = [data.copy() for data in cohort.masked["r00"]]
    cohort.run(signed=cohort.signed(cohort.plan(round=2)))
    alike = np.mean(once[0] == cohort.masked["r00"][0])
    assert alike < 0.02

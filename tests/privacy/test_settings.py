"""The section `dp` of a job, and what it cannot be combined with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.factory import job_of, raw_job, region
from xcloud.config import dump_job, parse_job
from xcloud.errors import ConfigError
from xcloud.privacy import DPConfig
from xcloud.privacy.accounting import Mechanism, epsilon_of

INNER: dict[str, Any] = {"steps": 2, "clip_norm": None}
DP: dict[str, Any] = {"unit": "example", "noise_multiplier": 1.0}


def private_job(
    folder: Path, dp: dict[str, Any] = DP, pool: dict[str, Any] | None = None, **changes: Any
) -> Any:
    pools = [{"workers": 1, "micro_batch": 4} | (pool or {})]
    changes = {"inner": INNER} | changes
    return job_of(raw_job(folder, [region(folder, "a", 1, *pools)], dp=dp, **changes))


def test_a_job_keeps_its_section(tmp_path: Path) -> None:
    job = private_job(tmp_path, DP | {"target_epsilon": 8, "clip_norm": 0.5, "delta": 1e-6})
    assert job.dp == DPConfig(
        unit="example", noise_multiplier=1.0, target_epsilon=8.0, clip_norm=0.5, delta=1e-6
    )
    assert parse_job(dump_job(job)) == job
    assert job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)])).dp is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dp": {"noise_multiplier": 1.0}}, r"dp\.unit: required key is missing"),
        ({"dp": {"unit": "document", "noise_multiplier": 1.0}}, r"dp\.unit: .*'example'"),
        ({"dp": {"unit": "example"}}, "expected noise_multiplier, target_epsilon or both"),
        ({"dp": DP | {"noise_multiplier": 0}}, r"dp\.noise_multiplier: .*greater than 0"),
        ({"dp": DP | {"delta": 1}}, r"dp\.delta: .*less than 1"),
        ({"dp": DP | {"noise_multipler": 1}}, "did you mean 'noise_multiplier'"),
        ({"inner": {"steps": 2}}, r"dp\.clip_norm .* inner\.clip_norm: 1 .*expected inner\.clip_norm: null"),
        ({"aggregator": "loss_over_size"}, "dp keeps training losses .* aggregator 'loss_over_size'"),
        (
            {"aggregator": {"type": "dynamic", "by": "loss"}},
            "dp keeps training losses .* aggregator 'dynamic'",
        ),
        ({"pool": {"precision": "bf16"}}, r"pools\[0\]\.precision bf16 .*dp\.clip_norm would not hold"),
        ({"pool": {"offload": "optimizer"}}, r"pools\[0\]\.offload optimizer .*dp"),
        ({"pool": {"activation_checkpointing": True}}, r"pools\[0\]\.activation_checkpointing .*dp"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        private_job(tmp_path, **changes)


def test_one_pool_in_a_region(tmp_path: Path) -> None:
    pools = [{"workers": 1}, {"workers": 1}]
    with pytest.raises(
        ConfigError, match="dp samples a region's examples for one pool; expected one, found 2"
    ):
        job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, *pools)], dp=DP, inner=INNER))


def test_terms_of_a_region() -> None:
    given = DPConfig(unit="example", noise_multiplier=1.5).terms("a", examples=400, batch=8, steps=100)
    assert (given.unit, given.sampler) == ("example", "poisson")
    assert (given.sampling_probability, given.noise_multiplier) == (0.02, 1.5)
    budget = DPConfig(unit="example", target_epsilon=2.0)
    noise = budget.terms("a", examples=400, batch=8, steps=100).noise_multiplier
    assert 1.98 < epsilon_of([Mechanism(0.02, noise, 100)], budget.delta) <= 2.0
    both = DPConfig(unit="example", target_epsilon=2.0, noise_multiplier=0.7)
    assert both.terms("a", 400, 8, 100).noise_multiplier == 0.7  # the budget then ends the run


def test_data_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="region 'a' has 7 training sequences, less than the 8 of a step"):
        DPConfig(unit="example", noise_multiplier=1.0).terms("a", 7, 8, 1)
    with pytest.raises(
        ConfigError, match=r"dp.delta is 0.01, but region 'a' has 100 .* less than 1/100 = 0.01"
    ):
        DPConfig(unit="example", noise_multiplier=1.0, delta=0.01).terms("a", 100, 8, 1)

"""Real pools and regions of unequal speed: steps follow what is measured, and a round's tokens stay."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.factory import job_of, raw_job, region
from xcloud.launch import train
from xcloud.metrics import RunLog, read_rounds

STEPS, LENGTH = 20, 32


@pytest.mark.slow
def test_steps_follow_what_a_step_takes(tmp_path: Path) -> None:
    """Two regions, one of them with two pools; each sequence is read once, whatever pool it goes to."""
    small, large = ({"workers": 1, "zero_stage": 0, "micro_batch": size} for size in (1, 16))
    regions = [region(tmp_path / "data", "a", 1, small, large), region(tmp_path / "data", "b", 2, small)]
    inner = {"steps": STEPS, "optimizer": {"type": "adamw", "lr": 1e-3}}
    job = job_of(raw_job(tmp_path, regions, rounds=3, inner=inner, balance="dynamic"))
    with RunLog(tmp_path / "run") as log:
        assert train(job, run_dir=tmp_path / "run", log=log).finished
    rows = read_rounds(tmp_path / "run")
    usual = STEPS * (1 + 16 + 1) * LENGTH
    assert rows[0].tokens == usual
    assert [pool.tokens for pool in rows[0].regions["a"].pools] == [STEPS * LENGTH, 16 * STEPS * LENGTH]
    for name in ("a", "b"):  # no gap and no overlap
        read = [row.regions[name].tokens // LENGTH for row in rows]
        assert [row.regions[name].cursor for row in rows] == [sum(read[: n + 1]) for n in range(3)]
    for before, row in itertools.pairwise(rows):
        assert abs(row.tokens - usual) <= 18 * LENGTH
        sizes = [LENGTH, 16 * LENGTH]
        seconds = [
            pool.compute_s * size / pool.tokens
            for pool, size in zip(before.regions["a"].pools, sizes, strict=True)
        ]
        steps = [pool.tokens / size for pool, size in zip(row.regions["a"].pools, sizes, strict=True)]
        few, many = (one * each for one, each in zip(steps, seconds, strict=True))
        assert abs(few - many) <= max(seconds)  # by what was measured before, they would finish together

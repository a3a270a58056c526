"""Muon and SCAFFOLD through the whole system: several ranks, pools, actors, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import play
from tests.e2e.test_equivalence import committed_model, play_round
from tests.factory import job_of, raw_job, region
from tests.training.workers import MemoryBlobs, start_worker

STEPS, ROUNDS = 2, 3
INNER: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": {"type": "muon", "lr": 1e-2}},
    "scaffold": {"optimizer": {"type": "sgd", "lr": 0.3}, "correction": "scaffold", "clip_norm": None},
}


def raw_of(folder: Path, kind: str, pools: list[dict[str, Any]]) -> dict[str, Any]:
    regions = [
        region(folder, name, seed, pool) for seed, (name, pool) in enumerate(zip("ab", pools, strict=True), 1)
    ]
    outer = {"type": "nesterov", "lr": 0.7, "momentum": 0.5}
    return raw_job(folder, regions, rounds=ROUNDS, inner=INNER[kind] | {"steps": STEPS}, outer=outer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "scaffold"])
def test_several_ranks_are_one_rank_across_a_resume(tmp_path: Path, kind: str) -> None:
    """Two ranks under ZeRO 2 and 3, stopped after a round, against one each under ZeRO 0, without actors."""
    pools = [{"workers": 2, "zero_stage": stage, "micro_batch": 2} for stage in (2, 3)]
    raw = raw_of(tmp_path, kind, pools)
    assert play(raw, tmp_path / "run", stop_after=1).round == 1
    assert play(raw, tmp_path / "run", resume=True).round == ROUNDS
    one = job_of(raw_of(tmp_path, kind, [{"workers": 1, "zero_stage": 0, "micro_batch": 4}] * 2))
    shared = MemoryBlobs()
    workers = [start_worker(one, r.name, shared) for r in one.regions]
    for number in range(1, ROUNDS + 1):
        play_round(workers, number, STEPS)
    np.testing.assert_allclose(committed_model(tmp_path / "run"), workers[0].anchor, rtol=0, atol=3e-5)

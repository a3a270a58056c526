"""What a region with `dp` tells the driver, over a real worker in this process in place of its actors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.training.private_ranks import private_job
from tests.training.workers import start_worker
from xcloud import region as module
from xcloud.messages import RegionReady, RegionReport, RoundPlan
from xcloud.region import Pool, Region


def test_a_region_states_its_terms_and_keeps_its_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = private_job(tmp_path, 2, 1, 0.5, optimizer={"type": "adamw", "lr": 1e-3})
    worker = start_worker(job)

    class Here(Pool):
        def ask(self, method: str, *args: Any) -> list[Any]:
            return [getattr(worker, method)(*args)]

    monkeypatch.setattr(module, "gather", lambda answers: answers)
    place = Region(job, "a", "tag", enforce_labels=False)
    place.pools = [Here(job.regions[0].pools[0], None, [None])]
    place._agree([worker.digests()])
    ready = RegionReady.from_wire(place._ready(evaluate=True).to_wire(), "a")
    assert ready.privacy is not None
    assert ready.privacy.unit == "example"
    assert ready.privacy.sampling_probability == 4 / ready.train_sequences
    assert ready.privacy.noise_multiplier == 0.5
    plan = RoundPlan(
        job=job.name,
        round=1,
        attempt=1,
        model_digest=ready.model_digest,
        manifest_digest=ready.manifest_digest,
        inner_steps=2,
    )
    report, _ = place.run(plan)
    report = RegionReport.from_wire(report.to_wire(), "a")
    assert math.isnan(report.train_loss)
    assert math.isnan(report.pools[0].loss_sum)
    assert report.tokens == 2 * 4 * 32
    assert report.update_norm > 0
    again, _ = place.run(plan.model_copy(update={"attempt": 2}))
    assert again.update_norm == report.update_norm  # a retry offers the same update, and no new noise

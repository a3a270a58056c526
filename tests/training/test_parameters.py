"""Full fp32 access to live engines: every ZeRO stage and precision, one rank (several: test_region)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.factory import job_of, raw_job, region
from tests.training.workers import start_worker
from xcloud.errors import NonFiniteUpdateError
from xcloud.messages import RoundPlan
from xcloud.parts import PartReader

PLAN = RoundPlan(job="t", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=2)

LAYOUTS = [(stage, precision, "none") for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")] + [
    (stage, precision, "optimizer") for stage in (1, 2, 3) for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("stage", "precision", "offload"), LAYOUTS)
def test_what_is_written_is_read_back(tmp_path: Path, stage: int, precision: str, offload: str) -> None:
    pool = {"workers": 1, "zero_stage": stage, "micro_batch": 2, "precision": precision, "offload": offload}
    worker = start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, pool)])))
    worker.train(PLAN, 0)  # so that optimizer state exists
    keys, _ = worker._inner_layout()
    assert keys == ["exp_avg", "exp_avg_sq"]
    generator = torch.Generator().manual_seed(0)
    for spec in worker.manifest.parameters:
        for key in (None, *keys):
            value = torch.rand(spec.size, generator=generator)
            worker.parameters.write(spec.name, value, key)
            assert torch.equal(worker.parameters.read(spec.name, key), value), (spec.name, key)


@pytest.mark.parametrize(("stage", "precision", "offload"), LAYOUTS)
def test_a_written_model_is_the_one_that_runs(
    tmp_path: Path, stage: int, precision: str, offload: str
) -> None:
    """The next forward pass and the next step must use what was written, not a stale copy."""
    pool = {"workers": 1, "zero_stage": stage, "micro_batch": 2, "precision": precision, "offload": offload}
    job = job_of(
        raw_job(
            tmp_path,
            [region(tmp_path, "a", 1, pool)],
            inner={"optimizer": {"type": "sgd", "lr": 0.5}, "steps": 2},
        )
    )
    one, other = start_worker(job), start_worker(job)
    before, _ = one.evaluate()
    one.train(PLAN, 0)
    assert one.evaluate()[0] < before
    one.discard()
    assert one.evaluate()[0] == before
    for worker in (one, other):
        worker.train(PLAN, 0)
    for spec in one.manifest.parameters:
        assert torch.equal(one.parameters.read(spec.name), other.parameters.read(spec.name)), spec.name


def test_activation_checkpointing_changes_memory_not_results(tmp_path: Path) -> None:
    """Recomputed activations give the same step, also where parameters are gathered again for it."""
    for stage in (1, 3):
        pool = {"workers": 1, "zero_stage": stage, "micro_batch": 2}
        plain, thrifty = (
            start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, pool | extra)])))
            for extra in ({}, {"activation_checkpointing": True})
        )
        assert plain.train(PLAN, 0).loss_sum == thrifty.train(PLAN, 0).loss_sum
        for spec in plain.manifest.parameters:
            assert torch.equal(plain.parameters.read(spec.name), thrifty.parameters.read(spec.name)), (
                spec.name
            )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_and_changes_no_result(tmp_path: Path, stage: int) -> None:
    pool = {"workers": 1, "zero_stage": stage, "micro_batch": 2}
    here, host = (
        start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, pool | {"offload": where})])))
        for where in ("none", "optimizer")
    )
    assert not here.engine.zero_offload_optimizer()
    assert host.engine.zero_offload_optimizer().device == "cpu"
    assert here.train(PLAN, 0).loss_sum == host.train(PLAN, 0).loss_sum
    for spec in here.manifest.parameters:
        assert torch.allclose(here.parameters.read(spec.name), host.parameters.read(spec.name), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    worker = start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)])))
    name = "model.layers.1.mlp.up_proj.weight"
    value = worker.parameters.read(name).clone()
    value[7] = bad
    worker.parameters.write(name, value)
    with pytest.raises(NonFiniteUpdateError, match=rf"region 'a': the update of parameter '{name}' holds"):
        worker.offer(PLAN, 1.0)


def test_low_precision_starts_from_the_fp32_model(tmp_path: Path) -> None:
    """Without training the update is exactly zero: master weights hold the anchor, not its rounding."""
    for stage, precision, offload in LAYOUTS:
        pool = {
            "workers": 1,
            "zero_stage": stage,
            "micro_batch": 2,
            "precision": precision,
            "offload": offload,
        }
        worker = start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, pool)])))
        offer = worker.offer(PLAN, 1.0)
        assert offer.norm_squared == 0.0
        reader = PartReader(worker.blobs.get, offer.bundle)
        chunks = range(worker.manifest.chunk_count)
        assert [reader.read(chunk).nbytes for chunk in chunks] == [
            4 * worker.manifest.chunk_length(c) for c in chunks
        ]
        assert not any(np.any(reader.read(chunk)) for chunk in chunks)

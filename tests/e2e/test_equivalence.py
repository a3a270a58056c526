"""N equals one: regions that merge after every plain SGD step are one run on the union batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.factory import job_of, raw_job, region
from tests.training.workers import MemoryBlobs, start_worker
from xcloud.aggregators import MeanConfig
from xcloud.checkpoint import CheckpointStore, chunk_files
from xcloud.config import JobConfig, PoolConfig
from xcloud.launch import train
from xcloud.messages import RoundPlan, RoundSum
from xcloud.metrics import RunLog, read_rounds
from xcloud.parts import Bundle, PartReader, PartWriter
from xcloud.training.worker import RankWorker

ROUNDS, LR = 3, 0.3
SETTINGS: dict[str, Any] = {
    "rounds": ROUNDS,
    "inner": {"steps": 1, "optimizer": {"type": "sgd", "lr": LR}, "schedule": "constant", "clip_norm": None},
    "outer": {"type": "sgd", "lr": 1.0},
}


def union_run(job: JobConfig) -> dict[str, torch.Tensor]:
    """One DeepSpeed engine, ZeRO-0, stepping on all regions' batches at once."""
    alone = [
        r.model_copy(update={"pools": (PoolConfig(zero_stage=0, micro_batch=r.sequences_per_step),)})
        for r in job.regions
    ]
    job = job.model_copy(update={"regions": tuple(alone)})
    readers = [start_worker(job, r.name) for r in job.regions]
    union = start_worker(job)
    for number in range(ROUNDS):
        batch = torch.cat(
            [
                reader._batch(
                    reader.store.train,
                    reader.order.indices(number * r.sequences_per_step, r.sequences_per_step),
                )
                for reader, r in zip(readers, job.regions, strict=True)
            ]
        )
        union.engine.backward(union.engine(input_ids=batch, labels=batch).loss)
        union.engine.step()
    return {s.name: union.parameters.read(s.name).clone() for s in union.manifest.parameters}


def plain_pool(stage: int, micro_batch: int = 4) -> dict[str, Any]:
    return {"workers": 1, "zero_stage": stage, "micro_batch": micro_batch}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_regions_of_one_stage(tmp_path: Path, stage: int) -> None:
    """Every stage, in this process: workers, codec, aggregator and outer step are real, actors are not."""
    regions = [region(tmp_path, name, seed, plain_pool(stage)) for seed, name in enumerate("abc", 1)]
    job = job_of(raw_job(tmp_path, regions, **SETTINGS))
    shared = MemoryBlobs()
    workers = [start_worker(job, r.name, shared) for r in job.regions]
    for number in range(1, ROUNDS + 1):
        play_round(workers, number)
    expected = union_run(job)
    for worker in workers:
        for name, value in expected.items():
            assert torch.allclose(worker.parameters.read(name), value, rtol=0, atol=1e-5), name


def play_round(workers: list[RankWorker], number: int, steps: int = 1) -> tuple[RoundSum, Bundle]:
    """One round without actors; returns what came down."""
    plan = RoundPlan(job="t", round=number, attempt=1, model_digest="", manifest_digest="", inner_steps=steps)
    offers = []
    for worker in workers:
        worker.train(plan, (number - 1) * steps * worker.spec.engine.micro_batch)
        offers.append(worker.offer(plan, 1.0))
    readers = [PartReader(w.blobs.get, o.bundle) for w, o in zip(workers, offers, strict=True)]
    mean, manifest = MeanConfig().build(), workers[0].manifest
    writer = PartWriter(workers[0].blobs.put, [manifest.chunk_length(c) for c in range(manifest.chunk_count)])
    for chunk in range(manifest.chunk_count):
        out = writer.slot(manifest.chunk_length(chunk))
        values = [reader.read(chunk).view(np.float32) for reader in readers]
        mean.combine(values, [1 / len(workers)] * len(workers), out)
        writer.add(chunk, out.view(np.uint8))
    merged = writer.finish()
    total = RoundSum(
        round=number,
        attempt=1,
        regions=tuple(worker.spec.region for worker in workers),
        weights=(1 / len(workers),) * len(workers),
        chunk_bytes=merged.sizes,
        norm=None,
        fold_s=0.0,
    )
    digests = [worker.apply(total, merged).digests for worker in workers]
    assert all(d == digests[0] for d in digests)
    return total, merged


def test_regions_of_different_stages_pools_and_world_sizes(tmp_path: Path) -> None:
    """The whole system: Ray actors, two ranks under ZeRO-2 and ZeRO-3, a region of two unequal pools."""
    regions = [
        region(
            tmp_path,
            "two-pools",
            1,
            {"workers": 2, "zero_stage": 2, "micro_batch": 2},
            {"workers": 1, "zero_stage": 1, "micro_batch": 3, "gradient_accumulation": 2},
        ),
        region(tmp_path, "sharded", 2, {"workers": 2, "zero_stage": 3, "micro_batch": 2}),
        region(tmp_path, "plain", 3, plain_pool(0, 5)),
    ]
    job = job_of(raw_job(tmp_path, regions, **SETTINGS))
    run_dir = tmp_path / "run"
    with RunLog(run_dir) as log:
        outcome = train(job, run_dir=run_dir, log=log)
    assert outcome.finished
    flat = committed_model(run_dir)
    expected = union_run(job)
    start = 0
    for name in sorted(expected):
        value = expected[name]
        found = torch.from_numpy(flat[start : start + value.numel()])
        assert torch.allclose(found, value, rtol=0, atol=1e-5), name
        start += value.numel()
    rows = read_rounds(run_dir)
    assert [row.round for row in rows] == [1, 2, 3]
    assert rows[-1].regions["two-pools"].tokens == (2 * 2 + 3 * 2) * job.sequence_length


def committed_model(run_dir: Path) -> np.ndarray:
    """The flat fp32 model of the newest commit."""
    store = CheckpointStore(run_dir / "checkpoints")
    record = store.latest()
    assert record is not None
    files = chunk_files(record.model_files, "model/")
    chunks = range(files[-1].last + 1)
    tensors, _ = store.read_tensors(record.round, files, chunks)
    return np.concatenate([tensors["anchor"][chunk] for chunk in chunks])

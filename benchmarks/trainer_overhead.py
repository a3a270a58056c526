"""Tokens per second of a region's rank beside a bare DeepSpeed loop: what the trainer costs.

Both train the main job's model with the same batch, ZeRO stage, optimizer and threads, in one process, in
turns of a few steps whose order alternates; the ratio is the median over pairs of neighbouring turns. The rank is
the real worker: packed data read through its cursor, schedule, seeds, progress and all.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import numpy as np

from benchmarks.bare_deepspeed import BareLoop, BareSettings
from benchmarks.harness import Options, Result
from xcloud.config import JobConfig, load_job
from xcloud.messages import RoundPlan
from xcloud.quiet import apply_quiet
from xcloud.training.settings import AdamWConfig

__all__ = ["run"]

JOB = Path(__file__).parents[1] / "jobs" / "three_clouds.yaml"
STEPS = 10


class Rank:
    """The real worker of a one-rank region, a few steps at a time."""

    def __init__(self, job: JobConfig) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Here, because DS_ACCELERATOR is read when DeepSpeed is imported.
        from xcloud.region import worker_spec  # noqa: PLC0415
        from xcloud.training.worker import RankWorker  # noqa: PLC0415
        from xcloud.transport.blobs import RayBlobs  # noqa: PLC0415

        self.worker = RankWorker(worker_spec(job, job.regions[0].name, 0, 0), RayBlobs(), lambda *_: None)
        self.worker.start("127.0.0.1", 0)  # the bare loop has started the process group
        self.round = 0

    def tokens_per_s(self, steps: int) -> float:
        """Throughput of the next `steps` inner steps."""
        self.round += 1
        plan = RoundPlan(
            job="bench", round=self.round, attempt=1, model_digest="", manifest_digest="", inner_steps=steps
        )
        done = self.worker.train(plan, self.round * steps * self.worker.spec.engine.micro_batch)
        return done.tokens / done.seconds


def run(options: Options) -> Result:
    """Alternate turns of both loops."""
    apply_quiet()
    turns = 6 if options.quick else 40
    job = load_job(
        JOB, [f"seed={options.seed}", "regions.0.pools=[{workers: 1, zero_stage: 1, micro_batch: 8}]"]
    )
    optimizer = job.inner.optimizer
    assert isinstance(optimizer, AdamWConfig)
    settings = BareSettings(
        model={**(job.model.config or {}), "vocab_size": 257, "bos_token_id": None, "eos_token_id": None},
        sequence=job.sequence_length,
        micro_batch=8,
        zero_stage=1,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        clip_norm=job.inner.clip_norm or 0.0,
        threads=1,
        seed=options.seed,
    )
    bare = BareLoop(settings, np.random.default_rng(options.seed).integers(0, 256, 1 << 20))
    rank = Rank(job)
    for _ in range(2):  # first steps allocate
        bare.steps(STEPS)
        rank.tokens_per_s(STEPS)
    ours, floor = [], []
    for turn in range(turns):
        if turn % 2:
            ours.append(rank.tokens_per_s(STEPS))
        floor.append(bare.steps(STEPS).tokens_per_s)
        if not turn % 2:
            ours.append(rank.tokens_per_s(STEPS))
    ratios = [mine / theirs for mine, theirs in zip(ours, floor, strict=True)]
    low, high = np.percentile(ratios, [10, 90])
    return Result(
        metrics={
            "tokens_per_s_ratio": statistics.median(ratios),
            "ratio_p10": float(low),
            "ratio_p90": float(high),
        },
        targets={"tokens_per_s_ratio": ">= 0.98"},
        rows=[
            {"loop": "xcloud rank", "tokens_per_s": statistics.median(ours)},
            {"loop": "bare DeepSpeed", "tokens_per_s": statistics.median(floor)},
        ],
        notes=[f"{turns} turns of {STEPS} steps each, 8 x {job.sequence_length} tokens a step, one thread"],
    )

"""One rank of a pool that takes private steps under every ZeRO stage; what it finds goes to a file.

    python -m tests.training.private_ranks FOLDER PORT RANK

The folder holds the jobs, as `write_jobs` left them. One pair of processes serves all stages, since loading DeepSpeed takes longer than the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from tests.factory import job_of, raw_job, region
from tests.training.workers import MemoryBlobs
from xcloud.config import JobConfig, dump_job, load_job
from xcloud.quiet import apply_quiet
from xcloud.region import worker_spec
from xcloud.training.models import build_model
from xcloud.training.worker import RankWorker

STAGES = (0, 1, 2, 3)
CLIP, LR, MICRO = 0.4, 64.0, 2
PICKED = [[3, 11, 40, 7, 23], [8], []]
"""Examples of ranks 0 and 1 in three steps' tests: more than a micro-batch, less than one, none."""


def private_job(
    folder: Path, stage: int, world: int, noise: float, clip: float = CLIP, **inner: Any
) -> JobConfig:
    """SGD with a step so long that the difference of two models gives the gradient to fp32's precision."""
    pool = {"workers": world, "zero_stage": stage, "micro_batch": MICRO, "gradient_accumulation": 2}
    settings = {
        "steps": 2,
        "optimizer": {"type": "sgd", "lr": LR},
        "schedule": "constant",
        "clip_norm": None,
    } | inner
    dp = {"unit": "example", "clip_norm": clip, "noise_multiplier": noise}
    return job_of(raw_job(folder, [region(folder, "a", 1, pool)], inner=settings, dp=dp))


def start(job: JobConfig, rank: int, port: int) -> RankWorker:
    worker = RankWorker(worker_spec(job, "a", 0, rank), MemoryBlobs())
    worker.start("127.0.0.1", port)
    return worker


def weights(worker: RankWorker) -> torch.Tensor:
    return torch.cat([worker.parameters.read(s.name).clone() for s in worker.manifest.parameters])


def stepped(worker: RankWorker, picked: list[int]) -> torch.Tensor:
    """The sum, clipped and noisy, that one step went down by."""
    assert worker.private is not None
    worker.discard()
    worker.engine.train()
    worker._set_learning_rate(0)
    before = weights(worker)
    worker.private.step(np.array(picked, dtype=np.int64))
    return (before - weights(worker)) / LR * worker.private.expected_batch


def exact_sum(worker: RankWorker, job: JobConfig, picked: list[int]) -> torch.Tensor:
    """The clipped sum by a loop over the examples, in plain torch."""
    assert job.dp is not None
    model: Any = build_model(job.model, 257, job.seed)
    total = torch.zeros(worker.manifest.size, dtype=torch.float64)
    for row in worker.store.train.read(np.array(picked, dtype=np.int64)):
        model.zero_grad()
        example = torch.from_numpy(row)[None]
        model(input_ids=example, labels=example).loss.backward()
        named = dict(model.named_parameters())
        gradient = torch.cat([named[s.name].grad.reshape(-1).double() for s in worker.manifest.parameters])
        total += gradient * min(1.0, job.dp.clip_norm / float(gradient.norm()))
    return total


def write_jobs(folder: Path, world: int) -> None:
    """The jobs of `main`. Written once: a rank must not read a corpus that another one writes."""
    for stage in STAGES:
        for name, noise, clip in (("quiet", 1e-9, CLIP), ("loud", 1e3, 1e-3)):
            job = private_job(folder, stage, world, noise, clip)
            (folder / f"{name}-{stage}.yaml").write_text(dump_job(job), encoding="utf-8")


def sharded(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """`deepspeed.initialize` under which ZeRO 3 takes small weights away too; by default they stay whole."""

    def wrapped(**arguments: Any) -> Any:
        arguments["config"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(**arguments)

    return wrapped


def main(folder: Path, port: int, rank: int) -> None:
    apply_quiet()
    deepspeed.initialize = sharded(deepspeed.initialize)
    found: dict[str, Any] = {}
    for stage in STAGES:
        quiet, loud = (
            start(load_job(folder / f"{name}-{stage}.yaml"), rank, port) for name in ("quiet", "loud")
        )
        for number, picked in enumerate((PICKED[0], PICKED[1], PICKED[2])):
            mine = picked if rank == 0 else picked[::-1][:1]
            found[f"{stage}/sum/{number}"] = stepped(quiet, mine)
        found[f"{stage}/noise/0"] = stepped(loud, PICKED[0])
        found[f"{stage}/noise/1"] = stepped(loud, [])
    torch.save(found, folder / f"found-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

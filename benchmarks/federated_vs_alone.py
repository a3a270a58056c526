"""The main job against its regions on their own: is one model from three clouds better than the best of three?

Runs `jobs/three_clouds.yaml` as it is, then each of its regions alone, for the same number of inner
steps on the same data, so with equal tokens for that region, and from the same weights. All models are judged on the
same mixed held-out text: the held-out splits of all regions, in equal parts. A region alone merges with nobody:
outer SGD with learning rate 1 over one region is plain training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Options, Result
from xcloud.config import JobConfig, load_job
from xcloud.launch import train
from xcloud.ledger import Outcome
from xcloud.metrics import RunLog
from xcloud.outer import SGDConfig
from xcloud.quiet import apply_quiet

__all__ = ["run"]

JOB = Path(__file__).parents[1] / "jobs" / "three_clouds.yaml"


def run(options: Options) -> Result:
    """Four runs, one after the other."""
    apply_quiet()
    job = load_job(JOB, ["rounds=3", "inner.steps=4"] if options.quick else [])
    if options.seed:
        job = job.model_copy(update={"seed": options.seed})
    together = play(job)
    alone = {region.name: play(alone_job(job, region.name)) for region in job.regions}
    best = min(loss_of(outcome) for outcome in alone.values())
    start, end = together.eval_loss_start, loss_of(together)
    assert start is not None
    rows = [{"model": "three clouds together", "eval_loss": end}]
    rows += [{"model": f"{name} alone", "eval_loss": loss_of(outcome)} for name, outcome in alone.items()]
    return Result(
        metrics={
            "eval_loss_start": start,
            "eval_loss_end": end,
            "best_alone_loss": best,
            "loss_fall_ratio": 1 - end / start,
        },
        targets={"loss_fall_ratio": "> 0.4", "eval_loss_end": "< best_alone_loss"},
        rows=rows,
        notes=[
            f"{job.rounds} rounds of {job.inner.steps} inner steps",
            f"mixed held-out text: {job.evaluation.sequences} sequences of each region",
        ],
    )


def alone_job(job: JobConfig, name: str) -> JobConfig:
    """The same region, steps and data order, without the others, judged on everybody's held-out text."""
    sources = tuple(source for region in job.regions for source in region.data)
    region = job.region(name).model_copy(update={"evaluate_on": sources})
    sequences = job.evaluation.sequences * len(job.regions)
    return job.model_copy(
        update={
            "regions": (region,),
            "outer": SGDConfig(lr=1.0),
            "failure": job.failure.model_copy(update={"quorum": None}),
            "evaluation": job.evaluation.model_copy(update={"sequences": sequences, "every": job.rounds}),
        }
    )


def play(job: JobConfig) -> Outcome:
    """Train a job in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder)) as log:
        return train(job, run_dir=Path(folder), log=log)


def loss_of(outcome: Outcome) -> float:
    """The last held-out loss."""
    assert outcome.finished
    assert outcome.eval_loss_end is not None
    return outcome.eval_loss_end

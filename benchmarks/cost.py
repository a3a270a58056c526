"""How well a plan predicts a run's dollars and seconds, and what the planner's choice saves when one region is slow.

Two regions, real, braked ranks (`benchmarks.throttled`): one may run for four times as much of the time as the other, and nothing in the
system knows. Their clouds are made up; a price file of the benchmark says what their machines and their traffic cost.

1. A short calibration run, after one round that packs the data and fills caches: set-up is part of what is predicted.
2. `plan --from` it for another number of rounds, other inner steps and another codec, and the run of that job: predicted against the ledger.
3. The job with equal steps, and the planner's choice for it (inner steps and codec left as they are, so that both see as many tokens and
   syncs): both are run, and their ledgers compared by dollars for each token. Set-up is paid in both.

`prediction_error_ratio` is the worst of all runs that were predicted, in dollars or in seconds.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import throttled
from benchmarks.harness import Options, Result
from xcloud.cloud.session import ray_session
from xcloud.config import JobConfig, load_job
from xcloud.cost.bill import Spent
from xcloud.cost.model import Forecast, predict
from xcloud.cost.planner import Limit, best
from xcloud.ledger import keep_job
from xcloud.metrics import read_rounds
from xcloud.planning import axes_of, facts_of, measured_in, plan_of
from xcloud.quiet import apply_quiet

__all__ = ["run"]

FAST, SLOW = 0.6, 0.15
"""Shares of the time in which the ranks may run: together less than one of two cores."""
DUTIES = {("fast", "pool0/rank0"): FAST, ("slow", "pool0/rank0"): SLOW}

PRICES = """
left:
  as_of: 2026-01-01
  source: made up
  instances: {node: {cpus: 1, memory_gb: 8, locations: {any: {on_demand: 3.0}}}}
  egress: {any: {same_location: 0, internet: 2.0}}
right:
  as_of: 2026-01-01
  source: made up
  instances: {node: {cpus: 1, memory_gb: 8, locations: {any: {on_demand: 2.0}}}}
  egress: {any: {same_location: 0, internet: 1.0}}
"""
"""USD an hour and a GB. Traffic is dear, so that the megabytes of a small model show beside minutes of machines."""

JOB = """
name: cost
seed: {seed}
rounds: {rounds}
{model}
regions:
  - {{name: fast, cloud: left, data: {{type: stdlib, kind: modules}}, pools: [{{zero_stage: 0, micro_batch: 2, instance: node}}]}}
  - {{name: slow, cloud: right, data: {{type: stdlib, kind: tests}}, pools: [{{zero_stage: 0, micro_batch: 2, instance: node}}]}}
inner: {{steps: {steps}, optimizer: {{type: adamw, lr: 3e-3}}}}
evaluation: {{sequences: 16}}
chunk_size: 65536
cost: {{prices: {prices}}}
"""


@dataclass(frozen=True)
class Run:
    """What was predicted of a run, and what its ledger says."""

    name: str
    predicted: Forecast | None
    spent: Spent
    tokens: int

    @property
    def errors(self) -> tuple[float, float]:
        """Relative errors of the prediction, in dollars and in seconds."""
        assert self.predicted is not None
        return (
            abs(self.predicted.usd - self.spent.usd) / self.spent.usd,
            abs(self.predicted.seconds - self.spent.seconds) / self.spent.seconds,
        )

    def row(self) -> dict[str, Any]:
        """For the table."""
        known = self.predicted is not None
        return {
            "run": self.name,
            "tokens": self.tokens,
            "predicted_s": self.predicted.seconds if self.predicted else None,
            "ledger_s": self.spent.seconds,
            "predicted_usd": self.predicted.usd if self.predicted else None,
            "ledger_usd": self.spent.usd,
            "egress_usd": self.spent.egress_usd,
            "error_usd_ratio": self.errors[0] if known else None,
            "error_s_ratio": self.errors[1] if known else None,
        }


def run(options: Options) -> Result:
    """Calibrate, then predict and run: another job, equal steps, and the planner's choice."""
    apply_quiet()
    rounds, steps = (5, 50) if options.quick else (10, 100)
    with tempfile.TemporaryDirectory() as scratch, ray_session(None, cpus=2):
        folder = Path(scratch)
        (folder / "prices.yaml").write_text(PRICES, encoding="utf-8")
        play(folder, "warm-up", job_file(folder, options, 1, 2), [])
        calibrated = play(folder, "calibration", job_file(folder, options, 4, steps // 2), [])
        other = job_file(folder, options, rounds, steps)
        predicted = [
            predicted_and_run(
                folder,
                "other steps, codec",
                other,
                [f"inner.steps={3 * steps // 4}", "codec=bf16", "downlink=bf16"],
            ),
            predicted_and_run(folder, "equal steps", other, []),
            predicted_and_run(folder, "the planner's choice", other, made := choice(folder, other)),
        ]
    equal, chosen = predicted[1:]
    per_token = [one.spent.usd / one.tokens for one in (equal, chosen)]
    return Result(
        metrics={
            "prediction_error_ratio": max(max(one.errors) for one in predicted),
            "saving_ratio": 1 - per_token[1] / per_token[0],
            "tokens_ratio": chosen.tokens / equal.tokens,
        },
        targets={"prediction_error_ratio": "<= 0.1", "saving_ratio": ">= 0.25"},
        rows=[calibrated.row(), *(one.row() for one in predicted)],
        notes=[
            f"the fast region may run for {FAST:.0%} of the time, the slow one for {SLOW:.0%}",
            f"the planner chose, steps and codec left as they are: {' '.join(made)}",
            "saving: dollars for each token, the planner's choice against equal steps, from the ledgers; set-up is in both",
        ],
    )


def job_file(folder: Path, options: Options, rounds: int, steps: int) -> Path:
    """The job with so many rounds and steps, as a file."""
    path = folder / f"job-{rounds}-{steps}.yaml"
    text = JOB.format(
        model=throttled.MODEL, seed=options.seed, rounds=rounds, steps=steps, prices=folder / "prices.yaml"
    )
    path.write_text(text, encoding="utf-8")
    return path


def play(folder: Path, name: str, path: Path, sets: list[str], predicted: Forecast | None = None) -> Run:
    """Run a job in a folder of its own."""
    job = load_job(path, sets)
    run_dir = folder / name.replace(" ", "-")
    keep_job(job, run_dir)
    throttled.play(job, DUTIES, folder=run_dir)
    spent = Spent.kept(run_dir)
    assert spent is not None
    return Run(name, predicted, spent, sum(row.tokens for row in read_rounds(run_dir)))


def predicted_and_run(folder: Path, name: str, path: Path, sets: list[str]) -> Run:
    """Plan a job from the calibration, then run it."""
    planned = plan_from(folder, load_job(path, sets))
    return play(folder, name, path, sets, predict(planned.scenario, planned.tariff.egress))


def plan_from(folder: Path, job: JobConfig) -> Any:
    """What `xcloud plan --from` knows of a job."""
    return plan_of(job, facts_of(job), measured_in(folder / "calibration"))


def choice(folder: Path, path: Path) -> list[str]:
    """What the planner changes in a job, steps and codec left as they are."""
    planned = plan_from(folder, load_job(path))
    axes = axes_of(planned, lambda sets: load_job(path, sets), keep=("steps", "codec"))
    found = best(planned.scenario, axes, planned.tariff.egress, Limit())
    assert found is not None
    return list(found.sets)

"""Regions of throughput 4 : 2 : 1: how long do they wait for each other, with a fixed, a proportional and a dynamic share of the work?

Three regions of one worker each, real ranks, braked so that they run for 0.8, 0.4 and 0.2 of the time, which
leaves two cores some room. The same job three times, with equal steps, with steps by the speed of the first rounds, and with steps that follow it. All read as many
tokens. A region's idle share is the part of a round's longest local training in which it had nothing to do: the mean over the
rounds from the third on. `idle_share_*` is that of the region that waits most.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks import throttled
from benchmarks.harness import Options, Result
from xcloud.cloud.session import ray_session
from xcloud.config import parse_job
from xcloud.metrics import Event, RoundRow
from xcloud.quiet import apply_quiet

__all__ = ["run"]

DUTIES = {"us-east-1": 0.8, "europe-west4": 0.4, "westeurope": 0.2}
MODES = ("fixed", "proportional", "dynamic")

JOB = """
name: partition
seed: {seed}
rounds: {rounds}
{model}
regions:
  - {{name: us-east-1, cloud: aws, data: {{type: stdlib, kind: modules}}, pools: [{{zero_stage: 0, micro_batch: 2}}]}}
  - {{name: europe-west4, cloud: gcp, data: {{type: stdlib, kind: tests}}, pools: [{{zero_stage: 0, micro_batch: 2}}]}}
  - {{name: westeurope, cloud: azure, data: {{type: stdlib, kind: reference}}, pools: [{{zero_stage: 0, micro_batch: 2}}]}}
inner: {{steps: {steps}, optimizer: {{type: adamw, lr: 3e-3}}}}
evaluation: {{sequences: 0}}
checkpoint: {{every: 0}}
chunk_size: 65536
balance: {mode}
"""


def run(options: Options) -> Result:
    """One run of each mode."""
    apply_quiet()
    rounds, steps = (5, 60) if options.quick else (9, 120)
    courses = {}
    with ray_session(None, cpus=3):
        for mode in MODES:
            courses[mode] = play(options, mode, rounds, steps)
    fixed = courses["fixed"]
    return Result(
        metrics={f"idle_share_{mode}": max(course.idle(2).values()) for mode, course in courses.items()}
        | {
            f"wall_{mode}_ratio": course.wall_s / fixed.wall_s
            for mode, course in courses.items()
            if mode != "fixed"
        }
        | {f"throughput_{name}_ratio": ratio for name, ratio in fixed.speeds().items()},
        targets={"idle_share_dynamic": "<= 0.05"},
        rows=[
            {
                "share of the work": mode,
                **{f"idle {name}": share for name, share in course.idle(2).items()},
                "wall_s": course.wall_s,
                "tokens": course.tokens,
            }
            for mode, course in courses.items()
        ],
        notes=[
            "ranks run for " + ", ".join(f"{duty:.0%}" for duty in DUTIES.values()) + " of the time",
            f"{rounds} rounds of {steps} steps; idle shares are means over the rounds from the third on",
        ],
    )


class Course:
    """Listener: what each region did in each round, and how long it all took."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = []
        self.rates: list[dict[str, float]] = []
        self.tokens = 0
        self.began = self.ended = 0.0

    def on_event(self, event: Event) -> None:
        if event.kind == "round_started" and not self.began:
            self.began = time.monotonic()

    def on_round(self, row: RoundRow) -> None:
        self.ended = time.monotonic()
        self.seconds.append({name: region.compute_s for name, region in row.regions.items()})
        self.rates.append({name: region.tokens_per_s for name, region in row.regions.items()})
        self.tokens += row.tokens

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...

    @property
    def wall_s(self) -> float:
        """From the first round's start to the end of the last."""
        return self.ended - self.began

    def idle(self, after: int) -> dict[str, float]:
        """Of each region, the mean share of a round's longest local training in which it had none."""
        later = self.seconds[after:]
        return {
            name: float(np.mean([1 - found[name] / max(found.values()) for found in later]))
            for name in DUTIES
        }

    def speeds(self) -> dict[str, float]:
        """Of each region, tokens/s over that of the slowest."""
        found = {name: float(np.median([rates[name] for rates in self.rates])) for name in DUTIES}
        return {name.replace("-", "_"): rate / min(found.values()) for name, rate in found.items()}


def play(options: Options, mode: str, rounds: int, steps: int) -> Course:
    """One run, with brakes on all ranks."""
    job = parse_job(
        JOB.format(model=throttled.MODEL, seed=options.seed, rounds=rounds, steps=steps, mode=mode)
    )
    course = Course()
    throttled.play(job, {(name, "pool0/rank0"): duty for name, duty in DUTIES.items()}, [course])
    return course

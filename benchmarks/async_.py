"""Time to a target loss with one region four times slower than the others: buffered merging against lock-step rounds.

Three regions, real ranks. The slow one's rank is braked (`benchmarks.throttled`), so that it trains about four
times slower; nothing in the system knows. First the lock-step run: every round waits for the slow region. The loss that it
ends with is the target. Then the buffered run, which merges as soon as two regions have answered, until it is there. Both
start from the same weights, train on the same data with a constant learning rate, and are judged on the held-out text of
all three regions. Time is wall time from the first round's start, evaluation after each merge included.
"""

from __future__ import annotations

import threading
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

SLOW = "westeurope"
DUTY = 0.28
"""Share of the time in which the slow rank may run; the others lose some of theirs to each other."""

JOB = """
name: async
seed: {seed}
rounds: {rounds}
{model}
regions:
  - name: us-east-1
    cloud: aws
    data: {{type: stdlib, kind: modules}}
    evaluate_on: &all [{{type: stdlib, kind: modules}}, {{type: stdlib, kind: tests}}, {{type: stdlib, kind: reference}}]
    pools: [{{zero_stage: 0, micro_batch: 4}}]
  - name: europe-west4
    cloud: gcp
    data: {{type: stdlib, kind: tests}}
    evaluate_on: *all
    pools: [{{zero_stage: 0, micro_batch: 4}}]
  - name: westeurope
    cloud: azure
    data: {{type: stdlib, kind: reference}}
    evaluate_on: *all
    pools: [{{zero_stage: 0, micro_batch: 4}}]
inner: {{steps: 30, optimizer: {{type: adamw, lr: 3e-3}}, schedule: {{type: constant, warmup_steps: 30}}}}
evaluation: {{sequences: 48}}
checkpoint: {{every: 0}}
chunk_size: 65536
{more}
"""

LOCKED = "outer: {type: nesterov, lr: 0.7, momentum: 0.6}"
BUFFERED = "outer: {type: nesterov, lr: 0.7, momentum: 0.6}\nbuffer: {goal: 2}"


def run(options: Options) -> Result:
    """The lock-step run, then the buffered one until it has the same loss."""
    apply_quiet()
    rounds = 3 if options.quick else 12
    with ray_session(None, cpus=3):
        locked = play(options, rounds, LOCKED)
        target = locked.losses[-1]
        buffered = play(options, 6 * rounds, BUFFERED, until=target)
    reached_s = time_to(buffered, target)
    locked_s = time_to(locked, target)
    return Result(
        metrics={
            "time_ratio": reached_s / locked_s if reached_s is not None and locked_s else None,
            "locked_s": locked_s,
            "buffered_s": reached_s,
            "target_loss": target,
            "slowdown_ratio": locked.slowdown,
        },
        targets={"time_ratio": "<= 0.6", "slowdown_ratio": ">= 3.5"},
        rows=[locked.row("lock-step", rounds), buffered.row("buffered, goal 2", len(buffered.losses))],
        notes=[
            f"one region's rank may run for {DUTY:.0%} of the time; slowdown_ratio is what came of it",
            f"target: the lock-step run's loss after {rounds} rounds of 30 inner steps",
        ],
    )


class Course:
    """Listener: losses over time."""

    def __init__(self, stop: threading.Event, until: float | None) -> None:
        self.stop, self.until = stop, until
        self.began: float | None = None
        self.times: list[float] = []
        self.losses: list[float] = []
        self.contributions: dict[str, int] = {}
        self.speeds: dict[str, list[float]] = {}

    def on_event(self, event: Event) -> None:
        if event.kind == "round_started" and self.began is None:
            self.began = time.monotonic()

    def on_round(self, row: RoundRow) -> None:
        assert self.began is not None
        assert row.eval_loss is not None
        self.times.append(time.monotonic() - self.began)
        self.losses.append(row.eval_loss)
        for name, part in row.regions.items():
            self.contributions[name] = self.contributions.get(name, 0) + 1
            self.speeds.setdefault(name, []).append(part.tokens_per_s)
        if self.until is not None and row.eval_loss <= self.until:
            self.stop.set()

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...

    @property
    def slowdown(self) -> float:
        """How much slower the slow region was than the mean of the others."""
        speed = {name: float(np.median(found)) for name, found in self.speeds.items()}
        others = [found for name, found in speed.items() if name != SLOW]
        return sum(others) / len(others) / speed[SLOW]

    def row(self, name: str, merges: int) -> dict[str, Any]:
        """For the table."""
        return {
            "run": name,
            "merges": merges,
            "seconds": self.times[-1],
            "eval_loss": self.losses[-1],
            "slow_region_merged": self.contributions.get(SLOW, 0),
        }


def time_to(course: Course, target: float) -> float | None:
    """Seconds until the loss is at the target for the first time; None if it never is."""
    return next((t for t, loss in zip(course.times, course.losses, strict=True) if loss <= target), None)


def play(options: Options, rounds: int, more: str, until: float | None = None) -> Course:
    """One run, with the brake on the slow region's rank from the start of the first round."""
    job = parse_job(JOB.format(model=throttled.MODEL, seed=options.seed, rounds=rounds, more=more))
    stop = threading.Event()
    course = Course(stop, until)
    throttled.play(job, {(SLOW, "pool0/rank0"): DUTY}, [course], stop)
    return course

"""Do unequal workers finish a round together once their speed is known?

Three jobs with `balance: dynamic`, real ranks. `workers`: a region of 2 fast workers and 1 slow one. `stages`: a region with two
pools of different ZeRO stage and micro-batch. `regions`: three regions of one worker each, one of them slow. Every rank is braked
(`benchmarks.throttled`), the slow one more than the others, and nothing in the system knows. `finish_spread_ratio` is the longest time of a round less the shortest, over
the longest: the worst round from the third on, of all three jobs. A pool's time is its local training (its region offers one update), a
region's is that from the start of the round until its update is there. Beside it, the same job with equal steps.
"""

from __future__ import annotations

from typing import Any

from benchmarks import throttled
from benchmarks.harness import Options, Result
from xcloud.cloud.session import ray_session
from xcloud.config import parse_job
from xcloud.metrics import Event, RoundRow
from xcloud.quiet import apply_quiet

__all__ = ["run"]

FAST, SLOW = 0.6, 0.24
"""Shares of the time in which ranks may run. Together they leave the two cores of a small machine some room, so that a rank does
not become faster when another has finished, which machines of their own would not do either."""

JOB = """
name: balance
seed: {seed}
rounds: {rounds}
{model}
regions:
{regions}
inner: {{steps: 250, optimizer: {{type: adamw, lr: 3e-3}}}}
evaluation: {{sequences: 0}}
checkpoint: {{every: 0}}
chunk_size: 65536
balance: {mode}
"""

REGION = "  - {{name: {name}, cloud: {name}, data: {{type: stdlib, kind: {kind}}}, pools: [{pools}]}}"

SCENARIOS: dict[str, tuple[list[tuple[str, str]], dict[tuple[str, str], float]]] = {
    "workers": (
        [
            (
                "modules",
                "{workers: 2, zero_stage: 1, micro_batch: 2}, {workers: 1, zero_stage: 1, micro_batch: 2}",
            )
        ],
        {("cloud-0", "pool0"): FAST, ("cloud-0", "pool1"): SLOW},
    ),
    "stages": (
        [
            (
                "modules",
                "{workers: 1, zero_stage: 1, micro_batch: 4}, {workers: 1, zero_stage: 3, micro_batch: 2}",
            )
        ],
        {("cloud-0", "pool0/rank0"): FAST, ("cloud-0", "pool1/rank0"): FAST},
    ),
    "regions": (
        [(kind, "{zero_stage: 0, micro_batch: 2}") for kind in ("modules", "tests", "reference")],
        {
            ("cloud-0", "pool0/rank0"): FAST,
            ("cloud-1", "pool0/rank0"): FAST,
            ("cloud-2", "pool0/rank0"): SLOW,
        },
    ),
}
"""Regions' texts and pools, and the share of the time in which each rank may run."""


def run(options: Options) -> Result:
    """Every scenario, with equal steps and with balanced ones."""
    apply_quiet()
    rounds = (
        4 if options.quick else 8
    )  # of 250 steps, 10 to 20 s: seconds of a busy machine are not what is measured
    rows = []
    with ray_session(None, cpus=3):
        for name in SCENARIOS:
            for mode, played in (("fixed", 3), ("dynamic", rounds)):
                rows.append(row(name, mode, play(options, name, mode, played)))
    balanced = [one for one in rows if one["balance"] == "dynamic"]
    equal = [one for one in rows if one["balance"] == "fixed"]
    return Result(
        metrics={
            "finish_spread_ratio": max(one["worst_ratio"] for one in balanced),
            "mean_spread_ratio": sum(one["mean_ratio"] for one in balanced) / len(balanced),
            "fixed_spread_ratio": max(one["worst_ratio"] for one in equal),
        },
        targets={"finish_spread_ratio": "<= 0.05"},
        rows=rows,
        notes=[
            f"a fast rank may run for {FAST:.0%} of the time, a slow one for {SLOW:.0%}",
            "spread: (longest - shortest) / longest time of one round, from the third round on; of pools their training, of regions until they offer",
        ],
    )


class Spreads:
    """Listener: how far apart the pools of a run finish, and on how many tokens."""

    def __init__(self) -> None:
        self.seconds: list[list[float]] = []
        self._began, self._offered = 0.0, list[float]()
        self.tokens: list[int] = []

    def on_event(self, event: Event) -> None:
        if event.kind == "round_started":
            self._began, self._offered = event.time, []
        elif event.kind == "region_finished":
            self._offered.append(event.time - self._began)

    def on_round(self, row: RoundRow) -> None:
        pools = [pool.compute_s for region in row.regions.values() for pool in region.pools]
        self.seconds.append(self._offered if len(row.regions) > 1 else pools)
        self.tokens.append(row.tokens)

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...

    @property
    def spreads(self) -> list[float]:
        """(longest - shortest) / longest, of each round."""
        return [(max(found) - min(found)) / max(found) for found in self.seconds]


def play(options: Options, name: str, mode: str, rounds: int) -> Spreads:
    """One run of a scenario."""
    regions, duties = SCENARIOS[name]
    text = "\n".join(
        REGION.format(name=f"cloud-{number}", kind=kind, pools=pools)
        for number, (kind, pools) in enumerate(regions)
    )
    job = parse_job(
        JOB.format(model=throttled.MODEL, seed=options.seed, rounds=rounds, regions=text, mode=mode)
    )
    spreads = Spreads()
    throttled.play(job, duties, [spreads])
    return spreads


def row(name: str, mode: str, course: Spreads) -> dict[str, Any]:
    """For the table."""
    later = course.spreads[2:]
    return {
        "scenario": name,
        "balance": mode,
        "worst_ratio": max(later),
        "mean_ratio": sum(later) / len(later),
        "by_round": " ".join(f"{one:.1%}" for one in course.spreads),
        "round_s": sum(max(found) for found in course.seconds[2:]) / len(later),
        "tokens_ratio": course.tokens[-1] / course.tokens[0],
    }

"""One finished run that several tests look at: starting ranks is what takes the time."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

import xcloud.launch
from tests.factory import job_of, raw_job, region
from xcloud.checkpoint import CheckpointStore, CommitRecord
from xcloud.cluster_region import ClusterRegion
from xcloud.config import JobConfig
from xcloud.launch import train
from xcloud.metrics import Event, RunLog

ROUNDS = 6


@dataclass(frozen=True)
class Finished:
    """An uninterrupted run of two unequal regions under AdamW, cosine schedule and Nesterov outside."""

    raw: dict[str, Any]
    run_dir: Path
    record: CommitRecord


def play(raw: dict[str, Any], run_dir: Path, *listeners: Any, **options: Any) -> CommitRecord:
    """Train in this process; returns the newest commit."""
    with RunLog(run_dir, listeners) as log:
        train(job_of(raw), run_dir=run_dir, log=log, **options)
    record = CheckpointStore(run_dir / "checkpoints").latest()
    assert record is not None
    return record


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Played once for the whole session."""
    folder = tmp_path_factory.mktemp("finished")
    regions = [
        region(folder, "pair", 1, {"workers": 2, "zero_stage": 2, "micro_batch": 2}),
        region(folder, "single", 2, {"workers": 1, "zero_stage": 3, "micro_batch": 3}),
    ]
    raw = raw_job(folder, regions, rounds=ROUNDS)
    return Finished(raw, folder / "run", play(raw, folder / "run"))


class Killer:
    """Listener that kills one rank of a region as soon as a round has started."""

    def __init__(self, handles: dict[str, ClusterRegion], region: str, round: int) -> None:
        self.handles, self.region, self.round = handles, region, round

    def on_event(self, event: Event) -> None:
        if (
            event.kind == "round_started"
            and event.fields["round"] == self.round
            and event.fields["attempt"] == 1
        ):
            pids = ray.get(self.handles[self.region].actor.pids.remote())
            os.kill(pids["pool0/rank0"], signal.SIGKILL)

    def on_round(self, row: Any) -> None: ...

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> dict[str, ClusterRegion]:
    """The run's region handles, newest by name."""
    found: dict[str, ClusterRegion] = {}

    class Recorded(ClusterRegion):
        def __init__(self, job: JobConfig, name: str, **rest: Any) -> None:
            super().__init__(job, name, **rest)
            found[name] = self

    monkeypatch.setattr(xcloud.launch, "ClusterRegion", Recorded)
    return found

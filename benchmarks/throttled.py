"""Runs in which some ranks are slower than others: stopped and continued by signals, and nothing in the system knows."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from xcloud.aggregation import ClusterAggregation
from xcloud.checkpoint import CheckpointStore
from xcloud.cluster_region import ClusterRegion
from xcloud.config import JobConfig
from xcloud.driver import Run
from xcloud.fleet import Fleet
from xcloud.metrics import Event, Listener, RunLog

__all__ = ["MODEL", "Brake", "play"]

MODEL = """sequence_length: 128
model:
  config: {model_type: llama, hidden_size: 96, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}"""
"""The model of such runs, as keys of a job: small, so that several ranks share two cores."""

SLICE_S = 0.1

Rank = tuple[str, str]
"""A region, and one of its ranks as `RegionActor.pids` names it: `pool0/rank0`."""


class Brake(threading.Thread):
    """Stops a process for most of the time, a slice after the other.

    Args:
        find: its process id, asked when the brake is pulled.
        duty: share of the time in which the process may run.
    """

    def __init__(self, find: Callable[[], int], duty: float) -> None:
        super().__init__(daemon=True)
        self._find, self._duty, self._done = find, duty, threading.Event()

    def run(self) -> None:
        pid = self._find()
        try:
            while not self._done.is_set():
                os.kill(pid, signal.SIGSTOP)
                self._done.wait((1 - self._duty) * SLICE_S)
                os.kill(pid, signal.SIGCONT)
                self._done.wait(self._duty * SLICE_S)
        except ProcessLookupError:
            return  # it was ended with its region

    def release(self) -> None:
        """Let the process go on."""
        self._done.set()
        if self.is_alive():
            self.join()


class _Pull:
    """Listener: pulls the brakes when the first round starts."""

    def __init__(self, brakes: Sequence[Brake]) -> None:
        self._brakes, self._pulled = brakes, False

    def on_event(self, event: Event) -> None:
        if event.kind == "round_started" and not self._pulled:
            self._pulled = True
            for brake in self._brakes:
                brake.start()

    def on_round(self, row: Any) -> None: ...

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...


def play(
    job: JobConfig,
    duties: Mapping[Rank, float],
    listeners: Sequence[Listener] = (),
    stop: threading.Event | None = None,
    folder: Path | None = None,
) -> None:
    """Play a job in the Ray session that is there, with brakes on some ranks from the start of the first round.

    Args:
        job: what to train.
        duties: of each slow rank, the share of the time in which it may run.
        listeners: told of what happens.
        stop: ends the run after its round when it is set.
        folder: the run folder, new; None: one that is removed at the end.
    """
    regions: dict[str, ClusterRegion] = {}

    def build(name: str) -> ClusterRegion:
        regions[name] = ClusterRegion(job, name, False, str(checkpoints))
        return regions[name]

    def pid(rank: Rank) -> int:
        return int(ray.get(regions[rank[0]].actor.pids.remote())[rank[1]])

    brakes = [Brake(lambda rank=rank: pid(rank), duty) for rank, duty in duties.items()]  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        checkpoints = folder / "checkpoints"
        with RunLog(folder, [*listeners, _Pull(brakes)]) as log:
            fleet = Fleet([region.name for region in job.regions], build, job.failure, log)
            store = CheckpointStore(str(checkpoints))
            try:
                run = Run(job, fleet, ClusterAggregation(job), store, log, stop or threading.Event())
                run.play(None, None)
            finally:
                for brake in brakes:
                    brake.release()
                fleet.close()

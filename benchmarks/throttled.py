"""Runs in which some ranks are slower than others, and nothing in the system knows.

The kernel gives them a quota of processor time where this process may make a cgroup. Elsewhere they are stopped and continued by
signals, which is coarse: what a rank gets in a second then varies by a tenth.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray

from xcloud.aggregation import ClusterAggregation
from xcloud.checkpoint import CheckpointStore
from xcloud.cluster_region import ClusterRegion
from xcloud.config import JobConfig
from xcloud.driver import Run
from xcloud.fleet import Fleet
from xcloud.metrics import Event, Listener, RunLog

__all__ = ["MODEL", "play"]

MODEL = """sequence_length: 128
model:
  config: {model_type: llama, hidden_size: 96, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}"""
"""The model of such runs, as keys of a job: small, so that several ranks share two cores."""

SLICE_S = 0.1
PERIOD_US = 50_000

Ranks = tuple[str, str]
"""A region, and a pool of it (`pool0`) or one rank (`pool0/rank0`), as `RegionActor.pids` names them."""


class Brake(Protocol):
    """Makes processes slow, from `start` until `release`."""

    def start(self) -> None: ...

    def release(self) -> None: ...


class Quota:
    """A quota of processor time for some processes together (CFS bandwidth control of Linux, cgroup version 1 or 2).

    Args:
        find: their process ids, asked when the brake is pulled.
        duty: share of one core that each of them gets.

    Raises:
        OSError: this process may not make a cgroup.
    """

    def __init__(self, find: Callable[[], list[int]], duty: float) -> None:
        self._find, self._duty = find, duty
        root = Path("/sys/fs/cgroup")
        self._old = (root / "cpu").is_dir()
        self._group = (root / "cpu" if self._old else root) / f"xcloud-{uuid.uuid4().hex[:8]}"
        self._group.mkdir()
        try:  # written now, so that whoever cannot may take signals
            self._limit(duty)
        except OSError:
            self._group.rmdir()
            raise

    def start(self) -> None:
        pids = self._find()
        self._limit(self._duty * len(pids))
        for pid in pids:
            (self._group / "cgroup.procs").write_text(str(pid))

    def release(self) -> None:
        """Let the processes go on."""
        home = self._group.parent / "cgroup.procs"
        for pid in (self._group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):  # it was ended with its region
                home.write_text(pid)
        self._group.rmdir()

    def _limit(self, cores: float) -> None:
        quota = int(cores * PERIOD_US)
        if self._old:
            (self._group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._group / "cpu.max").write_text(f"{quota} {PERIOD_US}")


class Signals(threading.Thread):
    """Stops processes for some of the time, a slice after the other, all at once: ranks that meet in each step are as slow as
    one machine would be. Arguments as of `Quota`."""

    def __init__(self, find: Callable[[], list[int]], duty: float) -> None:
        super().__init__(daemon=True)
        self._find, self._duty, self._done = find, duty, threading.Event()

    def run(self) -> None:
        pids = self._find()
        try:
            while not self._done.is_set():
                self._tell(pids, signal.SIGSTOP)
                self._done.wait((1 - self._duty) * SLICE_S)
                self._tell(pids, signal.SIGCONT)
                self._done.wait(self._duty * SLICE_S)
        except ProcessLookupError:
            return  # they were ended with their region

    @staticmethod
    def _tell(pids: Sequence[int], what: signal.Signals) -> None:
        for pid in pids:
            os.kill(pid, what)

    def release(self) -> None:
        """Let the processes go on."""
        self._done.set()
        if self.is_alive():
            self.join()


def best_brake(find: Callable[[], list[int]], duty: float) -> Brake:
    """The best brake that there is here."""
    try:
        return Quota(find, duty)
    except OSError:
        return Signals(find, duty)


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
    duties: Mapping[Ranks, float],
    listeners: Sequence[Listener] = (),
    stop: threading.Event | None = None,
    folder: Path | None = None,
) -> None:
    """Play a job in the Ray session that is there, with brakes on some ranks from the start of the first round.

    Args:
        job: what to train.
        duties: of slow ranks, or of whole pools, the share of the time in which they may run.
        listeners: told of what happens.
        stop: ends the run after its round when it is set.
        folder: the run folder, new; None: one that is removed at the end.
    """
    regions: dict[str, ClusterRegion] = {}

    def build(name: str) -> ClusterRegion:
        regions[name] = ClusterRegion(job, name, False, str(checkpoints))
        return regions[name]

    def pids(region: str, part: str) -> list[int]:
        found = ray.get(regions[region].actor.pids.remote())
        return [pid for name, pid in found.items() if part in (name, name.partition("/")[0])]

    brakes = [best_brake(partial(pids, *ranks), duty) for ranks, duty in duties.items()]
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

"""A region inside the hub's Ray cluster: an actor around `Region`, and the driver's handle of it.

Headers cross the boundary as JSON bytes, buffers as handles; nothing else does.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray

from xcloud.cloud.placement import release_pool
from xcloud.cloud.waiting import what_is_missing
from xcloud.config import JobConfig, dump_job, parse_job
from xcloud.errors import PlacementError
from xcloud.messages import (
    Applied,
    Progress,
    RegionReady,
    RegionReport,
    RestoreOrder,
    RoundPlan,
    RoundSum,
    Saved,
    SaveOrder,
)
from xcloud.region import Region, group_name
from xcloud.transport.blobs import Handle
from xcloud.transport.calls import call, gather, later

__all__ = ["ClusterRegion"]


class _ProgressSink:
    """Picklable: hands a rank's progress to its region's actor without waiting."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, pool: int, step: int, tokens: int, loss: float) -> None:
        self.actor.note_progress.remote(pool, step, tokens, loss)


class RegionActor:
    """`Region` inside an actor: headers as JSON bytes, buffers as handles."""

    def __init__(
        self, job: str, name: str, tag: str, enforce_labels: bool, checkpoint_url: str, reader: Any
    ) -> None:
        sink = _ProgressSink(ray.get_runtime_context().current_actor)
        self.region = Region(parse_job(job), name, tag, enforce_labels, sink, reader)
        self.url = checkpoint_url

    def start(self, evaluate: bool) -> bytes:
        return self.region.start(evaluate).to_wire()

    def run(self, plan: bytes) -> tuple[bytes, list[Handle]]:
        report, handles = self.region.run(RoundPlan.from_wire(plan, "driver"))
        return report.to_wire(), handles

    def apply(self, total: bytes, handles: list[Handle], evaluate: bool) -> bytes:
        return self.region.apply(RoundSum.from_wire(total, "driver"), handles, evaluate).to_wire()

    def discard(self) -> None:
        self.region.discard()

    def save(self, order: bytes) -> bytes:
        return self.region.save(SaveOrder.from_wire(order, "driver"), self.url).to_wire()

    def restore(self, order: bytes) -> bytes:
        return self.region.restore(RestoreOrder.from_wire(order, "driver"), self.url).to_wire()

    def secure(self, stage: str, number: int, asked: bytes) -> bytes:
        return self.region.secure(stage, number, asked)

    def confirm(self, total: bytes, handles: list[Handle], result: bytes) -> bytes:
        return self.region.confirm(RoundSum.from_wire(total, "driver"), handles, result)

    def note_progress(self, pool: int, step: int, tokens: int, loss: float) -> None:
        self.region.note_progress(pool, step, tokens, loss)

    def progress(self) -> bytes | None:
        progress = self.region.progress()
        return progress.to_wire() if progress else None

    def here(self) -> None:
        """Answers as soon as there is a node for this actor."""

    def pids(self) -> dict[str, int]:
        """Process ids of this actor and its ranks, for fault tests and memory measurements."""
        out = {"region": os.getpid()}
        for index, pool in enumerate(self.region.pools):
            for rank, pid in enumerate(gather([r.pid.remote() for r in pool.ranks])):
                out[f"pool{index}/rank{rank}"] = pid
        return out


class ClusterRegion:
    """The driver's side of a region in its own Ray cluster."""

    def __init__(
        self, job: JobConfig, name: str, enforce_labels: bool, checkpoint_url: str, reader: Any = None
    ) -> None:
        self.name = name
        tag = f"{job.name}/{name}/{uuid.uuid4().hex[:8]}"
        self._pools = job.region(name).pools
        self._groups = [group_name(tag, pool) for pool in range(len(self._pools))]
        self._labelled = enforce_labels
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 4}
        labels = self._pools[0].labels
        if enforce_labels and labels:
            options["label_selector"] = dict(
                labels
            )  # its pools meet in this process, so it belongs beside them
        actor = ray.remote(RegionActor).options(**options)
        self.actor = actor.remote(dump_job(job), name, tag, enforce_labels, checkpoint_url, reader)

    def start(self, evaluate: bool) -> Future[RegionReady]:
        return later(self.name, lambda: self._start(evaluate))

    def _start(self, evaluate: bool) -> RegionReady:
        timeout_s = self._pools[0].placement_timeout_s  # the pools' own waits begin in the actor
        ready, _ = ray.wait([self.actor.here.remote()], timeout=timeout_s)
        if not ready:
            missing = what_is_missing(self._groups, self._pools) or "waits for its actor to start"
            raise PlacementError(f"region {self.name!r}: {missing}; given up after {timeout_s:.0f} s")
        return RegionReady.from_wire(ray.get(self.actor.start.remote(evaluate)), self.name)

    def waiting(self) -> Future[str | None]:
        """What the region's pools wait for, while one of them has no room; None otherwise."""
        if not self._labelled:  # one machine, started for as many workers as there are
            nothing: Future[str | None] = Future()
            nothing.set_result(None)
            return nothing
        return later(self.name, lambda: what_is_missing(self._groups, self._pools))

    def run(self, plan: RoundPlan) -> Future[tuple[RegionReport, list[Handle]]]:
        reference = self.actor.run.remote(plan.to_wire())
        return call(self.name, reference, lambda r: (RegionReport.from_wire(r[0], self.name), r[1]))

    def apply(self, total: RoundSum, handles: Sequence[Handle], evaluate: bool) -> Future[Applied]:
        reference = self.actor.apply.remote(total.to_wire(), list(handles), evaluate)
        return call(self.name, reference, lambda r: Applied.from_wire(r, self.name))

    def discard(self) -> Future[None]:
        return call(self.name, self.actor.discard.remote(), lambda _: None)

    def save(self, order: SaveOrder) -> Future[Saved]:
        return call(
            self.name, self.actor.save.remote(order.to_wire()), lambda r: Saved.from_wire(r, self.name)
        )

    def restore(self, order: RestoreOrder) -> Future[RegionReady]:
        reference = self.actor.restore.remote(order.to_wire())
        return call(self.name, reference, lambda r: RegionReady.from_wire(r, self.name))

    def secure(self, stage: str, round: int, asked: bytes) -> Future[bytes]:
        return call(self.name, self.actor.secure.remote(stage, round, asked), bytes)

    def confirm(self, total: RoundSum, handles: Sequence[Handle], result: bytes) -> Future[bytes]:
        return call(self.name, self.actor.confirm.remote(total.to_wire(), list(handles), result), bytes)

    def progress(self) -> Future[Progress | None]:
        reference = self.actor.progress.remote()
        return call(self.name, reference, lambda r: Progress.from_wire(r, self.name) if r else None)

    def kill(self) -> None:
        """End the region's processes and give its resources back, now."""
        ray.kill(self.actor)
        for group in self._groups:
            release_pool(group)

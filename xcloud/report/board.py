"""The state of a run that is under way, as the driver's events describe it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xcloud.cost.bill import CostRow
from xcloud.messages import Progress
from xcloud.metrics import Event, PrivacyRow, RoundRow, read_rounds
from xcloud.report.text import NOTICE_KINDS, event_line

if TYPE_CHECKING:  # the job file needs numpy and more, which `xcloud --help` should not wait for
    from xcloud.config import JobConfig

__all__ = ["Board", "RegionStand"]

NOTICES = 3


@dataclass
class RegionStand:
    """Where one region stands, as far as it has been told. Bytes are totals of the run."""

    cloud: str
    state: str = "waiting"
    since: float = 0.0
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    privacy: PrivacyRow | None = None
    usd: float | None = 0.0
    """What it has cost in this run folder's rounds; None: some of it has no price."""


class Board:
    """The state of a run, built from what the driver reports."""

    def __init__(self, job: JobConfig, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.job = job
        self.run_dir = run_dir
        self.clock = clock
        self.regions = {region.name: RegionStand(region.cloud) for region in job.regions}
        self.rounds = job.rounds
        self.round = 0
        self.attempt = 1
        self.committed = 0
        self.phase = "starting Ray"
        self.simulation = self.clear = False
        self.masked = ""
        self.exposed = ""
        self.stopping = False
        self.notices: tuple[str, ...] = ()
        self.cost: CostRow | None = None  # of the last round
        self.missing: dict[str, str] = {}
        self.began = clock()
        self.round_began: float | None = None
        self._played: list[float] = []  # seconds of the last rounds

    def on_event(self, event: Event) -> None:
        change = getattr(self, f"_{event.kind}", None)
        if change is not None:
            change(event)
        if event.kind in NOTICE_KINDS:
            self.notices = (*self.notices, event_line(event) or "")[-NOTICES:]

    def on_round(self, row: RoundRow) -> None:
        for name, region in row.regions.items():
            stand = self.regions[name]
            stand.tokens_per_s, stand.train_loss = region.tokens_per_s, region.train_loss
            if region.eval_loss is not None:
                stand.eval_loss = region.eval_loss
            stand.bytes_up += region.bytes_up
            stand.bytes_down += region.bytes_down
            stand.privacy = region.privacy
            stand.state = "ready"
        self._charge(row)
        self.committed, self.phase = row.round, "checkpointing"
        if self.round_began is not None:
            self._played = [*self._played, self.clock() - self.round_began][-5:]
            self.round_began = None

    def _charge(self, row: RoundRow) -> None:
        self.cost = row.cost
        for name, part in row.cost.regions.items() if row.cost is not None else ():
            stand = self.regions[name]
            if stand.usd is None or part.machines_usd is None or part.egress_usd is None:
                stand.usd = None
            else:
                stand.usd += part.machines_usd + part.egress_usd

    def on_progress(self, progress: Progress) -> None:
        stand = self.regions[progress.region]
        if progress.round != self.round or stand.state != "training":
            return  # an answer that came too late
        stand.step, stand.steps = progress.step, progress.steps
        if progress.tokens:
            stand.tokens_per_s = progress.tokens_per_s
        if progress.loss is not None:
            stand.train_loss = progress.loss

    @property
    def done(self) -> float:
        """Rounds done, with the steps of the current one as its fraction."""
        if self.round <= self.committed:
            return float(self.committed)
        shares = [
            1.0 if stand.state != "training" else stand.step / stand.steps if stand.steps else 0.0
            for stand in self.regions.values()
            if stand.state in ("training", "done", "applying")
        ]
        return self.committed + (0.95 * sum(shares) / len(shares) if shares else 0.0)

    @property
    def left_s(self) -> float | None:
        """Seconds left, judged by the last rounds; None before there is one."""
        if not self._played:
            return None
        each = sum(self._played) / len(self._played)
        spent = 0.0 if self.round_began is None else min(each, self.clock() - self.round_began)
        return max(0.0, each * (self.rounds - self.committed) - spent)

    def _set(self, name: str, state: str, event: Event) -> None:
        stand = self.regions[name]
        stand.state, stand.since = state, event.time
        self.missing.pop(name, None)
        if self.phase == "training" and not any(s.state == "training" for s in self.regions.values()):
            self.phase = "merging"

    def _run_started(self, event: Event) -> None:
        self.simulation = bool(event.fields.get("simulation"))
        self.clear = event.fields.get("envelope", "made") is None
        self.exposed = event.fields.get("exposed") or ""
        self.committed = event.fields.get("resumed_round") or 0
        for row in read_rounds(self.run_dir) if self.committed else ():
            self.on_round(row)
        self.phase = "starting regions"

    def _region_starting(self, event: Event) -> None:
        first = event.fields.get("attempt", 1) == 1
        self._set(event.fields["region"], "starting" if first else "restarting", event)

    def _placement_waiting(self, event: Event) -> None:
        missing = event.fields.get("missing") is not None
        self._set(event.fields["region"], "no room yet" if missing else "starting", event)
        if missing:
            self.missing[event.fields["region"]] = event_line(event) or ""

    def _region_ready(self, event: Event) -> None:
        self._set(event.fields["region"], "ready", event)
        if event.fields.get("eval_loss") is not None:
            self.regions[event.fields["region"]].eval_loss = event.fields["eval_loss"]

    def _round_started(self, event: Event) -> None:
        self.round, self.attempt = event.fields["round"], event.fields.get("attempt", 1)
        if self.round_began is None:
            self.round_began = self.clock()
        for name in event.fields.get("regions", ()):
            self._set(name, "training", event)
            self.regions[name].step = 0
            self.regions[name].steps = self.job.inner.steps
        self.phase = "training"

    def _region_finished(self, event: Event) -> None:
        self._set(event.fields["region"], "done", event)
        self.regions[event.fields["region"]].train_loss = event.fields.get("train_loss")

    def _region_failed(self, event: Event) -> None:
        self._set(event.fields["region"], "lost", event)

    def _region_gone(self, event: Event) -> None:
        self._set(event.fields["region"], "gone", event)

    def _secure_aggregation(self, event: Event) -> None:
        self.masked = event_line(event) or ""

    def _region_late(self, event: Event) -> None:
        self._set(event.fields["region"], "late", event)

    def _region_rejoined(self, event: Event) -> None:
        self._set(event.fields["region"], "ready", event)

    def _round_merged(self, event: Event) -> None:
        for name, stand in self.regions.items():
            if stand.state in ("done", "training"):
                self._set(name, "applying", event)
        self.phase = "applying"

    def _round_retried(self, event: Event) -> None:
        del event
        self.phase = "retrying"

    def _round_skipped(self, event: Event) -> None:
        del event
        self.round_began, self.phase = None, "skipped"

    def _checkpoint_committed(self, event: Event) -> None:
        del event
        self.phase = "committed"

    def _stop_requested(self, event: Event) -> None:
        del event
        self.stopping = True

    def _run_stopped(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "stopped", False

    def _run_failed(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "failed", False

    def _run_finished(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "finished", False

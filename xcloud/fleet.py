"""Who takes part: the regions of a run, alive, late or lost, and their way back.

The driver asks the fleet; the fleet keeps score. A region that fails is killed and
restarted as a whole, in the background; one that misses a deadline is left to finish.
Either comes back only by loading the last committed round: never with what it had.

A round is launched and collected in two calls, so that merged updates can travel between them, and so that a
merge need not wait for all. The fleet keeps a merged update until every region has taken it up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from xcloud.errors import DivergenceError, MessageError, PlacementError, RegionError, SecurityError
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
    json_safe,
)
from xcloud.metrics import RunLog
from xcloud.policies import BufferConfig, FailureConfig

__all__ = ["Fleet", "RegionHandle"]

T = TypeVar("T")

Offer = tuple[RegionReport, list[Any]]

TICK_S = 0.5

WAITING_S = 3.0
"""How often regions that start are asked what they wait for."""


class RegionHandle(Protocol):
    """A region as the driver sees it; every call returns at once with a future."""

    name: str

    def start(self, evaluate: bool) -> Future[RegionReady]: ...

    def run(self, plan: RoundPlan) -> Future[tuple[RegionReport, list[Any]]]: ...

    def apply(self, total: RoundSum, handles: Sequence[Any], evaluate: bool) -> Future[Applied]: ...

    def discard(self) -> Future[None]: ...

    def save(self, order: SaveOrder) -> Future[Saved]: ...

    def restore(self, order: RestoreOrder) -> Future[RegionReady]: ...

    def progress(self) -> Future[Progress | None]: ...

    def waiting(self) -> Future[str | None]: ...

    def secure(self, stage: str, round: int, asked: bytes) -> Future[bytes]: ...

    def confirm(self, total: RoundSum, handles: Sequence[Any], result: bytes) -> Future[bytes]: ...

    def kill(self) -> None: ...


class State(str, Enum):
    """Where a region stands."""

    READY = "ready"
    LATE = "late"
    LOST = "lost"
    STARTING = "starting"
    GONE = "gone"


@dataclass
class Member:
    """One region's standing."""

    handle: RegionHandle
    state: State = State.STARTING
    busy: Future[Any] | None = None
    work: Future[Offer] | None = None
    """The round that it is at, or whose update nobody has collected yet."""
    round: int = 0
    """The last merge that it has taken up."""
    trained: int = 0
    """The last round that these processes were set to train; what they hold of it they offer again."""
    restarts: int = 0
    leaving: bool = False
    """Its machines are about to be taken away; it needs others before the next round."""


class Fleet:
    """The regions of one run.

    Args:
        names: of the regions, in the job's order.
        build: makes a handle, and with it the region's processes.
        policy: how often a region may be restarted.
        log: told of every change of state.
    """

    def __init__(
        self, names: Sequence[str], build: Callable[[str], RegionHandle], policy: FailureConfig, log: RunLog
    ) -> None:
        self._build = build
        self._policy = policy
        self._log = log
        self._members = {name: Member(build(name)) for name in names}
        self._sums: dict[int, tuple[RoundSum, list[Any]]] = {}
        self._asked: dict[str, Future[Progress | None]] = {}
        self._poll_at = 0.0
        self._missing: dict[str, Future[str | None]] = {}
        self._missed: dict[str, str | None] = {}
        self._missing_at = time.monotonic() + WAITING_S

    @property
    def ready(self) -> list[str]:
        """Regions that can be asked now, in the job's order."""
        return [name for name, m in self._members.items() if m.state is State.READY]

    @property
    def idle(self) -> list[str]:
        """Those of the ready regions that are not at work on a round."""
        return [name for name in self.ready if self._members[name].work is None]

    def untrained(self, round: int) -> list[str]:
        """Those of the idle regions that would train the round now, and not offer what they have of it already."""
        return [name for name in self.idle if self._members[name].trained != round]

    @property
    def recovering(self) -> list[str]:
        """Regions that are away, or about to be, but may come back."""
        away = (State.LATE, State.LOST, State.STARTING)
        return [name for name, m in self._members.items() if m.state in away or m.leaving]

    def start(self, evaluate: bool) -> dict[str, RegionReady]:
        """Start all regions; a region that cannot start the first time ends the run.

        Raises:
            XCloudError: what the region says is wrong.
        """
        began = time.monotonic()
        for name in self._members:
            self._log.event("region_starting", region=name, attempt=1)
        futures = {m.handle.start(evaluate): name for name, m in self._members.items()}
        answers: dict[str, RegionReady] = {}
        for future in self._as_done(futures, self._by(None)):
            name = futures[future]
            answers[name] = future.result()
            self._members[name].state = State.READY
            self._log_ready(answers[name], time.monotonic() - began)
        return {name: answers[name] for name in self._members}

    def ask(
        self,
        call: Callable[[RegionHandle], Future[T]],
        round: int,
        names: Collection[str] | None = None,
        wait_for_late: bool = True,
    ) -> dict[str, T]:
        """Ask every idle region, or those named, at once; returns the answers in the job's order.

        A region that fails is lost, one that misses the policy's deadline is late (or, if nobody can let
        it go on, lost too); neither is in the answers, nor ready any more.

        Raises:
            XCloudError: an answer that is nobody's failure but the job's (a full disk, ...).
        """
        futures = {call(self._members[n].handle): n for n in (self.idle if names is None else names)}
        answers: dict[str, T] = {}
        for future in self._as_done(futures, self._by(self._policy.deadline_s)):
            name = futures[future]
            try:
                answers[name] = future.result()
            except (RegionError, DivergenceError) as error:
                self.lose(name, round, str(error))
        for future, name in futures.items():
            if name in answers or self._members[name].state is not State.READY:
                continue
            if wait_for_late:
                self._late(name, future, round)
            else:
                self.lose(name, round, "it did not answer in time")
        return {name: answers[name] for name in self._members if name in answers}

    def relay(self, stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask regions by name in one stage of the secure-aggregation protocol; who fails or refuses is not in the answers."""
        return self._asked_securely(number, asked, lambda r: r.secure(stage, number, asked[r.name]))

    def confirm(
        self, total: RoundSum, handles: Sequence[Any], result: bytes, names: Collection[str]
    ) -> dict[str, bytes]:
        """The signatures of regions, by name, on a sum that they have looked at."""
        return self._asked_securely(total.round, names, lambda r: r.confirm(total, handles, result))

    def _asked_securely(
        self, number: int, names: Collection[str], call: Callable[[RegionHandle], Future[bytes]]
    ) -> dict[str, bytes]:
        there = [name for name in names if self._members[name].state is State.READY]
        futures = {name: call(self._members[name].handle) for name in there}
        wait(futures.values(), timeout=self._policy.deadline_s)
        answers: dict[str, bytes] = {}
        for name, future in futures.items():
            failed = future.exception() if future.done() else None
            if isinstance(failed, SecurityError | MessageError):
                self._log.event("region_refused", region=name, round=number, reason=str(failed))
            elif isinstance(failed, RegionError):
                self.lose(name, number, str(failed))
            elif failed is not None:
                raise failed
            elif future.done():
                answers[name] = future.result()
        return answers

    def launch(self, plan: RoundPlan, rounds: int) -> None:
        """Set every idle region to work on a round (one of `rounds`)."""
        began = {"round": plan.round, "attempt": plan.attempt, "rounds": rounds, "regions": self.ready}
        self._log.event("round_started", **began)
        for name in self.idle:
            self._members[name].work = self._members[name].handle.run(plan)
            self._members[name].trained = plan.round

    def collect(
        self,
        round: int,
        merges: int,
        buffer: BufferConfig | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> dict[str, Offer]:
        """The updates of the regions at work, in the job's order, up to the policy's deadline.

        Args:
            round: about to be merged.
            merges: committed so far.
            buffer: how many updates are enough; None waits for all.
            over: whether those who have not answered are not to be waited for any longer; asked again and again.
        """
        futures = {m.work: n for n, m in self._members.items() if m.work and m.state is State.READY}
        offers: dict[str, Offer] = {}
        deadline, enough = self._by(self._policy.deadline_s), math.inf

        def until() -> float:
            if over() and not any(f.done() for f, n in futures.items() if self._members[n].work is f):
                return -math.inf  # what has been answered is taken first
            return min(deadline(), enough)

        for future in self._as_done(futures, until):
            name = futures[future]
            member, member_round = self._members[name], self._members[name].round
            member.work = None
            try:
                report, handles = future.result()
            except (RegionError, DivergenceError) as error:
                if member.state is State.READY:  # it may have failed while it took up an earlier merge
                    self.lose(name, round, str(error))
                continue
            if report.region != name:
                self.lose(name, round, f"it reports in the name of {report.region!r}")
                continue
            if report.leaving and not member.leaving:
                member.leaving = True
                self._log.event("region_leaving", region=name, round=report.round, tokens=report.tokens)
            offers[name] = report.model_copy(update={"staleness": max(0, merges - member_round)}), handles
            self._log_finished(name, report)
            if buffer and len(offers) == buffer.goal:
                enough = time.monotonic() + buffer.grace_s
        for future, name in futures.items():
            member = self._members[name]
            if member.work is not future or member.state is not State.READY:
                continue
            if not buffer or len(offers) < buffer.goal or merges - member.round >= buffer.max_staleness:
                self._late(name, future, round)
        return {name: offers[name] for name in self._members if name in offers}

    def apply(self, total: RoundSum, handles: list[Any], evaluate: bool) -> dict[str, Applied]:
        """Have every region that waits for it take up a merged update, after those before it that it has missed.

        That is every idle region, or, if the update lands in a round under way, every region at work on it.
        """
        names = self.idle if total.lands_in is None else self.ready
        self._sums[total.round] = total, handles
        applied: dict[str, Applied] = {}
        for number, (one, buffers) in sorted(self._sums.items()):
            behind = [n for n in names if n in self.ready and self._members[n].round < number]
            last = number == total.round
            answers = self.ask(
                lambda region, one=one, buffers=buffers, last=last: region.apply(  # type: ignore[misc]
                    one, buffers, evaluate and last
                ),
                number,
                behind,
            )
            for name, answer in answers.items():
                self._members[name].round, self._members[name].restarts = number, 0
                before = applied[name].bytes_down if name in applied else 0
                applied[name] = answer.model_copy(update={"bytes_down": before + answer.bytes_down})
                if answer.pools:
                    self._log.event("region_sharding", region=name, pools=json_safe(answer)["pools"])
        oldest = min((self._members[name].round for name in self.ready), default=total.round)
        self._sums = {number: one for number, one in self._sums.items() if number > oldest}
        return {name: applied[name] for name in names if name in applied and name in self.ready}

    def restore(self, order: Callable[[str], RestoreOrder], round: int) -> None:
        """Have every region load the commit that a run goes on from."""
        for name in self.ask(lambda region: region.restore(order(region.name)), round):
            self._members[name].round = round

    def undo(self, order: Callable[[str], RestoreOrder], round: int, reason: str) -> None:
        """Have every region load the last commit again, in place of what it has made of a round."""
        self._log.event("round_rejected", round=round, reason=reason)
        self.restore(order, round)

    def save(self, round: int, donor: str) -> dict[str, Saved]:
        """Have every idle region write its state; who is late is lost, since it would write over what is
        committed without it."""
        return self.ask(
            lambda region: region.save(SaveOrder(round=round, donor=region.name == donor)),
            round,
            wait_for_late=False,
        )

    def lose(self, name: str, round: int, reason: str) -> None:
        """Give up a region's processes; it may be restarted."""
        member = self._members[name]
        member.state, member.busy, member.work = State.LOST, None, None
        self._log.event("region_failed", region=name, round=round, reason=reason)
        member.handle.kill()

    def recover(
        self,
        order: Callable[[str], RestoreOrder | None],
        round: int,
        needed: int,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Restart lost regions and take back those that are up again.

        Blocks only while fewer than `needed` regions are ready and one may still come back.

        Args:
            order: what a region has to load; None when nothing is committed yet.
            round: about to be played.
            needed: regions the round cannot do without.
            over: whether they are not to be waited for any longer; asked again and again.
        """
        for name in [name for name, member in self._members.items() if member.leaving]:
            self._move(name, self._members[name])
        while True:
            for name, member in self._members.items():
                if member.state is State.LOST:
                    self._restart(name, member)
            self._take_back(order, round)
            if len(self.ready) >= needed or not self.recovering or over():
                return
            busy = [m.busy for m in self._members.values() if m.busy is not None]
            wait(busy, timeout=TICK_S, return_when=FIRST_COMPLETED)
            self._poll_waiting()

    def close(self) -> None:
        """End all regions' processes."""
        for member in self._members.values():
            member.handle.kill()

    def _move(self, name: str, member: Member) -> None:
        """Start a region anew, on machines that stay; it is no failure of its own, and does not count as one."""
        member.leaving = False
        if member.state is State.READY:
            member.handle.kill()
            member.work, member.restarts = None, member.restarts - 1
            self._restart(name, member)

    def _restart(self, name: str, member: Member) -> None:
        if member.restarts >= self._policy.max_restarts:
            member.state = State.GONE
            self._log.event("region_gone", region=name, restarts=member.restarts)
            return
        member.restarts += 1
        self._log.event("region_starting", region=name, attempt=max(2, member.restarts + 1))
        member.handle, member.trained = self._build(name), 0
        member.state, member.busy = State.STARTING, member.handle.start(False)

    def _take_back(self, order: Callable[[str], RestoreOrder | None], round: int) -> None:
        for name, member in self._members.items():
            if member.busy is None or not member.busy.done():
                continue
            done, member.busy = member.busy, None
            failed = done.exception()
            if isinstance(failed, RegionError | DivergenceError | PlacementError | SecurityError):
                self.lose(name, round, str(failed))
                continue
            answer = done.result()  # anything else is not the region's failure
            if member.state is State.LATE and isinstance(answer, tuple) and answer[0].round == round:
                member.state = State.READY  # the round is being tried again, and its update is good for it
                self._log.event("region_rejoined", region=name, round=round)
                continue
            restore = order(name)
            if restore is None and member.state is State.LATE:
                self.lose(name, round, "it was late before anything was committed; it starts again")
                continue
            if restore is not None:
                try:
                    member.handle.restore(restore).result(self._policy.deadline_s)
                except (RegionError, DivergenceError, FutureTimeoutError) as error:
                    self.lose(name, round, str(error) or "it did not load the committed round in time")
                    continue
            member.state, member.round, member.trained = State.READY, restore.round if restore else 0, 0
            self._log.event("region_rejoined", region=name, round=round)

    def _late(self, name: str, future: Future[Any], round: int) -> None:
        member = self._members[name]
        member.state, member.busy, member.work = State.LATE, future, None
        self._log.event("region_late", region=name, round=round)

    def _by(self, deadline_s: float | None) -> Callable[[], float]:
        """When a wait that begins now has to end."""
        end = math.inf if deadline_s is None else time.monotonic() + deadline_s
        return lambda: end

    def _as_done(self, futures: Collection[Future[Any]], until: Callable[[], float]) -> Any:
        """Futures as they complete, with progress in between, until `until`, which may move."""
        waiting = set(futures)
        while waiting:
            left = min(TICK_S, until() - time.monotonic())
            if left <= 0:
                return
            done, waiting = wait(waiting, timeout=left, return_when=FIRST_COMPLETED)
            yield from done
            if time.monotonic() >= self._poll_at:
                self._poll_at = time.monotonic() + TICK_S
                self._poll_progress()
                self._poll_waiting()

    def _poll_progress(self) -> None:
        """Ask once at a time, never wait: a busy or dead region must not hold up the rest."""
        for name in self.ready:
            asked = self._asked.get(name)
            if asked is not None and asked.done() and asked.exception() is None:
                progress = asked.result()
                if progress is not None:
                    self._log.progress(progress)
            if asked is None or asked.done():
                self._asked[name] = self._members[name].handle.progress()

    def _poll_waiting(self) -> None:
        """Log what starting regions have no room for, when that changes; as `_poll_progress`, it never waits."""
        for name, asked in list(self._missing.items()):
            if not asked.done():
                continue
            del self._missing[name]
            if asked.exception() is not None or self._members[name].state is not State.STARTING:
                continue  # the call that starts the region fails, too, and says why
            missing = asked.result()
            if missing != self._missed.get(name):
                self._log.event("placement_waiting", region=name, missing=missing)
            self._missed[name] = missing
        if time.monotonic() < self._missing_at:
            return
        self._missing_at = time.monotonic() + WAITING_S
        for name, member in self._members.items():
            if member.state is State.STARTING and name not in self._missing:
                self._missing[name] = member.handle.waiting()

    def _log_ready(self, ready: RegionReady, seconds: float) -> None:
        fields = json_safe(ready)
        for key in ("manifest_digest", "model_digest", "eval_tokens", "layout"):
            del fields[key]
        encryption = fields.pop("encryption")
        self._log.event("region_ready", **fields, seconds=seconds)
        if encryption is not None:
            self._log.event("encryption", region=ready.region, **encryption)

    def _log_finished(self, name: str, report: RegionReport) -> None:
        self._log.event(
            "region_finished",
            round=report.round,
            region=name,
            tokens=report.tokens,
            train_loss=report.train_loss,
            seconds=report.compute_s,
        )

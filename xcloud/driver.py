"""The round loop.

One round: plan -> every region trains and offers its update -> the aggregation actor folds
the updates of at least a quorum -> every region takes the same outer step -> their digests
agree -> the round is committed: metrics, cursors and checkpoint, all or nothing.

The driver holds the round number, the plans and the ledger. It never sees weights.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xcloud.aggregation import ClusterAggregation
from xcloud.checkpoint import CheckpointStore, CommitRecord
from xcloud.cloud.session import ray_session
from xcloud.config import JobConfig, dump_job
from xcloud.errors import QuorumError, RegionError
from xcloud.fleet import Fleet
from xcloud.ledger import Ledger, keep_job
from xcloud.messages import RegionReport, RestoreOrder, RoundPlan, RoundSum, SaveOrder
from xcloud.metrics import RunLog
from xcloud.policies import Action, Decision, decide
from xcloud.region import ClusterRegion

__all__ = ["AggregatorHandle", "Outcome", "Run", "train"]

Offers = Mapping[str, tuple[RegionReport, list[Any]]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last committed round, and why it is over."""

    rounds: int
    finished: bool
    reason: str
    eval_loss_start: float | None
    eval_loss_end: float | None


class AggregatorHandle(Protocol):
    """The aggregation actor as the driver sees it."""

    def merge(
        self, plan: RoundPlan, lengths: Sequence[int], reports: Sequence[RegionReport], updates: Sequence[Sequence[Any]]
    ) -> Future[tuple[RoundSum, list[Any]]]: ...

    def restart(self) -> None: ...


class Run:
    """One run of one job, over a fleet and an aggregator that may be real or not."""

    def __init__(
        self, job: JobConfig, fleet: Fleet, aggregator: AggregatorHandle, store: CheckpointStore, log: RunLog, stop: threading.Event
    ) -> None:
        self.job, self.fleet, self.aggregator, self.log, self.stop = job, fleet, aggregator, log, stop
        self.ledger = Ledger(job, store)
        self.quorum = job.failure.quorum or len(job.regions)

    def play(self, record: CommitRecord | None, stop_after: int | None) -> Outcome:
        """Play the job's rounds, from the start or from a commit.

        Args:
            record: commit to go on from.
            stop_after: last round to play now; the job's schedules are those of the whole job.
        """
        began, last = time.monotonic(), min(stop_after or self.job.rounds, self.job.rounds)
        self.ledger.begin(self.fleet.start(evaluate=record is None))
        if record is not None:
            self.ledger.resume(record)
            self.fleet.ask(lambda region: region.restore(self.order(region.name)), record.round)
        for number in range(self.ledger.round + 1, last + 1):
            if self.stop.is_set():
                break
            self.round(number, final=number == last)
        if self.ledger.saved is None or self.ledger.saved.round < self.ledger.round:
            self.checkpoint()
        done = self.ledger
        outcome = Outcome(done.round, done.round >= self.job.rounds, "", done.eval_start, done.eval_loss)
        if outcome.finished:
            self.log.event("run_finished", rounds=done.round, eval_loss=done.eval_loss, seconds=time.monotonic() - began)
            return outcome
        reason = "interrupted" if self.stop.is_set() else "stop-after"
        self.log.event("run_stopped", round=done.round, reason=reason)
        return Outcome(done.round, False, reason, done.eval_start, done.eval_loss)

    def round(self, number: int, final: bool) -> None:
        """Play one round until it is committed or skipped.

        Raises:
            QuorumError: the failure policy gives up.
        """
        evaluate = final or self.job.evaluation.sequences > 0 and number % self.job.evaluation.every == 0
        for attempt in itertools.count(1):
            self.recover(number)
            began = time.perf_counter()
            plan = self.plan(number, attempt)
            self.log.event("round_started", round=number, attempt=attempt, rounds=self.job.rounds, regions=self.fleet.ready)
            offers = self.fleet.ask(lambda region: region.run(plan), number, self.job.failure.deadline_s, self.heard)
            decision = decide(self.job.failure, len(self.job.regions), offers, attempt)
            if decision.action is not Action.MERGE:
                if self.give_up(number, attempt, decision):
                    return
                continue
            merged = self.merge(plan, offers)
            if merged is None:
                continue
            total, handles = merged
            applied = self.fleet.ask(lambda region: region.apply(total, handles, evaluate), number)
            if not applied:
                raise QuorumError(f"round {number}: every region was lost while it applied the merged update")
            reports = {name: report for name, (report, _) in offers.items()}
            row = self.ledger.close_round(plan, reports, total, applied, time.perf_counter() - began)
            self.log.round(row)
            every = self.job.checkpoint.every
            if every and number % every == 0 or final or self.stop.is_set() or self.fleet.recovering:
                self.checkpoint()
            return

    def plan(self, number: int, attempt: int) -> RoundPlan:
        """What every region is asked to do."""
        return RoundPlan(
            job=self.job.name,
            round=number,
            attempt=attempt,
            model_digest=self.ledger.model_digest,
            manifest_digest=self.ledger.manifest_digest,
            inner_steps=self.job.inner.steps,
        )

    def merge(self, plan: RoundPlan, offers: Offers) -> tuple[RoundSum, list[Any]] | None:
        """Fold the offers; None when an update was lost on the way and the round must be tried again."""
        began = time.perf_counter()
        reports, updates = zip(*offers.values(), strict=True)
        try:
            total, handles = self.aggregator.merge(plan, self.ledger.lengths, reports, updates).result()
        except RegionError as error:
            if error.region in offers:
                self.fleet.lose(error.region, plan.round, str(error))
            else:
                self.aggregator.restart()
            if plan.attempt > self.job.failure.max_retries:
                raise QuorumError(f"round {plan.round}: {error}, after {plan.attempt} attempts") from error
            self.log.event("round_retried", round=plan.round, attempt=plan.attempt + 1, reason=str(error))
            return None
        self.log.event("round_merged", round=plan.round, regions=list(offers), seconds=time.perf_counter() - began)
        return total, handles

    def give_up(self, number: int, attempt: int, decision: Decision) -> bool:
        """Act on a round below quorum; True when the round is over.

        Raises:
            QuorumError: the policy says to abort.
        """
        if decision.action is Action.RETRY:
            self.log.event("round_retried", round=number, attempt=attempt + 1, reason=decision.reason)
            return False
        if decision.action is Action.SKIP:
            self.fleet.ask(lambda region: region.discard(), number)
            self.log.event("round_skipped", round=number, reason=decision.reason)
            return True
        raise QuorumError(f"round {number}: {decision.reason}; nothing of it was committed")

    def recover(self, number: int) -> None:
        """Bring back regions that are away; wait for them only if the round cannot do without."""
        if self.fleet.recovering and self.ledger.round and self.fleet.ready:
            if self.ledger.saved is None or self.ledger.saved.round < self.ledger.round:
                self.checkpoint()
        self.fleet.recover(self.order_or_none, number, self.quorum)
        if not self.fleet.ready:
            raise QuorumError(f"round {number}: no region is left; round {self.ledger.round} stays committed")

    def checkpoint(self) -> None:
        """Save every ready region's state of the committed round, then commit it."""
        number = self.ledger.round
        while number and self.fleet.ready:
            self.ledger.store.clear(number)
            donor = self.fleet.ready[0]
            saved = self.fleet.ask(lambda r, donor=donor: r.save(SaveOrder(round=number, donor=r.name == donor)), number)
            if donor in saved:
                self.ledger.commit(saved, donor)
                self.log.event("checkpoint_committed", round=number, path=self.ledger.store.folder(number))
                return

    def order(self, name: str) -> RestoreOrder:
        """What a region loads to stand at the committed round."""
        order = self.ledger.restore_order(name)
        assert order is not None
        return order

    def order_or_none(self, name: str) -> RestoreOrder | None:
        return self.ledger.restore_order(name) if self.ledger.round else None

    def heard(self, name: str, answer: tuple[RegionReport, list[Any]]) -> None:
        report = answer[0]
        self.log.event(
            "region_finished",
            round=report.round,
            region=name,
            tokens=report.tokens,
            train_loss=report.train_loss,
            seconds=report.compute_s,
        )


def train(
    job: JobConfig,
    *,
    run_dir: Path,
    log: RunLog,
    address: str | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
    stop_after: int | None = None,
) -> Outcome:
    """Train a job on a Ray cluster, or on one started here.

    Raises:
        XCloudError: what went wrong, in one line; the last committed round stays.
    """
    keep_job(job, run_dir, resume)
    url = job.checkpoint.url or str((run_dir / "checkpoints").absolute())
    store = CheckpointStore(url)
    record = store.latest() if resume else None
    log.rewind(record.round if record else 0)
    workers = sum(pool.workers * pool.cpus for region in job.regions for pool in region.pools)
    names = [region.name for region in job.regions]
    with ray_session(address, workers) as session:
        log.event(
            "run_started",
            job=job.name,
            rounds=job.rounds,
            run_dir=str(run_dir),
            pid=os.getpid(),
            host=socket.gethostname(),
            regions=names,
            simulation=session.nodes == 1,
            resumed_round=record.round if record else None,
        )
        text = dump_job(job)
        fleet = Fleet(names, lambda name: ClusterRegion(text, name, not session.local, url), job.failure, log)
        try:
            aggregator = ClusterAggregation(job.aggregator, job.codec)
            return Run(job, fleet, aggregator, store, log, stop or threading.Event()).play(record, stop_after)
        except BaseException as error:
            log.event("run_failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            fleet.close()

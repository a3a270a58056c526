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
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from xcloud.aggregation import AggregatorHandle, ClusterAggregation
from xcloud.checkpoint import CheckpointStore, CommitRecord
from xcloud.cloud.session import ray_session
from xcloud.config import JobConfig
from xcloud.errors import AggregationError, DivergenceError, QuorumError, RegionError
from xcloud.fleet import Fleet, RegionHandle
from xcloud.ledger import Ledger, Outcome, find_commit, keep_job
from xcloud.messages import RegionReport, RoundPlan, RoundSum, Saved, SaveOrder, json_safe
from xcloud.metrics import RunLog
from xcloud.policies import Action, Decision, decide
from xcloud.region import ClusterRegion

__all__ = ["Outcome", "Run", "train"]

Offers = Mapping[str, tuple[RegionReport, list[Any]]]


class Run:
    """One run of one job, over a fleet and an aggregator that may be real or not."""

    def __init__(
        self,
        job: JobConfig,
        fleet: Fleet,
        aggregator: AggregatorHandle,
        store: CheckpointStore,
        log: RunLog,
        stop: threading.Event,
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
            self.fleet.ask(lambda region: region.restore(self.ledger.order(region.name)), record.round)
        for number in range(self.ledger.round + 1, last + 1):
            if self.stop.is_set():
                break
            try:
                self.round(number, final=number == last)
            except (QuorumError, AggregationError) as error:
                if not isinstance(error, DivergenceError):
                    self.checkpoint()  # whoever is left holds the last committed round
                raise
        played = not self.stop.is_set() or self.ledger.round == last
        self.checkpoint()
        done = self.ledger
        if played and last == self.job.rounds:
            seconds = time.monotonic() - began
            self.log.event("run_finished", rounds=done.round, eval_loss=done.eval_loss, seconds=seconds)
            return done.outcome(finished=True, reason="")
        reason = "stop-after" if played else "interrupted"
        self.log.event("run_stopped", round=done.round, reason=reason)
        return done.outcome(finished=False, reason=reason)

    def round(self, number: int, final: bool) -> None:
        """Play one round until it is committed or skipped.

        Raises:
            QuorumError: the failure policy gives up.
        """
        for attempt in itertools.count(1):
            self.recover(number)
            if self.attempt(self.plan(number, attempt), final):
                return

    def attempt(self, plan: RoundPlan, final: bool) -> bool:
        """Try a round once; True when it is over, False to try again."""
        began, number, job = time.perf_counter(), plan.round, self.job
        evaluate = final or (job.evaluation.sequences > 0 and number % job.evaluation.every == 0)
        offers = self.fleet.run(plan, job.rounds)
        decision = decide(job.failure, len(job.regions), offers, plan.attempt)
        if decision.action is not Action.MERGE:
            return self.give_up(plan, decision)
        merged = self.merge(plan, offers)
        if merged is None:
            return False
        total, handles = merged
        applied = self.fleet.ask(lambda region: region.apply(total, handles, evaluate), number)
        if not applied:  # most likely the aggregator has died, and the merged update with it
            return self.again(plan, "every region was lost while it applied the merged update")
        reports = {name: report for name, (report, _) in offers.items()}
        self.log.round(self.ledger.close_round(plan, reports, total, applied, time.perf_counter() - began))
        for name, answer in applied.items():
            if answer.pools:
                self.log.event("region_sharding", region=name, pools=json_safe(answer)["pools"])
        if job.checkpoint.every and number % job.checkpoint.every == 0:
            self.checkpoint()
        return True

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
            total, handles = self.aggregator.merge(plan, self.ledger.layout, reports, updates).result()
        except RegionError as error:
            if error.region in offers:
                self.fleet.lose(error.region, plan.round, str(error))
            self.again(plan, str(error))
            return None
        self.log.event(
            "round_merged", round=plan.round, regions=list(offers), seconds=time.perf_counter() - began
        )
        return total, handles

    def give_up(self, plan: RoundPlan, decision: Decision) -> bool:
        """Act on a round below quorum; True when the round is over.

        Raises:
            QuorumError: the policy says to abort.
        """
        if decision.action is Action.RETRY:
            self.log.event(
                "round_retried", round=plan.round, attempt=plan.attempt + 1, reason=decision.reason
            )
            return False
        if decision.action is Action.SKIP:
            self.fleet.ask(lambda region: region.discard(), plan.round)
            self.log.event("round_skipped", round=plan.round, reason=decision.reason)
            return True
        raise QuorumError(f"round {plan.round}: {decision.reason}; nothing of it was committed")

    def again(self, plan: RoundPlan, reason: str) -> bool:
        """Have a round tried again, with a fresh aggregator; False, for the caller to return.

        Raises:
            QuorumError: it was tried often enough.
        """
        if plan.attempt > self.job.failure.max_retries:
            raise QuorumError(f"round {plan.round}: {reason}, after {plan.attempt} attempts")
        self.aggregator.restart()
        self.log.event("round_retried", round=plan.round, attempt=plan.attempt + 1, reason=reason)
        return False

    def recover(self, number: int) -> None:
        """Bring back regions that are away; wait for them only if the round cannot do without."""
        if self.fleet.recovering:
            self.checkpoint()  # what they will have to load
        saved = self.ledger.saved.round if self.ledger.saved else 0
        if self.fleet.ready or saved == self.ledger.round:
            self.fleet.recover(self.ledger.order_or_none, number, self.quorum)
        if not self.fleet.ready:
            raise QuorumError(f"round {number}: no region is left; go on from round {saved} with --resume")

    def checkpoint(self) -> None:
        """Save every ready region's state of the committed round, unless that is done already."""
        number = self.ledger.round
        while self.fleet.ready and number > (self.ledger.saved.round if self.ledger.saved else 0):
            self.ledger.store.clear(number)
            donor = self.fleet.ready[0]
            saved = self.fleet.save(partial(_save, number, donor), number)
            if donor in saved:
                self.ledger.commit(saved, donor)
                self.log.event("checkpoint_committed", round=number, path=self.ledger.store.folder(number))


def _save(number: int, donor: str, region: RegionHandle) -> Future[Saved]:
    return region.save(SaveOrder(round=number, donor=region.name == donor))


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
    store = CheckpointStore(job.checkpoint.url or (run_dir / "checkpoints").absolute())
    record = find_commit(job, store, run_dir, resume)
    keep_job(job, run_dir)
    log.rewind(record.round if record else 0)
    names = [region.name for region in job.regions]
    with ray_session(address, job.cpus) as session:
        log.event(
            "run_started",
            job=job.name,
            rounds=job.rounds,
            run_dir=str(run_dir),
            pid=os.getpid(),
            host=socket.gethostname(),
            regions=names,
            simulation=True,  # regions that share a Ray cluster are not isolated from one another
            resumed_round=record.round if record else None,
        )
        build = partial(ClusterRegion, job, enforce_labels=not session.local, checkpoint_url=store.url)
        fleet = Fleet(names, build, job.failure, log)
        try:
            aggregator = ClusterAggregation(job, enforce_labels=not session.local)
            return Run(job, fleet, aggregator, store, log, stop or threading.Event()).play(record, stop_after)
        except KeyboardInterrupt:
            log.event("run_stopped", round=max(store.rounds(), default=0), reason="interrupted at once")
            raise
        except BaseException as error:
            log.event("run_failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            fleet.close()

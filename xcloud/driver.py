"""The round loop.

One round: plan -> every region trains and offers its update -> the aggregation actor folds
the updates of at least a quorum -> every region takes the same outer step -> their digests
agree -> the round is committed: metrics, cursors and checkpoint, all or nothing.

`streaming.overlap` lets the last three steps happen while the next round trains; `streaming.fragments` merges
a part of the model at a time; `buffer` merges what has arrived and leaves the rest at work.
The driver holds the round number, the plans and the ledger. It never sees weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xcloud.aggregation import AggregatorHandle
from xcloud.checkpoint import CheckpointStore, CommitRecord
from xcloud.config import JobConfig
from xcloud.errors import AggregationError, DivergenceError, PrivacyBudgetError, QuorumError, RegionError
from xcloud.fleet import Fleet
from xcloud.ledger import Ledger, Offers, Outcome, Sync
from xcloud.messages import Applied, RoundPlan, RoundSum
from xcloud.metrics import RunLog
from xcloud.policies import Action, Decision, decide

__all__ = ["Outcome", "Run"]


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
        self.ledger = Ledger(job, store, log.folder)
        self.sync: Sync | None = None
        self.closed = 0.0

    def play(self, record: CommitRecord | None, stop_after: int | None) -> Outcome:
        """Play the job's rounds, from the start or from a commit.

        Args:
            record: commit to go on from.
            stop_after: last round to play now; the job's schedules are those of the whole job.
        """
        began, last = time.monotonic(), min(stop_after or self.job.rounds, self.job.rounds)
        try:
            affordable = self.rounds(record, last)
        finally:
            self.ledger.costs.settle()  # however it ended, what was spent was spent
        kind, told = self.ledger.ending(last, self.stop.is_set(), affordable, time.monotonic() - began)
        self.log.event(kind, **told)
        return self.ledger.outcome(kind == "run_finished", told.get("reason", ""))

    def rounds(self, record: CommitRecord | None, last: int) -> bool:
        """Start the regions and play up to round `last`; False when the budget did not reach that far."""
        self.ledger.costs.resume(record.spent if record else None)
        if noise := self.ledger.begin(self.fleet.start(evaluate=record is None)):
            self.log.event("privacy_started", **noise)
        if record is not None:
            self.ledger.resume(record)
            self.fleet.restore(self.ledger.order, record.round)
        affordable = True
        try:
            for number in range(self.ledger.round + 1, last + 1):
                if self.stop.is_set() or not (affordable := self.round(number, final=number == last)):
                    break
            self.land()
        except (QuorumError, AggregationError, PrivacyBudgetError) as error:
            if isinstance(error, PrivacyBudgetError):
                self.land()  # what was offered before was paid for
            if not isinstance(error, DivergenceError):
                self.checkpoint()  # whoever is left holds the last committed round
            raise
        self.checkpoint()
        return affordable

    def round(self, number: int, final: bool) -> bool:
        """Play one round until its updates are merged, on their way, or given up; False when the budget ends it first.

        Raises:
            QuorumError: the failure policy gives up.
            PrivacyBudgetError: the round would cost more privacy than the job allows.
        """
        attempt = 1
        while self.recover(number):
            if self.attempt(self.plan(number, attempt), final):
                return True
            attempt += 1
        return False

    def attempt(self, plan: RoundPlan, final: bool) -> bool:
        """Try a round once; True when it is over, False to try again."""
        began, number, job = time.perf_counter(), plan.round, self.job
        if refused := self.aggregator.open(plan, self.fleet):
            return self.again(plan, refused)  # a region that died on the way may be back in the next attempt
        self.ledger.spend(plan, self.fleet.untrained(number))
        self.fleet.launch(plan, job.rounds)
        self.land(beside=plan)  # what the last round offered travels while this one trains
        offers = self.fleet.collect(number, self.ledger.round, job.buffer, self.ledger.overspent)
        decision = decide(job.failure, len(job.regions), job.needed, offers, plan.attempt)
        if decision.action is not Action.MERGE:  # who was not waited for, to save money, has not failed
            return not self.ledger.overspent() and self.give_up(plan, decision)
        evaluate = final or (job.evaluation.sequences > 0 and number % job.evaluation.every == 0)
        self.sync = Sync(plan, offers, began, evaluate)
        due = bool(job.checkpoint.every) and number % job.checkpoint.every == 0
        later = job.streaming.overlap and not due and not final
        if not later and not self.land():
            return False
        if due:
            self.checkpoint()
        return True

    def plan(self, number: int, attempt: int) -> RoundPlan:
        """What every region is asked to do."""
        return self.ledger.plan(number, attempt, landing=self.sync.plan.round if self.sync else None)

    def land(self, beside: RoundPlan | None = None) -> bool:
        """Merge what was offered last and have every region take it up, now or while it trains `beside`.

        Returns False when an update was lost on the way and the round must be tried again.
        """
        sync, self.sync = self.sync, None
        if sync is None:
            return True
        merged = self.merge(sync.plan, sync.offers)
        while merged is None and self.job.streaming.overlap:  # the regions have gone on: merge what is left
            left = {name: offer for name, offer in sync.offers.items() if name in self.fleet.ready}
            sync = replace(
                sync, plan=sync.plan.model_copy(update={"attempt": sync.plan.attempt + 1}), offers=left
            )
            policy = decide(self.job.failure, len(self.job.regions), self.job.needed, left, sync.plan.attempt)
            if policy.action is not Action.MERGE:
                return self.call_off(sync.plan, policy, beside)
            merged = self.merge(sync.plan, left)
        if merged is None:
            return False
        total, handles = merged
        total = total.model_copy(update={"lands_in": beside.round if beside else None})
        applied = self.fleet.apply(total, handles, sync.evaluate)
        if not applied:  # most likely the aggregator has died, and the merged update with it
            return self.again(sync.plan, "every region was lost while it applied the merged update")
        if reason := self.ledger.suspicion(sync, total, applied):
            self.fleet.undo(self.ledger.order, sync.plan.round, reason)
        else:
            self.commit(sync, total, applied)
        return True

    def commit(self, sync: Sync, total: RoundSum, applied: Mapping[str, Applied]) -> None:
        """Book a round that every region has taken up."""
        reports = {name: report for name, (report, _) in sync.offers.items()}
        wall_s = time.perf_counter() - max(sync.began, self.closed)
        self.log.round(self.ledger.close_round(sync.plan, reports, total, applied, wall_s))
        self.closed = time.perf_counter()

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
            "round_merged", round=plan.round, regions=list(total.regions), seconds=time.perf_counter() - began
        )
        return total, handles

    def call_off(self, plan: RoundPlan, decision: Decision, beside: RoundPlan | None) -> bool:
        """Tell regions that wait for a merge that there is none; the fragment is merged in its next turn.

        Raises:
            QuorumError: the policy says to abort.
        """
        if decision.action is Action.ABORT:
            return self.give_up(plan, decision)
        nothing = RoundSum.of_nothing(plan, beside.round if beside else None)
        self.fleet.apply(nothing, [], evaluate=False)
        self.ledger.costs.apart()
        self.log.event("round_skipped", round=plan.round, reason=decision.reason)
        return True

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
            self.ledger.costs.apart()
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

    def recover(self, number: int) -> bool:
        """Bring back regions that are away; wait if the round needs them. False: the budget may not last for it."""
        if self.fleet.recovering or self.ledger.exhausted(self.sync):
            self.land()  # what it costs is known then, and no estimate
            self.checkpoint()  # what they will have to load
        saved = self.ledger.saved_round
        if saved == self.ledger.round and not self.ledger.exhausted(self.sync):
            with self.ledger.costs.waiting():
                self.fleet.recover(self.ledger.order_or_none, number, self.job.needed, self.ledger.waited_out)
        if not self.fleet.ready and not self.ledger.exhausted(self.sync):
            raise QuorumError(f"round {number}: no region is left; go on from round {saved} with --resume")
        return not self.ledger.exhausted(self.sync)

    def checkpoint(self) -> None:
        """Save every idle region's state of the committed round, unless that is done already."""
        number = self.ledger.round
        while self.fleet.idle and number > self.ledger.saved_round:
            self.ledger.store.clear(number)
            donor = self.fleet.idle[0]
            saved = self.fleet.save(number, donor)
            if donor in saved:
                self.ledger.commit(saved, donor)
                self.log.event("checkpoint_committed", round=number, path=self.ledger.store.folder(number))

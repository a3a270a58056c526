"""What a run knows of itself between rounds: the figures that a commit makes permanent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xcloud.balance import Pace, balanced_steps
from xcloud.billing import Biller
from xcloud.checkpoint import CheckpointStore, CommitRecord, RegionState
from xcloud.config import JobConfig, dump_job, load_job
from xcloud.errors import (
    AggregationError,
    CheckpointError,
    ConfigError,
    DivergenceError,
    PrivacyAccountingError,
)
from xcloud.manifest import ChunkLayout
from xcloud.messages import (
    Applied,
    PrivacyTerms,
    RegionReady,
    RegionReport,
    RestoreOrder,
    RoundPlan,
    RoundSum,
    Saved,
)
from xcloud.metrics import PoolRow, PrivacyRow, RegionRow, RoundRow, read_events
from xcloud.policies import suspicion
from xcloud.privacy import PrivacyLedger, Release
from xcloud.privacy.skellam import noise_to_signal

__all__ = ["Ledger", "Offers", "Outcome", "Sync", "check_job", "find_commit", "keep_job", "mean_loss"]

CHANGEABLE = ("rounds", "aggregation_actors", "failure", "checkpoint", "evaluation", "envelope", "cost")
"""Job keys that may differ when a run is resumed; so may the regions' pools."""

FLOAT_BYTES = 4

NOTE_S = 60.0
"""How often what a run has cost is written down while it waits."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last committed round, and why it is over."""

    rounds: int
    finished: bool
    reason: str
    eval_loss_start: float | None
    eval_loss_end: float | None


Offers = Mapping[str, tuple[RegionReport, list[Any]]]
"""Reports of regions, and the handles of their updates."""


@dataclass(frozen=True)
class Sync:
    """What the regions have offered in a round, and nobody has merged yet."""

    plan: RoundPlan
    offers: Offers
    began: float
    evaluate: bool


class Ledger:
    """Committed round, model, cursors, totals and released privacy of one run.

    Args:
        job: the whole job.
        store: its checkpoints.
        folder: the run folder, in which the privacy ledger is kept.
    """

    def __init__(self, job: JobConfig, store: CheckpointStore, folder: Path) -> None:
        self.job = job
        self.store = store
        self.folder = folder
        self.round = 0
        self.model_digest = ""
        self.manifest_digest = ""
        self.layout: tuple[ChunkLayout, ...] = ()
        self.fragments: tuple[tuple[int, int], ...] = ()
        self.cursors = {region.name: 0 for region in job.regions}
        self.data: dict[str, str] = {}
        self.tokens = 0
        self.eval_start: float | None = None
        self.eval_loss: float | None = None
        self.saved: CommitRecord | None = None
        self.norms: list[float] = []
        self.losses: dict[str, float] = {}
        self.rejected = 0
        self.endorsements: dict[str, str] = {}
        self.privacy: PrivacyLedger | None = None
        self.terms: dict[str, PrivacyTerms] = {}
        self.costs = Biller(job, folder)
        self._paces = {region.name: Pace(job.balance.regions) for region in job.regions}

    @property
    def saved_round(self) -> int:
        """The newest round that a checkpoint holds; 0: none does."""
        return self.saved.round if self.saved else 0

    def outcome(self, finished: bool, reason: str) -> Outcome:
        """The run's outcome as it stands."""
        return Outcome(self.round, finished, reason, self.eval_start, self.eval_loss)

    def exhausted(self, sync: Sync | None) -> bool:
        """Whether another round might exceed the budget; `sync` is one that was trained and is still to be merged."""
        if sync is None:
            return self.costs.exhausted()
        first, end = sync.plan.chunks or (0, len(self.layout))
        most = sum(FLOAT_BYTES * chunk.length for chunk in self.layout[first:end])
        return self.costs.exhausted({n: r.bytes_up for n, r in _reports(sync.offers).items()}, most)

    def overspent(self) -> bool:
        """Whether the budget is exceeded; for whoever waits: what was spent is written down now and then."""
        self.costs.note(NOTE_S)
        return self.costs.overspent

    def waited_out(self) -> bool:
        """Whether another round might exceed the budget; for whoever waits for regions before it."""
        return self.overspent() or self.exhausted(None)

    def ending(
        self, last: int, interrupted: bool, affordable: bool, seconds: float
    ) -> tuple[str, dict[str, Any]]:
        """The event that ends a run whose play is over, and its fields.

        Args:
            last: round up to which it was to be played.
            interrupted: somebody asked it to stop.
            affordable: the budget lasted that far.
            seconds: of this start.
        """
        told: dict[str, Any] = {} if self.costs.tariff is None else {"spent_usd": self.costs.spent.usd}
        if not affordable and not interrupted:
            return "run_stopped", {"round": self.round, "reason": "budget", **told}
        played = not interrupted or self.round == last
        if played and last == self.job.rounds:
            done = {"rounds": self.round, "eval_loss": self.eval_loss, "seconds": seconds}
            return "run_finished", done | told
        return "run_stopped", {
            "round": self.round,
            "reason": "stop-after" if played else "interrupted",
            **told,
        }

    def begin(self, ready: Mapping[str, RegionReady]) -> dict[str, Any]:
        """Take the fresh regions' common model as round 0; returns what is to be said of noise on it.

        Raises:
            DivergenceError: regions start from different layouts or weights.
            ConfigError: regions hold the same data, and `dp` is asked for.
        """
        first = next(iter(ready.values()))
        for answer in ready.values():
            for what, mine, theirs in (
                ("parameter layouts", first.manifest_digest, answer.manifest_digest),
                ("initial weights", first.model_digest, answer.model_digest),
            ):
                if mine != theirs:
                    raise DivergenceError(
                        f"regions {first.region!r} and {answer.region!r} start from different {what} "
                        f"({mine[:12]}, {theirs[:12]}); check that they run the same versions"
                    )
        self.costs.apart()
        self.data = {name: answer.data_fingerprint for name, answer in ready.items()}
        self.manifest_digest, self.model_digest = first.manifest_digest, first.model_digest
        self.layout = tuple(ChunkLayout(*chunk) for chunk in first.layout)
        self.fragments = first.fragments
        self.eval_start = self.eval_loss = mean_loss(ready.values())
        self.losses = {name: answer.eval_loss for name, answer in ready.items() if answer.eval_tokens}
        self._open_privacy(ready)
        return self._noise(first.parameters)

    def _open_privacy(self, ready: Mapping[str, RegionReady]) -> None:
        """Go on with the run folder's privacy ledger, or begin one."""
        dp = self.job.dp
        if dp is None:
            return
        for name, answer in ready.items():
            if answer.privacy is None or answer.privacy.unit != dp.unit:
                raise PrivacyAccountingError(
                    f"region {name!r} does not say under which terms it trains, though the job asks for dp; "
                    "check that it runs the same version"
                )
            self.terms[name] = answer.privacy
            if dp.unit == "region":
                continue  # what its data had a part in is one region's, whoever else has it
            twin = next((n for n in ready if n != name and self.data[n] == self.data[name]), None)
            if twin is not None:
                raise ConfigError(
                    f"dp: regions {name!r} and {twin!r} hold the same data, so that what both release adds up; "
                    "expected data of its own in each region"
                )
        fresh = PrivacyLedger(unit=dp.unit, delta=dp.delta, budget=dp.target_epsilon)
        self._take_over(PrivacyLedger.kept(self.folder) or fresh)

    def _noise(self, parameters: int) -> dict[str, Any]:
        """Of noise on merges: how much, and how it compares with updates that all point the same way."""
        dp, terms = self.job.dp, next(iter(self.terms.values()), None)
        if dp is None or terms is None or dp.unit != "region":
            return {}
        over_clip = terms.noise_multiplier
        if (
            dp.distributed
        ):  # rounding to the grid makes the sensitivity, and with it the noise, larger than the clip norm
            lengths = [chunk.length for chunk in self.layout]
            grid = dp.grid(
                self.job.rounds, lengths, len(self.job.regions), *self.job.cohort, self.job.ring_bits
            )
            over_clip = grid.step * math.sqrt(grid.variance) / dp.clip_norm
        return {
            "unit": dp.unit,
            "mechanism": dp.mechanism,
            "noise_multiplier": terms.noise_multiplier,
            "noise_to_signal_ratio": noise_to_signal(over_clip, parameters, len(self.job.regions)),
        }

    def _take_over(self, ledger: PrivacyLedger) -> None:
        """Go on from what was released before; a run never forgets."""
        assert self.job.dp is not None
        wanted = (self.job.dp.unit, self.job.dp.delta, self.job.dp.target_epsilon)
        if (ledger.unit, ledger.delta, ledger.budget) != wanted:
            raise CheckpointError(
                f"{self.folder}: what was released here was booked per {ledger.unit} at delta {ledger.delta:g} with "
                f"target_epsilon {ledger.budget}, not as this job's dp says; expected the same, or another run folder"
            )
        if self.privacy is None or len(ledger.releases) > len(self.privacy.releases):
            self.privacy = ledger

    def spend(self, plan: RoundPlan, names: Iterable[str]) -> None:
        """Book what these regions are about to release by training a round; on the disk when this returns.

        Raises:
            PrivacyBudgetError: it would cost more than the job allows; nothing is booked, and nothing may be trained.
        """
        if self.privacy is None:
            return
        # A merge is noised anew however often it is tried, and says something of every region, also of one that is away.
        merges = self.privacy.unit == "region"
        releases = tuple(
            Release(
                round=plan.round,
                region=name,
                steps=self._merges(plan.attempt) if merges else plan.inner_steps,
                terms=self.terms[name],
            )
            for name in (self.terms if merges else names)
        )
        self.privacy = self.privacy.with_releases(releases)
        self.privacy.keep(self.folder)

    def _merges(self, attempt: int) -> int:
        """As how many releases an attempt at a merge is booked.

        Regions offer the same integers again, noise and all. If a sum was opened before, and one region has trained anew since,
        the difference of two sums is that region's own change, of twice the sensitivity, under two of its own shares of noise
        alone: it costs as much as 2 (survivors - colluders) sums do.
        """
        if attempt == 1 or self.job.dp is None or not self.job.dp.distributed:
            return 1
        survivors, colluders = self.job.cohort
        return 2 * (survivors - colluders)

    def resume(self, record: CommitRecord) -> None:
        """Go on from a commit.

        Raises:
            CheckpointError: it was made with another layout of parameters.
        """
        if record.manifest_digest != self.manifest_digest:
            raise CheckpointError(
                f"{self.store.url}: round {record.round} holds another model layout or chunk_size than this job"
            )
        for name, state in record.regions.items():
            if state.data_fingerprint != self.data.get(name, state.data_fingerprint):
                raise CheckpointError(
                    f"region {name!r}: its data is not what round {record.round} was trained on, so its cursor "
                    "points nowhere; expected the same files, tokenizer and held-out fraction"
                )
        self.round, self.model_digest, self.saved = record.round, record.model_digest, record
        self.cursors |= {name: state.cursor for name, state in record.regions.items()}
        self.tokens, self.eval_start, self.eval_loss = record.tokens, record.eval_loss_start, record.eval_loss
        self.norms = list(record.norms)
        self.losses = {n: s.eval_loss for n, s in record.regions.items() if s.eval_loss is not None}
        if self.privacy is not None and record.privacy is not None:
            self._take_over(record.privacy)

    def order_or_none(self, name: str) -> RestoreOrder | None:
        """What region `name` has to load to stand at the committed round; None at round 0."""
        return self.order(name) if self.round else None

    def order(self, name: str) -> RestoreOrder:
        """Like `order_or_none`, once a round is committed."""
        assert self.saved is not None
        assert self.saved.round == self.round, "a region may only come back to the committed round"
        state = self.saved.regions.get(name)
        return RestoreOrder(
            round=self.round,
            inner_round=state.inner_round if state else None,
            cursor=self.cursors[name],
            model_digest=self.model_digest,
            files=(*self.saved.model_files, *(state.files if state else ())),
            endorsements=self.saved.endorsements,
        )

    def plan(self, number: int, attempt: int, landing: int | None) -> RoundPlan:
        """What every region is asked to do in an attempt at a round; `landing` as in `RoundPlan`."""
        return RoundPlan(
            job=self.job.name,
            round=number,
            attempt=attempt,
            model_digest=self.model_digest,
            manifest_digest=self.manifest_digest,
            inner_steps=self.job.inner.steps,
            steps=self._steps(),
            chunks=self.fragments[(number - 1) % len(self.fragments)] if len(self.fragments) > 1 else None,
            landing=landing,
        )

    def _steps(self) -> dict[str, int]:
        """Inner steps of each region in the next round, where they follow measured speed; else nothing."""
        job = self.job
        if job.balance.regions == "fixed":
            return {}
        strides = [region.sequences_per_step for region in job.regions]
        paces, least = list(self._paces.values()), job.streaming.overlap + 1
        steps = balanced_steps(job.inner.steps * sum(strides), strides, paces, job.inner.steps, least)
        return dict(zip(self._paces, steps, strict=True))

    def _measure(self, report: RegionReport) -> None:
        sequences = report.tokens / self.job.sequence_length
        steps = sequences / self.job.region(report.region).sequences_per_step
        if steps and report.compute_s:
            self._paces[report.region].note(report.compute_s / steps, report.encode_s)

    def suspicion(self, sync: Sync, total: RoundSum, applied: Mapping[str, Applied]) -> str | None:
        """Why the merged update that the regions have taken up should be taken back; None: it should not.

        What is taken back was sent all the same, and is paid.

        Raises:
            AggregationError: there is nothing to go back to, or it was so too often.
        """
        guards = self.job.guards
        if guards is None:
            return None
        known = [name for name, answer in applied.items() if name in self.losses and answer.eval_tokens]
        norm = next(iter(applied.values())).norm
        reason = suspicion(
            guards,
            self.norms,
            math.nan if norm is None else norm,
            [self.losses[name] for name in known],
            [applied[name].eval_loss for name in known],
        )
        self.rejected = self.rejected + 1 if reason else 0
        if reason:
            self.costs.rejected(*self._traffic(_reports(sync.offers), total, applied))
        if reason and (self.rejected > guards.patience or not self.saved):
            before = f"{self.rejected} rounds in a row" if self.saved else "before the first commit"
            raise AggregationError(
                f"round {sync.plan.round}: {reason}, {before}; the last committed round stays"
            )
        return reason

    def close_round(
        self,
        plan: RoundPlan,
        reports: Mapping[str, RegionReport],
        total: RoundSum,
        applied: Mapping[str, Applied],
        wall_s: float,
    ) -> RoundRow:
        """Book a merged and applied round; returns its row.

        Raises:
            DivergenceError: the regions do not hold the same model after the outer step.
        """
        digests = {name: answer.model_digest for name, answer in applied.items()}
        if len(set(digests.values())) != 1:
            self.costs.rejected(*self._traffic(reports, total, applied))
            held = ", ".join(f"{name}: {digest[:12]}" for name, digest in digests.items())
            raise DivergenceError(
                f"round {plan.round}: the regions hold different models after the outer step ({held})"
            )
        self.round, self.model_digest = plan.round, next(iter(digests.values()))
        self.endorsements = {name: a.endorsement for name, a in applied.items() if a.endorsement}
        self.losses |= {name: answer.eval_loss for name, answer in applied.items() if answer.eval_tokens}
        norm = next(iter(applied.values())).norm
        if self.job.guards and norm is not None:
            self.norms = [*self.norms, norm][-self.job.guards.window :]
        for report in reports.values():
            self._measure(report)
        counted = {name: report for name, report in reports.items() if name in total.regions}
        # A region whose update was left out reads its data again, unless it goes on from its own model.
        read = reports if self.job.streaming.keeps_local else counted
        self.cursors |= {name: report.cursor for name, report in read.items()}
        cost = self.costs.round(*self._traffic(reports, total, applied))
        reports = counted
        tokens = sum(report.tokens for report in reports.values())
        self.tokens += tokens
        loss = mean_loss(applied.values())
        self.eval_loss = self.eval_loss if loss is None else loss
        compute_s = max(report.compute_s for report in reports.values())
        cloud = {region.name: region.cloud for region in self.job.regions}
        receivers = {(cloud[n],) if cloud[n] in total.near else n: a.bytes_down for n, a in applied.items()}
        eval_s = max(answer.eval_s for answer in applied.values())
        return RoundRow(
            round=plan.round,
            attempt=plan.attempt,
            train_loss=sum(r.train_loss * r.tokens for r in reports.values() if r.tokens) / tokens
            if tokens
            else math.nan,
            eval_loss=loss,
            tokens=tokens,
            bytes_up=sum(report.bytes_up for report in reports.values()),
            bytes_down=sum(answer.bytes_down for answer in applied.values()),
            egress_bytes_up=sum(report.bytes_up for report in reports.values())
            if total.egress_up is None
            else total.egress_up,
            egress_bytes_down=sum(receivers.values()),
            compute_s=compute_s,
            sync_s=max(0.0, wall_s - compute_s - eval_s),
            regions={name: self._region_row(report, applied.get(name)) for name, report in reports.items()},
            model_digest=self.model_digest,
            privacy=self._privacy_row(self.privacy.total) if self.privacy else None,
            cost=cost,
        )

    def _traffic(
        self, reports: Mapping[str, RegionReport], total: RoundSum, applied: Mapping[str, Applied]
    ) -> tuple[dict[str, int], dict[str, int], int, tuple[str, ...]]:
        """What the round sent, for `Biller.round`; what a region sent in vain was sent."""
        up = {name: report.bytes_up for name, report in reports.items()}
        down = {name: answer.bytes_down for name, answer in applied.items()}
        cloud = {region.name: region.cloud for region in self.job.regions}
        direct = sum(up[name] for name in total.regions if cloud[name] not in total.near)
        relayed = 0 if total.egress_up is None else total.egress_up - direct
        return up, down, relayed if total.near else 0, total.near

    def _privacy_row(self, epsilon: float) -> PrivacyRow:
        assert self.privacy is not None
        return PrivacyRow(unit=self.privacy.unit, epsilon=epsilon, delta=self.privacy.delta)

    def _region_row(self, report: RegionReport, applied: Applied | None) -> RegionRow:
        return RegionRow(
            tokens=report.tokens,
            train_loss=report.train_loss,
            eval_loss=applied.eval_loss if applied and applied.eval_tokens else None,
            tokens_per_s=report.tokens / report.compute_s if report.compute_s else 0.0,
            bytes_up=report.bytes_up,
            bytes_down=applied.bytes_down if applied else 0,
            compute_s=report.compute_s,
            landing_s=report.landing_s,
            staleness=report.staleness,
            sync_s=report.encode_s + (applied.apply_s if applied else 0.0),
            update_norm=report.update_norm,
            cursor=report.cursor,
            privacy=self._privacy_row(self.privacy.epsilon(report.region)) if self.privacy else None,
            pools=tuple(PoolRow(tokens=pool.tokens, compute_s=pool.compute_s) for pool in report.pools),
        )

    def commit(self, saved: Mapping[str, Saved], donor: str) -> CommitRecord:
        """Write the commit record of the current round; regions that were away keep their last inner state."""
        regions = {}
        for name, cursor in self.cursors.items():
            files = (
                tuple(f for f in saved[name].files if not f.path.startswith("model/"))
                if name in saved
                else ()
            )
            inner_round: int | None = self.round if name in saved else None
            previous = self.saved.regions.get(name) if self.saved else None
            if name not in saved and previous is not None and self.saved is not None:
                self.store.carry(self.saved.round, self.round, previous.files)
                files, inner_round = previous.files, previous.inner_round
            regions[name] = RegionState(
                cursor=cursor,
                data_fingerprint=self.data.get(name, ""),
                inner_round=inner_round,
                files=files,
                eval_loss=self.losses.get(name) if self.job.guards else None,
            )
        record = CommitRecord(
            job=self.job.name,
            round=self.round,
            manifest_digest=self.manifest_digest,
            model_digest=self.model_digest,
            regions=regions,
            model_files=tuple(f for f in saved[donor].files if f.path.startswith("model/")),
            chunk_size=self.job.chunk_size,
            tokens=self.tokens,
            eval_loss_start=self.eval_start,
            eval_loss=self.eval_loss,
            norms=tuple(self.norms),
            endorsements=self.endorsements,
            privacy=self.privacy,
            spent=self.costs.standing,
        )
        self.store.commit(record)
        self.saved = record
        self.store.prune(self.job.checkpoint.keep)
        return record


def _reports(offers: Offers) -> dict[str, RegionReport]:
    return {name: report for name, (report, _) in offers.items()}


def mean_loss(answers: Iterable[RegionReady | Applied]) -> float | None:
    """Token-weighted mean of the regions' held-out losses; None when none was evaluated."""
    answers = list(answers)
    tokens = sum(answer.eval_tokens for answer in answers)
    return sum(a.eval_loss * a.eval_tokens for a in answers if a.eval_tokens) / tokens if tokens else None


def find_commit(job: JobConfig, store: CheckpointStore, run_dir: Path, resume: bool) -> CommitRecord | None:
    """The commit to resume from; None when the run is new or never got as far as one.

    Raises:
        CheckpointError: the run has committed rounds, but not here; or it is new, and here are another's.
    """
    if resume:
        check_job(job, run_dir)
    record = store.latest()
    if not resume:
        if record is not None:
            raise CheckpointError(
                f"{store.url}: holds committed rounds of another run (up to {record.round}); "
                "go on with --resume, or choose another checkpoint.url"
            )
        return None
    if record is None and any(event.kind == "checkpoint_committed" for event in read_events(run_dir)):
        raise CheckpointError(
            f"{store.url}: no committed round here, though {run_dir / 'events.jsonl'} tells of some; "
            "expected the checkpoint.url that the run was started with"
        )
    return record


def keep_job(job: JobConfig, run_dir: Path) -> None:
    """Write the resolved job into the run folder, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    fresh = run_dir / "job.yaml.tmp"
    fresh.write_text(dump_job(job), encoding="utf-8")
    fresh.replace(run_dir / "job.yaml")


def check_job(job: JobConfig, run_dir: Path) -> None:
    """Check a resumed job against the one that the run was started with.

    Raises:
        CheckpointError: a key that decides the result differs; names it.
    """
    path = run_dir / "job.yaml"
    if not path.exists():
        raise CheckpointError(f"{run_dir}: no run to resume here (expected {path.name})")
    before, after = _fixed(load_job(path)), _fixed(job)
    changed = _difference(before, after, "")
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with {changed}; a resumed run may change only "
            f"{', '.join(CHANGEABLE)} and the regions' pools"
        )


def _fixed(job: JobConfig) -> dict[str, Any]:
    """The part of a job that must not change across a resume."""
    data = job.model_dump(mode="json", exclude=set(CHANGEABLE))
    for region in data["regions"]:
        del region["pools"]
    if (
        job.streaming.overlap
    ):  # before a checkpoint, regions wait for the merged update: part of the algorithm
        data["checkpoint"] = {"every": job.checkpoint.every}
    return data


def _difference(before: Any, after: Any, path: str) -> str | None:
    """The first key that differs, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            found = _difference(before.get(key), after.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            found = _difference(one, other, f"{path}[{index}]")
            if found:
                return found
        return None
    return None if before == after else f"{path} = {before!r}, now {after!r}"

"""A region: its pools, its data and its copy of the model.

`Region` is plain Python. Its inputs and outputs are messages and handles of raw buffers, so
the same class serves a region inside the hub's Ray cluster (`xcloud.cluster_region`) and one
with a cluster of its own. It starts a placement group for each pool and an actor for each
rank, hands out the round's data, merges its pools in the clear, and answers for its ranks:
when one of them fails, the region fails, and it is restarted as a whole from a commit.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xcloud.aggregators import MeanConfig
from xcloud.balance import Pace, balanced_steps
from xcloud.cloud.placement import nodes_of, place_pool
from xcloud.cloud.preemption import draining_nodes
from xcloud.config import JobConfig, PoolConfig
from xcloud.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    MessageError,
    RegionError,
    ReplayError,
    SecurityError,
    TruncatedError,
)
from xcloud.manifest import Manifest, model_hasher
from xcloud.messages import (
    Applied,
    Encryption,
    PoolReport,
    PrivacyTerms,
    Progress,
    RankInfo,
    RegionReady,
    RegionReport,
    RestoreOrder,
    RoundPlan,
    RoundSum,
    Saved,
    SaveOrder,
)
from xcloud.parts import Bundle, PartReader, PartWriter
from xcloud.privacy import PrivacyLedger, Release
from xcloud.quiet import quiet_environment
from xcloud.secure.ckks import encrypted_bytes, measure
from xcloud.secure.envelope import Opening, Route, Sealing, new_secret, table_of
from xcloud.secure.guard import SCALE, Guard
from xcloud.secure.identity import Member
from xcloud.secure.local import open_guard, open_policy, open_vault
from xcloud.secure.masks import Masker
from xcloud.secure.messages import Result, SyncPlan
from xcloud.secure.policy import PlanFacts, Policy, PrivacyFacts
from xcloud.secure.post import Letter, Post, PostOrder, aggregator_name, largest, round_hash
from xcloud.secure.settings import LEAST_GROUPS
from xcloud.secure.vault import Vault
from xcloud.training.spec import Beside, Landed, Offer, Trained, WorkerSpec
from xcloud.transport.blobs import Handle, RayBlobs
from xcloud.transport.calls import gather
from xcloud.update import adds_up, room

__all__ = ["Region", "group_name"]

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""Between two looks at the nodes that are about to go."""
BESIDE = "beside"
"""The ranks' second thread, in which merged updates arrive while they train."""


class RankActor:
    """`RankWorker` inside an actor.

    The worker's module is imported here and not above: torch and DeepSpeed take seconds and
    hundreds of MB to load, and neither the driver nor a region's own process needs them.
    """

    def __init__(self, spec: WorkerSpec, blobs: RayBlobs, progress: Any) -> None:
        worker = importlib.import_module("xcloud.training.worker")
        node = f"{socket.gethostname()}:{ray.get_runtime_context().get_node_id()[:12]}"
        self._worker = worker.RankWorker(spec, blobs, progress, node)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self._worker, method)(*args)

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on this rank's node for the pool's process group."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return address, int(probe.getsockname()[1])

    def pid(self) -> int:
        """Process id, for fault tests and memory measurements."""
        return os.getpid()


@dataclass
class Pool:
    """One pool's actors."""

    config: PoolConfig
    group: PlacementGroup
    ranks: list[Any]
    infos: tuple[RankInfo, ...] = ()

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every rank; references in rank order."""
        return [rank.call.remote(method, *args) for rank in self.ranks]

    def tell(self, method: str, *args: Any) -> list[Any]:
        """Like `ask`, beside whatever the ranks are doing."""
        return [rank.call.options(concurrency_group=BESIDE).remote(method, *args) for rank in self.ranks]


@dataclass
class Pending:
    """A finished local round that waits to be merged."""

    report: RegionReport
    handles: list[Handle]
    masker: Masker | None = None
    sealing: Sealing | None = None
    table: bytes = b""


def group_name(tag: str, pool: int) -> str:
    """Name of a pool's placement group."""
    return f"{tag}/pool-{pool}"


def worker_spec(job: JobConfig, region: str, pool: int, rank: int) -> WorkerSpec:
    """What one rank needs to know of the job."""
    settings = job.region(region)
    engine = settings.pools[pool]
    return WorkerSpec(
        region=region,
        pool=pool,
        rank=rank,
        world=engine.workers,
        on_gpu=engine.on_gpu,
        threads=engine.cpus,
        seed=job.seed,
        rounds=job.rounds,
        sequence_length=job.sequence_length,
        chunk_size=job.chunk_size,
        model=job.model,
        engine=engine,
        inner=job.inner,
        outer=job.outer,
        codec=job.coding,
        downlink=job.downlink,
        streaming=job.streaming,
        dp=job.dp,
        job=job.name,
        members=len(job.regions),
        tokenizer=job.tokenizer,
        data=settings.data,
        evaluate_on=settings.evaluate_on,
        held_out_fraction=job.data.held_out_fraction,
        cache_dir=job.data.cache_dir or str(Path.home() / ".cache" / "xcloud" / "data"),
        eval_sequences=job.evaluation.sequences,
        guarded=job.guards is not None,
        hashed=job.secure_aggregation is not None,
        halts=settings.on_spot,
        cohort=job.cohort,
    )


def share_of(job: JobConfig, region: str, plan: RoundPlan | None = None) -> float:
    """What a region multiplies its update by where encodings add up: its tokens over the most of any region.

    It depends on the job and the plan alone, so that it is public and a region knows it before it encodes.
    `plan` matters only where regions take different numbers of steps.
    """
    if not adds_up(job.coding.build()) or (
        isinstance(job.aggregator, MeanConfig) and job.aggregator.weigh_by == "equal"
    ):
        return 1.0
    steps = {r.name: max(1, plan.steps_of(r.name)) if plan is not None else 1 for r in job.regions}
    sequences = {r.name: r.sequences_per_step * steps[r.name] for r in job.regions}
    return sequences[region] / max(sequences.values())


def _table(sealing: Sealing | None, offers: Sequence[Offer]) -> bytes:
    """The table of the envelope that the ranks have filled."""
    if sealing is None:
        return b""
    return table_of(sealing.route, {chunk: row for offer in offers for chunk, row in offer.rows.items()})


class Region:
    """One cloud region of a job.

    Args:
        job: the whole job.
        name: which of its regions this is.
        tag: unique in the cluster; begins the names of the placement groups.
        enforce_labels: place pools by their node labels.
        progress: picklable callable for the ranks' progress, or None.
        reader: see `RayBlobs`; the aggregation actor that reads this region's update, or None.
    """

    def __init__(
        self,
        job: JobConfig,
        name: str,
        tag: str,
        enforce_labels: bool,
        progress: Any = None,
        reader: Any = None,
    ) -> None:
        self.job = job
        self.tag = tag
        self.name = name
        self.settings = job.region(name)
        self.enforce_labels = enforce_labels
        self.blobs = RayBlobs(self.settings.cloud)
        # What several pools store first is merged inside the region, and is no business of the aggregator's.
        self.upload = RayBlobs(self.settings.cloud, reader if len(self.settings.pools) == 1 else None)
        self.pools: list[Pool] = []
        self.cursor = 0
        self.model_digest = self.manifest_digest = ""
        self._chunk_count = 0
        self.pending: Pending | None = None
        self.guard: Guard | None = None
        self.post: Post | None = None
        self.vault: Vault | None = None
        self.policy: Policy | None = None
        self.terms: PrivacyTerms | None = None
        self._latest = self._repeated = 0
        self._reached = False  # its model by a merge or a checkpoint, and not as a first one
        self._planned: dict[int, range] = {}  # chunks that a round merges
        self._asked: dict[int, tuple[int, tuple[Member, ...]]] = {}  # attempt and company of a merge
        self._shown = False
        self.leaving = False
        self._paces = [Pace(job.balance.pools) for _ in self.settings.pools]
        self._progress_sink = progress
        self._progress: dict[int, tuple[int, int, float]] = {}
        self._round = (0, 0.0, 0)
        self._lock = threading.Lock()

    # -- life -----------------------------------------------------------------------------

    def start(self, evaluate: bool) -> RegionReady:
        """Place the pools, start every rank's engine and, if asked, evaluate the first model.

        Raises:
            SecurityError: names the file that this region needs to seal or mask its updates, and what is wrong with it.
        """
        if self.job.envelope is not None:
            self.post = Post.open(self.name, self.job.envelope)
        secure = self.job.secure_aggregation
        if secure is not None and secure.scheme == "ckks":
            measure()  # before minutes are spent on engines
        if secure is not None:  # not in the constructor: an actor that dies there cannot say why
            shares = {region.name: share_of(self.job, region.name) for region in self.job.regions}
            self.guard = open_guard(
                secure,
                self.name,
                shares,
                self.job.ring_bits,
                self._check,
                self._privacy_after,
                lambda: self._reached,
            )
        self.policy = open_policy(self.name, secure, self.job.envelope)
        self.vault = open_vault(self.job.name, self.name, secure, self.job.envelope)
        for index, pool in enumerate(self.settings.pools):
            group = place_pool(group_name(self.tag, index), pool, self.enforce_labels)
            ranks = [self._spawn(group, index, pool, rank) for rank in range(pool.workers)]
            self.pools.append(Pool(pool, group, ranks))
        meetings = gather([pool.ranks[0].rendezvous.remote() for pool in self.pools])
        started = [
            reference
            for pool, meeting in zip(self.pools, meetings, strict=True)
            for reference in pool.ask("start", *meeting)
        ]
        gather(started)
        self._agree(gather([reference for pool in self.pools for reference in pool.ask("digests")]))
        ready = self._ready(evaluate)
        self._allow(1, self.model_digest)
        if self.settings.on_spot:
            threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return ready

    def _watch(self) -> None:
        """Have the pools end their round as soon as one of their nodes is about to go."""
        while not self.leaving:
            time.sleep(WATCH_S)
            try:
                gone = draining_nodes()
                self.leaving = any(gone.keys() & nodes_of(pool.group) for pool in self.pools)
            except Exception as error:  # noqa: BLE001 - whatever ails Ray for a moment: the next look may tell
                log.warning("region %s cannot see which nodes are about to go: %s", self.name, error)
        # A pool whose machines stay ends its round, too: the region moves as a whole.
        for pool in self.pools:
            pool.tell("halt")

    def _spawn(self, group: PlacementGroup, index: int, pool: PoolConfig, rank: int) -> Any:
        spec = worker_spec(self.job, self.name, index, rank)
        environment = quiet_environment() | {"OMP_NUM_THREADS": str(pool.cpus)}
        if not pool.on_gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        options = {
            "num_cpus": pool.cpus,
            "num_gpus": 1 if pool.on_gpu else 0,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank),
            "runtime_env": {"env_vars": environment},
        }
        groups = {BESIDE: 1} if self.job.streaming.overlap or self.settings.on_spot else None
        actor = ray.remote(concurrency_groups=groups)(RankActor) if groups else ray.remote(RankActor)
        return actor.options(**options).remote(spec, self.upload, self._progress_sink)

    # -- one round ------------------------------------------------------------------------

    def run(self, plan: RoundPlan) -> tuple[RegionReport, list[Handle]]:
        """Train the round and offer the update; a retried round offers the same update again.

        Raises:
            DivergenceError: the plan is for another model than this region holds.
            NonFiniteUpdateError: names the parameter that holds NaN or Inf.
            RegionError: it masks its updates, and has no keys for this round or was asked for another than was signed.
        """
        try:
            return self._run(plan)
        except SecurityError as error:  # this region's failure, and not the run's
            raise RegionError(self.name, str(error)) from None

    def _run(self, plan: RoundPlan) -> tuple[RegionReport, list[Handle]]:
        if plan.model_digest != self.model_digest:
            raise DivergenceError(
                f"region {self.name!r} holds model {self.model_digest[:12]}, "
                f"round {plan.round} was planned for {plan.model_digest[:12]}"
            )
        self._allow(plan.round, plan.model_digest)
        self._planned[plan.round] = range(*plan.chunks) if plan.chunks else range(self._chunk_count)
        again = self.pending is not None and (self.pending.report.round == plan.round or self.job.buffer)
        if not again:
            self.pending = self._train(plan)
            if (
                self.job.streaming.keeps_local or self.job.buffer
            ):  # trained on, whatever becomes of the update
                self.cursor = self.pending.report.cursor
        assert self.pending is not None
        if again and self.guard is not None:
            self._remask(plan, self.pending)
        self.pending.report = self.pending.report.model_copy(update={"attempt": plan.attempt})
        return self.pending.report, self.pending.handles

    def _allow(self, number: int, model: str) -> None:
        """Refuse a round that this region's own policy forbids; of masked rounds the signed plan is checked instead.

        Raises:
            PolicyError: names the file, the key, what was asked for and what is allowed.
        """
        if self.policy is None or self.guard is not None:
            return
        facts = PlanFacts(
            job=self.job.name,
            round=number,
            protection="none" if self.job.envelope is None else "envelope",
            cohort=tuple(region.name for region in self.job.regions),
            model=model,
            privacy=self._privacy_after(number),
        )
        self.policy.check(facts, own_model=self.model_digest if self._reached else None)

    def _privacy_after(self, number: int) -> PrivacyFacts | None:
        """What differential privacy costs this region's data in all rounds up to one, and in those that were trained twice here."""
        dp, terms = self.job.dp, self.terms
        if dp is None or terms is None:
            return None
        rounds = max(number, self._latest) + self._repeated + (number <= self._latest)
        steps = rounds if terms.unit == "region" else rounds * self.job.inner.steps
        release = Release(round=number, region=self.name, steps=steps, terms=terms)
        spent = PrivacyLedger(unit=terms.unit, delta=dp.delta, releases=(release,))
        return PrivacyFacts(unit=terms.unit, epsilon=spent.epsilon(self.name), delta=dp.delta)

    def _train(self, plan: RoundPlan) -> Pending:
        self._repeated += plan.round <= self._latest
        self._latest = max(plan.round, self._latest)
        with self._lock:
            self._progress.clear()
            self._round = (plan.round, time.monotonic(), plan.steps_of(self.name))
        calls, at, single = [], self.cursor, len(self.pools) == 1
        share = share_of(self.job, self.name, plan)
        masker, sealing = self._spend(plan) if self.guard else None, self._sealing(plan)
        road = (share, masker, sealing) if single else (None,)
        steps = self._steps(plan)
        for pool, mine in zip(self.pools, steps, strict=True):
            calls.append(pool.ask("work", plan.model_copy(update={"inner_steps": mine}), at, *road))
            at += mine * pool.config.sequences_per_step
        gather([reference for references in calls for reference in references])
        worked: list[list[tuple[Trained, Offer]]] = [gather(references) for references in calls]
        reports = tuple(
            PoolReport(
                pool=index,
                tokens=sum(trained.tokens for trained, _ in ranks),
                loss_sum=sum(trained.loss_sum for trained, _ in ranks),
                steps=sum(trained.steps for trained, _ in ranks),
                compute_s=max(trained.seconds for trained, _ in ranks),
            )
            for index, ranks in enumerate(worked)
        )
        steps = [ranks[0][0].done for ranks in worked]
        for pace, one, mine in zip(self._paces, reports, steps, strict=True):
            pace.note(one.compute_s / max(1, mine))
        if single:  # of several pools, what one has left of its stretch would lie behind another's
            at = self.cursor + steps[0] * self.pools[0].config.sequences_per_step
        began = time.perf_counter()
        tokens = [report.tokens for report in reports]
        bundles = [Bundle.join(offer.bundle for _, offer in ranks) for ranks in worked]
        if single:
            offers = [offer for _, offer in worked[0]]
        else:
            mean = self._merge_pools(bundles, tokens)
            offers = gather(self.pools[0].ask("encode", plan, mean, share, masker, sealing))
        bundle, norm_squared = Bundle.join(o.bundle for o in offers), sum(o.norm_squared for o in offers)
        encode_s = max(offer.seconds for ranks in worked for _, offer in ranks) + time.perf_counter() - began
        losses = [
            report.loss_sum / report.steps * report.tokens if report.steps else 0.0 for report in reports
        ]
        if hidden := self.job.dp is not None and self.job.dp.unit == "region":
            reports = tuple(one.model_copy(update={"loss_sum": math.nan}) for one in reports)
        report = RegionReport(
            region=self.name,
            round=plan.round,
            attempt=plan.attempt,
            tokens=sum(tokens),
            train_loss=sum(losses) / sum(tokens) if sum(tokens) and not hidden else math.nan,
            # It tells of this one update.
            update_norm=math.nan if self.guard or hidden else math.sqrt(norm_squared),
            share=share,
            cursor=at,
            chunk_bytes=bundle.sizes,
            parts=bundle.parts,
            compute_s=max(report.compute_s for report in reports),
            encode_s=encode_s,
            landing_s=max(trained.landing_s for ranks in worked for trained, _ in ranks),
            upload=self._upload(plan, offers),
            leaving=self.leaving,
            pools=reports,
        )
        return Pending(report, list(bundle.handles), masker, sealing, _table(sealing, offers))

    def _steps(self, plan: RoundPlan) -> list[int]:
        """Inner steps of each pool: equally many, or as many as let all finish together and read as much in all."""
        usual, strides = plan.steps_of(self.name), [pool.config.sequences_per_step for pool in self.pools]
        if len(self.pools) == 1:
            return [usual]
        least = self.job.streaming.overlap + 1
        return balanced_steps(usual * sum(strides), strides, self._paces, usual, least)

    def _upload(self, plan: RoundPlan, offers: Sequence[Offer]) -> str:
        """What is signed of masked chunks; nothing where they are not."""
        if self.guard is None:
            return ""
        ordered = sorted((offer for offer in offers if offer.bundle.parts), key=lambda o: o.bundle.first)
        return self.guard.upload(plan.round, [chunk for o in ordered for chunk in o.sealed]).decode()

    def _remask(self, plan: RoundPlan, pending: Pending) -> None:
        """The same update under the keys of the sync in which the round is tried again."""
        assert self.guard is not None
        assert pending.masker is not None
        masker = self.guard.masker(plan.round)
        if masker == pending.masker:
            return
        self._spend(plan)
        sent = Bundle(pending.report.parts, pending.report.chunk_bytes, tuple(pending.handles))
        opening = pending.sealing.opening(pending.table) if pending.sealing is not None else None
        sealing = self._sealing(plan)  # other bytes: a secret of their own
        road = (pending.masker, masker, opening, sealing)
        offers: list[Offer] = gather(self.pools[0].ask("remask", plan, sent, *road))
        bundle = Bundle.join(offer.bundle for offer in offers)
        changes = {"chunk_bytes": bundle.sizes, "parts": bundle.parts, "upload": self._upload(plan, offers)}
        pending.report = pending.report.model_copy(update=changes)
        pending.handles, pending.masker = list(bundle.handles), masker
        pending.sealing, pending.table = sealing, _table(sealing, offers)

    # -- envelopes ------------------------------------------------------------------------

    def _sealing(self, plan: RoundPlan) -> Sealing | None:
        """What seals a new update; a secret seals one update and no other."""
        if self.post is None:
            return None
        chunks = range(*plan.chunks) if plan.chunks else range(self._chunk_count)
        bound = round_hash(self.job.name, plan.round, self.manifest_digest)
        route = Route(bound, self.job.name, plan.round, plan.attempt, "up", self.name, chunks)
        return Sealing(route, new_secret())

    def _posted(self, asked: bytes) -> bytes:
        """Keys for what comes back, and the header of what was sealed, for those who merge it."""
        order = PostOrder.from_wire(asked, "driver")
        if self.post is None or order.job != self.job.name:
            raise SecurityError(f"region {self.name!r} has no envelopes for job {order.job!r}")
        pending, letter = self.pending, None
        introduced = (*order.introduced, Member.of(self.post.identity, "region"))
        self._asked[max(order.rounds)] = order.attempt, introduced
        offered = {key.round for key in order.receivers}
        if pending is not None and pending.sealing is not None and pending.report.round in offered:
            letter = self.post.wrap(
                pending.sealing,
                pending.table,
                order.attempt,
                order.receivers,
                "aggregator",
                introduced,
            )
        return self.post.answer(order, letter).to_wire()

    def _openings(self, total: RoundSum) -> tuple[Opening, ...]:
        """What opens a merged update's envelopes.

        Raises:
            SecurityError: it lies in none, in one of another merge, or not all of it does.
        """
        if not total.regions:
            return ()
        planned = self._planned.get(total.round, range(self._chunk_count))
        if total.chunks != planned:
            raise TruncatedError(
                f"round {total.round}: the merged update holds chunks {total.chunks.start} to {total.chunks.stop - 1}, "
                f"expected {planned.start} to {planned.stop - 1} as planned"
            )
        if self.post is None:
            return ()
        attempt, introduced = self._asked.get(total.round, (0, ()))
        if total.attempt != attempt:
            raise ReplayError(
                f"round {total.round}: a merged update of attempt {total.attempt}, expected {attempt}"
            )
        senders = {aggregator_name(share) for share in range(self.job.aggregation_actors)}
        bound = round_hash(self.job.name, total.round, self.manifest_digest)
        openings, at = [], total.chunks.start
        most = largest(room(self.job.coding.build(), self.job.chunk_size))
        for wire in total.letters:
            letter = Letter.from_wire(wire.encode(), "aggregator")
            told = letter.envelope.route
            route = Route(bound, self.job.name, total.round, total.attempt, "down", told.sender, told.chunks)
            if told.chunks.start != at or told.sender not in senders:
                break
            at = told.chunks.stop
            openings.append(self.post.unwrap(letter, route, "aggregator", most, introduced))
        if at != total.chunks.stop or len(openings) != len(total.letters):
            raise TruncatedError(
                f"round {total.round}: the envelopes of the merged update hold chunks {total.chunks.start} to {at - 1}, "
                f"expected to {total.chunks.stop - 1}"
            )
        return tuple(openings)

    # -- secure aggregation ---------------------------------------------------------------

    def _spend(self, plan: RoundPlan) -> Masker:
        """Keys to mask the update of a round with. Who asks for it need not be who has signed the sync: with fewer steps than
        the job's in one region alone, the sums of two attempts would differ by its update."""
        assert self.guard is not None, "asked in masked runs only"
        signed = self.guard.plan(plan.round)
        asked = (plan.job, plan.attempt, plan.chunks or (0, 0), plan.inner_steps, plan.steps)
        usual: dict[str, int] = {}
        planned = (signed.job, signed.attempt, signed.chunks, self.job.inner.steps, usual)
        if asked != planned:
            raise SecurityError(
                f"round {plan.round}: asked for {asked} (job, attempt, chunks, steps), but {planned} is what was signed"
            )
        return self.guard.spend(plan.round)

    def _accept(self, total: RoundSum) -> tuple[bytes, ...]:
        """Let a sum be applied if it is the one that the regions have signed; returns the SHA-256 of its chunks."""
        if self.guard is None:
            return ()
        if not total.regions:
            if total.parts or total.chunk_bytes or not self.job.streaming.overlap:
                raise SecurityError(f"round {total.round}: a sum of no region, where one was to be applied")
            return ()
        return self._as_signed(total, self.guard.accept(total.round, total.proof.encode()))

    def _as_signed(self, total: RoundSum, result: Result) -> tuple[bytes, ...]:
        """Refuse a header that is not of what the regions have signed; returns the SHA-256 of the chunks."""
        assert self.guard is not None, "asked in masked runs only"
        told = (total.summed, tuple(sorted(total.regions)), total.total_share, len(total.chunk_bytes))
        signed = (True, result.names, result.weight / SCALE, len(result.hashes))
        first = self.guard.plan(total.round).chunks[0]
        if (
            told != signed
            or total.chunks.start != first
            or sum(n for _, n in total.parts) != len(result.hashes)
        ):
            raise SecurityError(
                f"round {total.round}: the sum's header is not of what the regions have signed"
            )
        return result.hashes

    def _endorsement(self, total: RoundSum) -> str:
        """A signature on the model that came of a sum which the regions have signed; none where they sign none."""
        if self.guard is None or not total.regions:
            return ""
        return self.guard.endorse(total.round, self.model_digest).hex()

    def secure(self, stage: str, number: int, asked: bytes) -> bytes:
        """Answer one stage of the sync of round `number`; see `secure.guard.Guard`, and `_posted`."""
        if stage == "post":
            return self._posted(asked)
        if self.guard is None:
            raise SecurityError(f"region {self.name!r} was asked for {stage!r}, but its job masks nothing")
        return self.guard.answer(stage, number, asked)

    def confirm(self, total: RoundSum, handles: Sequence[Handle], result: bytes) -> bytes:
        """Look at a sum and sign it."""
        assert self.guard is not None, "asked in masked runs only"
        merged = Bundle(total.parts, total.chunk_bytes, tuple(handles))
        tag = self.guard.masker(total.round).tag
        ranks = self.pools[0]
        # With overlap the ranks are training, and wait on the way for this very sum.
        openings = self._openings(total)
        asked = (ranks.tell if self.job.streaming.overlap else ranks.ask)(
            "check", total, merged, tag, openings
        )
        chunks = [one for part in gather(asked) for one in part]
        return self.guard.confirm(total.round, result, chunks)

    def _check(self, plan: SyncPlan) -> None:
        """Refuse a sync of another model, or of updates that are made in another way."""
        told = {"model": plan.model, "layout": plan.manifest, "update": plan.update, "job": plan.job}
        held = {
            "model": self.model_digest,
            "layout": self.manifest_digest,
            "update": self.job.update_digest,
            "job": self.job.name,
        }
        for key, value in held.items():
            if told[key] != value:
                raise SecurityError(
                    f"plan of round {plan.round}: its {key} is {told[key][:12]}, region {self.name!r} has {value[:12]}"
                )
        names = [region.name for region in self.job.regions]
        secure = self.job.secure_aggregation
        dealt = secure.dealt(names, plan.job, plan.round) if secure is not None else [names]
        if not any(set(plan.cohort) <= set(group) for group in dealt) and secure and secure.groups > 1:
            raise SecurityError(
                f"plan of round {plan.round}: its cohort is none of the groups that were dealt"
            )
        others = sorted(set(plan.cohort) - set(names))
        if others:
            raise SecurityError(
                f"plan of round {plan.round}: its cohort names {others}, no regions of this job"
            )

    def _merge_pools(self, bundles: list[Bundle], tokens: list[int]) -> Bundle:
        """The token-weighted mean of the pools' plain updates, still plain."""
        mean = MeanConfig().build()
        total = sum(tokens)
        weights = [t / total if total else 1 / len(tokens) for t in tokens]
        readers = [PartReader(self.blobs.get, bundle) for bundle in bundles]
        lengths = [size // 4 for size in bundles[0].sizes]
        writer = PartWriter(self.blobs.put, lengths)
        for chunk, length in enumerate(lengths, start=bundles[0].first):
            out = writer.slot(length)
            mean.combine([reader.read(chunk).view(np.float32) for reader in readers], weights, out)
            writer.add(chunk, out.view(np.uint8))
        return writer.finish()

    def apply(self, total: RoundSum, handles: Sequence[Handle], evaluate: bool) -> Applied:
        """Take the outer step from the merged update, now or during the round that `total` names.

        Raises:
            DivergenceError: pools of this region end with different models.
        """
        began = time.perf_counter()
        try:
            sums = self._sums(total, handles)
            opened = self.guard is not None and bool(total.regions)
            key = self.guard.masker(total.round).cipher if self.guard is not None and opened else b""
        except (SecurityError, MessageError) as error:
            raise RegionError(self.name, str(error)) from None
        own, beside = sums[0], sums if total.groups else []
        road = (own.hashes, own.openings, key)
        evaluate = evaluate and self.job.evaluation.sequences > 0
        idle = total.lands_in is None
        asked = [
            pool.ask("apply", total, own.merged, evaluate and index == 0, *road, beside)
            if idle
            else pool.tell("deliver", total, own.merged, evaluate and index == 0, *road)
            for index, pool in enumerate(self.pools)
        ]
        gather([reference for references in asked for reference in references])
        landed: list[list[Landed]] = [gather(references) for references in asked]
        self._agree([rank.digests for ranks in landed for rank in ranks])
        self._merged(total)
        self._reached = self._reached or bool(total.regions)
        self._planned = {n: chunks for n, chunks in self._planned.items() if n > total.round}
        self._asked = {n: asked for n, asked in self._asked.items() if n > total.round}
        if self.post is not None:
            self.post.forget(total.round)
        tokens = sum(rank.eval_tokens for rank in landed[0])
        eval_s = max(rank.eval_s for rank in landed[0])
        show = idle and not self._shown
        self._shown = self._shown or show
        return Applied(
            region=self.name,
            round=total.round,
            model_digest=self.model_digest,
            eval_loss=sum(rank.eval_loss_sum for rank in landed[0]) / tokens if tokens else math.nan,
            eval_tokens=tokens,
            bytes_down=total.bytes_down,
            norm=math.sqrt(sum(rank.norm_squared for rank in landed[0])) if self.job.guards else None,
            endorsement=self._endorsement(total),
            apply_s=time.perf_counter() - began - eval_s,
            eval_s=eval_s,
            pools=self._infos() if show else (),
        )

    def _sums(self, total: RoundSum, handles: Sequence[Handle]) -> list[Beside]:
        """The sum of this region's group first, then those of the others; all of them are what was signed.

        Raises:
            SecurityError, MessageError: one is not, or too few groups have one.
        """
        parts, at = [], 0
        for one in total.groups or (total,):
            own = tuple(handles[at : at + len(one.parts)])
            parts.append((one, Bundle(one.parts, one.chunk_bytes, own)))
            at += len(one.parts)
        mine = [part for part in parts if self.name in part[0].regions] if total.groups else parts
        if len(mine) != 1:
            raise SecurityError(
                f"round {total.round}: the sum of the group of {self.name!r} came {len(mine)} times, expected once"
            )
        others = [part for part in parts if part is not mine[0]]
        hashes: list[tuple[bytes, ...]] = []
        if self.guard is not None and (total.regions or total.groups):
            secure = self.job.secure_aggregation
            assert secure is not None
            least = 1 if secure.groups == 1 else LEAST_GROUPS
            if not least <= len(parts) <= secure.groups:
                raise SecurityError(
                    f"round {total.round}: sums of {len(parts)} groups, expected {least} to {secure.groups}"
                )
            for one, _ in parts:
                told = one.round, one.attempt, one.chunks
                if told != (total.round, total.attempt, total.chunks):
                    raise SecurityError(f"round {total.round}: the sum of a group of another merge: {told}")
            if sorted(total.regions) != sorted(name for one, _ in parts for name in one.regions):
                raise SecurityError(f"round {total.round}: the groups hold other regions than is said")
            results = self.guard.accept_beside(total.round, [one.proof for one, _ in others])
            hashes = [self._as_signed(one, result) for (one, _), result in zip(others, results, strict=True)]
        openings = [self._openings(one) for one, _ in (*mine, *others)]
        hashes.insert(0, self._accept(mine[0][0]))  # last: it can be done once
        return [
            Beside(one, bundle, signed, opening)
            for (one, bundle), signed, opening in zip([*mine, *others], hashes, openings, strict=True)
        ]

    def _merged(self, total: RoundSum) -> None:
        """The update that waited is over, unless it may still count in a later merge."""
        with self._lock:
            if self.pending is None or self.pending.report.round > total.round:
                return
            if self.name in total.regions:
                self.cursor = self.pending.report.cursor
            elif self.job.buffer:
                return
            self.pending = None

    def discard(self) -> None:
        """Give up the local work since the last commit; its data will be read again."""
        gather([reference for pool in self.pools for reference in pool.ask("discard")])
        self.pending = None

    # -- checkpoints ----------------------------------------------------------------------

    def save(self, order: SaveOrder, url: str) -> Saved:
        """Write this region's state of a committed round; the donor also writes the model."""
        references = []
        for index, pool in enumerate(self.pools):
            references += pool.ask("save", url, order.round, order.donor and index == 0, self.vault)
        files = [file for written in gather(references) for file in written]
        return Saved(region=self.name, round=order.round, files=tuple(files))

    def restore(self, order: RestoreOrder, url: str) -> RegionReady:
        """Load a committed round.

        Raises:
            DivergenceError: what was loaded is not the model that was committed.
            CheckpointError: the checkpoint is damaged or does not fit.
            SecurityError: updates are masked, and too few regions have endorsed the model: a driver that could choose what
                regions train from could choose what their updates say.
        """
        try:
            return self._restore(order, url)
        except SecurityError as error:  # this region's failure, and not the run's
            raise RegionError(self.name, str(error)) from None

    def _restore(self, order: RestoreOrder, url: str) -> RegionReady:
        if self.guard is not None:
            self.guard.check_model(self.job.name, order.round, order.model_digest, order.endorsements)
        gather([ref for pool in self.pools for ref in pool.ask("restore", url, order, self.vault)])
        self._agree(gather([reference for pool in self.pools for reference in pool.ask("digests")]))
        if self.model_digest != order.model_digest:
            raise DivergenceError(
                f"region {self.name!r} loaded model {self.model_digest[:12]} from round {order.round}, "
                f"the commit says {order.model_digest[:12]}"
            )
        self.cursor, self._reached = order.cursor, True
        self.pending = None
        return self._ready(evaluate=False)

    # -- facts ----------------------------------------------------------------------------

    def _ready(self, evaluate: bool) -> RegionReady:
        facts = gather([reference for pool in self.pools for reference in pool.ask("describe")])
        data, fingerprint, sequences, manifest, self.terms = facts[0]
        self.manifest_digest, self._chunk_count = manifest.digest, manifest.chunk_count
        if any(other[1] != fingerprint for other in facts):
            raise DataError(
                f"region {self.name!r}: its ranks see different data; expected equal files on its nodes"
            )
        encryption = self._encryption(manifest)
        loss, tokens = self._evaluate() if evaluate else (math.nan, 0)
        return RegionReady(
            region=self.name,
            privacy=self.terms,
            manifest_digest=manifest.digest,
            model_digest=self.model_digest,
            parameters=manifest.size,
            chunks=manifest.chunk_count,
            layout=tuple((chunk.length, chunk.matrices) for chunk in manifest.layout),
            fragments=tuple((chunks.start, chunks.stop) for chunks in manifest.fragments),
            data=data,
            data_fingerprint=fingerprint,
            train_sequences=sequences,
            pools=self._infos(),
            eval_loss=loss,
            eval_tokens=tokens,
            encryption=encryption,
        )

    def _encryption(self, manifest: Manifest) -> Encryption | None:
        """What homomorphic encryption will cost, where updates are encrypted.

        Raises:
            ConfigError: the model is larger than the job allows for it.
        """
        secure = self.job.secure_aggregation
        if secure is None or secure.scheme != "ckks":
            return None
        pace, ranks = measure(), self.settings.pools[0].workers
        plain, sent = 4 * manifest.size, sum(encrypted_bytes(chunk.length) for chunk in manifest.layout)
        cost = Encryption(
            plain_bytes=plain,
            sent_bytes=sent,
            encrypt_mb_per_s=pace.encrypt,
            decrypt_mb_per_s=pace.decrypt,
            seconds=plain / 1e6 / ranks * (1 / pace.encrypt + 1 / pace.decrypt),
        )
        if manifest.size > secure.most_parameters:
            raise ConfigError(
                f"region {self.name!r}: secure_aggregation.scheme ckks is for the updates of adapters: this model of "
                f"{manifest.size:,} parameters would send {sent / 1e6:,.1f} MB for {plain / 1e6:,.1f} MB of fp32 and compute "
                f"for {cost.seconds:,.1f} s in each round; expected at most {secure.most_parameters:,} parameters "
                "(secure_aggregation.most_parameters), or scheme masks"
            )
        return cost

    def _infos(self) -> tuple[tuple[RankInfo, ...], ...]:
        """What every rank holds."""
        return tuple(tuple(gather(pool.ask("info"))) for pool in self.pools)

    def _evaluate(self) -> tuple[float, int]:
        """Mean held-out loss of the current model, on the first pool."""
        if self.job.evaluation.sequences == 0:
            return math.nan, 0
        parts = gather(self.pools[0].ask("evaluate"))
        tokens = sum(count for _, count in parts)
        return sum(loss for loss, _ in parts) / tokens, tokens

    def _agree(self, ranks: Sequence[dict[int, str]]) -> None:
        """Fold the ranks' chunk digests into the model's; pools must hold the same."""
        seen: dict[int, str] = {}
        for digests in ranks:
            for chunk, digest in digests.items():
                if seen.setdefault(chunk, digest) != digest:
                    raise DivergenceError(
                        f"region {self.name!r}: its pools hold different values in chunk {chunk}"
                    )
        whole = model_hasher(self.job.secure_aggregation is not None)
        whole.update("".join(seen[c] for c in sorted(seen)).encode())
        self.model_digest = whole.hexdigest()

    def note_progress(self, pool: int, step: int, tokens: int, loss: float) -> None:
        """A rank says how far it is."""
        with self._lock:
            self._progress[pool] = (step, tokens, loss)

    def progress(self) -> Progress | None:
        """How far the current round is, or None before the first word of it."""
        with self._lock:
            if not self._progress:
                return None
            steps, tokens, losses = zip(*self._progress.values(), strict=True)
            number, began, asked = self._round
        return Progress(
            region=self.name,
            round=number,
            step=min(asked, *steps),
            steps=asked,
            tokens=sum(tokens),
            loss=sum(losses) / len(losses),
            tokens_per_s=sum(tokens) / max(1e-9, time.monotonic() - began),
        )

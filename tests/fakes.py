"""Regions and an aggregator without training, for the driver's logic.

A `FakeRegion` is a `fleet.RegionHandle`: it holds a tiny model as one numpy vector, reads numbered
data, keeps inner optimizer state, and writes and reads real checkpoints through `CheckpointStore`.
Its arithmetic is deterministic, so that two runs can be compared by the digests in their commits.
Every call is answered before it returns, except one that a `late` fault holds back until `World.release`
(a listener calls it when the run has reached some event). So there are no threads and no sleeps.

Faults are scripted by region, stage and round. What the fakes leave out (actors, engines, buffers in
an object store) is what `tests/e2e` runs: the same loop over real actors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from tests.strategies import Array
from xcloud.aggregators import MeanConfig
from xcloud.checkpoint import CheckpointStore, chunk_files
from xcloud.config import JobConfig
from xcloud.errors import DivergenceError, RegionError, XCloudError
from xcloud.manifest import ChunkLayout, Manifest
from xcloud.messages import (
    Applied,
    PoolReport,
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

__all__ = ["AGGREGATOR", "FakeAggregator", "FakeRegion", "Fault", "World"]

AGGREGATOR = "the aggregator"
SHAPES = [("layers.0.weight", (1100,)), ("layers.1.weight", (1400,))]
PARAMETERS = 2500
TOKENS_PER_SEQUENCE = 10

Stage = Literal["start", "run", "merge", "apply", "discard", "save", "restore"]


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        region: whose fault it is, or AGGREGATOR.
        stage: in which call; at `merge`, the region's update turns out to be lost.
        round: in which round; None is every round. A call to `start` has no round, and None only fits.
        kind: `die`: the process is gone. `late`: the answer waits for `World.release`. `diverge`: another
            model than the others' (`apply`, `start`). `fail`: an error that is nobody's failure but the job's.
            `poison` (AGGREGATOR, `merge`): some region has sent what makes the sum large.
        times: how often.
        after: how many matching calls go well first.
    """

    region: str
    stage: Stage
    round: int | None = None
    kind: Literal["die", "late", "diverge", "fail", "poison"] = "die"
    times: int = 1
    after: int = 0


@dataclass
class World:
    """What the fakes of one run share: faults, the object store, and a record of what they did."""

    job: JobConfig
    url: str
    faults: list[Fault] = field(default_factory=list)
    blobs: dict[int, Array] = field(default_factory=dict)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    trained: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(region, round, first sequence, end) of every local training."""
    regions: list[FakeRegion] = field(default_factory=list)
    """Every region process there ever was."""
    builds: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)
    """What regions have no room for while they have not started."""
    restarts: int = 0
    """Of the aggregator."""
    restored: list[tuple[str, int, int | None, int]] = field(default_factory=list)
    """(region, round, round of the inner state, cursor) of every restore."""
    held: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    leaving: set[tuple[str, int]] = field(default_factory=set)
    """(region, round) in which a region's machines are about to go: it takes one step."""
    step_s: dict[str, float] = field(default_factory=dict)
    """Seconds that a region's step takes, where that matters."""

    def build(self, name: str) -> FakeRegion:
        """A region's fresh processes."""
        self.builds[name] += 1
        self.regions.append(FakeRegion(self, name))
        return self.regions[-1]

    def newest(self, name: str) -> FakeRegion:
        """The processes that a region has now."""
        return [region for region in self.regions if region.name == name][-1]

    def fault(self, region: str, stage: str, round: int | None) -> str | None:
        """What goes wrong in this call, if anything."""
        for fault in self.faults:
            if (fault.region, fault.stage) != (region, stage) or fault.round not in (None, round):
                continue
            if fault.after:
                fault.after -= 1
            elif fault.times:
                fault.times -= 1
                return fault.kind
        return None

    def release(self, name: str | None = None) -> None:
        """Let late answers arrive: those of one region, or all."""
        held, self.held = self.held, []
        for region, arrive in held:
            if name in (None, region):
                arrive()
            else:
                self.held.append((region, arrive))

    def put(self, values: Array) -> int:
        handle = len(self.blobs)
        self.blobs[handle] = values.copy()
        return handle


def settled(work: Callable[[], Any]) -> Future[Any]:
    """A future that holds the outcome of `work` already."""
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except XCloudError as error:
        future.set_exception(error)
    return future


class FakeRegion:
    """One region's processes, from their start until they die."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.world = world
        self.job = world.job
        self.settings = world.job.region(name)
        self.manifest = Manifest.of(SHAPES, self.job.chunk_size, self.job.streaming.fragments)
        self.chunks = range(self.manifest.chunk_count)
        self.outer = self.job.outer.build()
        self.alive = True
        self.started = False
        self.late: list[Future[Any]] = []
        self.asked_for_progress = 0
        self.awaits: tuple[int, Future[Any], Callable[[], Any]] | None = None
        """A round under way that waits for an earlier one's merged update, its answer, and how it goes on."""
        self.landing: Callable[[], None] | None = None

    # -- life -----------------------------------------------------------------------------

    def _call(self, stage: Stage, round: int | None, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` with whatever the script has for it."""
        self.world.calls[self.name, stage] += 1
        assert stage == "start" or self.started or not self.alive, f"{stage} before start"
        assert not self.late, f"{self.name} is busy and was asked to {stage}"
        assert not self.awaits, f"{self.name} waits for a merged update and was asked to {stage}"
        kind = self.world.fault(self.name, stage, round)
        if kind == "late":
            return self._hold(work)
        if kind == "die":
            self._die()
        if kind == "fail":
            return settled(lambda: self._raise(XCloudError(f"{self.name}: the disk is full")))
        if not self.alive:
            return settled(lambda: self._raise(RegionError(self.name, "its process is gone")))
        if kind == "diverge":
            assert stage in ("start", "apply")
            return settled(lambda: work().model_copy(update={"model_digest": "another model"}))
        return settled(work)

    def _hold(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.late.append(future)

        def arrive() -> None:
            if future.done():
                return  # it died meanwhile
            self.late.remove(future)
            outcome = settled(work)
            if outcome.exception() is None:
                future.set_result(outcome.result())
            else:
                future.set_exception(outcome.exception())

        self.world.held.append((self.name, arrive))
        return future

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def _die(self) -> None:
        self.alive = False
        for future in self.late:
            future.set_exception(RegionError(self.name, "its process is gone"))
        self.late = []
        if self.awaits:
            self.awaits[1].set_exception(RegionError(self.name, "its process is gone"))
        self.awaits = None

    def crash(self) -> None:
        """Die by itself, at any time."""
        self._die()

    def kill(self) -> None:
        self.world.kills[self.name] += 1
        self._die()

    def progress(self) -> Future[Progress | None]:
        self.asked_for_progress += 1
        return settled(lambda: None)

    def waiting(self) -> Future[str | None]:
        return settled(lambda: None if self.started else self.world.missing.get(self.name))

    def start(self, evaluate: bool) -> Future[RegionReady]:
        return self._call("start", None, lambda: self._start(evaluate))

    def _start(self, evaluate: bool) -> RegionReady:
        self.started = True
        numbers = np.random.default_rng(self.job.seed)
        self.anchor = numbers.standard_normal(self.manifest.size).astype(np.float32)
        self.state = {slot: np.zeros_like(self.anchor) for slot in self.outer.slots}
        self.local = self.anchor.copy()
        self.inner = np.zeros_like(self.anchor)
        self.inner_steps = 0
        self.cursor = 0
        self.pending: tuple[RegionReport, list[int]] | None = None
        return self._ready(evaluate)

    def _ready(self, evaluate: bool) -> RegionReady:
        loss, tokens = self._evaluate() if evaluate else (math.nan, 0)
        info = RankInfo(
            rank=0, node="n", device="cpu", parameter_bytes=1, optimizer_state_bytes=1, owned_chunks=3
        )
        return RegionReady(
            region=self.name,
            manifest_digest=self.manifest.digest,
            model_digest=self.digest,
            parameters=self.manifest.size,
            chunks=self.manifest.chunk_count,
            data="numbers",
            train_sequences=1000,
            data_fingerprint=f"data of {self.name}",
            privacy=self.job.dp.terms(self.name, 1000, self.settings.sequences_per_step, self.job.inner.steps)
            if self.job.dp
            else None,
            pools=((info,),),
            eval_loss=loss,
            eval_tokens=tokens,
            layout=tuple((chunk.length, chunk.matrices) for chunk in self.manifest.layout),
            fragments=tuple((chunks.start, chunks.stop) for chunks in self.manifest.fragments),
        )

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.anchor)

    # -- one round ------------------------------------------------------------------------

    def run(self, plan: RoundPlan) -> Future[tuple[RegionReport, list[Any]]]:
        if plan.landing is None:
            return self._call("run", plan.round, lambda: self._run(plan))
        answer = self._call("run", plan.round, lambda: None)
        if answer.done() and answer.exception() is None:
            answer = Future()
            self.awaits = plan.landing, answer, lambda: self._run(plan)
        return answer

    def _run(self, plan: RoundPlan) -> tuple[RegionReport, list[int]]:
        assert plan.manifest_digest == self.manifest.digest
        if plan.model_digest != self.digest:
            raise DivergenceError(f"{self.name} holds {self.digest}, not {plan.model_digest}")
        if self.pending is None or (self.pending[0].round != plan.round and not self.job.buffer):
            self.pending = self._train(plan)
            if self.job.streaming.keeps_local or self.job.buffer:
                self.cursor = self.pending[0].cursor
        report, handles = self.pending
        self.pending = report.model_copy(update={"attempt": plan.attempt}), handles
        return self.pending

    def _train(self, plan: RoundPlan) -> tuple[RegionReport, list[int]]:
        leaving = (self.name, plan.round) in self.world.leaving
        steps = 1 if leaving else plan.steps_of(self.name)
        end = self.cursor + steps * self.settings.sequences_per_step
        self.world.trained.append((self.name, plan.round, self.cursor, end))
        if not self.job.streaming.keeps_local:
            self.local = self.anchor.copy()
        local, loss, step = self.local, math.nan, self.settings.sequences_per_step
        for number, sequence in enumerate(range(self.cursor, end)):
            if self.landing and number == self.job.streaming.overlap * step:
                self.landing()
            gradient = local - self._target(sequence)
            loss = float(np.mean(gradient * gradient))
            self.inner = np.float32(0.5) * self.inner + gradient
            self.inner_steps += 1
            local -= np.float32(0.1) * self.inner
        update = self.anchor - local
        chunks = range(*plan.chunks) if plan.chunks else self.chunks
        parts = self._by_chunk(update)
        tokens = (end - self.cursor) * TOKENS_PER_SEQUENCE
        compute_s = steps * self.world.step_s[self.name] if self.name in self.world.step_s else 0.25
        report = RegionReport(
            region=self.name,
            round=plan.round,
            attempt=plan.attempt,
            tokens=tokens,
            train_loss=loss,
            update_norm=float(np.linalg.norm(update)),
            cursor=end,
            chunk_bytes=tuple(parts[c].nbytes for c in chunks),
            parts=tuple((c, 1) for c in chunks),
            compute_s=compute_s,
            encode_s=0.0,
            leaving=leaving,
            pools=(PoolReport(pool=0, tokens=tokens, loss_sum=0.0, steps=1, compute_s=compute_s),),
        )
        return report, [self.world.put(parts[c]) for c in chunks]

    def _target(self, sequence: int) -> Array:
        """What one sequence of this region's own data says the model should be."""
        numbers = np.random.default_rng([sequence, *self.name.encode()])
        return numbers.standard_normal(self.manifest.size).astype(np.float32)

    def _evaluate(self) -> tuple[float, int]:
        if self.job.evaluation.sequences == 0:
            return math.nan, 0
        return float(np.mean(self.anchor * self.anchor)), self.job.evaluation.sequences

    def apply(self, total: RoundSum, handles: Sequence[Any], evaluate: bool) -> Future[Applied]:
        if total.lands_in is None:
            return self._call("apply", total.round, lambda: self._apply(total, handles, evaluate))
        if self.awaits is None:
            return self._call("apply", total.round, lambda: None)
        round, answer, go_on = self.awaits
        assert round == total.round
        self.awaits = None
        applied: Future[Applied] = Future()

        def land() -> None:
            applied.set_result(self._apply(total, handles, evaluate))
            self.landing = None

        def work() -> Any:
            self.landing = land
            return go_on()

        trained = self._call("apply", total.round, work)
        if trained.done() and trained.exception() is not None:
            applied.set_exception(trained.exception())
            answer.set_exception(trained.exception())
        else:
            answer.set_result(trained.result())
        return applied

    def _apply(self, total: RoundSum, handles: Sequence[int], evaluate: bool) -> Applied:
        norm = None
        if total.regions:
            merged = np.concatenate([self.world.blobs[handle] for handle in handles])
            starts, mix = self.manifest.chunk_starts, np.float32(self.job.streaming.mix)
            norm = float(np.linalg.norm(merged)) if self.job.guards else None
            at = slice(starts[total.chunks.start], starts[total.chunks.stop])
            sync = (total.round - 1) // self.job.streaming.fragments + 1
            self.outer.step(self.anchor[at], merged, {slot: v[at] for slot, v in self.state.items()}, sync)
            self.local[at] = mix * self.local[at] + (1 - mix) * self.anchor[at]
        if self.pending is not None and self.pending[0].round <= total.round:
            if self.name in total.regions:
                self.cursor = self.pending[0].cursor
                self.pending = None
            elif not self.job.buffer:
                self.pending = None
        loss, tokens = self._evaluate() if evaluate else (math.nan, 0)
        return Applied(
            region=self.name,
            round=total.round,
            model_digest=self.digest,
            eval_loss=loss,
            eval_tokens=tokens,
            bytes_down=total.bytes_down,
            norm=norm,
            apply_s=0.0,
            eval_s=0.0,
        )

    def discard(self) -> Future[None]:
        return self._call("discard", None, self._discard)

    def _discard(self) -> None:
        self.pending = None

    # -- checkpoints ----------------------------------------------------------------------

    def _by_chunk(self, values: Array) -> dict[int, Array]:
        starts = self.manifest.chunk_starts
        return {c: values[starts[c] : starts[c + 1]] for c in self.chunks}

    def save(self, order: SaveOrder) -> Future[Saved]:
        return self._call("save", order.round, lambda: self._save(order))

    def _save(self, order: SaveOrder) -> Saved:
        store, files = CheckpointStore(self.world.url), []
        if order.donor:
            model = {name: self._by_chunk(v) for name, v in {"anchor": self.anchor, **self.state}.items()}
            files += store.write_tensors(order.round, "model/", self.chunks, model, {})
        inner, scalars = {"inner": self._by_chunk(self.inner)}, {"steps": self.inner_steps}
        if self.job.streaming.keeps_local:
            inner["local"] = self._by_chunk(self.local)
        files += store.write_tensors(order.round, self._prefix, self.chunks, inner, scalars)
        return Saved(region=self.name, round=order.round, files=tuple(files))

    @property
    def _prefix(self) -> str:
        return f"regions/{self.name}/pool-0-"

    def restore(self, order: RestoreOrder) -> Future[RegionReady]:
        return self._call("restore", order.round, lambda: self._restore(order))

    def _restore(self, order: RestoreOrder) -> RegionReady:
        store = CheckpointStore(self.world.url)
        model, _ = store.read_tensors(order.round, chunk_files(order.files, "model/"), self.chunks)
        flats = {name: np.concatenate([parts[c] for c in self.chunks]) for name, parts in model.items()}
        self.anchor = flats.pop("anchor")
        assert set(flats) == set(self.outer.slots)
        self.state = flats
        files = chunk_files(order.files, self._prefix)
        assert bool(files) == (order.inner_round is not None)
        inner, scalars = store.read_tensors(order.round, files, self.chunks)
        self.inner = np.zeros_like(self.anchor)
        if inner:
            self.inner = np.concatenate([inner["inner"][c] for c in self.chunks])
        self.local = self.anchor.copy()
        if self.job.streaming.keeps_local and order.inner_round == order.round:
            self.local = np.concatenate([inner["local"][c] for c in self.chunks])
        self.inner_steps = scalars.get("steps", 0)
        if self.digest != order.model_digest:
            raise DivergenceError(f"{self.name} loaded {self.digest}, the commit says {order.model_digest}")
        self.cursor, self.pending = order.cursor, None
        self.world.restored.append((self.name, order.round, order.inner_round, order.cursor))
        return self._ready(evaluate=False)


class FakeAggregator:
    """An aggregator over the world's blobs, with the real mean."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True

    def open(self, plan: RoundPlan, fleet: Any) -> str | None:
        del plan, fleet
        return None

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Any]],
    ) -> Future[tuple[RoundSum, list[Any]]]:
        return settled(lambda: self._merge(plan, layout, reports, updates))

    def _merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[int]],
    ) -> tuple[RoundSum, list[int]]:
        fault = self.world.fault(AGGREGATOR, "merge", plan.round)
        if fault == "die":
            self.alive = False
        if not self.alive:
            raise RegionError(AGGREGATOR, "its process is gone")
        chunks = range(*plan.chunks) if plan.chunks else range(len(layout))
        for report in reports:
            late = self.world.job.streaming.overlap or self.world.job.buffer
            assert late or (report.round, report.attempt) == (plan.round, plan.attempt)
            assert report.chunk_bytes == tuple(4 * layout[chunk].length for chunk in chunks)
            if self.world.fault(report.region, "merge", plan.round) == "die":
                raise RegionError(report.region, "chunk 1 of its update is lost (OwnerDiedError)")
        order = [region.name for region in self.world.job.regions]
        assert [r.region for r in reports] == [n for n in order if n in {r.region for r in reports}]
        mean, merged = MeanConfig().build(), []
        weights = mean.weights(reports)
        if self.world.job.buffer:
            weights = [
                w * self.world.job.buffer.factor(r.staleness) for w, r in zip(weights, reports, strict=True)
            ]
        for place, chunk in enumerate(chunks):
            out = np.empty(layout[chunk].length, np.float32)
            mean.combine([self.world.blobs[handles[place]] for handles in updates], weights, out)
            if fault == "poison":
                out += np.float32(100)
            merged.append(self.world.put(out))
        total = RoundSum(
            round=plan.round,
            attempt=plan.attempt,
            regions=tuple(report.region for report in reports),
            weights=tuple(weights),
            chunk_bytes=tuple(4 * layout[chunk].length for chunk in chunks),
            parts=tuple((chunk, 1) for chunk in chunks),
            norm=1.0,
            fold_s=0.0,
        )
        return total, merged

    def restart(self) -> None:
        self.world.restarts += 1
        self.alive = True

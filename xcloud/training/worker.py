"""The worker behind one rank: a live engine, its share of the anchor, and the update path.

A round, seen from here:

1. `train`: H inner steps on this rank's share of the region's data.
2. `offer`: for its own chunks, delta = anchor - local, checked, encoded (`xcloud.update`) and stored;
   in a region of several pools plain first, then the pools' mean encoded by the first pool's ranks (`encode`).
3. `apply`: the outer step on its own anchor chunks from the merged update; then every
   rank of the pool loads the new anchor into its engine. Digests of the chunks show that
   all regions hold the same model.

The anchor (the last committed model) and the outer state live in host memory, each rank
holding only the chunks it owns. The worker is plain Python: `region` wraps it in an actor.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash

from xcloud.checkpoint import CheckpointStore, chunk_files
from xcloud.data import Order, PackedSplit, PackedStore, SourceConfig, prepare_store
from xcloud.errors import CheckpointError, NonFiniteUpdateError
from xcloud.manifest import Manifest
from xcloud.messages import CheckpointFile, RankInfo, RestoreOrder, RoundPlan, RoundSum
from xcloud.parts import BlobStore, Bundle, PartReader, PartWriter
from xcloud.training.correction import COMMON, OWN, Correction
from xcloud.training.engine import build_engine, device_of, join_process_group, optimizer_state_bytes
from xcloud.training.models import build_model, trainable
from xcloud.training.muon import Muon
from xcloud.training.parameters import open_parameters
from xcloud.training.spec import Offer, Trained, WorkerSpec
from xcloud.update import Framing, UpdatePath

__all__ = ["RankWorker"]

Array = npt.NDArray[np.float32]

BLOCK = 1 << 16
PROGRESS_EVERY_S = 1.0


class RankWorker:
    """One rank of one pool of one region."""

    def __init__(
        self,
        spec: WorkerSpec,
        blobs: BlobStore,
        progress: Callable[[int, int, int, float], None] | None = None,
        node: str | None = None,
    ) -> None:
        self.spec = spec
        self.blobs = blobs
        self.progress = progress
        self.node = node or socket.gethostname()

    def start(self, address: str, port: int) -> RankInfo:
        """Join the pool's process group, pack the data, build model and engine, load the anchor."""
        spec = self.spec
        join_process_group(address, port, spec.rank, spec.world, spec.on_gpu, spec.threads)
        self.device = device_of(spec.on_gpu)
        tokenizer = spec.tokenizer.build()
        self._open_data(tokenizer)
        model = build_model(spec.model, tokenizer.vocab_size, spec.seed)
        named = trainable(model)
        self.manifest = Manifest.of(((n, tuple(p.shape)) for n, p in named.items()), spec.chunk_size)
        self.owned = self.manifest.owned(spec.rank, spec.world)
        typical = (
            0.5 * spec.inner.optimizer.lr * max(1, spec.inner.steps) ** 0.5
        )  # Adam's steps are about lr long
        framing = Framing(spec.job, spec.seed, spec.members, spec.region, typical)
        codecs = spec.codec.build(), spec.downlink.build()
        self.path = UpdatePath(*codecs, framing, self.manifest.layout, self.owned)
        self.writer = PartWriter(self.blobs.put, [self.manifest.chunk_length(c) for c in self.owned])
        self.outer = spec.outer.build()
        self.anchor = self._empty_owned()
        self._gather(lambda name: named[name].data.reshape(-1), self.anchor)
        self.outer_state = {slot: np.zeros_like(self.anchor) for slot in self.outer.slots}
        self.engine = build_engine(model, spec.engine, spec.inner, spec.world)
        self.parameters = open_parameters(self.engine, spec.engine.zero_stage)
        if isinstance(self.engine.basic_optimizer, Muon):
            self.engine.basic_optimizer.bind(self.parameters)
        self.correction: Correction | None = None
        if spec.inner.correction is not None:
            self.correction = spec.inner.correction.build(self.parameters)
        self._spread(self.anchor, self.parameters.write)
        return self.info()

    def info(self) -> RankInfo:
        """What this rank holds now."""
        held = sum(flat.numel() * flat.element_size() for flat in self.parameters.flats())
        return RankInfo(
            rank=self.spec.rank,
            node=self.node,
            device=str(self.device),
            parameter_bytes=held,
            optimizer_state_bytes=optimizer_state_bytes(self.engine.basic_optimizer),
            owned_chunks=len(self.owned),
        )

    def describe(self) -> tuple[str, str, int, Manifest]:
        """Data in words and its fingerprint, training sequences, manifest."""
        return self.store.describe(), self.store.fingerprint, len(self.store.train), self.manifest

    def work(self, plan: RoundPlan, start: int, share: float | None) -> tuple[Trained, Offer]:
        """A whole local round: `train`, then `offer`."""
        return self.train(plan, start), self.offer(plan, share)

    def train(self, plan: RoundPlan, start: int) -> Trained:
        """Run the round's inner steps.

        Args:
            plan: of the round.
            start: absolute position in the region's data order of this pool's first sequence.
        """
        spec, engine = self.spec, self.engine
        micro, accumulation = spec.engine.micro_batch, spec.engine.gradient_accumulation
        stride = micro * spec.world
        losses = torch.zeros((), dtype=torch.float32, device=self.device)
        began = told = time.perf_counter()
        engine.train()
        if self.correction is not None:
            self.correction.begin()
        generator = torch.cuda.default_generators[0] if spec.on_gpu else torch.default_generator
        for step in range(plan.inner_steps):
            overall = (plan.round - 1) * spec.inner.steps + step
            self._set_learning_rate(overall)
            generator.manual_seed(_mix(spec.seed, spec.region, spec.pool, spec.rank, overall))  # dropout
            for part in range(accumulation):
                at = start + (step * accumulation + part) * stride + spec.rank * micro
                batch = self._batch(self.store.train, self.order.indices(at, micro))
                loss = engine(input_ids=batch, labels=batch).loss
                engine.backward(loss)
                engine.step()
                losses += loss.detach()
            now = time.perf_counter()
            if self.progress is not None and spec.rank == 0 and now - told >= PROGRESS_EVERY_S:
                told = now
                done = (step + 1) * accumulation
                tokens = done * stride * spec.sequence_length
                self.progress(spec.pool, step + 1, tokens, float(losses) / done)
        passes = plan.inner_steps * accumulation
        return Trained(
            loss_sum=float(losses),
            steps=passes,
            tokens=passes * micro * spec.sequence_length,
            seconds=time.perf_counter() - began,
        )

    def offer(self, plan: RoundPlan, share: float | None) -> Offer:
        """This rank's own chunks of anchor - local.

        Args:
            plan: of the round.
            share: of the weight, for `UpdatePath.encode`; None leaves the update in fp32, for merging pools
                inside the region.

        Raises:
            NonFiniteUpdateError: names the parameter that holds NaN or Inf.
        """
        began = time.perf_counter()
        norm_squared = 0.0
        delta = self.anchor[:0]
        for index, spec in enumerate(self.manifest.parameters):
            local = _to_numpy(self.parameters.read(spec.name))
            for seg in self.manifest.segments[index]:
                if seg.chunk not in self.owned:
                    continue
                if seg.chunk_start == 0:
                    delta = self.writer.slot(self.manifest.chunk_length(seg.chunk))
                anchor = self._chunk(self.anchor, seg.chunk)
                for start, stop in _blocks(seg.length):
                    at = slice(seg.chunk_start + start, seg.chunk_start + stop)
                    values = delta[at]
                    np.subtract(
                        anchor[at],
                        local[seg.parameter_start + start : seg.parameter_start + stop],
                        out=values,
                    )
                    norm_squared += self._checked_norm_squared(values, spec.name)
                if seg.chunk_start + seg.length == delta.size:
                    self.writer.add(
                        seg.chunk,
                        delta.view(np.uint8)
                        if share is None
                        else self.path.encode(plan.round, seg.chunk, delta, share),
                    )
        return Offer(self.writer.finish(), norm_squared, time.perf_counter() - began)

    def encode(self, plan: RoundPlan, merged: Bundle, share: float) -> Offer:
        """Encode this rank's own chunks of the mean of the region's pools (fp32)."""
        began, norm_squared, reader = time.perf_counter(), 0.0, PartReader(self.blobs.get, merged)
        for chunk in self.owned:
            delta = self.writer.slot(self.manifest.chunk_length(chunk))
            delta[:] = reader.read(chunk).view(np.float32)
            norm_squared += float(np.dot(delta, delta))
            self.writer.add(chunk, self.path.encode(plan.round, chunk, delta, share))
        return Offer(self.writer.finish(), norm_squared, time.perf_counter() - began)

    def apply(self, total: RoundSum, merged: Bundle) -> dict[int, str]:
        """The outer step on this rank's chunks, then the new anchor into every engine of the pool.

        Args:
            total: header of the merged update.
            merged: all its chunks; those of other ranks are not fetched.

        Returns:
            Digest of each owned anchor chunk.
        """
        reader = PartReader(self.blobs.get, merged)
        digests: dict[int, str] = {}
        alone, hasher = self.spec.world == 1, xxhash.xxh3_128()
        gradient = self.anchor[:0]
        total_lr, control = self._total_lr(total.round), self._new_control()
        if self.correction is not None and self.spec.region in total.regions:
            self.correction.settle(total_lr)
        for index, spec in enumerate(self.manifest.parameters):  # elementwise, so any cut gives the same bits
            for seg in self.manifest.segments[index]:
                if seg.chunk not in self.owned:
                    continue
                anchor = self._chunk(self.anchor, seg.chunk)
                if seg.chunk_start == 0:
                    gradient = self.path.decode(seg.chunk, reader.read(seg.chunk), total)
                    if control is not None:
                        np.divide(gradient, np.float32(total_lr), out=self._chunk(control, seg.chunk))
                slots = {slot: self._chunk(values, seg.chunk) for slot, values in self.outer_state.items()}
                for start, stop in _blocks(seg.length):
                    at = slice(seg.chunk_start + start, seg.chunk_start + stop)
                    self.outer.step(
                        anchor[at],
                        gradient[at],
                        {slot: values[at] for slot, values in slots.items()},
                        total.round,
                    )
                    hasher.update(anchor[at])
                if seg.chunk_start + seg.length == anchor.size:
                    digests[seg.chunk] = hasher.hexdigest()
                    hasher.reset()
            if alone:  # while the parameter is still in cache
                own = self.anchor[spec.offset : spec.offset + spec.size]
                self.parameters.write(spec.name, torch.from_numpy(own))
        if not alone:
            self._spread(self.anchor, self.parameters.write)
        if control is not None:
            self._spread(control, partial(self.parameters.write, key=COMMON))
        self.path.settle(self.spec.region in total.regions)
        return digests

    def digests(self) -> dict[int, str]:
        """Digest of each owned anchor chunk (xxh3-128 over its fp32 bytes)."""
        return {c: xxhash.xxh3_128_hexdigest(self._chunk(self.anchor, c)) for c in self.owned}

    def discard(self) -> None:
        """Give up local training since the last commit: back to the anchor."""
        self._spread(self.anchor, self.parameters.write)

    def evaluate(self) -> tuple[float, int]:
        """Sum of token losses and number of predicted tokens over this rank's share of held-out text."""
        spec = self.spec
        ids = [(split, i) for split, indices in self.held_out for i in indices]
        share = -(-len(ids) // spec.world)  # equal on all ranks, since ZeRO-3 forwards together
        mine = ids[spec.rank * share : (spec.rank + 1) * share]
        total, tokens = 0.0, 0
        self.engine.eval()
        with torch.no_grad():
            for start in range(0, share, spec.engine.micro_batch):
                part = mine[start : start + spec.engine.micro_batch]
                rows = part or ids[:1]  # a rank without rows still takes part in the forward pass
                batch = torch.from_numpy(np.concatenate([s.read(np.array([i])) for s, i in rows])).to(
                    self.device
                )
                loss = self.engine(input_ids=batch, labels=batch).loss
                if part:
                    count = batch.shape[0] * (spec.sequence_length - 1)
                    total += float(loss) * count
                    tokens += count
        return total, tokens

    def save(self, url: str, round: int, donor: bool) -> list[CheckpointFile]:
        """Write this rank's chunks: inner optimizer state, and the model too if `donor`."""
        store = CheckpointStore(url)
        written: list[CheckpointFile] = []
        controls = self.correction is not None and self.correction.controls
        if donor:
            model = self._by_chunk({"anchor": self.anchor, **self.outer_state})
            if controls:
                model |= self._by_chunk({COMMON: self._kept(COMMON)})
            if self.path.scales:
                model["scale"] = self.path.scales
            written += store.write_tensors(round, "model/", self.owned, model, {})
        keys, scalars = self._inner_layout()
        scalars["loss_scale"] = self._loss_scale()
        tensors = self._by_chunk({key: self._kept(key) for key in ([*keys, OWN] if controls else keys)})
        if self.path.residual:
            tensors["residual"] = self.path.residual
        if tensors or scalars["loss_scale"]:
            written += store.write_tensors(round, self._inner_prefix(), self.owned, tensors, scalars)
        return written

    def restore(self, url: str, order: RestoreOrder) -> None:
        """Load a committed round: anchor, outer state and, if it was saved, inner state.

        Raises:
            CheckpointError: the checkpoint does not hold what this job needs.
        """
        store = CheckpointStore(url)
        model, _ = store.read_tensors(order.round, chunk_files(order.files, "model/"), self.owned)
        self.path.scales, common = model.pop("scale", {}), model.pop(COMMON, {})
        if self.owned and set(model) != {"anchor", *self.outer_state}:
            raise CheckpointError(
                f"{store.folder(order.round)}: holds outer state {sorted(set(model) - {'anchor'})}, "
                f"this job's outer optimizer keeps {sorted(self.outer_state)}"
            )
        for name, values in {"anchor": self.anchor, **self.outer_state}.items():
            self._fill(values, model.get(name, {}))
        self._spread(self.anchor, self.parameters.write)
        files = chunk_files(order.files, self._inner_prefix())
        inner, scalars = store.read_tensors(order.round, files, self.owned)
        self.path.restore(inner.pop("residual", {}))
        own = inner.pop(OWN, {})
        if self.correction is not None and self.correction.controls:
            self._keep(COMMON, common)
            self._keep(OWN, own)
        names = sorted(inner)
        if self.spec.world > 1:  # a rank that owns no chunk learns the layout from the others
            layouts: list[Any] = [None] * self.spec.world
            dist.all_gather_object(layouts, (names, scalars))
            names, scalars = max(layouts, key=lambda layout: (len(layout[0]), len(layout[1])))
        self._reset_inner(names, scalars)
        for name in names:
            self._keep(name, inner.get(name, {}))

    # -- chunks and parameters ------------------------------------------------------------

    def _empty_owned(self) -> Array:
        return np.zeros(sum(self.manifest.chunk_length(c) for c in self.owned), np.float32)

    def _chunk(self, owned: Array, chunk: int) -> Array:
        """View of one chunk in a vector over the owned chunks."""
        start = (chunk - self.owned.start) * self.manifest.chunk_size
        return owned[start : start + self.manifest.chunk_length(chunk)]

    def _by_chunk(self, flats: dict[str, Array]) -> dict[str, dict[int, Array]]:
        return {name: {c: self._chunk(flat, c) for c in self.owned} for name, flat in flats.items()}

    def _fill(self, owned: Array, parts: dict[int, Array]) -> None:
        for chunk, values in parts.items():
            self._chunk(owned, chunk)[:] = values

    def _kept(self, key: str) -> Array:
        """The owned chunks of values kept beside the masters; collective."""
        owned = self._empty_owned()
        self._gather(partial(self.parameters.read, key=key), owned)
        return owned

    def _keep(self, key: str, parts: dict[int, Array]) -> None:
        """Set values kept beside the masters; a chunk that is not there is zero; collective."""
        owned = self._empty_owned()
        self._fill(owned, parts)
        self._spread(owned, partial(self.parameters.write, key=key))

    def _new_control(self) -> Array | None:
        """Room for the round's common control variate, where there is one."""
        return self._empty_owned() if self.correction is not None and self.correction.controls else None

    def _gather(self, read: Callable[[str], torch.Tensor], owned: Array) -> None:
        """Copy the owned chunks out of full parameters, one parameter at a time."""
        for index, spec in enumerate(self.manifest.parameters):
            full = _to_numpy(read(spec.name))
            for seg in self.manifest.segments[index]:
                if seg.chunk in self.owned:
                    target = self._chunk(owned, seg.chunk)[seg.chunk_start : seg.chunk_start + seg.length]
                    target[:] = full[seg.parameter_start : seg.parameter_start + seg.length]

    def _spread(self, owned: Array, write: Callable[[str, torch.Tensor], None]) -> None:
        """Hand every full parameter to `write`, its parts broadcast by the ranks that own them."""
        world = self.spec.world
        if world == 1:
            flat = torch.from_numpy(owned)
            for spec in self.manifest.parameters:
                write(spec.name, flat[spec.offset : spec.offset + spec.size])
            return
        owners = np.zeros(self.manifest.chunk_count, np.int64)
        for rank in range(world):
            owned_by = self.manifest.owned(rank, world)
            owners[owned_by.start : owned_by.stop] = rank
        for index, spec in enumerate(self.manifest.parameters):
            full = torch.empty(spec.size, dtype=torch.float32, device=self.device)
            segments = self.manifest.segments[index]
            for seg in segments:
                if owners[seg.chunk] == self.spec.rank:
                    own = self._chunk(owned, seg.chunk)[seg.chunk_start : seg.chunk_start + seg.length]
                    full[seg.parameter_start : seg.parameter_start + seg.length] = torch.from_numpy(own)
            for rank in sorted({int(owners[seg.chunk]) for seg in segments}):
                parts = [seg for seg in segments if owners[seg.chunk] == rank]
                start, stop = parts[0].parameter_start, parts[-1].parameter_start + parts[-1].length
                dist.broadcast(full[start:stop], src=rank)
            write(spec.name, full)

    def _checked_norm_squared(self, values: Array, name: str) -> float:
        """Squared norm of a piece of the update; refuses NaN and Inf by the parameter's name."""
        norm_squared = float(np.dot(values, values))
        if np.isfinite(norm_squared):
            return norm_squared
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise NonFiniteUpdateError(
                self.spec.region, f"the update of parameter {name!r} holds {values[bad[0]]}; it was not sent"
            )
        return float(np.dot(values.astype(np.float64), values.astype(np.float64)))

    # -- inner optimizer ------------------------------------------------------------------

    def _factor(self, step: int) -> float:
        inner = self.spec.inner
        return inner.schedule.factor(step, self.spec.rounds * inner.steps)

    def _set_learning_rate(self, step: int) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self._factor(step)

    def _total_lr(self, round: int) -> float:
        """The sum of the learning rates of a round's steps."""
        inner = self.spec.inner
        steps = range((round - 1) * inner.steps, round * inner.steps)
        return inner.optimizer.lr * sum(self._factor(step) for step in steps)

    def _inner_prefix(self) -> str:
        return f"regions/{self.spec.region}/pool-{self.spec.pool}-"

    def _inner_layout(self) -> tuple[list[str], dict[str, Any]]:
        """Names of the per-element states, and the values of the scalar ones."""
        keys: set[str] = set()
        scalars: dict[str, Any] = {}
        for flat in self.parameters.flats():  # an optimizer may keep less for some
            for key, value in self.engine.basic_optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    keys.add(key)
                elif value is not None:
                    scalars[key] = float(value)
        return sorted(keys), scalars

    def _reset_inner(self, keys: Sequence[str], scalars: dict[str, Any]) -> None:
        """Fresh state of the named keys; empty `keys` means never stepped."""
        optimizer = self.engine.basic_optimizer
        optimizer.state.clear()
        steps = {k: v for k, v in scalars.items() if k != "loss_scale"}
        for flat in self.parameters.flats() if keys else ():
            optimizer.state[flat] = {k: torch.zeros_like(flat.data, dtype=torch.float32) for k in keys}
            optimizer.state[flat].update({k: torch.tensor(v, dtype=torch.float32) for k, v in steps.items()})
        if scalars.get("loss_scale"):
            vars(self._loss_scaler()).update(scalars["loss_scale"])

    def _loss_scaler(self) -> Any:
        wrapper = self.engine.optimizer
        return getattr(wrapper, "loss_scaler", None) or wrapper.loss_scale_config

    def _loss_scale(self) -> dict[str, Any] | None:
        """The dynamic loss scaler's counters (fp16 only)."""
        if self.spec.engine.precision != "fp16":
            return None
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        values = vars(self._loss_scaler())
        return {n: json.loads(json.dumps(float(values[n]))) for n in names if n in values}

    # -- data -----------------------------------------------------------------------------

    def _open_data(self, tokenizer: Any) -> None:
        spec = self.spec

        def packed(sources: Sequence[SourceConfig]) -> PackedStore:
            return prepare_store(
                [source.build() for source in sources],
                tokenizer,
                sequence_length=spec.sequence_length,
                held_out_fraction=spec.held_out_fraction,
                cache_dir=Path(spec.cache_dir),
            )

        self.store = packed(spec.data)
        self.order = Order(len(self.store.train), _mix(spec.seed, spec.region))
        splits = [self.store.held_out]
        if spec.evaluate_on is not None:
            splits = [packed([source]).held_out for source in spec.evaluate_on]
        each = -(-spec.eval_sequences // len(splits))
        self.held_out = [
            (
                split,
                np.unique(np.linspace(0, len(split) - 1, min(each, len(split))).astype(np.int64)).tolist(),
            )
            for split in splits
        ]

    def _batch(self, split: PackedSplit, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(split.read(indices)).to(self.device)


def _to_numpy(tensor: torch.Tensor) -> Array:
    values: Array = tensor.detach().to("cpu", torch.float32).numpy()
    return values


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Cuts of a run of elements that stay in cache through several passes."""
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def _mix(*parts: object) -> int:
    """A 31-bit seed from anything with a stable repr."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) & 0x7FFFFFFF

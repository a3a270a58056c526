"""The worker behind one rank: a live engine, its share of the anchor, and the update path.

A round, seen from here:

1. `train`: H inner steps on this rank's share of the region's data.
2. `offer`: for its own chunks, delta = anchor - local, checked, encoded (`xcloud.update`) and stored;
   in a region of several pools plain first, then the pools' mean encoded by the first pool's ranks (`encode`).
3. `apply`: the outer step on its own anchor chunks from the merged update; then every
   rank of the pool loads the new anchor into its engine. Digests of the chunks show that
   all regions hold the same model.

Streaming DiLoCo (arXiv 2501.18512) changes two things. Only the chunks of the round's fragment are offered and
applied. With overlap the merged update comes by `deliver`, in a second thread and while the next round trains, and
is taken up after that round's first `overlap` inner steps: local = alpha local + (1 - alpha) anchor. If it is not
there by then, the steps wait for it.

The anchor (the last committed model) and the outer state live in host memory, each rank
holding only the chunks it owns. The worker is plain Python: `region` wraps it in an actor.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash

from xcloud.checkpoint import CheckpointStore, chunk_files
from xcloud.codecs import Codec, Grid
from xcloud.data import Order, PackedSplit, PackedStore, SourceConfig, prepare_store
from xcloud.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteUpdateError,
    PrivacyAccountingError,
    RegionError,
    SecurityError,
)
from xcloud.manifest import Manifest, model_hasher
from xcloud.messages import CheckpointFile, PrivacyTerms, RankInfo, RestoreOrder, RoundPlan, RoundSum
from xcloud.parts import BlobStore, Bundle, Bytes, PartReader, PartWriter
from xcloud.privacy.noise import SecureRandom
from xcloud.privacy.skellam import GridPlan, Skellam
from xcloud.secure.envelope import Opening, Sealing
from xcloud.secure.masks import Masker
from xcloud.secure.primitives import TAG_BYTES
from xcloud.secure.sealed_parts import ChunkSealer, SealedReader, reader_of
from xcloud.secure.tags import Sealed
from xcloud.secure.vault import Vault
from xcloud.training.chunks import OwnedChunks, to_numpy
from xcloud.training.correction import COMMON, OWN, Correction
from xcloud.training.engine import build_engine, device_of, join_process_group, optimizer_state_bytes
from xcloud.training.halting import Halt
from xcloud.training.models import build_model, trainable
from xcloud.training.muon import Muon
from xcloud.training.parameters import open_parameters
from xcloud.training.private import PrivateSteps, agreed_terms
from xcloud.training.spec import Beside, Landed, Offer, Trained, WorkerSpec
from xcloud.update import Framing, UpdatePath, clip_margin, exact_norm_squared, room

__all__ = ["RankWorker"]

Array = npt.NDArray[np.float32]

BLOCK = 1 << 16
PROGRESS_EVERY_S = 1.0

Gradient = Callable[[int], Array]
"""A chunk's merged update (fp32), by its id."""


@dataclass
class Landing:
    """A merged update on its way into a round that is under way: handed over, then taken up."""

    arrived: Future[tuple[RoundSum, Gradient, bool]] = field(default_factory=Future)
    landed: Future[Landed] = field(default_factory=Future)


class _Road:
    """What is done to an update's encoded chunks on their way out, and what is noted of them."""

    def __init__(self, masker: Masker | None, sealing: Sealing | None) -> None:
        self.masker, self.sealer = masker, ChunkSealer(sealing)
        self.signed: list[Sealed] = []


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
        self._landings: dict[int, Landing] = {}
        self._common: Array | None = None  # the control variate that all regions have
        self._hasher = partial(model_hasher, spec.hashed)
        self._lock = threading.Lock()

    def start(self, address: str, port: int) -> RankInfo:
        """Join the pool's process group, pack the data, build model and engine, load the anchor."""
        spec = self.spec
        join_process_group(address, port, spec.rank, spec.world, spec.on_gpu, spec.threads)
        self.device = device_of(spec.on_gpu)
        tokenizer = spec.tokenizer.build()
        self._open_data(tokenizer)
        model = build_model(spec.model, tokenizer.vocab_size, spec.seed)
        named = trainable(model)
        shapes = [(n, tuple(p.shape)) for n, p in named.items()]
        try:
            self.manifest = Manifest.of(shapes, spec.chunk_size, spec.streaming.fragments)
        except ValueError as error:
            raise ConfigError(f"streaming.fragments: {error}") from None
        self.chunks = OwnedChunks(self.manifest, spec.rank, spec.world, self.device)
        typical = (
            0.5 * spec.inner.optimizer.lr * max(1, spec.inner.steps) ** 0.5
        )  # Adam's steps are about lr long
        framing = Framing(spec.job, spec.seed, spec.members, spec.region, typical)
        self.grid: GridPlan | None = None
        codecs = self._noisy(spec.codec.build()), spec.downlink.build()
        divisor = spec.members if spec.dp is not None and spec.dp.distributed else None
        self.path = UpdatePath(*codecs, framing, self.manifest.layout, self.chunks.ids, divisor)
        rooms = [room(codecs[0], length) for length in self.chunks.lengths]
        self.writer = PartWriter(self.blobs.put, rooms, extra=TAG_BYTES)
        self.outer = spec.outer.build()
        self.anchor = self.chunks.empty()
        self.chunks.gather(lambda name: named[name].data.reshape(-1), self.anchor)
        self.outer_state = {slot: np.zeros_like(self.anchor) for slot in self.outer.slots}
        self.engine = build_engine(model, spec.engine, spec.inner, spec.world)
        self.parameters = open_parameters(self.engine, spec.engine.zero_stage)
        if isinstance(self.engine.basic_optimizer, Muon):
            self.engine.basic_optimizer.bind(self.parameters)
        self.correction: Correction | None = None
        if spec.inner.correction is not None:
            self.correction = spec.inner.correction.build(self.parameters)
        self._common = self._new_control()
        self._halt = Halt(spec.world) if spec.halts else None
        self.private = self._private_steps()
        self.chunks.spread(self.anchor, self.parameters.write)
        self._digests = self._digested()
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
            owned_chunks=len(self.chunks.ids),
        )

    def describe(self) -> tuple[str, str, int, Manifest, PrivacyTerms | None]:
        """Data in words and its fingerprint, training sequences, manifest, terms of differential privacy."""
        terms = self.private.terms if self.private is not None else self._merge_terms()
        return self.store.describe(), self.store.fingerprint, len(self.store.train), self.manifest, terms

    def work(
        self,
        plan: RoundPlan,
        start: int,
        share: float | None,
        masker: Masker | None = None,
        sealing: Sealing | None = None,
    ) -> tuple[Trained, Offer]:
        """A whole local round: `train`, then `offer`."""
        return self.train(plan, start), self.offer(plan, share, masker, sealing)

    def train(self, plan: RoundPlan, start: int) -> Trained:
        """Run the round's inner steps.

        Args:
            plan: of the round, with the steps of this pool.
            start: absolute position in the region's data order of this pool's first sequence.
        """
        spec, engine = self.spec, self.engine
        micro, accumulation = spec.engine.micro_batch, spec.engine.gradient_accumulation
        stride = micro * spec.world
        told = (
            spec.dp is None or spec.dp.unit != "region"
        )  # else losses tell of the region, and no noise is on them
        losses = torch.full((), 0.0 if told else torch.nan, dtype=torch.float32, device=self.device)
        began = shown = time.perf_counter()
        landing_s = 0.0
        engine.train()
        if self.correction is not None:
            self.correction.begin()
        generator = torch.cuda.default_generators[0] if spec.on_gpu else torch.default_generator
        # What lands in this round has to, and a step at least makes an update.
        first, done = 1 + (spec.streaming.overlap if plan.landing is not None else 0), 0
        for step in range(plan.inner_steps):
            if step >= first and self._halt is not None and self._halt.agreed():
                break
            if plan.landing is not None and step == spec.streaming.overlap:
                landing_s = self._take_up(plan.landing)
            # However many steps the round has here, its learning rates are those of the job's.
            usual = (plan.round - 1) * spec.inner.steps + step * spec.inner.steps / plan.inner_steps
            self._set_learning_rate(usual)
            seed = _mix(spec.seed, spec.region, spec.pool, spec.rank, plan.round, step)
            generator.manual_seed(seed)  # dropout
            if self.private is not None:
                self.private.step()
                losses += torch.nan  # it tells of the data, and no noise is on it
            for part in range(accumulation if self.private is None else 0):
                at = start + (step * accumulation + part) * stride + spec.rank * micro
                batch = self._batch(self.store.train, self.order.indices(at, micro))
                loss = engine(input_ids=batch, labels=batch).loss
                engine.backward(loss)
                engine.step()
                losses += loss.detach()
            done += 1
            now = time.perf_counter()
            if self.progress is not None and spec.rank == 0 and now - shown >= PROGRESS_EVERY_S:
                shown = now
                passes = done * accumulation
                tokens = passes * stride * spec.sequence_length
                self.progress(spec.pool, done, tokens, float(losses) / passes)
        if self._halt is not None:
            self._halt.close()
        passes = done * accumulation
        return Trained(
            loss_sum=float(losses),
            steps=passes,
            tokens=passes * micro * spec.sequence_length,
            seconds=time.perf_counter() - began - landing_s,
            landing_s=landing_s,
            done=done,
        )

    def halt(self) -> None:
        """Have the pool end its round at the next step. In a second thread."""
        assert self._halt is not None, "asked of pools whose machines may be taken away"
        self._halt.tell()

    def offer(
        self,
        plan: RoundPlan,
        share: float | None,
        masker: Masker | None = None,
        sealing: Sealing | None = None,
    ) -> Offer:
        """This rank's own chunks of anchor - local, those of the round's fragment.

        Args:
            plan: of the round.
            share: of the weight, for `UpdatePath.encode`; None leaves the update in fp32, for merging pools
                inside the region.
            masker: hides what is encoded; None sends it as it is.
            sealing: of the envelope that the chunks go into; None: there is none.

        Raises:
            NonFiniteUpdateError: names the parameter that holds NaN or Inf.
        """
        began, norm_squared = time.perf_counter(), 0.0
        road = _Road(masker, sealing)
        delta, chunks = self.anchor[:0], self._merged_in(plan)
        private = share is not None and self.spec.dp is not None and self.spec.dp.distributed
        clip = self._clip(self._norm_squared(plan)) if private else None
        for index, spec in enumerate(self.manifest.parameters):
            if not self.chunks.within(index, chunks):
                continue
            local = to_numpy(self.parameters.read(spec.name))
            for seg in self.manifest.segments[index]:
                if seg.chunk not in self.chunks:
                    continue
                if seg.chunk_start == 0:
                    delta = self.writer.slot(self.manifest.chunk_length(seg.chunk))
                anchor = self.chunks.of(self.anchor, seg.chunk)
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
                    if clip is not None:
                        delta *= clip
                    if share is None:
                        self.writer.add(seg.chunk, delta.view(np.uint8))
                    else:
                        self._send(plan, seg.chunk, delta, share, road)
        return self._offered(road, norm_squared, began)

    def encode(
        self,
        plan: RoundPlan,
        merged: Bundle,
        share: float,
        masker: Masker | None = None,
        sealing: Sealing | None = None,
    ) -> Offer:
        """Encode this rank's own chunks of the mean of the region's pools (fp32)."""
        began, norm_squared, reader = time.perf_counter(), 0.0, PartReader(self.blobs.get, merged)
        road, mine = _Road(masker, sealing), [c for c in self.chunks.ids if c in self._merged_in(plan)]
        for chunk in mine:
            values = reader.read(chunk).view(np.float32)
            norm_squared += exact_norm_squared(values)
        clip = self._clip(norm_squared)
        for chunk in mine:
            delta = self.writer.slot(self.manifest.chunk_length(chunk))
            delta[:] = reader.read(chunk).view(np.float32)
            if clip is not None:
                delta *= clip
            self._send(plan, chunk, delta, share, road)
        return self._offered(road, norm_squared, began)

    def _clip(self, norm_squared: float) -> np.float32 | None:
        """By what this rank's part of an update is multiplied, so that the whole of it is no longer than `dp.clip_norm`.

        Collective; None where an update is sent as long as it is. `norm_squared` is of this rank's own chunks.
        """
        dp = self.spec.dp
        if dp is None or not dp.distributed:
            return None
        whole = torch.tensor(norm_squared, dtype=torch.float64)
        if self.spec.world > 1:
            whole = whole.to(self.device)
            dist.all_reduce(whole)
        norm = float(whole) ** 0.5
        return np.float32(min(1.0, (1 - clip_margin(1)) * dp.clip_norm / norm) if norm else 1.0)

    def _norm_squared(self, plan: RoundPlan) -> float:
        """Of this rank's own chunks of anchor - local; collective as reading is."""
        total, chunks = 0.0, self._merged_in(plan)
        for index, spec in enumerate(self.manifest.parameters):
            if not self.chunks.within(index, chunks):
                continue
            local = to_numpy(self.parameters.read(spec.name))
            for seg in self.manifest.segments[index]:
                if seg.chunk in self.chunks:
                    anchor = self.chunks.of(self.anchor, seg.chunk)[seg.chunk_start :][: seg.length]
                    mine = local[seg.parameter_start : seg.parameter_start + seg.length]
                    self._checked_norm_squared(anchor - mine, spec.name)  # for the name of what is not finite
                    total += exact_norm_squared(anchor - mine)
        return total

    def _noisy(self, codec: Codec) -> Codec:
        """The codec with its grid and this region's share of the noise, where regions add it."""
        dp, spec = self.spec.dp, self.spec
        if dp is None or not dp.distributed:
            return codec
        assert isinstance(codec, Grid), "the job was refused otherwise"
        try:
            lengths = [chunk.length for chunk in self.manifest.layout]
            grid = self.grid = dp.grid(spec.rounds, lengths, spec.members, *spec.cohort, codec.bits)
        except PrivacyAccountingError as error:
            raise ConfigError(f"dp: {error}") from None
        noise, random = Skellam(grid.share), SecureRandom()
        return codec.calibrated(grid.step, grid.limit, partial(noise.sample, random))

    def _merge_terms(self) -> PrivacyTerms | None:
        """Under which terms each merge releases something of this region as a whole."""
        dp = self.spec.dp
        if dp is None:
            return None
        if self.grid is None:
            return dp.central_terms(self.spec.rounds)
        skellam = self.grid.variance, self.grid.l1, self.grid.l2
        noise = self.grid.noise_multiplier
        return PrivacyTerms(unit="region", sampling_probability=1.0, noise_multiplier=noise, skellam=skellam)

    def _send(self, plan: RoundPlan, chunk: int, delta: Array, share: float, road: _Road) -> None:
        encoded = self.path.encode(plan.round, chunk, delta, share)
        if road.masker is not None:
            encoded, signed = self.path.protect(plan.round, chunk, encoded, road.masker)
            road.signed.append(signed)
        self.writer.add(chunk, road.sealer.sealed(chunk, encoded))

    def _offered(self, road: _Road, norm_squared: float, began: float) -> Offer:
        seconds = time.perf_counter() - began
        return Offer(self.writer.finish(), norm_squared, seconds, tuple(road.signed), road.sealer.rows)

    def remask(
        self,
        plan: RoundPlan,
        sent: Bundle,
        old: Masker,
        new: Masker,
        opening: Opening | None = None,
        sealing: Sealing | None = None,
    ) -> Offer:
        """The same encodings of this rank's own chunks, under the keys of another sync, in another envelope."""
        began, reader = time.perf_counter(), reader_of(PartReader(self.blobs.get, sent), opening)
        road = _Road(new, sealing)
        for chunk in self.chunks.ids:
            if chunk in self._merged_in(plan):
                encoded = self.path.bare(plan.round, chunk, reader.read(chunk).copy(), old)
                encoded, signed = self.path.protect(plan.round, chunk, encoded, new)
                road.signed.append(signed)
                self.writer.add(chunk, road.sealer.sealed(chunk, encoded))
        return self._offered(road, 0.0, began)

    def check(
        self, total: RoundSum, merged: Bundle, tag: bytes, openings: Sequence[Opening] = ()
    ) -> list[Sealed]:
        """What is to be confirmed of this rank's own chunks of a merged update, as they were received."""
        read = self._reading(merged, openings)
        mine = [chunk for chunk in self.chunks.ids if chunk in total.chunks]
        return [self.path.check(total.round, chunk, read(chunk), tag) for chunk in mine]

    def apply(
        self,
        total: RoundSum,
        merged: Bundle,
        evaluate: bool = False,
        hashes: Sequence[bytes] = (),
        openings: Sequence[Opening] = (),
        key: bytes = b"",
        beside: Sequence[Beside] = (),
    ) -> Landed:
        """Take up a merged update now, between two rounds.

        Args:
            total: header of the merged update; one of no region changes nothing.
            merged: its chunks; those of other ranks are not fetched.
            evaluate: the new model, too.
            hashes: SHA-256 that each chunk of the merged update must have, where the regions have signed it.
            openings: of the envelopes that its chunks lie in; none: they travel as they are.
            key: that the sum is encrypted under; none: it is open.
            beside: sums of all groups, where there are several: what is taken up is the median of their means.

        Raises:
            RegionError: a chunk is not what was signed.
        """
        gradient = self._opened(total, merged, hashes, openings, key)
        if beside:
            gradient = self._median(
                [self._opened(one.total, one.merged, one.hashes, one.openings) for one in beside]
            )
        return self._land(total, gradient, evaluate)

    def _median(self, groups: Sequence[Gradient]) -> Gradient:
        """Of the groups' means, coordinate by coordinate; of their public scales, too."""

        def median(chunk: int) -> Array:
            means, scales, before = [], [], self.path.scales.get(chunk)
            for group in groups:
                if before is not None:  # each group's sum was encoded under the scale from before
                    self.path.scales[chunk] = before
                means.append(group(chunk).copy())
                if chunk in self.path.scales:
                    scales.append(self.path.scales[chunk])
                if before is None:
                    self.path.scales.pop(chunk, None)
            if scales:
                self.path.scales[chunk] = np.median(scales, axis=0).astype(np.float32)
            found: Array = np.median(means, axis=0).astype(np.float32)
            return found

        return median

    def _reading(self, merged: Bundle, openings: Sequence[Opening]) -> Callable[[int], Bytes]:
        """Reads chunks of a merged update, each valid until the next.

        Raises:
            RegionError: a chunk does not open. The reading does, not this call.
        """
        reader = PartReader(self.blobs.get, merged)
        if not openings:
            return reader.read
        envelopes: dict[int, SealedReader] = {}
        for opening in openings:
            envelopes |= dict.fromkeys(opening.route.chunks, SealedReader(reader, opening))

        def read(chunk: int) -> Bytes:
            try:
                return envelopes[chunk].read(chunk)
            except SecurityError as error:
                raise RegionError(self.spec.region, f"the merged update: {error}") from None

        return read

    def _opened(
        self,
        total: RoundSum,
        merged: Bundle,
        hashes: Sequence[bytes],
        openings: Sequence[Opening] = (),
        key: bytes = b"",
        keep: bool = False,
    ) -> Gradient:
        """Each chunk of the merged update; valid until the next, unless it is to be kept."""
        read = self._reading(merged, openings)

        def opened(chunk: int) -> Array:
            data = read(chunk)
            if keep and openings:
                data = data.copy()
            if hashes and hashlib.sha256(data).digest() != hashes[chunk - total.chunks.start]:
                raise RegionError(
                    self.spec.region, f"chunk {chunk} of the sum is not what the regions have signed"
                )
            if key:
                try:
                    data = self.path.opened(chunk, data, key)
                except SecurityError as error:
                    raise RegionError(self.spec.region, f"chunk {chunk} of the sum: {error}") from None
            return self.path.decode(chunk, data, total)

        return opened

    def deliver(
        self,
        total: RoundSum,
        merged: Bundle,
        evaluate: bool = False,
        hashes: Sequence[bytes] = (),
        openings: Sequence[Opening] = (),
        key: bytes = b"",
    ) -> Landed:
        """Hand a merged update to the round that is under way, from another thread; see `apply`.

        Everything that waits for the network happens here. Returns when the round has taken it up.
        """
        landing = self._landing(total.round)
        try:
            opened = self._opened(total, merged, hashes, openings, key, keep=True)
            ready = {chunk: opened(chunk) for chunk in self.chunks.ids if chunk in total.chunks}
        except BaseException as error:
            landing.arrived.set_exception(error)  # the round waits for it
            raise
        landing.arrived.set_result((total, ready.__getitem__, evaluate))
        return landing.landed.result()

    def _landing(self, round: int) -> Landing:
        with self._lock:
            return self._landings.setdefault(round, Landing())

    def _take_up(self, round: int) -> float:
        """Wait for the merged update of an earlier round and land it; returns the seconds it took."""
        began, landing = time.perf_counter(), self._landing(round)
        try:
            landing.landed.set_result(self._land(*landing.arrived.result()))
        except BaseException as error:
            landing.landed.set_exception(error)
            raise
        self.engine.train()
        del self._landings[round]
        return time.perf_counter() - began

    def _land(self, total: RoundSum, gradient: Gradient, evaluate: bool) -> Landed:
        """The outer step on this rank's chunks, then the new anchor into every engine of the pool."""
        alone, write = (
            self.spec.world == 1,
            self._write_mixed if self.spec.streaming.mix else self.parameters.write,
        )
        hasher, norm_squared = self._hasher(), 0.0
        merged = self.anchor[:0]
        sync = (total.round - 1) // self.spec.streaming.fragments + 1
        total_lr, control = self._total_lr(total.round), self._new_control()
        self._common = control
        if self.correction is not None and self.spec.region in total.regions:
            self.correction.settle(total_lr)
        for index, spec in enumerate(self.manifest.parameters):  # elementwise, so any cut gives the same bits
            if not self.chunks.within(index, total.chunks):
                continue
            for seg in self.manifest.segments[index]:
                if seg.chunk not in self.chunks:
                    continue
                anchor = self.chunks.of(self.anchor, seg.chunk)
                if seg.chunk_start == 0:
                    merged = gradient(seg.chunk)
                    if self.spec.guarded:
                        norm_squared += float(np.dot(merged, merged))
                    if control is not None:
                        np.divide(merged, np.float32(total_lr), out=self.chunks.of(control, seg.chunk))
                slots = {slot: self.chunks.of(values, seg.chunk) for slot, values in self.outer_state.items()}
                for start, stop in _blocks(seg.length):
                    at = slice(seg.chunk_start + start, seg.chunk_start + stop)
                    self.outer.step(
                        anchor[at], merged[at], {slot: values[at] for slot, values in slots.items()}, sync
                    )
                    hasher.update(anchor[at])
                if seg.chunk_start + seg.length == anchor.size:
                    self._digests[seg.chunk] = self._with_state(seg.chunk, hasher.hexdigest())
                    hasher = self._hasher()
            if alone:  # while the parameter is still in cache
                write(spec.name, torch.from_numpy(self.anchor[spec.offset : spec.offset + spec.size]))
        if not alone:
            self.chunks.spread(self.anchor, write, total.chunks)
        if control is not None:
            self.chunks.spread(control, partial(self.parameters.write, key=COMMON))
        if self.spec.region in total.regions:
            self.path.settle()
        elif total.summed or not total.regions:  # what adds up counts in its own round or never
            self.path.forget()
        began = time.perf_counter()
        loss, tokens = self._evaluate_anchor() if evaluate else (0.0, 0)
        return Landed(dict(self._digests), loss, tokens, time.perf_counter() - began, norm_squared)

    def _write_mixed(self, name: str, anchor: torch.Tensor) -> None:
        """A share of the local weights stays; collective as `read` is."""
        mix, local = self.spec.streaming.mix, self.parameters.read(name)
        self.parameters.write(name, torch.lerp(anchor.to(local.device), local, mix))

    def _evaluate_anchor(self) -> tuple[float, int]:
        """Like `evaluate`, of the anchor, where the local model is another one."""
        if not self.spec.streaming.keeps_local:
            return self.evaluate()
        local = self.chunks.empty()
        self.chunks.gather(self.parameters.read, local)
        self.chunks.spread(self.anchor, self.parameters.write)
        try:
            return self.evaluate()
        finally:
            self.chunks.spread(local, self.parameters.write)

    def digests(self) -> dict[int, str]:
        """Digest of each owned anchor chunk (`model_hasher`, over its fp32 bytes)."""
        self._digests = self._digested()
        return dict(self._digests)

    def _digested(self) -> dict[int, str]:
        digests = {}
        for chunk in self.chunks.ids:
            hasher = self._hasher()
            hasher.update(self.chunks.of(self.anchor, chunk))
            digests[chunk] = self._with_state(chunk, hasher.hexdigest())
        return digests

    def _with_state(self, chunk: int, digest: str) -> str:
        """A chunk's digest, with what else all regions have in common of it where they sign for it: outer state, public scale and
        control. A driver that gave regions other scales could have all but one of them send zeros."""
        if not self.spec.hashed:
            return digest
        hasher = self._hasher()
        hasher.update(digest.encode())
        for slot in sorted(self.outer_state):
            hasher.update(self.chunks.of(self.outer_state[slot], chunk))
        if chunk in self.path.scales:
            hasher.update(np.ascontiguousarray(self.path.scales[chunk]))
        if self._common is not None:
            hasher.update(self.chunks.of(self._common, chunk))
        return str(hasher.hexdigest())

    def discard(self) -> None:
        """Give up the update that was offered; local training too, unless local models go their own way."""
        self.path.forget()
        if not self.spec.streaming.keeps_local:
            self.chunks.spread(self.anchor, self.parameters.write)

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

    def save(self, url: str, round: int, donor: bool, vault: Vault | None = None) -> list[CheckpointFile]:
        """Write this rank's chunks: inner state, sealed if there is a vault, and the model too if `donor`."""
        store = CheckpointStore(url)
        written: list[CheckpointFile] = []
        controls = self.correction is not None and self.correction.controls
        if donor:
            model = self.chunks.by_id({"anchor": self.anchor, **self.outer_state})
            if controls:
                model |= self.chunks.by_id({COMMON: self._kept(COMMON)})
            if self.path.scales:
                model["scale"] = self.path.scales
            written += self.chunks.write(store, round, "model/", model, {})
        keys, scalars = self._inner_layout()
        scalars["loss_scale"] = self._loss_scale()
        tensors = self.chunks.by_id({key: self._kept(key) for key in ([*keys, OWN] if controls else keys)})
        if self.path.residual:
            tensors["residual"] = self.path.residual
        if self.spec.streaming.keeps_local:
            local = self.chunks.empty()
            self.chunks.gather(self.parameters.read, local)
            tensors |= self.chunks.by_id({"local": local})
        if tensors or scalars["loss_scale"]:
            written += self.chunks.write(store, round, self._inner_prefix(), tensors, scalars, vault)
        return written

    def restore(self, url: str, order: RestoreOrder, vault: Vault | None = None) -> None:
        """Load a committed round: anchor, outer state and, if it was saved, inner state.

        Raises:
            CheckpointError: the checkpoint does not hold what this job needs.
            TamperError: the inner state is not what this region has sealed.
        """
        store = CheckpointStore(url)
        model, _ = self.chunks.read(store, order.round, chunk_files(order.files, "model/"))
        self.path.scales, common = model.pop("scale", {}), model.pop(COMMON, {})
        if self.chunks.ids and set(model) != {"anchor", *self.outer_state}:
            raise CheckpointError(
                f"{store.folder(order.round)}: holds outer state {sorted(set(model) - {'anchor'})}, "
                f"this job's outer optimizer keeps {sorted(self.outer_state)}"
            )
        for name, values in {"anchor": self.anchor, **self.outer_state}.items():
            self.chunks.fill(values, model.get(name, {}))
        self.chunks.spread(self.anchor, self.parameters.write)
        files = chunk_files(order.files, self._inner_prefix())
        inner, scalars = self.chunks.read(store, order.round, files, vault, order.inner_round)
        local = inner.pop("local", {})
        self.path.restore(inner.pop("residual", {}))
        own = inner.pop(OWN, {})
        if self.correction is not None and self.correction.controls:
            self._common = self.chunks.empty()
            self.chunks.fill(self._common, common)
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
        if self.spec.streaming.keeps_local and order.inner_round == order.round:
            values = self.chunks.empty()
            self.chunks.fill(values, local)
            self.chunks.spread(values, self.parameters.write)
        self._landings.clear()

    # -- chunks and parameters ------------------------------------------------------------

    def _merged_in(self, plan: RoundPlan) -> range:
        """Chunk ids of the fragment that a round merges."""
        return range(*plan.chunks) if plan.chunks else range(self.manifest.chunk_count)

    def _kept(self, key: str) -> Array:
        """The owned chunks of values kept beside the masters; collective."""
        owned = self.chunks.empty()
        self.chunks.gather(partial(self.parameters.read, key=key), owned)
        return owned

    def _keep(self, key: str, parts: dict[int, Array]) -> None:
        """Set values kept beside the masters; a chunk that is not there is zero; collective."""
        owned = self.chunks.empty()
        self.chunks.fill(owned, parts)
        self.chunks.spread(owned, partial(self.parameters.write, key=key))

    def _new_control(self) -> Array | None:
        """Room for the round's common control variate, where there is one."""
        return self.chunks.empty() if self.correction is not None and self.correction.controls else None

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

    def _private_steps(self) -> PrivateSteps | None:
        """What takes the inner steps under differential privacy."""
        spec, examples = self.spec, len(self.store.train)
        if spec.dp is None or spec.dp.unit != "example":
            return None
        batch = spec.engine.micro_batch * spec.engine.gradient_accumulation * spec.world
        terms = agreed_terms(spec.dp, spec.region, examples, batch, spec.rounds * spec.inner.steps)
        return PrivateSteps(
            self.engine,
            self.parameters,
            terms,
            spec.dp.clip_norm,
            examples=examples,
            expected_batch=batch,
            length=spec.sequence_length,
            micro_batch=spec.engine.micro_batch,
            replicated=spec.engine.zero_stage == 0,
            read=lambda rows: self._batch(self.store.train, rows),
        )

    def _factor(self, step: float) -> float:
        inner = self.spec.inner
        return inner.schedule.factor(step, self.spec.rounds * inner.steps)

    def _set_learning_rate(self, step: float) -> None:
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


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Cuts of a run of elements that stay in cache through several passes."""
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def _mix(*parts: object) -> int:
    """A 31-bit seed from anything with a stable repr."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) & 0x7FFFFFFF

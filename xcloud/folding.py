"""Folding: chunks of several updates become one, a few of them at a time.

A `Folder` is the work of one aggregation actor: it is stateless, and holds chunk buffers of the fold in
flight and nothing else: no model, no outer optimizer, no key. Chunks are folded one id at a time, over the
updates in the order given, so the sum does not depend on who came first and is bit for bit the same after
a resume, and whichever folder takes which chunks. Encodings that add are added as they are; all others are
opened, combined, and encoded again.

What is opened at once: of a weighted mean nothing but the chunk that is being added to its part, whatever the
number of updates. A median, a trimmed mean and inner products need one chunk of every update side by side;
one thread then works alone, unless two sets fit into `OPENED_BYTES`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from xcloud.codecs import Array, Bytes, Codec, Frame, Identity, accumulate, ring_of
from xcloud.config import parse_job
from xcloud.errors import AggregationError, NonFiniteUpdateError, RegionError, SecurityError
from xcloud.manifest import ChunkLayout
from xcloud.messages import Folded, FoldOrder, Source, Unmasked, UnmaskOrder
from xcloud.parts import BlobStore, Bundle, PartReader, PartWriter
from xcloud.privacy.noise import SecureRandom
from xcloud.secure.ckks import Encrypted
from xcloud.secure.envelope import Opening, Route, Sealing, new_secret, table_of
from xcloud.secure.identity import Role
from xcloud.secure.masks import Masker
from xcloud.secure.post import (
    Letter,
    Mail,
    Post,
    PostOrder,
    aggregator_name,
    largest,
    round_hash,
)
from xcloud.secure.primitives import TAG_BYTES
from xcloud.secure.sealed_parts import ChunkReader, ChunkSealer, reader_of
from xcloud.transport.blobs import Handle
from xcloud.update import Framing, adds_up, exact_norm_squared, room

__all__ = ["Folder"]


THREADS = 2
"""Parts folded side by side; each thread holds one part's buffer."""

PART_BYTES = 16 << 20
"""Shorter than the regions' parts: these buffers are all that a fold adds to its process."""

OPENED_BYTES = 64 << 20
"""Decoded chunks that several threads may hold together, where a chunk of every update is needed at once."""

AHEAD = 8
"""Most parts that are sent for ahead of the one span that will need them."""


@dataclass(frozen=True)
class _Update:
    """One update of a fold: whose it is, what it counts, how and in which round it is encoded, where it lies."""

    name: str
    weight: float
    round: int
    codec: Codec
    bundle: Bundle
    hashes: tuple[str, ...] = ()
    opening: Opening | None = None


@dataclass(frozen=True)
class _WayOut:
    """How chunks leave a folder: in an envelope, or (no `sealing`) as they are. `rows` of its table fill up on the way."""

    mail: Mail | None
    sealing: Sealing | None
    rows: dict[int, bytes]


class Folder:
    """Folds the chunks that it is asked to. Headers come and go as JSON bytes, buffers as handles.

    Args:
        job: as YAML; says how updates combine, and how they are encoded on their way up and down.
        blobs: where the chunks are.
        cloud: merges the regions of this cloud for the root; None: is the root, or a share of it.
        share: which share of the root it is.
    """

    def __init__(self, job: str, blobs: BlobStore, cloud: str | None = None, share: int = 0) -> None:
        parsed = parse_job(job)
        self.name = aggregator_name(share if cloud is None else cloud)
        self._envelope = parsed.envelope
        self._post: Post | None = None
        self.aggregator = parsed.aggregator.build()
        self.codec, self.relay = parsed.coding.build(), parsed.hierarchy.relay()
        self.encoder = parsed.downlink.build() if cloud is None else self.relay
        self.summed = adds_up(self.codec)
        self.noise = 0.0
        if parsed.dp is not None and parsed.dp.central and cloud is None:
            terms = parsed.dp.central_terms(parsed.rounds)
            self.noise = terms.noise_multiplier * parsed.dp.clip_norm / len(parsed.regions)
        who = "aggregator" if cloud is None else f"aggregator of {cloud}"
        self.framing = Framing(parsed.name, parsed.seed, len(parsed.regions), who)
        self.blobs = blobs
        self._ahead = 0
        self._pool = ThreadPoolExecutor(THREADS)
        self._own = (
            threading.local()
        )  # each thread's buffer, made once: fresh ones would cost as much as the fold

    def pid(self) -> int:
        """Process id, for fault tests and memory measurements."""
        return os.getpid()

    def arriving(self, handles: Sequence[Handle]) -> None:
        """Parts of updates that regions are still encoding, or that wait for slower regions: have them brought here,
        as many as are sent for ahead of a span."""
        self._ahead += len(handles)
        if self._ahead <= AHEAD:
            self.blobs.prefetch(handles)

    def receiver(self, order: bytes) -> bytes:
        """Who this folder is, and fresh keys to seal to (`secure.post.PostOrder`, `Posted`).

        Raises:
            KeyFileError: names the key file that it needs and that is missing or wrong.
        """
        asked, post = PostOrder.from_wire(order, "driver"), self._own_post()
        # An update of before then gets a new header, if it is still merged.
        post.forget(min(asked.rounds, default=1) - 1)
        return post.answer(asked).to_wire()

    def _own_post(self) -> Post:
        if self._post is None:  # not in the constructor: an actor that dies there cannot say why
            assert self._envelope is not None, "asked of jobs with envelopes only"
            self._post = Post.open(self.name, self._envelope)
        return self._post

    def copy(self, handles: Sequence[Handle]) -> list[Handle]:
        """Buffers of our own with the same contents, for readers nearby."""
        return [self.blobs.put(buffer) for handle in handles for buffer in self.blobs.get([handle])]

    def gram(
        self, order: bytes, layout: Sequence[Any], updates: Sequence[Sequence[Handle]]
    ) -> npt.NDArray[np.float64]:
        """Inner products of the updates in each chunk, (chunks, n, n).

        Raises:
            RegionError: a region's chunk has the wrong size or cannot be fetched.
        """
        ordered, shapes, sent = self._open(order, layout, updates)

        def products(span: range) -> npt.NDArray[np.float64]:
            readers = [self._reader(update, span) for update in sent]
            found = np.zeros((len(span), len(sent), len(sent)))
            for gram, chunk in zip(found, span, strict=True):
                values = [
                    self._opened(u, r, chunk, shapes[chunk]) for u, r in zip(sent, readers, strict=True)
                ]
                with np.errstate(over="ignore", invalid="ignore"):  # the aggregator judges what is not finite
                    for i, one in enumerate(values):
                        for j in range(i + 1):
                            gram[i, j] = gram[j, i] = float(np.dot(one, values[j]))
            return found

        return np.concatenate(self._each(products, range(*ordered.chunks), shapes, sent, together=True))

    def norms(
        self, order: bytes, layout: Sequence[Any], updates: Sequence[Sequence[Handle]]
    ) -> npt.NDArray[np.float64]:
        """Squared norms of the updates in each chunk, (chunks, n), one update after the other.

        Raises:
            RegionError: a region's chunk has the wrong size or cannot be fetched.
        """
        ordered, shapes, sent = self._open(order, layout, updates)

        def squares(span: range) -> npt.NDArray[np.float64]:
            found = np.zeros((len(span), len(sent)))
            for column, update in enumerate(sent):
                reader = self._reader(update, span)
                for row, chunk in enumerate(span):
                    values = self._opened(update, reader, chunk, shapes[chunk])
                    # Whoever asked judges what is not finite.
                    with np.errstate(over="ignore", invalid="ignore"):
                        found[row, column] = exact_norm_squared(values)
            return found

        return np.concatenate(self._each(squares, range(*ordered.chunks), shapes, sent, together=False))

    def fold(
        self, order: bytes, layout: Sequence[Any], updates: Sequence[Sequence[Handle]]
    ) -> tuple[bytes, list[Handle]]:
        """Combine the updates, chunk by chunk.

        Args:
            order: what to fold (`FoldOrder`).
            layout: length and matrices of every chunk of the model.
            updates: for each source of the order, one handle for each of its parts.

        Returns:
            A `Folded`, and one handle for each of its parts.

        Raises:
            RegionError: a region's chunk has the wrong size, cannot be fetched or is not finite.
            AggregationError: the sum is not finite.
        """
        self._ahead = 0
        ordered, shapes, sent = self._open(order, layout, updates)
        additive = self.summed or self.aggregator.additive
        if additive and not self.summed:
            sent = [update for update in sent if update.weight]  # rather than multiplied: 0 x NaN is NaN

        def folded(span: range) -> tuple[Bundle, list[float]]:
            return self._fold(span, ordered.round, shapes, sent, way)

        way = self._way_out(ordered.mail, ordered.round, range(*ordered.chunks))
        done = self._each(folded, range(*ordered.chunks), shapes, sent, together=not additive)
        merged = Bundle.join(bundle for bundle, _ in done)
        norms = tuple(norm for _, norms in done for norm in norms)
        header = Folded(
            parts=merged.parts, chunk_bytes=merged.sizes, norms_squared=norms, letter=self._closed(way)
        )
        return header.to_wire(), list(merged.handles)

    def _way_out(self, mail: str, round: int, chunks: range) -> _WayOut:
        """How what is folded goes on."""
        told = Mail.from_wire(mail.encode(), "driver") if mail else None
        if told is None or not told.receivers:
            return _WayOut(told, None, {})
        plan = round_hash(self.framing.job, round, told.manifest)
        route = Route(plan, self.framing.job, round, told.attempt, told.direction, self.name, chunks)
        return _WayOut(told, Sealing(route, new_secret()), {})

    def _closed(self, way: _WayOut) -> str:
        """The header of what was sealed, for those that it goes to."""
        if way.mail is None or way.sealing is None:
            return ""
        table = table_of(way.sealing.route, way.rows)
        role: Role = "region" if way.mail.direction == "down" else "aggregator"
        letter = self._own_post().wrap(
            way.sealing, table, way.mail.attempt, way.mail.receivers, role, way.mail.introduced
        )
        return letter.to_wire().decode()

    def unmask(
        self, order: bytes, layout: Sequence[Any], handles: Sequence[Handle]
    ) -> tuple[bytes, list[Handle]]:
        """Open a total of masked encodings.

        Args:
            order: keys, and how the total is cut (`UnmaskOrder`).
            layout: length and matrices of every chunk of the model.
            handles: of its parts.

        Returns:
            An `Unmasked`, and one handle for each of its parts.
        """
        asked = UnmaskOrder.from_wire(order, "driver")
        shapes = [ChunkLayout(*chunk) for chunk in layout]
        total = Bundle(asked.parts, asked.chunk_bytes, tuple(handles))
        masker = Masker(
            tuple(bytes.fromhex(key) for key in asked.added), tuple(bytes.fromhex(key) for key in asked.taken)
        )

        way = self._way_out(asked.mail, asked.round, _range_of(total))

        def opened(span: range) -> tuple[Bundle, list[str]]:
            reader, writer, hashes = PartReader(self.blobs.get, total.within(span)), self._writer(shapes), []
            sealer = ChunkSealer(way.sealing)
            for chunk in span:
                data = reader.read(chunk).copy()
                frame = self.framing.frame(asked.round, chunk, shapes[chunk])
                ring = ring_of(self.codec, shapes[chunk].length, frame)
                assert ring is not None, "the job was refused otherwise"
                masker.apply(data, chunk, ring)
                hashes.append(hashlib.sha256(data).hexdigest())
                writer.add(chunk, sealer.sealed(chunk, data))
            way.rows.update(sealer.rows)
            return self._finished(writer), hashes

        spans = [range(first, first + count) for first, count in total.parts]
        done = list(self._pool.map(opened, spans))
        merged = Bundle.join(bundle for bundle, _ in done)
        header = Unmasked(
            parts=merged.parts,
            chunk_bytes=merged.sizes,
            hashes=tuple(found for _, hashes in done for found in hashes),
            letter=self._closed(way),
        )
        return header.to_wire(), list(merged.handles)

    def _open(
        self, order: bytes, layout: Sequence[Any], updates: Sequence[Sequence[Handle]]
    ) -> tuple[FoldOrder, list[ChunkLayout], list[_Update]]:
        ordered, shapes = FoldOrder.from_wire(order, "driver"), [ChunkLayout(*chunk) for chunk in layout]
        mail = Mail.from_wire(ordered.mail.encode(), "driver") if ordered.mail else None
        sent = [
            _Update(
                source.name,
                source.weight,
                source.round,
                self.relay if source.relayed and not self.summed else self.codec,
                Bundle(source.parts, source.chunk_bytes, tuple(handles)),
                source.hashes,
                None if mail is None else self._unwrapped(mail, source, shapes),
            )
            for source, handles in zip(ordered.sources, updates, strict=True)
        ]
        return ordered, shapes, sent

    def _unwrapped(self, mail: Mail, source: Source, layout: Sequence[ChunkLayout]) -> Opening:
        """What opens an update's chunks.

        Raises:
            RegionError: it came in no envelope, or in one that is not for this merge.
        """
        letter: Letter | None = mail.letters.get(source.name)
        if letter is None:
            raise RegionError(source.name, "its update came without an envelope")
        job, chunks = self.framing.job, range(*mail.chunks)
        plan = round_hash(job, source.round, mail.manifest)
        route = Route(plan, job, source.round, mail.attempt, "up", source.name, chunks)
        most = largest(max((room(self.codec, layout[chunk].length) for chunk in chunks), default=0))
        role: Role = "aggregator" if source.relayed else "region"
        try:
            return self._own_post().unwrap(letter, route, role, most, mail.introduced)
        except SecurityError as error:
            raise RegionError(source.name, f"its update: {error}") from None

    def _each(
        self,
        work: Callable[[range], Any],
        chunks: range,
        layout: Sequence[ChunkLayout],
        sent: Sequence[_Update],
        *,
        together: bool,
    ) -> list[Any]:
        """Do `work` for the chunks of each outgoing part, while the parts for the next are on their way.

        Args:
            together: it opens a chunk of every update at once.
        """
        spans = _spans(layout, chunks, PART_BYTES // 4)
        coming = _arrivals(spans, [update.bundle for update in sent])
        for handles in coming[:THREADS]:
            self.blobs.prefetch(handles)

        def one(index: int) -> Any:
            if index + THREADS < len(spans):
                self.blobs.prefetch(coming[index + THREADS][:AHEAD])
            return work(spans[index])

        opened = sum(not isinstance(update.codec, Identity) for update in sent)  # identity's are views
        longest = max((layout[chunk].length for chunk in chunks), default=0)
        alone = together and THREADS * opened * 4 * longest > OPENED_BYTES
        each: Iterable[Any] = (map if alone else self._pool.map)(one, range(len(spans)))
        return list(each)

    def _fold(
        self,
        span: range,
        round: int,
        layout: Sequence[ChunkLayout],
        sent: Sequence[_Update],
        way: _WayOut,
    ) -> tuple[Bundle, list[float]]:
        """Fold the chunks of one outgoing part: its bundle and each chunk's squared norm."""
        readers, writer = [self._reader(update, span) for update in sent], self._writer(layout)
        norms, sealer, random = [], ChunkSealer(way.sealing), SecureRandom()
        for chunk in span:
            frame = self.framing.frame(round, chunk, layout[chunk])
            if self.summed:
                total = self._total(sent, readers, chunk, layout[chunk].length, frame)
                writer.add(chunk, sealer.sealed(chunk, total))
                continue
            out = writer.slot(layout[chunk].length)
            with np.errstate(over="ignore", invalid="ignore"):  # told by the region's name, below
                self._combine(sent, readers, chunk, layout[chunk], out)
                if self.noise:
                    out += np.float32(self.noise) * random.normal(out.size)
                norm_squared = float(np.dot(out, out))
            if not np.isfinite(norm_squared):
                self._blame(sent, readers, chunk, layout[chunk], out)
                norm_squared = float(np.dot(out.astype(np.float64), out.astype(np.float64)))
            norms.append(norm_squared)
            writer.add(chunk, sealer.sealed(chunk, self.encoder.encode(out, frame)))
        way.rows.update(sealer.rows)
        return self._finished(writer), norms

    def _writer(self, layout: Sequence[ChunkLayout]) -> PartWriter:
        """This thread's writer, until `_finished` gives it back: after a failure it is half full and is let go."""
        writer: PartWriter | None = getattr(self._own, "writer", None)
        self._own.writer = None
        if writer is None:
            lengths = [room(self.codec, chunk.length) for chunk in layout]
            writer = PartWriter(self.blobs.put, lengths, PART_BYTES, TAG_BYTES)
        return writer

    def _finished(self, writer: PartWriter) -> Bundle:
        bundle, self._own.writer = writer.finish(), writer
        return bundle

    def _combine(
        self,
        sent: Sequence[_Update],
        readers: Sequence[ChunkReader],
        chunk: int,
        shape: ChunkLayout,
        out: Array,
    ) -> None:
        if not self.aggregator.additive:
            values = [self._opened(u, r, chunk, shape) for u, r in zip(sent, readers, strict=True)]
            self.aggregator.combine(values, [update.weight for update in sent], out)
            return
        weights = [np.float32(update.weight) for update in sent]
        alike = len(set(weights)) == 1  # one multiplication for all, and the common case
        out[:] = 0
        for update, reader, weight in zip(sent, readers, weights, strict=True):
            data, frame = self._fetched(update, reader, chunk), self.framing.frame(update.round, chunk, shape)
            try:
                accumulate(update.codec, data, np.float32(1) if alike else weight, out, frame)
            except ValueError as error:
                raise _malformed(update, chunk, error) from None
        if alike:
            out *= weights[0]

    def _blame(
        self,
        sent: Sequence[_Update],
        readers: Sequence[ChunkReader],
        chunk: int,
        shape: ChunkLayout,
        out: Array,
    ) -> None:
        """Say who made a chunk of the merged update not finite, unless only its norm is too large for fp32."""
        if np.isfinite(out).all():
            return
        for update, reader in zip(sent, readers, strict=True):
            if not np.isfinite(self._opened(update, reader, chunk, shape)).all():
                raise NonFiniteUpdateError(update.name, f"chunk {chunk} of its update holds NaN or Inf")
        raise AggregationError(f"the merged update is not finite in chunk {chunk}")

    def _total(
        self, sent: Sequence[_Update], readers: Sequence[ChunkReader], chunk: int, length: int, frame: Frame
    ) -> Bytes:
        """The encodings of one chunk, added without opening them."""
        total, ring = None, ring_of(self.codec, length, frame)
        for update, reader in zip(sent, readers, strict=True):
            data = self._fetched(update, reader, chunk)
            if ring is not None and data.nbytes != ring.size:
                raise RegionError(
                    update.name,
                    f"chunk {chunk} of its update ({length} values) has {data.nbytes} bytes, expected {ring.size}",
                )
            if update.hashes:
                _signed(update, chunk, data)
            if isinstance(self.codec, Encrypted):
                try:
                    self.codec.check(data, length)
                except ValueError as error:
                    raise _malformed(update, chunk, error) from None
            if total is None:
                total = data.copy()
                continue
            if data.nbytes != total.nbytes:
                raise RegionError(
                    update.name,
                    f"chunk {chunk} of its update ({length} values) has {data.nbytes} bytes, "
                    f"expected {total.nbytes} as from {sent[0].name!r}",
                )
            self.codec.add(total, data, frame)
        assert total is not None, "a round merges at least one region"
        return total

    def _reader(self, update: _Update, span: range) -> ChunkReader:
        try:
            return reader_of(PartReader(self.blobs.get, update.bundle.within(span)), update.opening)
        except ValueError as error:
            raise RegionError(update.name, f"its update is malformed: {error}") from None

    def _opened(self, update: _Update, reader: ChunkReader, chunk: int, shape: ChunkLayout) -> Array:
        data = self._fetched(update, reader, chunk)
        try:
            return update.codec.decode(data, shape.length, self.framing.frame(update.round, chunk, shape))
        except ValueError as error:
            raise _malformed(update, chunk, error) from None

    def _fetched(self, update: _Update, reader: ChunkReader, chunk: int) -> Bytes:
        try:
            return reader.read(chunk)
        except ray.exceptions.RayError as error:
            lost = f"chunk {chunk} of its update is lost ({type(error).__name__})"
            raise RegionError(update.name, lost) from None
        except (ValueError, SecurityError) as error:
            raise _malformed(update, chunk, error) from None


def _signed(update: _Update, chunk: int, data: Bytes) -> None:
    """Refuse a chunk that is not what its region has signed."""
    if hashlib.sha256(data).hexdigest() != update.hashes[chunk - update.bundle.first]:
        raise RegionError(update.name, f"chunk {chunk} of its update is not what it signed")


def _malformed(update: _Update, chunk: int, error: Exception) -> RegionError:
    return RegionError(update.name, f"chunk {chunk} of its update is malformed: {error}")


def _range_of(bundle: Bundle) -> range:
    """The chunk ids that it holds."""
    return range(bundle.first, bundle.first + len(bundle.sizes))


def _spans(layout: Sequence[ChunkLayout], chunks: range, elements: int) -> list[range]:
    """Runs of consecutive chunks of at most `elements` elements together, one chunk at least."""
    spans, start, held = [], chunks.start, 0
    for chunk in chunks:
        if chunk > start and held + layout[chunk].length > elements:
            spans.append(range(start, chunk))
            start, held = chunk, 0
        held += layout[chunk].length
    return [*spans, range(start, chunks.stop)] if chunks else []


def _arrivals(spans: Sequence[range], bundles: Sequence[Bundle]) -> list[list[Handle]]:
    """For each span, the parts that it is the first to need."""
    seen: set[tuple[int, int]] = set()
    found = []
    for span in spans:
        fresh = []
        for number, bundle in enumerate(bundles):
            needed = bundle.within(span)
            for (first, _), handle in zip(needed.parts, needed.handles, strict=True):
                if (number, first) not in seen:
                    seen.add((number, first))
                    fresh.append(handle)
        found.append(fresh)
    return found

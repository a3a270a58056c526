"""Chunks on the road: several consecutive chunks share one buffer, a part.

A chunk is the unit of codecs, folding and masks; a part is the unit of transport. An object
store takes milliseconds for each object whatever its size (three processes on two cores that each put
96 MiB: 155 ms in 4 MiB objects, 85 ms in 16 MiB, 20 ms in one), so chunks travel packed, each at the
next 64-byte boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["PART_BYTES", "BlobStore", "Bundle", "PartReader", "PartWriter"]

PART_BYTES = 64 << 20
"""Longest part, unless one chunk is longer; a writer's buffer is no larger than what it has to pack."""

ALIGNMENT = 64

Bytes = npt.NDArray[np.uint8]


class BlobStore(Protocol):
    """Where buffers are put and found."""

    def put(self, buffer: Bytes) -> Any:
        """Store a copy of `buffer`; returns its handle."""
        ...

    def get(self, handles: Sequence[Any]) -> list[Bytes]:
        """The buffers of `handles`, read-only, in order."""
        ...

    def prefetch(self, handles: Sequence[Any]) -> None:
        """Have buffers brought near, since they will be read soon; returns at once."""
        ...


@dataclass(frozen=True)
class Bundle:
    """Encoded chunks in parts.

    Attributes:
        parts: `(first chunk, number of chunks)` of each part, in chunk order, without gaps.
        sizes: encoded bytes of each chunk, in chunk order.
        handles: of each part's buffer.
    """

    parts: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    handles: tuple[Any, ...]

    @property
    def first(self) -> int:
        """Its first chunk; 0 where it has none."""
        return self.parts[0][0] if self.parts else 0

    @classmethod
    def join(cls, bundles: Iterable[Bundle]) -> Bundle:
        """One bundle of several that hold consecutive chunks, in any order."""
        ordered = sorted((b for b in bundles if b.parts), key=lambda b: b.parts[0])
        return cls(
            tuple(part for b in ordered for part in b.parts),
            tuple(size for b in ordered for size in b.sizes),
            tuple(handle for b in ordered for handle in b.handles),
        )

    def within(self, chunks: range) -> Bundle:
        """No more than the parts that hold some of `chunks`."""
        parts, handles, at = [], [], 0
        sizes: list[int] = []
        for part, handle in zip(self.parts, self.handles, strict=True):
            first, count = part
            if first < chunks.stop and first + count > chunks.start:
                parts.append(part)
                sizes += self.sizes[at : at + count]
                handles.append(handle)
            at += count
        return Bundle(tuple(parts), tuple(sizes), tuple(handles))


class PartWriter:
    """Packs chunks, in order, into parts.

    Args:
        put: stores a finished buffer (uint8) and returns its handle.
        lengths: elements of the chunks that will be packed.
        capacity: bytes of a part; the writer holds one such buffer.
        extra: bytes by which a chunk may become longer than its elements.
    """

    def __init__(
        self,
        put: Callable[[Bytes], Any],
        lengths: Sequence[int],
        capacity: int = PART_BYTES,
        extra: int = 0,
    ) -> None:
        self._put = put
        sizes = [_aligned(4 * length + extra) for length in lengths]
        self._buffer = np.empty(max(min(capacity, sum(sizes)), max(sizes, default=0)), np.uint8)
        self._fill = 0
        self._open: list[int] = []
        self._parts: list[tuple[int, int]] = []
        self._sizes: list[int] = []
        self._handles: list[Any] = []

    def slot(self, length: int) -> npt.NDArray[np.float32]:
        """Room for the next chunk's `length` fp32 values, before or instead of encoding."""
        if self._fill + 4 * length > self._buffer.size:
            self._flush()
        return self._buffer[self._fill : self._fill + 4 * length].view(np.float32)

    def add(self, chunk: int, encoded: Bytes) -> None:
        """Append a chunk's encoding, which may lie in the slot already."""
        if self._fill + encoded.nbytes > self._buffer.size:
            self._flush()
        assert not self._open or self._open[-1] == chunk - 1, "chunks are packed in order"
        target = self._buffer[self._fill : self._fill + encoded.nbytes]
        if target.ctypes.data != encoded.ctypes.data:
            target[:] = encoded
        self._fill += _aligned(encoded.nbytes)
        self._open.append(chunk)
        self._sizes.append(encoded.nbytes)

    def finish(self) -> Bundle:
        """The bundle of everything added since the last call."""
        self._flush()
        bundle = Bundle(tuple(self._parts), tuple(self._sizes), tuple(self._handles))
        self._parts, self._sizes, self._handles = [], [], []
        return bundle

    def _flush(self) -> None:
        if not self._open:
            return
        self._handles.append(self._put(self._buffer[: self._fill]))
        self._parts.append((self._open[0], len(self._open)))
        self._fill, self._open = 0, []


class PartReader:
    """Finds a chunk's bytes in a bundle; holds one part at a time.

    Args:
        get: fetches buffers by their handles.
        bundle: starts at any chunk.

    Raises:
        ValueError: parts and sizes of the bundle contradict each other.
    """

    def __init__(self, get: Callable[[Sequence[Any]], list[Bytes]], bundle: Bundle) -> None:
        self._get = get
        self._bundle = bundle
        self._where: dict[int, tuple[int, int, int]] = {}
        if len(bundle.handles) != len(bundle.parts) or sum(n for _, n in bundle.parts) != len(bundle.sizes):
            raise ValueError(
                f"{len(bundle.parts)} parts, {len(bundle.handles)} buffers, {len(bundle.sizes)} sizes"
            )
        sizes = iter(bundle.sizes)
        for part, (first, count) in enumerate(bundle.parts):
            offset = 0
            for chunk in range(first, first + count):
                size = next(sizes)
                self._where[chunk] = (part, offset, size)
                offset += _aligned(size)
        self._held: tuple[int, Bytes] | None = None

    def read(self, chunk: int) -> Bytes:
        """The encoded bytes of `chunk`, read-only.

        Raises:
            ValueError: the bundle does not hold the chunk, or its buffer is too short.
        """
        if chunk not in self._where:
            raise ValueError(f"chunk {chunk} is in none of its parts")
        part, offset, size = self._where[chunk]
        if self._held is None or self._held[0] != part:
            (buffer,) = self._get([self._bundle.handles[part]])
            self._held = part, buffer
        data = self._held[1][offset : offset + size]
        if data.nbytes != size:
            raise ValueError(f"chunk {chunk} has {data.nbytes} of {size} bytes")
        return data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

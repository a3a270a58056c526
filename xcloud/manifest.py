"""The flat manifest: one fp32 vector, cut into chunks that every region agrees on.

All trainable parameters, in name order, are laid end to end into one flat fp32 vector.
The vector is cut into chunks of a fixed number of elements. Chunk ids are global: a
region with eight ranks and one with two own different sets of chunks and still meet at
the aggregator. Nothing here knows about torch, DeepSpeed or Ray.

Fragments (Streaming DiLoCo, arXiv 2501.18512) are what is merged at one time. They are strided: fragment
p of P holds the layers p, p + P, p + 2P, ...; parameters outside any layer go where least is. In the flat
vector one fragment follows the other, and each begins a new chunk, so a fragment is a range of chunk ids.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

__all__ = ["ChunkLayout", "Manifest", "ParameterSpec", "Segment", "model_hasher"]


def model_hasher(signed: bool) -> Any:
    """What a model's chunks, and then their digests, are hashed with: SHA-256 where regions sign for a model, since
    whoever may choose it could else make two with one digest; xxh3-128 where digests only guard against faults."""
    return hashlib.sha256() if signed else xxhash.xxh3_128()


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its name, shape and place in the flat vector (in elements)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ChunkLayout:
    """What whoever has no model needs to know of one chunk.

    Attributes:
        length: elements.
        matrices: `(start, rows, columns)` of the whole rows of matrices inside the chunk, in elements.
    """

    length: int
    matrices: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Segment:
    """Where one chunk and one parameter overlap; all figures in elements."""

    parameter: int
    chunk: int
    parameter_start: int
    chunk_start: int
    length: int


@dataclass(frozen=True)
class Manifest:
    """Layout of a model's parameters in the flat vector.

    Args:
        parameters: in order of fragment and name, offsets without gaps.
        chunk_size: elements in each chunk but the last of a fragment.
        starts: offset of each fragment in the flat vector.
    """

    parameters: tuple[ParameterSpec, ...]
    chunk_size: int
    starts: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]], chunk_size: int, fragments: int = 1) -> Manifest:
        """Lay out `(name, shape)` pairs.

        Raises:
            ValueError: there are not enough layers and other parameters for so many fragments.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        named = sorted((name, tuple(shape)) for name, shape in shapes)
        specs, starts, offset = [], [], 0
        for fragment in _strided(named, fragments):
            starts.append(offset)
            for name, shape in fragment:
                specs.append(ParameterSpec(name, shape, offset))
                offset += math.prod(shape)
        return cls(tuple(specs), chunk_size, tuple(starts))

    @cached_property
    def size(self) -> int:
        """Elements in the flat vector."""
        return sum(p.size for p in self.parameters)

    @cached_property
    def fragments(self) -> tuple[range, ...]:
        """The chunk ids of each fragment."""
        out, first = [], 0
        for start, stop in zip(self.starts, (*self.starts[1:], self.size), strict=True):
            count = -(-(stop - start) // self.chunk_size)
            out.append(range(first, first + count))
            first += count
        return tuple(out)

    @cached_property
    def chunk_starts(self) -> tuple[int, ...]:
        """Offset of each chunk in the flat vector, and the vector's end."""
        starts = [
            start + number * self.chunk_size
            for start, chunks in zip(self.starts, self.fragments, strict=True)
            for number in range(len(chunks))
        ]
        return (*starts, self.size)

    @property
    def chunk_count(self) -> int:
        return self.fragments[-1].stop

    def chunk_length(self, chunk: int) -> int:
        """Elements in `chunk` (the last one of a fragment may be shorter)."""
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"chunk {chunk} is outside 0..{self.chunk_count - 1}")
        return self.chunk_starts[chunk + 1] - self.chunk_starts[chunk]

    def owned(self, rank: int, world: int) -> tuple[range, ...]:
        """The chunk ids that `rank` of `world` ranks owns: a run of consecutive ones of each fragment."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        return tuple(
            chunks[len(chunks) * rank // world : len(chunks) * (rank + 1) // world]
            for chunks in self.fragments
        )

    @cached_property
    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """For each parameter, its segments in chunk order."""
        out = []
        for index, spec in enumerate(self.parameters):
            parts, start = [], 0
            chunk = bisect.bisect_right(self.chunk_starts, spec.offset) - 1
            while start < spec.size:
                chunk_start = spec.offset + start - self.chunk_starts[chunk]
                length = min(spec.size - start, self.chunk_length(chunk) - chunk_start)
                parts.append(Segment(index, chunk, start, chunk_start, length))
                start += length
                chunk += 1
            out.append(tuple(parts))
        return tuple(out)

    @cached_property
    def layout(self) -> tuple[ChunkLayout, ...]:
        """Length and matrices of every chunk. A parameter of more than two dimensions counts as a matrix
        of its first dimension by all others."""
        matrices: list[list[tuple[int, int, int]]] = [[] for _ in range(self.chunk_count)]
        for spec, segments in zip(self.parameters, self.segments, strict=True):
            if len(spec.shape) < 2 or not spec.size:
                continue
            columns = spec.size // spec.shape[0]
            for seg in segments:
                skipped = -seg.parameter_start % columns  # the end of a row that began in the chunk before
                rows = (seg.length - skipped) // columns
                if rows > 0:
                    matrices[seg.chunk].append((seg.chunk_start + skipped, rows, columns))
        return tuple(ChunkLayout(self.chunk_length(c), tuple(m)) for c, m in enumerate(matrices))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes, chunk size and fragments: equal layouts have equal digests."""
        layout: list[object] = [self.chunk_size, [[p.name, *p.shape] for p in self.parameters]]
        if len(self.starts) > 1:
            layout.append(self.starts)
        return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()


LAYER = re.compile(r"(?:^|\.)(\d+)\.")

Named = tuple[str, tuple[int, ...]]


def _strided(named: Sequence[Named], fragments: int) -> list[list[Named]]:
    """Parameters by fragment: layers in turn, then the rest, the largest first, where least is."""
    out: list[list[Named]] = [[] for _ in range(fragments)]
    sizes, rest = [0] * fragments, []
    for name, shape in named:
        layer = LAYER.search(name)
        if layer is None:
            rest.append((name, shape))
            continue
        at = int(layer[1]) % fragments
        out[at].append((name, shape))
        sizes[at] += math.prod(shape)
    for name, shape in sorted(rest, key=lambda one: (-math.prod(one[1]), one[0])):
        at = sizes.index(min(sizes))
        out[at].append((name, shape))
        sizes[at] += math.prod(shape)
    if not all(sizes) and fragments > 1:
        raise ValueError(
            f"the model falls into {sum(map(bool, sizes))} fragments, not {fragments}: it has too few layers"
        )
    return [sorted(fragment) for fragment in out]

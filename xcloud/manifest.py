"""The flat manifest: one fp32 vector, cut into chunks that every region agrees on.

All trainable parameters, in name order, are laid end to end into one flat fp32 vector.
The vector is cut into chunks of a fixed number of elements. Chunk ids are global: a
region with eight ranks and one with two own different sets of chunks and still meet at
the aggregator. Nothing here knows about torch, DeepSpeed or Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["ChunkLayout", "Manifest", "ParameterSpec", "Segment"]


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
        parameters: in name order, offsets without gaps.
        chunk_size: elements in each chunk but the last.
    """

    parameters: tuple[ParameterSpec, ...]
    chunk_size: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]], chunk_size: int) -> Manifest:
        """Lay out `(name, shape)` pairs, in name order."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        specs, offset = [], 0
        for name, shape in sorted((name, tuple(shape)) for name, shape in shapes):
            specs.append(ParameterSpec(name, shape, offset))
            offset += math.prod(shape)
        return cls(tuple(specs), chunk_size)

    @cached_property
    def size(self) -> int:
        """Elements in the flat vector."""
        return sum(p.size for p in self.parameters)

    @cached_property
    def chunk_count(self) -> int:
        return -(-self.size // self.chunk_size)

    def chunk_length(self, chunk: int) -> int:
        """Elements in `chunk` (the last one may be shorter)."""
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"chunk {chunk} is outside 0..{self.chunk_count - 1}")
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def owned(self, rank: int, world: int) -> range:
        """The contiguous chunk ids that `rank` of `world` ranks owns."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        return range(self.chunk_count * rank // world, self.chunk_count * (rank + 1) // world)

    @cached_property
    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """For each parameter, its segments in chunk order."""
        out = []
        for index, spec in enumerate(self.parameters):
            parts, start = [], 0
            while start < spec.size:
                chunk, chunk_start = divmod(spec.offset + start, self.chunk_size)
                length = min(spec.size - start, self.chunk_size - chunk_start)
                parts.append(Segment(index, chunk, start, chunk_start, length))
                start += length
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
        """SHA-256 over names, shapes and chunk size: equal layouts have equal digests."""
        layout = [self.chunk_size, [[p.name, *p.shape] for p in self.parameters]]
        return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()

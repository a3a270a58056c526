"""Rings: what the bytes of an encoding that adds are, so that anyone can add them without knowing the codec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import Bytes, Codec, Frame

__all__ = ["OnRing", "Ring", "ring_add", "ring_of"]

WHOLE: dict[int, np.dtype[Any]] = {width: np.dtype(f"<u{width // 8}") for width in (8, 16, 32, 64)}
FRONT_WIDTH = 32


@dataclass(frozen=True)
class Ring:
    """Unsigned integers that add modulo 2 to the power of their width.

    Attributes:
        size: bytes in all.
        front: bytes of 32-bit integers at the beginning.
        width: bits of the integers after them, packed; one that the last byte cuts short is as wide as what is left of it.
    """

    size: int
    front: int
    width: int

    def pieces(self, largest: int) -> Iterator[tuple[int, int, int]]:
        """Cuts into (start, stop, width), none longer than `largest` bytes or one row of 64 integers,
        each at the border of an integer."""
        for start in range(0, self.front, largest):
            yield start, min(start + largest, self.front), FRONT_WIDTH
        whole = 8 * self.width
        step = max(whole, largest // whole * whole)
        for start in range(self.front, self.size, step):
            yield start, min(start + step, self.size), self.width


@runtime_checkable
class OnRing(Protocol):
    """A codec whose encodings are integers on a ring, so that masks hide them."""

    def ring(self, length: int, frame: Frame) -> Ring | None:
        """What the encoding of `length` values is; None: its settings make it no ring."""
        ...


def ring_of(codec: Codec, length: int, frame: Frame) -> Ring | None:
    """The ring of a chunk's encoding; None where it is no row of integers, as sums of floats are not."""
    return codec.ring(length, frame) if isinstance(codec, OnRing) else None


def ring_add(total: Bytes, other: Bytes, width: int) -> None:
    """Add two rows of integers of `width` bits modulo 2^width, in place; both from the border of an integer."""
    kind = WHOLE.get(width)
    if kind is None or total.size % kind.itemsize:
        kernels.packed_add(total, other, width)
        return
    mine = total.view(kind)
    np.add(mine, other.view(kind), out=mine)

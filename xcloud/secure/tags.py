"""Tags: what shows every region that a sum is the sum, and not something that the aggregator has made of it.

All regions of a sync, and nobody else, know random weights r_i for every integer. A region adds T(x) = sum of r_i x_i, modulo
2^64, of what it sends, in a masked lane beside it. T is linear, and rings never wrap, so the sum's own tag is
the sum of the tags; a sum that was altered fits with probability 2^-64 (two tags, 32-bit weights). A region that works with the
aggregator knows the weights: against that only the signatures on the sum hold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from xcloud.codecs import Bytes, Ring
from xcloud.codecs._kernels import jit
from xcloud.secure.primitives import Keystream

__all__ = ["Sealed", "add_tags", "sealed", "tags_of"]

Tags = tuple[int, int]
PIECE = 1 << 15
"""Bytes of integers at a time."""


@dataclass(frozen=True)
class Sealed:
    """SHA-256 of a chunk as it was sent, and the tags of what is in it (0 where there are none)."""

    hash: bytes
    tags: Tags = (0, 0)


def sealed(sent: Bytes, tags: Tags) -> Sealed:
    """What a region signs of one chunk."""
    return Sealed(hashlib.sha256(sent).digest(), tags)


def add_tags(chunks: Any) -> Tags:
    """The tags of several chunks together, from their `Sealed`."""
    one = two = 0
    for chunk in chunks:
        one, two = one + chunk.tags[0], two + chunk.tags[1]
    return one % (1 << 64), two % (1 << 64)


def tags_of(data: Bytes, chunk: int, ring: Ring, key: bytes) -> Tags:
    """Both tags of one chunk's encoding, or of a total.

    Args:
        data: `ring.size` bytes, not masked.
        chunk: its index: every chunk has weights of its own.
        ring: what the bytes are; integers of the front count as they are, the others in two's complement.
        key: 32 bytes that all regions of the sync know.
    """
    fill, found = Keystream(key).of(chunk), np.zeros(2, np.uint64)
    for start, stop, width in ring.pieces(PIECE):
        count = 8 * (stop - start) // width
        words = np.zeros((stop - start + 7) // 8 + 1, np.uint64)
        words.view(np.uint8)[: stop - start] = data[start:stop]
        weights = np.empty(8 * count, np.uint8)
        for at in range(0, weights.size, PIECE):
            fill(weights[at : at + PIECE])
        _accumulate(words, width, count, start >= ring.front, weights.view(np.uint32), found)
    return int(found[0]), int(found[1])


@jit
def _accumulate(words: Any, width: int, count: int, signed: bool, weights: Any, found: Any) -> None:
    mask = np.uint64((1 << width) - 1) if width < 64 else ~np.uint64(0)
    half = np.uint64(1) << np.uint64(width - 1) if signed else np.uint64(0)
    one, two = found[0], found[1]
    for i in range(count):
        bit = i * width
        k, shift = bit >> 6, np.uint64(bit & 63)
        value = (words[k] >> shift) | ((words[k + 1] << np.uint64(1)) << (np.uint64(63) - shift))
        value = ((value & mask) ^ half) - half
        one += value * np.uint64(weights[2 * i])
        two += value * np.uint64(weights[2 * i + 1])
    found[0], found[1] = one, two

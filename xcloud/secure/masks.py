"""Masks: streams that hide one region's integers and cancel in the sum of all.

An encoding that adds is a row of unsigned integers on a ring (`Ring`): levels of 32 bits, then packed values
of `width` bits. A mask is a keystream of the same length, read as the same integers and added modulo their
widths, so a masked encoding is uniformly random to whoever lacks one key of it. What the codec adds, it adds
masked just the same.

Region u sends q + PRG(b_u) + sum over v > u of PRG(k_uv) - sum over v < u of PRG(k_uv)
(Bonawitz et al., CCS 2017). Pairs cancel in the sum over those that were counted on; what does not is taken
off by `unmask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xcloud.codecs import Ring, ring_add
from xcloud.secure.primitives import Keystream

__all__ = ["LANES", "LANE_CHUNK", "Masker"]

Bytes = npt.NDArray[np.uint8]

LANE_CHUNK = 1 << 63
"""Index of the chunk that holds the lanes beside the update: never one of the update's own."""
LANES = Ring(size=24, front=0, width=64)
"""Of that chunk."""
PIECE = 1 << 17
"""Bytes masked at a time: they stay in cache from the first key to the last."""


@dataclass(frozen=True)
class Masker:
    """Keys of streams to add to and to take off an encoding; 32 bytes each. Plain bytes: a region hands it to its ranks.

    `tag` is the key of the tags' weights (`secure.tags`), where the sync has tags; `cipher` stands for the secret key of
    `secure.ckks`, where updates are encrypted and the streams hide no more than what travels beside them.
    """

    added: tuple[bytes, ...] = field(default=(), repr=False)
    taken: tuple[bytes, ...] = field(default=(), repr=False)
    tag: bytes = field(default=b"", repr=False)
    cipher: bytes = field(default=b"", repr=False)

    def apply(self, data: Bytes, chunk: int, ring: Ring) -> None:
        """Mask one chunk's encoding in place (contiguous uint8, writable).

        Args:
            chunk: its index; any rank can mask any chunk.
            ring: what the bytes are.

        Raises:
            ValueError: they are more or fewer than the ring says.
        """
        if data.size != ring.size:
            raise ValueError(f"{data.size} bytes to mask, expected {ring.size}")
        added, taken = ([Keystream(key).of(chunk) for key in keys] for keys in (self.added, self.taken))
        stream = np.empty(min(max(PIECE, 8 * ring.width), data.size), np.uint8)
        for start, stop, width in ring.pieces(PIECE):
            part, drawn = data[start:stop], stream[: stop - start]
            _add(part, added, drawn, width)
            if taken:  # a - b is not(not a + b)
                np.invert(part, out=part)
                _add(part, taken, drawn, width)
                np.invert(part, out=part)

    def inverse(self) -> Masker:
        """What takes off what this one adds."""
        return Masker(self.taken, self.added)


def _add(part: Bytes, streams: Sequence[Any], drawn: Bytes, width: int) -> None:
    for fill in streams:
        fill(drawn)
        ring_add(part, drawn, width)

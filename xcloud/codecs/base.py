"""What a codec is: one chunk of an update to bytes and back.

A codec sees one chunk at a time, a contiguous fp32 vector, and returns the exact bytes
that cross the wire: what is counted is what is sent. It keeps nothing between calls. What
it may know besides the values comes in a `Frame`; what has to survive a round (a residual,
a public scale) is kept, sharded and checkpointed by `xcloud.update`.

`linear` is true exactly where encodings can be added as they are (`add`) and the total
decodes to the sum of what the encodings decode to: only such codecs can run under
additive masks, and only for them does the aggregator never open a single update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xcloud.registry import PartConfig, Registry

__all__ = ["CODECS", "Array", "Bytes", "Codec", "CodecConfig", "Frame", "Opened", "expect_bytes"]

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Frame:
    """What a codec may know of a chunk besides its values.

    Everything but `private` is public and equal in all regions, so that one region can decode
    what others have encoded.

    Attributes:
        shared: 64-bit seed of this chunk in this sync, for rotations and sampled coordinates.
        private: 64-bit seed of this region alone, for stochastic rounding; a retry has the same.
        members: most encodings that will be added; sets the width of integer rings.
        matrices: `(start, rows, columns)` of the whole rows of 2-D parameters inside the chunk.
        scale: the codec's public state of this chunk, from the last sync's total; None before it.
        typical: root mean square to expect of a value as long as `scale` is None.
    """

    shared: int = 0
    private: int = 0
    members: int = 1
    matrices: tuple[tuple[int, int, int], ...] = ()
    scale: Array | None = None
    typical: float = 1e-3


class Codec(Protocol):
    """Encodes and decodes one chunk. Several threads may use one codec at once."""

    linear: bool
    feedback: float
    """Share of the last round's encoding error that is added to the next update; 0: no error feedback."""

    def encode(self, values: Array, frame: Frame) -> Bytes:
        """Encode `values` (fp32, shape (n,), finite). May return a view of `values`, never changes them."""
        ...

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        """Decode one encoding, or a total of `add`, to fp32, shape (length,).

        May return a read-only view of `data`.

        Raises:
            ValueError: `data` cannot be the encoding of `length` values.
        """
        ...

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        """Add the encoding `other` to `total` in place. Linear codecs only.

        Args:
            total: as long as `other`; both were encoded with frames that differ in `private` alone.
            frame: of the chunk; its `scale` and `private` do not matter.
        """
        ...

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        """The public state for the next sync; None: it has none. Linear codecs only.

        fp32, a fixed length for a chunk's length; a function of its arguments alone, so that all regions agree.

        Args:
            merged: this sync's merged update, the mean; shape (n,).
            total: what it was decoded from.
            contributors: encodings in it.
            frame: of the chunk in this sync.
        """
        ...


class Opened:
    """Base of the codecs whose encodings do not add and that keep no public state."""

    linear = False
    feedback = 0.0

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        """Encodings of this codec do not add."""
        del total, other, frame
        raise TypeError(f"{type(self).__name__} is not linear")

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        """No public state."""
        del merged, total, contributors, frame
        return None


class CodecConfig(PartConfig):
    """Base config of the family."""

    type: str

    def build(self) -> Codec:
        raise NotImplementedError  # every registered subclass builds its codec


CODECS: Registry[CodecConfig] = Registry("codec", CodecConfig)


def expect_bytes(data: Bytes, expected: int, length: int, what: str) -> None:
    """Refuse an encoding of the wrong size.

    Raises:
        ValueError: names both sizes.
    """
    if data.nbytes != expected:
        raise ValueError(f"{length} values as {what} take {expected} bytes, got {data.nbytes}")

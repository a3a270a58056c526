"""Fixed point on an integer ring: encodings add, so the aggregator never opens one.

Each block of 4096 values is rotated (random signs, Walsh-Hadamard; arXiv 1611.00429), so that its
values are alike in size, and rounded to integers of at most `limit`. The ring is wide enough for the sum
of `members` of them: nothing can wrap. What an integer is worth must be known to all before anyone encodes.
So in front of the integers goes each block's *level*, the mean square of what this region wanted to send, residual and
all, as one more integer that adds. The total says the regions' mean level, which no saturation and no lack of correlation
hides, and the next clipping range is a multiple of its root. Values beyond it saturate; with error feedback
they are sent later, and until then they raise the level.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, expect_bytes
from xcloud.codecs.ring import Ring, ring_add

__all__ = ["Fixed", "FixedConfig"]

FALL = 4.0
"""A scale falls at most so much a sync: a block that is quiet for one sync is not clipped in the next."""
LEAST = 1e-12
"""Of a scale: its steps stay normal floats."""


class Fixed:
    """Shared-scale integers; see `FixedConfig`."""

    linear = True

    def __init__(
        self,
        bits: int,
        rotated: bool,
        stochastic: bool,
        clip: float,
        feedback: float,
        ring: int | None = None,
    ) -> None:
        self.rotated, self.stochastic, self.clip, self.feedback = rotated, stochastic, clip, feedback
        self.bits, self._ring = bits, ring

    def limit(self, members: int) -> int:
        """The largest integer of one region."""
        return ((1 << (self._ring - 1)) - 1) // members if self._ring else (1 << (self.bits - 1)) - 1

    def width(self, members: int) -> int:
        """Bits of a ring that holds the sum of `members` values of at most `limit` each."""
        return self._ring or max(self.bits, (members * self.limit(members)).bit_length() + 1)

    def ring(self, length: int, frame: Frame) -> Ring:
        """Levels, then packed integers."""
        front, width = kernels.LEVEL_BYTES * kernels.blocks(length), self.width(frame.members)
        return Ring(front + kernels.packed_bytes(kernels.slots(length, self.rotated), width), front, width)

    def encode(self, values: Array, frame: Frame) -> Bytes:
        return kernels.encode_integers(
            values,
            self._steps(values.size, frame),
            self.limit(frame.members),
            self.width(frame.members),
            rotated=self.rotated,
            stochastic=self.stochastic,
            shared=frame.shared,
            private=frame.private,
        )

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        width = self.width(frame.members)
        expect_bytes(data, self.ring(length, frame).size, length, f"{width}-bit integers with levels")
        steps = self._steps(length, frame)
        return kernels.decode_integers(
            data, length, steps, self.limit(frame.members), width, rotated=self.rotated, shared=frame.shared
        )

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        width = self.width(frame.members)
        whole = kernels.LEVEL_BYTES + kernels.packed_bytes(kernels.BLOCK, width)
        front = kernels.LEVEL_BYTES * -(-total.nbytes // whole)
        ring_add(total[:front], other[:front], 8 * kernels.LEVEL_BYTES)
        ring_add(total[front:], other[front:], width)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        """From the regions' mean level, block by block; where all were silent, the scale stays."""
        before = self._scale(merged.size, frame)
        levels = total[: kernels.LEVEL_BYTES * before.size].view("<u4")
        shares = np.sqrt(levels / (kernels.LEVEL_ONE * contributors))
        scale = (before * np.float32(self.clip) * shares).astype(np.float32)
        if frame.scale is not None:
            np.maximum(scale, before / np.float32(FALL), out=scale)
        return np.maximum(np.where(levels, scale, before), np.float32(LEAST))

    def _scale(self, length: int, frame: Frame) -> Array:
        """The root mean square to expect of each block."""
        scale = frame.scale
        if scale is None:
            scale = np.full(kernels.blocks(length), frame.typical, np.float32)
        if scale.size != kernels.blocks(length):
            raise ValueError(f"{length} values have {kernels.blocks(length)} scales, got {scale.size}")
        return scale

    def _steps(self, length: int, frame: Frame) -> Array:
        """What one integer of each block is worth."""
        return self._scale(length, frame) * np.float32(self.clip / self.limit(frame.members))


CLIP = {8: 8.0, 4: 3.0, 2: 1.25}
"""Clipping ranges in root mean squares, such that the residual is small (docs/decisions/0015); few 8-bit values clip."""


@CODECS.register
class FixedConfig(CodecConfig):
    """`fixed`: integers of 8, 4 or 2 bits that add; the only quantiser that runs under masks.

    Attributes:
        bits: of one region's integers; the ring takes 1 or 2 more for 3 regions.
        ring: bits of the ring instead, of which the integers take what the number of regions leaves them; null: `bits` says.
        rotate: Hadamard rotation of each block.
        rounding: stochastic is unbiased; nearest has the smaller error, to be used with feedback.
        clip: clipping range in root mean squares of what regions send; null: 8, 3 and 1.25 for 8, 4 and 2 bits.
        feedback: share of the encoding error that the next update makes up for; null: 0 at 8 bits, else 1.
    """

    type: Literal["fixed"] = "fixed"
    bits: Literal[8, 4, 2] = 4
    ring: Literal[8, 12, 16] | None = None
    rotate: bool = True
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    clip: Annotated[float, Field(gt=0)] | None = None
    feedback: Annotated[float, Field(ge=0, le=1)] | None = None

    def build(self) -> Codec:
        fine = self.bits == 8 or self.ring is not None
        feedback = (0.0 if fine else 1.0) if self.feedback is None else self.feedback
        clip = CLIP[8 if fine else self.bits] if self.clip is None else self.clip
        return Fixed(self.bits, self.rotate, self.rounding == "stochastic", clip, feedback, self.ring)

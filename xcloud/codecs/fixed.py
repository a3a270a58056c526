"""Fixed point on an integer ring: encodings add, so the aggregator never opens one.

Each block of 4096 values is rotated (random signs, Walsh-Hadamard; arXiv 1611.00429), so that its
values are alike in size, and rounded to integers of at most `limit`. The ring is wide enough for the sum
of `members` of them: nothing can wrap. What an integer is worth must be known to all before anyone encodes:
the clipping range is a multiple of the root mean square of the same block in the *last merged update*, which is public.
Values beyond it saturate; with error feedback they are sent later.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, expect_bytes

__all__ = ["Fixed", "FixedConfig"]

FLOOR = 1e-3
"""A block's scale is at least this share of its chunk's, so that one that was silent can speak again."""


class Fixed:
    """Shared-scale integers; see `FixedConfig`."""

    linear = True

    def __init__(self, bits: int, rotated: bool, stochastic: bool, clip: float, feedback: float) -> None:
        self.limit = (1 << (bits - 1)) - 1
        self.rotated, self.stochastic, self.clip, self.feedback = rotated, stochastic, clip, feedback
        self.bits = bits

    def width(self, members: int) -> int:
        """Bits of a ring that holds the sum of `members` values of at most `limit` each."""
        return max(self.bits, (members * self.limit).bit_length() + 1)

    def encode(self, values: Array, frame: Frame) -> Bytes:
        return kernels.encode_integers(
            values,
            self._steps(values.size, frame),
            self.limit,
            self.width(frame.members),
            rotated=self.rotated,
            stochastic=self.stochastic,
            shared=frame.shared,
            private=frame.private,
        )

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        width = self.width(frame.members)
        expect_bytes(
            data,
            kernels.packed_bytes(kernels.slots(length, self.rotated), width),
            length,
            f"{width}-bit integers",
        )
        steps = self._steps(length, frame)
        return kernels.decode_integers(
            data, length, steps, self.limit, width, rotated=self.rotated, shared=frame.shared
        )

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        kernels.packed_add(total, other, self.width(frame.members))

    def next_scale(self, merged: Array, frame: Frame) -> Array | None:
        rms = kernels.block_rms(merged)
        before = frame.typical if frame.scale is None else frame.scale
        least = max(FLOOR * kernels.rms(merged), 1e-12)
        return (
            np.maximum(rms, np.float32(least))
            if rms.any()
            else np.maximum(0 * rms + before, np.float32(least))
        )

    def _steps(self, length: int, frame: Frame) -> Array:
        """What one integer of each block is worth."""
        scale = frame.scale
        if scale is None:
            scale = np.full(kernels.blocks(length), frame.typical, np.float32)
        if scale.size != kernels.blocks(length):
            raise ValueError(f"{length} values have {kernels.blocks(length)} scales, got {scale.size}")
        return scale * np.float32(self.clip / self.limit)


CLIP = {8: 8.0, 4: 4.0, 2: 1.5}
"""Clipping ranges in root mean squares of the merged update; those of a region's own update are larger."""


@CODECS.register
class FixedConfig(CodecConfig):
    """`fixed`: integers of 8, 4 or 2 bits that add; the only quantiser that runs under masks.

    Attributes:
        bits: of one region's integers; the ring takes 1 or 2 more for 3 regions.
        rotate: Hadamard rotation of each block.
        rounding: stochastic is unbiased; nearest has the smaller error, to be used with feedback.
        clip: clipping range in root mean squares of the last merged update; null: 8, 4 and 1.5 for 8, 4 and 2 bits.
        feedback: share of the encoding error that the next update makes up for; null: 0 at 8 bits, else 1.
    """

    type: Literal["fixed"] = "fixed"
    bits: Literal[8, 4, 2] = 4
    rotate: bool = True
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    clip: Annotated[float, Field(gt=0)] | None = None
    feedback: Annotated[float, Field(ge=0, le=1)] | None = None

    def build(self) -> Codec:
        feedback = (0.0 if self.bits == 8 else 1.0) if self.feedback is None else self.feedback
        clip = CLIP[self.bits] if self.clip is None else self.clip
        return Fixed(self.bits, self.rotate, self.rounding == "stochastic", clip, feedback)

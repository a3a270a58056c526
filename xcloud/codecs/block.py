"""Integers with a scale of their own for each block, sent along: for the way down and for single updates.

Rotation and rounding are those of `fixed`; but the range is the block's own largest magnitude, so nothing
saturates, and the scales of two regions differ, so their encodings do not add.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes

__all__ = ["Block", "BlockConfig"]


class Block(Opened):
    """Own-scale integers; see `BlockConfig`."""

    def __init__(self, bits: int, rotated: bool, stochastic: bool, feedback: float) -> None:
        self.bits, self.limit = bits, (1 << (bits - 1)) - 1
        self.rotated, self.stochastic, self.feedback = rotated, stochastic, feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        return kernels.encode_integers(
            values,
            None,
            self.limit,
            self.bits,
            rotated=self.rotated,
            stochastic=self.stochastic,
            shared=frame.shared,
            private=frame.private,
        )

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        size = kernels.packed_bytes(kernels.slots(length, self.rotated), self.bits)
        expect_bytes(data, size + 2 * kernels.blocks(length), length, f"{self.bits}-bit integers with scales")
        return kernels.decode_integers(
            data, length, None, self.limit, self.bits, rotated=self.rotated, shared=frame.shared
        )


@CODECS.register
class BlockConfig(CodecConfig):
    """`block`: integers of 8, 4 or 2 bits and a bfloat16 scale for each 4096 values.

    Attributes:
        bits: of each integer.
        rotate: Hadamard rotation of each block.
        rounding: stochastic is unbiased; nearest has the smaller error.
        feedback: share of the encoding error that the next update makes up for (way up only).
    """

    type: Literal["block"] = "block"
    bits: Literal[8, 4, 2] = 8
    rotate: bool = True
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    feedback: Annotated[float, Field(ge=0, le=1)] = 0.0

    def build(self) -> Codec:
        return Block(self.bits, self.rotate, self.rounding == "stochastic", self.feedback)

"""E3M0: four bits a value, a sign and a power of two, as Streaming DiLoCo sends (arXiv 2501.18512).

Each block of 256 values is divided by its largest magnitude; a value becomes 0 or one of 2^0 ... 2^-6,
rounded stochastically between its two neighbours, so the expected value is the value.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes

__all__ = ["E3M0", "E3M0Config"]

BLOCK = 256


class E3M0(Opened):
    """Four-bit floats without a mantissa."""

    def __init__(self, feedback: float) -> None:
        self.feedback = feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        return kernels.encode_e3m0(values, BLOCK, frame.private)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        expect_bytes(data, 2 * -(-length // BLOCK) + (length + 1) // 2, length, "E3M0")
        return kernels.decode_e3m0(data, BLOCK, length)


@CODECS.register
class E3M0Config(CodecConfig):
    """`e3m0`: 4-bit floats, unbiased.

    Attributes:
        feedback: share of the encoding error that the next update makes up for.
    """

    type: Literal["e3m0"] = "e3m0"
    feedback: Annotated[float, Field(ge=0, le=1)] = 0.0

    def build(self) -> Codec:
        return E3M0(self.feedback)

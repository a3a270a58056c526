"""Signs: one bit a value, and the mean magnitude of each block (EF-signSGD, arXiv 1901.09847).

Biased; it converges because error feedback keeps what a sign does not say.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes

__all__ = ["Sign", "SignConfig"]

BLOCK = 4096


class Sign(Opened):
    """One bit a value."""

    def __init__(self, feedback: float) -> None:
        self.feedback = feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        return kernels.encode_sign(values, BLOCK)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        expect_bytes(
            data, 4 * -(-length // BLOCK) + kernels.packed_bytes(length, 1), length, "signs with scales"
        )
        return kernels.decode_sign(data, BLOCK, length)


@CODECS.register
class SignConfig(CodecConfig):
    """`sign`: one bit a value, with error feedback.

    Attributes:
        feedback: share of the encoding error that the next update makes up for.
    """

    type: Literal["sign"] = "sign"
    feedback: Annotated[float, Field(ge=0, le=1)] = 1.0

    def build(self) -> Codec:
        return Sign(self.feedback)

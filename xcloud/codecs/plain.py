"""Codecs that keep floats: fp32 as it is, and bfloat16.

`identity` is exact in both directions. `bf16` halves the bytes; each value is rounded to the
nearest of bfloat16's 8 significant bits (ties to even), a relative error of at most 2^-8.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes

__all__ = ["BFloat16", "BFloat16Config", "Identity", "IdentityConfig"]


class Identity:
    """fp32 as it is: 4 bytes a value, little-endian, no copy."""

    linear = True
    feedback = 0.0

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        return values.view(np.uint8)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        expect_bytes(data, 4 * length, length, "fp32")
        return data.view(np.float32)

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        del frame
        summed = total.view(np.float32)
        np.add(summed, other.view(np.float32), out=summed)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        del merged, total, contributors, frame
        return None


class BFloat16(Opened):
    """bfloat16: the upper half of fp32, rounded to nearest even."""

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        bits = values.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        return rounded.view(np.uint16)[1::2].copy().view(np.uint8)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        expect_bytes(data, 2 * length, length, "bfloat16")
        bits = data.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)


@CODECS.register
class IdentityConfig(CodecConfig):
    """`identity`: no compression, no loss."""

    type: Literal["identity"] = "identity"

    def build(self) -> Codec:
        return Identity()


@CODECS.register
class BFloat16Config(CodecConfig):
    """`bf16`: half the bytes, 8 significant bits."""

    type: Literal["bf16"] = "bf16"

    def build(self) -> Codec:
        return BFloat16()

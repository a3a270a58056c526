"""Ternary values: 1.6 bits each, for both ways (TernGrad, arXiv 1705.07878, with the rotation of DRIVE, 2105.08339).

Each block of 4096 values is rotated (random signs, Walsh-Hadamard), after which its values look Gaussian whatever they were.
A rotated value becomes 0 or one of two levels: those of the three-level quantiser with the least squared error
for a Gaussian (Lloyd-Max: threshold 0.612 root mean squares), which keeps 81 % of an update's energy where signs keep
64 %. The level itself is the mean of what lies beyond the threshold, sent along as bfloat16. Five values share a byte.

Biased, so the way up needs error feedback. On the way down nothing makes up for what is lost.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from xcloud.codecs import _kernels as kernels
from xcloud.codecs._kernels import constant, jit
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes

__all__ = ["Ternary", "TernaryConfig"]

THRESHOLD = 0.612


@jit
def _encode(values: Any, seed: Any, threshold: float, out: Any) -> None:
    work, turned = np.empty(4096, np.float32), np.empty(4096, np.float32)
    lanes, one = np.empty(8, np.float64), np.empty(1, np.float32)
    at: Any = 0
    for block in range((values.size + 4095) // 4096):
        start = block * 4096
        count = min(4096, values.size - start)
        size = kernels._size(count)
        kernels._rotate(values, start, count, size, seed, block, work, turned)
        least = np.float32(threshold * np.sqrt(kernels._power(turned, 0, size, lanes) / size))
        beyond, total = 0, 0.0
        for i in range(size):
            if abs(turned[i]) > least:
                beyond += 1
                total += np.float64(abs(turned[i]))
        level = np.float32(total / max(1, beyond) / np.sqrt(size))
        scale = kernels._bf16_up(level, one)
        out[at], out[at + 1] = np.uint8(scale & np.uint16(255)), np.uint8(scale >> np.uint16(8))
        at += 2
        for first in range(0, size, 5):
            digits: Any = 0
            for j in range(4, -1, -1):
                value = turned[first + j] if first + j < size else np.float32(0.0)
                digits = 3 * digits + 1 + (value > least) - (value < -least)
            out[at] = np.uint8(digits)
            at += 1


@jit
def _decode(data: Any, seed: Any, out: Any) -> int:
    """-1, or the block that holds a byte which is no five ternary digits."""
    work, turned = np.empty(4096 + 5, np.float32), np.empty(4096, np.float32)
    one, bits, patterns = np.empty(1, np.float32), turned.view(np.uint32), out.view(np.uint32)
    at: Any = 0
    for block in range((out.size + 4095) // 4096):
        start = block * 4096
        count = min(4096, out.size - start)
        size = kernels._size(count)
        step = kernels._bf16(data[at], data[at + 1], one) * np.float32(1.0 / np.sqrt(size))
        at += 2
        for first in range(0, size, 5):
            number: Any = np.int64(data[at])
            if number > 242:
                return block
            at += 1
            for j in range(5):
                work[first + j] = np.float32(number % 3 - 1)
                number //= 3
        kernels._hadamard(work, turned, size)
        for i in range(count):
            turned[i] *= step
        kernels._signed(bits, 0, patterns[start : start + count], count, seed, block)
    return -1


class Ternary(Opened):
    """Rotated ternary values; see the module."""

    def __init__(self, feedback: float) -> None:
        self.feedback = feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        out = np.empty(self._bytes(values.size), np.uint8)
        _encode(constant(values.view(np.uint32)), np.uint64(frame.shared), THRESHOLD, out)
        return out

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        expect_bytes(data, self._bytes(length), length, "ternary digits with levels")
        out = np.empty(length, np.float32)
        bad = _decode(constant(data), np.uint64(frame.shared), out)
        if bad >= 0:
            raise ValueError(f"block {bad} holds a byte above 242, which is no five ternary digits")
        return out

    def _bytes(self, length: int) -> int:
        whole, rest = divmod(length, kernels.BLOCK)
        tail = kernels.slots(rest, rotated=True)
        return whole * (2 + -(-kernels.BLOCK // 5)) + (2 + -(-tail // 5) if rest else 0)


@CODECS.register
class TernaryConfig(CodecConfig):
    """`ternary`: 1.6 bits a value, rotated; for thin links, up and down.

    Attributes:
        feedback: share of the encoding error that the next update makes up for.
    """

    type: Literal["ternary"] = "ternary"
    feedback: Annotated[float, Field(ge=0, le=1)] = 1.0

    def build(self) -> Codec:
        return Ternary(self.feedback)

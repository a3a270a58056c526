"""Integers on one public grid, with Skellam noise: what a region sends where nobody may see its update, not even in a sum.

Each block of 4096 values is rotated (random signs, Walsh-Hadamard), divided by a step that is the same everywhere and
public, and rounded to the nearest integer; noise is added (`noise`: arXiv 2110.04995), and all of it is sent modulo 2^ring. Nothing in
front of the integers tells how large they are, and no scale comes from earlier data, so what is known of the sum is the noisy sum
and nothing else. Step and noise come from the job's `dp` (`privacy.skellam.plan_grid`) once the model's size is known: without
them a codec can add and no more, which is all that an aggregator does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from xcloud.codecs import _kernels as kernels
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, expect_bytes
from xcloud.codecs.ring import Ring, ring_add

__all__ = ["Grid", "GridConfig"]

Noise = Callable[[int], npt.NDArray[np.int64]]
"""Fresh noise for so many integers."""


class Grid:
    """See `GridConfig`.

    Args:
        bits: of the ring.
        step: what an integer is worth; None: nothing is encoded or decoded here.
        limit: the largest integer of one region before its noise.
        noise: that is added to each integer; None: none is.
    """

    linear = True
    feedback = 0.0

    def __init__(
        self, bits: Literal[16, 32], step: float | None = None, limit: int = 0, noise: Noise | None = None
    ) -> None:
        self.bits, self.step, self.limit, self.noise = bits, step, limit, noise
        self._unsigned = np.dtype(f"<u{bits // 8}")

    def calibrated(self, step: float, limit: int, noise: Noise | None) -> Grid:
        """The same ring with a step, and noise."""
        return Grid(self.bits, step, limit, noise)

    def ring(self, length: int, frame: Frame) -> Ring:
        del frame
        return Ring(kernels.slots(length, rotated=True) * self.bits // 8, 0, self.bits)

    def encode(self, values: Array, frame: Frame) -> Bytes:
        assert self.step is not None, "calibrated before anything is encoded"
        turned = [
            kernels.rotate(values[start : start + kernels.BLOCK], frame.shared, start // kernels.BLOCK)
            for start in range(0, values.size, kernels.BLOCK)
        ]
        integers = np.rint(np.concatenate([np.empty(0), *turned]) / self.step)
        whole = np.clip(integers, -self.limit, self.limit).astype(np.int64)
        if self.noise is not None:
            whole += self.noise(whole.size)
        return whole.astype(self._unsigned).view(np.uint8)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        assert self.step is not None, "calibrated before anything is decoded"
        expect_bytes(data, self.ring(length, frame).size, length, f"{self.bits}-bit integers")
        signed = data.view(self._unsigned).view(f"<i{self.bits // 8}")
        turned = signed.astype(np.float32) * np.float32(self.step)
        out = np.empty(length, np.float32)
        for start in range(0, length, kernels.BLOCK):
            part = out[start : start + kernels.BLOCK]
            size = kernels.slots(part.size, rotated=True)
            block = turned[start : start + size]
            part[:] = kernels.rotate_back(block, part.size, frame.shared, start // kernels.BLOCK)
        return out

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        del frame
        ring_add(total, other, self.bits)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        """None: its grid never changes."""
        del merged, total, contributors, frame
        return None


@CODECS.register
class GridConfig(CodecConfig):
    """`grid`: integers on one public grid, for `dp.mechanism: skellam`.

    Attributes:
        ring: bits of the ring. 16 do for some millions of parameters; 32 for any model and more noise.
    """

    type: Literal["grid"] = "grid"
    ring: Literal[16, 32] = 16

    def build(self) -> Codec:
        return Grid(self.ring)

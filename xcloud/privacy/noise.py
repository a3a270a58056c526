"""Random numbers that nobody can foresee or draw again: AES-256 in counter mode, from the system's entropy.

Noise that protects data must not come from the job's seed, which everybody knows, nor from a generator whose state a few
outputs give away or that is seeded with 32 bits, as torch's is on a CPU. The key never leaves the process and is never
saved: a run that is resumed, or a region that is restarted, draws a new one, so the same noise is never laid over
different data. Runs with noise are therefore not reproducible, by design.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["KEY_BYTES", "SecureRandom"]

KEY_BYTES = 32
BLOCK = 1 << 16


class SecureRandom:
    """One endless stream.

    Args:
        key: 32 bytes that give the stream; None: from the system. Two processes that need the same noise share one.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(KEY_BYTES) if key is None else key
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
        # A key serves one stream only, so the counter may start at zero.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        """Uniform 64-bit integers, shape [count]."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def seed(self) -> int:
        """A 63-bit seed for somebody else's generator."""
        return int(self.bits(1)[0] >> np.uint64(1))

    def poisson_sample(self, count: int, probability: float) -> npt.NDArray[np.int64]:
        """Which of `count` units are in: each independently with `probability`; int64, ascending."""
        if probability >= 1:
            return np.arange(count, dtype=np.int64)
        bound = np.uint64(int(probability * 2.0**64))  # rounded down: never more often than was accounted for
        found = [
            start + np.flatnonzero(self.bits(min(BLOCK, count - start)) < bound)
            for start in range(0, count, BLOCK)
        ]
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def normal(self, count: int) -> npt.NDArray[np.float32]:
        """Standard normal values by Box and Muller, computed in fp64; fp32, shape [count]."""
        out = np.empty(count, np.float32)
        for start in range(0, count, BLOCK):
            length = min(BLOCK, count - start)
            half = (length + 1) // 2
            uniform = (self.bits(2 * half) >> np.uint64(11)).astype(np.float64)
            radius = np.sqrt(
                -2.0 * np.log((uniform[:half] + 1.0) * 2.0**-53)
            )  # of (0, 1], so that it is finite
            angle = uniform[half:] * (2.0 * math.pi * 2.0**-53)
            out[start : start + half] = radius * np.cos(angle)
            out[start + half : start + length] = (radius * np.sin(angle))[: length - half]
        return out

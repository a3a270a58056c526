"""MB/s of fp32 update that each codec encodes, decodes and adds on one core, beside a copy of memory.

Chunks of one update go through a codec one after the other, as a rank's do, in one thread. Turns of all
codecs and of the copy alternate, and each figure is the median over turns. The data has blocks of very different
size, as layers have; public scales are those of the update itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Options, Result
from xcloud.codecs import CODECS, Array, Bytes, Codec, Frame

__all__ = ["run"]

CHUNK = 1 << 20
MEMBERS = 3
SETTINGS: list[dict[str, Any]] = [
    {"type": "identity"},
    {"type": "bf16"},
    *({"type": "fixed", "bits": bits} for bits in (8, 4, 2)),
    *({"type": "block", "bits": bits} for bits in (8, 4, 2)),
    {"type": "e3m0"},
    {"type": "sign"},
    {"type": "topk"},
    {"type": "sparse"},
    {"type": "random_k"},
    {"type": "random_k", "bits": 4},
]


def run(options: Options) -> Result:
    """Alternate turns of every codec and of a copy."""
    chunks, turns = (4, 3) if options.quick else (32, 7)
    numbers = np.random.default_rng(options.seed)
    update = [chunk_of(numbers) for _ in range(chunks)]
    target = np.empty_like(update[0])
    subjects = [Subject(settings, update) for settings in SETTINGS]
    copies: list[float] = []
    for _ in range(turns):
        copies.append(speed(lambda values: np.copyto(target, values), update))
        for subject in subjects:
            subject.turn()
    rows = [subject.row() for subject in subjects]
    named = {row["codec"]: row for row in rows}
    return Result(
        metrics={
            "memcpy_mb_per_s": statistics.median(copies),
            "fixed8_encode_mb_per_s": named["fixed 8"]["encode_mb_per_s"],
            "fixed8_decode_mb_per_s": named["fixed 8"]["decode_mb_per_s"],
            "topk_encode_mb_per_s": named["topk"]["encode_mb_per_s"],
            "topk_decode_mb_per_s": named["topk"]["decode_mb_per_s"],
        },
        targets={
            "fixed8_encode_mb_per_s": ">= 1000",
            "fixed8_decode_mb_per_s": ">= 1000",
            "topk_encode_mb_per_s": ">= 300",
            "topk_decode_mb_per_s": ">= 300",
        },
        rows=rows,
        notes=[
            f"{chunks} chunks of {CHUNK:,} fp32 values, {turns} turns, one thread; rings for {MEMBERS} regions"
        ],
    )


def chunk_of(numbers: np.random.Generator) -> Array:
    """One chunk of an update whose blocks differ in size."""
    scales = np.repeat(np.exp(numbers.normal(-7, 1.5, CHUNK // 4096)), 4096)
    values: Array = (numbers.standard_normal(CHUNK) * scales).astype(np.float32)
    return values


def speed(work: Callable[[Array], Any], update: list[Array]) -> float:
    """MB of fp32 update a second."""
    began = time.perf_counter()
    for values in update:
        work(values)
    return sum(values.nbytes for values in update) / (time.perf_counter() - began) / 1e6


class Subject:
    """One codec under measurement."""

    def __init__(self, settings: dict[str, Any], update: list[Array]) -> None:
        self.name = " ".join(str(value) for value in settings.values())
        self.codec: Codec = CODECS.parse(settings).build()
        self.update = update
        self.frames = [self._frame(number, values) for number, values in enumerate(update)]
        self.encode_s: list[float] = []
        self.decode_s: list[float] = []
        self.add_s: list[float] = []
        self.bytes = 0
        self.turn()  # compiles what has to be compiled
        self.encode_s, self.decode_s, self.add_s = [], [], []

    def _frame(self, number: int, values: Array) -> Frame:
        matrices = ((0, CHUNK // 1024, 1024),)
        first = Frame(shared=number, private=number, members=MEMBERS, matrices=matrices)
        scale = None
        if self.codec.linear:
            scale = self.codec.next_scale(values, self.codec.encode(values, first), 1, first)
        return Frame(shared=number, private=number, members=MEMBERS, matrices=matrices, scale=scale)

    def turn(self) -> None:
        """Encode, decode and add every chunk once."""
        self.encode_s.append(self._encode())
        self.decode_s.append(self._decode())
        if self.codec.linear:
            self.add_s.append(self._add())

    def _encode(self) -> float:
        began = time.perf_counter()
        pairs = zip(self.update, self.frames, strict=True)
        self.encoded: list[Bytes] = [self.codec.encode(values, frame) for values, frame in pairs]
        seconds = time.perf_counter() - began
        self.bytes = sum(data.nbytes for data in self.encoded)
        return self._rate(seconds)

    def _decode(self) -> float:
        began = time.perf_counter()
        for data, frame in zip(self.encoded, self.frames, strict=True):
            self.codec.decode(data, CHUNK, frame)
        return self._rate(time.perf_counter() - began)

    def _add(self) -> float:
        totals = [data.copy() for data in self.encoded]
        began = time.perf_counter()
        for total, data, frame in zip(totals, self.encoded, self.frames, strict=True):
            self.codec.add(total, data, frame)
        return self._rate(time.perf_counter() - began)

    def _rate(self, seconds: float) -> float:
        return 4 * CHUNK * len(self.update) / seconds / 1e6

    def row(self) -> dict[str, Any]:
        """Medians over turns."""
        return {
            "codec": self.name,
            "encode_mb_per_s": statistics.median(self.encode_s),
            "decode_mb_per_s": statistics.median(self.decode_s),
            "add_mb_per_s": statistics.median(self.add_s) if self.add_s else None,
            "bits_per_value": 8 * self.bytes / CHUNK / len(self.update),
            "linear": self.codec.linear,
        }

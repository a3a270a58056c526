"""MB/s of fp32 update that each codec encodes, decodes and adds on one core, beside a copy of memory.

Chunks of one update go through a codec one after the other, as a rank's do, in one thread, whose CPU time is what counts:
what else runs on the machine takes turns, not seconds. Turns of all
codecs and of the copy alternate, and each figure is the median over turns. The data has blocks of very different
size, as layers have; public scales are those of the update itself. `sparse` gets what it is for: the mean of three
regions' `topk` updates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Options, Result
from xcloud.codecs import CODECS, Array, Bytes, Codec, Frame, TopKConfig

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
    {"type": "ternary"},
    {"type": "topk"},
    *({"type": "sparse", "bits": bits} for bits in (8, 4, 2)),
    {"type": "random_k"},
    {"type": "random_k", "bits": 4},
    {"type": "lowrank"},
]
SUMMARY = ("codec", "encode_mb_per_s", "decode_mb_per_s")


def run(options: Options) -> Result:
    """Alternate turns of every codec and of a copy."""
    chunks, turns = (4, 3) if options.quick else (32, 7)
    numbers = np.random.default_rng(options.seed)
    update = [chunk_of(numbers) for _ in range(chunks)]
    mean = [mean_of_topk(numbers) for _ in range(chunks)]
    target = np.empty_like(update[0])
    subjects = [Subject(s, mean if s["type"] == "sparse" else update) for s in SETTINGS]
    subjects.append(Subject({"type": "lowrank"}, update, fresh=True))
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
            "rows": [{key: row[key] for key in SUMMARY} for row in rows],
            "fixed8_encode_mb_per_s": named["fixed 8"]["encode_mb_per_s"],
            "fixed8_decode_mb_per_s": named["fixed 8"]["decode_mb_per_s"],
            "topk_encode_mb_per_s": named["topk"]["encode_mb_per_s"],
            "topk_decode_mb_per_s": named["topk"]["decode_mb_per_s"],
            "random_k_encode_mb_per_s": named["random_k"]["encode_mb_per_s"],
            "lowrank_encode_mb_per_s": min(
                named[name]["encode_mb_per_s"] for name in ("lowrank", "lowrank first")
            ),
            "topk64_bits_up": named["topk"]["bits_per_value"],
            "topk64_bits_down": named["sparse 8"]["bits_per_value"],
            "topk64_bits_down_4": named["sparse 4"]["bits_per_value"],
            "topk64_bits_down_2": named["sparse 2"]["bits_per_value"],
        },
        targets={
            "fixed8_encode_mb_per_s": ">= 1000",
            "fixed8_decode_mb_per_s": ">= 1000",
            "topk_encode_mb_per_s": ">= 300",
            "topk_decode_mb_per_s": ">= 300",
            "random_k_encode_mb_per_s": ">= 1000",
            "lowrank_encode_mb_per_s": ">= 300",
            "topk64_bits_down": "<= 3 * topk64_bits_up",
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


def mean_of_topk(numbers: np.random.Generator) -> Array:
    """What goes down where three regions with nothing in common have sent their largest coordinates."""
    topk, mean = TopKConfig().build(), np.zeros(CHUNK, np.float32)
    for _ in range(MEMBERS):
        encoded = topk.encode(numbers.standard_normal(CHUNK, np.float32), Frame())
        mean += topk.decode(encoded, CHUNK, Frame()) / np.float32(MEMBERS)
    return mean


def speed(work: Callable[[Array], Any], update: list[Array]) -> float:
    """MB of fp32 update a second of CPU time."""
    began = time.thread_time()
    for values in update:
        work(values)
    return sum(values.nbytes for values in update) / (time.thread_time() - began) / 1e6


class Subject:
    """One codec under measurement."""

    def __init__(self, settings: dict[str, Any], update: list[Array], fresh: bool = False) -> None:
        """`fresh`: in its first sync, when it has no state; lowrank sends the other factor then."""
        self.name = " ".join(str(value) for value in settings.values()) + " first" * fresh
        self.fresh = fresh
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
        if self.codec.linear and not self.fresh:
            scale = self.codec.next_scale(values, self.codec.encode(values, first), 1, first)
        return Frame(shared=number, private=number, members=MEMBERS, matrices=matrices, scale=scale)

    def turn(self) -> None:
        """Encode, decode and add every chunk once."""
        self.encode_s.append(self._encode())
        self.decode_s.append(self._decode())
        if self.codec.linear:
            self.add_s.append(self._add())

    def _encode(self) -> float:
        began = time.thread_time()
        pairs = zip(self.update, self.frames, strict=True)
        self.encoded: list[Bytes] = [self.codec.encode(values, frame) for values, frame in pairs]
        seconds = time.thread_time() - began
        self.bytes = sum(data.nbytes for data in self.encoded)
        return self._rate(seconds)

    def _decode(self) -> float:
        began = time.thread_time()
        for data, frame in zip(self.encoded, self.frames, strict=True):
            self.codec.decode(data, CHUNK, frame)
        return self._rate(time.thread_time() - began)

    def _add(self) -> float:
        totals = [data.copy() for data in self.encoded]
        began = time.thread_time()
        for total, data, frame in zip(totals, self.encoded, self.frames, strict=True):
            self.codec.add(total, data, frame)
        return self._rate(time.thread_time() - began)

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

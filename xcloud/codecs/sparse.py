"""Sparse codecs: a few coordinates of each block of 4096 values.

`topk` is SparseLoCo's way up (arXiv 2508.15706): in each block the `k` largest magnitudes, indices in 12
bits, values in 2 (a sign, and which of two bins; a bin decodes to its mean); what is left out
stays in the residual. Blocks are runs of the flat chunk, for matrices too (the paper cuts those into 64 x 64 tiles).
`sparse` is its way down: the mean of several such updates, coordinates exact, their gaps in Rice codes (about 6 bits each
for three regions), values in 8, 4 or 2 bits.
`random_k` sends the same coordinates from every region, drawn with a shared seed, so its encodings add. The draw is
stratified: one coordinate of each run of about 1 / fraction, which takes no sorting and one pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from xcloud.codecs._kernels import _draw, _hash, constant, jit
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, Opened, expect_bytes
from xcloud.codecs.fixed import FixedConfig
from xcloud.codecs.plain import Identity
from xcloud.codecs.ring import Ring, ring_of

__all__ = ["RandomK", "RandomKConfig", "Sparse", "SparseConfig", "TopK", "TopKConfig"]

BLOCK = 4096


@jit
def _kept(count: int, k: int) -> int:
    """Coordinates kept of a block of `count` values: `k` of 4096, at least 1."""
    return max(1, (k * count + 4095) // 4096)


@jit
def _threshold(bits: Any, count: int, k: int, histogram: Any) -> Any:
    """The k-th largest of `bits[:count]`, and how many are larger: a radix selection in three passes."""
    prefix, wanted = np.uint32(0), k
    shifts = (np.uint32(20), np.uint32(9), np.uint32(0))
    sizes = (2048, 2048, 512)
    for level in range(3):
        shift, size = shifts[level], sizes[level]
        histogram[:size] = 0
        above = np.uint32(shift + (np.uint32(11) if level < 2 else np.uint32(9)))
        for i in range(count):
            if level == 0 or (bits[i] >> above) == prefix:
                histogram[(bits[i] >> shift) & np.uint32(size - 1)] += 1
        digit = size - 1
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= 1
        prefix = np.uint32((prefix << (np.uint32(11) if level < 2 else np.uint32(9))) | np.uint32(digit))
    return prefix, k - wanted


@jit
def _bfloat16(x: Any, one: Any) -> Any:
    """Rounded to nearest, ties to even, as 16 bits."""
    one[0] = x
    pattern = one.view(np.uint32)[0]
    return np.uint16(
        (pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@jit
def _from_bfloat16(low: Any, high: Any, one: Any) -> Any:
    one.view(np.uint32)[0] = (np.uint32(low) | (np.uint32(high) << np.uint32(8))) << np.uint32(16)
    return one[0]


@jit
def _put12(out: Any, start: int, position: int, value: int) -> None:
    """Write the 12-bit integer number `position` of a run that starts at byte `start` and is zero."""
    at = start + position // 2 * 3
    if position % 2 == 0:
        out[at] = np.uint8(value & 255)
        out[at + 1] |= np.uint8(value >> 8)
    else:
        out[at + 1] |= np.uint8((value & 15) << 4)
        out[at + 2] = np.uint8(value >> 4)


@jit
def _get12(data: Any, start: int, position: int) -> Any:
    at = start + position // 2 * 3
    if position % 2 == 0:
        return np.int64(data[at]) | ((np.int64(data[at + 1]) & 15) << 8)
    return (np.int64(data[at + 1]) >> 4) | (np.int64(data[at + 2]) << 4)


@jit
def _encode_topk(values: Any, patterns: Any, k: int, out: Any) -> None:
    bits, histogram = np.empty(4096, np.uint32), np.empty(2048, np.int64)
    chosen, one = np.empty(4096, np.int64), np.empty(1, np.float32)
    at = 0
    for start in range(0, values.size, 4096):
        count = min(4096, values.size - start)
        kept = _kept(count, k)
        for i in range(count):
            bits[i] = patterns[start + i] & np.uint32(0x7FFFFFFF)
        least, larger = _threshold(bits, count, kept, histogram)
        ties, held, total = kept - larger, 0, 0.0
        for i in range(count):
            if bits[i] > least or (bits[i] == least and ties > 0):
                if bits[i] == least:
                    ties -= 1
                chosen[held] = i
                held += 1
                total += np.float64(abs(values[start + i]))
        middle = np.float32(total / kept)
        low_sum, low_count, high_sum, high_count = 0.0, 0, 0.0, 0
        indices = at + 4
        codes = indices + (12 * kept + 7) // 8
        for position in range(kept):
            value = values[start + chosen[position]]
            size = abs(value)
            code = np.uint8(value < np.float32(0.0))
            if size > middle:
                code |= np.uint8(2)
                high_sum += np.float64(size)
                high_count += 1
            else:
                low_sum += np.float64(size)
                low_count += 1
            _put12(out, indices, position, chosen[position])
            out[codes + position // 4] |= np.uint8(code << np.uint8(2 * (position % 4)))
        low = _bfloat16(np.float32(low_sum / max(1, low_count)), one)
        high = _bfloat16(np.float32(high_sum / max(1, high_count)), one)
        out[at], out[at + 1] = np.uint8(low & np.uint16(255)), np.uint8(low >> np.uint16(8))
        out[at + 2], out[at + 3] = np.uint8(high & np.uint16(255)), np.uint8(high >> np.uint16(8))
        at = codes + (2 * kept + 7) // 8


@jit
def _add_topk(data: Any, k: int, weight: Any, out: Any) -> int:
    """Adds to `out`. -1, or the block in which an index makes no sense."""
    one = np.empty(1, np.float32)
    at = 0
    for start in range(0, out.size, 4096):
        count = min(4096, out.size - start)
        kept = _kept(count, k)
        low, high = (
            _from_bfloat16(data[at], data[at + 1], one),
            _from_bfloat16(data[at + 2], data[at + 3], one),
        )
        indices = at + 4
        codes = indices + (12 * kept + 7) // 8
        before = -1
        for position in range(kept):
            index = _get12(data, indices, position)
            if index <= before or index >= count:
                return start // 4096
            before = index
            code = (data[codes + position // 4] >> np.uint8(2 * (position % 4))) & np.uint8(3)
            size = high if code & np.uint8(2) else low
            out[start + index] += weight * (-size if code & np.uint8(1) else size)
        at = codes + (2 * kept + 7) // 8
    return -1


class TopK(Opened):
    """The largest coordinates of each block."""

    def __init__(self, k: int, feedback: float) -> None:
        self.k, self.feedback = k, feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        out = np.zeros(self._bytes(values.size), np.uint8)
        _encode_topk(constant(values), constant(values.view(np.uint32)), self.k, out)
        return out

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        out = np.zeros(length, np.float32)
        self.accumulate(data, np.float32(1), out, frame)
        return out

    def accumulate(self, data: Bytes, weight: np.float32, out: Array, frame: Frame) -> None:
        """Only the coordinates that were sent are touched."""
        del frame
        expect_bytes(data, self._bytes(out.size), out.size, f"top {self.k} of each {BLOCK}")
        bad = _add_topk(constant(data), self.k, weight, out)
        if bad >= 0:
            raise ValueError(f"block {bad} holds indices that are not in order or outside of it")

    def _bytes(self, length: int) -> int:
        whole, rest = divmod(length, BLOCK)
        return whole * _block_bytes(BLOCK, self.k) + (_block_bytes(rest, self.k) if rest else 0)


def _block_bytes(count: int, k: int) -> int:
    kept = max(1, -(-k * count // BLOCK))
    return 4 + (12 * kept + 7) // 8 + (2 * kept + 7) // 8


@jit
def _rice(count: int, held: int) -> int:
    """Low bits of a gap that Rice coding sends as they are, for gaps that average `count` / `held`."""
    low = 0
    while 100 * (held << (low + 1)) <= 69 * count:
        low += 1
    return low


@jit
def _put_gaps(chosen: Any, held: int, low: int, out: Any, start: int) -> Any:
    """Rice codes from byte `start` on, which is zero: gap >> low zeros, a one, the low bits. Bytes written."""
    bit: Any = 0
    before: Any = -1
    for position in range(held):
        gap = chosen[position] - before - 1
        before = chosen[position]
        bit += gap >> low
        out[start + bit // 8] |= np.uint8(1 << (bit % 8))
        bit += 1
        for j in range(low):
            out[start + bit // 8] |= np.uint8(((gap >> j) & 1) << (bit % 8))
            bit += 1
    return (bit + 7) // 8


@jit
def _get_gaps(data: Any, start: int, held: int, low: int, count: int, chosen: Any) -> Any:
    """The inverse: bytes read, or -1 where they end too early or an index is `count` or more."""
    bit, index, end = 0, -1, 8 * (data.size - start)
    for position in range(held):
        upper = 0
        while bit < end and not (data[start + bit // 8] >> np.uint8(bit % 8)) & np.uint8(1):
            bit += 1
            upper += 1
        bit += 1
        if bit + low > end:
            return -1
        gap: Any = upper << low
        for j in range(low):
            gap |= np.int64((data[start + bit // 8] >> np.uint8(bit % 8)) & np.uint8(1)) << j
            bit += 1
        index += gap + 1
        if index >= count:
            return -1
        chosen[position] = index
    return (bit + 7) // 8


@jit
def _binned(sizes: Any, held: int, levels: int, bins: Any, means: Any) -> None:
    """Split `sizes` at their mean, the parts at theirs, and so on: the bin of each, and the bins' means."""
    counts = np.empty(means.size, np.int64)
    bins[:held] = 0
    for level in range(levels + 1):
        means[: 1 << level], counts[: 1 << level] = 0.0, 0
        for i in range(held):
            means[bins[i]] += sizes[i]
            counts[bins[i]] += 1
        for part in range(1 << level):
            means[part] /= max(1, counts[part])
        if level < levels:
            for i in range(held):
                bins[i] = 2 * bins[i] + (sizes[i] > means[bins[i]])


@jit
def _put_number(out: Any, at: int, x: Any, one: Any) -> Any:
    """bfloat16 at byte `at`; what it decodes to."""
    number = _bfloat16(x, one)
    out[at], out[at + 1] = np.uint8(number & np.uint16(255)), np.uint8(number >> np.uint16(8))
    return _from_bfloat16(out[at], out[at + 1], one)


@jit
def _encode_sparse(values: Any, bits: int, out: Any) -> Any:
    """Bytes written. `out` is zero."""
    one, chosen, bins = np.empty(1, np.float32), np.empty(4096, np.int64), np.empty(4096, np.int64)
    sizes, means = np.empty(4096, np.float64), np.empty(1 << (bits - 1), np.float64)
    at: Any = 0
    for start in range(0, values.size, 4096):
        count = min(4096, values.size - start)
        held, top = 0, np.float32(0.0)
        for i in range(count):
            value = values[start + i]
            chosen[held] = i
            held += value != np.float32(0.0)
            top = max(top, abs(value))
        out[at], out[at + 1] = np.uint8(held & 255), np.uint8(held >> 8)
        at += 2
        if held == 0:
            continue
        if bits == 8:
            top = _put_number(out, at, top, one)
            at += 2
            factor = np.float32(127.0) / top if top > np.float32(0.0) else np.float32(0.0)
            for position in range(held):
                level = np.rint(values[start + chosen[position]] * factor)
                level = min(max(level, np.float32(-127.0)), np.float32(127.0))
                out[at + position] = np.uint8(np.int8(level))
        else:
            for position in range(held):
                sizes[position] = np.float64(abs(values[start + chosen[position]]))
            _binned(sizes, held, bits - 1, bins, means)
            for part in range(1 << (bits - 1)):
                _put_number(out, at, np.float32(means[part]), one)
                at += 2
            for position in range(held):
                code = 2 * bins[position] + (values[start + chosen[position]] < np.float32(0.0))
                bit = position * bits
                out[at + bit // 8] |= np.uint8(code << (bit % 8))
        at += (held * bits + 7) // 8
        at += _put_gaps(chosen, held, _rice(count, held), out, at)
    return at


@jit
def _decode_sparse(data: Any, bits: int, out: Any) -> Any:
    """Bytes read, or -1 for what makes no sense."""
    one, chosen = np.empty(1, np.float32), np.empty(4096, np.int64)
    means = np.empty(1 << (bits - 1), np.float32)
    front = 2 if bits == 8 else 2 << (bits - 1)
    at: Any = 0
    for start in range(0, out.size, 4096):
        count = min(4096, out.size - start)
        if at + 2 > data.size:
            return -1
        held: Any = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
        at += 2
        if held == 0:
            continue
        body = at + front
        places = body + (held * bits + 7) // 8
        if held > count or places > data.size:
            return -1
        read = _get_gaps(data, places, held, _rice(count, held), count, chosen)
        if read < 0:
            return -1
        if bits == 8:
            step = _from_bfloat16(data[at], data[at + 1], one) / np.float32(127.0)
            for position in range(held):
                out[start + chosen[position]] = np.float32(np.int8(data[body + position])) * step
        else:
            for part in range(1 << (bits - 1)):
                means[part] = _from_bfloat16(data[at + 2 * part], data[at + 2 * part + 1], one)
            for position in range(held):
                bit = position * bits
                code = (data[body + bit // 8] >> np.uint8(bit % 8)) & np.uint8((1 << bits) - 1)
                size = means[code >> np.uint8(1)]
                out[start + chosen[position]] = -size if code & np.uint8(1) else size
        at = places + read
    return at


class Sparse(Opened):
    """The coordinates that are not zero; see `SparseConfig`."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        # At most: a length, means, codes, and gaps, which take 4848 bits where Rice coding is at its worst.
        most = -(-values.size // BLOCK) * (2 + 16 + 640) + (values.size * self.bits + 7) // 8
        out = np.zeros(most, np.uint8)
        return out[: _encode_sparse(constant(values), self.bits, out)].copy()

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        out = np.zeros(length, np.float32)
        if _decode_sparse(constant(data), self.bits, out) != data.size:
            raise ValueError(f"{data.nbytes} bytes are not the sparse encoding of {length} values")
        return out


@jit
def _gather(values: Any, seed: Any, out: Any) -> None:
    """One value of each of `out.size` runs whose lengths differ by 1 at most."""
    draw = _draw(seed, 0)
    key, salt = np.uint32(draw), np.uint32(draw >> np.uint64(32))
    base, more = values.size // out.size, values.size % out.size
    start, owed = 0, 0
    for run in range(out.size):
        owed += more
        size = base + np.int64(owed >= out.size)
        owed -= out.size if owed >= out.size else 0
        out[run] = values[start + ((np.uint64(_hash(run, key, salt)) * np.uint64(size)) >> np.uint64(32))]
        start += size


@jit
def _scatter(drawn: Any, seed: Any, scaled: bool, out: Any) -> None:
    """The inverse, into zeros; `scaled`: times the length of the run, so that the expected value is the value."""
    draw = _draw(seed, 0)
    key, salt = np.uint32(draw), np.uint32(draw >> np.uint64(32))
    base, more = out.size // drawn.size, out.size % drawn.size
    start, owed = 0, 0
    for run in range(drawn.size):
        owed += more
        size = base + np.int64(owed >= drawn.size)
        owed -= drawn.size if owed >= drawn.size else 0
        factor = np.float32(size) if scaled else np.float32(1.0)
        at = start + ((np.uint64(_hash(run, key, salt)) * np.uint64(size)) >> np.uint64(32))
        out[at] = drawn[run] * factor
        start += size


class RandomK:
    """Coordinates that a shared seed draws anew for every sync."""

    linear = True

    def __init__(self, fraction: float, values: Codec, feedback: float) -> None:
        self.fraction, self.values, self.feedback = fraction, values, feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        return self.values.encode(self._drawn(values, frame), frame)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        drawn = self.values.decode(data, self._count(length), frame)
        out = np.zeros(length, np.float32)
        # With feedback what was not drawn is sent later; without, the drawn stand for the others.
        _scatter(
            constant(np.require(drawn, requirements="A")), np.uint64(frame.shared), not self.feedback, out
        )
        return out

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        self.values.add(total, other, frame)

    def ring(self, length: int, frame: Frame) -> Ring | None:
        return ring_of(self.values, self._count(length), frame)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        return self.values.next_scale(self._drawn(merged, frame), total, contributors, frame)

    def _count(self, length: int) -> int:
        return min(length, max(1, round(length * self.fraction)))

    def _drawn(self, values: Array, frame: Frame) -> Array:
        """One value of each run: which, the shared seed alone says."""
        out = np.empty(self._count(values.size), np.float32)
        _gather(constant(values), np.uint64(frame.shared), out)
        return out


@CODECS.register
class TopKConfig(CodecConfig):
    """`topk`: for thin links; use `sparse` as the downlink.

    Attributes:
        k: coordinates kept of each 4096.
        feedback: decay of the residual.
    """

    type: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=BLOCK)] = 64
    feedback: Annotated[float, Field(ge=0, le=1)] = 0.95

    def build(self) -> Codec:
        return TopK(self.k, self.feedback)


@CODECS.register
class SparseConfig(CodecConfig):
    """`sparse`: for the way down, when the ways up are sparse.

    Attributes:
        bits: of each value. 8: integers in units of the block's largest; 4 and 2: a sign and one of 8 or 2 bins,
            split at means, which decode to their mean.
    """

    type: Literal["sparse"] = "sparse"
    bits: Literal[8, 4, 2] = 8

    def build(self) -> Codec:
        return Sparse(self.bits)


@CODECS.register
class RandomKConfig(CodecConfig):
    """`random_k`: a random share of the coordinates, the same from all regions, so that encodings add.

    Attributes:
        fraction: of the coordinates that is sent.
        bits: send them as `fixed` integers; null: as fp32.
        feedback: share of what was not sent that the next update makes up for; 0: scale up instead.
    """

    type: Literal["random_k"] = "random_k"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    bits: Literal[8, 4, 2] | None = None
    feedback: Annotated[float, Field(ge=0, le=1)] = 1.0

    def build(self) -> Codec:
        values = Identity() if self.bits is None else FixedConfig(bits=self.bits).build()
        return RandomK(self.fraction, values, self.feedback)

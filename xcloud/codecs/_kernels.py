"""Compiled loops of the integer codecs: rotation, rounding, bit packing and addition of packed streams.

Compiled by numba on first use and cached on disk. They run without Python's lock and without
reordering of floating-point operations: every machine gets the same bits. Everything happens
one block of at most 4096 values at a time, in a few scratch buffers that fit the cache.

Rotation: random signs, then a Walsh-Hadamard transform. A full block is a 64 x 64 matrix X and becomes
H X^T H, which is H4096 of the vector with its indices' upper and lower six bits swapped: the order of a
rotated block's values means nothing, and the inverse is the same transform. Both are left unnormalised;
the factor goes into the scale. A block shorter than 4096 has the size of the next power of two.

Packing: value i of a stream of w-bit integers takes the bits from i * w on, in little-endian bit order.
A full block takes 512 * w bytes, so every block starts at a whole byte.

Randomness: hashes of (seed, block, index), never of the order of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from xcloud.codecs.base import Array, Bytes

__all__ = [
    "BLOCK",
    "E3M0_STEPS",
    "LEVEL_BYTES",
    "LEVEL_ONE",
    "MAX_WIDTH",
    "blocks",
    "constant",
    "decode_e3m0",
    "decode_integers",
    "decode_sign",
    "encode_e3m0",
    "encode_integers",
    "encode_sign",
    "jit",
    "packed_add",
    "packed_bytes",
    "rms",
    "rotate",
    "slots",
]

BLOCK = 4096
MAX_WIDTH = 16
LEVEL_BYTES = 4
"""In front of integers with public steps: each block's mean square, as a 32-bit integer that adds."""
LEVEL_ONE = 1 << 16
"""The level of a block whose root mean square is the clipping range."""
E3M0_STEPS = 7
"""Magnitudes besides 0 that three exponent bits tell apart."""

Words = npt.NDArray[np.uint32]
F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Numba's decorator, typed as one that changes nothing."""
    compiled: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    return cast(F, compiled)


def constant(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view: what comes from the wire is one, and kernels are compiled for one kind only."""
    view = array.view()
    view.flags.writeable = False
    return view


def blocks(length: int) -> int:
    """Blocks that `length` values fall into."""
    return -(-length // BLOCK)


def slots(length: int, rotated: bool) -> int:
    """Integers on the wire for `length` values: rotation fills the last block to a power of two."""
    rest = length % BLOCK
    return length - rest + (1 << (rest - 1).bit_length()) if rotated and rest else length


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` integers of `width` bits take."""
    return (count * width + 7) // 8


@jit
def _mix(x: Any) -> Any:
    """The finaliser of splitmix64: 64 well-mixed bits of a counter."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def _draw(seed: Any, counter: Any) -> Any:
    """64 bits of (seed, counter)."""
    return _mix(_mix(np.uint64(seed)) + (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


@jit
def _hash(index: Any, low: Any, high: Any) -> Any:
    """32 bits of (key, index); two 32-bit multiplications, so that loops over it run in SIMD."""
    x = np.uint32(np.uint32(index) * np.uint32(0x9E3779B9))
    x = np.uint32(x ^ low)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x + high)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@jit
def _copy(source: Any, out: Any) -> None:
    """All of `source` to the front of `out`: two arrays from their starts, a loop that runs in SIMD."""
    for i in range(source.size):
        out[i] = source[i]


@jit
def _columns(a: Any) -> None:
    """H64 on each column of a 64 x 64 matrix: two radix-8 passes whose inner loops run along the rows."""
    for r in range(8):
        for c in range(64):
            i = r * 64 + c
            x0, x1, x2, x3 = a[i], a[i + 512], a[i + 1024], a[i + 1536]
            x4, x5, x6, x7 = a[i + 2048], a[i + 2560], a[i + 3072], a[i + 3584]
            y0, y1, y2, y3, y4, y5, y6, y7 = (
                x0 + x4,
                x1 + x5,
                x2 + x6,
                x3 + x7,
                x0 - x4,
                x1 - x5,
                x2 - x6,
                x3 - x7,
            )
            x0, x1, x2, x3, x4, x5, x6, x7 = (
                y0 + y2,
                y1 + y3,
                y0 - y2,
                y1 - y3,
                y4 + y6,
                y5 + y7,
                y4 - y6,
                y5 - y7,
            )
            a[i], a[i + 512], a[i + 1024], a[i + 1536] = x0 + x1, x0 - x1, x2 + x3, x2 - x3
            a[i + 2048], a[i + 2560], a[i + 3072], a[i + 3584] = x4 + x5, x4 - x5, x6 + x7, x6 - x7
    for g in range(8):
        for c in range(64):
            i = g * 512 + c
            x0, x1, x2, x3 = a[i], a[i + 64], a[i + 128], a[i + 192]
            x4, x5, x6, x7 = a[i + 256], a[i + 320], a[i + 384], a[i + 448]
            y0, y1, y2, y3, y4, y5, y6, y7 = (
                x0 + x4,
                x1 + x5,
                x2 + x6,
                x3 + x7,
                x0 - x4,
                x1 - x5,
                x2 - x6,
                x3 - x7,
            )
            x0, x1, x2, x3, x4, x5, x6, x7 = (
                y0 + y2,
                y1 + y3,
                y0 - y2,
                y1 - y3,
                y4 + y6,
                y5 + y7,
                y4 - y6,
                y5 - y7,
            )
            a[i], a[i + 64], a[i + 128], a[i + 192] = x0 + x1, x0 - x1, x2 + x3, x2 - x3
            a[i + 256], a[i + 320], a[i + 384], a[i + 448] = x4 + x5, x4 - x5, x6 + x7, x6 - x7


@jit
def _hadamard(work: Any, out: Any, size: int) -> None:
    """The unnormalised transform of `work[:size]` in `out`; `work` is used up."""
    if size == 4096:
        _columns(work)
        for i in range(0, 64, 8):
            for j in range(64):
                for k in range(8):
                    out[j * 64 + i + k] = work[(i + k) * 64 + j]
        _columns(out)
        return
    for i in range(size):
        out[i] = work[i]
    half = 1
    while half < size:
        for start in range(0, size, 2 * half):
            for i in range(start, start + half):
                one, other = out[i], out[i + half]
                out[i], out[i + half] = one + other, one - other
        half *= 2


@jit
def _signed(source: Any, start: int, out: Any, count: int, seed: Any, block: int) -> None:
    """Copy fp32 bit patterns and flip the signs that (seed, block) says."""
    for first in range(0, count, 32):
        word = np.uint32(_draw(seed, block * 128 + first // 32))
        if first + 32 <= count:
            for j in range(32):
                sign = np.uint32((word >> np.uint32(j)) << np.uint32(31))
                out[first + j] = source[start + first + j] ^ sign
        else:
            for j in range(count - first):
                sign = np.uint32((word >> np.uint32(j)) << np.uint32(31))
                out[first + j] = source[start + first + j] ^ sign


@jit
def _size(count: int) -> int:
    size = 1
    while size < count:
        size *= 2
    return size


@jit
def _rotate(
    values: Any, start: int, count: int, size: int, seed: Any, block: int, work: Any, out: Any
) -> None:
    """Signs, zeros up to `size`, transform; from bit patterns to floats in `out`."""
    _signed(values, start, work.view(np.uint32), count, seed, block)
    for i in range(count, size):
        work[i] = np.float32(0.0)
    _hadamard(work, out, size)


@jit
def _quantise(
    values: Any,
    size: int,
    factor: Any,
    limit: int,
    seed: Any,
    block: int,
    stochastic: bool,
    mask: Any,
    out: Any,
) -> None:
    """Integers in two's complement, saturated at `limit` on both sides."""
    offset = np.float32(limit + 1)
    low, high = np.float32(1.0), np.float32(2 * limit + 1)
    back = np.int32(limit + 1)
    mask = np.uint32(mask)
    if stochastic:
        draw = _draw(seed, block)
        key, salt = np.uint32(draw), np.uint32(draw >> np.uint64(32))
        for i in range(size):
            u = np.float32(np.int32(_hash(i, key, salt) >> np.uint32(8))) * np.float32(5.9604645e-08)
            t = values[i] * factor + (u + offset)
            t = t if t > low else low
            t = t if t < high else high
            out[i] = np.uint32(np.int32(t) - back) & mask
    else:
        middle = offset + np.float32(0.5)
        for i in range(size):
            t = values[i] * factor + middle
            t = t if t > low else low
            t = t if t < high else high
            out[i] = np.uint32(np.int32(t) - back) & mask


@jit
def _pack(integers: Any, count: int, width: int, words: Any, out: Any, start: int) -> None:
    """Write `count` integers of `width` bits from byte `start` on. Uses up to 3 integers beyond them."""
    if width == 8:
        part = out[start : start + count]
        for i in range(count):
            part[i] = np.uint8(integers[i])
        return
    for i in range(count, (count + 3) // 4 * 4):
        integers[i] = np.uint32(0)
    one, two, three = np.uint64(width), np.uint64(2 * width), np.uint64(3 * width)
    bits = 4 * width
    acc, fill, k = np.uint64(0), 0, 0
    for i in range(0, count, 4):
        quad = np.uint64(integers[i]) | (np.uint64(integers[i + 1]) << one)
        quad |= (np.uint64(integers[i + 2]) << two) | (np.uint64(integers[i + 3]) << three)
        acc |= quad << np.uint64(fill)
        fill += bits
        if fill >= 64:
            words[k] = acc
            k += 1
            fill -= 64
            acc = quad >> np.uint64(bits - fill) if fill else np.uint64(0)
    words[k] = acc
    stream = words.view(np.uint8)
    size = (count * width + 7) // 8
    _copy(stream[:size], out[start : start + size])


@jit
def _unpack(data: Any, start: int, count: int, width: int, words: Any, out: Any) -> None:
    """Read `count` integers of `width` bits as floats. Writes up to 3 beyond them."""
    if width == 8:
        part = data[start : start + count]
        for i in range(count):
            out[i] = np.float32(np.int8(part[i]))
        return
    stream = words.view(np.uint8)
    size = (count * width + 7) // 8
    _copy(data[start : start + size], stream)
    half = np.uint64(1 << (width - 1))
    mask = np.uint64((1 << width) - 1)
    one, two, three = np.uint64(width), np.uint64(2 * width), np.uint64(3 * width)
    offset = np.int32(1 << (width - 1))
    for i in range(0, count, 4):
        bit = i * width
        k, shift = bit >> 6, np.uint64(bit & 63)
        quad = (words[k] >> shift) | ((words[k + 1] << np.uint64(1)) << (np.uint64(63) - shift))
        out[i] = np.float32(np.int32((quad & mask) ^ half) - offset)
        out[i + 1] = np.float32(np.int32(((quad >> one) & mask) ^ half) - offset)
        out[i + 2] = np.float32(np.int32(((quad >> two) & mask) ^ half) - offset)
        out[i + 3] = np.float32(np.int32(((quad >> three) & mask) ^ half) - offset)


@jit
def _largest(values: Any, size: int) -> Any:
    top = np.float32(0.0)
    for i in range(size):
        x = abs(values[i])
        top = x if x > top else top
    return top


@jit
def _power(values: Any, start: int, count: int, lanes: Any) -> Any:
    """Sum of squares in a fixed order: eight sums side by side, then from left to right."""
    for j in range(8):
        lanes[j] = 0.0
    whole = count // 8 * 8
    for i in range(start, start + whole, 8):
        for j in range(8):
            x = np.float64(values[i + j])
            lanes[j] += x * x
    total = 0.0
    for j in range(8):
        total += lanes[j]
    for i in range(start + whole, start + count):
        x = np.float64(values[i])
        total += x * x
    return total


@jit
def _put_level(out: Any, block: int, mean_square: Any) -> None:
    """In units of the squared range, rounded up: only zeros have level 0. At most 16 ranges: 256 regions fit 32 bits."""
    top = np.float64(1 << 24)
    level = np.ceil(mean_square * np.float64(65536.0))
    whole = np.uint32(level if level < top else top)
    for j in range(4):
        out[4 * block + j] = np.uint8((whole >> np.uint32(8 * j)) & np.uint32(255))


@jit
def _bf16_up(x: Any, bits: Any) -> Any:
    """The smallest bfloat16 that is not below `x` >= 0, as its 16 bits. `bits`: scratch of one fp32."""
    bits[0] = x
    return np.uint16((bits.view(np.uint32)[0] + np.uint32(0xFFFF)) >> np.uint32(16))


@jit
def _bf16(low: Any, high: Any, bits: Any) -> Any:
    bits.view(np.uint32)[0] = (np.uint32(low) | (np.uint32(high) << np.uint32(8))) << np.uint32(16)
    return bits[0]


@jit
def _encode(
    values: Any, steps: Any, spread: Any, limit: int, width: int, rotated: bool, stochastic: bool,
    shared: Any, private: Any, out: Any,
) -> None:  # fmt: skip
    length = values.size
    own = steps.size == 0
    count_blocks = (length + 4095) // 4096
    body = (2 if own else 4) * count_blocks
    work, turned = np.empty(4096, np.float32), np.empty(4096, np.float32)
    integers, words = np.empty(4096 + 3, np.uint32), np.empty(1024 + 1, np.uint64)
    lanes, one = np.empty(8, np.float64), np.empty(1, np.float32)
    mask = np.uint32((1 << width) - 1)
    for block in range(count_blocks):
        start = block * 4096
        count = min(4096, length - start)
        size = _size(count) if rotated else count
        if rotated:
            _rotate(values, start, count, size, shared, block, work, turned)
        else:
            bits = turned.view(np.uint32)
            for i in range(count):
                bits[i] = values[start + i]
        norm = np.float32(1.0 / np.sqrt(size)) if rotated else np.float32(1.0)
        if own:
            top = _largest(turned, size) * norm
            if spread > 0.0:
                clip = np.float32(spread * np.sqrt(_power(turned, 0, size, lanes) / size)) * norm
                top = clip if clip < top else top
            scale = _bf16_up(top, one)
            out[2 * block] = np.uint8(scale & np.uint16(255))
            out[2 * block + 1] = np.uint8(scale >> np.uint16(8))
            top = _bf16(out[2 * block], out[2 * block + 1], one)
            tiny = np.float32(1e-30)
            factor = np.float32(limit) / (top if top > tiny else tiny) * norm
        else:
            factor = norm / steps[block]
            share = np.float64(factor) / limit
            _put_level(out, block, _power(turned, 0, size, lanes) / size * share * share)
        _quantise(turned, size, factor, limit, private, block, stochastic, mask, integers)
        _pack(integers, size, width, words, out, body + block * 512 * width)


@jit
def _decode(
    data: Any, steps: Any, limit: int, width: int, rotated: bool, shared: Any, length: int, out: Any
) -> None:
    own = steps.size == 0
    count_blocks = (length + 4095) // 4096
    body = (2 if own else 4) * count_blocks
    work, turned = np.empty(4096 + 3, np.float32), np.empty(4096, np.float32)
    words, one = np.empty(1024 + 1, np.uint64), np.empty(1, np.float32)
    bits = turned.view(np.uint32)
    patterns = out.view(np.uint32)
    for block in range(count_blocks):
        start = block * 4096
        count = min(4096, length - start)
        size = _size(count) if rotated else count
        if own:
            step = _bf16(data[2 * block], data[2 * block + 1], one) / np.float32(limit)
        else:
            step = steps[block]
        _unpack(data, body + block * 512 * width, size, width, words, work)
        if rotated:
            step *= np.float32(1.0 / np.sqrt(size))
            _hadamard(work, turned, size)
            for i in range(count):
                turned[i] *= step
            _signed(bits, 0, patterns[start : start + count], count, shared, block)
        else:
            for i in range(count):
                out[start + i] = work[i] * step


@jit
def _add(total: Any, other: Any, width: int) -> None:
    """Add as one long integer in which no field carries into the next.

    The top bit of each field is left out of the sum, so that what the rest carries ends there, and is
    then set right by exclusive or. `tops` repeats after 64 fields, which are `width` words.
    """
    tops = np.zeros(width, np.uint64)
    for field in range(64):
        bit = field * width + width - 1
        tops[bit >> 6] |= np.uint64(1) << np.uint64(bit & 63)
    span = 8 * width
    group = max(1, 4096 // span)
    mine, theirs = np.zeros(group * width, np.uint64), np.zeros(group * width, np.uint64)
    mine_bytes, their_bytes = mine.view(np.uint8), theirs.view(np.uint8)
    for start in range(0, total.size, group * span):
        size = min(group * span, total.size - start)
        part = total[start : start + size]
        _copy(part, mine_bytes)
        _copy(other[start : start + size], their_bytes)
        k, count = 0, (size + 7) // 8
        while k < count:
            carry = np.uint64(0)
            for j in range(min(width, count - k)):
                top = tops[j]
                a, b = mine[k + j], theirs[k + j]
                x = (a & ~top) + carry
                y = b & ~top
                low = x + y
                carry = np.uint64(low < y)
                mine[k + j] = low ^ ((a ^ b) & top)
            k += width
        _copy(mine_bytes[:size], part)


@jit
def _rms(values: Any) -> Any:
    return np.sqrt(_power(values, 0, values.size, np.empty(8, np.float64)) / max(1, values.size))


@jit
def _encode_e3m0(values: Any, block_size: int, seed: Any, out: Any) -> None:
    length = values.size
    count_blocks = (length + block_size - 1) // block_size
    body = 2 * count_blocks
    one = np.empty(1, np.float32)
    y = np.empty(block_size, np.float32)
    bits = y.view(np.uint32)
    codes = np.zeros(block_size + 1, np.uint32)
    for block in range(count_blocks):
        start = block * block_size
        count = min(block_size, length - start)
        scale = _bf16_up(_largest(values[start : start + count], count), one)
        out[2 * block] = np.uint8(scale & np.uint16(255))
        out[2 * block + 1] = np.uint8(scale >> np.uint16(8))
        top = _bf16(out[2 * block], out[2 * block + 1], one)
        draw = _draw(seed, block)
        key, salt = np.uint32(draw), np.uint32(draw >> np.uint64(32))
        divisor = top if top > np.float32(0.0) else np.float32(1.0)
        for i in range(count):
            y[i] = values[start + i] / divisor
        for i in range(count):
            sign = np.uint32(bits[i] >> np.uint32(31))
            size = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
            random = np.uint32(_hash(i, key, salt) >> np.uint32(9))
            # Above the smallest step the mantissa is the share of the way to the next power of two: adding
            # 23 random bits carries into the exponent with just that probability. 121 is 2^-6's exponent.
            normal = np.int32((size + random) >> np.uint32(23)) - np.int32(120)
            small = np.int32(np.float32(np.int32(random)) < abs(y[i]) * np.float32(64.0 * 8388608.0))
            code = normal if size >= np.uint32(121 << 23) else small
            code = code if code < np.int32(7) else np.int32(7)
            codes[i] = np.uint32(code) | np.uint32(sign << np.uint32(3))
        codes[count] = np.uint32(0)
        first = body + start // 2
        for i in range((count + 1) // 2):
            out[first + i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << np.uint32(4)))


@jit
def _decode_e3m0(data: Any, block_size: int, out: Any) -> None:
    length = out.size
    count_blocks = (length + block_size - 1) // block_size
    body = 2 * count_blocks
    one = np.empty(1, np.float32)
    table = np.empty(16, np.float32)
    for block in range(count_blocks):
        start = block * block_size
        count = min(block_size, length - start)
        top = _bf16(data[2 * block], data[2 * block + 1], one)
        table[0] = table[8] = np.float32(0.0)
        for code in range(7, 0, -1):
            table[code], table[code + 8] = top, -top
            top *= np.float32(0.5)
        first = body + start // 2
        for i in range(count // 2):
            pair = data[first + i]
            out[start + 2 * i] = table[pair & np.uint8(15)]
            out[start + 2 * i + 1] = table[pair >> np.uint8(4)]
        if count % 2:
            out[start + count - 1] = table[data[first + count // 2] & np.uint8(15)]


@jit
def _encode_sign(values: Any, bits: Any, block_size: int, scales: Any, out: Any) -> None:
    length = values.size
    lanes = np.empty(8, np.float64)
    for block in range(scales.size):
        start = block * block_size
        count = min(block_size, length - start)
        for j in range(8):
            lanes[j] = 0.0
        whole = count // 8 * 8
        for i in range(start, start + whole, 8):
            for j in range(8):
                lanes[j] += np.float64(abs(values[i + j]))
        for i in range(whole, count):
            lanes[i - whole] += np.float64(abs(values[start + i]))
        total = 0.0
        for j in range(8):
            total += lanes[j]
        scales[block] = np.float32(total / count)
        for i in range(whole // 8):
            byte = np.uint32(0)
            at = start + 8 * i
            for j in range(8):
                byte = np.uint32(byte | ((bits[at + j] >> np.uint32(31)) << np.uint32(j)))
            out[start // 8 + i] = np.uint8(byte)
        if whole < count:
            byte = np.uint32(0)
            for j in range(count - whole):
                byte = np.uint32(byte | ((bits[start + whole + j] >> np.uint32(31)) << np.uint32(j)))
            out[(start + whole) // 8] = np.uint8(byte)


@jit
def _decode_sign(data: Any, scales: Any, block_size: int, out: Any) -> None:
    """`out` and `scales` as bit patterns of fp32: a sign bit is set, nothing is computed."""
    length = out.size
    for block in range(scales.size):
        start = block * block_size
        count = min(block_size, length - start)
        scale = np.uint32(scales[block])
        for i in range(count // 8):
            byte = np.uint32(data[start // 8 + i])
            for j in range(8):
                out[start + 8 * i + j] = scale | np.uint32((byte >> np.uint32(j)) << np.uint32(31))
        for i in range(count // 8 * 8, count):
            byte = np.uint32(data[(start + i) // 8])
            out[start + i] = scale | np.uint32((byte >> np.uint32(i % 8)) << np.uint32(31))


def rotate(values: Array, seed: int, block: int = 0) -> Array:
    """One block, rotated and normalised."""
    size = slots(values.size, rotated=True)
    work, out = np.empty(size, np.float32), np.empty(size, np.float32)
    bits = constant(values.view(np.uint32))
    _rotate(bits, 0, values.size, size, np.uint64(seed), block, work, out)
    return out / np.float32(np.sqrt(size))


def rotate_back(turned: Array, count: int, seed: int, block: int = 0) -> Array:
    """The inverse of `rotate`, of the first `count` values."""
    work, out = turned.copy(), np.empty(turned.size, np.float32)
    _hadamard(work, out, turned.size)
    out /= np.float32(np.sqrt(turned.size))
    found = np.empty(count, np.float32)
    _signed(out.view(np.uint32), 0, found.view(np.uint32), count, np.uint64(seed), block)
    return found


def encode_integers(
    values: Array,
    steps: Array | None,
    limit: int,
    width: int,
    *,
    rotated: bool,
    stochastic: bool,
    shared: int,
    private: int,
    spread: float = 0.0,
) -> Bytes:
    """Integers of at most `limit` each, packed.

    Args:
        steps: what an integer of each block is worth, and each block's level goes in front; None: each block's own
            scale goes in front, as bfloat16.
        spread: an own scale is at most this many times the root mean square; 0: the largest magnitude.
    """
    count = slots(values.size, rotated)
    own = np.empty(0, np.float32) if steps is None else steps
    front = (2 if steps is None else LEVEL_BYTES) * blocks(values.size)
    out = np.empty(front + packed_bytes(count, width), np.uint8)
    bits = constant(values.view(np.uint32))
    _encode(
        bits, constant(own), float(spread), limit, width, rotated, stochastic,
        np.uint64(shared), np.uint64(private), out,
    )  # fmt: skip
    return out


def decode_integers(
    data: Bytes, length: int, steps: Array | None, limit: int, width: int, *, rotated: bool, shared: int
) -> Array:
    """The inverse of `encode_integers`, of one encoding or of a total."""
    out = np.empty(length, np.float32)
    own = np.empty(0, np.float32) if steps is None else steps
    _decode(constant(data), constant(own), limit, width, rotated, np.uint64(shared), length, out)
    return out


def packed_add(total: Bytes, other: Bytes, width: int) -> None:
    """Add two streams of `width`-bit integers modulo 2^width, in place."""
    _add(total, constant(other), width)


def rms(values: Array) -> float:
    """Root mean square, summed in an order that no machine changes."""
    return float(_rms(constant(values)))


def encode_e3m0(values: Array, block: int, seed: int) -> Bytes:
    """Scales as bfloat16, then four bits a value."""
    out = np.empty(2 * -(-values.size // block) + (values.size + 1) // 2, np.uint8)
    _encode_e3m0(constant(values), block, np.uint64(seed), out)
    return out


def decode_e3m0(data: Bytes, block: int, length: int) -> Array:
    """The inverse of `encode_e3m0`."""
    out = np.empty(length, np.float32)
    _decode_e3m0(constant(data), block, out)
    return out


def encode_sign(values: Array, block: int) -> Bytes:
    """Scales as fp32, then one bit a value, set where it is negative."""
    count = -(-values.size // block)
    scales, signs = np.empty(count, np.float32), np.empty(packed_bytes(values.size, 1), np.uint8)
    _encode_sign(constant(values), constant(values.view(np.uint32)), block, scales, signs)
    return np.concatenate([scales.view(np.uint8), signs])


def decode_sign(data: Bytes, block: int, length: int) -> Array:
    """The inverse of `encode_sign`."""
    out = np.empty(length, np.float32)
    front = 4 * -(-length // block)
    scales = data[:front].copy().view(np.uint32)  # wherever in a message the bytes lie, these are aligned
    _decode_sign(constant(data[front:]), constant(scales), block, out.view(np.uint32))
    return out

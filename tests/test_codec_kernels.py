"""The compiled loops, beside the same thing said plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from xcloud.codecs import _kernels as kernels


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("size", [1, 2, 8, 1024, 4096])
def test_a_rotation_is_a_signed_hadamard_transform(size: int) -> None:
    """Up to the order of a full block's values, which means nothing."""
    columns = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    turned = np.stack([kernels.rotate(values, seed=5) for values in columns])
    signs = np.sign(kernels.rotate(np.eye(1, size, 0, dtype=np.float32)[0], seed=5)[0])
    assert signs in (-1.0, 1.0)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(columns, axis=1), rtol=1e-5)
    np.testing.assert_allclose(turned @ turned.T, columns @ columns.T, atol=1e-3)  # orthogonal
    flat = np.abs(kernels.rotate(np.eye(1, size, size // 2, dtype=np.float32)[0], seed=5))
    np.testing.assert_allclose(flat, size**-0.5, rtol=1e-5)  # each unit vector goes to a row of +-1
    matrix = hadamard(size) / np.sqrt(size)
    if size < 4096:
        unit = np.stack([kernels.rotate(row, seed=5) for row in np.eye(size, dtype=np.float32)[:16]])
        np.testing.assert_allclose(np.abs(unit @ matrix.T).max(axis=1), 1.0, rtol=1e-4)


@quick
@given(data=st.data(), width=st.integers(2, kernels.MAX_WIDTH), count=st.integers(1, 9000))
def test_packed_addition_is_addition_of_integers(data: st.DataObject, width: int, count: int) -> None:
    """Every field modulo 2^width, and no field touches its neighbour."""
    size = kernels.packed_bytes(count, width)
    numbers = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    one, other = (numbers.integers(0, 256, size, dtype=np.uint8) for _ in range(2))
    expected = [(a + b) % (1 << width) for a, b in zip(fields(one, width), fields(other, width), strict=True)]
    total = one.copy()
    kernels.packed_add(total, other, width)
    assert fields(total, width)[:count] == expected[:count]


def fields(stream: np.ndarray, width: int) -> list[int]:
    """The integers of a packed stream, by Python's own arithmetic."""
    bits = np.unpackbits(stream, bitorder="little")
    whole = bits[: len(bits) // width * width].reshape(-1, width).astype(np.int64)
    return [int(value) for value in whole @ (1 << np.arange(width))]


@quick
@given(
    seed=st.integers(0, 2**64 - 1),
    length=st.integers(1, 9000),
    bits=st.sampled_from([2, 4, 8]),
    rotated=st.booleans(),
)
def test_integers_come_back(seed: int, length: int, bits: int, rotated: bool) -> None:
    """Nearest rounding is off by half a step, unless the value lies outside the range."""
    limit = (1 << (bits - 1)) - 1
    values = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    steps = np.full(kernels.blocks(length), 8 / limit, np.float32)  # 8: beyond what a rotation makes of these
    encoded = kernels.encode_integers(
        values, steps, limit, bits, rotated=rotated, stochastic=False, shared=seed, private=0
    )
    decoded = kernels.decode_integers(encoded, length, steps, limit, bits, rotated=rotated, shared=seed)
    off = np.linalg.norm(decoded - values) / np.sqrt(kernels.slots(length, rotated))
    assert off <= 0.5 * 8 / limit * 1.01


def test_rounding_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)

    def encoded(private: int) -> bytes:
        return kernels.encode_integers(
            values, None, 7, 4, rotated=True, stochastic=True, shared=1, private=private
        ).tobytes()

    assert encoded(1) == encoded(1)
    assert encoded(1) != encoded(2)

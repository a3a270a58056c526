"""The sparse codecs beside the same thing said plainly, and on bytes that almost make sense."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Array, quick
from xcloud.codecs import CODECS, Codec, Frame

BITS = [8, 4, 2]


def codec(name: str, **settings: object) -> Codec:
    return CODECS.parse({"type": name, **settings}).build()  # type: ignore[no-any-return]


def top(values: Array, k: int) -> Array:
    """Blocks sorted by magnitude, then by index; a bin is as large as its mean."""
    out = np.zeros_like(values)
    for start in range(0, values.size, 4096):
        block = values[start : start + 4096]
        kept = np.sort(np.argsort(-np.abs(block), kind="stable")[: max(1, -(-k * block.size // 4096))])
        sizes = np.abs(block[kept]).astype(np.float64)
        high = sizes > np.float32(sizes.mean())
        for part in (high, ~high):
            if part.any():
                out[start + kept[part]] = np.where(block[kept[part]] < 0, -1, 1) * sizes[part].mean()
    return out


@quick
@given(
    length=st.integers(1, 9000),
    k=st.sampled_from([1, 64, 1000, 4096]),
    seed=st.integers(0, 99),
    levels=st.integers(1, 300),
)
def test_topk_is_a_stable_sort(length: int, k: int, seed: int, levels: int) -> None:
    """Few levels: most magnitudes tie, and the lower index wins."""
    values = np.random.default_rng(seed).integers(-levels, levels + 1, length).astype(np.float32)
    one = codec("topk", k=k)
    decoded = one.decode(one.encode(values, Frame()), length, Frame())
    np.testing.assert_allclose(decoded, top(values, k), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["topk", "sparse", "random_k"])
def test_zeros_stay_zeros(name: str) -> None:
    values = np.zeros(9001, np.float32)
    decoded = codec(name).decode(codec(name).encode(values, Frame()), values.size, Frame())
    assert not decoded.any()


@pytest.mark.parametrize("name", ["topk", "sparse"])
@quick
@given(data=st.data(), length=st.integers(1, 9000), seed=st.integers(0, 99))
def test_damaged_bytes_are_a_vector_or_an_error(
    name: str, data: st.DataObject, length: int, seed: int
) -> None:
    """A true encoding with a few bytes changed, cut off or added gets further than noise does."""
    numbers = np.random.default_rng(seed)
    values = numbers.standard_normal(length).astype(np.float32)
    values[numbers.random(length) < data.draw(st.sampled_from([0.0, 0.95, 0.999]))] = 0
    damaged = codec(name).encode(values, Frame()).copy()
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, damaged.size - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(max(0, damaged.size - 3), damaged.size))]
    damaged = np.append(damaged, np.zeros(data.draw(st.integers(0, 3)), np.uint8))
    try:
        decoded = codec(name).decode(damaged, length, Frame())
    except ValueError:
        return
    assert decoded.shape == (length,)


def test_indices_out_of_order_are_refused() -> None:
    values = np.zeros(100, np.float32)
    values[[3, 70]] = [1.0, -1.0]
    one = codec("topk", k=82)  # 82 of 4096: 3 of 100
    encoded = one.encode(values, Frame()).copy()
    encoded[4:7] = [3, 0x30, 0]  # 3 and again 3
    with pytest.raises(ValueError):
        one.decode(encoded, 100, Frame())
    encoded[4:7] = [3, 0x40, 6]  # 3 and 100
    with pytest.raises(ValueError):
        one.decode(encoded, 100, Frame())


@pytest.mark.parametrize("bits", BITS)
def test_indices_beyond_the_block_and_gaps_without_end_are_refused(bits: int) -> None:
    values = np.zeros(100, np.float32)
    values[[3, 99]] = [1.0, -1.0]
    one = codec("sparse", bits=bits)
    encoded = one.encode(values, Frame())
    with pytest.raises(ValueError):
        one.decode(encoded, 99, Frame())
    endless = encoded.copy()
    endless[-2:] = 0
    with pytest.raises(ValueError):
        one.decode(endless, 100, Frame())


def binned(sizes: Array, levels: int) -> Array:
    """Split at the mean, again and again; each part's mean."""
    if levels and sizes.size:
        out, high = np.empty(sizes.size), sizes > sizes.mean()
        out[high], out[~high] = binned(sizes[high], levels - 1), binned(sizes[~high], levels - 1)
        return out
    return np.full(sizes.size, sizes.mean() if sizes.size else 0.0)


@quick
@given(
    length=st.integers(1, 9000),
    bits=st.sampled_from([4, 2]),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.001, 0.05, 0.5, 1.0]),
)
def test_sparse_values_are_means_of_bins_at_their_places(
    length: int, bits: int, seed: int, share: float
) -> None:
    numbers = np.random.default_rng(seed)
    values = numbers.standard_normal(length).astype(np.float32) * (numbers.random(length) < share)
    expected = np.zeros(length)
    for start in range(0, length, 4096):
        held = start + np.flatnonzero(values[start : start + 4096])
        expected[held] = np.sign(values[held]) * binned(np.abs(values[held]).astype(np.float64), bits - 1)
    one = codec("sparse", bits=bits)
    decoded = one.decode(one.encode(values, Frame()), length, Frame())
    np.testing.assert_allclose(decoded, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("late", [False, True])
def test_any_number_of_coordinates_fits(bits: int, late: bool) -> None:
    """With all of them at the end of a block the first gap is at its longest."""
    one, values = codec("sparse", bits=bits), np.zeros(4096, np.float32)
    for held in [*range(64), *range(64, 4097, 21), 4096]:
        values[:] = 0
        values[np.linspace(0, 4095, held).astype(int) if not late else slice(4096 - held, None)] = 1.0
        encoded = one.encode(values, Frame())
        assert np.array_equal(one.decode(encoded, 4096, Frame()), values)
        gaps = encoded.nbytes - 2 - (2 if bits == 8 else 2 << (bits - 1)) - -(-held * bits // 8)
        assert gaps <= 606

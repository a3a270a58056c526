"""What every codec promises, checked on all of them.

A new codec needs an entry in `ERROR` (how far a decoded value may be off) and, if it claims to be
linear, in `ADD` (how its encodings are summed under masks).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Array, quick, vectors
from xcloud.codecs import CODECS, Codec, Identity

Bytes = npt.NDArray[np.uint8]

# The largest absolute error of any element of a decoded vector.
ERROR: dict[str, Callable[[Array], float]] = {"identity": lambda values: 0.0}

# The sum of two encodings, as an aggregator adds them without decoding.
ADD: dict[str, Callable[[Bytes, Bytes], Bytes]] = {
    "identity": lambda one, other: (one.view(np.float32) + other.view(np.float32)).view(np.uint8)
}

every_codec = pytest.mark.parametrize("name", CODECS.names)


def codec(name: str) -> Codec:
    """The codec with its default settings."""
    return CODECS.parse(name).build()  # type: ignore[no-any-return]


@every_codec
@quick
@given(values=vectors())
def test_what_was_encoded_comes_back(name: str, values: Array) -> None:
    encoded = codec(name).encode(values.copy())
    decoded = codec(name).decode(encoded, values.size)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    assert np.abs(decoded.astype(np.float64) - values).max(initial=0.0) <= ERROR[name](values)


@every_codec
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 127, 128, 129, 1021, 65_537])
def test_odd_lengths(name: str, length: int) -> None:
    values = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    decoded = codec(name).decode(codec(name).encode(values), length)
    assert np.abs(decoded - values).max(initial=0.0) <= ERROR[name](values)


@every_codec
def test_encodings_are_plain_bytes(name: str) -> None:
    """One flat uint8 vector: `nbytes` is exactly what crosses the wire."""
    encoded = codec(name).encode(np.linspace(-1, 1, 37, dtype=np.float32))
    assert encoded.dtype == np.uint8
    assert encoded.ndim == 1
    assert encoded.flags.c_contiguous
    assert encoded.nbytes == len(encoded.tobytes())


@every_codec
@quick
@given(values=vectors())
def test_the_same_values_give_the_same_bytes(name: str, values: Array) -> None:
    assert codec(name).encode(values.copy()).tobytes() == codec(name).encode(values.copy()).tobytes()


@every_codec
def test_a_buffer_from_the_wire_is_read_only(name: str) -> None:
    values = np.linspace(-1, 1, 37, dtype=np.float32)
    encoded = np.frombuffer(codec(name).encode(values).tobytes(), np.uint8)
    assert np.abs(codec(name).decode(encoded, 37) - values).max() <= ERROR[name](values)


@every_codec
def test_encoding_leaves_the_values_alone(name: str) -> None:
    values = np.linspace(-1, 1, 37, dtype=np.float32)
    before = values.copy()
    codec(name).decode(codec(name).encode(values), 37)
    assert values.tobytes() == before.tobytes()


@every_codec
@pytest.mark.parametrize("length", [1, 8, 37])
def test_bytes_of_another_length_are_refused(name: str, length: int) -> None:
    encoded = codec(name).encode(np.ones(length, np.float32))
    for wrong in (encoded[:-1], np.append(encoded, np.uint8(0)), encoded[:0]):
        with pytest.raises(ValueError, match=str(wrong.nbytes)):
            codec(name).decode(wrong, length)
    for other in (0, length - 1, length + 1, 2 * length):
        if codec(name).encode(np.ones(other, np.float32)).nbytes != encoded.nbytes:
            with pytest.raises(ValueError, match=str(other)):
                codec(name).decode(encoded, other)


@pytest.mark.parametrize("name", [name for name in CODECS.names if codec(name).linear])
@quick
@given(pair=st.integers(1, 33).flatmap(lambda n: st.tuples(*[vectors(st.just(n))] * 2)))
def test_the_sum_of_encodings_decodes_to_the_encoding_of_the_sum(
    name: str, pair: tuple[Array, Array]
) -> None:
    one, other = pair
    summed = ADD[name](codec(name).encode(one), codec(name).encode(other))
    direct = codec(name).decode(codec(name).encode(one + other), one.size)
    assert codec(name).decode(summed, one.size).tobytes() == direct.tobytes()


def test_identity_is_four_little_endian_bytes_a_value() -> None:
    values = np.array([1.0, -2.0, np.nan, np.inf, 1e-45], np.float32)
    encoded = Identity().encode(values)
    assert encoded.tobytes() == values.astype("<f4").tobytes()
    assert np.shares_memory(encoded, values)
    assert Identity().decode(encoded, 5).tobytes() == values.tobytes()

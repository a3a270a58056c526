"""What every codec promises, checked on all of them.

A new codec needs entries in `ERROR` (how far a decoded chunk may be off, as a share of its norm) and `BYTES`
(what it takes on the wire).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Array, built, quick, vectors
from xcloud.codecs import CODECS, Bytes, Codec, Frame, Identity

SETTINGS: dict[str, dict[str, Any]] = {name: {"type": name} for name in CODECS.names} | {
    "fixed 8": {"type": "fixed", "bits": 8},
    "fixed 2": {"type": "fixed", "bits": 2},
    "fixed nearest": {"type": "fixed", "rotate": False, "rounding": "nearest"},
    "block 4": {"type": "block", "bits": 4},
    "block 2": {"type": "block", "bits": 2, "rotate": False},
    "sparse 4": {"type": "sparse", "bits": 4},
    "sparse 2": {"type": "sparse", "bits": 2},
    "topk all": {"type": "topk", "k": 4096},
    "topk kept": {"type": "topk", "k": 256, "feedback": 1.0},
    "random_k unbiased": {"type": "random_k", "feedback": 0.0},
    "random_k 4": {"type": "random_k", "bits": 4},
}
LENGTHS = [0, 1, 2, 3, 7, 127, 128, 129, 1021, 4095, 4096, 4097, 12_289, 65_537]


def padded(length: int) -> int:
    """Values on the wire of a rotated chunk: the last block is filled to a power of two."""
    rest = length % 4096
    return length - rest + (2 ** math.ceil(math.log2(rest)) if rest else 0)


def matrices(length: int) -> tuple[tuple[int, int, int], ...]:
    """What of a chunk is a matrix, where it is long enough."""
    return ((3, 60, 40), (2500, 16, 99)) if length >= 4095 else ()


def levels(length: int) -> int:
    """Bytes in front of fixed point."""
    return 4 * math.ceil(length / 4096)


def cuts(length: int) -> list[int]:
    """Sizes of a chunk's blocks."""
    return [4096] * (length // 4096) + [length % 4096] * (length % 4096 > 0)


def top(length: int, k: int) -> int:
    """Bytes of a top-k chunk."""
    kept = [max(1, math.ceil(k * count / 4096)) for count in cuts(length)]
    return sum(4 + math.ceil(12 * n / 8) + math.ceil(2 * n / 8) for n in kept)


def drawn(length: int, fraction: float = 0.25) -> int:
    """Coordinates that random_k sends."""
    return min(length, max(1, round(fraction * length)))


# Relative to the chunk's norm, for values that are about normal; None: the codec is all about its residual.
ERROR: dict[str, float | None] = {
    "identity": 0.0,
    "bf16": 2**-8,
    "fixed": 0.4,
    "fixed 8": 0.05,
    "fixed 2": None,
    "fixed nearest": 0.3,
    "block": 0.05,
    "block 4": 0.6,
    "block 2": None,
    "e3m0": 0.6,
    "sign": 1.0,
    "ternary": 0.5,
    "topk": 1.0,
    "topk all": 1.0,
    "topk kept": 1.0,
    "sparse": 0.05,
    "sparse 4": 0.2,
    "sparse 2": 0.6,
    "random_k": 1.0,
    "random_k unbiased": None,
    "random_k 4": None,
    "lowrank": 1.0,
    "grid": 0.05,
}

BYTES: dict[str, Callable[[int], int]] = {
    "identity": lambda n: 4 * n,
    "bf16": lambda n: 2 * n,
    "fixed": lambda n: math.ceil(padded(n) * 6 / 8) + levels(n),  # 3 regions x 7 need 6 bits
    "fixed 8": lambda n: math.ceil(padded(n) * 10 / 8) + levels(n),
    "fixed 2": lambda n: math.ceil(padded(n) * 3 / 8) + levels(n),
    "fixed nearest": lambda n: math.ceil(n * 6 / 8) + levels(n),
    "block": lambda n: padded(n) + 2 * math.ceil(n / 4096),
    "block 4": lambda n: math.ceil(padded(n) / 2) + 2 * math.ceil(n / 4096),
    "block 2": lambda n: math.ceil(n / 4) + 2 * math.ceil(n / 4096),
    "e3m0": lambda n: math.ceil(n / 2) + 2 * math.ceil(n / 256),
    "sign": lambda n: math.ceil(n / 8) + 4 * math.ceil(n / 4096),
    "ternary": lambda n: sum(2 + math.ceil(padded(c) / 5) for c in cuts(n)),
    "topk": lambda n: top(n, 64),
    "topk all": lambda n: top(n, 4096),
    "topk kept": lambda n: top(n, 256),
    "random_k": lambda n: 4 * drawn(n),
    "random_k unbiased": lambda n: 4 * drawn(n),
    "random_k 4": lambda n: math.ceil(padded(drawn(n)) * 6 / 8) + levels(drawn(n)),
    "grid": lambda n: 2 * padded(n),
    "lowrank": lambda n: 4 * (n - sum(r * c - 4 * c for _, r, c in matrices(n))),  # after P comes Q
}

UNBIASED = ["fixed 8", "block", "block 4", "block 2", "e3m0", "random_k unbiased"]

every_codec = pytest.mark.parametrize("name", SETTINGS)
LINEAR = [name for name, settings in SETTINGS.items() if CODECS.parse(settings).build().linear]
FED_BACK = [name for name, settings in SETTINGS.items() if CODECS.parse(settings).build().feedback == 1]
"""A feedback below 1 forgets on purpose."""


def codec(name: str) -> Codec:
    """The codec with one of its settings."""
    return built(SETTINGS[name])


def frame_of(name: str, values: Array, private: int = 1) -> Frame:
    """A frame whose public state comes from the values themselves."""
    first = Frame(shared=9, members=3, matrices=matrices(values.size))
    scale = None
    if values.size and codec(name).linear:
        scale = codec(name).next_scale(values, codec(name).encode(values, first), 1, first)
    return replace(first, private=private, scale=scale)


def normal(length: int, seed: int = 0) -> Array:
    """An update with blocks of different size."""
    numbers = np.random.default_rng([seed, length])
    scales = np.repeat(np.exp(numbers.normal(-7, 1, length // 4096 + 1)), 4096)[:length]
    return (numbers.standard_normal(length) * scales).astype(np.float32)


def through(name: str, values: Array, frame: Frame) -> Array:
    """There and back."""
    return codec(name).decode(codec(name).encode(values, frame), values.size, frame)


def test_every_codec_is_tested() -> None:
    assert {s["type"] for s in SETTINGS.values()} == set(CODECS.names)
    assert set(ERROR) == set(SETTINGS)
    assert set(SETTINGS) - set(BYTES) == {
        "sparse",
        "sparse 4",
        "sparse 2",
    }  # as many as it needs: tested below


@every_codec
@quick
@given(values=vectors())
def test_any_finite_values_come_back_finite(name: str, values: Array) -> None:
    values = np.clip(values, -1e30, 1e30)
    decoded = through(name, values, frame_of(name, values))
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    assert np.isfinite(decoded).all()


@every_codec
@pytest.mark.parametrize("length", LENGTHS)
def test_error_bound(name: str, length: int) -> None:
    values, bound = normal(length), ERROR[name]
    decoded = through(name, values, frame_of(name, values))
    assert decoded.shape == values.shape
    if bound is not None and length >= 127:  # a bound on the norm says little of a few values
        assert np.linalg.norm(decoded - values) <= bound * np.linalg.norm(values) * (1 + 1e-6)


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_on_the_wire_are_the_bytes_counted(name: str, length: int) -> None:
    encoded = codec(name).encode(normal(length), frame_of(name, normal(length)))
    assert encoded.dtype == np.uint8
    assert encoded.ndim == 1
    assert encoded.flags.c_contiguous
    assert encoded.nbytes == len(encoded.tobytes()) == (BYTES[name](length) if length else 0)


@every_codec
def test_the_same_values_give_the_same_bytes(name: str) -> None:
    values = normal(5000)
    frame = frame_of(name, values)
    assert codec(name).encode(values.copy(), frame).tobytes() == codec(name).encode(values, frame).tobytes()


@every_codec
def test_buffers_are_only_read(name: str) -> None:
    values = normal(5000)
    values.flags.writeable = False
    frame = frame_of(name, values)
    encoded = np.frombuffer(codec(name).encode(values, frame).tobytes(), np.uint8)
    again = codec(name).decode(encoded, values.size, frame)
    assert again.tobytes() == through(name, values, frame).tobytes()


@every_codec
@pytest.mark.parametrize("length", [1, 8, 37, 5000])
def test_bytes_of_another_length_are_refused(name: str, length: int) -> None:
    values = normal(length)
    frame = frame_of(name, values)
    encoded = codec(name).encode(values, frame)
    for wrong in (encoded[:-1], np.append(encoded, np.uint8(0)), encoded[:0]):
        with pytest.raises(ValueError, match=str(wrong.nbytes)):
            codec(name).decode(wrong, length, frame)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name: str) -> None:
    """The mean over many private (or, for random_k, shared) seeds comes to the values."""
    values, tries = normal(300), 600
    total, first = np.zeros(values.size), frame_of(name, values)
    for seed in range(tries):
        shared = seed if name.startswith("random_k") else 9
        total += through(name, values, replace(first, shared=shared, private=seed))
    once = np.linalg.norm(through(name, values, frame_of(name, values)) - values)
    assert np.linalg.norm(total / tries - values) < 3 * once / math.sqrt(tries) + 1e-9


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("length", [1, 33, 4096, 9001])
def test_encodings_add(name: str, length: int) -> None:
    """The total of three encodings decodes to the sum of what they decode to; the ring never wraps."""
    one = codec(name)
    sent = [normal(length, seed) * np.float32(50) ** seed for seed in range(3)]
    frames = [replace(frame_of(name, sent[0]), private=seed) for seed in range(3)]
    encoded = [one.encode(values, frame) for values, frame in zip(sent, frames, strict=True)]
    total = encoded[0].copy()
    for other in encoded[1:]:
        one.add(total, other, frames[0])
    expected = sum(one.decode(e, length, f).astype(np.float64) for e, f in zip(encoded, frames, strict=True))
    found = one.decode(total, length, frames[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - set(LINEAR)))
def test_what_does_not_add_says_so(name: str) -> None:
    encoded = codec(name).encode(normal(10), Frame())
    with pytest.raises(TypeError, match="not linear"):
        codec(name).add(encoded.copy(), encoded, Frame())


@pytest.mark.parametrize("name", FED_BACK)
def test_error_feedback_sends_all_in_the_end(name: str) -> None:
    """What is decoded over the rounds of a constant update comes ever closer to what was meant."""
    update, one = normal(5000), codec(name)
    residual, got, off = np.zeros_like(update), np.zeros(update.size), []
    scale = None
    for number in range(1, 161):
        frame = Frame(
            shared=number, private=number, members=3, matrices=((0, 60, 80),), scale=scale, typical=1e-3
        )
        wanted = update + np.float32(one.feedback) * residual
        encoded = one.encode(wanted, frame)
        decoded = one.decode(encoded, update.size, frame)
        residual = wanted - decoded
        scale = one.next_scale(decoded, encoded, 1, frame) if one.linear else None
        got += decoded
        off.append(np.linalg.norm(got / number - update) / np.linalg.norm(update))
    assert off[-1] < off[39]
    assert off[-1] < 0.25, off[-1]


@quick
@given(data=st.binary(max_size=300), length=st.integers(0, 5000))
def test_sparse_bytes_from_anywhere_are_a_vector_or_an_error(data: bytes, length: int) -> None:
    try:
        decoded = codec("sparse").decode(np.frombuffer(data, np.uint8), length, Frame())
    except ValueError:
        return
    assert decoded.shape == (length,)


@quick
@given(data=st.data(), length=st.integers(1, 5000))
def test_topk_bytes_from_anywhere_are_a_vector_or_an_error(data: st.DataObject, length: int) -> None:
    size = BYTES["topk"](length)
    noise: Bytes = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    try:
        decoded = codec("topk").decode(noise, length, Frame())
    except ValueError:
        return
    assert decoded.shape == (length,)


def test_sparse_takes_as_few_bytes_as_it_can() -> None:
    values = np.zeros(3 * 4096, np.float32)
    values[[5, 4095]] = [1.0, -0.5]
    values[8192:9192] = 1.0
    encoded = codec("sparse").encode(values, Frame())
    gaps = [
        math.ceil((10 + 1 + 10 + 1 + 4089 // 1024) / 8),
        math.ceil((1 + 1) * 1000 / 8),
    ]  # 10 and 1 low bits
    assert encoded.nbytes == (4 + 2 + gaps[0]) + 2 + (4 + 1000 + gaps[1])
    np.testing.assert_allclose(codec("sparse").decode(encoded, values.size, Frame()), values, atol=1 / 254)


def test_topk_keeps_the_largest() -> None:
    values = normal(4096)
    decoded = through("topk", values, Frame())
    kept = np.flatnonzero(decoded)
    assert set(kept) == set(np.argsort(-np.abs(values))[:64])
    assert (np.sign(decoded[kept]) == np.sign(values[kept])).all()
    assert len(np.unique(np.abs(decoded[kept]))) == 2


def test_random_k_sends_what_all_regions_send() -> None:
    one = codec("random_k")
    values = normal(1000)
    first, second = Frame(shared=1, private=1), Frame(shared=1, private=2)
    a, b = (
        one.decode(one.encode(values, first), 1000, first),
        one.decode(one.encode(values, second), 1000, second),
    )
    assert (np.flatnonzero(a) == np.flatnonzero(b)).all()
    assert np.flatnonzero(a).size == 250
    assert not (np.flatnonzero(a) == np.flatnonzero(through("random_k", values, Frame(shared=2)))).all()


def test_identity_is_four_little_endian_bytes_a_value() -> None:
    values = np.array([1.0, -2.0, np.nan, np.inf, 1e-45], np.float32)
    encoded = Identity().encode(values, Frame())
    assert encoded.tobytes() == values.astype("<f4").tobytes()
    assert np.shares_memory(encoded, values)
    assert Identity().decode(encoded, 5, Frame()).tobytes() == values.tobytes()

"""The secret stream: AES's published vector, the right distributions, never the same twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.privacy.noise import SecureRandom

N = 1 << 17


def test_it_is_aes_in_counter_mode() -> None:
    """The zero block under the zero key: the hash key H of test case 13 in the GCM specification."""
    stream = SecureRandom(bytes(32)).bits(2).astype("<u8").tobytes()
    assert stream.hex() == "dc95c078a2408989ad48a21492842087"


def test_a_key_gives_one_stream_and_none_gives_a_fresh_one() -> None:
    key = bytes(range(32))
    one, other = SecureRandom(key), SecureRandom(key)
    assert np.array_equal(np.concatenate([one.bits(3), one.bits(5)]), other.bits(8))
    assert np.array_equal(one.normal(1001), other.normal(1001))
    assert not np.array_equal(one.bits(4), one.bits(4))
    assert SecureRandom().seed() != SecureRandom().seed()
    with pytest.raises(ValueError, match="a key has 32 bytes, got 5"):
        SecureRandom(b"short")


def test_normal_values() -> None:
    """Moments, tails and independence of neighbours, each within five standard errors."""
    values = SecureRandom().normal(N).astype(np.float64)
    assert abs(values.mean()) < 5 / math.sqrt(N)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / N)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / N)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / N)
    for bound in (0.5, 1.0, 2.0, 3.0):
        inside = math.erf(bound / math.sqrt(2))
        assert abs((np.abs(values) < bound).mean() - inside) < 5 * math.sqrt(inside * (1 - inside) / N)
    for lag in (1, 1 << 15):  # the second half of a block comes from the same pairs as the first
        assert abs((values[lag:] * values[:-lag]).mean()) < 5 / math.sqrt(N - lag)
        squares = values * values - 1
        assert abs((squares[lag:] * squares[:-lag]).mean()) < 5 * 2 / math.sqrt(N - lag)


@given(st.integers(0, 3), st.integers(-2, 2))
def test_every_length_is_served(blocks: int, more: int) -> None:
    count = max(0, blocks * 65536 + more)
    values = SecureRandom().normal(count)
    assert values.shape == (count,)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 0.95 * count or not count


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.999])
def test_poisson_samples(probability: float) -> None:
    picked = SecureRandom().poisson_sample(N, probability)
    spread = math.sqrt(N * probability * (1 - probability))
    assert abs(len(picked) - N * probability) < 5 * spread
    assert (np.diff(picked) > 0).all()
    assert picked.min() >= 0
    assert picked.max() < N


def test_everybody_or_nobody() -> None:
    assert np.array_equal(SecureRandom().poisson_sample(5, 1.0), np.arange(5))
    assert SecureRandom().poisson_sample(0, 0.5).shape == (0,)
    assert SecureRandom().poisson_sample(1000, 1e-18).shape == (0,)

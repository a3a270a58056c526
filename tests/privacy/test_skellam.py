"""Skellam noise: its distribution, the bound on its divergence against the divergence itself, shares that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xcloud.errors import PrivacyAccountingError
from xcloud.privacy.accounting import gaussian_epsilon, gaussian_noise_multiplier
from xcloud.privacy.noise import SecureRandom
from xcloud.privacy.skellam import (
    Skellam,
    calibrated_variance,
    noise_to_signal,
    pmf,
    renyi_bound,
    sensitivity,
    skellam_epsilon,
    variance_of_a_share,
)

N = 1 << 17
DELTA = 1e-5


@pytest.mark.parametrize("variance", [0.05, 1.0, 30.0, 1e6])
def test_samples(variance: float) -> None:
    noise = Skellam(variance)
    assert noise.probabilities.sum() == pytest.approx(1.0, abs=1e-9)
    values = noise.sample(SecureRandom(), N).astype(np.float64)
    fourth = 3 * variance**2 + variance  # the fourth cumulant is the variance
    assert abs(values.mean()) < 5 * math.sqrt(variance / N)
    assert abs(values.var() - variance) < 5 * math.sqrt((fourth - variance**2) / N)
    for value in (0, 1, -1):
        chance = float(pmf(np.array([value]), variance)[0])
        assert abs((values == value).mean() - chance) < 5 * math.sqrt(chance / N) + 1e-9


def test_it_is_the_difference_of_two_poisson_variables() -> None:
    counts = np.arange(60)
    poisson = np.exp(counts * math.log(2.5) - 2.5 - np.array([math.lgamma(k + 1) for k in counts]))
    difference = np.convolve(poisson, poisson[::-1])[59 - 5 : 59 + 6]
    np.testing.assert_allclose(pmf(np.arange(-5, 6), 5.0), difference, rtol=1e-12)


def test_shares_add_up() -> None:
    """Sums of independent shares have the distribution of one draw with the whole variance."""
    share = Skellam(variance_of_a_share(12.0, survivors=5, colluding=1))
    assert share.variance == 3.0
    four = pmf(share.values, 3.0)
    for _ in range(2):
        four = np.convolve(four, four)
    middle = len(four) // 2
    np.testing.assert_allclose(four[middle - 9 : middle + 10], pmf(np.arange(-9, 10), 12.0), rtol=1e-9)
    with pytest.raises(PrivacyAccountingError, match="3 regions of whom 3 may work together leave nobody"):
        variance_of_a_share(1.0, 3, 3)


@pytest.mark.parametrize(
    ("variance", "shift", "order"),
    [(4.0, 1, 2), (4.0, 2, 2), (40.0, 3, 2), (40.0, 3, 5), (40.0, 1, 16), (1000.0, 3, 5), (1000.0, 3, 16)],
)
def test_the_bound_holds_and_is_close(variance: float, shift: int, order: int) -> None:
    """Against the divergence itself, summed up, which is about a Gaussian's."""
    values = Skellam(variance * 4).values
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(pmf(values - shift, variance)), np.log(pmf(values, variance))
    kept = np.isfinite(log_p) & np.isfinite(log_q)
    terms = order * log_p[kept] - (order - 1) * log_q[kept]
    exact = (terms.max() + math.log(np.exp(terms - terms.max()).sum())) / (order - 1)
    bound = renyi_bound(order, variance, shift, shift)
    assert exact <= bound
    assert exact == pytest.approx(order * shift**2 / (2 * variance), rel=0.1)
    assert bound < 1.6 * exact


def test_a_fine_grid_costs_what_a_gaussian_costs() -> None:
    """By Renyi DP, which is a little more than the exact value."""
    l1, l2 = sensitivity(clip_norm=1.0, scale=2.0**16, dimension=1000)
    noise = gaussian_noise_multiplier(2.0, DELTA)
    found = skellam_epsilon((noise * l2) ** 2, l1, l2, DELTA)
    assert gaussian_epsilon(noise, DELTA) < found < 1.15 * gaussian_epsilon(noise, DELTA)


def test_calibration() -> None:
    l1, l2 = sensitivity(1.0, 1000.0, 100)
    variance = calibrated_variance(3.0, DELTA, l1, l2, times=10)
    assert skellam_epsilon(variance, l1, l2, DELTA, 10) <= 3.0
    assert skellam_epsilon(0.999 * variance, l1, l2, DELTA, 10) > 3.0
    with pytest.raises(PrivacyAccountingError, match="cannot be reached"):
        calibrated_variance(1e-9, DELTA, l1, l2)


def test_sensitivity_after_rounding() -> None:
    """Rounding up to the next integer, away from zero, never leaves it."""
    draws = np.random.default_rng(0)
    for scale, dimension in ((0.5, 10), (100.0, 50)):
        l1, l2 = sensitivity(1.0, scale, dimension)
        for _ in range(200):
            vector = draws.standard_normal(dimension)
            vector *= scale / np.linalg.norm(vector)
            rounded = np.sign(vector) * np.ceil(np.abs(vector) - 1e-12)
            assert np.linalg.norm(rounded) <= l2
            assert np.abs(rounded).sum() <= l1


def test_few_regions_drown_in_it() -> None:
    assert noise_to_signal(6.0, 10**6, 64) == pytest.approx(93.75)

"""The audit's bound: against exact tails, and against mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta

from xcloud.privacy.accounting import gaussian_epsilon
from xcloud.privacy.audit import audited_epsilon, epsilon_from_guesses, p_value

M = 2000


def test_without_delta_it_is_the_exact_tail() -> None:
    """Clopper and Pearson's bound on the chance of a correct guess, as an epsilon."""
    for guesses, correct in ((100, 90), (100, 100), (1000, 700)):
        chance = float(beta.ppf(0.05, correct, guesses - correct + 1))
        expected = math.log(chance / (1 - chance))
        assert epsilon_from_guesses(guesses, guesses, correct, 0.0) == pytest.approx(expected, abs=1e-5)


def test_p_values_by_hand() -> None:
    assert p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(0.25)
    assert p_value(2, 2, 1, 0.0, 0.0) == pytest.approx(0.75)
    # by delta: max(P[1 correct], (P[1] + P[0]) / 2) = max(1/2, 3/8), times 2 m delta
    assert p_value(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 4 * 0.01 * 0.5)
    assert p_value(10, 0, 0, 1.0, 0.1) == 1.0


def test_delta_and_caution_only_lower_it() -> None:
    plain = epsilon_from_guesses(1000, 200, 180, 0.0)
    assert epsilon_from_guesses(1000, 200, 180, 1e-5) < plain
    assert epsilon_from_guesses(1000, 200, 180, 0.0, significance=0.01) < plain
    assert epsilon_from_guesses(1000, 200, 100, 1e-5) == 0.0


@pytest.mark.parametrize("noise", [0.8, 1.5])
def test_a_gaussian_mechanism_stays_below_its_epsilon(noise: float) -> None:
    """An attacker who sees each canary's bit in Gaussian noise does what he can: above a third of epsilon, never above it."""
    draws = np.random.default_rng(0)
    claimed = gaussian_epsilon(noise, 1e-5)
    for _ in range(20):
        included = draws.random(M) < 0.5
        audited = audited_epsilon(included + noise * draws.standard_normal(M), included, 1e-5)
        assert claimed / 4 < audited <= claimed


def test_without_noise_it_is_refuted_and_pure_chance_refutes_nothing() -> None:
    draws = np.random.default_rng(0)
    included = draws.random(M) < 0.5
    assert audited_epsilon(included.astype(np.float64), included, 1e-5) > 5
    refuted = sum(
        audited_epsilon(draws.standard_normal(M), draws.random(M) < 0.5, 1e-5) > 0 for _ in range(100)
    )
    assert refuted <= 12  # five of a hundred at most are expected

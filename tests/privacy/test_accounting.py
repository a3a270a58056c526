"""Epsilon against published figures, against exact values, and the laws that it must obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xcloud.errors import PrivacyAccountingError
from xcloud.privacy.accounting import (
    Mechanism,
    calibrated_noise_multiplier,
    classic_epsilon,
    epsilon_of,
    gaussian_epsilon,
    gaussian_noise_multiplier,
    pld_epsilon,
    rdp_epsilon,
    steps_within,
)

DELTA = 1e-5
MNIST = 256 / 60000

# Sampling probability, noise multiplier, steps; epsilon by the classic RDP conversion, by RDP with today's, by PLD.
# Then the published figure, and which of the three it is, rounded. Published by: tensorflow/privacy, tutorials/README
# (the first four; it used the classic conversion); Abadi et al., arXiv 1607.00133, section 5 (the moments accountant,
# which is the classic conversion); pytorch/opacus, tests/accountants_test.py (RDP with today's conversion, by another
# implementation: 7.32911, so four figures are the same); Bu et al., PMC7695347 (the moments accountant again).
TABLE = [
    (MNIST, 1.3, 3516, "1.1923", "0.9546", "0.8646", "1.19", "classic"),
    (MNIST, 1.1, 14063, "3.0084", "2.5967", "2.3818", "3.01", "classic"),
    (MNIST, 0.7, 10547, "7.1016", "6.3197", "5.6397", "7.10", "classic"),
    (MNIST, 1.12, 14063, "2.9223", "2.5187", "2.3103", "2.92", "classic"),
    (0.01, 4.0, 10000, "1.2586", "1.0355", "0.9470", "1.26", "classic"),
    (0.04, 1.5, 2250, "8.0739", "7.3293", "6.7688", "7.329", "rdp"),
    (MNIST, 0.7, 16407, "8.6785", "7.8395", "7.0950", "8.68", "classic"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[1]}-{row[2]}")
def test_published_figures(row: tuple[float, float, int, str, str, str, str, str]) -> None:
    probability, noise, steps, classic, rdp, pld, published, by = row
    spent = [Mechanism(probability, noise, steps)]
    found = {
        "classic": classic_epsilon(spent, DELTA),
        "rdp": rdp_epsilon(spent, DELTA),
        "pld": pld_epsilon(spent, DELTA),
    }
    assert {name: f"{value:.4f}" for name, value in found.items()} == {
        "classic": classic,
        "rdp": rdp,
        "pld": pld,
    }
    assert f"{found[by]:.{len(published.partition('.')[2])}f}" == published
    assert epsilon_of(spent, DELTA) == found["pld"]


def test_without_sampling_the_value_is_exact() -> None:
    assert f"{gaussian_epsilon(1.0, DELTA):.6f}" == "4.377178"
    assert f"{gaussian_noise_multiplier(1.0, DELTA):.7f}" == "3.7306316"
    for noise, times in ((1.0, 1), (3.0, 10), (20.0, 100)):
        exact = gaussian_epsilon(noise, DELTA, times)
        found = epsilon_of([Mechanism(1.0, noise, times)], DELTA)
        assert exact <= found * (1 + 1e-6)  # the accountants round up
        assert found == pytest.approx(exact, rel=1e-3)
        assert gaussian_noise_multiplier(exact, DELTA, times) == pytest.approx(noise, rel=1e-6)


def test_passes_in_shuffled_order_are_not_amplified() -> None:
    """The second row of the table with the sampler that most training really has: sixty passes, 54.0 in place of 2.38."""
    shuffled = Mechanism(MNIST, 1.1, 14063, "shuffled")
    exact = gaussian_epsilon(1.1, DELTA, 60)
    assert f"{exact:.1f}" == "54.0"
    assert epsilon_of([shuffled], DELTA) >= exact
    small = Mechanism(0.25, 8.0, 8, "shuffled")
    assert epsilon_of([small], DELTA) == pytest.approx(gaussian_epsilon(8.0, DELTA, 2), rel=1e-3)
    begun = Mechanism(0.25, 8.0, 9, "shuffled")  # some unit is in a third step
    assert epsilon_of([begun], DELTA) == pytest.approx(gaussian_epsilon(8.0, DELTA, 3), rel=1e-3)


def test_rounds_that_end_within_a_pass_do_not_count_it_twice() -> None:
    halves = [Mechanism(0.25, 8.0, 2, "shuffled")] * 2
    assert epsilon_of(halves, DELTA) == epsilon_of([Mechanism(0.25, 8.0, 4, "shuffled")], DELTA)


@settings(max_examples=5, deadline=None)
@given(
    probability=st.floats(0.001, 0.5),
    noise=st.floats(1.0, 6.0),
    steps=st.integers(2, 100),
)
def test_laws(probability: float, noise: float, steps: int) -> None:
    one = epsilon_of([Mechanism(probability, noise, steps)], DELTA)
    split = [Mechanism(probability, noise, steps // 2), Mechanism(probability, noise, steps - steps // 2)]
    assert epsilon_of(split, DELTA) == one
    assert epsilon_of([Mechanism(probability, noise, 2 * steps)], DELTA) >= one
    assert epsilon_of([Mechanism(probability, 1.2 * noise, steps)], DELTA) <= one
    assert one <= epsilon_of([Mechanism(1.0, noise, steps)], DELTA) * (1 + 1e-6)  # sampling never costs


def test_different_noise_adds_up() -> None:
    parts = [Mechanism(0.01, 1.0, 100), Mechanism(0.02, 2.0, 50)]
    both = epsilon_of(parts, DELTA)
    assert max(epsilon_of([part], DELTA) for part in parts) < both
    assert both < sum(epsilon_of([part], DELTA / 2) for part in parts)


def test_nothing_costs_nothing_and_hopeless_is_said() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([Mechanism(0.1, 1.0, 0)], DELTA) == 0.0
    assert epsilon_of([Mechanism(0.5, 0.01, 100)], DELTA) > 1e4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((0.0, 1.0, 1), "sampling probability is 0"),
        ((1.5, 1.0, 1), "sampling probability is 1.5"),
        ((0.1, 0.0, 1), "without noise nothing is private"),
        ((0.1, math.nan, 1), "without noise nothing is private"),
        ((0.1, 1.0, -1), "steps is -1"),
        ((0.1, 1.0, 1, "cyclic"), "no accounting is known for sampler 'cyclic'"),
    ],
)
def test_the_unknown_is_refused(wrong: tuple[float, float, int], message: str) -> None:
    with pytest.raises(PrivacyAccountingError, match=message):
        Mechanism(*wrong)
    with pytest.raises(PrivacyAccountingError, match="delta is 0"):
        epsilon_of([Mechanism(0.1, 1.0, 1)], 0.0)


@pytest.mark.parametrize(
    ("target", "probability", "steps"), [(1.0, 0.01, 500), (0.5, 1.0, 3), (60.0, 0.2, 50)]
)
def test_calibration_uses_the_budget_and_no_more(target: float, probability: float, steps: int) -> None:
    noise = calibrated_noise_multiplier(target, DELTA, probability, steps)
    assert epsilon_of([Mechanism(probability, noise, steps)], DELTA) <= target
    assert epsilon_of([Mechanism(probability, 0.998 * noise, steps)], DELTA) > target


def test_calibration_says_what_cannot_be() -> None:
    with pytest.raises(PrivacyAccountingError, match="cannot be reached in 1000000000 steps"):
        calibrated_noise_multiplier(1e-9, 1e-12, 1.0, 10**9)


def test_steps_that_fit() -> None:
    one = Mechanism(0.02, 1.0, 1)
    steps = steps_within(0.8, DELTA, one)
    assert steps > 10
    assert epsilon_of([Mechanism(0.02, 1.0, steps)], DELTA) <= 0.8
    assert epsilon_of([Mechanism(0.02, 1.0, steps + 1)], DELTA) > 0.8
    assert steps_within(0.8, DELTA, one, [Mechanism(0.02, 1.0, steps - 3)]) == 3
    assert steps_within(0.8, DELTA, one, [Mechanism(0.02, 1.0, steps)]) == 0
    assert steps_within(1e9, DELTA, one, at_most=64) == 64

"""The ledger: what it costs, when it says no, and what it remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from xcloud.errors import CheckpointError, PrivacyBudgetError
from xcloud.messages import PrivacyTerms
from xcloud.privacy import PrivacyLedger, Release
from xcloud.privacy.accounting import Mechanism, epsilon_of

DELTA = 1e-5


def release(region: str = "a", round: int = 1, steps: int = 5, noise: float = 2.0) -> Release:
    terms = PrivacyTerms(unit="example", sampling_probability=0.1, noise_multiplier=noise)
    return Release(round=round, region=region, steps=steps, terms=terms)


def test_epsilon_per_region_and_in_total() -> None:
    """Disjoint data: an example of one region pays nothing for what the other releases."""
    ledger = PrivacyLedger(unit="example", delta=DELTA)
    assert (ledger.epsilon("a"), ledger.total) == (0.0, 0.0)
    ledger = ledger.with_releases((release("a"), release("b", noise=1.0))).with_releases(
        (release("a", 2), release("b", 2, noise=1.0))
    )
    expected = {
        name: epsilon_of([Mechanism(0.1, noise, 10)], DELTA) for name, noise in (("a", 2.0), ("b", 1.0))
    }
    assert {name: ledger.epsilon(name) for name in "ab"} == expected
    assert ledger.total == expected["b"] > expected["a"] > 0


def test_a_round_past_the_budget_is_refused_before_it_happens() -> None:
    spent = epsilon_of([Mechanism(0.1, 2.0, 10)], DELTA)
    ledger = PrivacyLedger(unit="example", delta=DELTA, budget=spent)
    ledger = ledger.with_releases((release(round=1),)).with_releases((release(round=2),))
    assert ledger.epsilon("a") == spent  # used up to the last bit, and not refused
    with pytest.raises(
        PrivacyBudgetError,
        match=r"region 'a': round 3 would raise epsilon per example from .* past the budget of .* \(dp.target_epsilon\)",
    ):
        ledger.with_releases((release("b"), release("a", round=3, steps=1)))
    assert len(ledger.releases) == 2
    assert ledger.with_releases((release("b"),)).total == spent  # another region has its own budget


def test_a_round_trained_twice_costs_twice() -> None:
    once = PrivacyLedger(unit="example", delta=DELTA).with_releases((release(),))
    assert once.with_releases((release(),)).total > once.total


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    assert PrivacyLedger.kept(tmp_path) is None
    ledger = PrivacyLedger(unit="example", delta=DELTA, budget=3.0).with_releases((release(),))
    ledger.keep(tmp_path / "run")
    assert PrivacyLedger.kept(tmp_path / "run") == ledger
    path = tmp_path / "run" / "privacy.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="damaged privacy ledger"):
        PrivacyLedger.kept(tmp_path / "run")

"""How private a run was, measured: the lower bound of the one-run audit (Steinke, Nasr and Jagielski, arXiv 2305.08846).

Canaries are put into the training data or left out, each by a fair coin. An attacker who sees the result guesses some of the
coins. Under (epsilon, delta) differential privacy no attacker guesses better than a biased coin would, but for delta, so
more correct guesses than that refute the claim. Only a lower bound comes out: an audit can refute an epsilon, never prove it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["audited_epsilon", "epsilon_from_guesses", "p_value"]


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """At most how likely so many correct guesses are under (epsilon, delta); theorem 5.2 and appendix D of the paper.

    Args:
        canaries: coins that were thrown.
        guesses: coins that were guessed; who is unsure may leave coins out.
        correct: guesses that were right.
        epsilon: claimed.
        delta: claimed.
    """
    assert 0 <= correct <= guesses <= canaries, (correct, guesses, canaries)
    binomial: Any = _binomial()
    chance = 1 / (1 + math.exp(-epsilon))
    by_epsilon = float(binomial.sf(correct - 1, guesses, chance))
    shortfalls = np.cumsum(binomial.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    by_delta = float(np.max(shortfalls / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, by_epsilon + 2 * canaries * delta * by_delta)


def epsilon_from_guesses(
    canaries: int, guesses: int, correct: int, delta: float, significance: float = 0.05
) -> float:
    """The largest epsilon that the guesses refute; 0 if they refute none.

    Args:
        canaries: as in `p_value`, and `guesses`, `correct`, `delta` too.
        significance: how likely a true claim may be refuted.
    """
    if p_value(canaries, guesses, correct, 0.0, delta) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, correct, high, delta) <= significance:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= significance:
            low = middle
        else:
            high = middle
    return low


def audited_epsilon(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    delta: float,
    shares: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    significance: float = 0.05,
) -> float:
    """The largest epsilon that scores refute, guessing a share of the canaries: half those with the highest scores are in,
    half those with the lowest are out. Over the shares the significance is divided.

    Args:
        scores: of each canary; higher where the attacker thinks it was in.
        included: whether it was.
        delta: claimed.
        shares: of the canaries to guess, fixed beforehand.
        significance: as in `epsilon_from_guesses`.
    """
    canaries, order = len(scores), np.argsort(scores, kind="stable")
    best = 0.0
    for share in shares:
        half = max(1, int(canaries * share / 2))
        correct = int(np.sum(~included[order[:half]])) + int(np.sum(included[order[-half:]]))
        found = epsilon_from_guesses(canaries, 2 * half, correct, delta, significance / len(shares))
        best = max(best, found)
    return best


def _binomial() -> Any:
    from scipy.stats import binom  # noqa: PLC0415 - it takes a second to load, and only audits need it

    return binom

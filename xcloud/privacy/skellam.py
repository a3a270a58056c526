"""Skellam noise on integers (arXiv 2110.04995): what a region can add to an update before it is masked and summed on a ring.

The difference of two Poisson variables. A sum of such noises is such noise, with the sum of the variances, so that regions
which do not trust the aggregator each add a share. The shares must suffice when some regions drop out and others work
together with the aggregator and subtract theirs; see `variance_of_a_share`.

Nothing in a job uses this yet. It is the arithmetic for it: sampler, sensitivity after rounding, accounting.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from xcloud.errors import PrivacyAccountingError
from xcloud.privacy.noise import SecureRandom

__all__ = [
    "Skellam",
    "calibrated_variance",
    "noise_to_signal",
    "renyi_bound",
    "sensitivity",
    "skellam_epsilon",
    "variance_of_a_share",
]

ORDERS = (*range(2, 64), *range(64, 512, 16), *range(512, 4097, 256))
WIDTH = 12.0
"""Of the sampler's table on each side, in standard deviations; what lies beyond has less than 1e-20."""


class Skellam:
    """Symmetric Skellam noise of a variance, drawn from a table of its distribution function in fp64.

    Args:
        variance: at least 1e-3, at most 1e12 (the table grows with its root).
    """

    def __init__(self, variance: float) -> None:
        if not 1e-3 <= variance <= 1e12:
            raise PrivacyAccountingError(f"Skellam variance is {variance:g}; expected 1e-3 to 1e12")
        self.variance = variance
        reach = math.ceil(
            WIDTH * math.sqrt(variance) + 40
        )  # its tails are heavier than normal where it is small
        self.values = np.arange(-reach, reach + 1, dtype=np.int64)
        self.probabilities = pmf(self.values, variance)
        self._distribution = np.cumsum(self.probabilities)
        self._distribution /= self._distribution[-1]

    def sample(self, random: SecureRandom, count: int) -> npt.NDArray[np.int64]:
        """Noise for `count` coordinates; int64."""
        uniform = (random.bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return self.values[np.searchsorted(self._distribution, uniform, side="right")]


def pmf(values: npt.NDArray[np.int64], variance: float) -> npt.NDArray[np.float64]:
    """Probabilities of integers: exp(-variance) I_k(variance), with the modified Bessel function."""
    special: Any = _special()
    return np.asarray(special.ive(np.abs(values).astype(np.float64), variance), dtype=np.float64)


def sensitivity(clip_norm: float, scale: float, dimension: int) -> tuple[float, float]:
    """L1 and L2 sensitivity of a vector that is clipped, scaled and rounded to integers, each coordinate by less than one.

    Args:
        clip_norm: L2 norm of the real vector, at most.
        scale: grid steps in one unit.
        dimension: coordinates.
    """
    l2 = clip_norm * scale + math.sqrt(dimension)
    return min(math.sqrt(dimension) * l2, l2 * l2), l2  # an integer is no larger than its square


def renyi_bound(order: int, variance: float, l1: float, l2: float) -> float:
    """Upper bound of the Renyi divergence between sums that differ by a vector of these norms; theorem 3.5 of the paper."""
    gaussian = order * l2 * l2 / (2 * variance)
    rest: float = min(
        ((2 * order - 1) * l2 * l2 + 6 * l1) / (4 * variance * variance), 3 * l1 / (2 * variance)
    )
    return gaussian + rest


def skellam_epsilon(variance: float, l1: float, l2: float, delta: float, times: int = 1) -> float:
    """Epsilon of `times` sums over everything, without sampling, by Renyi DP (conversion of arXiv 2004.00010).

    Args:
        variance: of the noise in the sum, in grid steps squared.
        l1: L1 sensitivity in grid steps.
        l2: L2 sensitivity in grid steps.
        delta: at which epsilon holds.
        times: releases.
    """
    if not (variance > 0 and 0 < delta < 1):
        raise PrivacyAccountingError(
            f"variance {variance:g}, delta {delta:g}: expected a variance above 0 and 0 < delta < 1"
        )
    found: list[float] = [
        times * renyi_bound(order, variance, l1, l2)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    ]
    return max(0.0, min(found))


def calibrated_variance(target_epsilon: float, delta: float, l1: float, l2: float, times: int = 1) -> float:
    """The smallest variance of the sum's noise, to one part in a million, that costs at most `target_epsilon`."""
    low, high = 0.0, l2 * l2
    while skellam_epsilon(high, l1, l2, delta, times) > target_epsilon:
        low, high = high, 2 * high
        if high > 1e30:
            raise PrivacyAccountingError(
                f"target epsilon {target_epsilon:g} at delta {delta:g} cannot be reached; expected a larger one"
            )
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if skellam_epsilon(middle, l1, l2, delta, times) <= target_epsilon:
            high = middle
        else:
            low = middle
    return high


def variance_of_a_share(variance: float, survivors: int, colluding: int) -> float:
    """What each region adds, so that the sum over those who answer, less what traitors know, has `variance`.

    Args:
        variance: that the accounting asks for.
        survivors: regions without whom no sum is opened.
        colluding: regions that may tell the aggregator their noise.
    """
    if colluding < 0 or survivors - colluding < 1:
        raise PrivacyAccountingError(
            f"{survivors} regions of whom {colluding} may work together leave nobody whose noise is secret"
        )
    return variance / (survivors - colluding)


def noise_to_signal(noise_multiplier: float, dimension: int, regions: int) -> float:
    """Norm of the noise over the norm of a sum of clipped updates that all point the same way: the best case."""
    return noise_multiplier * math.sqrt(dimension) / regions


def _special() -> Any:
    from scipy import special  # noqa: PLC0415 - it takes a second to load

    return special

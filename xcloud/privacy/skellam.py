"""Skellam noise on integers (arXiv 2110.04995): what a region can add to an update before it is masked and summed on a ring.

The difference of two Poisson variables. A sum of such noises is such noise, with the sum of the variances, so that regions
which do not trust the aggregator each add a share. The shares must suffice when some regions drop out and others work
together with the aggregator and subtract theirs; see `variance_of_a_share`.

Sampler, sensitivity after rounding, accounting, and the grid that a job's numbers lead to (`plan_grid`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xcloud.errors import PrivacyAccountingError
from xcloud.privacy.accounting import gaussian_noise_multiplier
from xcloud.privacy.noise import SecureRandom

__all__ = [
    "GridPlan",
    "Skellam",
    "calibrated_variance",
    "composed_epsilon",
    "grid_dimension",
    "noise_to_signal",
    "plan_grid",
    "renyi_bound",
    "sensitivity",
    "skellam_epsilon",
    "smallest_block",
    "variance_of_a_share",
]

ORDERS = (*range(2, 64), *range(64, 512, 16), *range(512, 4097, 256))
SPREAD = 6.0
"""Largest coordinate of a rotated block over the root mean square of one whose whole norm lies in it."""
TAIL = 8.0
"""Standard deviations of noise that the ring has room for."""
FINEST = 16.0
"""Steps in the clip norm over the root of the dimension: on a finer grid rounding adds less than a thirtieth to the noise already."""
MOST_SHARE = 1e10
"""Variance of a region's share that is still drawn from a table of a few million entries."""
ROTATED = 4096
"""Values of a block that is rotated."""
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


def sensitivity(clip_norm: float, scale: float, dimension: int, rounding: float = 1.0) -> tuple[float, float]:
    """L1 and L2 sensitivity of a vector that is clipped, scaled and rounded to integers.

    Args:
        clip_norm: L2 norm of the real vector, at most.
        scale: grid steps in one unit.
        dimension: coordinates.
        rounding: by how much a coordinate changes, at most: 1 with random rounding, 1/2 to the nearest.
    """
    l2 = clip_norm * scale + rounding * math.sqrt(dimension)
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


def composed_epsilon(releases: Sequence[tuple[float, float, float, int]], delta: float) -> float:
    """Epsilon of several kinds of sums together: (variance, l1, l2, times) of each, as in `skellam_epsilon`."""
    found: list[float] = [
        sum(times * renyi_bound(order, variance, l1, l2) for variance, l1, l2, times in releases)
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


@dataclass(frozen=True)
class GridPlan:
    """The public grid of a job, and the noise on it.

    Attributes:
        step: what one integer is worth.
        limit: the largest integer of one region before its noise.
        noise_multiplier: standard deviation of the sum's noise over its L2 sensitivity.
        variance: of the sum's noise without what colluders know, in steps squared.
        share: what each region adds of it.
        l1: L1 sensitivity of the sum to one region, in steps; `l2`: L2.
    """

    step: float
    limit: int
    noise_multiplier: float
    variance: float
    share: float
    l1: float
    l2: float


def plan_grid(
    *,
    clip_norm: float,
    dimension: int,
    smallest: int = 4096,
    regions: int,
    survivors: int,
    colluders: int,
    bits: int,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    delta: float,
    times: int,
) -> GridPlan:
    """The finest grid on which the sum of all regions with all their noise fits into the ring.

    Coordinates of a rotated block are at most `SPREAD` times what they are on average, even if the whole update lies in it
    (what is beyond is cut off, which makes no norm larger), and the noise stays within `TAIL` standard deviations but for once in 10^14 coordinates. All of it depends on
    public numbers, so that driver and regions come to the same.

    Args:
        clip_norm: L2 norm of one region's update.
        dimension: integers that a region sends in one merge.
        smallest: values of the smallest block that is rotated by itself: a whole update may lie in it.
        regions: in the job.
        survivors: fewest whose sum is opened; `colluders` of them tell the aggregator their noise.
        bits: of the ring.
        noise_multiplier: null: as little as `target_epsilon` allows in `times` merges.
        delta: at which epsilon holds.

    Raises:
        PrivacyAccountingError: the ring is too small for that many parameters and that much noise.
    """
    multiplier = noise_multiplier
    if multiplier is None:
        assert target_epsilon is not None
        multiplier = gaussian_noise_multiplier(target_epsilon, delta, times)
    for _ in range(8):
        all_noise = math.sqrt(regions / (survivors - colluders))  # when everybody answers
        room = (1 << (bits - 1)) - 1 - regions - TAIL * all_noise * multiplier * math.sqrt(dimension) / 2
        each = min(1.0, SPREAD / math.sqrt(smallest))
        reach = room / (regions * each + TAIL * all_noise * multiplier)  # clip_norm in steps
        drawn = math.sqrt(MOST_SHARE * (survivors - colluders)) / multiplier - math.sqrt(dimension) / 2
        reach = min(reach, FINEST * math.sqrt(dimension), drawn)
        if reach < math.sqrt(dimension) / 4:
            raise PrivacyAccountingError(
                f"a ring of {bits} bits is too small for {regions} regions, {dimension} integers and noise of "
                f"{multiplier:.3g} times the sensitivity: rounding would need more noise than the updates do; "
                "expected codec.ring: 32, fewer parameters or less noise"
            )
        l1, l2 = sensitivity(clip_norm, reach / clip_norm, dimension, rounding=0.5)
        if noise_multiplier is not None:
            break
        assert target_epsilon is not None
        needed = math.sqrt(calibrated_variance(target_epsilon, delta, l1, l2, times)) / l2
        if needed <= multiplier:
            break
        multiplier = needed * (
            1 + 1e-6
        )  # a little more than a Gaussian needs; the grid becomes coarser for it
    else:
        raise PrivacyAccountingError(f"no grid of {bits} bits settles for target epsilon {target_epsilon}")
    variance = (multiplier * l2) ** 2
    share = variance_of_a_share(variance, survivors, colluders)
    limit = int(reach * each) + 1
    return GridPlan(clip_norm / reach, limit, multiplier, variance, share, l1, l2)


def grid_dimension(lengths: Sequence[int]) -> int:
    """Integers that a whole update of chunks of these lengths becomes: rotation fills each last block to a power of two."""
    total = 0
    for length in lengths:
        rest = length % ROTATED
        total += length - rest + (1 << (rest - 1).bit_length() if rest else 0)
    return total


def smallest_block(lengths: Sequence[int]) -> int:
    """Values of the smallest block that the rotation of chunks of these lengths makes."""
    rests = [length % ROTATED for length in lengths]
    return min((1 << (rest - 1).bit_length() for rest in rests if rest), default=ROTATED)


def noise_to_signal(noise_multiplier: float, dimension: int, regions: int) -> float:
    """Norm of the noise over the norm of a sum of clipped updates that all point the same way: the best case."""
    return noise_multiplier * math.sqrt(dimension) / regions


def _special() -> Any:
    from scipy import special  # noqa: PLC0415 - it takes a second to load

    return special

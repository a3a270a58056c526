"""Epsilon of Gaussian sums over Poisson samples, and the noise that a target epsilon needs.

The figures come from `dp-accounting`: privacy loss distributions (arXiv 1906.03049, 2207.04380), bounded from above by
Renyi DP (arXiv 1908.10530 with the conversion of 2004.00010). Both are upper bounds, and the smaller one is reported.
Neighbouring data sets differ by one unit more or less. `gaussian_epsilon` is the exact value for one sum over everything
(arXiv 1805.06530).

Sampling amplifies privacy only if it is Poisson sampling: each unit in each step, independently, with the same
probability. For passes in shuffled order the cost here is that of as many sums over everything as there were
passes begun: no amplification.

`dp_accounting` is imported inside the functions: with scipy it takes seconds to load, and only those who ask for an
epsilon should wait for it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from xcloud.errors import PrivacyAccountingError

__all__ = [
    "Mechanism",
    "Sampler",
    "calibrated_noise_multiplier",
    "classic_epsilon",
    "epsilon_of",
    "gaussian_epsilon",
    "gaussian_noise_multiplier",
    "pld_epsilon",
    "rdp_epsilon",
    "steps_within",
]

Sampler = Literal["poisson", "shuffled"]

HOPELESS = 40.0
"""Above this epsilon Renyi's bound is reported alone: privacy loss distributions would take gigabytes to say the same."""


@dataclass(frozen=True)
class Mechanism:
    """Some adaptive releases of the same kind: a sum of contributions of norm at most C, plus Gaussian noise.

    Attributes:
        sampling_probability: of a unit to be in one step's sum; for `shuffled`, the share of the data in a step.
        noise_multiplier: standard deviation of the noise on the sum, over C.
        steps: how many.
        sampler: who is in a step's sum. `poisson`: each unit independently. `shuffled`: pass after pass over the data.
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int
    sampler: Sampler = "poisson"

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise PrivacyAccountingError(
                f"sampling probability is {self.sampling_probability:g}; expected more than 0, at most 1"
            )
        if not 0 < self.noise_multiplier < math.inf:
            raise PrivacyAccountingError(
                f"noise multiplier is {self.noise_multiplier:g}; expected a number above 0, since without noise "
                "nothing is private"
            )
        if self.steps < 0:
            raise PrivacyAccountingError(f"steps is {self.steps}; expected at least 0")
        if self.sampler not in ("poisson", "shuffled"):
            raise PrivacyAccountingError(
                f"no accounting is known for sampler {self.sampler!r}; expected poisson or shuffled"
            )


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Epsilon of all these releases together, at `delta`: the smaller of both accountants' upper bounds.

    Raises:
        PrivacyAccountingError: `delta` is out of range, or the two accountants contradict each other.
    """
    return _epsilon(_joined(mechanisms), _checked(delta))


def pld_epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """By privacy loss distributions alone."""
    return _pld(_joined(mechanisms), _checked(delta))


def rdp_epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """By Renyi DP alone, with the conversion of arXiv 2004.00010."""
    return _rdp(_joined(mechanisms), _checked(delta))


def classic_epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """By Renyi DP with the first conversion (arXiv 1702.07476), as papers before 2020 give it; never what we report."""
    spent = _accountant("rdp", _joined(mechanisms))
    return float(min(spent.rdp + math.log(1 / _checked(delta)) / (spent.orders - 1)))


def gaussian_epsilon(noise_multiplier: float, delta: float, times: int = 1) -> float:
    """Exact epsilon of `times` Gaussian sums over everything, without sampling."""
    import dp_accounting  # noqa: PLC0415 - see the module's docstring

    if times == 0:
        return 0.0
    return float(dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(times), _checked(delta)))


def gaussian_noise_multiplier(epsilon: float, delta: float, times: int = 1) -> float:
    """The noise multiplier at which `times` Gaussian sums over everything cost exactly `epsilon`."""
    import dp_accounting  # noqa: PLC0415 - see the module's docstring

    return float(dp_accounting.get_sigma_gaussian(epsilon, _checked(delta))) * math.sqrt(times)


@functools.lru_cache(maxsize=64)
def calibrated_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    sampler: Sampler = "poisson",
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier with which `steps` releases cost at most `target_epsilon`.

    Args:
        target_epsilon: never exceeded.
        delta: at which it holds.
        sampling_probability: as in `Mechanism`.
        steps: at least 1.
        sampler: as in `Mechanism`.
        tolerance: by how much the result may be larger than needed, relative.

    Raises:
        PrivacyAccountingError: no noise up to a multiplier of a million is enough.
    """

    def costs(noise: float) -> float:
        return epsilon_of([Mechanism(sampling_probability, noise, steps, sampler)], delta)

    def by_rdp(noise: float) -> float:
        return _rdp((Mechanism(sampling_probability, noise, steps, sampler),), _checked(delta))

    enough = 1.0  # by the looser accountant, which is faster
    while by_rdp(enough) > target_epsilon:
        enough *= 1.25
        if enough > 1e6:
            raise PrivacyAccountingError(
                f"target epsilon {target_epsilon:g} at delta {delta:g} cannot be reached in {steps} steps; "
                "expected a larger epsilon or fewer steps"
            )
    too_little = enough / 1.25
    while costs(too_little) <= target_epsilon:
        enough, too_little = too_little, too_little / 1.25
    from scipy.optimize import brentq  # noqa: PLC0415 - see the module's docstring

    found = brentq(
        lambda log: math.log(costs(math.exp(log)) / target_epsilon),
        math.log(too_little),
        math.log(enough),
        xtol=tolerance / 8,
    )
    for above in range(1, 5):
        noise = math.exp(found + above * tolerance / 4)
        if costs(noise) <= target_epsilon:
            return noise
    return enough


def steps_within(
    budget: float, delta: float, one: Mechanism, spent: Iterable[Mechanism] = (), at_most: int = 1 << 24
) -> int:
    """How many more steps like `one` (its `steps` do not count) fit into a budget after what was `spent`."""
    before = tuple(spent)

    def fits(steps: int) -> bool:
        more = Mechanism(one.sampling_probability, one.noise_multiplier, steps, one.sampler)
        return epsilon_of((*before, more), delta) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    if high > at_most:
        return at_most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- the accountants --------------------------------------------------------------------------


def _joined(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """One mechanism for each kind, in a fixed order: the cost does not depend on who came when."""
    steps: defaultdict[tuple[float, float, Sampler], int] = defaultdict(int)
    for one in mechanisms:
        steps[one.sampling_probability, one.noise_multiplier, one.sampler] += one.steps
    return tuple(Mechanism(*kind[:2], number, kind[2]) for kind, number in sorted(steps.items()) if number)


def _checked(delta: float) -> float:
    if not 1e-12 <= delta < 1:
        raise PrivacyAccountingError(f"delta is {delta:g}; expected at least 1e-12 and less than 1")
    return delta


@functools.lru_cache(maxsize=256)
def _epsilon(joined: tuple[Mechanism, ...], delta: float) -> float:
    if not joined:
        return 0.0
    above = _rdp(joined, delta)
    if above > HOPELESS:
        return above
    found = _pld(joined, delta)
    if (
        not 0 <= found <= 1.25 * above + 0.1
    ):  # far below is common, for few steps; above is rounding or a mistake
        raise PrivacyAccountingError(
            f"the accountants disagree: epsilon {found:g} by privacy loss distributions and {above:g} by Renyi DP "
            f"at delta {delta:g} for {joined}; nothing is reported"
        )
    return min(found, above)


def _pld(joined: tuple[Mechanism, ...], delta: float) -> float:
    return float(_accountant("pld", joined).get_epsilon(delta))


def _rdp(joined: tuple[Mechanism, ...], delta: float) -> float:
    return float(_accountant("rdp", joined).get_epsilon(delta))


def _accountant(kind: Literal["pld", "rdp"], joined: tuple[Mechanism, ...]) -> Any:
    from dp_accounting import pld, rdp  # noqa: PLC0415 - see the module's docstring

    accountant = pld.PLDAccountant() if kind == "pld" else rdp.RdpAccountant()
    with _quiet():
        for one in joined:
            _compose(accountant, one)
    return accountant


def _compose(accountant: Any, one: Mechanism) -> None:
    import dp_accounting  # noqa: PLC0415 - see the module's docstring

    event: Any = dp_accounting.GaussianDpEvent(one.noise_multiplier)
    times = one.steps
    if one.sampler == "shuffled":  # a unit is in one step of each pass that was begun
        times = math.ceil(one.steps * one.sampling_probability - 1e-9)
    elif one.sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(one.sampling_probability, event)
    accountant.compose(event, times)


@contextmanager
def _quiet() -> Iterator[None]:
    """Renyi orders whose series does not converge are left out, which is right and no news to anybody."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

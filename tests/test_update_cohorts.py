"""Fixed point in cohorts of all kinds: whatever the regions' updates have in common, what is owed stays small.

The regions' update paths and a total of their encodings, no more; updates are Gaussian, and drawn anew every round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.strategies import Array
from xcloud.codecs import FixedConfig, IdentityConfig
from xcloud.manifest import ChunkLayout
from xcloud.messages import RoundSum
from xcloud.update import Framing, UpdatePath

LAYOUT = (ChunkLayout(2 * 4096 + 100),)
SIZES = np.repeat([1e-3, 1e-5, 1e-4], [4096, 4096, 100])
"""Root mean square of the updates, block by block."""
BLOCKS = (slice(0, 4096), slice(4096, 8192), slice(8192, None))
ROUNDS = 60
SETTLED = 16
"""By this round the scale no longer depends on the first guess."""
OWED = {8: 0.05, 4: 0.35, 2: 1.0}
"""Most that a region owes, in root mean squares of its update of one round."""


@dataclass
class Outcome:
    """After the last round, each by block, in root mean squares of an update."""

    owed: Array
    scale: Array
    off: Array
    """Sum of the merged updates less the sum of the true means, from `SETTLED` on, in those of the largest update."""


def cohort(
    bits: int,
    members: int,
    correlation: float,
    *,
    present: Callable[[int], int] | None = None,
    size: Callable[[int], float] = lambda _: 1.0,
    shares: list[float] | None = None,
    factors: list[float] | None = None,
    typical: float = 1e-3,
) -> Outcome:
    """A run. `present`: so many regions take part in a round; `factors`: of each region's update."""
    codec, numbers = FixedConfig(bits=bits), np.random.default_rng([bits, members])
    paths = [
        UpdatePath(
            codec.build(),
            IdentityConfig().build(),
            Framing("job", 3, members, str(m), typical),
            LAYOUT,
            range(1),
        )
        for m in range(members)
    ]
    shares, factors = shares or [1.0] * members, factors or [1.0] * members
    length = LAYOUT[0].length
    got, wanted = np.zeros(length), np.zeros(length)
    for number in range(1, ROUNDS + 1):
        count = present(number) if present else members
        scaled = SIZES * size(number)
        common = np.sqrt(correlation) * numbers.standard_normal(length, np.float32)
        total = None
        for path, share, factor in zip(paths[:count], shares, factors, strict=False):
            own = np.sqrt(1 - correlation) * numbers.standard_normal(length, np.float32)
            delta = (factor * scaled * (common + own)).astype(np.float32)
            if number >= SETTLED:
                wanted += delta * (share / sum(shares[:count]))
            encoded = path.encode(number, 0, delta, share)
            if total is None:
                total = encoded.copy()
            else:
                path.codec.add(total, encoded, path.framing.frame(number, 0, LAYOUT[0]))
        assert total is not None
        names = tuple(str(m) for m in range(count))
        header = RoundSum(
            round=number, attempt=1, regions=names, weights=(), chunk_bytes=(), norm=None, fold_s=0.0,
            summed=True, total_share=sum(shares[:count]),
        )  # fmt: skip
        merged = {path.decode(0, total, header).tobytes() for path in paths}
        assert len(merged) == 1  # absent regions follow
        if number >= SETTLED:
            got += np.frombuffer(merged.pop(), np.float32)
        for index, path in enumerate(paths):
            path.settle(index < count)
    rms = [SIZES[cut][0] * size(ROUNDS) for cut in BLOCKS]
    largest = max(size(number) for number in range(SETTLED, ROUNDS + 1)) / size(ROUNDS)
    owed = [path.residual[0] / factor for path, factor in zip(paths, factors, strict=True) if path.residual]
    return Outcome(
        np.array(
            [max((norm(r[cut]) for r in owed), default=0) / s for cut, s in zip(BLOCKS, rms, strict=True)]
        ),
        paths[0].scales[0] / np.array(rms),
        np.array([norm(got[cut] - wanted[cut]) / s / largest for cut, s in zip(BLOCKS, rms, strict=True)]),
    )


def norm(values: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def steady(outcome: Outcome, bits: int, slack: float = 1.0) -> None:
    """Little is owed, the scale is that of an update, and nothing was lost on the way."""
    assert (outcome.owed < slack * OWED[bits]).all(), outcome
    assert (outcome.scale > 0.7).all(), outcome
    assert (outcome.scale < 1.6 * slack).all(), outcome
    assert (outcome.off < slack * lost(bits)).all(), outcome


def lost(bits: int) -> float:
    """With error feedback, what is owed at either end; without, each round adds an error of its own."""
    return OWED[bits] * (np.sqrt(ROUNDS) if bits == 8 else 2.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("members", [1, 3, 8, 16])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
def test_all_present(bits: int, members: int, correlation: float) -> None:
    steady(cohort(bits, members, correlation), bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_many_regions(bits: int, correlation: float) -> None:
    steady(cohort(bits, 64, correlation), bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("members", [3, 8, 16])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("back", [41, ROUNDS + 1])
def test_regions_that_are_absent(bits: int, members: int, correlation: float, back: int) -> None:
    """All but one are gone from round 17 on, and come back or do not; what they owe waits in them."""
    alone = cohort(bits, members, correlation, present=lambda n: 1 if 17 <= n < back else members)
    steady(alone, bits, slack=1.3)  # a mean over changing contributors owes in changing units


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("members", [1, 3, 16])
@pytest.mark.parametrize("drift", [0.1, 10.0, 1000.0])
def test_updates_that_shrink_or_grow(bits: int, members: int, drift: float) -> None:
    outcome = cohort(bits, members, 0.3, size=lambda n: drift ** (n / ROUNDS))
    steady(outcome, bits, slack=1.2)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("typical", [1e-9, 1.0])
def test_a_first_guess_that_is_far_off(bits: int, typical: float) -> None:
    outcome = cohort(bits, 3, 0.3, typical=typical)
    assert (outcome.owed < OWED[bits]).all(), outcome
    assert (np.abs(np.log(outcome.scale)) < 0.5).all(), outcome


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("silent", [1, 20])
def test_updates_that_are_zero_for_a_while(bits: int, silent: int) -> None:
    outcome = cohort(bits, 3, 0.3, size=lambda n: float(not 25 <= n < 25 + silent))
    steady(outcome, bits)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("members", [3, 16])
def test_one_region_far_larger_than_the_others(bits: int, members: int) -> None:
    """It is clipped, but what it owes raises the level until it gets through."""
    outcome = cohort(bits, members, 0.0, factors=[10.0] + [1.0] * (members - 1))
    assert (outcome.owed < 8 * OWED[bits]).all(), outcome
    assert (outcome.scale < 12).all(), outcome
    assert (outcome.off < 8 * lost(bits)).all(), outcome


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_regions_of_unequal_weight(bits: int) -> None:
    outcome = cohort(bits, 3, 0.3, shares=[1.0, 0.5, 0.01])
    assert (outcome.owed < OWED[bits]).all(), outcome  # a residual is in the sum's units
    assert (outcome.off < lost(bits)).all(), outcome

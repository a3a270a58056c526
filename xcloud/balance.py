"""Balance: how many inner steps each pool and each region takes, so that all finish a round together.

A round has a fixed number of sequences in all. Worker `i` needs `seconds[i]` for a step of `strides[i]` sequences, and
`extra[i]` seconds for what follows its steps (encoding, sending). All finish at the same time T if worker `i` takes
`(T - extra[i]) / seconds[i]` steps, and together they read `total` sequences if

    T = (total + sum(extra * strides / seconds)) / sum(strides / seconds).

Steps are whole numbers, so they finish within half a step of each other. Two levels use this: a region divides its own
sequences among its pools, the driver those of a round among the regions. Merging weighs by tokens, as it does anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from xcloud.registry import PartConfig

__all__ = ["BalanceConfig", "Mode", "Pace", "balanced_steps"]

Mode = Literal["fixed", "proportional", "dynamic"]

WINDOW = 3
"""Rounds that a dynamic pace is the mean of."""


class BalanceConfig(PartConfig):
    """Whether inner steps follow measured speed.

    `fixed`: every pool and every region takes `inner.steps`, and all wait for the slowest. `proportional`: the steps follow the
    speed that was measured first (in the second round where there is one: the first is slower, as caches fill), and stay.
    `dynamic`: they follow the mean of the last rounds.

    Attributes:
        pools: of the steps of a region's pools.
        regions: of the steps of regions.
    """

    pools: Mode = "fixed"
    regions: Mode = "fixed"


class Pace:
    """What one worker has been measured at.

    Args:
        mode: of `BalanceConfig`.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._measured: list[tuple[float, float]] = []
        self._rounds = 0

    def note(self, seconds: float, extra: float = 0.0) -> None:
        """Take down a round: seconds for one step, and for what followed the steps."""
        if self.mode == "proportional" and self._rounds >= 2:
            return
        self._rounds += 1
        if self._rounds == 2:
            self._measured.clear()  # the first round also filled caches and memory pools
        self._measured = [*self._measured, (seconds, extra)][-WINDOW:]

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return self.mode != "fixed" and bool(self._measured)

    @property
    def seconds(self) -> float:
        """For one step."""
        return sum(seconds for seconds, _ in self._measured) / len(self._measured)

    @property
    def extra(self) -> float:
        """Seconds for what follows the steps."""
        return sum(extra for _, extra in self._measured) / len(self._measured)


def balanced_steps(
    total: int, strides: Sequence[int], paces: Sequence[Pace], usual: int, least: int = 1
) -> list[int]:
    """Steps of each worker with which all finish together.

    Args:
        total: sequences of all workers together.
        strides: sequences in one step of each.
        paces: what each was measured at.
        usual: steps of each while one of them is not known.
        least: steps that no worker may go below.

    Returns:
        Whole steps in the workers' order. Together they read `total` sequences, but for rounding and `least`.
    """
    if not all(pace.known and pace.seconds > 0 for pace in paces):
        return [usual] * len(paces)
    rates = [stride / pace.seconds for stride, pace in zip(strides, paces, strict=True)]
    later = sum(pace.extra * rate for pace, rate in zip(paces, rates, strict=True))
    end = (total + later) / sum(rates)
    return [max(least, round((end - pace.extra) / pace.seconds)) for pace in paces]

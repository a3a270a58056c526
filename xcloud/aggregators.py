"""Aggregators: how the updates of several regions become one.

An aggregator first turns the regions' reports into weights, then combines one chunk at a
time. It never sees a whole model. `needs_plaintext` says that it must see single updates
(median, Krum) and therefore cannot run under masks.

`mean` is federated averaging (FedAvg, arXiv 1602.05629): each region's pseudo-gradient
weighted by the tokens behind it. With outer SGD at learning rate 1 this is FedAvg; with
outer Nesterov it is DiLoCo (arXiv 2311.08105).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from xcloud.messages import RegionReport
from xcloud.registry import PartConfig, Registry

__all__ = ["AGGREGATORS", "Aggregator", "AggregatorConfig", "Mean", "MeanConfig"]

BLOCK = 1 << 17
"""Elements worked on at a time: 512 KiB of fp32. Smaller blocks sit closer in cache, but two
threads then spend their time handing Python's lock to each other (twice as slow at 32 KiB)."""


class Aggregator(Protocol):
    """Combines the regions' updates."""

    needs_plaintext: bool

    def weights(self, reports: Sequence[RegionReport]) -> list[float]:
        """One weight for each report; they sum to 1."""
        ...

    def combine(
        self,
        updates: Sequence[npt.NDArray[np.float32]],
        weights: Sequence[float],
        out: npt.NDArray[np.float32],
    ) -> None:
        """Combine one chunk of every region (fp32, shape (n,)) into `out` (same shape).

        The result must depend on the order of `updates` only, never on timing; several
        threads call this at once, for different chunks.
        """
        ...


class AggregatorConfig(PartConfig):
    """Base config of the family."""

    type: str

    def build(self) -> Aggregator:
        raise NotImplementedError  # every registered subclass builds its aggregator


AGGREGATORS: Registry[AggregatorConfig] = Registry("aggregator", AggregatorConfig)


class Mean:
    """Weighted mean, folded block by block in the order given."""

    needs_plaintext = False

    def __init__(self, weigh_by: Literal["tokens", "equal"]) -> None:
        self.weigh_by = weigh_by

    def weights(self, reports: Sequence[RegionReport]) -> list[float]:
        if self.weigh_by == "equal" or not any(r.tokens for r in reports):
            return [1.0 / len(reports)] * len(reports)
        total = sum(r.tokens for r in reports)
        return [r.tokens / total for r in reports]

    def combine(
        self,
        updates: Sequence[npt.NDArray[np.float32]],
        weights: Sequence[float],
        out: npt.NDArray[np.float32],
    ) -> None:
        scale = [np.float32(w) for w in weights]
        alike = len(set(scale)) == 1  # one pass less for each region, and the common case
        work = np.empty(
            0 if alike else min(BLOCK, out.size), np.float32
        )  # not shared: threads fold side by side
        for start in range(0, out.size, BLOCK):
            block = slice(start, min(start + BLOCK, out.size))
            total = out[block]
            if alike and len(updates) > 1:
                np.add(updates[0][block], updates[1][block], out=total)
                for update in updates[2:]:
                    np.add(total, update[block], out=total)
                np.multiply(total, scale[0], out=total)
                continue
            product = work[: total.size]
            np.multiply(updates[0][block], scale[0], out=total)
            for update, factor in zip(updates[1:], scale[1:], strict=True):
                np.multiply(update[block], factor, out=product)
                np.add(total, product, out=total)


@AGGREGATORS.register
class MeanConfig(AggregatorConfig):
    """`mean`: average the updates, weighted by tokens (default) or equally."""

    type: Literal["mean"] = "mean"
    weigh_by: Literal["tokens", "equal"] = "tokens"

    def build(self) -> Aggregator:
        return Mean(self.weigh_by)

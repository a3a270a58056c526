"""Aggregators: how the updates of several regions become one.

An aggregator first turns the regions' reports into weights; then one chunk at a time is combined. It never
sees a whole model. Most are weighted sums (`additive`), which the aggregation folds one update after the other.
`needs_plaintext` says that it must see single updates (median, Krum) and therefore cannot run under masks.

`mean` is federated averaging (FedAvg, arXiv 1602.05629): each region's pseudo-gradient
weighted by the tokens behind it. With outer SGD at learning rate 1 this is FedAvg; with
outer Nesterov it is DiLoCo (arXiv 2311.08105).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from xcloud.errors import AggregationError
from xcloud.messages import RegionReport
from xcloud.registry import PartConfig, Registry

__all__ = ["AGGREGATORS", "Aggregator", "AggregatorConfig", "Gram", "Mean", "MeanConfig"]

Array = npt.NDArray[np.float32]
Gram = npt.NDArray[np.float64]

BLOCK = 1 << 17
"""Elements worked on at a time: 512 KiB of fp32. Smaller blocks sit closer in cache, but two
threads then spend their time handing Python's lock to each other (twice as slow at 32 KiB)."""

COORDINATES = 1 << 13
"""Coordinates sorted at a time: a few hundred KiB for ten regions."""

VANISHING = 1e-9
"""An update shorter than this share of the longest is rounding error, and has no direction."""

DEGENERATE = 1e-3
"""A mean of unit directions shorter than this says nothing of a direction."""


class Aggregator(Protocol):
    """Combines the regions' updates."""

    needs_plaintext: bool
    needs_gram: bool
    """Whether `weights` wants the updates' inner products, which takes one more pass over them."""
    additive: bool
    """Whether `combine` is the sum of weights x updates; the aggregation may then take it in any pieces."""

    def weights(self, reports: Sequence[RegionReport], gram: Gram | None = None) -> list[float]:
        """One weight for each report; they sum to 1 unless the algorithm bounds or restores lengths.

        Args:
            gram: inner products of the whole updates, (n, n) in the reports' order, if `needs_gram`.

        Raises:
            AggregationError: the algorithm is not defined for so few regions.
        """
        ...

    def combine(
        self,
        updates: Sequence[Array],
        weights: Sequence[float],
        out: Array,
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
    """Weighted mean, folded block by block in the order given.

    An update of weight 0 is left out rather than multiplied: 0 x NaN is NaN.
    """

    needs_plaintext = False
    needs_gram = False
    additive = True

    def __init__(self, weigh_by: Literal["tokens", "equal"]) -> None:
        self.weigh_by = weigh_by

    def weights(self, reports: Sequence[RegionReport], gram: Gram | None = None) -> list[float]:
        del gram
        return [1.0 / len(reports)] * len(reports) if self.weigh_by == "equal" else _tokens(reports)

    def combine(
        self,
        updates: Sequence[Array],
        weights: Sequence[float],
        out: Array,
    ) -> None:
        counted = [(u, np.float32(w)) for u, w in zip(updates, weights, strict=True) if w]
        if not counted:
            out[:] = 0
            return
        updates, scale = [u for u, _ in counted], [w for _, w in counted]
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


def _tokens(reports: Sequence[RegionReport]) -> list[float]:
    """Shares of the tokens; equal ones where nobody has any."""
    total = sum(r.tokens for r in reports)
    return [r.tokens / total for r in reports] if total else [1.0 / len(reports)] * len(reports)


def _shares(values: Sequence[float]) -> list[float]:
    """`values` over their sum; equal shares where that says nothing."""
    total = math.fsum(values)
    if not (total > 0 and math.isfinite(total)):
        return [1.0 / len(values)] * len(values)
    return [value / total for value in values]


class Weighted(Mean):
    """A mean whose weights come from a function of the reports and, if it asks for it, the Gram matrix."""

    def __init__(
        self, weigh: Callable[[Sequence[RegionReport], Gram | None], list[float]], needs_gram: bool = False
    ) -> None:
        super().__init__("tokens")
        self._weigh = weigh
        self.needs_gram = self.needs_plaintext = needs_gram

    def weights(self, reports: Sequence[RegionReport], gram: Gram | None = None) -> list[float]:
        assert not self.needs_gram or gram is not None, "the aggregation takes the inner products first"
        return self._weigh(reports, gram)


class Coordinatewise:
    """Median or trimmed mean of each coordinate; every region counts the same (arXiv 1803.01498)."""

    needs_plaintext = True
    needs_gram = False
    additive = False

    def __init__(self, trim: float) -> None:
        self.trim = trim

    def weights(self, reports: Sequence[RegionReport], gram: Gram | None = None) -> list[float]:
        del gram
        return [1.0 / len(reports)] * len(reports)

    def combine(self, updates: Sequence[Array], weights: Sequence[float], out: Array) -> None:
        del weights
        count = len(updates)
        cut = min(int(self.trim * count), (count - 1) // 2)
        work = np.empty((count, min(COORDINATES, out.size)), np.float32)
        for start in range(0, out.size, COORDINATES):
            block = out[start : start + COORDINATES]
            ordered = work[:, : block.size]
            for row, update in zip(ordered, updates, strict=True):
                row[:] = update[start : start + block.size]
            ordered.sort(axis=0)
            kept = ordered[cut : count - cut]
            block[:] = kept[0]
            for row in kept[1:]:
                block += row
            if len(kept) > 1:
                block *= np.float32(1.0 / len(kept))


def _radial(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
    """Length and direction averaged apart; the plain mean where the directions cancel."""
    assert gram is not None
    shares, norms = _tokens(reports), np.sqrt(np.maximum(np.diag(gram), 0.0))
    if len(reports) == 1 or not norms.min() > VANISHING * norms.max():
        return shares
    turned = np.array(shares) / norms
    length = math.sqrt(max(0.0, float(turned @ gram @ turned)))
    if length < DEGENERATE:
        return shares
    radius = float(np.dot(shares, norms))
    return [float(factor * radius / length) for factor in turned]


def _krum(faulty: int, keep: int | None) -> Callable[[Sequence[RegionReport], Gram | None], list[float]]:
    def weigh(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
        assert gram is not None
        count = len(reports)
        if count < 2 * faulty + 3 and faulty:
            raise AggregationError(
                f"multi_krum with faulty: {faulty} needs at least {2 * faulty + 3} regions, {count} answered"
            )
        kept = min(count, keep or count - faulty)
        squares = np.diag(gram)
        with np.errstate(invalid="ignore"):
            distances = squares[:, None] + squares[None, :] - 2 * gram
        distances[~np.isfinite(distances)] = np.inf  # whatever holds NaN or Inf lies apart from all others
        near = np.sort(distances, axis=1)[:, 1 : max(2, count - faulty - 1)]  # the first is its own, zero
        best = np.argsort(near.sum(axis=1), kind="stable")[:kept]
        return [1.0 / kept if i in best else 0.0 for i in range(count)]

    return weigh


@AGGREGATORS.register
class DynamicConfig(AggregatorConfig):
    """`dynamic`: tokens, tilted towards regions whose training loss is high, or whose throughput is.

    Attributes:
        by: `loss` gives weight to regions that have most to teach, `throughput` to the fastest.
        temperature: how strongly; 0 is the plain mean. The factor is `(value / mean value) ** temperature`.
    """

    type: Literal["dynamic"] = "dynamic"
    by: Literal["loss", "throughput"] = "loss"
    temperature: Annotated[float, Field(ge=0)] = 1.0

    def build(self) -> Aggregator:
        def weigh(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
            del gram
            values = [
                r.train_loss if self.by == "loss" else r.tokens / r.compute_s if r.compute_s else 0.0
                for r in reports
            ]
            good = [v for v in values if math.isfinite(v) and v > 0]
            middle = math.fsum(good) / len(good) if good else 1.0
            factors = [(v / middle if v in good else 1.0) ** self.temperature for v in values]
            return _shares([s * f for s, f in zip(_tokens(reports), factors, strict=True)])

        return Weighted(weigh)


@AGGREGATORS.register
class LossOverSizeConfig(AggregatorConfig):
    """`loss_over_size`: weight `L_k / (|D_k| B_k^alpha)`, a labelled reproduction of arXiv 2503.12226.

    L_k is the region's training loss, |D_k| the tokens of its round, B_k its measured tokens per second.
    """

    type: Literal["loss_over_size"] = "loss_over_size"
    alpha: float = 0.5

    def build(self) -> Aggregator:
        def weigh(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
            del gram
            speeds = [r.tokens / r.compute_s if r.compute_s else 0.0 for r in reports]
            if not all(
                r.tokens and s and math.isfinite(r.train_loss) for r, s in zip(reports, speeds, strict=True)
            ):
                return _tokens(reports)
            return _shares(
                [r.train_loss / (r.tokens * s**self.alpha) for r, s in zip(reports, speeds, strict=True)]
            )

        return Weighted(weigh)


@AGGREGATORS.register
class RadialConfig(AggregatorConfig):
    """`rda`: radial-directional averaging of Decoupled DiLoCo (arXiv 2604.21428).

    The mean of the updates' lengths times the direction of the mean of their directions, over the
    whole update; weights do not sum to 1.
    """

    type: Literal["rda"] = "rda"

    def build(self) -> Aggregator:
        return Weighted(_radial, needs_gram=True)


@AGGREGATORS.register
class TrimmedMeanConfig(AggregatorConfig):
    """`trimmed_mean`: of each coordinate, without the smallest and the largest.

    Attributes:
        trim: share of the regions left out at each end.
    """

    type: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def build(self) -> Aggregator:
        return Coordinatewise(self.trim)


@AGGREGATORS.register
class MedianConfig(AggregatorConfig):
    """`median`: of each coordinate; the mean of the middle two of an even number."""

    type: Literal["median"] = "median"

    def build(self) -> Aggregator:
        return Coordinatewise(0.5)


@AGGREGATORS.register
class MultiKrumConfig(AggregatorConfig):
    """`multi_krum`: the mean of the updates that lie closest to their neighbours (arXiv 1703.02757).

    Attributes:
        faulty: regions that may send anything (f); at least 2 f + 3 regions must answer.
        keep: updates averaged (m); null: all but f.
    """

    type: Literal["multi_krum"] = "multi_krum"
    faulty: Annotated[int, Field(ge=0)] = 0
    keep: Annotated[int, Field(ge=1)] | None = None

    def build(self) -> Aggregator:
        return Weighted(_krum(self.faulty, self.keep), needs_gram=True)


@AGGREGATORS.register
class NormBoundConfig(AggregatorConfig):
    """`norm_bound`: the mean by tokens of updates scaled down to a largest norm; weights sum to at most 1.

    Attributes:
        limit: the largest L2 norm; null: the median of the regions' norms, as SparseLoCo does (arXiv 2508.15706).
    """

    type: Literal["norm_bound"] = "norm_bound"
    limit: Annotated[float, Field(gt=0)] | None = None

    def build(self) -> Aggregator:
        def weigh(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
            assert gram is not None
            norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
            limit = float(np.median(norms)) if self.limit is None else self.limit
            return [
                share * (limit / float(norm) if norm > limit else 1.0)
                for share, norm in zip(_tokens(reports), norms, strict=True)
            ]

        return Weighted(weigh, needs_gram=True)


@AGGREGATORS.register
class FedNovaConfig(AggregatorConfig):
    """`fednova`: normalised averaging for unequal numbers of steps (arXiv 2007.07481).

    Each update is divided by its region's inner steps and the mean multiplied by their mean; weights do
    not sum to 1 where steps differ.
    """

    type: Literal["fednova"] = "fednova"

    def build(self) -> Aggregator:
        def weigh(reports: Sequence[RegionReport], gram: Gram | None) -> list[float]:
            del gram
            steps = [max((pool.steps for pool in r.pools), default=0) or 1 for r in reports]
            shares = _tokens(reports)
            effective = math.fsum(p * t for p, t in zip(shares, steps, strict=True))
            return [p * effective / t for p, t in zip(shares, steps, strict=True)]

        return Weighted(weigh)

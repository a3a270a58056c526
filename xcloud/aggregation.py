"""The aggregation actor: stateless, and never larger than a few chunks.

It holds chunk buffers of the merge in flight and nothing else: no model, no outer
optimizer, no key. Chunks are folded one id at a time, over the regions in the job's order,
so the sum does not depend on who came first and is bit for bit the same after a resume.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import ray

from xcloud.aggregators import AggregatorConfig
from xcloud.codecs import CodecConfig
from xcloud.errors import AggregationError, RegionError
from xcloud.messages import RegionReport, RoundPlan, RoundSum
from xcloud.parts import Bundle, PartReader, PartWriter
from xcloud.transport.blobs import Handle, RayBlobs
from xcloud.transport.calls import call

__all__ = ["Aggregation", "AggregatorHandle", "ClusterAggregation"]


THREADS = 2
"""Parts folded side by side; each thread holds one part's buffer."""

PART_BYTES = 16 << 20
"""Shorter than the regions' parts: these buffers are all that an aggregator adds to its process."""


class Aggregation:
    """Folds the updates of one round.

    Args:
        aggregator: how updates combine.
        codec: how they were encoded.
        blobs: where the chunks are.
    """

    def __init__(self, aggregator: AggregatorConfig, codec: CodecConfig, blobs: RayBlobs) -> None:
        self.aggregator = aggregator.build()
        self.codec = codec.build()
        self.blobs = blobs
        self._pool = ThreadPoolExecutor(THREADS)
        self._own = (
            threading.local()
        )  # each thread's buffer, made once: fresh ones would cost as much as the fold

    def merge(
        self,
        plan: RoundPlan,
        lengths: Sequence[int],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> tuple[RoundSum, list[Handle]]:
        """Combine the regions' updates, chunk by chunk.

        Args:
            plan: of the round.
            lengths: elements of each chunk.
            reports: in the job's order of regions.
            updates: for each report, one handle for each of its parts.

        Raises:
            RegionError: a region's chunk has the wrong size or cannot be fetched.
            AggregationError: reports that do not belong to this round, or a non-finite sum.
        """
        began = time.perf_counter()
        for report, handles in zip(reports, updates, strict=True):
            if report.round != plan.round:
                raise AggregationError(
                    f"{report.region!r} reports round {report.round}, expected {plan.round}"
                )
            if len(report.chunk_bytes) != len(lengths) or len(handles) != len(report.parts):
                raise RegionError(
                    report.region,
                    f"sent {len(report.chunk_bytes)} chunks in {len(handles)} buffers, "
                    f"expected {len(lengths)} in {len(report.parts)}",
                )
        weights = self.aggregator.weights(reports)
        spans = _spans(lengths, PART_BYTES // 4)
        folded = list(
            self._pool.map(lambda span: self._fold(span, lengths, reports, updates, weights), spans)
        )
        norm_squared = sum(norm for _, norm in folded)
        if not math.isfinite(norm_squared):
            raise AggregationError(f"round {plan.round}: the merged update is not finite")
        merged = Bundle.join(bundle for bundle, _ in folded)
        summary = RoundSum(
            round=plan.round,
            attempt=plan.attempt,
            regions=tuple(r.region for r in reports),
            weights=tuple(weights),
            chunk_bytes=merged.sizes,
            parts=merged.parts,
            norm=math.sqrt(norm_squared),
            fold_s=time.perf_counter() - began,
        )
        return summary, list(merged.handles)

    def _fold(
        self,
        span: range,
        lengths: Sequence[int],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
        weights: Sequence[float],
    ) -> tuple[Bundle, float]:
        """Fold the chunks of one outgoing part: its bundle and squared norm."""
        readers = [self._reader(report, handles) for report, handles in zip(reports, updates, strict=True)]
        writer = getattr(self._own, "writer", None)
        if writer is None:
            writer = self._own.writer = PartWriter(self.blobs.put, lengths, PART_BYTES)
        norm_squared = 0.0
        for chunk in span:
            values = [
                self._decoded(report.region, reader, chunk, lengths[chunk])
                for report, reader in zip(reports, readers, strict=True)
            ]
            out = writer.slot(lengths[chunk])
            self.aggregator.combine(values, weights, out)
            norm_squared += float(np.dot(out, out))
            writer.add(chunk, out.view(np.uint8))
        return writer.finish(), norm_squared

    def _reader(self, report: RegionReport, handles: Sequence[Handle]) -> PartReader:
        try:
            return PartReader(self.blobs.get, Bundle(report.parts, report.chunk_bytes, tuple(handles)))
        except ValueError as error:
            raise RegionError(report.region, f"its update is malformed: {error}") from None

    def _decoded(self, region: str, reader: PartReader, chunk: int, length: int) -> Any:
        try:
            return self.codec.decode(reader.read(chunk), length)
        except ray.exceptions.RayError as error:
            raise RegionError(
                region, f"chunk {chunk} of its update is lost ({type(error).__name__})"
            ) from None
        except ValueError as error:
            raise RegionError(region, f"chunk {chunk} of its update is malformed: {error}") from None


def _spans(lengths: Sequence[int], elements: int) -> list[range]:
    """Runs of consecutive chunks of at most `elements` elements together, one chunk at least."""
    spans, start, held = [], 0, 0
    for chunk, length in enumerate(lengths):
        if chunk > start and held + length > elements:
            spans.append(range(start, chunk))
            start, held = chunk, 0
        held += length
    if start < len(lengths):
        spans.append(range(start, len(lengths)))
    return spans


class AggregationActor:
    """`Aggregation` inside an actor: headers as JSON bytes, buffers as handles."""

    def __init__(self, aggregator: AggregatorConfig, codec: CodecConfig) -> None:
        self.inner = Aggregation(aggregator, codec, RayBlobs())

    def merge(
        self, plan: bytes, lengths: list[int], reports: list[bytes], updates: list[list[Handle]]
    ) -> tuple[bytes, list[Handle]]:
        total, handles = self.inner.merge(
            RoundPlan.from_wire(plan, "driver"),
            lengths,
            [RegionReport.from_wire(report, "a region") for report in reports],
            updates,
        )
        return total.to_wire(), handles

    def pid(self) -> int:
        """Process id, for memory measurements."""
        return os.getpid()


class AggregatorHandle(Protocol):
    """The aggregation actor as the driver sees it."""

    def merge(
        self,
        plan: RoundPlan,
        lengths: Sequence[int],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Any]],
    ) -> Future[tuple[RoundSum, list[Any]]]: ...

    def restart(self) -> None: ...


class ClusterAggregation:
    """The driver's side of an aggregation actor in its own Ray cluster."""

    def __init__(self, aggregator: AggregatorConfig, codec: CodecConfig) -> None:
        self._options = (aggregator, codec)
        self._start()

    def _start(self) -> None:
        self.actor = ray.remote(AggregationActor).options(num_cpus=0).remote(*self._options)

    def merge(
        self,
        plan: RoundPlan,
        lengths: Sequence[int],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> Future[tuple[RoundSum, list[Handle]]]:
        """Merge in the actor; see `Aggregation.merge`."""
        reference = self.actor.merge.remote(
            plan.to_wire(), list(lengths), [r.to_wire() for r in reports], [list(u) for u in updates]
        )
        return call("the aggregator", reference, lambda r: (RoundSum.from_wire(r[0], "aggregator"), r[1]))

    def restart(self) -> None:
        """A fresh actor; it holds no state worth saving."""
        ray.kill(self.actor)
        self._start()

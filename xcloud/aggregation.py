"""The aggregation actor: stateless, and never larger than a few chunks.

It holds chunk buffers of the merge in flight and nothing else: no model, no outer
optimizer, no key. Chunks are folded one id at a time, over the regions in the job's order,
so the sum does not depend on who came first and is bit for bit the same after a resume.
Encodings that add are added as they are and go down as their total; all others are opened,
combined, and encoded again for the way down.
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

from xcloud.aggregators import Gram
from xcloud.codecs import Array, Bytes, Frame
from xcloud.config import JobConfig, dump_job, parse_job
from xcloud.errors import AggregationError, RegionError
from xcloud.manifest import ChunkLayout
from xcloud.messages import RegionReport, RoundPlan, RoundSum
from xcloud.parts import BlobStore, Bundle, PartReader, PartWriter
from xcloud.transport.blobs import Handle, RayBlobs
from xcloud.transport.calls import call
from xcloud.update import Framing, adds_up

__all__ = ["Aggregation", "AggregatorHandle", "ClusterAggregation"]


THREADS = 2
"""Parts folded side by side; each thread holds one part's buffer."""

PART_BYTES = 16 << 20
"""Shorter than the regions' parts: these buffers are all that an aggregator adds to its process."""


class Aggregation:
    """Folds the updates of one round.

    Args:
        job: says how updates combine, and how they are encoded on their way up and down.
        blobs: where the chunks are.
    """

    def __init__(self, job: JobConfig, blobs: BlobStore) -> None:
        self.aggregator = job.aggregator.build()
        self.codec, self.downlink = job.codec.build(), job.downlink.build()
        self.summed = adds_up(self.codec)
        self.framing = Framing(job.name, job.seed, len(job.regions), "aggregator")
        self.blobs = blobs
        self._pool = ThreadPoolExecutor(THREADS)
        self._own = (
            threading.local()
        )  # each thread's buffer, made once: fresh ones would cost as much as the fold

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> tuple[RoundSum, list[Handle]]:
        """Combine the regions' updates, chunk by chunk.

        Args:
            plan: of the round.
            layout: of each chunk.
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
            if len(report.chunk_bytes) != len(layout) or len(handles) != len(report.parts):
                raise RegionError(
                    report.region,
                    f"sent {len(report.chunk_bytes)} chunks in {len(handles)} buffers, "
                    f"expected {len(layout)} in {len(report.parts)}",
                )
        gram = self._gram(plan.round, layout, reports, updates) if self.aggregator.needs_gram else None
        weights = self.aggregator.weights(reports, gram)
        total_share = math.fsum(report.share for report in reports)
        if self.summed and not total_share > 0:
            raise AggregationError(f"round {plan.round}: the regions' shares sum to {total_share}")
        spans = _spans([chunk.length for chunk in layout], PART_BYTES // 4)
        folded = list(
            self._pool.map(
                lambda span: self._fold(span, plan.round, layout, reports, updates, weights), spans
            )
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
            norm=None if self.summed else math.sqrt(norm_squared),
            summed=self.summed,
            total_share=total_share,
            fold_s=time.perf_counter() - began,
        )
        return summary, list(merged.handles)

    def _gram(
        self,
        round: int,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> Gram:
        """Inner products of the whole updates, chunk by chunk."""
        readers = [self._reader(report, handles) for report, handles in zip(reports, updates, strict=True)]
        gram = np.zeros((len(reports), len(reports)))
        for chunk, shape in enumerate(layout):
            frame = self.framing.frame(round, chunk, shape)
            values = [
                self._opened(report.region, reader, chunk, shape.length, frame)
                for report, reader in zip(reports, readers, strict=True)
            ]
            for i, one in enumerate(values):
                for j in range(i + 1):
                    gram[i, j] += float(np.dot(one, values[j]))
        return np.tril(gram) + np.tril(gram, -1).T

    def _fold(
        self,
        span: range,
        round: int,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
        weights: Sequence[float],
    ) -> tuple[Bundle, float]:
        """Fold the chunks of one outgoing part: its bundle and squared norm."""
        readers = [self._reader(report, handles) for report, handles in zip(reports, updates, strict=True)]
        writer = getattr(self._own, "writer", None)
        if writer is None:
            lengths = [chunk.length for chunk in layout]
            writer = self._own.writer = PartWriter(self.blobs.put, lengths, PART_BYTES)
        regions = [report.region for report in reports]
        norm_squared = 0.0
        for chunk in span:
            frame = self.framing.frame(round, chunk, layout[chunk])
            if self.summed:
                writer.add(chunk, self._total(regions, readers, chunk, layout[chunk].length, frame))
                continue
            values = [
                self._opened(region, reader, chunk, layout[chunk].length, frame)
                for region, reader in zip(regions, readers, strict=True)
            ]
            out = writer.slot(layout[chunk].length)
            self.aggregator.combine(values, weights, out)
            norm_squared += float(np.dot(out, out))
            writer.add(chunk, self.downlink.encode(out, frame))
        return writer.finish(), norm_squared

    def _total(
        self, regions: Sequence[str], readers: Sequence[PartReader], chunk: int, length: int, frame: Frame
    ) -> Bytes:
        """The encodings of one chunk, added without opening them."""
        total: Bytes | None = None
        for region, reader in zip(regions, readers, strict=True):
            data = self._fetched(region, reader, chunk)
            if total is None:
                total = data.copy()
                continue
            if data.nbytes != total.nbytes:
                raise RegionError(
                    region,
                    f"chunk {chunk} of its update ({length} values) has {data.nbytes} bytes, "
                    f"expected {total.nbytes} as from {regions[0]!r}",
                )
            self.codec.add(total, data, frame)
        assert total is not None, "a round merges at least one region"
        return total

    def _reader(self, report: RegionReport, handles: Sequence[Handle]) -> PartReader:
        try:
            return PartReader(self.blobs.get, Bundle(report.parts, report.chunk_bytes, tuple(handles)))
        except ValueError as error:
            raise RegionError(report.region, f"its update is malformed: {error}") from None

    def _opened(self, region: str, reader: PartReader, chunk: int, length: int, frame: Frame) -> Array:
        data = self._fetched(region, reader, chunk)
        try:
            return self.codec.decode(data, length, frame)
        except ValueError as error:
            raise RegionError(region, f"chunk {chunk} of its update is malformed: {error}") from None

    def _fetched(self, region: str, reader: PartReader, chunk: int) -> Bytes:
        try:
            return reader.read(chunk)
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

    def __init__(self, job: str) -> None:
        self.inner = Aggregation(parse_job(job), RayBlobs())

    def merge(
        self, plan: bytes, layout: list[Any], reports: list[bytes], updates: list[list[Handle]]
    ) -> tuple[bytes, list[Handle]]:
        total, handles = self.inner.merge(
            RoundPlan.from_wire(plan, "driver"),
            [ChunkLayout(*chunk) for chunk in layout],
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
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Any]],
    ) -> Future[tuple[RoundSum, list[Any]]]: ...

    def restart(self) -> None: ...


class ClusterAggregation:
    """The driver's side of an aggregation actor in its own Ray cluster."""

    def __init__(self, job: JobConfig) -> None:
        self._job = dump_job(job)
        self._start()

    def _start(self) -> None:
        self.actor = ray.remote(AggregationActor).options(num_cpus=0).remote(self._job)

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> Future[tuple[RoundSum, list[Handle]]]:
        """Merge in the actor; see `Aggregation.merge`."""
        reference = self.actor.merge.remote(
            plan.to_wire(),
            [(c.length, c.matrices) for c in layout],
            [r.to_wire() for r in reports],
            [list(u) for u in updates],
        )
        return call("the aggregator", reference, lambda r: (RoundSum.from_wire(r[0], "aggregator"), r[1]))

    def restart(self) -> None:
        """A fresh actor; it holds no state worth saving."""
        ray.kill(self.actor)
        self._start()

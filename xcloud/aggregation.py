"""The aggregation actor: stateless, and never larger than a few chunks.

It holds chunk buffers of the merge in flight and nothing else: no model, no outer
optimizer, no key. Chunks are folded one id at a time, over the regions in the job's order,
so the sum does not depend on who came first and is bit for bit the same after a resume.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import ray
import xxhash

from xcloud.aggregators import AggregatorConfig
from xcloud.codecs import CodecConfig
from xcloud.errors import AggregationError, RegionError
from xcloud.messages import RegionReport, RoundPlan, RoundSum
from xcloud.transport.blobs import Handle, RayBlobs
from xcloud.transport.calls import call

__all__ = ["Aggregation", "AggregatorHandle", "ClusterAggregation"]


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
            updates: for each report, one handle for each chunk.

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
            if len(handles) != len(lengths):
                raise RegionError(report.region, f"sent {len(handles)} chunks, expected {len(lengths)}")
        weights = self.aggregator.weights(reports)
        digest, norm_squared, merged = xxhash.xxh3_128(), 0.0, []
        total = np.empty(max(lengths, default=0), np.float32)
        for chunk, length in enumerate(lengths):
            values = [
                self._decoded(report.region, chunk, handles[chunk], length)
                for report, handles in zip(reports, updates, strict=True)
            ]
            out = total[:length]
            self.aggregator.combine(values, weights, out)
            norm_squared += float(np.dot(out, out))
            digest.update(out)
            merged.append(self.blobs.put(out.view(np.uint8)))
        if not math.isfinite(norm_squared):
            raise AggregationError(f"round {plan.round}: the merged update is not finite")
        summary = RoundSum(
            round=plan.round,
            attempt=plan.attempt,
            regions=tuple(r.region for r in reports),
            weights=tuple(weights),
            chunk_bytes=tuple(4 * length for length in lengths),
            digest=digest.hexdigest(),
            norm=math.sqrt(norm_squared),
            fold_s=time.perf_counter() - began,
        )
        return summary, merged

    def _decoded(self, region: str, chunk: int, handle: Handle, length: int) -> Any:
        try:
            (data,) = self.blobs.get([handle])
        except ray.exceptions.RayError as error:
            raise RegionError(
                region, f"chunk {chunk} of its update is lost ({type(error).__name__})"
            ) from None
        try:
            return self.codec.decode(data, length)
        except ValueError as error:
            raise RegionError(region, f"chunk {chunk} of its update is malformed: {error}") from None


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
        return call("aggregator", reference, lambda r: (RoundSum.from_wire(r[0], "aggregator"), r[1]))

    def restart(self) -> None:
        """A fresh actor; it holds no state worth saving."""
        ray.kill(self.actor)
        self._start()

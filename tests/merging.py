"""A merge without Ray: folders in this process, buffers in a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import ray
import yaml

from tests.strategies import Array, report
from xcloud.aggregation import Aggregation
from xcloud.config import JobConfig, dump_job, parse_job
from xcloud.folding import Folder
from xcloud.manifest import ChunkLayout
from xcloud.messages import RegionReport, RoundPlan, RoundSum
from xcloud.parts import BlobStore, Bundle, PartReader, PartWriter
from xcloud.transport.blobs import Copies
from xcloud.update import Framing, UpdatePath

__all__ = [
    "LAYOUT",
    "LENGTHS",
    "LocalCrew",
    "Store",
    "encodings",
    "job_of",
    "merge",
    "noise",
    "open_sum",
    "plan_of",
    "send",
]

LENGTHS = (5000, 5000, 5000, 5000, 5000, 5000, 1234)
LAYOUT = tuple(ChunkLayout(length) for length in LENGTHS)


class Store:
    """Blobs in a dictionary; remembers what was sent for and what was read, in order."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.log: list[tuple[str, int]] = []
        self.cloud: str | None = None
        self._numbers = count()  # folders put from several threads

    def put(self, buffer: Any) -> int:
        handle = next(self._numbers)
        self.kept[handle] = buffer.copy()
        self.kept[handle].flags.writeable = False
        return handle

    def get(self, handles: Sequence[Any]) -> list[Any]:
        here = [h.seen_from(self.cloud) if isinstance(h, Copies) else h for h in handles]
        self.log += [("get", handle) for handle in here]
        if any(handle not in self.kept for handle in here):
            raise ray.exceptions.OwnerDiedError("ab" * 14, None, "somewhere")
        return [self.kept[handle] for handle in here]

    def prefetch(self, handles: Sequence[Any]) -> None:
        self.log += [("prefetch", handle) for handle in handles]


class LocalCrew:
    """Folders of a job, made when they are first asked."""

    def __init__(self, job: JobConfig, store: Store) -> None:
        self.job, self.store = dump_job(job), store
        self.folders: dict[Any, Folder] = {}

    def folder(self, who: Any) -> Folder:
        """The folder of a share or a cloud."""
        if who not in self.folders:
            cloud, share = (who, 0) if isinstance(who, str) else (None, who)
            self.folders[who] = Folder(self.job, self.store, cloud, share)
        return self.folders[who]

    def ask(self, method: str, calls: Mapping[Any, tuple[Any, ...]]) -> dict[Any, Any]:
        return {who: getattr(self.folder(who), method)(*args) for who, args in calls.items()}


def job_of(clouds: Sequence[str] = ("aws", "gcp", "azure"), **changes: Any) -> JobConfig:
    """A job that is never trained; region r0, r1, ... lies in each of `clouds`."""
    regions = [
        {"name": f"r{i}", "cloud": cloud, "data": {"type": "stdlib", "kind": "reference"}, "pools": [{}]}
        for i, cloud in enumerate(clouds)
    ]
    raw = {"name": "m", "rounds": 1, "model": {"config": {"model_type": "llama"}}, "regions": regions}
    return parse_job(yaml.safe_dump(raw | changes))


def noise(count: int) -> list[Array]:
    """One whole update for each region."""
    return [
        1e-3 * np.random.default_rng(i).standard_normal(sum(LENGTHS), dtype=np.float32) for i in range(count)
    ]


def send(
    job: JobConfig,
    store: BlobStore,
    region: str,
    update: Array,
    tokens: int,
    chunks: range = range(len(LENGTHS)),
    round: int = 1,
) -> tuple[RegionReport, list[Any]]:
    """What a region offers, in parts of a few chunks."""
    framing = Framing(job.name, job.seed, len(job.regions), region)
    path = UpdatePath(job.codec.build(), job.downlink.build(), framing, LAYOUT, chunks)
    writer = PartWriter(store.put, LENGTHS, 45_000)
    for chunk in chunks:
        delta = writer.slot(LENGTHS[chunk])
        delta[:] = update[5000 * chunk :][: LENGTHS[chunk]]
        writer.add(chunk, path.encode(round, chunk, delta, 1.0))
    bundle = writer.finish()
    header = report(region, tokens, chunk_bytes=bundle.sizes)
    header = header.model_copy(update={"parts": bundle.parts, "round": round})
    return header, list(bundle.handles)


def plan_of(chunks: tuple[int, int] | None = None) -> RoundPlan:
    """Round 1."""
    return RoundPlan(
        job="m", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=1, chunks=chunks
    )


def merge(
    job: JobConfig,
    updates: Sequence[Array],
    store: Store | None = None,
    tokens: Sequence[int] | None = None,
    chunks: tuple[int, int] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[RoundSum, list[Any]]:
    """The regions' updates, sent and merged; those past the end of `updates` do not answer."""
    store = store or Store()
    span = range(*chunks) if chunks else range(len(LENGTHS))
    offers = [
        send(job, store, names[i] if names else f"r{i}", update, tokens[i] if tokens else 100 + 7 * i, span)
        for i, update in enumerate(updates)
    ]
    reports, handles = zip(*offers, strict=True)
    return Aggregation(job, LocalCrew(job, store)).merge(plan_of(chunks), LAYOUT, reports, handles)


def encodings(store: BlobStore, total: RoundSum, handles: Sequence[Any]) -> dict[int, bytes]:
    """The merged chunks as they go down."""
    reader = PartReader(store.get, Bundle(total.parts, total.chunk_bytes, tuple(handles)))
    first = total.parts[0][0]
    return {chunk: reader.read(chunk).tobytes() for chunk in range(first, first + len(total.chunk_bytes))}


def open_sum(job: JobConfig, store: Store, total: RoundSum, handles: Sequence[Any]) -> Array:
    """The merged update, as a region decodes it."""
    path = UpdatePath(
        job.codec.build(), job.downlink.build(), Framing("m", job.seed, len(job.regions), "r0"), LAYOUT, range(0)
    )  # fmt: skip
    found = encodings(store, total, handles)
    return np.concatenate(
        [path.decode(chunk, np.frombuffer(data, np.uint8), total) for chunk, data in found.items()]
    )

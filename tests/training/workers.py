"""Workers without actors: one-rank pools inside the test's own process."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xcloud.config import JobConfig
from xcloud.region import worker_spec
from xcloud.training.worker import RankWorker


class MemoryBlobs:
    """A blob store in a list; the real one is Ray's object store, used in the end-to-end tests."""

    def __init__(self) -> None:
        self.kept: list[npt.NDArray[np.uint8]] = []

    def put(self, buffer: npt.NDArray[np.uint8]) -> int:
        self.kept.append(buffer.copy())
        return len(self.kept) - 1

    def get(self, handles: Sequence[Any]) -> list[npt.NDArray[np.uint8]]:
        return [self.kept[handle] for handle in handles]


def start_worker(job: JobConfig, name: str | None = None, blobs: MemoryBlobs | None = None) -> RankWorker:
    """The single rank of a region's first pool, started here."""
    region = job.regions[0] if name is None else job.region(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = RankWorker(worker_spec(job, region.name, 0, 0), blobs or MemoryBlobs())
    worker.start("127.0.0.1", port)
    return worker

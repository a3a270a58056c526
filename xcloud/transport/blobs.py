"""Raw chunk buffers between actors of one Ray cluster, through its object store.

A buffer is put once by its owner and named by a handle; readers map it without a copy when
they share a node. Only raw bytes go in: no object of ours is ever pickled into a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

__all__ = ["Copies", "Handle", "RayBlobs"]

Handle = Any
"""An opaque name of a buffer: a Ray ObjectRef in a cluster."""

Buffer = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Copies:
    """A handle of one buffer that also lies in other clouds: readers there take the copy near them."""

    first: Handle
    near: Mapping[str, Handle]

    def seen_from(self, cloud: str | None) -> Handle:
        """The handle to use in `cloud`."""
        return self.near.get(cloud, self.first) if cloud is not None else self.first


class RayBlobs:
    """Blob store over Ray's object store.

    Args:
        cloud: where its user runs; None: nowhere that has copies of its own.
        reader: actor whose `arriving` is told of every buffer as soon as it is stored, so that it travels while
            the next one is made; None: nobody.
    """

    def __init__(self, cloud: str | None = None, reader: Any = None) -> None:
        self.cloud, self.reader = cloud, reader

    def put(self, buffer: Buffer) -> Handle:
        """Store a copy of `buffer` (uint8, shape (n,)); it lives as long as its handles and this process."""
        handle = ray.put(buffer)
        if self.reader is not None:
            self.reader.arriving.remote([handle])
        return handle

    def get(self, handles: Sequence[Handle]) -> list[Buffer]:
        """The buffers of `handles`, read-only, in order.

        Raises:
            ray.exceptions.RayError: a buffer is lost, because its owner or its node is gone.
        """
        buffers: list[Buffer] = ray.get([self._here(handle) for handle in handles])
        return buffers

    def prefetch(self, handles: Sequence[Handle]) -> None:
        """Have buffers brought to this node; returns at once."""
        wanted = list(dict.fromkeys(self._here(handle) for handle in handles))
        if wanted:
            ray.wait(wanted, num_returns=len(wanted), timeout=0, fetch_local=True)

    def _here(self, handle: Handle) -> Handle:
        return handle.seen_from(self.cloud) if isinstance(handle, Copies) else handle

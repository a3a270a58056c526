"""Raw chunk buffers between actors of one Ray cluster, through its object store.

A buffer is put once by its owner and named by a handle; readers map it without a copy when
they share a node. Only raw bytes go in: no object of ours is ever pickled into a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

__all__ = ["Handle", "RayBlobs"]

Handle = Any
"""An opaque name of a buffer: a Ray ObjectRef in a cluster."""

Buffer = npt.NDArray[np.uint8]


class RayBlobs:
    """Blob store over Ray's object store."""

    def put(self, buffer: Buffer) -> Handle:
        """Store a copy of `buffer` (uint8, shape (n,)); it lives as long as its handles and this process."""
        return ray.put(buffer)

    def get(self, handles: Sequence[Handle]) -> list[Buffer]:
        """The buffers of `handles`, read-only, in order.

        Raises:
            ray.exceptions.RayError: a buffer is lost, because its owner or its node is gone.
        """
        buffers: list[Buffer] = ray.get(list(handles))
        return buffers

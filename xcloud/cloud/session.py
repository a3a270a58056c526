"""The Ray session of a run: join a cluster, or start one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from xcloud.errors import PlacementError

__all__ = ["Session", "ray_session"]


class Session:
    """What the driver needs to know about where it runs.

    Attributes:
        local: this process started its own one-machine Ray; node labels are not enforced there.
    """

    def __init__(self, local: bool) -> None:
        self.local = local


@contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[Session]:
    """Connect to `address` (or $RAY_ADDRESS), else start Ray here with room for `cpus` workers.

    A one-machine session may promise more CPUs than it has: regions of a simulation share
    the cores, as they would share nothing in the clouds they stand for.

    Raises:
        PlacementError: no Ray cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        yield Session(local=False)
        return
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="xcloud")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise PlacementError(
                f"no Ray cluster answers at {address!r} (--address or RAY_ADDRESS): "
                f"{str(error).strip().splitlines()[0]}"
            ) from None
    else:
        ray.init(
            address="local",  # not a Ray that `ray start` has left here; that one is joined by its address
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="xcloud",
        )
    try:
        yield Session(local=address is None)
    finally:
        ray.shutdown()

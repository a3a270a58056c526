"""The Ray session of a run: join a cluster, or start one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private.services import canonicalize_bootstrap_address

from xcloud.cloud.guard import check_cluster, is_loopback
from xcloud.errors import PlacementError, SecurityError

__all__ = ["Session", "node_labels", "ray_session"]


class Session:
    """What the driver needs to know about where it runs.

    Attributes:
        local: this process started its own one-machine Ray; node labels are not enforced there.
        exposed: the cluster was joined over a network although it is not secured; None: it is, or is on loopback.
    """

    def __init__(self, local: bool, exposed: str | None = None) -> None:
        self.local = local
        self.exposed = exposed


def node_labels() -> dict[str, str]:
    """Labels of the node that this process runs on."""
    here = ray.get_runtime_context().get_node_id()
    return next((dict(node["Labels"]) for node in ray.nodes() if node["NodeID"] == here), {})


@contextmanager
def ray_session(address: str | None, cpus: int, insecure: bool = False) -> Iterator[Session]:
    """Connect to `address` (or $RAY_ADDRESS), else start Ray here with room for `cpus` workers.

    A one-machine session may promise more CPUs than it has: regions of a simulation share
    the cores, as they would share nothing in the clouds they stand for.

    Args:
        address: `HOST:PORT`, `auto` (inside a Ray job, or on a node of the cluster), or None.
        cpus: workers of the job.
        insecure: join a cluster that is not on loopback, although it has no TLS or no token.

    Raises:
        PlacementError: no Ray cluster answers at the address.
        SecurityError: the cluster is not on loopback, and TLS or token are not as `guard.check_cluster` asks.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        yield Session(local=False, exposed=_guard_nodes(insecure))
        return
    if address is not None:
        try:
            if not insecure:
                _guard(address)
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
        yield Session(local=address is None, exposed=None if address is None else _guard_nodes(insecure))
    finally:
        ray.shutdown()


def _guard(address: str) -> None:
    """Apply the rule before anything is sent to an address; `auto` is what Ray would take it for.

    Raises:
        ConnectionError: no Ray runs here that `auto` could mean.
        SecurityError: see `guard.check_cluster`.
    """
    bare = address.removeprefix("ray://")
    found = canonicalize_bootstrap_address("auto") if bare == "auto" else bare
    if found is not None and found != "local":
        host = found.rpartition(":")[0].strip("[]")
        check_cluster(host or found, os.environ)


def _guard_nodes(insecure: bool) -> str | None:
    """Apply the rule to the cluster that was joined: a head on loopback may have nodes that are not.

    Returns:
        The address of a node for which the rule was set aside; None: there is no need to.

    Raises:
        SecurityError: see `guard.check_cluster`.
    """
    hosts = sorted({str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]})
    away = next((host for host in hosts if not is_loopback(host)), None)
    if away is None:
        return None
    try:
        check_cluster(away, os.environ)
    except SecurityError:
        if insecure:
            return away
        raise
    return None

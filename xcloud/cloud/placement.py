"""Placement groups: one for each pool, on nodes that carry the pool's labels."""

from __future__ import annotations

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from xcloud.cloud.settings import PlacementConfig
from xcloud.errors import PlacementError

__all__ = ["bundle_of", "nodes_of", "place_pool", "release_pool"]


def place_pool(name: str, pool: PlacementConfig, enforce_labels: bool) -> PlacementGroup:
    """Reserve one bundle for each worker and wait until they are there.

    The group outlives the actor that made it, until its job ends: see `release_pool`.

    Args:
        name: of the group, unique in the cluster.
        pool: what to reserve.
        enforce_labels: False in a one-machine simulation, whose only node has no labels.

    Raises:
        PlacementError: names the pool, what it needs and what the cluster offers.
    """
    bundle = bundle_of(pool)
    group = placement_group(
        [dict(bundle) for _ in range(pool.workers)],
        strategy=pool.strategy,
        name=name,
        bundle_label_selector=[dict(pool.labels)] * pool.workers if pool.labels and enforce_labels else None,
    )
    if group.wait(pool.placement_timeout_s):
        return group
    state = placement_group_table(group)["stats"]["scheduling_state"]
    remove_placement_group(group)
    offered = [
        f"{ {k: v for k, v in node['Resources'].items() if k in bundle} } {node['Labels']}"
        for node in ray.nodes()
        if node["Alive"]
    ]
    raise PlacementError(
        f"pool {name!r}: needs {pool.workers} x {bundle} ({pool.strategy}) on nodes with labels "
        f"{pool.labels or 'any'}; not there after {pool.placement_timeout_s:.0f} s ({state}). "
        f"Live nodes: {'; '.join(offered)}"
    )


def nodes_of(group: PlacementGroup) -> set[str]:
    """Hex ids of the nodes that a group's bundles lie on."""
    return set(placement_group_table(group)["bundles_to_node_id"].values())


def bundle_of(pool: PlacementConfig) -> dict[str, float]:
    """The resources of one worker."""
    bundle: dict[str, float] = {"CPU": pool.cpus}
    if pool.on_gpu:
        bundle["GPU"] = 1
        if pool.accelerator.lower() != "gpu":
            bundle[f"accelerator_type:{pool.accelerator}"] = 0.001
    return bundle


def release_pool(name: str) -> None:
    """Give a group's bundles back and end what runs in them; a group that never came to be is fine."""
    try:
        remove_placement_group(get_placement_group(name))
    except ValueError:
        return  # Ray's way to say that there is no such group

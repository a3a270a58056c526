"""What a region waits for while its pools have no room, and what the autoscaler does about it, in one line.

Everything is read from the GCS by whoever asks, so that it can be told of a region that has no process yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group_table

from xcloud.cloud.fallback import matches, parse_selector
from xcloud.cloud.gcs import Gcs
from xcloud.cloud.placement import bundle_of
from xcloud.cloud.settings import PlacementConfig

__all__ = ["autoscaler_says", "need", "what_is_missing"]


def what_is_missing(groups: Sequence[str], pools: Sequence[PlacementConfig]) -> str | None:
    """What the first pool without room waits for; None when all have theirs.

    Args:
        groups: the names of the pools' placement groups. One that is not there yet is the next to be asked for.
        pools: what each of them asks for.
    """
    there = {group["name"]: group["state"] for group in placement_group_table().values()}
    index = next((i for i, name in enumerate(groups) if there.get(name) != "CREATED"), None)
    if index is None:
        return None
    pool = pools[index]
    labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    address = ray.get_runtime_context().gcs_address
    status = get_cluster_status(address)
    said = autoscaler_says(
        launching=((one.ray_node_type_name, one.count) for one in status.pending_launches),
        starting=(node.ray_node_type_name for node in status.pending_nodes),
        clouds=Gcs(address).read(),
        wanted=pool.labels,
    )
    return f"pool {index}: {need(pool, labels)}; {said}"


def need(pool: PlacementConfig, nodes: Collection[Mapping[str, str]]) -> str:
    """What a pool asks for, and how many of the live nodes, given by their labels, it may run on."""
    fitting = sum(matches(parse_selector(pool.labels), labels) for labels in nodes)
    bundle = ", ".join(f"{name}: {amount:g}" for name, amount in bundle_of(pool).items())
    where = ", ".join(f"{key}={value}" for key, value in pool.labels.items())
    have = {0: "no such node yet", 1: "1 such node, without the room"}
    return (
        f"waits for {pool.workers} x {{{bundle}}} ({pool.strategy}) on nodes "
        f"{f'with labels {where}' if where else 'of any kind'}: "
        + have.get(fitting, f"{fitting} such nodes, without the room")
    )


def autoscaler_says(
    launching: Iterable[tuple[str, int]],
    starting: Iterable[str],
    clouds: Mapping[str, Any],
    wanted: Mapping[str, str],
) -> str:
    """What the autoscaler is at, as far as it may help.

    Args:
        launching: node types that are being asked for, and how many.
        starting: types of nodes that a cloud has given and that have not joined yet.
        clouds: the composite provider's state (`CompositeNodeProvider`), empty without one.
        wanted: the labels that are waited for.
    """
    selector, types = parse_selector(wanted), clouds.get("types", {})

    def helps(node_type: str) -> bool:
        return node_type not in types or matches(selector, types[node_type])

    asked: Counter[str] = Counter()
    for name, count in launching:
        asked[name] += count
    steps = (("is launching", asked), ("waits for the start of", Counter(starting)))
    parts = [
        f"{does} " + ", ".join(f"{count} x {name}" for name, count in sorted(nodes.items()) if helps(name))
        for does, nodes in steps
        if any(map(helps, nodes))
    ]
    doing = "the autoscaler " + (" and ".join(parts) if parts else "launches nothing for it now")
    down = {name: one["down"] for name, one in clouds.get("clouds", {}).items() if one["down"]}
    failed = [
        f"the last launch of {name} failed: {why}"
        for name, why in clouds.get("refused", {}).items()
        if helps(name) and not any(f"cloud {cloud} is down" in why for cloud in down)
    ]
    return "; ".join([doing, *(f"cloud {name} is down ({why})" for name, why in down.items()), *failed])

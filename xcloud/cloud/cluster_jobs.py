"""Whether a cluster file offers what the pools of a job ask for: labels, accelerators, room.

Labels are matched as Ray matches its selectors: `v`, `!v`, `in(a,b)`, `!in(a,b)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from xcloud.cloud.cluster_file import ClusterFile, Problem
from xcloud.cloud.node_types import NodeType
from xcloud.cloud.settings import PlacementConfig

__all__ = ["job_problems", "selects"]

Pools = Sequence[tuple[str, PlacementConfig]]
"""Pools of a job with their key paths."""


def job_problems(cluster: ClusterFile, origin: str, pools: Pools) -> Iterator[Problem]:
    """What a job needs and the cluster cannot give.

    Args:
        cluster: to run it on.
        origin: file of the job.
        pools: all pools of the job, which run at the same time.
    """
    fitting: dict[str, list[NodeType]] = {}
    for key, pool in pools:
        misses = {node.name: list(_misses(node, pool)) for node in cluster.node_types if node.machines}
        fitting[key] = [node for node in cluster.node_types if misses.get(node.name) == []]
        if not fitting[key]:
            yield Problem(
                origin,
                key,
                f"needs {_needs(pool)}; no node type of {cluster.path} offers it{_nearest(misses)}",
            )
        elif (room := _room(fitting[key], pool)) < pool.workers:
            names = ", ".join(f"{node.name} x {node.machines}" for node in fitting[key])
            yield Problem(
                origin,
                key,
                f"needs {_needs(pool)}; {cluster.path} has room for {room} ({names}, {pool.strategy})",
            )
            fitting[key] = []
    yield from _together(cluster, origin, pools, fitting)


def selects(selector: str, value: str | None) -> bool:
    """Whether a label's value (None: the node has no such label) matches Ray's selector."""
    negated = selector.startswith("!")
    wanted = selector[1:] if negated else selector
    if wanted.startswith("in(") and wanted.endswith(")"):
        found = value in [part.strip() for part in wanted[3:-1].split(",")]
    else:
        found = value == wanted
    return found != negated


def _misses(node: NodeType, pool: PlacementConfig) -> Iterator[str]:
    """Why one machine of a node type cannot hold one worker."""
    for name, selector in pool.labels.items():
        value = node.labels.get(name)
        if not selects(selector, value):
            yield f"label {name} is {value or 'not there'}"
    if pool.instance is not None and node.instance is not None and pool.instance != node.instance:
        yield f"instance is {node.instance}"
    if pool.on_gpu and pool.accelerator.lower() != "gpu":
        kinds = [name.partition(":")[2] for name in node.resources if name.startswith("accelerator_type:")]
        if pool.accelerator not in kinds:
            yield f"accelerator is {', '.join(kinds) or 'none'}"
    elif pool.on_gpu and not node.gpus:
        yield "it has no GPU"
    if node.cpus < pool.cpus:
        yield f"{node.cpus:g} CPUs"


def _on_one(node: NodeType, pool: PlacementConfig) -> int:
    """Workers of a pool that one machine holds."""
    room = node.cpus / pool.cpus
    if pool.on_gpu:
        room = min(room, node.gpus)
    return pool.workers if math.isinf(room) else int(room)


def _room(nodes: Sequence[NodeType], pool: PlacementConfig) -> int:
    """Workers of a pool that these node types hold, placed by its strategy."""
    if pool.strategy == "STRICT_PACK":
        return max(_on_one(node, pool) for node in nodes)
    if pool.strategy == "STRICT_SPREAD":
        return sum(node.machines for node in nodes)
    return sum(node.machines * _on_one(node, pool) for node in nodes)


def _together(
    cluster: ClusterFile, origin: str, pools: Pools, fitting: Mapping[str, Sequence[NodeType]]
) -> Iterator[Problem]:
    """Pools that fit one by one but not all at once (Hall's condition, which never refuses what would fit)."""
    told: set[frozenset[str]] = set()
    for key, _ in pools:
        names = frozenset(node.name for node in fitting[key])
        inside = [
            (other, pool) for other, pool in pools
            if fitting[other] and {node.name for node in fitting[other]} <= names
        ]  # fmt: skip
        if len(inside) < 2 or names in told:
            continue
        told.add(names)
        for what, held, wanted in (
            (
                "GPUs",
                sum(n.machines * n.gpus for n in fitting[key]),
                sum(p.workers for _, p in inside if p.on_gpu),
            ),
            (
                "CPUs",
                sum(n.machines * n.cpus for n in fitting[key]),
                sum(p.workers * p.cpus for _, p in inside),
            ),
        ):
            if wanted > held:
                yield Problem(
                    origin,
                    ", ".join(other for other, _ in inside),
                    f"need {wanted} {what} at the same time; {cluster.path} has {held:g} "
                    f"({', '.join(sorted(names))})",
                )


def _needs(pool: PlacementConfig) -> str:
    what = (
        "CPU workers" if not pool.on_gpu else "GPU" if pool.accelerator.lower() == "gpu" else pool.accelerator
    )
    labels = ", ".join(f"{name}: {value}" for name, value in pool.labels.items())
    each = f" with {pool.cpus} CPUs each" if pool.cpus > 1 else ""
    return f"{pool.workers} x {what}{each}" + (f" with labels {{{labels}}}" if labels else "")


def _nearest(misses: Mapping[str, Sequence[str]]) -> str:
    if not misses:
        return ""
    # Accelerators are what is looked for first: another region's A100 is nearer to an A100 than this region's L4.
    name = min(misses, key=lambda found: (any("accelerator" in m for m in misses[found]), len(misses[found])))
    return f" (nearest: {name}, but {' and '.join(misses[name])})"

"""A cloud of which nothing runs: a node provider that keeps its nodes in a dictionary, for tests of the composite's logic.

The real parts behind the same provider are in `tests/e2e/test_autoscaling.py` (raylets) and
`tests/cloud/test_composite_aws.py` (Ray's AWS provider).
"""

from __future__ import annotations

import threading
from typing import Any

from ray.autoscaler.node_provider import NodeProvider

CLOUDS: dict[str, PaperCloud] = {}
"""The providers made last, by the `name` in their settings."""


class PaperCloud(NodeProvider):
    """Attributes:
    capacity: nodes that it still has.
    broken: raised by every call while it is set.
    quota: nodes that it makes, one by one, before it raises in the middle of a launch; None: no end.
    hangs: by call: while it stands there, the call waits for it, before it does anything.
    calls: names of the calls that it was asked for.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.name = provider_config["name"]
        self.nodes: dict[str, dict[str, str]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.capacity: dict[str, int] = {}
        self.broken: Exception | None = None
        self.quota: int | None = None
        self.hangs: dict[str, threading.Event] = {}
        self.calls: list[str] = []
        self.runners: list[dict[str, Any]] = []
        CLOUDS[self.name] = self

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hangs:
            self.hangs[name].wait(30)
        if self.broken is not None:
            raise self.broken

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self._call("list")
        return [node for node, tags in self.nodes.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        self._call("is_running")
        return node_id in self.nodes

    def is_terminated(self, node_id: str) -> bool:
        self._call("is_terminated")
        return node_id not in self.nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        self._call("node_tags")
        return self.nodes[node_id]

    def internal_ip(self, node_id: str) -> str:
        self._call("internal_ip")
        return f"10.0.0.{node_id[1:]}"

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._call("set_node_tags")
        self.nodes[node_id].update(tags)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        self._call("create")
        kind = tags["ray-user-node-type"]
        left = self.capacity.get(kind, 100)
        if not left:
            raise RuntimeError("InsufficientInstanceCapacity")
        most = min(left, count) if self.quota is None else min(left, count, self.quota)
        made = [f"n{len(self.configs) + i}" for i in range(most)]
        self.capacity[kind] = left - len(made)
        self.nodes |= {node: dict(tags) for node in made}
        self.configs |= dict.fromkeys(made, node_config)
        if self.quota is not None:
            self.quota -= len(made)
            if len(made) < count:  # as Ray's provider for Google Cloud: what it made before stays
                raise RuntimeError("quota exceeded")
        return {node: {"made": True} for node in made}

    def terminate_node(self, node_id: str) -> None:
        self._call("terminate")
        del self.nodes[node_id]

    def get_command_runner(self, log_prefix: str, node_id: str, auth_config: Any, *rest: Any) -> str:
        self.runners.append(auth_config)
        return f"runner of {node_id}"

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """As Ray's own do: keys made, defaults put into every node type, rights for the head apart."""
        name = cluster_config["provider"]["name"]
        assert cluster_config["head_node_type"] in cluster_config["available_node_types"]
        for settings in cluster_config["available_node_types"].values():
            assert not [key for key in settings["node_config"] if key.startswith("_")]
            settings["node_config"]["subnet"] = f"{name}-subnet"
        cluster_config["auth"]["ssh_private_key"] = f"/keys/{name}.pem"
        cluster_config["head_node"] = {"rights": name}
        return cluster_config

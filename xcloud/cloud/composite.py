"""One Ray autoscaler, many clouds: a node provider that hands every call to the provider of the node's cloud.

Ray's autoscaler v2 drives one `NodeProvider`. `CompositeNodeProvider` is one over those of several clouds; which cloud
a node type belongs to stands in its `node_config` (`xcloud.cloud.clouds` has the keys). It keeps each cloud's cap and
budget, lives on the last answer of a cloud whose API is down, waits longer after each failure, and launches another
type, of another market or cloud, where the asked one cannot be had (`xcloud.cloud.fallback` decides).

Ray books a launch by node type. So a substitute is listed under its own type, and the launch of the asked type is
reported as failed, but only after the substitute has been listed: Ray would ask for another one in between.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from xcloud.cloud.bootstrap import bootstrap, fill_out_resources, for_head
from xcloud.cloud.clouds import CLOUD_KEY, CloudsConfig, node_types, own_config
from xcloud.cloud.fallback import Bundle
from xcloud.cloud.gcs import Gcs, monitors_address
from xcloud.cloud.launching import Launcher
from xcloud.cloud.member_cloud import MemberCloud, said
from xcloud.errors import CloudError, ConfigError

__all__ = ["CompositeNodeProvider"]

log = logging.getLogger(__name__)

LISTED_WITHIN_S = 30.0
"""How long a launch that ended in a substitute waits for Ray to list it."""


class CompositeNodeProvider(NodeProvider):  # type: ignore[misc]  # ray is untyped here
    """Node provider over the clouds of `provider.clouds`. Ray calls it from several threads."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.config = CloudsConfig.read(provider_config)
        self.types = node_types(self.config, self.config.node_types)
        self.clouds = {
            name: MemberCloud(name, cloud, self.config, cluster_name)
            for name, cloud in self.config.clouds.items()
        }
        self._launcher = Launcher(self.config, self.types, self.clouds, self._waiting)
        self._owners: dict[str, str] = {}
        self._lock = threading.RLock()
        self._listed = threading.Condition()
        self._listings = 0
        self._taken_down = False
        self._published: dict[str, Any] | None = None
        self._gcs: Gcs | None = None

    # -- what there is --------------------------------------------------------------------

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """The nodes of all clouds; of one that does not answer, those that it told of last.

        Raises:
            CloudError: the head is asked for, and its cloud has never answered: `ray up` would launch another one.
        """
        now = time.monotonic()
        refreshes = [
            threading.Thread(target=cloud.refresh, args=(now,), daemon=True) for cloud in self.clouds.values()
        ]
        for thread in refreshes:
            thread.start()
        for thread in refreshes:
            thread.join()
        found = []
        for cloud in self.clouds.values():
            for node, seen in list(cloud.nodes.items()):
                with self._lock:
                    self._owners[cloud.qualified(node)] = cloud.name
                if tag_filters.items() <= seen.tags.items():
                    found.append(cloud.qualified(node))
        home = self.clouds[self.config.home]
        if tag_filters.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD and not home.answered:
            raise CloudError(home.name, home.api.reason)
        self._publish()
        with self._listed:
            self._listings += 1
            self._listed.notify_all()
        return found

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Everything that can be reached, and an error once only what cannot be reached may be left.

        Raises:
            CloudError: names the clouds that did not answer, whose nodes may still run and cost.
        """
        self._taken_down = True
        found: list[str] = []
        left = False
        silent: dict[str, str] = {}
        for cloud in self.clouds.values():
            try:
                every, matching = cloud.for_teardown(tag_filters)
            except CloudError as error:
                silent[cloud.name] = error.what
                continue
            found += map(cloud.qualified, matching)
            left = left or bool(every)
            with self._lock:
                self._owners.update(dict.fromkeys(map(cloud.qualified, every), cloud.name))
        if silent and not left:
            raise CloudError(
                ", ".join(silent),
                f"no answer while the cluster is taken down, so nodes may still run there: {'; '.join(silent.values())}",
            )
        return found

    def is_running(self, node_id: str) -> bool:
        return bool(self._ask(node_id, "is_running", lambda seen: seen.running))

    def is_terminated(self, node_id: str) -> bool:
        cloud, own = self._route(node_id)
        if cloud.api.failures:  # gone only if it was gone when the cloud was last heard of
            return own not in cloud.nodes
        return bool(cloud.provider.is_terminated(own))

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._ask(node_id, "node_tags", lambda seen: seen.tags))

    def external_ip(self, node_id: str) -> str:
        return str(self._on(node_id, "external_ip"))

    def internal_ip(self, node_id: str) -> str:
        return str(self._on(node_id, "internal_ip"))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._on(node_id, "set_node_tags", tags)

    # -- launching ------------------------------------------------------------------------

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any] | None:
        cloud, reservation = self._head_or_other(node_config, tags, count)
        made = cloud.launch(reservation, own_config(node_config), tags, count)
        return {cloud.qualified(node): facts for node, facts in made.items()} if made else made

    def _head_or_other(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> tuple[MemberCloud, object]:
        is_head = tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD
        name = node_config.get(CLOUD_KEY, self.config.home if is_head else None)
        if name not in self.clouds:
            raise ConfigError(
                f"available_node_types.{tags.get(TAG_RAY_USER_NODE_TYPE)}.node_config.{CLOUD_KEY}: "
                f"expected one of {sorted(self.clouds)}, got {name!r}"
            )
        cloud = self.clouds[name]
        return cloud, cloud.reserve(tags.get(TAG_RAY_USER_NODE_TYPE, ""), 0 if is_head else count)

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> dict[str, Any] | None:
        """Launch workers of the type in `tags`, or of those that it falls back to.

        Raises:
            NodeLaunchException: says why not all nodes are of the type that was asked for.
        """
        launch = self._launcher.launch(node_config, tags, count, resources, labels)
        if not launch.reasons:
            return launch.made or None
        if launch.missing < count:
            self._until_listed()
        raise NodeLaunchException("xcloud", "; ".join(launch.reasons), None)

    def _until_listed(self) -> None:
        """Wait for a listing that begins now or later to reach Ray."""
        with self._listed:
            target = self._listings + 2  # one may be under way
            self._listed.wait_for(lambda: self._listings >= target, LISTED_WITHIN_S)

    # -- ending ---------------------------------------------------------------------------

    def terminate_node(self, node_id: str) -> dict[str, Any] | None:
        return self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any] | None:
        """End nodes, in all clouds at once; one that fails or hangs does not keep the others' nodes alive.

        Ray tries all of them again after an error: those that are gone it finds gone when it lists.

        Raises:
            CloudError: names the clouds whose nodes may still run.
        """
        own: dict[str, list[str]] = {}
        failed: dict[str, CloudError] = {}
        for node in node_ids:
            try:
                cloud, raw = self._route(node)
            except CloudError as error:
                failed[node] = error
            else:
                own.setdefault(cloud.name, []).append(raw)
        out: dict[str, Any] = {}
        now = time.monotonic()

        def end(cloud: MemberCloud) -> None:
            try:
                ended = cloud.terminate(own[cloud.name], now, last_call=self._taken_down)
            except CloudError as error:
                failed[cloud.name] = error
            else:
                out.update({cloud.qualified(node): facts for node, facts in ended.items()})

        threads = [threading.Thread(target=end, args=(self.clouds[name],), daemon=True) for name in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            first, *others = failed.values()
            raise first if not others else CloudError(", ".join(failed), "; ".join(map(str, failed.values())))
        return out or None

    def cleanup_cluster_resources(self) -> None:
        """What some providers (Azure's) do when the last node is gone."""
        for cloud in self.clouds.values():
            if hasattr(cloud.provider, "cleanup_cluster_resources"):
                cloud.provider.cleanup_cluster_resources()

    # -- the rest of Ray's interface ------------------------------------------------------

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: Any,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> Any:
        cloud, own = self._route(node_id)
        return cloud.provider.get_command_runner(
            log_prefix,
            own,
            {**auth_config, **cloud.config.auth},
            cluster_name,
            process_runner,
            use_internal_ip,
            docker_config,
        )

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        return for_head(cluster_config)

    def safe_to_scale(self) -> bool:
        return all(cloud.provider.safe_to_scale() for cloud in self._up())

    def post_process(self) -> None:
        for cloud in self._up():
            cloud.provider.post_process()

    def _up(self) -> list[MemberCloud]:
        return [cloud for cloud in self.clouds.values() if cloud.answered and not cloud.api.failures]

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return fill_out_resources(cluster_config)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return bootstrap(cluster_config)

    # -- inside ---------------------------------------------------------------------------

    def _route(self, node_id: str) -> tuple[MemberCloud, str]:
        name, slash, raw = node_id.partition("/")
        if slash and name in self.clouds and self.clouds[name].config.qualify_ids:
            return self.clouds[name], raw
        with self._lock:
            owner = self._owners.get(node_id)
        if owner is None:
            raise CloudError("?", f"node {node_id!r} is in none of {sorted(self.clouds)}")
        return self.clouds[owner], node_id

    def _on(self, node_id: str, method: str, *arguments: Any) -> Any:
        cloud, own = self._route(node_id)
        return getattr(cloud.provider, method)(own, *arguments)

    def _ask(self, node_id: str, method: str, remembered: Callable[[Any], Any]) -> Any:
        """Ask a node's cloud, or, while it is down, what it said last."""
        cloud, own = self._route(node_id)
        if not cloud.api.failures:
            try:
                return getattr(cloud.provider, method)(own)
            except Exception as error:  # any cloud's library
                if own not in cloud.nodes:
                    raise CloudError(cloud.name, f"{method} of {own}: {said(error)}") from error
                log.warning("cloud %s: %s of %s: %s; its last answer stands", cloud.name, method, own, error)
        if own not in cloud.nodes:
            raise CloudError(
                cloud.name, f"{method} of {own}: the cloud is down, and has never told of this node"
            )
        return remembered(cloud.nodes[own])

    def _connected(self) -> Gcs | None:
        address = self.config.gcs_address or monitors_address()
        if self._gcs is None and address is not None:
            self._gcs = Gcs(address)
        return self._gcs

    def _waiting(self) -> list[Bundle] | None:
        try:
            gcs = self._connected()
            return None if gcs is None else gcs.waiting()
        except Exception as error:  # noqa: BLE001 - Ray's C++ client raises many kinds
            log.warning("cannot read what the cluster waits for: %s", error)
            return None

    def _publish(self) -> None:
        """Show the clouds' state; not being able to must not stop the autoscaler."""
        state = self._state()
        if state == self._published:
            return
        try:
            gcs = self._connected()
            if gcs is not None:
                gcs.publish(state)
                self._published = state
        except Exception as error:  # noqa: BLE001 - Ray's C++ client raises many kinds
            log.warning("cannot show the state of the clouds: %s", error)

    def _state(self) -> dict[str, Any]:
        clouds = {
            name: {
                "nodes": len(cloud.nodes),
                "usd_per_hour": round(cloud.usage().usd_per_hour(self.types), 4),
                "down": cloud.api.reason or None,
            }
            for name, cloud in self.clouds.items()
        }
        labels = {name: dict(one.labels) for name, one in self.types.items()}
        return {"clouds": clouds, "types": labels, "refused": self._launcher.refused()}

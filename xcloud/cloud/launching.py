"""Launches: the asked type first, then what may stand in for it, within each cloud's cap and budget."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from xcloud.cloud.clouds import CloudsConfig, own_config
from xcloud.cloud.fallback import Backoff, Bundle, NodeType, Room, served_instead, substitutes
from xcloud.cloud.member_cloud import MemberCloud
from xcloud.errors import CloudError, ConfigError

__all__ = ["Launch", "Launcher"]

log = logging.getLogger(__name__)


class Launch:
    """One call of Ray's to launch, and what has become of it.

    Attributes:
        tags: that Ray wants on the nodes.
        missing: nodes that nobody has launched yet.
        made: what the clouds' providers tell of those that were, by qualified id.
        reasons: why not all of them are of the type that was asked for.
    """

    def __init__(self, tags: dict[str, str], count: int) -> None:
        self.tags = tags
        self.missing = count
        self.made: dict[str, Any] = {}
        self.reasons: list[str] = []


class Launcher:
    """Launches nodes in several clouds; called from several threads.

    Args:
        config: the clouds', with the node types' settings.
        types: the same node types, parsed.
        clouds: by name.
        waiting: reads what the cluster waits for; None: that cannot be read now.
    """

    def __init__(
        self,
        config: CloudsConfig,
        types: Mapping[str, NodeType],
        clouds: Mapping[str, MemberCloud],
        waiting: Callable[[], Sequence[Bundle] | None],
    ) -> None:
        self._config = config
        self._types = types
        self._clouds = clouds
        self._waiting = waiting
        self._backoff = {name: Backoff(config.retry_first_s, config.retry_most_s) for name in types}
        self._refused: dict[str, str] = {}
        self._lock = threading.Lock()

    def refused(self) -> dict[str, str]:
        """Why the last launch of a type did not give that type, by type."""
        with self._lock:
            return dict(self._refused)

    def launch(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> Launch:
        """Launch nodes of the type in `tags`, or of those that it falls back to.

        Raises:
            ConfigError: the type is none of this provider's.
        """
        name = tags[TAG_RAY_USER_NODE_TYPE]
        if name not in self._types:
            raise ConfigError(
                f"provider.node_types: {name!r} is missing; make the file that Ray reads by "
                f"`xcloud.cloud.composite.CompositeNodeProvider.bootstrap_config` (`ray up` does)"
            )
        asked = self._types[name]
        launch = Launch(tags, count)
        self._try(launch, asked, count, node_config, resources, labels)
        if launch.missing and asked.fallback:
            self._fall_back(launch, asked)
        with self._lock:
            if launch.reasons:
                self._refused[name] = "; ".join(launch.reasons)
            else:
                self._refused.pop(name, None)
        return launch

    def _fall_back(self, launch: Launch, asked: NodeType) -> None:
        """Launch other types in place of the nodes that are missing."""
        waiting = self._waiting()
        if waiting is None:
            launch.reasons.append("no fallback: what the cluster waits for cannot be read")
            return
        for other in substitutes(asked, self._types):
            useful = min(launch.missing, served_instead(waiting, asked, other))
            if useful <= 0:
                if launch.missing:
                    launch.reasons.append(
                        f"{other.name}: nothing that waits would run on it (labels, resources)"
                    )
                continue
            node_config = self._config.node_types[other.name].get("node_config") or {}
            launched = self._try(
                launch, other, useful, node_config, dict(other.resources), dict(other.labels)
            )
            if launched:
                launch.reasons.append(f"launched {launched} x {other.name} instead")
                log.warning("launched %d x %s instead of %s", launched, other.name, asked.name)

    def _try(
        self,
        launch: Launch,
        wanted: NodeType,
        count: int,
        node_config: dict[str, Any],
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> int:
        """Launch up to `count` nodes of one type; returns how many are there, and notes why not all."""
        cloud = self._clouds[wanted.cloud]
        now = time.monotonic()
        backoff = self._backoff[wanted.name]
        if cloud.api.failures or not cloud.answered:
            reason = cloud.api.reason or "no answer yet"
            launch.reasons.append(f"{wanted.name}: cloud {cloud.name} is down: {reason}")
            return 0
        if backoff.closed(now):
            launch.reasons.append(f"{wanted.name}: {backoff.reason}")
            return 0
        with self._lock:
            room = Room.of(wanted, count, cloud.usage(), cloud.config.limits, self._types)
            if room.limit:
                launch.reasons.append(f"{wanted.name}: {room.limit}")
            if not room.nodes:
                return 0
            reservation = cloud.reserve(wanted.name, room.nodes)
        tags = {**launch.tags, TAG_RAY_USER_NODE_TYPE: wanted.name}
        try:
            answer = cloud.launch(reservation, own_config(node_config), tags, room.nodes, resources, labels)
        except CloudError as error:
            wait = backoff.fail(error.what, time.monotonic())
            made = cloud.made_by_failed(tags, room.nodes, time.monotonic())
            partly = f" ({len(made)} of {room.nodes} launched)" if made else ""
            launch.made |= {cloud.qualified(node): {} for node in made}
            launch.missing -= len(made)
            launch.reasons.append(f"{wanted.name}: {error.what}{partly}")
            log.warning(
                "%s in cloud %s: %s%s; next try in %.0f s", wanted.name, cloud.name, error.what, partly, wait
            )
            return len(made)
        launched = room.nodes if answer is None else min(room.nodes, len(answer))
        launch.made |= {cloud.qualified(node): facts for node, facts in (answer or {}).items()}
        launch.missing -= launched
        if launched < room.nodes:
            backoff.fail(f"{launched} of {room.nodes} launched", time.monotonic())
            launch.reasons.append(f"{wanted.name}: {backoff.reason}")
        else:
            backoff.succeed()
        return launched

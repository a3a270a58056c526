"""One cloud behind the composite provider: its own node provider, its last answer, and what became of calls to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_NODE_KIND,
    TAG_RAY_USER_NODE_TYPE,
)

from xcloud.cloud.clouds import CloudConfig, CloudsConfig
from xcloud.cloud.fallback import Backoff, Usage
from xcloud.errors import CloudError

__all__ = ["MemberCloud", "Seen", "said"]

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """A node as its cloud told of it last."""

    tags: dict[str, str]
    running: bool


class _NoAnswerError(CloudError):
    """A call has not come back; what it does at the cloud is unknown."""


class MemberCloud:
    """A cloud, reached through its own node provider.

    Calls that could hang run in a thread of their own, with a time limit: Ray lists all clouds in one loop, and has
    few threads to launch from. While a cloud does not answer, its last answer stands.

    Attributes:
        nodes: by the id that its own provider uses.
        answered: whether it has listed its nodes since this process began.
    """

    def __init__(self, name: str, config: CloudConfig, settings: CloudsConfig, cluster: str) -> None:
        self.name = name
        self.config = config
        self.nodes: dict[str, Seen] = {}
        self.answered = False
        self.api = Backoff(settings.retry_first_s, settings.retry_most_s)
        self._settings = settings
        self._cluster = cluster
        self._provider: Any = None
        self._making = threading.Lock()
        self._launching: dict[object, tuple[str, int]] = {}
        self._landed: set[object] = set()
        self._new: dict[object, dict[str, Seen]] = {}
        self._lock = threading.Lock()
        self._listing: threading.Thread | None = None

    @property
    def provider(self) -> Any:
        """Its own node provider, made when it is first needed: some ask their API at once.

        Raises:
            CloudError: it cannot be made; it will be tried again.
        """
        with self._making:
            if self._provider is None:
                assert self.config.provider is not None
                try:
                    self._provider = _get_node_provider(self.config.provider, self._cluster, use_cache=False)
                except Exception as error:  # whatever the cloud's own library raises
                    raise CloudError(
                        self.name, f"provider {self.config.provider['type']!r} does not start: {said(error)}"
                    ) from error
            return self._provider

    def qualified(self, node: str) -> str:
        """The id by which Ray knows a node."""
        return f"{self.name}/{node}" if self.config.qualify_ids else node

    # -- listing --------------------------------------------------------------------------

    def refresh(self, now: float) -> None:
        """Ask for the nodes, unless it is too early after a failure. A failure is noted and logged, never raised."""
        if self.api.closed(now):
            return
        with self._lock:
            landed = set(self._landed)
        try:
            nodes = self._in_time(self._list, self._settings.answer_timeout_s, "list its nodes")
        except CloudError as error:
            wait = self.api.fail(error.what, now)
            held = (
                f"its last answer stands, {len(self.nodes)} nodes"
                if self.answered
                else "it has not answered yet"
            )
            log.warning("cloud %s is down: %s; %s; next try in %.0f s", self.name, error.what, held, wait)
            return
        if self.api.failures:
            log.warning("cloud %s answers again after %d failures", self.name, self.api.failures)
        self.api.succeed()
        with self._lock:  # launches that had ended before the answer was asked for are in it
            for token in landed:
                self._landed.discard(token)
                self._launching.pop(token, None)
                self._new.pop(token, None)
            for seen in self._new.values():
                nodes = {**seen, **nodes}
            self.nodes, self.answered = nodes, True

    def _list(self) -> dict[str, Seen]:
        provider = self.provider
        found: dict[str, Seen] = {}
        for node in provider.non_terminated_nodes({}):
            try:
                found[node] = Seen(dict(provider.node_tags(node)), bool(provider.is_running(node)))
            except Exception:
                if not provider.is_terminated(node):
                    raise
        return found

    # -- launching ------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Its nodes, and those that are being launched."""
        workers: dict[str, int] = {}
        head = None
        with self._lock:
            new = {node for nodes in self._new.values() for node in nodes}  # counted as launches
        for seen in [seen for node, seen in self.nodes.items() if node not in new]:
            kind, node_type = seen.tags.get(TAG_RAY_NODE_KIND), seen.tags.get(TAG_RAY_USER_NODE_TYPE, "")
            if kind == NODE_KIND_WORKER:
                workers[node_type] = workers.get(node_type, 0) + 1
            elif kind == NODE_KIND_HEAD:
                head = node_type
        with self._lock:
            for node_type, count in self._launching.values():
                workers[node_type] = workers.get(node_type, 0) + count
        return Usage(workers, head)

    def reserve(self, node_type: str, count: int) -> object:
        """Count nodes as there from before their launch until the cloud lists them; returns the reservation."""
        token = object()
        with self._lock:
            self._launching[token] = node_type, count
        return token

    def launch(
        self, reservation: object, node_config: dict[str, Any], tags: dict[str, str], count: int, *rest: Any
    ) -> dict[str, Any] | None:
        """Create nodes; returns what the cloud's own provider does: metadata by id, or None.

        Args:
            rest: resources and labels, or nothing for `create_node`.

        Raises:
            CloudError: what the cloud said.
        """
        create = "create_node_with_resources_and_labels" if rest else "create_node"
        try:
            made: dict[str, Any] | None = self._in_time(
                lambda: getattr(self.provider, create)(node_config, tags, count, *rest),
                self._settings.launch_timeout_s,
                "launch",
            )
        except _NoAnswerError:
            self._end(reservation, landed=True)  # it may have launched them all the same
            raise
        except CloudError:
            self._end(reservation, landed=False)
            raise
        with (
            self._lock
        ):  # told of from now on, even if the next listing fails: Ray must see it before it joins
            self._new[reservation] = {node: Seen(dict(tags), running=False) for node in made or ()}
            self.nodes = {**self._new[reservation], **self.nodes}
        self._end(reservation, landed=True)
        return made

    def _end(self, reservation: object, landed: bool) -> None:
        with self._lock:
            if landed:
                self._landed.add(reservation)
            else:
                self._launching.pop(reservation, None)

    def _in_time(self, work: Callable[[], T], timeout_s: float, what: str) -> T:
        """Do something in a thread, for a while; its errors become CloudErrors."""
        out: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                out.append(work())
            except BaseException as error:  # noqa: BLE001 - handed on below
                failed.append(error)

        thread = threading.Thread(target=run, name=f"cloud {self.name}: {what}", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failed:
            if isinstance(failed[0], CloudError):
                raise failed[0]
            raise CloudError(self.name, said(failed[0])) from failed[0]
        if not out:
            raise _NoAnswerError(self.name, f"it did not {what} within {timeout_s:g} s")
        return out[0]


def said(error: BaseException) -> str:
    """An error of a cloud's library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

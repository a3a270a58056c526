"""One cloud behind the composite provider: its own node provider, its last answer, and what became of calls to it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_LAUNCH_REQUEST,
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


class MemberCloud:
    """A cloud, reached through its own node provider.

    Calls that could hang run in a thread of their own, with a time limit: Ray lists all clouds in one loop, and has
    few threads to launch from. While a cloud does not answer, its last answer stands. A call that outlives its limit goes
    on in its thread, and what it does at the cloud is taken in when it ends.

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
        self._booked: set[str] = set()  # nodes that a launch has been credited with
        self._asked = 0  # listings begun
        self._told = 0  # which of them `nodes` is from
        self._ends = Backoff(settings.retry_first_s, settings.retry_most_s)
        self._ending: dict[str, float] = {}  # nodes of terminations without an answer, and since when
        self._lock = threading.Lock()

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
            self._asked += 1
            asked = self._asked
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
            if asked < self._told:  # a listing that began later was faster; it knows of more launches
                return
            self._told = asked
            for token in landed:
                self._landed.discard(token)
                self._launching.pop(token, None)
                self._new.pop(token, None)
            for seen in self._new.values():
                nodes = {**seen, **nodes}
            self.nodes, self.answered = nodes, True
            self._booked &= nodes.keys()

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
        with self._lock:  # all at one time: a listing moves nodes from the launches to the rest
            new = {node for nodes in self._new.values() for node in nodes}  # counted as launches
            listed = [seen for node, seen in self.nodes.items() if node not in new]
            launching = list(self._launching.values())
        for seen in listed:
            kind, node_type = seen.tags.get(TAG_RAY_NODE_KIND), seen.tags.get(TAG_RAY_USER_NODE_TYPE, "")
            if kind == NODE_KIND_WORKER:
                workers[node_type] = workers.get(node_type, 0) + 1
            elif kind == NODE_KIND_HEAD:
                head = node_type
        for node_type, count in launching:
            workers[node_type] = workers.get(node_type, 0) + count
        return Usage(workers, head)

    def reserve(self, node_type: str, count: int) -> object:
        """Count nodes as there from before their launch until a listing that begins after its end.

        A launch that fails may have made some of them, and one without an answer may still make them.

        Returns:
            The reservation, for `launch`.
        """
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
            CloudError: what the cloud said, or that it said nothing in time. `made_by_failed` tells what it made all the same.
        """
        create = "create_node_with_resources_and_labels" if rest else "create_node"

        def work() -> dict[str, Any] | None:
            try:
                made: dict[str, Any] | None = getattr(self.provider, create)(node_config, tags, count, *rest)
                with (
                    self._lock
                ):  # told of from now on, even if the next listing fails: Ray must see it before it joins
                    self._new[reservation] = {node: Seen(dict(tags), running=False) for node in made or ()}
                    self.nodes = {**self._new[reservation], **self.nodes}
                    self._booked.update(made or ())
                return made
            finally:
                with self._lock:
                    self._landed.add(reservation)

        return self._in_time(work, self._settings.launch_timeout_s, "launch")

    def made_by_failed(self, tags: Mapping[str, str], count: int, now: float) -> list[str]:
        """List the nodes anew, and credit a launch that failed with those that it made.

        Some clouds make nodes one by one, and stop at the one that exceeds a quota.

        Args:
            tags: of the launch: its nodes have the same type and request of Ray's.
            count: of the launch; Ray splits a request, so more of its nodes may be there.

        Returns:
            The nodes, which no other launch will be credited with. None, if the cloud does not answer now; the
            reservation then stands.
        """
        self.refresh(now)
        same = (TAG_RAY_USER_NODE_TYPE, TAG_RAY_LAUNCH_REQUEST)
        with self._lock:
            made = [
                node
                for node, seen in self.nodes.items()
                if node not in self._booked and all(seen.tags.get(tag) == tags.get(tag) for tag in same)
            ][:count]
            self._booked.update(made)
        return made

    # -- ending ---------------------------------------------------------------------------

    def terminate(self, nodes: Sequence[str], now: float, last_call: bool = False) -> dict[str, Any]:
        """End nodes; returns what the cloud's own provider tells of them, by id.

        A try without an answer in `answer_timeout_s` goes on; until it ends, or for `launch_timeout_s`, its nodes are not
        asked for again. After a failure there is a pause, which doubles.

        Args:
            last_call: nobody will try again (`ray down`): do not pause, and wait for `launch_timeout_s`.

        Raises:
            CloudError: names the nodes that may still run, and why.
        """
        settings = self._settings
        with self._lock:
            early = self._ends.closed(now) and not last_call
            pending = [
                node
                for node in nodes
                if now - self._ending.get(node, -math.inf) < settings.launch_timeout_s and not last_call
            ]
            rest = [node for node in nodes if node not in pending]
            if not early:
                self._ending |= dict.fromkeys(rest, now)
        ended: dict[str, Any] = {}
        left = [(pending, "asked for, and no answer yet")] if pending else []
        if rest and early:
            left.append((rest, f"{self._ends.reason}; next try in {self._ends.until - now:.0f} s"))
        elif rest:
            limit_s = settings.launch_timeout_s if last_call else settings.answer_timeout_s
            try:
                ended = self._in_time(lambda: self._terminate(rest, now), limit_s, "terminate")
            except CloudError as error:
                wait = self._ends.fail(error.what, now)
                left.append((rest, f"{error.what}; next try in {wait:.0f} s"))
        if left:
            raise CloudError(
                self.name, "; ".join(f"{', '.join(some)} not terminated: {why}" for some, why in left)
            )
        return ended

    def _terminate(self, nodes: Sequence[str], since: float) -> dict[str, Any]:
        ended: dict[str, Any] = {}
        try:
            most = self.provider.max_terminate_nodes or len(nodes)
            for at in range(0, len(nodes), most):
                ended |= self.provider.terminate_nodes(list(nodes[at : at + most])) or {}
            self._ends.succeed()
        finally:
            with self._lock:
                for node in nodes:
                    if self._ending.get(node) == since:  # else it was given up on, and asked for again
                        del self._ending[node]
        return ended

    def for_teardown(self, tag_filters: dict[str, str]) -> tuple[list[str], list[str]]:
        """All that `ray down` has to end here, and what of it has these tags.

        Raises:
            CloudError: what the cloud said, or that it said nothing in time.
        """
        return self._in_time(
            lambda: (
                list(self.provider.nodes_for_teardown({})),
                list(self.provider.nodes_for_teardown(tag_filters)),
            ),
            self._settings.answer_timeout_s,
            "list its nodes",
        )

    def _in_time(self, work: Callable[[], T], timeout_s: float, what: str) -> T:
        """Do something in a thread, for a while; its errors become CloudErrors."""
        out: list[T] = []
        failed: list[BaseException] = []
        given_up = threading.Event()

        def run() -> None:
            try:
                out.append(work())
            except BaseException as error:  # noqa: BLE001 - handed on below
                failed.append(error)
                if given_up.is_set():
                    log.warning("cloud %s: %s failed after its time limit: %s", self.name, what, said(error))

        thread = threading.Thread(target=run, name=f"cloud {self.name}: {what}", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failed:
            if isinstance(failed[0], CloudError):
                raise failed[0]
            raise CloudError(self.name, said(failed[0])) from failed[0]
        if not out:
            given_up.set()
            raise CloudError(self.name, f"it did not {what} within {timeout_s:g} s")
        return out[0]


def said(error: BaseException) -> str:
    """An error of a cloud's library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

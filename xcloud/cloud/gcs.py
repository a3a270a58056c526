"""What the autoscaler tells and asks in Ray's GCS: the clouds' state for people, and what the cluster waits for.

Ray's own status drops the reason of a failed launch, so the composite provider keeps its state under a key of its own;
`xcloud.cloud.waiting` reads it. Bundles that wait come from the same reply that the autoscaler plans by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without type information
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from xcloud.cloud.fallback import Bundle, Selector

__all__ = ["Gcs", "monitors_address"]

KEY, NAMESPACE = b"clouds", b"xcloud.autoscaler"
TIMEOUT_S = 5.0
IN, NOT_IN = 1, 2
"""`LabelSelectorOperator` of Ray's autoscaler.proto."""


def monitors_address() -> str | None:
    """The address that Ray's monitor, if this process is one, was started with."""
    for at, argument in enumerate(sys.argv):
        name, equals, value = argument.partition("=")
        if name == "--gcs-address":
            return value if equals else sys.argv[at + 1]
    return None


class Gcs:
    """A client of one cluster's GCS.

    Args:
        address: `HOST:PORT`.
    """

    def __init__(self, address: str) -> None:
        self._client = GcsClient(address=address)

    def waiting(self) -> list[Bundle]:
        """What the cluster waits for: tasks, actors and placement groups that have no node yet.

        Raises:
            RuntimeError: the GCS does not answer.
        """
        state = get_cluster_resource_state(self._client)
        found = [_bundle(one.request, one.count) for one in state.pending_resource_requests]
        for gang in state.pending_gang_resource_requests:
            chosen = gang.bundle_selectors[0].resource_requests if gang.bundle_selectors else gang.requests
            found += [_bundle(one, 1) for one in chosen]
        return found

    def publish(self, clouds: dict[str, Any]) -> None:
        """Keep the clouds' state where `read` finds it."""
        self._client.internal_kv_put(KEY, json.dumps(clouds).encode(), True, NAMESPACE, timeout=TIMEOUT_S)

    def read(self) -> dict[str, Any]:
        """The clouds' state; nothing where no composite provider runs."""
        value = self._client.internal_kv_get(KEY, NAMESPACE, timeout=TIMEOUT_S)
        return dict(json.loads(value)) if value else {}


def _bundle(request: Any, count: int) -> Bundle:
    return Bundle(
        resources=dict(request.resources_bundle),
        selectors=tuple(_selector(one.label_constraints) for one in request.label_selectors),
        count=count,
    )


def _selector(constraints: Iterable[Any]) -> Selector:
    return tuple((c.label_key, c.operator != NOT_IN, frozenset(c.label_values)) for c in constraints)

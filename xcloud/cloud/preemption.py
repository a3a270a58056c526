"""Machines that are taken away: which nodes of a Ray cluster are about to go, and how a node learns that it is one of them.

A cloud announces the end of a spot machine on the machine itself: two minutes before it on AWS, half a minute on GCP and
Azure. `python -m xcloud.cloud.preemption CLOUD` runs on each spot node, asks its metadata service every few seconds and, when the
notice is there, has Ray drain the node: nothing new is placed there, and regions see it in `draining_nodes`. KubeRay and Ray's
autoscaler drain in the same way.

Sources: AWS "Spot Instance interruption notices" (IMDSv2), Google Cloud "Spot VMs: preemption process", Azure "Scheduled Events".
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated import autoscaler_pb2

from xcloud.errors import PlacementError

__all__ = ["CLOUDS", "Notice", "drain", "draining_nodes", "notice", "watch"]

log = logging.getLogger(__name__)

POLL_S = 2.0
TIMEOUT_S = 2.0
GRACE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away: seconds that are left, and in whose words."""

    seconds: float
    reason: str


def draining_nodes() -> dict[str, float]:
    """Nodes that are about to go, by Ray's hex id: unix time in seconds by when; 0: nobody has said."""
    found = state.state.get_draining_nodes()
    return {str(node): deadline_ms / 1000 for node, deadline_ms in found.items()}


def drain(address: str, node: str, notice: Notice) -> None:
    """Have Ray drain a node.

    Args:
        address: of the GCS, `host:port`.
        node: hex id.
        notice: when it goes, and why.

    Raises:
        PlacementError: Ray refuses; says why.
    """
    deadline_ms = int((time.time() + notice.seconds) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = GcsClient(address=address).drain_node(node, reason, notice.reason, deadline_ms)
    if not accepted:
        raise PlacementError(f"node {node[:12]}: Ray does not drain it: {why}")


def notice(cloud: str, base: str | None = None) -> Notice | None:
    """Ask this machine's metadata service whether it is about to be taken away; None: it is not.

    Args:
        cloud: one of `CLOUDS`.
        base: URL of the service; None: the cloud's own.

    Raises:
        OSError: the service does not answer.
    """
    return CLOUDS[cloud](base or _BASES[cloud])


def _aws(base: str) -> Notice | None:
    token = _get(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    assert token is not None, "a token is always given"
    told = _get(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if told is None:  # 404: no action is planned
        return None
    action = json.loads(told)
    at = dt.datetime.fromisoformat(str(action["time"]).replace("Z", "+00:00"))
    return Notice(_until(at), f"AWS will {action['action']} this spot instance at {action['time']}")


def _gcp(base: str) -> Notice | None:
    told = _get(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if told is None or told.strip().upper() != "TRUE":
        return None
    return Notice(GRACE_S["gcp"], "Google Cloud preempts this spot VM")


def _azure(base: str) -> Notice | None:
    told = _get(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    for event in json.loads(told)["Events"] if told else ():
        if event.get("EventType") == "Preempt":
            at = str(event.get("NotBefore", ""))
            left = GRACE_S["azure"]
            if at:
                left = _until(
                    dt.datetime.strptime(at, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=dt.timezone.utc)
                )
            return Notice(left, f"Azure preempts this spot VM not before {at or 'an unstated time'}")
    return None


CLOUDS: Mapping[str, Callable[[str], Notice | None]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}
_BASES = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}


def _until(at: dt.datetime) -> float:
    return max(0.0, (at - dt.datetime.now(dt.timezone.utc)).total_seconds())


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The answer's text; None for 404."""
    # Plain HTTP to the machine's own link-local service, which is all that clouds offer.
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def watch(
    cloud: str, found: Callable[[Notice], Any], base: str | None = None, poll_s: float = POLL_S
) -> None:
    """Wait for this machine's notice and act on it once. A service that does not answer is asked again, and said once."""
    silent = False
    while True:
        try:
            told = notice(cloud, base)
        except OSError as error:
            if not silent:
                log.warning("metadata service of %s does not answer: %s; asking on", cloud, error)
            told, silent = None, True
        else:
            silent = False
        if told is not None:
            found(told)
            return
        time.sleep(poll_s)


def main(arguments: list[str] | None = None) -> None:
    """Watch this node, and drain it when its cloud says so."""
    parser = argparse.ArgumentParser(prog="python -m xcloud.cloud.preemption", description=main.__doc__)
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--metadata-url", help="base URL of the metadata service; default: the cloud's own")
    parser.add_argument("--poll-s", type=float, default=POLL_S)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), logging_level=logging.ERROR, log_to_driver=False)
    context = ray.get_runtime_context()
    node, address = context.get_node_id(), context.gcs_address

    def found(told: Notice) -> None:
        log.info("%s; draining node %s", told.reason, node)
        until = time.monotonic() + max(told.seconds, POLL_S)
        while True:
            try:
                return drain(address, node, told)
            except Exception as error:
                if time.monotonic() > until:
                    raise
                log.warning("not drained yet: %s; trying on", error)
                time.sleep(options.poll_s)

    watch(options.cloud, found, options.metadata_url, options.poll_s)


if __name__ == "__main__":
    main()

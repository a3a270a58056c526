"""Node types: machines that a cluster file promises, read from each of its formats.

Ray's launcher lists them (`available_node_types`), its provider `local` implies them by the commands that start Ray,
and a RayCluster of KubeRay has worker groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xcloud.cloud.shell import ray_starts

__all__ = [
    "ACCELERATOR",
    "CLOUD",
    "MARKET",
    "REGION",
    "START_KEYS",
    "NodeType",
    "kuberay_types",
    "launcher_types",
    "start_commands",
    "started_types",
]

REGION, CLOUD, MARKET = "ray.io/region", "cloud", "ray.io/market-type"
ACCELERATOR = "ray.io/accelerator-type"
START_KEYS = ("head_start_ray_commands", "worker_start_ray_commands")
INSTANCE_SELECTOR = "node.kubernetes.io/instance-type"
SPOT_SELECTORS = (
    ("cloud.google.com/gke-spot", "true"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""Node labels by which the clouds' Kubernetes services mark spot machines."""


@dataclass(frozen=True)
class NodeType:
    """Machines that a cluster file offers.

    Attributes:
        name: in the file.
        key: path of its entry.
        cloud: whose machines they are (`aws`, `gcp`, `azure`); None: not a cloud's.
        place: the cloud's name of where they stand; None: the file does not say.
        instance: the cloud's machine type; None: the file does not say.
        instance_key: path of that, for errors.
        market: how they are bought.
        head: the head's type, of which there is one and on which no pool is placed unless it has resources.
        least: machines that always run.
        most: machines at most.
        resources: what one machine offers, in Ray's names; infinite where only the machine knows.
        labels: Ray's node labels.
        labels_key: path of those.
    """

    name: str
    key: str
    cloud: str | None
    place: str | None
    instance: str | None
    instance_key: str
    market: Literal["spot", "on-demand"]
    head: bool
    least: int
    most: int
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    labels_key: str

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0)

    @property
    def machines(self) -> int:
        return 1 if self.head else self.most


def launcher_types(
    config: Mapping[str, Any], providers: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> Iterator[NodeType]:
    """Of a launcher file; `providers` holds the clouds' own by the name that node types call them by."""
    kind = str(config["provider"].get("type"))
    for name, raw in (config.get("available_node_types") or {}).items():
        key = f"available_node_types.{name}"
        node = raw.get("node_config") or {}
        called = str(node.get("_cloud", kind))
        provider = providers.get(called, ("", {}))[1]
        cloud = provider.get("type", called if kind == "external" else None)
        head = name == config.get("head_node_type")
        instance, field_name, spot = _machine(str(cloud), node)
        yield NodeType(
            name=name,
            key=key,
            cloud=str(cloud) if cloud in ("aws", "gcp", "azure") else None,
            place=provider.get("location" if cloud == "azure" else "region"),
            instance=instance,
            instance_key=f"{key}.node_config.{field_name}",
            market="spot" if spot else "on-demand",
            head=head,
            least=raw.get("min_workers", 0),
            most=raw.get("max_workers", 0 if head else config.get("max_workers", 0)),
            resources=dict(raw.get("resources") or {}),
            labels=dict(raw.get("labels") or {}),
            labels_key=f"{key}.labels",
        )


def _machine(cloud: str, node: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """Machine type, the key that says it, and whether it is a spot machine, in a cloud's own words."""
    if cloud == "gcp":
        machine = node.get("machineType")
        for extra in (
            node.get("guestAccelerators") or ()
        ):  # nvidia-tesla-t4: the catalogue's n1-standard-8+1xT4
            kind = str(extra.get("acceleratorType", "")).rpartition("-")[2].upper()
            machine = f"{machine}+{extra.get('acceleratorCount', 1)}x{kind}"
        scheduling = node.get("scheduling") or ()
        scheduling = [scheduling] if isinstance(scheduling, Mapping) else scheduling
        spot = any(s.get("preemptible") or s.get("provisioningModel") == "SPOT" for s in scheduling)
        return machine, "machineType", spot
    if cloud == "azure":
        arm = node.get("azure_arm_parameters") or {}
        return arm.get("vmSize"), "azure_arm_parameters.vmSize", arm.get("priority") == "Spot"
    spot = (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    return node.get("InstanceType"), "InstanceType", spot


def start_commands(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key path and text of every command that starts Ray on a node."""
    for key in START_KEYS:
        for number, command in enumerate(config.get(key) or ()):
            if ray_starts(command):
                yield f"{key}[{number}]", command


def started_types(config: Mapping[str, Any]) -> Iterator[NodeType]:
    """Of machines that are there already: as many kinds as there are start commands."""
    workers = config["provider"].get("worker_ips") or ()
    starts = [(key, one.options) for key, command in start_commands(config) for one in ray_starts(command)]
    for key, options in starts:
        labels = dict(pair.partition("=")[::2] for pair in options.get("--labels", "").split(",") if pair)
        of_head = key.startswith("head_")
        resources = {
            "CPU": float(options.get("--num-cpus", math.inf)),
            "GPU": float(options.get("--num-gpus", 0)),
            **{name: float(amount) for name, amount in json.loads(options.get("--resources", "{}")).items()},
        }
        if resources["GPU"] and ACCELERATOR in labels:
            resources.setdefault(f"accelerator_type:{labels[ACCELERATOR]}", 1.0)  # Ray adds it on the machine
        yield NodeType(
            name="head" if "--head" in options else labels.get(REGION, key),
            key=key,
            cloud=None,
            place=None,
            instance=None,
            instance_key=key,
            market="spot" if labels.get(MARKET) == "spot" else "on-demand",
            head="--head" in options,
            least=1 if of_head else len(workers),
            most=1 if of_head else len(workers),
            resources=resources,
            labels=labels,
            labels_key=f"{key} (--labels)",
        )


def kuberay_types(specs: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[NodeType]:
    """Of RayCluster specs with their key paths: the head and each worker group."""
    for key, spec in specs:
        yield _group(f"{key}.headGroupSpec", spec.get("headGroupSpec") or {}, head=True)
        for number, group in enumerate(spec.get("workerGroupSpecs") or ()):
            yield _group(f"{key}.workerGroupSpecs[{number}]", group, head=False)


def _group(key: str, group: Mapping[str, Any], head: bool) -> NodeType:
    pod = (group.get("template") or {}).get("spec") or {}
    selector = pod.get("nodeSelector") or {}
    containers = pod.get("containers") or [{}]
    limits = (containers[0].get("resources") or {}).get("limits") or {}
    parameters = group.get("rayStartParams") or {}
    labels = dict(group.get("labels") or {})
    resources = {
        "CPU": float(parameters.get("num-cpus") or _quantity(limits.get("cpu", math.inf))),
        "GPU": float(parameters.get("num-gpus") or _quantity(limits.get("nvidia.com/gpu", 0))),
    }
    if resources["GPU"] and ACCELERATOR in labels:
        resources[f"accelerator_type:{labels[ACCELERATOR]}"] = 1.0  # Ray adds it on the machine
    return NodeType(
        name="head" if head else str(group.get("groupName")),
        key=key,
        cloud=labels.get(CLOUD) if labels.get(CLOUD) in ("aws", "gcp", "azure") else None,
        place=None,
        instance=selector.get(INSTANCE_SELECTOR),
        instance_key=f"{key}.template.spec.nodeSelector.{INSTANCE_SELECTOR}",
        market="spot" if any(selector.get(name) == value for name, value in SPOT_SELECTORS) else "on-demand",
        head=head,
        least=1 if head else int(group.get("minReplicas", 0)),
        most=1 if head else int(group.get("maxReplicas", 0)),
        resources=resources,
        labels=labels,
        labels_key=f"{key}.labels",
    )


def _quantity(value: Any) -> float:
    """A Kubernetes amount of cores or devices: `4`, `"44"`, `"500m"`."""
    text = str(value)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)

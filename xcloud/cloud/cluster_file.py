"""Cluster files: what Ray's cluster launcher and KubeRay are given, and the node types that they promise.

The formats are Ray's (`ray/autoscaler/ray-schema.json`) and KubeRay's (RayCluster and RayJob, `ray.io/v1`). Nothing of
them is translated: a file is read, looked at, and handed on as it is.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from xcloud.errors import ConfigError
from xcloud.strict_yaml import StrictDumper, StrictLoader

__all__ = [
    "ACCELERATOR",
    "CLOUD",
    "MARKET",
    "REGION",
    "ClusterFile",
    "NodeType",
    "Problem",
    "dump_cluster",
    "parse_cluster",
    "read_cluster",
    "walk",
]

REGION, CLOUD, MARKET = "ray.io/region", "cloud", "ray.io/market-type"
ACCELERATOR = "ray.io/accelerator-type"
INSTANCE_SELECTOR = "node.kubernetes.io/instance-type"
SPOT_SELECTORS = (
    ("cloud.google.com/gke-spot", "true"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""Node labels by which the clouds' Kubernetes services mark spot machines."""

LOOPBACK = re.compile(r"127(\.\d+){3}|::1|localhost")
START_WORDS = ("ray", "start")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, or that has to be looked at.

    Attributes:
        file: where.
        key: path of the key in it.
        text: what is wrong and what was expected.
    """

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.text}" if self.key else f"{self.file}: {self.text}"


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


@dataclass(frozen=True)
class ClusterFile:
    """One cluster file.

    Attributes:
        path: as the user wrote it.
        documents: its YAML documents as parsed.
        form: whose format it has.
        node_types: what it offers.
    """

    path: Path
    documents: tuple[Mapping[str, Any], ...]
    form: Literal["launcher", "kuberay"]
    node_types: tuple[NodeType, ...] = field(default=(), compare=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The launcher's config, or the first document."""
        return self.documents[0]

    @property
    def provider(self) -> str:
        """The launcher's provider, or `kuberay`."""
        return "kuberay" if self.form == "kuberay" else str(self.config["provider"].get("type"))

    @property
    def on_this_machine(self) -> bool:
        """Whether all of it runs here, on loopback."""
        provider = self.config.get("provider", {})
        addresses = [provider.get("head_ip", ""), *(provider.get("worker_ips") or ())]
        return self.provider == "local" and all(LOOPBACK.fullmatch(str(a)) for a in addresses)

    def providers(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Configs of the clouds' own providers with their key paths, by the name that node types call them by."""
        provider = self.config.get("provider", {})
        if self.form == "kuberay":
            return {}
        if provider.get("type") != "external":
            return {str(provider.get("type")): ("provider", provider)}
        found = {}
        for name, cloud in (provider.get("clouds") or {}).items():
            key, own = f"provider.clouds.{name}", cloud
            if "file" in cloud:
                own = read_cluster(self.path.parent / str(cloud["file"])).config
            found[name] = (f"{key}.provider", own.get("provider") or {})
        return found

    def only(self, wanted: Callable[[Mapping[str, Any]], bool]) -> ClusterFile:
        """The same file with some of its documents."""
        return replace(self, documents=tuple(document for document in self.documents if wanted(document)))

    def values(self) -> Iterator[tuple[str, Any]]:
        """Every value of every document with its key path."""
        for number, document in enumerate(self.documents):
            yield from walk(document, f"[{number}]" if len(self.documents) > 1 else "")

    def error(self, key: str, text: str) -> Problem:
        return Problem(str(self.path), key, text)

    def clusters(self) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
        """Key path, metadata and spec of each RayCluster, those inside a RayJob as well."""
        for number, document in enumerate(self.documents):
            prefix = f"[{number}]." if len(self.documents) > 1 else ""
            metadata, spec = document.get("metadata") or {}, document.get("spec") or {}
            if document.get("kind") == "RayCluster":
                yield f"{prefix}spec", metadata, spec
            elif document.get("kind") == "RayJob" and spec.get("rayClusterSpec"):
                yield f"{prefix}spec.rayClusterSpec", metadata, spec["rayClusterSpec"]


def read_cluster(path: Path) -> ClusterFile:
    """Read a cluster file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has neither format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such cluster file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_cluster(text, path)


def parse_cluster(text: str, path: Path) -> ClusterFile:
    """Like `read_cluster`, from text.

    Raises:
        ConfigError: it is not YAML, or has neither format.
    """
    try:
        documents = tuple(
            document for document in yaml.load_all(text, Loader=StrictLoader) if document is not None
        )
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    for number, document in enumerate(documents):
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: [{number}]: expected a mapping, got {type(document).__name__}")
    if documents and all("apiVersion" in document for document in documents):
        cluster = ClusterFile(path, documents, "kuberay")
        read = _kuberay_types
    elif len(documents) == 1 and isinstance(documents[0].get("provider"), dict):
        cluster = ClusterFile(path, documents, "launcher")
        read = _started_types if cluster.provider == "local" else _launcher_types
    else:
        raise ConfigError(
            f"{path}: expected a file for Ray's cluster launcher (with 'cluster_name' and 'provider'), or documents "
            "for KubeRay (with 'apiVersion' and 'kind')"
        )
    try:
        return ClusterFile(path, documents, cluster.form, tuple(read(cluster)))
    except (AttributeError, TypeError, ValueError) as error:
        # The schema says which key it is; whoever checks the file asks it first.
        raise ConfigError(f"{path}: not in the format of {cluster.form}: {error}") from None


def dump_cluster(cluster: ClusterFile) -> str:
    """The file as YAML; `parse_cluster` gives the same documents back. Comments are lost."""
    return yaml.dump_all(
        cluster.documents, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=110
    )


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping and no list, with its key path."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from walk(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from walk(item, f"{key}[{number}]")
    else:
        yield key, value


def _launcher_types(cluster: ClusterFile) -> Iterator[NodeType]:
    config, providers = cluster.config, cluster.providers()
    for name, raw in (config.get("available_node_types") or {}).items():
        key = f"available_node_types.{name}"
        node = raw.get("node_config") or {}
        called = str(node.get("_cloud", cluster.provider))
        provider = providers.get(called, ("", {}))[1]
        cloud = provider.get("type", called if cluster.provider == "external" else None)
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


def start_commands(cluster: ClusterFile) -> Iterator[tuple[str, str]]:
    """Key path and text of every command that starts Ray on a node."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for number, command in enumerate(cluster.config.get(key) or ()):
            if _start_options(command):
                yield f"{key}[{number}]", command


def _start_options(command: str) -> list[str]:
    """What follows `ray start` in a command."""
    words = shlex.split(command)
    for place, word in enumerate(words[:-1]):
        if word.rpartition("/")[2] == "ray" and words[place + 1] == "start":
            return words[place + 2 :] or [""]
    return []


def _started_types(cluster: ClusterFile) -> Iterator[NodeType]:
    """Of machines that are there already: as many kinds as there are start commands."""
    workers = cluster.config["provider"].get("worker_ips") or ()
    for key, command in start_commands(cluster):
        options = _options(_start_options(command))
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


def _options(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            follows = words[place + 1] if place + 1 < len(words) else "--"
            found[name] = value if equals else "" if follows.startswith("--") else follows
    return found


def _kuberay_types(cluster: ClusterFile) -> Iterator[NodeType]:
    for key, _, spec in cluster.clusters():
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

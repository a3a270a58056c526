"""What xcloud asks of a cluster file beyond its schema: machines that exist, labels that jobs select on, limits, safety.

Instance types are looked up in the price book. Quotas are what the user writes down (`provider.xcloud.quota`, or the
annotation `xcloud/quota` of a RayCluster), in accelerators by market: clouds do not tell them offline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from xcloud.cloud.cluster_file import ClusterFile, Problem, walk
from xcloud.cloud.cluster_schema import prepared
from xcloud.cloud.node_types import ACCELERATOR, CLOUD, MARKET, REGION, START_KEYS, NodeType
from xcloud.cloud.shell import RayStart, ray_starts
from xcloud.errors import ConfigError
from xcloud.prices import Instance, PriceBook
from xcloud.strict_yaml import StrictLoader

__all__ = ["TLS_VARIABLES", "TOKEN_VARIABLES", "fill_ins", "rule_problems"]

FILL_IN = "FILL-IN"
"""Marks what only the user knows; `up` refuses a file that still has it."""

EVERYWHERE = re.compile(r"(?<![\d.])0\.0\.0\.0/0|(?<![\w:])::/0")
DASHBOARD = re.compile(r"--dashboard-host[=\s]+\"?(?P<host>[^\s\";]+)")
LOOPBACK = re.compile(r"127(\.\d{1,3}){3}")
NOT_KEPT = ("127.0.0.1", "localhost", "::1")
"""Ray takes these for the machine's address on the network."""
TLS_VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
EXPECTED = {"RAY_USE_TLS": "1", "RAY_AUTH_MODE": "token"}
QUOTA_ANNOTATION = "xcloud/quota"
MARKETS = ("spot", "on-demand")
KINDS = ("RayCluster", "RayJob")
"""What `up` applies: kinds whose every door is looked at here."""


def rule_problems(cluster: ClusterFile, book: PriceBook) -> list[Problem]:
    """Everything that is wrong by these rules."""
    rules: Sequence[Callable[[ClusterFile], Iterator[Problem]]] = (
        lambda c: _machines(c, book),
        _labels,
        _limits,
        _quotas,
        _open,
        _network,
        _kuberay_safety,
        _secured,
    )
    # A command that several node types take from one file is told of once.
    return list(dict.fromkeys(problem for rule in rules for problem in rule(cluster)))


def fill_ins(cluster: ClusterFile) -> list[Problem]:
    """What is still to be filled in: one for each value, at the first key that has it."""
    keys: dict[str, list[str]] = {}
    for key, value in cluster.values():
        if isinstance(value, str) and FILL_IN in value:
            keys.setdefault(value, []).append(key)
    return [
        cluster.error(
            found[0],
            f"fill in what stands as {FILL_IN}: {value!r}"
            + (f" (and {len(found) - 1} more keys)" if found[1:] else ""),
        )
        for value, found in keys.items()
    ]


def _machines(cluster: ClusterFile, book: PriceBook) -> Iterator[Problem]:
    for node in cluster.node_types:
        if node.cloud is None:
            continue
        if node.instance is None:
            yield cluster.error(
                node.instance_key, f"is missing; expected an instance type of {node.cloud!r}, such as "
                f"{book.instances(node.cloud)[0].name}"
            )  # fmt: skip
            continue
        try:
            machine = book.instance(node.cloud, node.instance)
        except ConfigError as error:
            yield cluster.error(node.instance_key, str(error))
            continue
        yield from _fits(cluster, node, machine)


def _fits(cluster: ClusterFile, node: NodeType, machine: Instance) -> Iterator[Problem]:
    """Resources and accelerator of a node type against its machine."""
    where = f"{node.key}.resources" if cluster.form == "launcher" else node.key
    for name, promised, real in (("CPU", node.cpus, machine.cpus), ("GPU", node.gpus, machine.count)):
        if promised > real:
            yield cluster.error(
                f"{where}.{name}", f"{promised:g} is more than the {real} that one {machine.name} has"
            )
    if not node.head and machine.accelerator is not None and not node.gpus:
        yield cluster.error(
            f"{where}.GPU", f"is missing; one {machine.name} has {machine.count} x {machine.accelerator}"
        )
    label = node.labels.get(ACCELERATOR)
    if machine.accelerator is None and label is not None:
        yield cluster.error(
            f"{node.labels_key}.{ACCELERATOR}", f"{label!r}, but {machine.name} has no accelerator"
        )
    elif machine.accelerator is not None and label is not None and label != machine.accelerator:
        yield cluster.error(
            f"{node.labels_key}.{ACCELERATOR}",
            f"{label!r}, but {machine.name} has {machine.count} x {machine.accelerator}",
        )
    resource = f"accelerator_type:{machine.accelerator}"
    if machine.accelerator is not None and node.gpus and resource not in node.resources:
        yield cluster.error(
            f"{where}.{resource}",
            f"is missing; without it the autoscaler brings no machine up for `accelerator: {machine.accelerator}`; expected 1",
        )


def _labels(cluster: ClusterFile) -> Iterator[Problem]:
    for node in cluster.node_types:
        needed = [REGION, CLOUD, MARKET, *([ACCELERATOR] if node.gpus else [])]
        for name in needed:
            if not node.labels.get(name):
                yield cluster.error(
                    f"{node.labels_key}.{name}", "is missing; jobs select their machines by it"
                )
        market = node.labels.get(MARKET)
        if market is not None and market != node.market:
            yield cluster.error(
                f"{node.labels_key}.{MARKET}",
                f"{market!r}, but these machines are bought {node.market}; expected {node.market!r}",
            )
        if cluster.form == "launcher" and node.cloud is not None:
            for name, real in ((CLOUD, node.cloud), (REGION, node.place)):
                said = node.labels.get(name)
                if said is not None and real is not None and said != real:
                    yield cluster.error(
                        f"{node.labels_key}.{name}", f"{said!r}, but the machines stand in {real!r}"
                    )


def _limits(cluster: ClusterFile) -> Iterator[Problem]:
    most_in_file = cluster.config.get("max_workers") if cluster.form == "launcher" else None
    caps = {
        name: cloud.get("max_workers")
        for name, cloud in (cluster.config.get("provider", {}).get("clouds") or {}).items()
    }
    least = "minReplicas" if cluster.form == "kuberay" else "min_workers"
    most = "maxReplicas" if cluster.form == "kuberay" else "max_workers"
    for node in cluster.node_types:
        if node.head or cluster.provider == "local":
            continue
        if node.least > node.most:
            yield cluster.error(f"{node.key}.{least}", f"{node.least} is more than its {most} of {node.most}")
        if most_in_file is not None and node.most > most_in_file:
            yield cluster.error(
                f"{node.key}.{most}", f"{node.most} is more than the file's max_workers of {most_in_file}"
            )
        called = _called(cluster, node)
        cap = caps.get(called)
        if cap is not None and node.most > cap:
            yield cluster.error(
                f"{node.key}.{most}",
                f"{node.most} is more than provider.clouds.{called}.max_workers of {cap}",
            )


def _quotas(cluster: ClusterFile) -> Iterator[Problem]:
    for key, quota, nodes in _stated(cluster):
        if not isinstance(quota, Mapping):
            yield cluster.error(key, "expected {spot: {H100: 16}, on-demand: {H100: 8}}")
            continue
        for market, limits in quota.items():
            if market not in MARKETS or not isinstance(limits, Mapping):
                yield cluster.error(f"{key}.{market}", "expected a market (spot, on-demand) with {H100: 16}")
                continue
            for accelerator, limit in limits.items():
                wanted = {
                    node.name: int(node.most * node.gpus)
                    for node in nodes
                    if node.market == market and node.labels.get(ACCELERATOR) == accelerator
                }
                if sum(wanted.values()) > limit:
                    parts = " + ".join(f"{name} {count}" for name, count in wanted.items())
                    yield cluster.error(
                        f"{key}.{market}.{accelerator}",
                        f"{limit}, but the node types may take {sum(wanted.values())} x {accelerator} ({parts}); "
                        "lower their max_workers, or raise the quota with the cloud and here",
                    )


def _stated(cluster: ClusterFile) -> Iterator[tuple[str, Any, list[NodeType]]]:
    """Every quota with its key and the node types that it is for."""
    for called, (key, provider) in cluster.providers().items():
        if "quota" in (provider.get("xcloud") or {}):
            nodes = [node for node in cluster.node_types if _called(cluster, node) == called]
            yield f"{key}.xcloud.quota", provider["xcloud"]["quota"], nodes
    for key, metadata, _ in cluster.clusters():
        text = (metadata.get("annotations") or {}).get(QUOTA_ANNOTATION)
        if text is not None:
            nodes = [node for node in cluster.node_types if node.key.startswith(f"{key}.")]
            try:
                quota = yaml.load(str(text), Loader=StrictLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
            except yaml.YAMLError:
                quota = None
            yield f"{key.rpartition('spec')[0]}metadata.annotations.{QUOTA_ANNOTATION}", quota, nodes


def _called(cluster: ClusterFile, node: NodeType) -> str:
    """The name in `provider.clouds` that a node type goes by."""
    raw = (cluster.config.get("available_node_types") or {}).get(node.name) or {}
    return str((raw.get("node_config") or {}).get("_cloud", cluster.provider))


def _open(cluster: ClusterFile) -> Iterator[Problem]:
    """Addresses that stand for the whole internet."""
    for key, value in (*cluster.values(), *_filled_in(cluster)):
        if not isinstance(value, str):
            continue
        if EVERYWHERE.search(value):
            yield cluster.error(
                key, f"{value!r} opens it to the whole internet; expected the addresses that need it"
            )
        host = DASHBOARD.search(value)
        if host and host["host"] not in ("127.0.0.1", "::1", "localhost"):
            yield cluster.error(
                key,
                f"--dashboard-host={host['host']} offers the dashboard and the Jobs API, which are plain HTTP, beyond "
                "the machine; expected 127.0.0.1, reached through `ray dashboard FILE`",
            )


def _network(cluster: ClusterFile) -> Iterator[Problem]:
    """Networks that a provider would open to the world by itself."""
    for called, (key, provider) in cluster.providers().items():
        kind = provider.get("type")
        if kind == "azure" and (not provider.get("use_internal_ips") or provider.get("use_external_head_ip")):
            yield cluster.error(
                f"{key}.use_internal_ips",
                "Ray's security group for Azure opens SSH to any source; expected true, and no use_external_head_ip",
            )
        raw = cluster.config.get("available_node_types") or {}
        for node in cluster.node_types:
            config = (raw.get(node.name) or {}).get("node_config") or {}
            if _called(cluster, node) != called:
                continue
            if kind == "aws" and not config.get("SecurityGroupIds"):
                yield cluster.error(
                    f"{node.key}.node_config.SecurityGroupIds",
                    "is missing: Ray would make a security group that opens SSH to the whole internet; "
                    "expected a group of yours",
                )
            if kind == "gcp" and not config.get("networkInterfaces"):
                yield cluster.error(
                    f"{node.key}.node_config.networkInterfaces",
                    "is missing: Ray would take the default network, whose rules open SSH to the whole internet; "
                    "expected a subnetwork of yours",
                )


def _kuberay_safety(cluster: ClusterFile) -> Iterator[Problem]:
    if cluster.form != "kuberay":
        return
    for number, document in enumerate(cluster.documents):
        kind, group = str(document.get("kind")), str(document.get("apiVersion")).partition("/")[0]
        if kind not in KINDS or group != "ray.io":
            yield cluster.error(
                f"[{number}].kind" if len(cluster.documents) > 1 else "kind",
                f"{document.get('apiVersion')} {kind}: nothing here knows what it opens (a Service, an Ingress and a "
                f"RayService can be reached from outside); expected ray.io {' or '.join(KINDS)}; apply others yourself",
            )
    for key, _, spec in cluster.clusters():
        head = spec.get("headGroupSpec") or {}
        service = head.get("serviceType", "ClusterIP")
        if service != "ClusterIP":
            yield cluster.error(
                f"{key}.headGroupSpec.serviceType",
                f"{service!r} can be reached from outside; expected ClusterIP",
            )
        service_spec = (head.get("headService") or {}).get("spec") or {}
        if service_spec.get("type", "ClusterIP") != "ClusterIP":
            yield cluster.error(
                f"{key}.headGroupSpec.headService.spec.type",
                f"{service_spec['type']!r} can be reached from outside; expected ClusterIP",
            )
        if service_spec.get("externalIPs"):
            yield cluster.error(
                f"{key}.headGroupSpec.headService.spec.externalIPs",
                "lets others than the cluster's pods in; expected none",
            )
        if head.get("enableIngress"):
            yield cluster.error(f"{key}.headGroupSpec.enableIngress", "opens the dashboard; expected false")
        if (spec.get("networkPolicy") or {}).get("mode") not in ("DenyAll", "DenyAllIngress"):
            yield cluster.error(
                f"{key}.networkPolicy.mode",
                "is missing: any pod of the Kubernetes cluster could call the dashboard and the Jobs API; expected "
                "DenyAllIngress or DenyAll",
            )
        if not (spec.get("tlsOptions") or {}).get("enabled"):
            yield cluster.error(
                f"{key}.tlsOptions.enabled", "is missing: Ray would talk in the clear; expected true"
            )
        if (spec.get("authOptions") or {}).get("mode") != "token":
            yield cluster.error(
                f"{key}.authOptions.mode", "is missing: anybody could call Ray; expected token"
            )
    for key, value in cluster.values():
        if key.endswith(("hostNetwork", "hostPort")) and value:
            yield cluster.error(key, "puts ports on the machine's own network; expected none of it")


def _filled_in(cluster: ClusterFile) -> Iterator[tuple[str, Any]]:
    """What Ray adds to a file: values that do not stand in it, with the keys that they get."""
    if cluster.form == "kuberay":
        return
    written = {value for _, value in cluster.values() if isinstance(value, str)}
    for key, value in walk(prepared(cluster)):
        # Start commands that are missing are told of as such.
        if isinstance(value, str) and value not in written and not key.startswith(START_KEYS):
            yield key, value


def _secured(cluster: ClusterFile) -> Iterator[Problem]:
    """TLS and token wherever Ray is started; on this machine alone: loopback and token."""
    if cluster.form == "kuberay":
        return
    if not cluster.config.get("available_node_types") and cluster.provider != "local":
        yield cluster.error(
            "available_node_types",
            "is missing: Ray would take machines of its own choice, in networks that open SSH to the whole internet",
        )
    sides = {key.partition("[")[0] for key, _ in _starts(cluster.values())}
    for side in START_KEYS:
        if side not in sides and not (cluster.on_this_machine and side == "worker_start_ray_commands"):
            yield cluster.error(
                side, "is missing: Ray's defaults have neither TLS nor a token; expected `ray start`"
            )
    for key, start in _starts((*cluster.values(), *_filled_in(cluster))):
        if isinstance(start, str):
            yield cluster.error(key, f"cannot be read as a shell command: {start}")
            continue
        if cluster.on_this_machine:
            yield from _on_loopback(cluster, key, start)
        names = ("RAY_AUTH_MODE",) if cluster.on_this_machine else (*TLS_VARIABLES, *TOKEN_VARIABLES)
        for name in names:
            value, wanted = start.environment.get(name), EXPECTED.get(name)
            if not value:
                yield cluster.error(
                    key, f"{name} is not set; expected {name}={wanted or 'FILE'} before `ray start`"
                )
            elif wanted is not None and value != wanted:
                yield cluster.error(key, f"{name} is {value}; expected {wanted}")


def _starts(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, RayStart | str]]:
    """Every `ray start` in any text, for nothing but Ray's defaults keeps it in the start commands; or why it cannot be read."""
    for key, value in values:
        if isinstance(value, str) and (
            "commands[" in key or re.search(r"\bray\b.*\bstart\b", value, re.DOTALL)
        ):
            try:
                found = ray_starts(value)
            except ValueError as error:
                yield key, str(error)
            else:
                yield from ((key, start) for start in found)


def _on_loopback(cluster: ClusterFile, key: str, start: RayStart) -> Iterator[Problem]:
    address = start.options.get("--node-ip-address")
    if address is None or address in NOT_KEPT or not LOOPBACK.fullmatch(address):
        said = "is missing" if address is None else f"is {address}"
        yield cluster.error(
            key,
            f"--node-ip-address {said}, and Ray would call this node by its address on the network, without TLS; expected "
            "an address on loopback that Ray keeps, such as 127.0.0.2",
        )

"""Cluster files: what Ray's cluster launcher and KubeRay are given, and the node types that they promise.

The formats are Ray's (`ray/autoscaler/ray-schema.json`) and KubeRay's (RayCluster and RayJob, `ray.io/v1`). Nothing of
them is translated: a file is read, looked at, and handed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from xcloud.cloud.clouds import expand_with_origins
from xcloud.cloud.node_types import NodeType, kuberay_types, launcher_types, started_types
from xcloud.errors import ConfigError
from xcloud.strict_yaml import StrictDumper, StrictLoader

__all__ = ["COMPOSITE", "ClusterFile", "Problem", "dump_cluster", "parse_cluster", "read_cluster", "walk"]

COMPOSITE = "xcloud.cloud.composite.CompositeNodeProvider"
LOOPBACK = re.compile(r"127(\.\d+){3}|::1|localhost")


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
class ClusterFile:
    """One cluster file.

    Attributes:
        path: as the user wrote it.
        documents: its YAML documents as parsed.
        form: whose format it has.
        expanded: of a file over several clouds: with the cluster files that it names taken into it.
        origins: of what was taken: its file and key there, by the key in `expanded`.
        node_types: what it offers.
    """

    path: Path
    documents: tuple[Mapping[str, Any], ...]
    form: Literal["launcher", "kuberay"]
    expanded: Mapping[str, Any] | None = field(default=None, compare=False)
    origins: Mapping[str, tuple[Path, str]] = field(default_factory=dict, compare=False)
    node_types: tuple[NodeType, ...] = field(default=(), compare=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The launcher's config, with the files that it takes other clouds from; or the first document."""
        return self.documents[0] if self.expanded is None else self.expanded

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
            found[name] = (f"provider.clouds.{name}.provider", cloud.get("provider") or {})
        return found

    def only(self, wanted: Callable[[Mapping[str, Any]], bool]) -> ClusterFile:
        """The same file with some of its documents."""
        return replace(self, documents=tuple(document for document in self.documents if wanted(document)))

    def values(self) -> Iterator[tuple[str, Any]]:
        """Every value of every document with its key path, what other files give included."""
        for number, document in enumerate([self.config] if self.form == "launcher" else self.documents):
            yield from walk(document, f"[{number}]" if len(self.documents) > 1 else "")

    def error(self, key: str, text: str) -> Problem:
        """Something wrong at a key of `config`, in the file that the key stands in."""
        end = len(key)
        while end > 0:
            if key[:end] in self.origins:
                path, there = self.origins[key[:end]]
                return Problem(str(path), there + key[end:], text)
            end = max(key.rfind(".", 0, end), key.rfind("[", 0, end))
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
    elif len(documents) == 1 and isinstance(documents[0].get("provider"), dict):
        cluster = ClusterFile(path, documents, "launcher")
        if cluster.config["provider"].get("module") == COMPOSITE:
            try:  # as the provider does it: other files are looked for from the working directory
                expanded, origins = expand_with_origins(cluster.config, Path())
                cluster = replace(cluster, expanded=expanded, origins=origins)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    else:
        raise ConfigError(
            f"{path}: expected a file for Ray's cluster launcher (with 'cluster_name' and 'provider'), or documents "
            "for KubeRay (with 'apiVersion' and 'kind')"
        )
    try:
        return replace(cluster, node_types=tuple(_node_types(cluster)))
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not in the format of {cluster.form}: {error}") from None


def _node_types(cluster: ClusterFile) -> Iterator[NodeType]:
    if cluster.form == "kuberay":
        return kuberay_types((key, spec) for key, _, spec in cluster.clusters())
    if cluster.provider == "local":
        return started_types(cluster.config)
    return launcher_types(cluster.config, cluster.providers())


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

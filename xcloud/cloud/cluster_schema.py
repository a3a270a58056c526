"""Cluster files against their own schemas, offline: Ray's preparation of launcher files, KubeRay's CRDs.

Ray's part is what `ray up` itself does before it calls a cloud: `prepare_config`, `validate_config`, then autoscaler
v2's `AutoscalingConfig`. KubeRay's part needs its CustomResourceDefinitions, which are not part of xcloud: a folder of
`*crd*.yaml` files is given by the user. An API server drops fields that it does not know; here they are errors.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from xcloud.cloud.clouds import CloudsConfig, node_types
from xcloud.cloud.cluster_file import COMPOSITE, ClusterFile, Problem
from xcloud.errors import ConfigError

__all__ = [
    "CRDS_VARIABLE",
    "composite_problems",
    "kuberay_problems",
    "launcher_problems",
    "prepared",
    "read_crds",
]

CRDS_VARIABLE = "XCLOUD_KUBERAY_CRDS"
KEY_FILES = ("ssh_private_key", "ssh_public_key")


def launcher_problems(cluster: ClusterFile) -> Iterator[Problem]:
    """What Ray's cluster launcher or its autoscaler would refuse."""
    config = copy.deepcopy(dict(cluster.documents[0]))
    said = io.StringIO()
    logging_was = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about defaults that it fills in
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(config)))
            # The autoscaler reads key files to see whether they have changed; whether they exist is asked before `up`.
            config["auth"] = {k: v for k, v in (config.get("auth") or {}).items() if k not in KEY_FILES}
            AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    except jsonschema.ValidationError as error:
        yield cluster.error(_path(error.absolute_path), error.message)
    except KeyError as error:
        yield cluster.error(str(error.args[0]), f"is missing, which provider {cluster.provider!r} needs")
    except click.ClickException:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        yield cluster.error("provider", re.sub(r"\x1b\[\d*m", "", lines[-1]) if lines else "Ray refuses it")
    except (ValueError, RuntimeError, TypeError, AttributeError, AssertionError, ImportError) as error:
        yield cluster.error("", f"Ray refuses it: {str(error) or type(error).__name__}")
    finally:
        logging.disable(logging_was)


def prepared(cluster: ClusterFile) -> dict[str, Any]:
    """A launcher file as Ray runs it: with what Ray fills in. Takes it for granted that Ray does not refuse it."""
    logging_was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(prepare_config(copy.deepcopy(dict(cluster.config))))
    finally:
        logging.disable(logging_was)


def composite_problems(cluster: ClusterFile) -> Iterator[Problem]:
    """What xcloud's own provider for several clouds would refuse."""
    provider = cluster.config.get("provider") or {}
    if provider.get("module") != COMPOSITE:
        return
    try:
        available = cluster.config.get("available_node_types") or {}
        node_types(CloudsConfig.read(provider), available, cluster.config.get("head_node_type"))
    except ConfigError as error:
        key, colon, text = str(error).partition(": ")
        yield cluster.error(key if colon else "provider", text or str(error))


def read_crds(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """JSON schemas by `apiVersion` and `kind`, from the CustomResourceDefinitions in a folder.

    Raises:
        ConfigError: the folder holds none.
    """
    found = {}
    for file in sorted(folder.glob("*crd*.yaml")) if folder.is_dir() else ():
        crd = yaml.safe_load(file.read_text(encoding="utf-8"))
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    if not found:
        raise ConfigError(
            f"{folder}: no CustomResourceDefinitions there (--crds or {CRDS_VARIABLE}); expected KubeRay's *crd*.yaml "
            "files, as `kubectl get crd rayclusters.ray.io -o yaml` gives them"
        )
    return found


def kuberay_problems(
    cluster: ClusterFile, crds: Mapping[tuple[str, str], dict[str, Any]]
) -> Iterator[Problem]:
    """What does not match KubeRay's schemas, fields that they do not know included."""
    for number, document in enumerate(cluster.documents):
        prefix = f"[{number}]" if len(cluster.documents) > 1 else ""
        kind = (str(document.get("apiVersion")), str(document.get("kind")))
        if kind not in crds:
            known = ", ".join(" ".join(pair) for pair in crds)
            yield cluster.error(
                f"{prefix}.kind".lstrip("."), f"{' '.join(kind)} is not known; known: {known}"
            )
            continue
        for error in jsonschema.Draft202012Validator(crds[kind]).iter_errors(document):
            path = _path(error.absolute_path)
            joint = "." if path and prefix and not path.startswith("[") else ""
            yield cluster.error(f"{prefix}{joint}{path}", error.message[:300])


def _strict(schema: Any) -> Any:
    """A Kubernetes structural schema as JSON schema that refuses what it does not list."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if made.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if made.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    if (
        made.get("type") == "object"
        and "properties" in made
        and "additionalProperties" not in made
        and not made.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return {
        name: _strict(value)
        for name, value in made.items()
        if not (isinstance(name, str) and name.startswith("x-kubernetes")) and name != "format"
    }


def _path(parts: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".")

"""Prepares a cluster file of several clouds for Ray: every cloud's part goes through that cloud's own provider."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ray.autoscaler._private.providers import _get_node_provider_cls

from xcloud.cloud.clouds import (
    CLOUD_KEY,
    FALLBACK_KEY,
    PRICE_KEY,
    CloudsConfig,
    expand_clouds,
    node_types,
    own_config,
)
from xcloud.cloud.member_cloud import said
from xcloud.errors import ConfigError

__all__ = ["HEADS_KEYS", "bootstrap", "fill_out_resources", "for_head"]

HEADS_KEYS = "~/.xcloud_ssh"
"""Where the head keeps the SSH keys of clouds that are not its own."""


def fill_out_resources(cluster: dict[str, Any]) -> dict[str, Any]:
    """Have each cloud's provider say what its machine types hold."""
    return _by_cloud(expand_clouds(cluster, Path()), "fillout_available_node_types_resources")


def bootstrap(cluster: dict[str, Any]) -> dict[str, Any]:
    """Bootstrap every cloud by its own provider, and put the node types where the composite provider sees them.

    Raises:
        ConfigError: names cloud and key.
    """
    expanded = expand_clouds(cluster, Path())
    config = CloudsConfig.read(expanded["provider"])
    head_type = expanded.get("head_node_type")
    types = node_types(config, expanded["available_node_types"], head_type)
    for name, one in types.items():
        settings = expanded["available_node_types"][name]
        settings["node_config"] = {**(settings.get("node_config") or {}), CLOUD_KEY: one.cloud}
        if (
            one.usd_per_hour is not None
        ):  # of types that do equally well, Ray takes that of the highest priority
            settings.setdefault("priority", -round(1000 * one.usd_per_hour))
    out = _by_cloud(expanded, "bootstrap_config")
    for name, spec in out["provider"]["clouds"].items():
        key = (spec.get("auth") or {}).get("ssh_private_key")
        if key and name != config.home:
            out.setdefault("file_mounts", {})[f"{HEADS_KEYS}/{name}.pem"] = key
    out["provider"]["node_types"] = copy.deepcopy(out["available_node_types"])
    for name, one in types.items():  # not into the types themselves: a head of another price is no other head
        own = out["provider"]["node_types"][name]["node_config"]
        own |= {PRICE_KEY: one.usd_per_hour, FALLBACK_KEY: list(one.fallback)}
    return out


def for_head(cluster: dict[str, Any]) -> dict[str, Any]:
    """The file as the head reads it: SSH keys lie elsewhere there, and workers get none of them."""
    out = copy.deepcopy(cluster)
    provider = out["provider"]
    for name, spec in provider["clouds"].items():
        auth = spec.get("auth") or {}
        if "ssh_private_key" in auth:
            at_home = name == provider["home"] and "ssh_private_key" in out.get("auth", {})
            auth["ssh_private_key"] = (
                out["auth"]["ssh_private_key"] if at_home else f"{HEADS_KEYS}/{name}.pem"
            )
        auth.pop("ssh_proxy_command", None)
        out.get("file_mounts", {}).pop(f"{HEADS_KEYS}/{name}.pem", None)
    return out


def _by_cloud(cluster: dict[str, Any], method: str) -> dict[str, Any]:
    """Apply one of a provider class's static methods to each cloud's part of a cluster file.

    Raises:
        ConfigError: names the cloud whose provider is unknown, lacks a library or refuses.
    """
    out = copy.deepcopy(cluster)
    config = CloudsConfig.read(out["provider"])
    head_type = out.get("head_node_type")
    types = node_types(config, out["available_node_types"], head_type)
    for name, spec in out["provider"]["clouds"].items():
        mine = {kind: out["available_node_types"][kind] for kind, one in types.items() if one.cloud == name}
        if not mine:
            continue
        part = copy.deepcopy({**out, "provider": spec["provider"], "available_node_types": mine})
        part["auth"] = {**out.get("auth", {}), **(spec.get("auth") or {})}
        own = {kind: part["available_node_types"][kind].get("node_config") or {} for kind in mine}
        for kind, node_config in own.items():
            part["available_node_types"][kind]["node_config"] = own_config(node_config)
        if head_type not in mine:
            part["head_node_type"] = next(iter(mine))  # they insist on a head of their own
        at = f"provider.clouds.{name}.provider"
        try:
            done = getattr(_get_node_provider_cls(spec["provider"]), method)(part)
        except SystemExit as error:  # how Ray's launchers give up, having said why
            raise ConfigError(
                f"{at}: {spec['provider']['type']!r} refused; its reason stands above"
            ) from error
        except Exception as error:  # whatever the cloud's own library raises
            raise ConfigError(f"{at}: {said(error)}") from error
        for kind, settings in done["available_node_types"].items():
            kept = {key: own[kind][key] for key in own[kind] if key.startswith("_") and kind in own}
            settings["node_config"] = {**(settings.get("node_config") or {}), **kept}
            out["available_node_types"][kind] = settings
        spec["provider"], spec["auth"] = done["provider"], done.get("auth") or {}
        if name == config.home:
            out["auth"] = {**out.get("auth", {}), **spec["auth"]}
            if head_type in mine and done.get("head_node"):
                out["head_node"] = done["head_node"]  # the head's own rights, which no worker gets
    return out

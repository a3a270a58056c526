"""The cluster file of several clouds: its own keys, read and checked, and other cluster files taken into it.

    provider:
      type: external
      module: xcloud.cloud.composite.CompositeNodeProvider
      home: aws                              # the head's cloud
      clouds:
        aws: {provider: {type: aws, region: us-east-1}, max_workers: 8, budget_usd_per_hour: 40.0}
        gcp: {file: gcp.yaml}                # provider, auth and worker types of another cluster file
    available_node_types:
      aws_h100_spot:
        node_config: {_cloud: aws, _usd_per_hour: 21.5, _fallback: [aws_h100, gcp_h100], InstanceType: ...}

Keys of `node_config` that begin with `_` and stand here are ours; a cloud's own provider never sees them. Without
`_fallback`, a type falls back to those of its cloud that differ in nothing but the market. Without `_usd_per_hour`, the
price is that of the price book (`xcloud.prices`), where it knows the machine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xcloud.cloud.fallback import CloudLimits, NodeType
from xcloud.errors import ConfigError
from xcloud.prices import PriceBook, load_prices
from xcloud.registry import nearest
from xcloud.strict_yaml import StrictLoader

__all__ = ["CLOUD_KEY", "CloudsConfig", "expand_clouds", "expand_with_origins", "node_types", "own_config"]

CLOUD_KEY, PRICE_KEY, FALLBACK_KEY = "_cloud", "_usd_per_hour", "_fallback"
OWN_KEYS = (CLOUD_KEY, PRICE_KEY, FALLBACK_KEY)
TAKEN = ("initialization_commands", "docker")
"""Settings of a whole file that Ray also reads from a node type."""


class CloudConfig(BaseModel):
    """One cloud of a composite provider.

    Attributes:
        provider: as in a cluster file of this cloud alone.
        file: a cluster file to take `provider`, `auth` and worker node types from.
        auth: for nodes of this cloud; what it leaves out comes from the file's own `auth`.
        max_workers: most workers in this cloud at once.
        budget_usd_per_hour: most that this cloud's nodes may cost.
        qualify_ids: put `CLOUD/` before node ids, so that no two clouds' can be equal. False for a provider that
            starts Ray itself and tells it the id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: dict[str, Any] | None = None
    file: str | None = None
    auth: dict[str, Any] = Field(default_factory=dict)
    max_workers: Annotated[int, Field(ge=0)] | None = None
    budget_usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    qualify_ids: bool = True

    @property
    def limits(self) -> CloudLimits:
        return CloudLimits(self.max_workers, self.budget_usd_per_hour)


class CloudsConfig(BaseModel):
    """The composite's part of `provider`; Ray's own keys beside it are not looked at.

    Attributes:
        home: the cloud of the head.
        node_types: the file's `available_node_types`, put here by `bootstrap_config`, since a node provider sees
            nothing but `provider`.
        retry_first_s: pause after a first failure, of a cloud's API or of a node type's launch; it doubles.
        retry_most_s: longest pause.
        answer_timeout_s: how long a cloud may take to list its nodes before its last answer is used again, and to
            terminate some before Ray goes on.
        launch_timeout_s: how long it may take to launch; for a termination, until it is asked for again.
        gcs_address: of the cluster; null: what Ray's monitor was started with.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    home: str
    clouds: Annotated[dict[str, CloudConfig], Field(min_length=1)]
    node_types: dict[str, dict[str, Any]] = Field(default_factory=dict)
    retry_first_s: Annotated[float, Field(gt=0)] = 10.0
    retry_most_s: Annotated[float, Field(gt=0)] = 300.0
    answer_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    launch_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    gcs_address: str | None = None

    @classmethod
    def read(cls, provider: Mapping[str, Any]) -> CloudsConfig:
        """Parse and check the `provider` section.

        Raises:
            ConfigError: names every wrong key.
        """
        for key in provider:
            guess = nearest(key, sorted(cls.model_fields))
            if key not in cls.model_fields and key not in RAYS_KEYS and guess and not key.startswith("_"):
                raise ConfigError(f"provider.{key}: unknown key; did you mean {guess!r}?")
        try:
            config = cls.model_validate(dict(provider))
        except ValidationError as error:
            raise ConfigError("; ".join(_told(one) for one in error.errors())) from None
        if config.home not in config.clouds:
            raise ConfigError(f"provider.home: {config.home!r} is not one of {sorted(config.clouds)}")
        for name, cloud in config.clouds.items():
            at = f"provider.clouds.{name}"
            if "/" in name:
                raise ConfigError(f"{at}: a cloud's name has no '/'")
            if cloud.provider is None and cloud.file is None:
                raise ConfigError(f"{at}: needs `provider`, or `file`: a cluster file to take it from")
            if cloud.provider is not None and not isinstance(cloud.provider.get("type"), str):
                raise ConfigError(f"{at}.provider.type: required key is missing")
        return config


RAYS_KEYS = frozenset(
    {
        "type",
        "module",
        "use_internal_ips",
        "use_node_id_as_ip",
        "disable_node_updaters",
        "disable_launch_config_check",
        "cache_stopped_nodes",
        "head_node_id",
    }
)


def _told(error: Any) -> str:
    path = ".".join(["provider", *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        known = sorted(CloudConfig.model_fields)
        guess = nearest(str(error["loc"][-1]), known)
        hint = f"did you mean {guess!r}?" if guess else "known keys: " + ", ".join(known)
        return f"{path}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}: required key is missing"
    return f"{path}: {error['msg']}, got {error['input']!r}"


def own_config(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """A node type's `node_config` as its cloud's own provider takes it."""
    return {key: copy.deepcopy(value) for key, value in node_config.items() if key not in OWN_KEYS}


def node_types(
    config: CloudsConfig, available: Mapping[str, Any], head_type: str | None = None
) -> dict[str, NodeType]:
    """The node types of a cluster file.

    Args:
        available: its `available_node_types`.
        head_type: its `head_node_type`, which lies in the home cloud if it does not say otherwise.

    Raises:
        ConfigError: names the node type and the key that is wrong.
    """
    found: dict[str, NodeType] = {}
    for name, settings in available.items():
        node = settings.get("node_config") or {}
        at = f"available_node_types.{name}.node_config"
        cloud = node.get(CLOUD_KEY, config.home if name == head_type else None)
        if cloud not in config.clouds:
            raise ConfigError(f"{at}.{CLOUD_KEY}: expected one of {sorted(config.clouds)}, got {cloud!r}")
        price = node.get(PRICE_KEY, _book_price(config.clouds[cloud].provider or {}, node))
        if price is not None and (
            isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0
        ):
            raise ConfigError(f"{at}.{PRICE_KEY}: expected dollars per hour, got {price!r}")
        if price is None and config.clouds[cloud].budget_usd_per_hour is not None:
            raise ConfigError(
                f"{at}.{PRICE_KEY}: required, because provider.clouds.{cloud}.budget_usd_per_hour is set"
            )
        fallback = node.get(FALLBACK_KEY)
        if fallback is None:
            fallback = _other_markets(name, available, cloud, head_type)
        if not isinstance(fallback, list) or not all(isinstance(other, str) for other in fallback):
            raise ConfigError(f"{at}.{FALLBACK_KEY}: expected a list of node types, got {fallback!r}")
        found[name] = NodeType(
            name=name,
            cloud=cloud,
            resources=dict(settings.get("resources") or {}),
            labels=dict(settings.get("labels") or {}),
            max_workers=int(settings.get("max_workers") or 0),
            usd_per_hour=price,
            fallback=tuple(fallback),
        )
    for name, one in found.items():
        at = f"available_node_types.{name}.node_config.{FALLBACK_KEY}"
        for other in one.fallback:
            if other == name or other not in found:
                guess = nearest(other, [n for n in found if n != name])
                hint = f"; did you mean {guess!r}?" if guess else ""
                raise ConfigError(f"{at}: {other!r} is not another node type{hint}")
            lacking = {r: a for r, a in one.resources.items() if found[other].resources.get(r, 0) < a}
            if lacking:
                raise ConfigError(f"{at}: {other!r} has less than {name!r} of {lacking}")
    return found


MARKET_LABEL = "ray.io/market-type"


def _other_markets(name: str, available: Mapping[str, Any], cloud: str, head_type: str | None) -> list[str]:
    """Types of the same cloud that are equal but for the market; types without labels are not told apart by it."""

    def but_market(settings: Mapping[str, Any]) -> Any:
        labels = {k: v for k, v in (settings.get("labels") or {}).items() if k != MARKET_LABEL}
        return settings.get("resources"), labels

    def market(settings: Mapping[str, Any]) -> Any:
        return (settings.get("labels") or {}).get(MARKET_LABEL)

    mine = available[name]
    return [
        other
        for other, settings in available.items()
        if other not in (name, head_type)
        and name != head_type
        and (settings.get("node_config") or {}).get(CLOUD_KEY) == cloud
        and but_market(settings) == but_market(mine)
        and None not in (market(settings), market(mine))
        and market(settings) != market(mine)
    ]


@functools.cache
def _book() -> PriceBook:
    return load_prices()


def _book_price(provider: Mapping[str, Any], node: Mapping[str, Any]) -> float | None:
    """What the price book says of a node type; None where it does not know the machine."""
    arm = node.get("azure_arm_parameters") or {}
    machine = {
        "aws": (
            node.get("InstanceType"),
            (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot",
        ),
        "gcp": (
            node.get("machineType"),
            any(one.get("preemptible") for one in _as_list(node.get("scheduling")))
            or any(one.get("provisioningModel") == "SPOT" for one in _as_list(node.get("scheduling"))),
        ),
        "azure": (arm.get("vmSize"), arm.get("priority") == "Spot"),
    }.get(str(provider.get("type")))
    if machine is None or machine[0] is None:
        return None
    cloud, place = str(provider["type"]), str(provider.get("region") or provider.get("location"))
    if machine[0] not in {one.name for one in _book().instances(cloud)}:
        return None
    found = _book().per_hour(cloud, place, machine[0], "spot" if machine[1] else "on_demand")
    return None if found is None else found.usd


def _as_list(value: Any) -> list[Any]:
    """GCP's `scheduling` is a list of one mapping in Ray's files, and a mapping in Google's."""
    return value if isinstance(value, list) else [] if value is None else [value]


def expand_clouds(cluster: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A cluster file with the clouds' own files taken into it: their provider, auth and worker node types.

    Args:
        folder: where `file` is relative to.

    Raises:
        ConfigError: names cloud, file and key.
    """
    return expand_with_origins(cluster, folder)[0]


def expand_with_origins(
    cluster: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, tuple[Path, str]]]:
    """Like `expand_clouds`, with where it was taken from: file and key, by the key path that it got.

    Raises:
        ConfigError: as `expand_clouds`.
    """
    out: dict[str, Any] = copy.deepcopy(dict(cluster))
    origins: dict[str, tuple[Path, str]] = {}
    config = CloudsConfig.read(out.get("provider") or {})
    types: dict[str, Any] = out.setdefault("available_node_types", {})
    for name, cloud in config.clouds.items():
        if cloud.file is None:
            continue
        path = folder / cloud.file
        taken = _load(path, f"provider.clouds.{name}.file")
        spec = out["provider"]["clouds"][name]
        del spec["file"]
        spec["provider"] = {**taken["provider"], **(cloud.provider or {})}
        spec["auth"] = {**(taken.get("auth") or {}), **cloud.auth}
        for part, own in (("provider", cloud.provider or {}), ("auth", cloud.auth)):
            for key in spec[part].keys() - own.keys():
                origins[f"provider.clouds.{name}.{part}.{key}"] = (path, f"{part}.{key}")
        commands: list[Any] = []
        sources: list[str] = []
        for key in ("setup_commands", "worker_setup_commands"):
            commands += taken.get(key) or []
            sources += [f"{key}[{number}]" for number in range(len(taken.get(key) or []))]
        for kind, settings in taken["available_node_types"].items():
            if kind == taken.get("head_node_type") and (kind != out.get("head_node_type") or kind in types):
                continue  # one cluster has one head
            if kind in types:
                raise ConfigError(
                    f"{path}: available_node_types.{kind}: another file has that node type, too"
                )
            added: dict[str, Any] = copy.deepcopy(settings)
            at = f"available_node_types.{kind}"
            origins[at] = (path, at)
            added["node_config"] = {**(added.get("node_config") or {}), CLOUD_KEY: name}
            added.setdefault("min_workers", 0)
            added.setdefault(
                "max_workers", 0 if kind == out.get("head_node_type") else taken.get("max_workers", 2)
            )
            if commands and "worker_setup_commands" not in added:
                added["worker_setup_commands"] = commands
                for number, source in enumerate(sources):
                    origins[f"{at}.worker_setup_commands[{number}]"] = (path, source)
            for key in TAKEN:
                if taken.get(key) and key not in added:
                    added[key] = taken[key]
                    origins[f"{at}.{key}"] = (path, key)
            types[kind] = added
    return out, origins


def _load(path: Path, at: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    except OSError as error:
        raise ConfigError(f"{at}: {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{at}: {path}: {error}") from None
    for key in ("provider", "available_node_types"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), dict):
            raise ConfigError(f"{path}: {key}: required key is missing")
    return dict(raw)

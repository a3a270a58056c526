"""The price book: instances, egress and storage of clouds, with a date and a source for each price.

A user's file has the schema of the files in `data/`, under the name of each cloud, and may hold a part of it only:

    aws:
      as_of: 2026-01-15
      source: our contract
      instances: {p5.48xlarge: {locations: {us-east-1: {spot: 21.5}}}}
    lab:
      as_of: 2026-01-15
      instances: {node: {cpus: 64, memory_gb: 512, accelerator: A100, count: 4, accelerator_memory_gb: 80,
                         locations: {any: {on_demand: 1.2}}}}
      egress: {any: {same_location: 0, same_continent: 0, other_continent: 0, internet: 0}}

What it says goes before what xcloud brings along. What nobody says is unknown (None), never zero.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from xcloud.errors import ConfigError
from xcloud.registry import nearest
from xcloud.strict_yaml import PlainLoader

__all__ = ["Instance", "Market", "Place", "Price", "PriceBook", "load_prices"]

Market = Literal["on_demand", "spot"]
Distance = Literal["same_location", "same_continent", "other_continent", "internet"]

CLOUDS = ("aws", "gcp", "azure")
ANY = "any"
"""In place of a location: all that are not listed."""


@dataclass(frozen=True)
class Price:
    """A price in US dollars, the day for which it was written down, and where it is published."""

    usd: float
    as_of: dt.date
    source: str


@dataclass(frozen=True)
class Place:
    """A location of a cloud, by the cloud's own name of it."""

    cloud: str
    location: str

    def __str__(self) -> str:
        return f"{self.cloud}/{self.location}"


@dataclass(frozen=True)
class Instance:
    """A cloud's machine type.

    Attributes:
        name: the cloud's own.
        cloud: that offers it.
        cpus: virtual cores.
        memory_gb: of the host, in the unit that the cloud states (most mean GiB).
        accelerator: Ray's accelerator type, such as `H100`; None: there is none.
        count: accelerators of one machine.
        accelerator_memory_gb: of one accelerator; 0 without.
    """

    name: str
    cloud: str
    cpus: int
    memory_gb: float
    accelerator: str | None = None
    count: int = 0
    accelerator_memory_gb: float = 0.0


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Machine(_Section):
    """An instance type; `locations` holds USD an hour by location and market."""

    cpus: Annotated[int, Field(ge=1)]
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    accelerator: Annotated[str, Field(min_length=1)] | None = None
    count: Annotated[int, Field(ge=0)] = 0
    accelerator_memory_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    locations: dict[str, dict[Market, Usd]] = Field(default_factory=dict)


def _whole(machine: _Machine) -> _Machine:
    if (machine.accelerator is None) != (machine.count == 0) or (machine.accelerator is None) != (
        machine.accelerator_memory_gb == 0
    ):
        raise ValueError(
            "accelerator, count and accelerator_memory_gb belong together; expected all of them or none"
        )
    return machine


class _Cloud(_Section):
    """A cloud's prices; see the head of `data/aws.yaml`."""

    as_of: dt.date
    source: Annotated[str, Field(min_length=1)]
    locations: dict[str, str] = Field(default_factory=dict)
    instances: dict[str, Annotated[_Machine, AfterValidator(_whole)]] = Field(default_factory=dict)
    egress: dict[str, dict[Distance, Usd]] = Field(default_factory=dict)
    storage: dict[str, dict[str, Usd]] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """One file's prices, as written; a layer before another wins."""

    origin: str
    clouds: Mapping[str, Mapping[str, Any]]

    def price(self, cloud: str, *keys: str) -> Price | None:
        node: Any = self.clouds.get(cloud)
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None:
            return None
        held = self.clouds[cloud]
        return Price(float(node), held["as_of"], str(held["source"]))


class PriceBook:
    """Prices of one or more files. All lookups go by the clouds' own names."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers = tuple(layers)
        merged: dict[str, Any] = {}
        for layer in reversed(self._layers):
            merged = _merge(merged, layer.clouds)
        self._clouds = {
            name: _parse(raw, name, self._layers[0].origin, self._layers[0].clouds.get(name))
            for name, raw in merged.items()
        }

    @property
    def clouds(self) -> tuple[str, ...]:
        """Clouds of which something is known."""
        return tuple(self._clouds)

    def instances(self, cloud: str) -> tuple[Instance, ...]:
        """All instance types of a cloud that are known; none for a cloud that is not."""
        held = self._clouds.get(cloud)
        return tuple(self.instance(cloud, name) for name in held.instances) if held else ()

    def instance(self, cloud: str, name: str) -> Instance:
        """An instance type.

        Raises:
            ConfigError: it is not known; names the nearest that is.
        """
        held = self._clouds.get(cloud)
        if held is None or not held.instances:
            raise ConfigError(
                f"instance {name!r}: no instance types of cloud {cloud!r} are known; expected one of "
                f"{', '.join(self._clouds)}, or a price file (cost.prices) that lists them"
            )
        machine = held.instances.get(name)
        if machine is None:
            guess = nearest(name, list(held.instances))
            hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(held.instances)}"
            raise ConfigError(
                f"instance {name!r}: not an instance type that is known of {cloud!r}; {hint} "
                "(a price file, cost.prices, can add it)"
            )
        return Instance(name, cloud, **machine.model_dump(exclude={"locations"}))

    def locations(self, cloud: str, instance: str) -> tuple[str, ...]:
        """Where an instance type has a price; `any` stands for all places that are not listed.

        Raises:
            ConfigError: it is not known.
        """
        self.instance(cloud, instance)
        return tuple(self._clouds[cloud].instances[instance].locations)

    def per_hour(self, cloud: str, location: str, instance: str, market: Market) -> Price | None:
        """USD for an hour of one machine; None: unknown in this location or market.

        Raises:
            ConfigError: the instance type itself is not known.
        """
        self.instance(cloud, instance)
        return self._first(
            (cloud, "instances", instance, "locations", place, market) for place in (location, ANY)
        )

    def egress_per_gb(self, source: Place, destination: Place) -> Price | None:
        """USD for each GB (10^9 bytes) sent from `source` to `destination`; None: unknown.

        The clouds charge who sends. A price of a location goes before that of its continent, and that before `any`.
        """
        held = self._clouds.get(source.cloud)
        if held is None:
            return None
        distance = self._distance(source, destination)
        if distance is None:
            return None
        places = [source.location, held.locations.get(source.location), ANY]
        return self._first((source.cloud, "egress", place, distance) for place in places if place)

    def storage_per_gb_month(self, cloud: str, location: str, kind: str = "standard") -> Price | None:
        """USD for keeping a GB for a month in the cloud's object store; None: unknown."""
        return self._first((cloud, "storage", kind, place) for place in (location, ANY))

    def _distance(self, source: Place, destination: Place) -> Distance | None:
        if source == destination:
            return "same_location"
        if source.cloud != destination.cloud:
            return "internet"
        continents = self._clouds[source.cloud].locations
        here, there = continents.get(source.location), continents.get(destination.location)
        if here is None or there is None:
            return None
        return "same_continent" if here == there else "other_continent"

    def _first(self, paths: Any) -> Price | None:
        """The price at the first path that any file has one at: a more exact path goes before a newer file."""
        for path in paths:
            for layer in self._layers:
                found = layer.price(*path)
                if found is not None:
                    return found
        return None


def load_prices(path: Path | None = None) -> PriceBook:
    """The prices that come with xcloud, under those of a user's file.

    Args:
        path: YAML with the schema of the files in `data/`, under the name of each cloud; None: no such file.

    Raises:
        ConfigError: the file cannot be read or is wrong; names file and key.
    """
    own = _Layer("xcloud.prices.data", {name: _bundled(name) for name in CLOUDS})
    return PriceBook([own] if path is None else [_user_layer(path), own])


def _bundled(name: str) -> dict[str, Any]:
    text = (resources.files("xcloud.prices") / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    held: dict[str, Any] = yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    return held


def _user_layer(path: Path) -> _Layer:
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such price file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: expected a mapping from clouds to their prices")
    clouds = {}
    for name, held in raw.items():
        if not isinstance(held, dict):
            raise ConfigError(f"{path}: {name}: expected a mapping with as_of, instances, egress or storage")
        if not isinstance(held.get("as_of"), dt.date):
            raise ConfigError(f"{path}: {name}.as_of: expected the day that these prices are of: 2026-01-31")
        clouds[str(name)] = {"source": str(path), **held}
    return _Layer(str(path), clouds)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse(raw: Any, cloud: str, origin: str, mine: Mapping[str, Any] | None) -> _Cloud:
    """A cloud's merged prices, checked. Wrong keys are of `origin`: what comes along is tested to be whole."""
    try:
        return _Cloud.model_validate(raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            at = [str(part) for part in problem["loc"] if part != "[key]"]
            message = str(problem["msg"]).removeprefix("Value error, ")
            if problem["type"] == "missing":
                message = "required key is missing"
            elif problem["type"] == "extra_forbidden":
                known = _Machine if at[0] == "instances" and len(at) == 3 else _Cloud
                guess = nearest(at[-1], list(known.model_fields))
                message = "unknown key; " + (
                    f"did you mean {guess!r}?" if guess else "known keys: " + ", ".join(known.model_fields)
                )
            elif problem["type"] != "value_error" and not isinstance(problem["input"], dict):
                message += f", got {problem['input']!r}"
            if mine is not None and problem["type"] == "missing" and len(at) == 3 and at[0] == "instances":
                message += " (this instance type does not come with xcloud, so all of it is asked for)"
            lines.append(f"{'.'.join([cloud, *at])}: {message}")
        raise ConfigError(
            f"{origin}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])
        ) from None

"""What may be launched, and what instead: node types, caps, budgets, back-off and fallback. Pure; the clock is given.

A launch is tried with the node type that Ray asked for, then with the types that its `_fallback` names, cheapest
first. A substitute has to serve what waits: a bundle that the asked type would hold counts only if the substitute
holds it too, labels included, so a job that pins its market or its region never pays for a node that it cannot use.
What failed is left alone for a while that doubles, because Ray asks again every few seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Backoff",
    "Bundle",
    "CloudLimits",
    "NodeType",
    "Room",
    "Selector",
    "Usage",
    "matches",
    "parse_selector",
    "served_instead",
    "substitutes",
]

IMPLICIT = ("node:", "object_store_memory")
"""Resources that a node has whatever its type says."""


Selector = tuple[tuple[str, bool, frozenset[str]], ...]
"""Conditions on labels: (label, allowed, values). Its value is one of them or, where not allowed, none of them."""


def parse_selector(labels: Mapping[str, str]) -> Selector:
    """A selector as people write it for Ray: `v`, `!v`, `in(a,b)` or `!in(a,b)` for each label."""
    out = []
    for key, text in labels.items():
        allowed, rest = not text.startswith("!"), text.removeprefix("!").strip()
        many = rest.startswith("in(") and rest.endswith(")")
        values = rest[3:-1].split(",") if many else [rest]
        out.append((key, allowed, frozenset(value.strip() for value in values)))
    return tuple(out)


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that the selector selects."""
    return all((labels.get(key) in values) is allowed for key, allowed, values in selector)


@dataclass(frozen=True)
class NodeType:
    """One of a cluster file's node types.

    Attributes:
        cloud: whose machines they are.
        max_workers: most nodes of this type at once.
        usd_per_hour: of one node; None: unknown.
        fallback: types to launch when this one cannot be had.
    """

    name: str
    cloud: str
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    max_workers: int = 0
    usd_per_hour: float | None = None
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Resources that somebody waits for on one node.

    Attributes:
        selectors: alternatives; none: any node.
        count: how many such bundles wait.
    """

    resources: Mapping[str, float]
    selectors: tuple[Selector, ...] = ()
    count: int = 1

    def fits(self, node: NodeType) -> bool:
        """Whether an empty node of this type holds the bundle."""
        enough = all(
            node.resources.get(name, 0.0) >= amount
            for name, amount in self.resources.items()
            if not name.startswith(IMPLICIT)
        )
        return enough and (not self.selectors or any(matches(one, node.labels) for one in self.selectors))


def substitutes(asked: NodeType, types: Mapping[str, NodeType]) -> list[NodeType]:
    """The fallbacks of a type, cheapest first; those without a price last, in the order given."""
    named = [types[name] for name in asked.fallback]
    return sorted(named, key=lambda one: math.inf if one.usd_per_hour is None else one.usd_per_hour)


def served_instead(waiting: Sequence[Bundle], asked: NodeType, other: NodeType) -> int:
    """How many of the bundles that wait for a type would be held by another one, too."""
    return sum(bundle.count for bundle in waiting if bundle.fits(asked) and bundle.fits(other))


@dataclass(frozen=True)
class CloudLimits:
    """What a cloud may be used for.

    Attributes:
        max_workers: most workers at once; None: no limit of its own.
        budget_usd_per_hour: most that its nodes, the head included, may cost; None: no limit.
    """

    max_workers: int | None = None
    budget_usd_per_hour: float | None = None


@dataclass(frozen=True)
class Usage:
    """Nodes of one cloud that are there or on their way, by node type; the head is told apart."""

    workers: Mapping[str, int]
    head: str | None = None

    def usd_per_hour(self, types: Mapping[str, NodeType]) -> float:
        """What they cost, as far as prices are known."""
        names = [name for name, count in self.workers.items() for _ in range(count)]
        prices = (types[n].usd_per_hour for n in [*names, *([self.head] if self.head else [])] if n in types)
        return sum(price for price in prices if price is not None)


@dataclass(frozen=True)
class Room:
    """How many nodes of a type may be launched now, and what limits them."""

    nodes: int
    limit: str = ""

    @classmethod
    def of(
        cls, asked: NodeType, count: int, usage: Usage, limits: CloudLimits, types: Mapping[str, NodeType]
    ) -> Room:
        """Room for up to `count` nodes of a type."""
        best = cls(count)
        workers = sum(usage.workers.values())
        if limits.max_workers is not None and limits.max_workers - workers < best.nodes:
            best = cls(max(0, limits.max_workers - workers), f"max_workers {limits.max_workers} of the cloud")
        of_type = asked.max_workers - usage.workers.get(asked.name, 0)
        if of_type < best.nodes:
            best = cls(max(0, of_type), f"max_workers {asked.max_workers} of the node type")
        budget = limits.budget_usd_per_hour
        if budget is not None and asked.usd_per_hour:  # a type without a price was refused with the file
            spent = usage.usd_per_hour(types)
            affordable = max(0, math.floor((budget - spent) / asked.usd_per_hour + 1e-9))
            if affordable < best.nodes:
                best = cls(
                    affordable,
                    f"budget_usd_per_hour {budget:g} of the cloud: its nodes cost {spent:g}, one more {asked.usd_per_hour:g}",
                )
        return best


@dataclass
class Backoff:
    """When something that failed may be tried again: after `first_s`, then twice as long each time, up to `most_s`."""

    first_s: float
    most_s: float
    failures: int = 0
    reason: str = ""
    until: float = -math.inf

    def fail(self, reason: str, now: float) -> float:
        """Note a failure; returns the seconds until the next try."""
        wait = min(self.most_s, self.first_s * 2.0 ** min(self.failures, 60))
        self.failures, self.reason, self.until = self.failures + 1, reason, now + wait
        return wait

    def succeed(self) -> None:
        """Forget all failures."""
        self.failures, self.reason, self.until = 0, "", -math.inf

    def closed(self, now: float) -> bool:
        """Whether it is too early to try again."""
        return now < self.until

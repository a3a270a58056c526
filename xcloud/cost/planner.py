"""Compares a job with what else it could be, and picks the best that stays within a limit.

An axis is one question (how many inner steps, which codec, who aggregates, ...), a choice one answer: what it does to the
scenario, and the `--set` that makes it so. The planner tries each choice by itself, for people to see what it does, and all
combinations for the best. It cannot know what a choice does to the loss: `learning` marks those that change what is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xcloud.cost.bill import EgressPrice
from xcloud.cost.model import Change, Forecast, Scenario, predict

__all__ = ["Axis", "Candidate", "Choice", "Limit", "alone", "best", "ranked"]

WORTH = 0.005
"""By what share a combination must be better than one with fewer changes."""


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        label: for people.
        sets: what to pass to `--set`.
        change: to the scenario.
        learning: whether other weights come out of it.
        by_hand: what no `--set` does, and the user has to do besides; empty: nothing.
    """

    label: str
    sets: tuple[str, ...]
    change: Change
    learning: bool = False
    by_hand: str = ""


@dataclass(frozen=True)
class Axis:
    """One question and its answers, beside the job's own."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Candidate:
    """A job with some choices made, and what it takes."""

    choices: tuple[Choice, ...]
    forecast: Forecast

    @property
    def label(self) -> str:
        return ", ".join(choice.label for choice in self.choices) or "as it is"

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(one for choice in self.choices for one in choice.sets)

    @property
    def by_hand(self) -> tuple[str, ...]:
        return tuple(choice.by_hand for choice in self.choices if choice.by_hand)

    @property
    def learning(self) -> bool:
        return any(choice.learning for choice in self.choices)


@dataclass(frozen=True)
class Limit:
    """What the job may take. With a budget the fastest is best, with a time or nothing the cheapest; the fastest, too, where not
    everything has a price."""

    usd: float | None = None
    seconds: float | None = None

    def allows(self, forecast: Forecast) -> bool:
        """Whether it stays within; what has no price does not stay within a budget."""
        if self.usd is not None and (forecast.unpriced or forecast.usd > self.usd):
            return False
        return self.seconds is None or forecast.seconds <= self.seconds


def alone(scenario: Scenario, axes: Sequence[Axis], price: EgressPrice) -> list[tuple[Axis, Candidate]]:
    """Each choice by itself."""
    return [
        (axis, Candidate((choice,), predict(choice.change(scenario), price)))
        for axis in axes
        for choice in axis.choices
    ]


def ranked(scenario: Scenario, axes: Sequence[Axis], price: EgressPrice, limit: Limit) -> Iterator[Candidate]:
    """All combinations that stay within the limit, the job as it is included, the best first.

    Among those that are hardly different, the one with the fewest changes comes first.
    """
    usual = predict(scenario, price)
    # Dollars say which is cheaper only where all of them are known.
    by_time = limit.usd is not None or bool(usual.unpriced) or not usual.usd

    def aim(candidate: Candidate) -> float:
        return candidate.forecast.seconds if by_time else candidate.forecast.usd

    found = []
    for picked in itertools.product(*((None, *axis.choices) for axis in axes)):
        choices = tuple(choice for choice in picked if choice is not None)
        changed = scenario
        for choice in choices:
            changed = choice.change(changed)
        candidate = Candidate(choices, predict(changed, price))
        if limit.allows(candidate.forecast) and not set(candidate.forecast.unpriced) - set(usual.unpriced):
            found.append(candidate)
    found.sort(key=lambda one: (aim(one), len(one.choices)))
    while found:
        enough = aim(found[0]) * (1 + WORTH)
        close = [one for one in found if aim(one) <= enough]
        first = min(close, key=lambda one: len(one.choices))  # the best of those, since the list is in order
        found.remove(first)
        yield first


def best(
    scenario: Scenario,
    axes: Sequence[Axis],
    price: EgressPrice,
    limit: Limit,
    valid: Callable[[Candidate], bool] = lambda _: True,
) -> Candidate | None:
    """The best combination within the limit that is a valid job; None: there is none.

    Args:
        scenario: the job as it is.
        axes: what may be changed. Later axes see what earlier ones have made of the scenario.
        price: USD for a GB on a way; None: unknown.
        limit: what it may take.
        valid: whether the job file allows a combination; asked of the best first.
    """
    return next((one for one in ranked(scenario, axes, price, limit) if valid(one)), None)

"""Failure policy: what to do with a round in which regions are missing.

A policy only decides; the driver acts. Below quorum nothing is committed: the round is
tried again (survivors offer the same update, lost regions come back and redo theirs),
skipped (nobody's update counts and the data is read again) or the run is aborted with the
last committed round intact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from xcloud.registry import PartConfig

__all__ = ["Action", "Decision", "FailureConfig", "decide"]


class Action(str, Enum):
    """What the driver does next with a round."""

    MERGE = "merge"
    RETRY = "retry"
    SKIP = "skip"
    ABORT = "abort"


@dataclass(frozen=True)
class Decision:
    """An action and, for people, its reason."""

    action: Action
    reason: str


class FailureConfig(PartConfig):
    """When a round counts, and what happens when it does not.

    Attributes:
        quorum: regions that must contribute to a round; null means all of them.
        deadline_s: seconds after which a round stops waiting for late regions (to train, to apply, to save); null waits.
        below_quorum: what to do when fewer than `quorum` regions answered.
        max_retries: attempts after the first at one round before the run is aborted.
        max_restarts: restarts of one region in a row, without a finished round, before it counts as lost for good.
    """

    quorum: Annotated[int, Field(ge=1)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    below_quorum: Literal["retry", "skip", "abort"] = "retry"
    max_retries: Annotated[int, Field(ge=0)] = 3
    max_restarts: Annotated[int, Field(ge=0)] = 5


def decide(config: FailureConfig, regions: int, answered: Collection[str], attempt: int) -> Decision:
    """Decide on a round from the regions that answered.

    Args:
        config: the job's failure policy.
        regions: regions in the job.
        answered: names of those with a complete update.
        attempt: this attempt's number, from 1.
    """
    quorum = regions if config.quorum is None else config.quorum
    got = f"{len(answered)} of {regions} regions answered, quorum is {quorum}"
    if len(answered) >= quorum:
        return Decision(Action.MERGE, got)
    if config.below_quorum == "retry" and attempt > config.max_retries:
        return Decision(Action.ABORT, f"{got}, after {attempt} attempts")
    return Decision(Action(config.below_quorum), got)

"""Policies: when a round counts, what of the model it merges, and how long it waits for whom.

A policy only decides; the driver acts. Below quorum nothing is committed: the round is
tried again (survivors offer the same update, lost regions come back and redo theirs),
skipped (nobody's update counts and the data is read again) or the run is aborted with the
last committed round intact.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from xcloud.registry import PartConfig

__all__ = [
    "Action",
    "BufferConfig",
    "Decision",
    "FailureConfig",
    "GuardConfig",
    "StreamingConfig",
    "decide",
    "suspicion",
]


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


class StreamingConfig(PartConfig):
    """Merge a part of the model at a time, while training goes on (Streaming DiLoCo, arXiv 2501.18512).

    Attributes:
        fragments: parts of the model, of every so-many-th layer each. A round merges one of them, in turn.
        overlap: inner steps of the next round before a merged update is taken up; 0: regions wait for it.
        alpha: share of the local weights that stays when it is; null: 0.5 with overlap, else 0.
    """

    fragments: Annotated[int, Field(ge=1, le=256)] = 1
    overlap: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(ge=0, lt=1)] | None = None

    @property
    def mix(self) -> float:
        """Share of the local weights that stays."""
        return (0.5 if self.overlap else 0.0) if self.alpha is None else self.alpha

    @property
    def keeps_local(self) -> bool:
        """Whether a region's model differs from the anchor between two rounds."""
        return self.fragments > 1 or self.overlap > 0 or self.mix > 0


class BufferConfig(PartConfig):
    """Merge as soon as some regions have answered; nobody waits for the slowest.

    A region whose update is merged goes on from the newest model; one that is still at work is let finish, and
    its update counts in a later merge, by less the older the model that it started from (FedBuff, arXiv
    2106.06639; quorum and grace window as in Decoupled DiLoCo, arXiv 2604.21428).

    Attributes:
        goal: updates that a merge waits for.
        grace_s: seconds that it waits for more once it has them.
        power: an update counts by `(1 + staleness) ** -power`; staleness is the number of merges since its start.
        max_staleness: a region that falls further behind is late: its update is dropped and it starts anew.
    """

    goal: Annotated[int, Field(ge=1)] = 1
    grace_s: Annotated[float, Field(ge=0)] = 0.0
    power: Annotated[float, Field(ge=0)] = 0.5
    max_staleness: Annotated[int, Field(ge=1)] = 16

    def factor(self, staleness: int) -> float:
        """What an update of this staleness counts."""
        return float((1 + staleness) ** -self.power)


class GuardConfig(PartConfig):
    """When a merged update is taken back: the regions load the last commit, and the round does not count.

    A region can add anything to a sum, and where updates are masked nobody sees who did. What can be seen is the
    sum: how long it is, and what it does to the held-out loss.

    Attributes:
        norm: an update may be so many times as long as the median of those before it; null: any length.
        loss: the median region's held-out loss may rise by so much, relative to the round before; null: by anything.
        window: updates that the median is of.
        patience: rounds in a row that are taken back before the run ends.
    """

    norm: Annotated[float, Field(gt=1)] | None = None
    loss: Annotated[float, Field(gt=0)] | None = None
    window: Annotated[int, Field(ge=1)] = 8
    patience: Annotated[int, Field(ge=1)] = 3


def suspicion(
    config: GuardConfig, norms: Sequence[float], norm: float, before: Sequence[float], after: Sequence[float]
) -> str | None:
    """Why a merged update should be taken back; None: nothing speaks against it.

    Args:
        config: the job's guards.
        norms: L2 norms of the updates before, newest last.
        norm: of this one.
        before: held-out losses of some regions before it, in some order.
        after: the same regions' after it, in the same order.
    """
    if config.norm is not None and norms:
        usual = statistics.median(norms[-config.window :])
        if not norm <= config.norm * usual:
            return f"the merged update is {norm:.3g} long, {norm / usual:.1f} times the usual {usual:.3g}"
    if config.loss is not None and before:
        rise = statistics.median(
            a / b - 1 if math.isfinite(a) else math.inf for a, b in zip(after, before, strict=True)
        )
        if not rise <= config.loss:
            return f"the held-out loss of the median region would rise by {rise:.1%}"
    return None


def decide(
    config: FailureConfig, regions: int, quorum: int, answered: Collection[str], attempt: int
) -> Decision:
    """Decide on a round from the regions that answered.

    Args:
        config: the job's failure policy.
        regions: regions in the job.
        quorum: regions that the round cannot do without.
        answered: names of those with a complete update.
        attempt: this attempt's number, from 1.
    """
    got = f"{len(answered)} of {regions} regions answered, quorum is {quorum}"
    if len(answered) >= quorum:
        return Decision(Action.MERGE, got)
    if config.below_quorum == "retry" and attempt > config.max_retries:
        return Decision(Action.ABORT, f"{got}, after {attempt} attempts")
    return Decision(Action(config.below_quorum), got)

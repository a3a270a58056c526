"""The failure policy's table: what happens to a round, given who answered."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.strategies import quick
from xcloud.policies import Action, FailureConfig, GuardConfig, decide, suspicion


@pytest.mark.parametrize(
    ("settings", "answered", "attempt", "action"),
    [
        # quorum null: all of them
        ({}, "abc", 1, Action.MERGE),
        ({}, "ab", 1, Action.RETRY),
        ({}, "", 1, Action.RETRY),
        # quorum reached: merge, whatever the policy and however often it was tried
        ({"quorum": 2}, "ab", 1, Action.MERGE),
        ({"quorum": 2}, "abc", 1, Action.MERGE),
        ({"quorum": 1}, "c", 9, Action.MERGE),
        ({"quorum": 2, "below_quorum": "abort"}, "ab", 1, Action.MERGE),
        ({"quorum": 2, "below_quorum": "skip"}, "ab", 4, Action.MERGE),
        # below quorum: as the policy says
        ({"quorum": 2}, "a", 1, Action.RETRY),
        ({"quorum": 2, "below_quorum": "skip"}, "a", 1, Action.SKIP),
        ({"quorum": 2, "below_quorum": "abort"}, "a", 1, Action.ABORT),
        ({"quorum": 1, "below_quorum": "abort"}, "", 1, Action.ABORT),
        # retries are counted; skipping is not retrying
        ({"max_retries": 3}, "a", 3, Action.RETRY),
        ({"max_retries": 3}, "a", 4, Action.ABORT),
        ({"max_retries": 0}, "a", 1, Action.ABORT),
        ({"max_retries": 0, "below_quorum": "skip"}, "a", 1, Action.SKIP),
    ],
)
def test_decide(settings: dict[str, Any], answered: str, attempt: int, action: Action) -> None:
    quorum = settings.get("quorum", 3)
    decision = decide(FailureConfig(**settings), 3, quorum, list(answered), attempt)
    assert decision.action is action
    assert decision.reason.startswith(f"{len(answered)} of 3 regions answered, quorum is {quorum}")


def test_an_abort_after_retries_says_how_many() -> None:
    assert decide(FailureConfig(max_retries=2), 3, 3, "ab", 3).reason.endswith(", after 3 attempts")


@quick
@given(
    quorum=st.none() | st.integers(1, 6),
    below=st.sampled_from(["retry", "skip", "abort"]),
    retries=st.integers(0, 4),
    regions=st.integers(1, 6),
    answered=st.integers(0, 6),
    attempt=st.integers(1, 6),
)
def test_only_a_quorum_is_merged_and_retries_end(
    quorum: int | None, below: Any, retries: int, regions: int, answered: int, attempt: int
) -> None:
    config = FailureConfig(quorum=quorum, below_quorum=below, max_retries=retries)
    names = [str(i) for i in range(min(answered, regions))]
    action = decide(config, regions, quorum or regions, names, attempt).action
    assert (action is Action.MERGE) == (len(names) >= (quorum or regions))
    if action is Action.RETRY:
        assert attempt <= retries


@pytest.mark.parametrize(
    "wrong",
    [
        {"quorum": 0},
        {"deadline_s": 0},
        {"below_quorum": "wait"},
        {"max_retries": -1},
        {"max_restarts": -1},
        {"retries": 1},
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        FailureConfig(**wrong)


# -- guards -------------------------------------------------------------------------------


def test_an_update_far_longer_than_usual_is_suspicious() -> None:
    config = GuardConfig(norm=3, window=3)
    assert suspicion(config, [], 1e9, [], []) is None  # nothing to compare it with yet
    assert suspicion(config, [9, 1, 1.1, 0.9], 3.0, [], []) is None
    said = suspicion(config, [9, 1, 1.1, 0.9], 3.2, [], [])
    assert said == "the merged update is 3.2 long, 3.2 times the usual 1"
    assert suspicion(config, [1], math.nan, [], []) is not None


def test_a_loss_that_rises_in_the_median_region_is_suspicious() -> None:
    config = GuardConfig(loss=0.1)
    assert suspicion(config, [1], 99, [2, 2, 2], [2, 2.19, 9]) is None  # one region may say what it likes
    said = suspicion(config, [1], 99, [2, 2, 2], [2, 2.3, 9])
    assert said == "the held-out loss of the median region would rise by 15.0%"
    assert suspicion(config, [1], 99, [2, 2, 2], [math.nan, math.nan, 2]) is not None


def test_guards_that_are_not_set_suspect_nothing() -> None:
    assert suspicion(GuardConfig(), [1], 1e9, [1], [1e9]) is None

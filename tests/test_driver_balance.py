"""The round loop where regions take the steps that their speed allows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import TOKENS_PER_SEQUENCE, Fault
from tests.test_driver import PER_STEP, Game, job_of
from xcloud.errors import ConfigError
from xcloud.messages import RoundPlan
from xcloud.region import share_of

STEPS = 40
SPEED = {"a": 0.1, "b": 0.1, "c": 0.4}
"""Seconds for a step."""


def played(folder: Path, mode: Any, rounds: int = 4) -> Game:
    game = Game(
        folder, balance=mode, inner={"steps": STEPS}, rounds=rounds, sequence_length=TOKENS_PER_SEQUENCE
    )
    game.world.step_s = dict(SPEED)
    assert game.play().finished
    return game


def steps_of(game: Game, round: int) -> dict[str, int]:
    return {
        name: (end - first) // PER_STEP[name]
        for name, number, first, end in game.world.trained
        if number == round
    }


@pytest.mark.parametrize("mode", ["dynamic", "proportional", {"regions": "dynamic"}])
def test_regions_finish_together_from_the_second_round_on(tmp_path: Path, mode: Any) -> None:
    game = played(tmp_path, mode)
    assert steps_of(game, 1) == dict.fromkeys(PER_STEP, STEPS)
    for number in (2, 3, 4):
        seconds = [taken * SPEED[name] for name, taken in steps_of(game, number).items()]
        assert max(seconds) - min(seconds) <= max(SPEED.values())
        assert abs(game.rows[number].tokens - game.rows[1].tokens) <= TOKENS_PER_SEQUENCE * sum(
            PER_STEP.values()
        )


@pytest.mark.parametrize("mode", ["fixed", {"pools": "dynamic"}])
def test_equal_steps_otherwise(tmp_path: Path, mode: Any) -> None:
    game = played(tmp_path, mode)
    assert all(steps_of(game, number) == dict.fromkeys(PER_STEP, STEPS) for number in (1, 2, 3, 4))


def test_dynamic_steps_follow_and_proportional_ones_stay(tmp_path: Path) -> None:
    """From the third round on, another region is the slow one."""
    found = {}
    for mode in ("dynamic", "proportional"):
        game = Game(
            tmp_path / mode,
            balance=mode,
            inner={"steps": STEPS},
            rounds=8,
            sequence_length=TOKENS_PER_SEQUENCE,
        )
        game.world.step_s = dict(SPEED)
        turned = {"a": 0.4, "b": 0.1, "c": 0.1}
        game.on("round_started", partial(game.world.step_s.update, turned), 3)
        assert game.play().finished
        found[mode] = steps_of(game, 8)
    assert found["dynamic"]["a"] < found["dynamic"]["c"] / 3
    assert found["proportional"]["a"] > 3 * found["proportional"]["c"]


def test_a_region_that_was_away_takes_steps_by_what_is_known_of_it(tmp_path: Path) -> None:
    game = Game(
        tmp_path,
        Fault("b", "run", 3),
        balance="dynamic",
        inner={"steps": STEPS},
        sequence_length=TOKENS_PER_SEQUENCE,
    )
    game.world.step_s = dict(SPEED)
    assert game.play().finished
    assert steps_of(game, 4)["b"] == steps_of(game, 2)["b"]


def plan(**steps: int) -> RoundPlan:
    return RoundPlan(
        job="j", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=STEPS, steps=steps
    )


def test_sums_weigh_by_the_tokens_of_the_plan() -> None:
    """What a region multiplies its update by follows its steps, so that a sum divided by all shares is the mean by tokens."""
    job = job_of(codec={"type": "fixed", "bits": 8})
    assert share_of(job, "c", plan()) == share_of(job, "c") == 1
    assert share_of(job, "a", plan()) == share_of(job, "a") == 2 / 3
    given = plan(a=30, b=10, c=10)
    tokens = {"a": 60, "b": 10, "c": 30}
    assert {name: share_of(job, name, given) for name in tokens} == {n: t / 60 for n, t in tokens.items()}


REFUSED: dict[str, dict[str, Any]] = {
    "inner.steps is 0": {"inner": {"steps": 0}},
    "scaffold": {
        "inner": {
            "steps": 2,
            "correction": "scaffold",
            "optimizer": {"type": "sgd", "lr": 0.1},
            "clip_norm": None,
        }
    },
    "nobody waits": {"buffer": {"goal": 2}},
    "masked sum": {"secure_aggregation": {}, "codec": {"type": "fixed", "bits": 8}},
    "accounted for inner.steps": {
        "dp": {"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0},
        "inner": {"steps": 2, "clip_norm": None},
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_balanced_is_refused(why: str) -> None:
    changes = REFUSED[why]
    job_of(**changes)
    with pytest.raises((ConfigError, ValueError), match=why):
        job_of(balance="dynamic", **changes)


def test_pools_may_be_balanced_under_masks() -> None:
    job_of(balance={"pools": "dynamic"}, secure_aggregation={}, codec={"type": "fixed", "bits": 8})

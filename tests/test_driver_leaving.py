"""The round loop where machines are taken away with notice: what was trained counts, and the region moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import Fault
from tests.test_driver import PER_STEP, ROUNDS, STEPS, Game


def played(
    folder: Path, *leaving: tuple[str, int], faults: tuple[Fault, ...] = (), **changes: object
) -> Game:
    game = Game(folder, *faults, **changes)
    game.world.leaving = set(leaving)
    assert game.play().finished
    return game


def read(game: Game, round: int) -> dict[str, int]:
    return {
        name: (end - first) // PER_STEP[name]
        for name, number, first, end in game.world.trained
        if number == round
    }


def test_the_round_ends_early_and_counts_and_the_region_moves(tmp_path: Path) -> None:
    game = played(tmp_path, ("b", 2))
    assert game.takers() == dict.fromkeys(range(1, ROUNDS + 1), "abc")
    assert read(game, 2) == {"a": STEPS, "b": 1, "c": STEPS}
    assert game.rounds_of("region_leaving") == [2]
    assert game.who("region_failed") == []
    assert game.rounds_of("round_retried") == []
    assert game.world.builds == {"a": 1, "b": 2, "c": 1}
    # It goes on from the round in which it left, with its own optimizer state, and reads on where it stopped.
    assert game.world.restored == [("b", 2, 2, (STEPS + 1) * PER_STEP["b"])]


def test_a_checkpoint_is_made_for_it_although_none_was_due(tmp_path: Path) -> None:
    game = played(tmp_path, ("b", 2), checkpoint={"every": 0, "keep": 10})
    assert sorted(set(game.rounds_of("checkpoint_committed"))) == [2, ROUNDS]


def test_moving_is_no_failure(tmp_path: Path) -> None:
    """However often machines go, the restarts that a job allows are for what fails."""
    leaving = [("b", number) for number in range(1, ROUNDS)]
    game = played(tmp_path, *leaving, failure={"max_restarts": 0})
    assert game.world.builds["b"] == ROUNDS
    assert game.takers() == dict.fromkeys(range(1, ROUNDS + 1), "abc")


def test_the_others_go_on_where_a_quorum_is_left(tmp_path: Path) -> None:
    game = played(
        tmp_path,
        ("b", 1),
        faults=(Fault("b", "start", None, kind="late", after=1),),
        failure={"quorum": 2},
    )
    assert game.takers()[2] == "ac"


def test_all_may_leave_at_once(tmp_path: Path) -> None:
    game = played(tmp_path, ("a", 2), ("b", 2), ("c", 2))
    assert game.world.builds == {"a": 2, "b": 2, "c": 2}
    assert game.takers() == dict.fromkeys(range(1, ROUNDS + 1), "abc")


@pytest.mark.parametrize("streaming", [{"fragments": 2}, {"overlap": 1}])
def test_leaving_while_merges_overlap(tmp_path: Path, streaming: dict[str, int]) -> None:
    """What is on its way lands before the region is ended."""
    game = played(tmp_path, ("b", 2), streaming=streaming)
    assert game.world.builds["b"] == 2
    assert game.takers()[ROUNDS] == "abc"

"""The round loop where merges overlap training, take the model a fragment at a time, or do not wait for all.

Over the fakes of `tests/fakes.py`; `tests/e2e/test_streaming.py` runs real engines and actors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import AGGREGATOR, Fault
from tests.test_driver import PER_STEP, STEPS, Game
from xcloud.errors import QuorumError

OVERLAP = {"fragments": 2, "overlap": 1, "alpha": 0.25}
ROUNDS = 8


def game_of(folder: Path, *faults: Fault, **changes: Any) -> Game:
    return Game(folder, *faults, **{"rounds": ROUNDS, "checkpoint": {"every": 0, "keep": 10}} | changes)


def order(game: Game, *kinds: str) -> list[tuple[str, int]]:
    """Rounds of some events, in the order in which they happened."""
    return [(e.kind, e.fields["round"]) for e in game.events if e.kind in kinds]


# -- fragments and overlap ----------------------------------------------------------------


def test_a_round_merges_one_fragment(tmp_path: Path) -> None:
    game = game_of(tmp_path, streaming={"fragments": 2})
    assert game.play().finished
    sizes = [row.regions["a"].bytes_up for row in game.rows.values()]
    assert sizes == [4 * 1100, 4 * 1400] * 4
    assert [row.regions["a"].bytes_down for row in game.rows.values()] == sizes


def test_merges_travel_while_the_next_round_trains(tmp_path: Path) -> None:
    game = game_of(tmp_path, streaming=OVERLAP)
    assert game.play().finished
    seen = order(game, "round_started", "round_merged")
    assert seen[:5] == [
        ("round_started", 1),
        ("round_started", 2),
        ("round_merged", 1),
        ("round_started", 3),
        ("round_merged", 2),
    ]
    assert seen[-3:] == [("round_started", ROUNDS), ("round_merged", ROUNDS - 1), ("round_merged", ROUNDS)]
    assert [row.round for row in game.rows.values()] == list(range(1, ROUNDS + 1))


def test_overlap_changes_when_a_merge_counts_and_it_still_learns(tmp_path: Path) -> None:
    at_once = game_of(tmp_path / "1", streaming={"fragments": 2})
    later = game_of(tmp_path / "2", streaming=OVERLAP)
    outcomes = [game.play() for game in (at_once, later)]
    assert at_once.record.model_digest != later.record.model_digest
    for outcome in outcomes:
        assert outcome.eval_loss_start is not None
        assert outcome.eval_loss_end is not None
        assert outcome.eval_loss_end < outcome.eval_loss_start


@pytest.mark.parametrize("streaming", [{"fragments": 2}, OVERLAP, {"overlap": 1}, {"alpha": 0.5}])
def test_a_resume_from_a_planned_checkpoint_is_exact(tmp_path: Path, streaming: dict[str, Any]) -> None:
    """Local models are in the checkpoint, beside the anchor; before one, regions wait for the merge."""
    options: dict[str, Any] = {"streaming": streaming, "checkpoint": {"every": 4, "keep": 10}}
    whole = game_of(tmp_path / "whole", **options)
    whole.play()
    parts = game_of(tmp_path / "parts", **options)
    assert parts.play(stop_after=4).rounds == 4
    parts.again()
    assert parts.play(resume=True).finished
    assert parts.record == whole.record


def test_a_region_that_dies_under_way_comes_back_and_its_round_is_played_again(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("b", "run", 4), streaming=OVERLAP)
    assert game.play().finished
    assert game.rounds_of("round_retried") == [4]
    assert game.takers() == dict.fromkeys(range(1, ROUNDS + 1), "abc")
    assert game.world.restored == [("b", 3, None, 3 * STEPS * PER_STEP["b"])]


def test_a_region_that_dies_while_it_takes_up_a_merge(tmp_path: Path) -> None:
    """Above quorum: the others go on, and it is back with what is committed by then."""
    game = game_of(tmp_path, Fault("b", "apply", 3), streaming=OVERLAP, failure={"quorum": 2})
    assert game.play().finished
    assert game.takers()[3] == "abc"
    assert game.takers()[4] == "ac"
    assert game.takers()[ROUNDS] == "abc"


def test_an_update_lost_on_the_way_is_left_out(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("b", "merge", 3), streaming=OVERLAP, failure={"quorum": 2})
    assert game.play().finished
    assert game.takers()[3] == "ac"
    assert game.takers()[ROUNDS] == "abc"


def test_a_merge_below_quorum_is_called_off_and_the_round_under_way_goes_on(tmp_path: Path) -> None:
    """Nothing is lost: what the fragment has moved by goes into its next merge."""
    game = game_of(tmp_path, Fault("b", "merge", 3), streaming=OVERLAP)
    assert game.play().finished
    assert game.rounds_of("round_skipped") == [3]
    assert sorted(game.rows) == [1, 2, 4, 5, 6, 7, 8]


def test_a_merge_below_quorum_ends_a_run_that_must_abort(tmp_path: Path) -> None:
    failure = {"below_quorum": "abort"}
    game = game_of(tmp_path, Fault("b", "merge", 3), streaming=OVERLAP, failure=failure)
    with pytest.raises(QuorumError, match="round 3: 2 of 3 regions answered"):
        game.play()


def test_a_dead_aggregator_is_replaced_under_way(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault(AGGREGATOR, "merge", 3), streaming=OVERLAP)
    assert game.play().finished
    assert game.takers() == dict.fromkeys(range(1, ROUNDS + 1), "abc")
    assert game.world.restarts == 1


# -- a merge that does not wait for all ---------------------------------------------------


def test_nobody_waits_for_a_slow_region_and_its_update_counts_later(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("c", "run", 1, "late"), buffer={"goal": 2})
    game.on("round_merged", game.release, round=3)
    assert game.play().finished
    takers = game.takers()
    assert [takers[n] for n in (1, 2, 3, 4, 5)] == ["ab", "ab", "ab", "abc", "abc"]
    assert game.rows[4].regions["c"].staleness == 3
    assert {row.regions["a"].staleness for row in game.rows.values()} == {0}
    weights = game.rows[4].regions["c"]
    assert weights.cursor == STEPS * PER_STEP["c"]  # each of its sequences was read once
    assert not game.rounds_of("region_late")
    # what it had missed came down with what it took part in
    assert game.rows[4].regions["c"].bytes_down == 4 * game.rows[4].regions["a"].bytes_down


def test_a_region_that_is_too_far_behind_starts_anew(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("c", "run", 1, "late"), buffer={"goal": 2, "max_staleness": 2})
    game.on("round_merged", game.release, round=5)
    assert game.play().finished
    assert game.rounds_of("region_late") == [3]
    assert game.world.restored[0][:2] == ("c", 5)
    assert game.takers()[ROUNDS] == "abc"


def test_a_goal_of_all_is_the_lock_step_run(tmp_path: Path) -> None:
    buffered, locked = game_of(tmp_path / "1", buffer={"goal": 3}), game_of(tmp_path / "2")
    assert buffered.play().finished
    assert locked.play().finished
    assert buffered.record.model_digest == locked.record.model_digest


def test_a_buffered_run_goes_on_without_a_region_and_takes_it_back(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("b", "run", 3), buffer={"goal": 2})
    assert game.play().finished
    assert game.takers()[3] == "ac"
    assert game.takers()[ROUNDS] == "abc"


def test_a_buffered_round_below_its_goal_is_tried_again(tmp_path: Path) -> None:
    """The one that is left offers the update that it has."""
    game = game_of(tmp_path, Fault("a", "run", 2), Fault("b", "run", 2), buffer={"goal": 2})
    assert game.play().finished
    assert 2 in game.rounds_of("round_retried")
    assert [t for t in game.world.trained if t[0] == "c" and t[1] == 2] == [
        ("c", 2, STEPS * PER_STEP["c"], 2 * STEPS * PER_STEP["c"])
    ]


def test_a_lost_update_does_not_stop_a_buffered_run(tmp_path: Path) -> None:
    game = game_of(tmp_path, Fault("b", "merge", 3), buffer={"goal": 1})
    assert game.play().finished
    assert game.takers()[ROUNDS] == "abc"


def test_a_buffered_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """A region at work has no state of that round; it goes on from what it last saved."""
    game = game_of(
        tmp_path,
        Fault("c", "run", 1, "late"),
        buffer={"goal": 2},
        checkpoint={"every": 2, "keep": 10},
    )
    game.on("round_merged", game.release, round=3)
    assert game.play(stop_after=2).rounds == 2
    assert game.record.regions["c"].inner_round is None
    game.again()
    assert game.play(resume=True).finished
    assert game.takers()[ROUNDS] == "abc"

"""What a run books as released: before it happens, once for each time that it happens, and never forgotten."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import AGGREGATOR, Fault
from tests.test_driver import PER_STEP, ROUNDS, STEPS, Game
from xcloud.errors import CheckpointError, ConfigError, PrivacyBudgetError, QuorumError
from xcloud.privacy import PrivacyLedger
from xcloud.privacy.accounting import Mechanism, epsilon_of

NOISE, DELTA = 1.0, 1e-5
INNER = {"steps": STEPS, "clip_norm": None}


def private_game(folder: Path, *faults: Fault, budget: float | None = None, **changes: Any) -> Game:
    dp = {"unit": "example", "noise_multiplier": NOISE, "delta": DELTA, "target_epsilon": budget}
    return Game(folder, *faults, inner=INNER, dp=dp, **changes)


def spent(name: str, rounds: int) -> float:
    """Epsilon of a region's examples after so many rounds: 1000 sequences, see `FakeRegion`."""
    return epsilon_of([Mechanism(PER_STEP[name] / 1000, NOISE, rounds * STEPS)], DELTA)


def booked(game: Game) -> Counter[tuple[str, int]]:
    """How often each region's round stands in the run folder's ledger."""
    ledger = PrivacyLedger.kept(game.run_dir)
    assert ledger is not None
    assert all(release.steps == STEPS for release in ledger.releases)
    return Counter((release.region, release.round) for release in ledger.releases)


def trained(game: Game) -> Counter[tuple[str, int]]:
    return Counter((name, round) for name, round, _, _ in game.world.trained)


def test_rows_tell_what_each_region_and_the_run_have_spent(tmp_path: Path) -> None:
    game = private_game(tmp_path)
    game.play()
    for number, row in game.rows.items():
        for name, region in row.regions.items():
            assert region.privacy is not None
            assert (region.privacy.unit, region.privacy.delta) == ("example", DELTA)
            assert region.privacy.epsilon == spent(name, number)
        assert row.privacy is not None
        assert row.privacy.epsilon == max(region.privacy.epsilon for region in row.regions.values())  # type: ignore[union-attr]
        assert row.privacy.epsilon == spent("c", number)
    assert (
        booked(game) == trained(game) == Counter({(n, r): 1 for n in PER_STEP for r in range(1, ROUNDS + 1)})
    )
    assert game.store.record(ROUNDS).privacy == PrivacyLedger.kept(game.run_dir)


def test_without_the_section_nothing_is_booked(tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play()
    assert PrivacyLedger.kept(game.run_dir) is None
    assert all(row.privacy is None for row in game.rows.values())


def test_it_is_on_the_disk_before_a_region_begins(tmp_path: Path) -> None:
    game, seen = private_game(tmp_path), []
    game.on("round_started", lambda: seen.append(sum(booked(game).values())))
    game.play()
    assert seen == [len(PER_STEP) * number for number in range(1, ROUNDS + 1)]


def test_an_update_that_is_offered_again_is_paid_once_and_one_trained_again_twice(tmp_path: Path) -> None:
    """Region b dies in round 2 and trains it anew; a and c offer what they have."""
    game = private_game(tmp_path, Fault("b", "run", 2))
    game.play()
    assert booked(game)["b", 2] == 2
    assert all(times == 1 for key, times in booked(game).items() if key != ("b", 2))
    assert not trained(game) - booked(game)
    last = game.rows[ROUNDS].regions
    assert last["b"].privacy is not None
    assert last["b"].privacy.epsilon == spent("b", ROUNDS + 1)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("a", "apply", 2),
        Fault("a", "merge", 2),
        Fault("c", "save", 2),
        Fault(AGGREGATOR, "merge", 3),
        Fault("b", "run", 3, times=2),
    ],
    ids=str,
)
def test_whatever_happens_nothing_is_trained_without_being_booked(tmp_path: Path, fault: Fault) -> None:
    game, times = private_game(tmp_path, fault), fault.times
    game.play()
    assert not trained(game) - booked(game)
    assert sum(booked(game).values()) <= sum(trained(game).values()) + times


def test_a_late_update_is_not_paid_twice(tmp_path: Path) -> None:
    game = private_game(tmp_path, Fault("b", "run", 2, kind="late"), failure={"deadline_s": 0.05})
    game.on("round_retried", game.release)
    game.play()
    assert booked(game) == trained(game)


def test_a_round_past_the_budget_is_not_begun(tmp_path: Path) -> None:
    """The last committed round stays, with the ledger beside it; going on with the same budget ends at once."""
    budget = (spent("c", 2) + spent("c", 3)) / 2
    game = private_game(tmp_path, budget=budget, checkpoint={"every": 0})
    message = r"region 'c': round 3 would raise epsilon per example .* past the budget .*training ends here"
    with pytest.raises(PrivacyBudgetError, match=message):
        game.play()
    assert list(game.rows) == [1, 2]
    assert max(round for _, round in trained(game)) == 2
    assert booked(game) == trained(game)
    record = game.store.latest()
    assert record is not None
    assert record.round == 2
    assert record.privacy is not None
    assert record.privacy.total == spent("c", 2) <= budget
    game.again()
    with pytest.raises(PrivacyBudgetError, match=message):
        game.play(resume=True)
    assert not game.world.trained


def test_what_was_offered_before_the_budget_ended_is_merged(tmp_path: Path) -> None:
    budget = spent("c", 2)
    game = private_game(tmp_path, budget=budget, checkpoint={"every": 0}, streaming={"overlap": 1})
    with pytest.raises(PrivacyBudgetError):
        game.play()
    assert list(game.rows) == [1, 2]
    record = game.store.latest()
    assert record is not None
    assert record.round == 2


def test_rounds_after_the_last_commit_were_released_all_the_same(tmp_path: Path) -> None:
    """Killed in round 3 with round 1 committed: rounds 2 and 3 are trained again, and paid again."""
    game = private_game(tmp_path, Fault("a", "run", 3, times=9), checkpoint={"every": 0, "keep": 10})
    with pytest.raises(QuorumError):
        game.play()
    before = booked(game)
    assert before["b", 3] == 1
    kept = game.store.latest()
    assert kept is not None
    assert kept.privacy is not None
    game.again()
    game.play(resume=True)
    after = booked(game)
    assert not trained(game) + before - after
    assert after["b", 3] == 2
    last = game.rows[ROUNDS].regions["b"].privacy
    assert last is not None
    assert last.epsilon == spent("b", ROUNDS + 1)


def test_a_lost_run_folder_does_not_lose_what_is_committed(tmp_path: Path) -> None:
    game = private_game(tmp_path)
    game.play(stop_after=2)
    (game.run_dir / "privacy.json").unlink()
    game.again()
    game.play(resume=True)
    assert sum(booked(game).values()) == ROUNDS * len(PER_STEP)


def test_another_budget_is_another_run(tmp_path: Path) -> None:
    private_game(tmp_path, budget=50.0).play(stop_after=1)
    with pytest.raises(CheckpointError, match=r"booked per example at delta 1e-05 with target_epsilon 50.0"):
        private_game(tmp_path, budget=60.0).play(resume=True)


def test_regions_with_the_same_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game = private_game(tmp_path)
    ready = game.world.build("a")._ready.__func__  # type: ignore[attr-defined]
    game.again()
    monkeypatch.setattr(
        "tests.fakes.FakeRegion._ready",
        lambda self, evaluate: ready(self, evaluate).model_copy(update={"data_fingerprint": "the same"}),
    )
    with pytest.raises(ConfigError, match="dp: regions 'a' and 'b' hold the same data"):
        game.play()

"""A run with a budget: it ends before the round that would exceed it, with a checkpoint, and goes on with a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import Fault
from tests.test_driver import PER_STEP, ROUNDS, Game
from xcloud.billing import Biller
from xcloud.cost.bill import Spent
from xcloud.ledger import check_job, keep_job
from xcloud.metrics import read_events, run_state

HOURLY = 0.2016
"""USD of an m7i.xlarge in us-east-1."""
ROUND_USD = 3 * HOURLY


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def hour(self) -> None:
        self.now += 3600


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The ledger's clock; a round takes an hour."""
    made = Clock()
    monkeypatch.setattr("xcloud.ledger.Biller", lambda job, folder: Biller(job, folder, made))
    return made


def billed_game(folder: Path, clock: Clock, *faults: Fault, budget: float | None = None) -> Game:
    source = {"type": "stdlib", "kind": "modules"}
    regions = [
        {
            "name": name,
            "cloud": "aws",
            "location": "us-east-1",
            "data": source,
            "pools": [{"micro_batch": size, "instance": "m7i.xlarge"}],
        }
        for name, size in PER_STEP.items()
    ]
    game = Game(folder, *faults, regions=regions, cost={"budget_usd": budget})
    keep_job(game.job, game.run_dir)
    return game.on("round_started", clock.hour)


def raised(game: Game, budget: float) -> None:
    changed = game.job.model_copy(update={"cost": game.job.cost.model_copy(update={"budget_usd": budget})})  # type: ignore[union-attr]
    check_job(changed, game.run_dir)  # a resumed run may have another budget
    game.job = changed
    game.again()


def test_rows_add_up_to_what_the_run_has_cost(tmp_path: Path, clock: Clock) -> None:
    game = billed_game(tmp_path, clock)
    assert game.play().finished
    costs = [row.cost for row in game.rows.values()]
    assert [cost.usd for cost in costs if cost] == pytest.approx([ROUND_USD] * ROUNDS)
    assert costs[-1] is not None
    assert costs[-1].spent_usd == pytest.approx(ROUNDS * ROUND_USD)
    assert set(costs[-1].regions) == set(PER_STEP)
    spent = Spent.kept(game.run_dir)
    assert spent is not None
    assert spent.usd == pytest.approx(ROUNDS * ROUND_USD)
    assert game.record.spent is not None
    assert game.record.spent.usd == pytest.approx(spent.usd)


def test_without_prices_nothing_is_booked(tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play()
    assert all(row.cost is None for row in game.rows.values())
    assert Spent.kept(game.run_dir) is None
    assert game.record.spent is None


def test_a_run_ends_before_the_round_that_would_exceed_its_budget(tmp_path: Path, clock: Clock) -> None:
    game = billed_game(tmp_path, clock, budget=2.5 * ROUND_USD)
    outcome = game.play()
    assert (outcome.rounds, outcome.finished, outcome.reason) == (2, False, "budget")
    assert game.record.round == 2
    state = run_state(game.run_dir)
    assert (state.state, state.reason) == ("stopped", "budget")
    assert game.record.spent is not None
    assert game.record.spent.usd == pytest.approx(2 * ROUND_USD)
    assert read_events(game.run_dir)[-1].fields["spent_usd"] <= 2.5 * ROUND_USD


def test_it_goes_on_where_it_was_with_a_larger_budget(tmp_path: Path, clock: Clock) -> None:
    whole = billed_game(tmp_path / "whole", clock)
    whole.play()
    game = billed_game(tmp_path / "cut", clock, budget=2.5 * ROUND_USD)
    game.play()
    raised(game, 3.5 * ROUND_USD)
    assert game.play(resume=True).reason == "budget"
    assert game.record.round == 3
    raised(game, 10 * ROUND_USD)
    assert game.play(resume=True).finished
    assert game.record.model_digest == whole.record.model_digest
    spent = Spent.kept(game.run_dir)
    assert spent is not None
    assert spent.usd == pytest.approx(ROUNDS * ROUND_USD)  # each hour once
    last = game.rows[ROUNDS].cost
    assert last is not None
    assert last.spent_usd == pytest.approx(ROUNDS * ROUND_USD)


def test_a_resume_with_the_same_budget_starts_no_round(tmp_path: Path, clock: Clock) -> None:
    game = billed_game(tmp_path, clock, budget=2.5 * ROUND_USD)
    game.play()
    game.again()
    assert game.play(resume=True).reason == "budget"
    assert game.world.trained == []


def test_rounds_that_are_tried_again_are_paid_again(tmp_path: Path, clock: Clock) -> None:
    game = billed_game(tmp_path, clock, Fault("b", "run", 2))
    game.play()
    costs: dict[int, Any] = {number: row.cost for number, row in game.rows.items()}
    assert costs[2].usd == pytest.approx(2 * ROUND_USD)
    assert costs[3].usd == pytest.approx(ROUND_USD)

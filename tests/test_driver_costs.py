"""A run with a budget: it ends before the round that would exceed it, with a checkpoint, and goes on with a larger one."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import AGGREGATOR, Fault
from tests.test_driver import PER_STEP, ROUNDS, Game
from xcloud.billing import Biller
from xcloud.cost.bill import Spent
from xcloud.cost.settings import CostConfig
from xcloud.errors import AggregationError, PlacementError, QuorumError
from xcloud.fleet import Fleet
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

    def hour(self, part: float = 1.0) -> None:
        self.now += 3600 * part


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The ledger's clock; a round takes an hour."""
    made = Clock()
    monkeypatch.setattr("xcloud.ledger.Biller", lambda job, folder: Biller(job, folder, made))
    return made


def billed_game(
    folder: Path,
    clock: Clock,
    *faults: Fault,
    budget: float | None = None,
    places: dict[str, str] | None = None,
    ticks: bool = True,
    **changes: Any,
) -> Game:
    source = {"type": "stdlib", "kind": "modules"}
    regions = [
        {
            "name": name,
            "cloud": "aws",
            "location": (places or {}).get(name, "us-east-1"),
            "data": source,
            "pools": [{"micro_batch": size, "instance": "m7i.xlarge"}],
        }
        for name, size in PER_STEP.items()
    ]
    game = Game(folder, *faults, regions=regions, cost={"budget_usd": budget}, **changes)
    keep_job(game.job, game.run_dir)
    return game.on("round_started", clock.hour) if ticks else game


def raised(game: Game, budget: float) -> None:
    changed = game.job.model_copy(update={"cost": game.job.cost.model_copy(update={"budget_usd": budget})})  # type: ignore[union-attr]
    check_job(changed, game.run_dir)  # a resumed run may have another budget
    game.job = changed
    game.again()


def while_waiting(
    game: Game, clock: Clock, monkeypatch: pytest.MonkeyPatch, begin: str, end: str, act: Any = lambda n: None
) -> None:
    """Let an hour pass at each look at regions that are waited for, from the event `begin` in round 2 to the event `end`;
    `act` is told how many have passed."""
    hours: list[int] = []
    going = [False]

    def look(self: Fleet) -> None:
        del self
        if going[0]:
            clock.hour()
            hours.append(1)
            act(len(hours))

    monkeypatch.setattr("xcloud.fleet.TICK_S", 0.001)
    monkeypatch.setattr(Fleet, "_poll_waiting", look)
    game.on(begin, lambda: going.__setitem__(0, True), round=2)
    game.on(end, lambda: going.__setitem__(0, False))


def booked(game: Game) -> float:
    """USD that the run folder says were spent."""
    spent = Spent.kept(game.run_dir)
    assert spent is not None
    return spent.usd


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


# -- runs that fail -----------------------------------------------------------------------


def test_a_round_that_fails_for_good_is_paid(tmp_path: Path, clock: Clock) -> None:
    failure = {"max_retries": 3, "max_restarts": 9}
    game = billed_game(tmp_path, clock, Fault("b", "run", 2, times=9), failure=failure)
    with pytest.raises(QuorumError):
        game.play()
    assert booked(game) == pytest.approx(5 * ROUND_USD)  # one round, and four attempts at the next


def test_a_run_that_fails_again_and_again_cannot_outrun_its_budget(tmp_path: Path, clock: Clock) -> None:
    failure = {"max_retries": 0, "max_restarts": 9}
    game = billed_game(tmp_path, clock, Fault("b", "run", 2), failure=failure, budget=3.5 * ROUND_USD)
    for resume in (False, True):
        with pytest.raises(QuorumError):
            game.play(resume)
        game.again(Fault("b", "run", 2))
    assert booked(game) == pytest.approx(3 * ROUND_USD)
    assert game.play(resume=True).reason == "budget"
    assert game.world.trained == []
    assert booked(game) == pytest.approx(3 * ROUND_USD)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_in_the_middle_of_a_round_is_paid(
    tmp_path: Path, clock: Clock, error: type[BaseException]
) -> None:
    game = billed_game(tmp_path, clock)

    def break_off() -> None:
        raise error

    with pytest.raises(error):
        game.on("round_started", break_off, round=2).play()
    assert booked(game) == pytest.approx(2 * ROUND_USD)


def test_machines_that_never_came_up_together_are_paid(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = billed_game(tmp_path, clock)
    game.play(stop_after=1)
    (game.run_dir / "cost.json").unlink()  # the commit says it, too

    def nowhere(self: Fleet, evaluate: bool) -> Any:
        clock.hour()
        raise PlacementError("pool 0: not there")

    monkeypatch.setattr(Fleet, "start", nowhere)
    game.again()
    with pytest.raises(PlacementError):
        game.play(resume=True)
    assert booked(game) == pytest.approx(2 * ROUND_USD)


def test_who_is_killed_without_warning_leaves_what_was_spent(tmp_path: Path, clock: Clock) -> None:
    """At each attempt, what the attempts before have cost is in the run folder."""
    game = billed_game(tmp_path, clock, Fault("b", "run", 2, times=2))
    found: list[float] = []
    game.on("round_retried", lambda: found.append(booked(game)), round=2)
    game.play()
    assert found == pytest.approx([2 * ROUND_USD, 3 * ROUND_USD])


# -- a budget that is spent while a round is under way --------------------------------------


def test_no_attempt_is_begun_that_the_budget_may_not_pay(tmp_path: Path, clock: Clock) -> None:
    failure = {"max_retries": 8, "max_restarts": 20}
    fault = Fault("b", "run", 2, times=20)
    game = billed_game(tmp_path, clock, fault, failure=failure, budget=3.01 * ROUND_USD)
    outcome = game.play()
    assert (outcome.rounds, outcome.reason) == (1, "budget")
    assert booked(game) == pytest.approx(3 * ROUND_USD)
    assert game.record.round == 1


def test_a_region_that_does_not_come_back_is_not_waited_for_beyond_the_budget(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spot capacity that is not there: its start never answers, and the others' machines are paid meanwhile."""
    waits = (Fault("b", "run", 2), Fault("b", "start", kind="late", after=1))
    game = billed_game(tmp_path, clock, *waits, budget=10.5 * ROUND_USD, checkpoint={"every": 0})
    while_waiting(game, clock, monkeypatch, "round_retried", "region_rejoined")
    outcome = game.play()
    assert (outcome.rounds, outcome.reason) == (1, "budget")
    assert game.record.round == 1  # the end saves what the run did not
    assert booked(game) == pytest.approx(10 * ROUND_USD)


@pytest.mark.parametrize("policy", ["retry", "skip", "abort"])
def test_a_region_that_hangs_ends_the_run_when_the_budget_is_spent(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Without a deadline it would be waited for, and paid for, without end; whatever the failure policy says."""
    fault = Fault("b", "run", 2, kind="late")
    game = billed_game(
        tmp_path,
        clock,
        fault,
        budget=5.5 * ROUND_USD,
        failure={"below_quorum": policy},
        checkpoint={"every": 0},
    )

    while_waiting(game, clock, monkeypatch, "round_started", "region_late")
    outcome = game.play()
    assert (outcome.rounds, outcome.reason) == (1, "budget")
    assert game.record.round == 1
    assert booked(game) == pytest.approx(6 * ROUND_USD)  # seen at the next look


def test_updates_that_have_arrived_are_merged_though_the_budget_is_spent(
    tmp_path: Path, clock: Clock
) -> None:
    """Who answers last has overdrawn it; all there is to do with what was paid is to keep it."""
    game = billed_game(tmp_path, clock, budget=0.5 * ROUND_USD)
    outcome = game.play()
    assert (outcome.rounds, outcome.reason) == (1, "budget")
    assert booked(game) == pytest.approx(ROUND_USD)


@pytest.mark.parametrize(("budget", "rounds"), [(1.5, 1), (2.5, 2), (3.5, 3)])
def test_a_round_that_is_still_to_be_merged_counts(
    tmp_path: Path, clock: Clock, budget: float, rounds: int
) -> None:
    """With overlap as without it: what is trained counts, whether it is merged or not."""
    game = billed_game(
        tmp_path,
        clock,
        budget=budget * ROUND_USD,
        ticks=False,
        streaming={"overlap": 1},
        checkpoint={"every": 0},
    )
    game.on("region_finished", lambda: clock.hour(1 / len(PER_STEP)))
    outcome = game.play()
    assert (outcome.rounds, outcome.reason) == (rounds, "budget")
    assert booked(game) == pytest.approx(rounds * ROUND_USD)


def test_an_update_on_its_way_counts_by_its_traffic(tmp_path: Path, clock: Clock) -> None:
    """No time passes, so that machines cost nothing here, and what `c` sends and takes all of a round: 10,000 bytes each way."""
    gb = {"us-east-1": {"same_continent": 1e9 / 20_000}, "us-west-2": {"same_continent": 1e9 / 20_000}}
    prices = tmp_path / "prices.yaml"
    prices.write_text(yaml.safe_dump({"aws": {"as_of": dt.date(2026, 1, 1), "egress": gb}}))
    cost = {"prices": str(prices), "budget_usd": 1.5}
    found = []
    for name, streaming in (("plain", {}), ("overlap", {"overlap": 1})):
        game = billed_game(
            tmp_path / name,
            clock,
            places={"c": "us-west-2"},
            ticks=False,
            streaming=streaming,
            checkpoint={"every": 0},
        )
        game.job = game.job.model_copy(update={"cost": CostConfig.model_validate(cost)})
        game.again()
        found.append((game.play().rounds, pytest.approx(booked(game))))
    assert found == [(1, 1.0), (1, 1.0)]


# -- what belongs to no round ---------------------------------------------------------------


def test_traffic_of_a_round_that_was_taken_back_is_paid(tmp_path: Path, clock: Clock) -> None:
    places = {"c": "us-west-2"}
    plain = billed_game(tmp_path / "plain", clock, places=places, guards={"norm": 3})
    plain.play()
    poison = Fault(AGGREGATOR, "merge", 2, kind="poison")
    game = billed_game(tmp_path / "poison", clock, poison, places=places, guards={"norm": 3})
    game.play()
    assert game.rounds_of("round_rejected") == [2]
    whole, cut = Spent.kept(plain.run_dir), Spent.kept(game.run_dir)
    assert whole is not None
    assert cut is not None
    assert cut.egress_bytes == whole.egress_bytes
    costs = [row.cost for row in game.rows.values() if row.cost]
    assert sum(sum(cost.egress.values()) for cost in costs) == cut.egress_bytes  # rows still add up
    assert costs[-1].spent_usd == pytest.approx(cut.usd)
    assert cut.recent == pytest.approx(whole.recent)


def test_traffic_of_the_round_that_ends_the_run_is_paid(tmp_path: Path, clock: Clock) -> None:
    poison = Fault(AGGREGATOR, "merge", kind="poison", times=9, after=1)
    guards = {"patience": 1, "norm": 3}
    game = billed_game(tmp_path, clock, poison, places={"c": "us-west-2"}, guards=guards)
    with pytest.raises(AggregationError):
        game.play()
    spent, cost = Spent.kept(game.run_dir), game.rows[1].cost
    assert spent is not None
    assert cost is not None
    assert spent.egress_bytes == 3 * sum(cost.egress.values())


def test_a_long_wait_does_not_make_the_next_rounds_look_dear(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten hours until a spot machine is there again; three rounds of an hour each fit after it."""
    faults = (Fault("b", "run", 2), Fault("b", "start", kind="late", after=1))
    game = billed_game(tmp_path, clock, *faults, budget=16.5 * ROUND_USD)
    while_waiting(
        game, clock, monkeypatch, "round_retried", "region_rejoined", lambda n: n == 10 and game.release()
    )
    assert game.play().finished
    assert booked(game) == pytest.approx((ROUNDS + 1 + 10) * ROUND_USD)
    spent = Spent.kept(game.run_dir)
    assert spent is not None
    assert spent.recent == pytest.approx([2 * ROUND_USD, ROUND_USD, ROUND_USD])  # two attempts, and no wait


def test_a_skipped_round_does_not_make_the_next_ones_look_dear(tmp_path: Path, clock: Clock) -> None:
    failure = {"below_quorum": "skip", "quorum": 3}
    game = billed_game(tmp_path, clock, Fault("b", "run", 2), failure=failure, budget=4.5 * ROUND_USD)
    assert game.play().finished
    assert game.rounds_of("round_skipped") == [2]
    spent = Spent.kept(game.run_dir)
    assert spent is not None
    assert spent.usd == pytest.approx(4 * ROUND_USD)
    assert spent.recent == pytest.approx([ROUND_USD] * 3)

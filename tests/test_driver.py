"""The round loop with everything that can happen to it, over the fakes of `tests/fakes.py`.

`tests/e2e` runs the same loop over real actors and engines, with real kills; here the faults are
scripted by (region, round, stage), and the whole file takes seconds. After every run, `check_books`
holds the metrics rows, the events and the commits against each other.
"""

from __future__ import annotations

import math
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fakes import AGGREGATOR, TOKENS_PER_SEQUENCE, FakeAggregator, FakeRegion, Fault, World
from tests.strategies import report
from xcloud.checkpoint import CheckpointStore, CommitRecord
from xcloud.config import JobConfig
from xcloud.driver import Outcome, Run
from xcloud.errors import (
    AggregationError,
    CheckpointError,
    DivergenceError,
    QuorumError,
    RegionError,
    XCloudError,
)
from xcloud.fleet import Fleet
from xcloud.messages import RoundPlan
from xcloud.metrics import Event, RoundRow, RunLog, read_events, read_rounds
from xcloud.policies import FailureConfig

pytestmark = pytest.mark.timeout(60)

ROUNDS = 4
PER_STEP = {"a": 2, "b": 1, "c": 3}
STEPS = 2
SOON = 0.05
"""Deadline in seconds: only for those who never answer in time, since the others answer at once."""


def job_of(**changes: Any) -> JobConfig:
    source = {"type": "stdlib", "kind": "modules"}
    regions = [
        {"name": name, "cloud": "aws", "data": source, "pools": [{"micro_batch": size}]}
        for name, size in PER_STEP.items()
    ]
    raw = {
        "name": "faked",
        "seed": 3,
        "rounds": ROUNDS,
        "chunk_size": 1024,
        "model": {"config": {"model_type": "llama"}},
        "regions": regions,
        "inner": {"steps": STEPS},
        "outer": {"type": "nesterov", "lr": 0.7, "momentum": 0.6},
        "evaluation": {"sequences": 8},
        "checkpoint": {"keep": 10},
    }
    return JobConfig.model_validate(raw | changes)


class On:
    """Listener that acts on an event, or on a round's row (`kind="row"`)."""

    def __init__(self, kind: str, action: Callable[[], object], round: int | None = None) -> None:
        self.kind, self.action, self.round_number = kind, action, round

    def on_event(self, event: Event) -> None:
        self._act(event.kind, event.fields.get("round"))

    def on_round(self, row: RoundRow) -> None:
        self._act("row", row.round)

    def _act(self, kind: str, number: int | None) -> None:
        if kind == self.kind and self.round_number in (None, number):
            self.action()

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...


class Game:
    """One run folder, played over fakes once or (resumed) several times."""

    def __init__(self, folder: Path, *faults: Fault, **changes: Any) -> None:
        self.run_dir = folder / "run"
        self.store = CheckpointStore(self.run_dir / "checkpoints")
        self.job = job_of(**changes)
        self.stop = threading.Event()
        self.listeners: list[On] = []
        self.again(*faults)

    def again(self, *faults: Fault) -> None:
        """New processes, and a new script, over the same folder."""
        self.world = World(self.job, self.store.url, list(faults))

    def on(self, kind: str, action: Callable[[], object], round: int | None = None) -> Game:
        self.listeners.append(On(kind, action, round))
        return self

    def play(self, resume: bool = False, stop_after: int | None = None) -> Outcome:
        """What `train` does, without a cluster."""
        record = self.store.latest() if resume else None
        with RunLog(self.run_dir, self.listeners) as log:
            log.rewind(record.round if record else 0)
            fleet = Fleet([r.name for r in self.job.regions], self.world.build, self.job.failure, log)
            run = Run(self.job, fleet, FakeAggregator(self.world), self.store, log, self.stop)
            try:
                return run.play(record, stop_after)
            finally:
                fleet.close()
                self.resumed_from = record
                check_books(self)

    def release(self) -> None:
        """Let every late answer of the newest processes arrive."""
        self.world.release()

    @property
    def rows(self) -> dict[int, RoundRow]:
        return {row.round: row for row in read_rounds(self.run_dir)}

    @property
    def record(self) -> CommitRecord:
        record = self.store.latest()
        assert record is not None
        return record

    @property
    def events(self) -> list[Event]:
        return read_events(self.run_dir)

    def rounds_of(self, kind: str) -> list[int]:
        """The rounds in which an event happened, in order."""
        return [event.fields["round"] for event in self.events if event.kind == kind]

    def reasons(self, kind: str) -> list[str]:
        return [event.fields["reason"] for event in self.events if event.kind == kind]

    def who(self, kind: str) -> list[str]:
        return [event.fields["region"] for event in self.events if event.kind == kind]

    def takers(self) -> dict[int, str]:
        """Who took part in each round."""
        return {number: "".join(row.regions) for number, row in self.rows.items()}


def check_books(game: Game) -> None:
    """Rows, events, commits and what the fakes did must tell one story."""
    rows, events, world = list(game.rows.values()), game.events, game.world
    assert [row.round for row in rows] == sorted({row.round for row in rows})
    assert not any(region.alive for region in world.regions), "processes are left over"

    # every sequence of a region once, and in order
    cursors, total = dict.fromkeys(PER_STEP, 0), 0
    overlaps = game.job.streaming.overlap > 0
    by_round: dict[int, dict[str, int]] = {0: dict(cursors)}
    tokens = {0: 0}
    for row in rows:
        assert row.tokens == sum(r.tokens for r in row.regions.values())
        assert row.bytes_up == sum(r.bytes_up for r in row.regions.values())
        assert row.bytes_down == sum(r.bytes_down for r in row.regions.values())
        for name, part in row.regions.items():
            read = part.cursor - cursors[name]
            trained = {end - first for n, r, first, end in world.trained if (n, r) == (name, row.round)}
            usual = game.job.inner.steps * PER_STEP[name]
            unusual = game.job.balance.regions != "fixed" or (name, row.round) in world.leaving
            assert part.tokens // TOKENS_PER_SEQUENCE in (trained if unusual else [usual])
            # where a region goes on from what it has, an update that is lost has been trained on all the same
            assert read == part.tokens // TOKENS_PER_SEQUENCE or (
                overlaps and read % (STEPS * PER_STEP[name]) == 0
            )
            cursors[name] = part.cursor
        total += row.tokens
        by_round[row.round], tokens[row.round] = dict(cursors), total

    # a row is what the last attempt at its round merged
    attempts = {e.fields["round"]: e.fields for e in events if e.kind == "round_started"}
    merged = {e.fields["round"]: e.fields for e in events if e.kind == "round_merged"}
    for row in rows:
        assert list(row.regions) == merged[row.round]["regions"]
        assert (
            row.attempt == attempts[row.round]["attempt"] or overlaps
        )  # merged again without being played again
        assert set(row.regions) <= set(attempts[row.round]["regions"])
        assert len(row.regions) >= game.job.needed

    # commits hold what the rows say
    commits = list(dict.fromkeys(game.rounds_of("checkpoint_committed")))
    assert game.store.rounds() == sorted(commits)[-game.job.checkpoint.keep :]
    for number in game.store.rounds():
        record = game.store.record(number)
        assert number in by_round, "committed, but no row says so"
        assert {name: state.cursor for name, state in record.regions.items()} == by_round[number]
        assert record.tokens == tokens[number]
        assert record.model_digest == game.rows[number].model_digest
        for file in (*record.model_files, *(f for state in record.regions.values() for f in state.files)):
            game.store._read(number, file)  # undamaged
        for state in record.regions.values():
            assert (state.inner_round is None) == (not state.files)
            assert state.inner_round is None or state.inner_round <= number

    # who fails is killed at once; who comes back had been away; what is restored is a commit
    here = dict.fromkeys(PER_STEP, True)
    begins = [i for i, e in enumerate(events) if e.kind == "region_starting" and e.fields["attempt"] == 1]
    for event in events[begins[-len(PER_STEP)] :]:
        name = event.fields.get("region", "")
        if event.kind in ("region_failed", "region_late", "region_leaving"):
            here[name] = False
        elif event.kind == "region_rejoined":
            assert not here[name]
            here[name] = True
        elif event.kind == "round_started":
            assert event.fields["regions"] == [n for n, ready in here.items() if ready]
    for name in PER_STEP:
        lost = sum(e.kind == "region_failed" and e.fields["region"] == name for e in events[begins[-3] :])
        moved = sum(e.kind == "region_leaving" and e.fields["region"] == name for e in events[begins[-3] :])
        assert world.kills[name] == lost + moved + 1
    for _, number, inner, cursor in world.restored:
        assert inner is None or inner <= number
        assert cursor in {c[name] for c in by_round.values() for name in c} | {0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Game:
    """The undisturbed run."""
    game = Game(tmp_path_factory.mktemp("whole"))
    assert game.play().finished
    return game


# -- nothing happens ----------------------------------------------------------------------


def test_an_undisturbed_run_commits_each_round(whole: Game) -> None:
    assert whole.store.rounds() == [1, 2, 3, 4]
    assert whole.takers() == dict.fromkeys([1, 2, 3, 4], "abc")
    assert [row.attempt for row in whole.rows.values()] == [1, 1, 1, 1]
    assert {n: s.cursor for n, s in whole.record.regions.items()} == {"a": 16, "b": 8, "c": 24}
    assert {s.inner_round for s in whole.record.regions.values()} == {4}
    assert whole.record.tokens == 4 * STEPS * 6 * TOKENS_PER_SEQUENCE
    assert whole.world.builds == {"a": 1, "b": 1, "c": 1}
    kinds = [event.kind for event in whole.events]
    one_round = ["round_started", *["region_finished"] * 3, "round_merged", "checkpoint_committed"]
    assert kinds == ["region_starting"] * 3 + ["region_ready"] * 3 + one_round * 4 + ["run_finished"]


def test_the_outcome_says_how_it_ended(whole: Game, tmp_path: Path) -> None:
    outcome = Game(tmp_path).play()
    assert (outcome.rounds, outcome.finished, outcome.reason) == (4, True, "")
    assert outcome.eval_loss_start == whole.record.eval_loss_start
    assert outcome.eval_loss_end == whole.record.eval_loss == whole.rows[4].eval_loss
    assert outcome.eval_loss_start is not None
    assert outcome.eval_loss_end is not None
    assert outcome.eval_loss_end < outcome.eval_loss_start  # the fakes do learn something
    assert whole.events[-1].fields["eval_loss"] == outcome.eval_loss_end


def test_two_runs_are_the_same_bit_for_bit(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play()
    assert [game.store.record(n) for n in range(1, 5)] == [whole.store.record(n) for n in range(1, 5)]


def test_evaluation_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    game = Game(tmp_path, evaluation={"sequences": 8, "every": 3})
    assert game.play().eval_loss_start is not None
    assert [row.eval_loss is None for row in game.rows.values()] == [True, True, False, False]
    off = Game(tmp_path / "off", evaluation={"sequences": 0})
    outcome = off.play()
    assert (outcome.eval_loss_start, outcome.eval_loss_end) == (None, None)


def test_without_inner_steps_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H = 0: no tokens, equal weights, a loss that does not exist, and a model that stays."""
    monkeypatch.setattr("tests.test_driver.STEPS", 0)
    game = Game(tmp_path, inner={"steps": 0})
    game.play()
    assert {row.model_digest for row in game.rows.values()} == {game.rows[1].model_digest}
    assert all(math.isnan(row.train_loss) and row.tokens == 0 for row in game.rows.values())


# -- a region dies, and its round is tried again ------------------------------------------


@pytest.mark.parametrize("round", [1, 2, 4])
@pytest.mark.parametrize("region", ["a", "c"])
@pytest.mark.parametrize("stage", ["run", "merge"])
def test_a_retried_round_ends_as_if_nothing_had_happened(
    whole: Game, tmp_path: Path, region: str, stage: Any, round: int
) -> None:
    """Quorum is all. Dead in its training, or its update lost on the way: it comes back and redoes it."""
    game = Game(tmp_path, Fault(region, stage, round))
    assert game.play().finished
    assert game.record == whole.record
    assert game.rounds_of("round_retried") == [round]
    assert game.rounds_of("region_failed") == game.rounds_of("region_rejoined") == [round]
    assert game.who("region_failed") == game.who("region_rejoined") == [region]
    assert [row.attempt for row in game.rows.values()] == [2 if n == round else 1 for n in range(1, 5)]
    # survivors offered the same update again; only the lost one trained again
    trained = [name for name, number, _, _ in game.world.trained if number == round]
    assert sorted(trained) == sorted(["a", "b", "c", *([region] if stage == "merge" else [])])
    assert game.world.builds[region] == 2
    restored = [] if round == 1 else [(region, round - 1, round - 1, (round - 1) * STEPS * PER_STEP[region])]
    assert game.world.restored == restored


def test_two_regions_die_in_one_round(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("a", "run", 2), Fault("c", "run", 2))
    game.play()
    assert game.record == whole.record


def test_a_region_dies_again_in_the_retry(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2, times=2))
    game.play()
    assert game.record == whole.record
    assert game.rows[2].attempt == 3


def test_a_region_dies_while_it_comes_back(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 3), Fault("b", "start", after=1), Fault("b", "restore", 2))
    game.play()
    assert game.record == whole.record
    assert game.world.builds["b"] == 4
    assert game.rows[3].attempt == 2


def test_all_regions_are_lost_at_once(whole: Game, tmp_path: Path) -> None:
    for number in (1, 3):
        game = Game(tmp_path / str(number), *[Fault(name, "run", number) for name in "abc"])
        game.play()
        assert game.record == whole.record
        assert len(game.world.restored) == (0 if number == 1 else 3)


def test_retries_are_counted(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2, times=99), failure={"max_retries": 2})
    with pytest.raises(QuorumError, match="round 2: 2 of 3 regions answered, quorum is 3, after 3 attempts"):
        game.play()
    assert game.rounds_of("round_retried") == [2, 2]
    assert game.record == whole.store.record(1)
    assert list(game.rows) == [1]


def test_the_aggregator_dies(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault(AGGREGATOR, "merge", 1), Fault(AGGREGATOR, "merge", 3, times=2))
    game.play()
    assert game.record == whole.record
    assert game.world.restarts == 3
    assert [row.attempt for row in game.rows.values()] == [2, 1, 3, 1]
    assert game.who("region_failed") == []
    assert len(game.world.trained) == 12


@pytest.mark.parametrize("times", [1, 99])
def test_keys_that_could_not_be_agreed_on_cost_an_attempt(
    whole: Game, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    left = [times]

    def unable(self: FakeAggregator, plan: RoundPlan, fleet: Fleet) -> str | None:
        if plan.round == 2 and left[0]:
            left[0] -= 1
            return "round 2: 2 good adverts, expected at least 3"
        return None

    monkeypatch.setattr(FakeAggregator, "open", unable)
    game = Game(tmp_path)
    if times == 1:
        game.play()
        assert game.record == whole.record
        assert game.rounds_of("round_retried") == [2]
    else:
        with pytest.raises(QuorumError, match=r"2 good adverts.*after 4 attempts"):
            game.play()
        assert game.record.round == 1


def test_a_region_that_reports_in_the_name_of_another_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, lies = FakeRegion.run, [1]

    def run(self: FakeRegion, plan: RoundPlan) -> Any:
        future = honest(self, plan)
        if self.name != "b" or not lies:
            return future
        lies.clear()
        stolen: Future[Any] = Future()
        header, handles = future.result()
        stolen.set_result((header.model_copy(update={"region": "a"}), handles))
        return stolen

    monkeypatch.setattr(FakeRegion, "run", run)
    game = Game(tmp_path)
    assert game.play().finished
    assert game.who("region_failed") == ["b"]
    assert game.reasons("region_failed") == ["it reports in the name of 'a'"]


def test_an_aggregator_that_dies_every_time(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault(AGGREGATOR, "merge", 2, times=99), failure={"max_retries": 2})
    with pytest.raises(
        QuorumError, match="round 2: region 'the aggregator': its process is gone, after 3 attempts"
    ):
        game.play()
    assert game.record == whole.store.record(1)


def test_an_error_that_is_no_regions_failure_ends_the_run(whole: Game, tmp_path: Path) -> None:
    """A full disk is not cured by restarting a region."""
    stages: list[Any] = ["run", "apply", "save"]
    for stage in stages:
        game = Game(tmp_path / stage, Fault("b", stage, 2, "fail"))
        with pytest.raises(XCloudError, match="b: the disk is full"):
            game.play()
        assert game.record == whole.store.record(1)
        assert game.who("region_failed") == []


# -- below quorum: skip and abort ---------------------------------------------------------


def test_a_skipped_round_commits_nothing_and_reads_its_data_again(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2), failure={"below_quorum": "skip"})
    assert game.play().finished
    assert list(game.rows) == [1, 3, 4] == game.store.rounds()
    assert game.rounds_of("round_skipped") == [2]
    assert game.reasons("round_skipped") == ["2 of 3 regions answered, quorum is 3"]
    assert game.rounds_of("round_retried") == []
    for name in "ac":
        spans = {number: (start, end) for n, number, start, end in game.world.trained if n == name}
        assert spans[3] == spans[2]
    assert game.world.restored == [("b", 1, 1, 2)]
    assert game.world.calls["a", "discard"] == game.world.calls["c", "discard"] == 1
    assert {n: s.cursor for n, s in game.record.regions.items()} == {"a": 12, "b": 6, "c": 18}


def test_the_first_round_is_skipped(tmp_path: Path) -> None:
    """There is no commit to go back to: who was away starts afresh, as everybody did."""
    game = Game(tmp_path, Fault("b", "run", 1), failure={"below_quorum": "skip"})
    game.play()
    assert list(game.rows) == [2, 3, 4]
    assert game.world.restored == []


def test_a_region_dies_while_it_discards(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2), Fault("c", "discard"), failure={"below_quorum": "skip"})
    game.play()
    assert list(game.rows) == [1, 3, 4]
    assert game.who("region_failed") == ["b", "c"]
    assert game.takers()[3] == "abc"


def test_abort_ends_the_run_and_the_last_commit_stays(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 3), failure={"below_quorum": "abort"})
    expected = "round 3: 2 of 3 regions answered, quorum is 3; nothing of it was committed"
    with pytest.raises(QuorumError, match=expected):
        game.play()
    assert game.record == whole.store.record(2)
    assert list(game.rows) == [1, 2]
    assert game.world.builds["b"] == 1
    game.again()
    game.play(resume=True)
    assert game.record == whole.record


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("stage", ["run", "merge"])
def test_a_run_that_gives_up_saves_its_last_committed_round(
    whole: Game, tmp_path: Path, stage: Any, every: int
) -> None:
    """Rounds 1 and 2 count, though no checkpoint was due yet, and the survivors hold them."""
    failure = {"below_quorum": "abort", "max_retries": 0}
    game = Game(tmp_path, Fault("b", stage, 3), failure=failure, checkpoint={"every": every})
    with pytest.raises(QuorumError, match="round 3"):
        game.play()
    assert list(game.rows) == [1, 2]
    assert game.store.rounds() == [2]
    assert game.record.model_digest == whole.store.record(2).model_digest


# -- above quorum: the round goes on without it -------------------------------------------


def test_a_round_is_committed_without_the_lost_region_which_rejoins(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2), failure={"quorum": 2})
    assert game.play().finished
    assert game.takers() == {1: "abc", 2: "ac", 3: "abc", 4: "abc"}
    assert game.rows[2].attempt == 1
    assert game.rounds_of("region_failed") == [2]
    assert game.rounds_of("region_rejoined") == [3]
    # it goes on with the data it had not been counted for, and with its inner state of round 1
    assert game.world.restored == [("b", 2, 1, 2)]
    assert [span for span in game.world.trained if span[0] == "b"] == [
        ("b", 1, 0, 2),
        ("b", 3, 2, 4),
        ("b", 4, 4, 6),
    ]
    missed = game.store.record(2).regions["b"]
    assert (missed.cursor, missed.inner_round) == (2, 1)
    assert game.record.regions["b"].inner_round == 4
    assert not {e.kind for e in game.events} & {"round_retried", "round_skipped"}


def test_a_region_is_away_for_two_rounds(tmp_path: Path) -> None:
    """Its state is carried from commit to commit, so that retention cannot lose it."""
    game = Game(
        tmp_path,
        Fault("b", "run", 2),
        Fault("b", "start", kind="late", after=1),
        failure={"quorum": 2},
        checkpoint={"keep": 1},
    )
    game.on("round_merged", game.release, round=3).play()
    assert game.takers() == {1: "abc", 2: "ac", 3: "ac", 4: "abc"}
    assert game.world.restored == [("b", 3, 1, 2)]
    assert game.store.rounds() == [4]


def test_a_region_dies_while_it_applies_the_merged_update(tmp_path: Path) -> None:
    """Its update is in the model already, so its data counts; only its inner state is a round old."""
    for quorum in (2, None):
        game = Game(tmp_path / str(quorum), Fault("b", "apply", 2), failure={"quorum": quorum})
        game.play()
        assert game.takers() == dict.fromkeys([1, 2, 3, 4], "abc")
        assert game.rows[2].regions["b"].bytes_down == 0
        assert game.rows[2].regions["b"].eval_loss is None
        assert game.world.restored == [("b", 2, 1, 4)]
        assert game.rounds_of("region_rejoined") == [3]
        assert game.rounds_of("round_retried") == []


def test_every_region_dies_while_it_applies(whole: Game, tmp_path: Path) -> None:
    """Nobody holds the round any more, so it never was: all come back and redo it."""
    game = Game(tmp_path, *[Fault(name, "apply", 2) for name in "abc"])
    game.play()
    assert game.record == whole.record
    assert game.rows[2].attempt == 2
    assert game.reasons("round_retried") == ["every region was lost while it applied the merged update"]


def test_every_region_dies_each_time_it_applies(whole: Game, tmp_path: Path) -> None:
    faults = [Fault(name, "apply", 2, times=99) for name in "abc"]
    game = Game(tmp_path, *faults, failure={"max_retries": 1})
    with pytest.raises(QuorumError, match="round 2: every region was lost while it applied"):
        game.play()
    assert game.record == whole.store.record(1)
    assert list(game.rows) == [1]
    game.again()
    game.play(resume=True)
    assert game.record == whole.record


def test_an_update_is_lost_on_the_way_and_the_rest_is_a_quorum(tmp_path: Path) -> None:
    game = Game(
        tmp_path, Fault("b", "merge", 2), Fault("b", "start", kind="late", after=1), failure={"quorum": 2}
    )
    game.on("row", game.release, round=2).play()
    assert game.takers() == {1: "abc", 2: "ac", 3: "abc", 4: "abc"}
    assert game.rows[2].attempt == 2
    assert game.reasons("round_retried") == ["region 'b': chunk 1 of its update is lost (OwnerDiedError)"]
    assert game.world.restored == [("b", 2, 1, 2)]


# -- restarts end -------------------------------------------------------------------------


def test_a_region_that_cannot_start_again_is_gone(tmp_path: Path) -> None:
    game = Game(
        tmp_path,
        Fault("b", "run", 2),
        Fault("b", "start", after=1, times=99),
        failure={"quorum": 2, "max_restarts": 1},
    )
    assert game.play().finished
    assert game.takers() == {1: "abc", 2: "ac", 3: "ac", 4: "ac"}
    assert game.world.builds["b"] == 2
    (gone,) = [event for event in game.events if event.kind == "region_gone"]
    assert gone.fields == {"region": "b", "restarts": 1}
    assert (game.record.regions["b"].cursor, game.record.regions["b"].inner_round) == (2, 1)
    # it is not given up for ever: a resumed run starts it like the others
    game.job = job_of(rounds=6, failure={"quorum": 2})
    game.again()
    game.play(resume=True)
    assert game.takers()[6] == "abc"
    assert ("b", 4, 1, 2) in game.world.restored


def test_without_a_region_that_is_gone_there_is_no_quorum(whole: Game, tmp_path: Path) -> None:
    game = Game(
        tmp_path,
        Fault("b", "run", 2),
        Fault("b", "start", after=1, times=99),
        failure={"max_restarts": 1, "max_retries": 2},
    )
    with pytest.raises(QuorumError, match="after 3 attempts"):
        game.play()
    assert game.record == whole.store.record(1)
    assert game.who("region_gone") == ["b"]


def test_a_finished_round_forgives_earlier_restarts(whole: Game, tmp_path: Path) -> None:
    faults = [Fault("b", "run", number) for number in (1, 2, 3, 4)]
    game = Game(tmp_path, *faults, failure={"max_restarts": 1})
    game.play()
    assert game.record == whole.record
    assert game.world.builds["b"] == 5


def test_a_region_that_starts_but_never_finishes_a_round_is_gone(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", times=99), failure={"quorum": 2, "max_restarts": 2})
    game.play()
    assert game.world.builds["b"] == 3
    assert game.who("region_gone") == ["b"]
    assert set(game.takers().values()) == {"ac"}


def test_all_regions_are_gone(whole: Game, tmp_path: Path) -> None:
    faults = [Fault(name, "run", 2, times=99) for name in "abc"]
    game = Game(tmp_path, *faults, failure={"max_restarts": 1, "max_retries": 9})
    with pytest.raises(QuorumError, match="round 2: no region is left; go on from round 1 with --resume"):
        game.play()
    assert game.record == whole.store.record(1)


def test_a_region_that_cannot_start_the_first_time_ends_the_run(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "start"))
    with pytest.raises(RegionError, match="region 'b': its process is gone"):
        game.play()
    assert game.store.rounds() == []


# -- late regions -------------------------------------------------------------------------


@pytest.mark.parametrize("round", [1, 3])
def test_a_late_update_is_good_for_the_retried_round(whole: Game, tmp_path: Path, round: int) -> None:
    game = Game(tmp_path, Fault("b", "run", round, "late"), failure={"deadline_s": SOON})
    game.on("round_retried", game.release).play()
    assert game.record == whole.record
    assert game.rounds_of("region_late") == game.rounds_of("region_rejoined") == [round]
    assert game.rows[round].attempt == 2
    assert (game.world.restored, game.world.builds["b"]) == ([], 1)


def test_a_late_region_restores_before_it_takes_part_in_another_round(tmp_path: Path) -> None:
    """Its round was committed without it: what it trained does not count, and is read again."""
    game = Game(tmp_path, Fault("b", "run", 2, "late"), failure={"quorum": 2, "deadline_s": SOON})
    game.on("row", game.release, round=2).play()
    assert game.takers() == {1: "abc", 2: "ac", 3: "abc", 4: "abc"}
    assert game.world.restored == [("b", 2, 1, 2)]
    assert game.world.builds["b"] == 1
    assert [span for span in game.world.trained if span[0] == "b"][1:3] == [("b", 2, 2, 4), ("b", 3, 2, 4)]
    assert game.rounds_of("region_rejoined") == [3]
    assert game.rounds_of("region_failed") == []


def test_a_region_is_late_for_two_rounds(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2, "late"), failure={"quorum": 2, "deadline_s": SOON})
    game.on("row", game.release, round=3).play()
    assert game.takers() == {1: "abc", 2: "ac", 3: "ac", 4: "abc"}
    assert game.world.restored == [("b", 3, 1, 2)]


def test_a_region_is_late_to_the_end(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2, "late"), failure={"quorum": 2, "deadline_s": SOON})
    assert game.play().finished
    assert game.takers() == {1: "abc", 2: "ac", 3: "ac", 4: "ac"}
    assert game.record.regions["b"].inner_round == 1


def test_a_late_update_of_a_skipped_round_does_not_count(tmp_path: Path) -> None:
    failure = {"below_quorum": "skip", "deadline_s": SOON}
    game = Game(tmp_path, Fault("b", "run", 2, "late"), failure=failure)
    game.on("round_skipped", game.release).play()
    assert list(game.rows) == [1, 3, 4]
    assert game.world.restored == [("b", 1, 1, 2)]


def test_late_before_anything_is_committed(tmp_path: Path) -> None:
    """There is nothing to restore, and what it has must not count: its processes start again."""
    failure = {"below_quorum": "skip", "deadline_s": SOON}
    game = Game(tmp_path, Fault("b", "run", 1, "late"), failure=failure)
    game.on("round_skipped", game.release).play()
    assert list(game.rows) == [2, 3, 4]
    assert game.world.builds["b"] == 2
    assert game.reasons("region_failed") == ["it was late before anything was committed; it starts again"]


def test_a_late_region_dies(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "run", 2, "late"), failure={"quorum": 2, "deadline_s": SOON})
    game.on("row", lambda: game.world.newest("b").crash(), round=2).play()
    assert game.takers()[2] == "ac"
    assert game.takers()[4] == "abc"
    assert {(name, inner, cursor) for name, _, inner, cursor in game.world.restored} == {("b", 1, 2)}
    assert game.world.builds["b"] == 2
    assert game.rounds_of("region_failed") == [3]


def test_all_regions_are_late(whole: Game, tmp_path: Path) -> None:
    faults = [Fault(name, "run", 2, "late") for name in "abc"]
    game = Game(tmp_path, *faults, failure={"deadline_s": SOON})
    game.on("round_retried", game.release).play()
    assert game.record == whole.record
    assert game.who("region_late") == ["a", "b", "c"]


@pytest.mark.parametrize("quorum", [2, None])
def test_a_region_is_late_in_applying(tmp_path: Path, quorum: int | None) -> None:
    """Its update is in the model already, so its data counts; what it holds is loaded anew."""
    game = Game(tmp_path, Fault("b", "apply", 2, "late"), failure={"quorum": quorum, "deadline_s": SOON})
    game.on("row", game.release, round=2).play()
    assert game.takers() == dict.fromkeys([1, 2, 3, 4], "abc")
    assert game.rows[2].regions["b"].bytes_down == 0
    assert game.world.restored == [("b", 2, 1, 4)]
    assert game.world.builds["b"] == 1


def test_all_regions_are_late_in_applying(whole: Game, tmp_path: Path) -> None:
    """Nobody's answer counts, so the round is played again, from the commit before it."""
    faults = [Fault(name, "apply", 2, "late") for name in "abc"]
    game = Game(tmp_path, *faults, failure={"deadline_s": SOON})
    game.on("round_retried", game.release).play()
    assert game.record == whole.record


@pytest.mark.parametrize("region", ["a", "b"])
@pytest.mark.parametrize("round", [1, 2])
def test_a_region_is_late_in_saving(tmp_path: Path, region: str, round: int) -> None:
    """Whatever it still writes after the commit must not damage what was committed without it."""
    game = Game(tmp_path, Fault(region, "save", round, "late"), failure={"quorum": 2, "deadline_s": SOON})
    game.on("checkpoint_committed", game.release, round=round).play()
    assert game.rounds_of("checkpoint_committed") == [1, 2, 3, 4]
    away = game.store.record(round).regions[region]
    assert away.inner_round == (1 if round == 2 else None)
    assert (region, round, away.inner_round, away.cursor) in game.world.restored
    assert game.takers()[4] == "abc"


def test_a_region_is_late_in_restoring(whole: Game, tmp_path: Path) -> None:
    """It is started once more, rather than waited for."""
    faults = [Fault("b", "run", 3), Fault("b", "restore", 2, "late")]
    game = Game(tmp_path, *faults, failure={"deadline_s": SOON})
    game.play()
    assert game.record == whole.record
    assert game.world.builds["b"] == 3


class JustTooLate(Future[Any]):
    """Completes between the deadline and the look at who has missed it."""

    def __init__(self, outcome: Any) -> None:
        super().__init__()
        self.outcome = outcome

    def done(self) -> bool:
        if not super().done():
            self.set_result(self.outcome)
        return super().done()


def test_an_answer_just_after_the_deadline_is_late(tmp_path: Path) -> None:
    """It is in nobody's answers, so its region must not pass for one that is ready with a clean model."""
    game = Game(tmp_path)
    plan = RoundPlan(job="j", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=1)

    class Slow(FakeRegion):
        def run(self, plan: RoundPlan) -> Future[Any]:
            return JustTooLate((report(self.name, 1), []))

    with RunLog(game.run_dir) as log:
        fleet = Fleet(["b"], lambda name: Slow(game.world, name), FailureConfig(deadline_s=SOON), log)
        fleet.start(evaluate=False)
        fleet.launch(plan, 1)
        assert fleet.collect(1, 0) == {}
        assert (fleet.ready, fleet.recovering) == ([], ["b"])
        fleet.recover(lambda name: None, 1, needed=1)  # the same round once more: its update is good for it
        assert fleet.ready == ["b"]
        fleet.close()
    assert [e.kind for e in game.events][-2:] == ["region_late", "region_rejoined"]


# -- checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "rounds"), [(0, [4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])]
)
def test_how_often(whole: Game, tmp_path: Path, every: int, rounds: list[int]) -> None:
    game = Game(tmp_path, checkpoint={"every": every, "keep": 10})
    game.play()
    assert game.store.rounds() == rounds
    assert game.record == whole.record


def test_how_many_are_kept(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, checkpoint={"keep": 2})
    game.play()
    assert game.store.rounds() == [3, 4]
    assert game.rounds_of("checkpoint_committed") == [1, 2, 3, 4]
    assert game.record == whole.record


@pytest.mark.parametrize("every", [0, 3])
def test_a_region_that_has_to_come_back_forces_a_checkpoint(tmp_path: Path, every: int) -> None:
    """Retried: of the round before. Its inner state was never saved, so it starts with a fresh one."""
    game = Game(tmp_path, Fault("b", "run", 2), checkpoint={"every": every, "keep": 10})
    game.play()
    assert game.rounds_of("checkpoint_committed") == [1, 4] if every == 0 else [1, 3, 4]
    assert game.world.restored == [("b", 1, None, 2)]
    assert game.takers() == dict.fromkeys([1, 2, 3, 4], "abc")


@pytest.mark.parametrize("every", [0, 3])
def test_a_region_that_missed_a_round_forces_a_checkpoint(tmp_path: Path, every: int) -> None:
    game = Game(
        tmp_path, Fault("b", "run", 2), failure={"quorum": 2}, checkpoint={"every": every, "keep": 10}
    )
    game.play()
    assert game.rounds_of("checkpoint_committed") == [2, 4] if every == 0 else [2, 3, 4]
    assert game.world.restored == [("b", 2, None, 2)]


def test_the_donor_dies_while_saving(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("a", "save", 2))
    game.play()
    assert game.rounds_of("checkpoint_committed") == [1, 2, 3, 4]
    second = game.store.record(2)
    assert {n: s.inner_round for n, s in second.regions.items()} == {"a": 1, "b": 2, "c": 2}
    assert game.world.calls["b", "save"] == 5  # once more as donor
    assert game.world.restored == [("a", 2, 1, 8)]
    assert game.takers()[3] == "abc"


def test_another_than_the_donor_dies_while_saving(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "save", 1), Fault("c", "save", 3))
    game.play()
    assert {n: s.inner_round for n, s in game.store.record(1).regions.items()} == {"a": 1, "b": None, "c": 1}
    assert {n: s.inner_round for n, s in game.store.record(3).regions.items()} == {"a": 3, "b": 3, "c": 2}
    assert game.world.restored == [("b", 1, None, 2), ("c", 3, 2, 18)]
    assert game.world.calls["a", "save"] == 4  # what the others wrote was kept


def test_all_regions_die_while_saving(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, *[Fault(name, "save", 2) for name in "abc"])
    with pytest.raises(QuorumError, match="round 3: no region is left; go on from round 1 with --resume"):
        game.play()
    assert game.record == whole.store.record(1)
    assert list(game.rows) == [1, 2]  # played, but not to be had any more
    game.again()
    game.play(resume=True)
    assert game.record == whole.record
    assert list(game.rows) == [1, 2, 3, 4]


def test_all_regions_are_lost_with_rounds_that_were_never_saved(tmp_path: Path) -> None:
    game = Game(tmp_path, *[Fault(name, "run", 3) for name in "abc"], checkpoint={"every": 0})
    with pytest.raises(QuorumError, match="round 3: no region is left; go on from round 0 with --resume"):
        game.play()
    assert game.store.rounds() == []


def test_the_last_checkpoint_is_saved_by_who_is_left(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("a", "save", 4), Fault("b", "save", 4), checkpoint={"every": 0})
    assert game.play().finished
    assert game.store.rounds() == [4]
    assert {n: s.inner_round for n, s in game.record.regions.items()} == {"a": None, "b": None, "c": 4}


# -- stop and resume ----------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3])
def test_stop_ends_with_a_checkpoint_and_resume_goes_on(whole: Game, tmp_path: Path, every: int) -> None:
    game = Game(tmp_path, checkpoint={"every": every, "keep": 10})
    game.on("round_started", game.stop.set, round=2)  # Ctrl-C in the middle of a round
    outcome = game.play()
    assert (outcome.rounds, outcome.finished, outcome.reason) == (2, False, "interrupted")
    assert game.record == whole.store.record(2)
    assert game.events[-1].kind == "run_stopped"
    assert game.events[-1].fields == {"round": 2, "reason": "interrupted"}
    game.stop.clear()
    game.listeners.clear()
    game.again()
    assert game.play(resume=True).finished
    assert game.record == whole.record
    assert sorted(game.world.restored) == [("a", 2, 2, 8), ("b", 2, 2, 4), ("c", 2, 2, 12)]


def test_stop_in_the_last_round_finishes(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path)
    outcome = game.on("round_started", game.stop.set, round=4).play()
    assert (outcome.finished, outcome.reason) == (True, "")
    assert game.record == whole.record


def test_stop_before_the_first_round(tmp_path: Path) -> None:
    game = Game(tmp_path)
    outcome = game.on("region_ready", game.stop.set).play()
    assert (outcome.rounds, outcome.finished, outcome.reason) == (0, False, "interrupted")
    assert (game.store.rounds(), game.rows) == ([], {})


@pytest.mark.parametrize("last", [1, 3])
def test_stop_after_and_resume_equal_one_run(whole: Game, tmp_path: Path, last: int) -> None:
    game = Game(tmp_path, checkpoint={"every": 0})
    outcome = game.play(stop_after=last)
    assert (outcome.rounds, outcome.finished, outcome.reason) == (last, False, "stop-after")
    assert game.record == whole.store.record(last)
    assert game.rows[last].eval_loss is not None
    game.again()
    outcome = game.play(resume=True)
    assert outcome.finished
    assert outcome.eval_loss_start == whole.record.eval_loss_start
    assert game.record == whole.record
    assert game.world.calls["a", "run"] == 4 - last


def test_stop_after_more_rounds_than_there_are(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path)
    assert game.play(stop_after=99).finished
    assert game.record == whole.record


def test_resume_of_a_finished_run_plays_nothing(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play()
    game.again()
    outcome = game.play(resume=True)
    assert (outcome.rounds, outcome.finished) == (4, True)
    assert game.world.trained == []
    assert game.record == whole.record


def test_resume_for_more_rounds(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, rounds=2)
    game.play()
    assert game.record == whole.store.record(2)
    game.job = job_of()
    game.again()
    game.play(resume=True)
    assert game.record == whole.record


@pytest.mark.parametrize("stage", ["restore", "run"])
def test_a_region_dies_just_after_a_resume(whole: Game, tmp_path: Path, stage: Any) -> None:
    game = Game(tmp_path)
    game.play(stop_after=2)
    game.again(Fault("b", stage, 2 if stage == "restore" else 3))
    game.play(resume=True)
    assert game.record == whole.record
    assert game.world.builds["b"] == 2


def test_all_regions_die_just_after_a_resume(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play(stop_after=2)
    game.again(*[Fault(name, "restore", 2) for name in "abc"])
    game.play(resume=True)
    assert game.record == whole.record


def test_a_commit_of_another_layout_is_refused(tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play(stop_after=2)
    game.job = job_of(chunk_size=2048)
    game.again()
    with pytest.raises(
        CheckpointError, match="round 2 holds another model layout or chunk_size than this job"
    ):
        game.play(resume=True)


def test_a_damaged_commit_is_not_gone_on_from(tmp_path: Path) -> None:
    game = Game(tmp_path)
    game.play(stop_after=2)
    (path,) = (game.run_dir / "checkpoints/round-000002/model").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    game.again()
    with pytest.raises(CheckpointError, match=f"{path}: damaged"):
        game.play(resume=True)


# -- divergence ---------------------------------------------------------------------------


def test_regions_that_diverge_end_the_run(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "apply", 2, "diverge"), failure={"quorum": 1})
    with pytest.raises(
        DivergenceError, match="round 2: the regions hold different models after the outer step"
    ):
        game.play()
    assert game.record == whole.store.record(1)
    assert list(game.rows) == [1]


def test_regions_that_start_from_different_weights(tmp_path: Path) -> None:
    game = Game(tmp_path, Fault("b", "start", kind="diverge"))
    with pytest.raises(DivergenceError, match="regions 'a' and 'b' start from different initial weights"):
        game.play()


# -- anything -----------------------------------------------------------------------------


curable = st.builds(
    Fault,
    st.sampled_from("abc"),
    st.sampled_from(["run", "merge"]),
    st.integers(1, ROUNDS),
    times=st.integers(1, 2),
)
lates = st.builds(Fault, st.sampled_from("abc"), st.just("run"), st.integers(1, ROUNDS), st.just("late"))
other_lates = st.builds(
    Fault,
    st.sampled_from("abc"),
    st.sampled_from(["apply", "save", "restore"]),
    st.integers(1, ROUNDS),
    st.just("late"),
)
aggregators = st.builds(Fault, st.just(AGGREGATOR), st.just("merge"), st.integers(1, ROUNDS))


@settings(deadline=None, max_examples=15)
@given(faults=st.lists(curable | lates | aggregators, max_size=4))
def test_whatever_is_retried_leaves_no_trace(whole: Game, faults: list[Fault]) -> None:
    """Deaths, late answers and lost updates in any combination: the same weights, moments and cursors."""
    with tempfile.TemporaryDirectory() as folder:
        failure = {"deadline_s": SOON, "max_retries": 20, "max_restarts": 20}
        game = Game(Path(folder), *faults, failure=failure)
        game.on("round_retried", game.release).play()
        assert game.record == whole.record


anything = st.builds(
    Fault,
    st.sampled_from("abc"),
    st.sampled_from(["run", "merge", "apply", "save", "restore"]),
    st.none() | st.integers(1, ROUNDS),
    times=st.integers(1, 3),
    after=st.integers(0, 2),
)


@settings(deadline=None, max_examples=25)
@given(
    faults=st.lists(anything | lates | other_lates | aggregators, max_size=6),
    quorum=st.none() | st.integers(1, 2),
    below=st.sampled_from(["retry", "skip", "abort"]),
    every=st.integers(0, 2),
    keep=st.integers(1, 2),
    retries=st.integers(0, 2),
)
@example([Fault("a", "save", 2), Fault("a", "restore", 2, times=2)], 1, "retry", 0, 1, 0)
def test_the_books_are_right_whatever_happens(
    faults: list[Fault], quorum: int | None, below: str, every: int, keep: int, retries: int
) -> None:
    """And a run that gave up can be resumed to its end."""
    faults = [Fault(f.region, f.stage, f.round, f.kind, f.times, f.after) for f in faults]
    failure = {
        "quorum": quorum,
        "below_quorum": below,
        "deadline_s": SOON,
        "max_retries": retries,
        "max_restarts": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        game = Game(Path(folder), *faults, failure=failure, checkpoint={"every": every, "keep": keep})
        game.on("region_late", game.release)
        try:
            game.play()
        except QuorumError:
            game.again()
            assert game.play(resume=True).finished
            assert max(game.rows) == ROUNDS


# -- guards -------------------------------------------------------------------------------


def poison() -> Fault:
    return Fault(AGGREGATOR, "merge", 3, "poison")


@pytest.mark.parametrize(
    ("guards", "reason"),
    [
        ({"norm": 4}, r"the merged update is .* long, .* times the usual"),
        ({"loss": 9}, r"held-out loss .* would rise by"),
    ],
)
def test_a_poisoned_update_is_taken_back_and_its_data_is_read_again(
    tmp_path: Path, guards: dict[str, Any], reason: str
) -> None:
    game = Game(tmp_path, poison(), guards=guards)
    outcome = game.play()
    assert outcome.finished
    assert game.rounds_of("round_rejected") == [3]
    assert re.search(reason, game.reasons("round_rejected")[0])
    assert sorted(game.rows) == [1, 2, 4]
    assert game.store.rounds() == [1, 2, 4]
    assert {n: state.cursor for n, state in game.record.regions.items()} == {
        name: 3 * STEPS * each for name, each in PER_STEP.items()
    }


def test_without_guards_a_poisoned_update_counts(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, poison())
    game.play()
    assert sorted(game.rows) == [1, 2, 3, 4]
    assert game.record.model_digest != whole.record.model_digest


def test_guards_leave_an_honest_run_alone(whole: Game, tmp_path: Path) -> None:
    game = Game(tmp_path, guards={"norm": 4, "loss": 9})
    game.play()
    assert not game.rounds_of("round_rejected")
    assert game.record.model_digest == whole.record.model_digest


def test_a_run_that_is_poisoned_again_and_again_ends(tmp_path: Path) -> None:
    always = Fault(AGGREGATOR, "merge", None, "poison", times=99, after=1)
    game = Game(tmp_path, always, guards={"norm": 4, "patience": 2}, rounds=8)
    with pytest.raises(
        AggregationError, match=r"round 4: the merged update .*, 3 rounds in a row; the last committed round"
    ):
        game.play()
    assert game.store.rounds() == [1]


def test_guards_remember_over_a_resume(tmp_path: Path) -> None:
    game = Game(tmp_path, guards={"norm": 4})
    game.play(stop_after=2)
    game.again(poison())
    game.play(resume=True)
    assert game.rounds_of("round_rejected") == [3]

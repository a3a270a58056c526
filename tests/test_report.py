"""What a person sees of a run: numbers, lines, the live board, and a run judged from its folder."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xcloud.config import JobConfig, parse_job
from xcloud.cost.bill import CostRow, RegionCost, Spent
from xcloud.cost.settings import CostConfig
from xcloud.messages import Progress
from xcloud.metrics import Event, PrivacyRow, RegionRow, RoundRow, RunLog, read_rounds
from xcloud.report import (
    Board,
    JsonView,
    LiveView,
    PlainView,
    closing_lines,
    event_line,
    human_bytes,
    human_clock,
    human_count,
    human_loss,
    human_seconds,
    human_usd,
    job_record,
    job_summary,
    round_line,
    status_record,
    status_view,
    text_view,
)
from xcloud.report.text import NOTICE_KINDS

JOB = """
name: demo
rounds: 24
sequence_length: 32
model: {config: {model_type: llama}}
inner: {steps: 10}
regions:
  - {name: us-east-1, cloud: aws, data: {type: stdlib, kind: modules}, pools: [{workers: 2, micro_batch: 4}]}
  - {name: europe-west4, cloud: gcp, data: {type: stdlib, kind: tests}, pools: [{zero_stage: 3, micro_batch: 8}]}
"""
NAMES = ["us-east-1", "europe-west4"]


@pytest.fixture
def job() -> JobConfig:
    return parse_job(JOB)


def row(number: int, **changes: Any) -> RoundRow:
    region = RegionRow(
        tokens=29_000,
        train_loss=2.41,
        eval_loss=2.55,
        tokens_per_s=4800.0,
        bytes_up=1_550_000,
        bytes_down=1_550_000,
        compute_s=6.1,
        sync_s=0.3,
        update_norm=1.0,
        cursor=10,
    )
    fields: dict[str, Any] = {
        "round": number,
        "attempt": 1,
        "train_loss": 2.41,
        "eval_loss": 2.55,
        "tokens": 58_000,
        "bytes_up": 3_100_000,
        "bytes_down": 3_100_000,
        "compute_s": 6.1,
        "sync_s": 0.3,
        "regions": dict.fromkeys(NAMES, region),
        "model_digest": "d",
    }
    return RoundRow(**{**fields, **changes})


def rank(number: int, state: int = 2_600_000) -> dict[str, Any]:
    return {
        "rank": number,
        "node": "n",
        "device": "cpu",
        "parameter_bytes": 2_600_000,
        "optimizer_state_bytes": state,
        "owned_chunks": 3,
    }


def play(log: RunLog, rounds: int = 1, simulation: bool = True) -> None:
    """Report what the driver would: a start, and some rounds, the second of them with a failure."""
    host = socket.gethostname()
    log.event(
        "run_started",
        job="demo",
        rounds=24,
        run_dir=str(log.folder),
        pid=os.getpid(),
        host=host,
        regions=NAMES,
        simulation=simulation,
        resumed_round=None,
    )
    for name in NAMES:
        log.event("region_starting", region=name, attempt=1)
    for name, ranks in zip(NAMES, (2, 1), strict=True):
        pools = [[rank(i) for i in range(ranks)]]
        log.event("region_ready", region=name, parameters=650_000, eval_loss=5.6, pools=pools, seconds=18.2)
    for number in range(1, rounds + 1):
        log.event("round_started", round=number, attempt=1, rounds=24, regions=NAMES)
        if number == 2:
            reason = "region 'europe-west4': rank 0 died\nTraceback"
            log.event("region_failed", region=NAMES[1], round=number, reason=reason)
            log.event("round_retried", round=number, attempt=2, reason="1 of 2 regions answered, quorum is 2")
            log.event("region_starting", region=NAMES[1], attempt=2)
            log.event("region_rejoined", region=NAMES[1], round=number)
            log.event("round_started", round=number, attempt=2, rounds=24, regions=NAMES)
        for name in NAMES:
            log.event(
                "region_finished", round=number, region=name, tokens=29_000, train_loss=2.4, seconds=6.0
            )
        log.event("round_merged", round=number, regions=NAMES, seconds=0.1)
        log.round(row(number))
        log.event("checkpoint_committed", round=number, path=f"checkpoints/round-{number:06d}")


PLAIN = """\
demo: 2 regions, 24 rounds, run folder RUN
starting Ray
simulation: all regions share this cluster; nothing isolates them
us-east-1: loading torch, DeepSpeed
europe-west4: loading torch, DeepSpeed
us-east-1 ready in 18 s: 2 x cpu, optimizer state 2.6 MB each; eval 5.60; 650k parameters
europe-west4 ready in 18 s: 1 x cpu, optimizer state 2.6 MB; eval 5.60; 650k parameters
round 1/24  train 2.41  eval 2.55  58k tokens  up 3.1 MB  down 3.1 MB  compute 6.1 s  sync 0.3 s
europe-west4 lost in round 2: rank 0 died
round 2 tried again (attempt 2): 1 of 2 regions answered, quorum is 2
europe-west4: restarting (start 2)
europe-west4 rejoined before round 2
round 2/24  train 2.41  eval 2.55  58k tokens  up 3.1 MB  down 3.1 MB  compute 6.1 s  sync 0.3 s
"""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_100_000, "3.1 MB"),
        (99_940_000, "99.9 MB"),
        (99_960_000, "100 MB"),
        (999_960_000, "1.0 GB"),
        (2_500_000_000_000_000, "2500 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950.4, "950"),
        (999.6, "1.0k"),
        (5_800, "5.8k"),
        (58_000, "58k"),
        (1_234_567, "1.2M"),
        (math.nan, "-"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (6.14, "6.1 s"),
        (9.96, "10 s"),
        (59.6, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3725, "1 h 02 m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_clocks_and_losses() -> None:
    assert [human_clock(s) for s in (-1, 41.9, 62, 3723)] == ["0:00", "0:41", "1:02", "1:02:03"]
    assert [human_loss(x) for x in (None, math.nan, 2.414, 0.2414)] == ["-", "-", "2.41", "0.241"]


def test_a_round_line_loses_its_end_on_a_narrow_terminal() -> None:
    whole = round_line(row(3), 24)
    assert whole == (
        "round 3/24  train 2.41  eval 2.55  58k tokens  up 3.1 MB  down 3.1 MB  compute 6.1 s  sync 0.3 s"
    )
    narrow = round_line(row(3), 24, width=80)
    assert narrow == "round 3/24  train 2.41  eval 2.55  58k tokens  up 3.1 MB  down 3.1 MB"
    assert round_line(row(3, eval_loss=None), 24, width=40) == "round 3/24  train 2.41  eval -"


def test_a_ready_line_shows_what_each_rank_of_each_pool_holds() -> None:
    pools = [[{**rank(i), "device": f"cuda:{i}"} for i in range(2)], [rank(0, state=0)]]
    fields = {"region": "r", "parameters": 1000, "eval_loss": None, "pools": pools, "seconds": 2.0}
    assert event_line(Event(0.0, "region_ready", fields)) == (
        "r ready in 2.0 s: 2 x cuda, optimizer state 2.6 MB each; 1 x cpu, parameters 2.6 MB; 1.0k parameters"
    )


def test_plain_lines(job: JobConfig, tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, [PlainView(job, Path("RUN"), stream)]) as log:
        play(log, rounds=2)
    assert stream.getvalue() == PLAIN


def test_plain_view_survives_a_reader_that_went_away(job: JobConfig, tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        view = PlainView(job, tmp_path, stream)
        os.close(read)
        with RunLog(tmp_path, [view]) as log:
            play(log, rounds=2)
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 2
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # so that closing it has somewhere to write


def test_json_lines_all_parse(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, [JsonView(stream)]) as log:
        play(log, rounds=2)
        log.round(row(3, train_loss=math.nan))
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [r["round"] for r in records if r["kind"] == "round"] == [1, 2, 3]
    assert records[-1]["train_loss"] is None
    assert records[-1]["regions"]["us-east-1"]["bytes_up"] == 1_550_000
    assert records[0]["kind"] == "run_started"
    assert records[0]["simulation"] is True


def progress(**changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "region": "us-east-1",
        "round": 1,
        "step": 5,
        "steps": 10,
        "tokens": 100,
        "loss": 4.5,
        "tokens_per_s": 3200.0,
    }
    return Progress(**{**fields, **changes})


def test_the_board_follows_a_round(job: JobConfig, tmp_path: Path) -> None:
    now = 0.0
    board = Board(job, tmp_path, clock=lambda: now)

    def tell(kind: str, **fields: Any) -> None:
        board.on_event(Event(now, kind, fields))

    def states() -> list[str]:
        return [stand.state for stand in board.regions.values()]

    assert (board.phase, states()) == ("starting Ray", ["waiting", "waiting"])
    tell("run_started", simulation=True, resumed_round=None)
    tell("region_starting", region=NAMES[0], attempt=1)
    assert (board.phase, states()) == ("starting regions", ["starting", "waiting"])
    for name in NAMES:
        tell("region_ready", region=name, eval_loss=5.6)
    tell("round_started", round=1, attempt=1, regions=NAMES)
    board.on_progress(progress())
    board.on_progress(progress(round=0, step=9))  # late: of another round
    assert (board.phase, states(), board.regions[NAMES[0]].step) == ("training", ["training"] * 2, 5)
    assert 0.2 < board.done < 0.3
    assert board.left_s is None
    tell("region_finished", region=NAMES[0], train_loss=4.0)
    assert (board.phase, states()) == ("training", ["done", "training"])
    tell("region_late", region=NAMES[1], round=1)
    assert (board.phase, states()) == ("merging", ["done", "late"])
    tell("round_merged", round=1)
    assert (board.phase, states()) == ("applying", ["applying", "late"])
    now = 10.0
    board.on_round(row(1))
    assert (board.phase, board.committed, board.done) == ("checkpointing", 1, 1.0)
    assert board.left_s == pytest.approx(230.0)
    tell("checkpoint_committed", round=1)
    assert board.phase == "committed"
    assert board.notices == ("europe-west4 missed the deadline of round 1",)
    tell("run_finished", rounds=1)
    assert board.phase == "finished"


def test_a_region_without_room_says_what_it_waits_for(job: JobConfig, tmp_path: Path) -> None:
    """On the board and the screen while it waits; a line in a log for each change."""
    missing = "pool 0: waits for 2 x {CPU: 1} (PACK) on nodes with labels a=b: no such node yet"
    waits = Event(0.0, "placement_waiting", {"region": NAMES[0], "missing": missing})
    found = Event(1.0, "placement_waiting", {"region": NAMES[0], "missing": None})
    assert event_line(waits) == f"{NAMES[0]}: {missing}"
    assert event_line(found) == f"{NAMES[0]}: there is room now; loading torch, DeepSpeed"
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    view = LiveView(job, tmp_path, console)
    view.on_event(waits)
    assert view.board.regions[NAMES[0]].state == "no room yet"
    assert list(view.board.missing.values()) == [f"{NAMES[0]}: {missing}"]
    screen = Console(file=io.StringIO(), width=80, color_system=None)
    screen.print(view.render())
    assert isinstance(screen.file, io.StringIO)
    assert "waits for 2 x {CPU: 1}" in screen.file.getvalue()
    view.on_event(found)
    assert (view.board.regions[NAMES[0]].state, view.board.missing) == ("starting", {})
    view.close()


def test_a_cluster_that_was_joined_insecurely_is_told_of(job: JobConfig, tmp_path: Path) -> None:
    line = "insecure: the Ray cluster at 192.0.2.7 has no TLS or no token"
    for exposed, shown in (("192.0.2.7", True), (None, False)):
        event = Event(0.0, "run_started", {"simulation": True, "resumed_round": None, "exposed": exposed})
        plain, screen = io.StringIO(), io.StringIO()
        PlainView(job, tmp_path, plain).on_event(event)
        view = LiveView(job, tmp_path, Console(file=io.StringIO(), width=120, force_terminal=True))
        view.on_event(event)
        Console(file=screen, width=120, color_system=None).print(view.render())
        view.close()
        assert (line in plain.getvalue()) is shown
        assert (line in screen.getvalue()) is shown


def test_the_board_of_a_resumed_run_counts_earlier_bytes(job: JobConfig, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.round(row(1))
        log.round(row(2))
    board = Board(job, tmp_path)
    board.on_event(Event(0.0, "run_started", {"resumed_round": 2}))
    assert board.committed == 2
    assert board.regions["us-east-1"].bytes_up == 3_100_000
    assert board.phase == "starting regions"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_screen_fits_its_terminal(job: JobConfig, tmp_path: Path, width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=24, force_terminal=True, color_system=None)
    view = LiveView(job, tmp_path / "a_run", console)
    with RunLog(tmp_path / "a_run", [view]) as log:
        play(log, rounds=2)
        log.event("round_started", round=3, attempt=1, rounds=24, regions=NAMES)
        log.progress(progress(round=3, step=4))
        view.stopping()
        screen = Console(file=io.StringIO(), width=width, color_system=None)
        screen.print(view.render())
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    if width >= 80:
        for part in (
            "round 3/24",
            "training 4/10",
            "aws",
            "3.2k",
            "4.50",
            "3.1 MB",
            "tried again",
            "stopping",
        ):
            assert part in text
        assert "simulation: all regions share this cluster; nothing isolates them" in text
    assert "round 2/24  train 2.41" in stream.getvalue()


def test_which_view_fits_an_output(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a pipe that wants colours is still a pipe
    assert isinstance(text_view(job, tmp_path, Console(file=io.StringIO())), PlainView)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        view = text_view(job, tmp_path, Console(file=terminal))
        view.close()
        assert isinstance(view, LiveView)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(text_view(job, tmp_path, Console(file=terminal)), PlainView)
    os.close(master)


def closing(**changes: Any) -> list[str]:
    fields: dict[str, Any] = {
        "run_dir": Path("runs/my run"),
        "job_arguments": ["job.yaml", "--set", "rounds=24"],
        "rows": [row(1), row(2)],
        "rounds": 24,
        "finished": False,
        "reason": "interrupted",
        "eval_loss_start": 5.6,
        "eval_loss_end": 2.8,
        "seconds": 65.0,
    }
    return closing_lines(**{**fields, **changes})


def test_closing_of_a_stopped_run_says_how_to_go_on() -> None:
    assert closing() == [
        "stopped after round 2/24 (interrupted), 1 m 05 s",
        "  eval loss   5.60 -> 2.80 (-50 %)",
        "  trained on  116k tokens",
        "  network     6.2 MB up, 6.2 MB down",
        "  results     'runs/my run'",
        "next",
        "  xcloud train job.yaml --set rounds=24 --resume 'runs/my run'",
        "  xcloud status 'runs/my run'",
        "  xcloud export 'runs/my run' OUT",
        "  tensorboard --logdir 'runs/my run/tensorboard'",
    ]


def test_closing_of_a_finished_run() -> None:
    lines = closing(finished=True, reason="", rounds=2, eval_loss_start=None, eval_loss_end=None)
    assert lines[0] == "finished 2 rounds in 1 m 05 s"
    assert lines[1] == "  eval loss   not measured"
    assert not any("--resume" in line for line in lines)


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_epsilon_is_shown_with_its_unit_wherever_it_stands(tmp_path: Path) -> None:
    job = parse_job(JOB, ["dp={unit: example, noise_multiplier: 1.0}", "inner.clip_norm=null"])
    spent = PrivacyRow(unit="example", epsilon=2.3817, delta=1e-5)
    less = spent.model_copy(update={"epsilon": 1.5})
    names = dict(zip(NAMES, (spent, less), strict=True))
    private = row(
        1,
        privacy=spent,
        train_loss=math.nan,
        regions={n: row(1).regions[n].model_copy(update={"privacy": p}) for n, p in names.items()},
    )
    assert "epsilon 2.38 per example" in round_line(private, 24)
    assert "  privacy     epsilon 2.38 per example at delta 1e-05" in closing(rows=[private])
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    view = LiveView(job, tmp_path / "run", console)
    with RunLog(tmp_path / "run", [view]) as log:
        play(log, rounds=0)
        log.round(private)
        text = shown(view.render())
    for part in ("eps/example", "2.38", "1.5"):
        assert part in text
    record = status_record(tmp_path / "run")
    assert record["privacy"] == {"unit": "example", "epsilon": 2.3817, "delta": 1e-5}
    assert record["regions"][NAMES[1]]["privacy"]["epsilon"] == 1.5
    assert "epsilon 2.38 per example at delta 1e-05" in shown(status_view(tmp_path / "run"))
    ready = {"region": "a", "seconds": 1.0, "parameters": 10, "pools": [[rank(0)]]}
    ready["privacy"] = {"unit": "example", "noise_multiplier": 1.0712}
    line = event_line(Event(0.0, "region_ready", ready))
    assert line is not None
    assert "noise multiplier 1.07 (unit: example)" in line


def test_what_a_job_amounts_to(job: JobConfig) -> None:
    record = job_record(job)
    assert [region["tokens_per_round"] for region in record["regions"]] == [8 * 32 * 10, 8 * 32 * 10]
    assert record["tokens"] == 24 * record["tokens_per_round"] == 24 * 5120
    text = shown(job_summary(job))
    assert "demo  llama, from scratch" in text
    assert "2 x cpu, ZeRO 1, fp32, 8 seq/step" in text


def test_status_of_a_run_under_way(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        play(log, rounds=2)
        record, text = status_record(tmp_path), shown(status_view(tmp_path))
    json.dumps(record, allow_nan=False)
    assert (record["state"], record["round"], record["rounds"]) == ("running", 2, 24)
    assert record["tokens"] == 116_000
    assert record["regions"]["us-east-1"]["bytes_up"] == 3_100_000
    assert record["checkpoint"]["round"] == 2
    for part in (
        "demo  running  round 2/24",
        "eval loss 2.55 (round 1) -> 2.55 (round 2)",
        "! round 2 tried again",
    ):
        assert part in text
    assert "--resume" not in text


def test_status_of_a_run_that_failed_before_its_first_round(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        play(log, rounds=0)
        log.event("run_failed", reason="PlacementError: no room")
    text = shown(status_view(tmp_path))
    assert "demo  failed  round 0/24" in text
    assert "reason: PlacementError: no room" in text
    assert f"xcloud train JOB --resume {tmp_path}" in text.replace("\n", "")


def costs(number: int, *, known: bool = True) -> CostRow:
    part = RegionCost(
        accelerator_hours=2.0,
        core_hours=0.0,
        instance_hours=0.25,
        machines_usd=1.5 if known else None,
        egress_bytes=10**9,
        egress_usd=0.09,
    )
    return CostRow(
        seconds=900.0,
        machines_usd=3.0 if known else 1.5,
        egress_usd=0.18,
        spent_usd=3.18 * number,
        unpriced=() if known else ("machines of europe-west4",),
        egress={"gcp/europe-west4 -> aws/us-east-1": 2 * 10**9},
        regions={"us-east-1": part.model_copy(update={"machines_usd": 1.5}), "europe-west4": part},
    )


@pytest.mark.parametrize(
    ("usd", "said"),
    [
        (0.0, "$0.00"),
        (12.345, "$12.35"),
        (1234.5, "$1,234"),
        (0.01234, "$0.0123"),
        (0.5, "$0.500"),
        (None, "unknown"),
    ],
)
def test_dollars_for_people(usd: float | None, said: str) -> None:
    assert human_usd(usd) == said


def test_a_sum_that_lacks_a_price_says_so() -> None:
    assert human_usd(2.0, whole=False) == ">= $2.00"
    assert human_usd(0.0, whole=False) == "unknown"
    assert "cost >= $1.68" in round_line(row(3, cost=costs(1, known=False)), 24)
    assert "cost $3.18" in round_line(row(3, cost=costs(1)), 24)
    assert "cost" not in round_line(row(3), 24)


def closing_of(reason: str, spent: Spent | None, budget: float | None) -> list[str]:
    return closing(finished=not reason, reason=reason, cost=spent, budget_usd=budget)


def test_the_closing_lines_say_what_it_cost_and_what_to_raise() -> None:
    spent = Spent().plus(costs(1), 3.18)
    assert "  cost        $3.18 (machines $3.00, egress $0.180)" in closing_of("", spent, None)
    lines = closing_of("budget", spent, 5.0)
    assert any(
        "$5.00 (cost.budget_usd) is not enough for another round, of about $3.18" in line for line in lines
    )
    assert (
        "  xcloud train job.yaml --set rounds=24 --set cost.budget_usd=MORE --resume 'runs/my run'" in lines
    )
    unknown = Spent().plus(costs(1, known=False), 3.18)
    assert any(
        "cost        >= $1.68 (machines $1.50, egress $0.180; no price: machines of europe-west4)" in line
        for line in closing_of("", unknown, None)
    )
    assert not any("cost" in line for line in closing_of("", None, None))


def test_the_live_view_has_a_column_and_a_line_of_costs(job: JobConfig) -> None:
    paid = job.model_copy(update={"cost": CostConfig(budget_usd=100.0)})
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    view = LiveView(paid, Path("runs/x"), console)
    view.close()
    view.on_round(row(1, cost=costs(1)))
    view.on_round(row(2, cost=costs(2)))
    console.print(view.render())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "spent $6.36 of $100.00, $3.18 in the last round" in shown
    assert re.search(r"europe-west4 .* \$3\.18\s*$", shown, re.MULTILINE)  # its two rounds
    view.on_round(row(3, cost=costs(3, known=False)))
    assert view.board.regions["europe-west4"].usd is None
    assert view.board.regions["us-east-1"].usd == pytest.approx(4.77)


def test_status_tells_hours_and_dollars(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.event("run_started", job="demo", rounds=24, regions=NAMES)
        log.round(row(1, cost=costs(1)))
        log.round(row(2, cost=costs(2)))
    Spent().plus(costs(1), 3.18).plus(costs(2), 3.18).keep(tmp_path)
    record = status_record(tmp_path)
    assert record["cost"]["usd"] == pytest.approx(6.36)
    assert record["cost"]["accelerator_hours"] == 8.0
    assert record["regions"]["europe-west4"]["cost"]["machines_usd"] == 3.0
    console = Console(file=io.StringIO(), width=140)
    console.print(status_view(tmp_path))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cost $6.36: machines $6.00, egress $0.360" in shown
    assert "8 accelerator-hours, 0 core-hours, 1 instance-hours" in shown


def test_rows_from_before_costs_were_booked_are_still_read(tmp_path: Path) -> None:
    old = json.loads(row(1).model_dump_json())
    del old["cost"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    assert read_rounds(tmp_path)[0].cost is None


def test_a_driver_that_is_not_at_the_hub_is_a_notice() -> None:
    event = Event(0.0, "hub_elsewhere", {"place": "gcp/europe-west4", "hub": "aws/us-east-1"})
    assert event.kind in NOTICE_KINDS
    line = event_line(event) or ""
    assert line.startswith(
        "egress is billed as if updates met in aws/us-east-1, but the driver runs in gcp/europe-west4"
    )

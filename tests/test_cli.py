"""The command line, with real files and a fake driver.

The fake stands in for `xcloud.launch` and `xcloud.export`, which would load Ray
and torch: these tests are about the wiring around them.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xcloud.cli import app
from xcloud.config import JobConfig
from xcloud.errors import QuorumError
from xcloud.metrics import RegionRow, RoundRow, RunLog, read_events, read_rounds
from xcloud.quiet import apply_quiet, quiet_environment

JOB = """
name: demo
rounds: 3
sequence_length: 32
model: {config: {model_type: llama}}
inner: {steps: 10}
regions:
  - {name: a, cloud: aws, data: {type: stdlib, kind: modules}, pools: [{workers: 2, micro_batch: 4}]}
"""


@dataclass(frozen=True)
class Outcome:
    rounds: int
    finished: bool
    reason: str
    eval_loss_start: float | None
    eval_loss_end: float | None


class FakeDriver(types.ModuleType):
    """`xcloud.launch` without training: it reports rounds, and runs `hook` before each."""

    def __init__(self) -> None:
        super().__init__("xcloud.launch")
        self.calls: list[dict[str, Any]] = []
        self.hook: Callable[[int, threading.Event], None] = lambda number, stop: None

    def train(self, job: JobConfig, **arguments: Any) -> Outcome:
        self.calls.append({"job": job, **arguments})
        log, stop = arguments["log"], arguments["stop"]
        first = len(read_rounds(arguments["run_dir"])) + 1
        last = min(job.rounds, arguments["stop_after"] or job.rounds)
        log.event(
            "run_started", job=job.name, rounds=job.rounds, regions=["a"], resumed_round=first - 1 or None
        )
        number = first - 1
        for number in range(first, last + 1):
            self.hook(number, stop)
            log.round(round_row(number))
            log.event("checkpoint_committed", round=number, path="p")
            if stop.is_set():
                break
        finished = number == job.rounds
        reason = "" if finished else "interrupted" if stop.is_set() else "stop-after"
        log.event("run_finished" if finished else "run_stopped", rounds=number, reason=reason)
        return Outcome(number, finished, reason, 5.0, 2.5)


def round_row(number: int) -> RoundRow:
    common: dict[str, Any] = {
        "tokens": 10,
        "train_loss": 2.0,
        "eval_loss": 2.5,
        "bytes_up": 1,
        "bytes_down": 1,
        "compute_s": 1.0,
        "sync_s": 0.1,
    }
    region = RegionRow(**common, tokens_per_s=1.0, update_norm=1.0, cursor=1)
    return RoundRow(**common, round=number, attempt=1, regions={"a": region}, model_digest="d")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """The fake driver in place of the real one, in an empty folder with a `job.yaml`."""
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "xcloud.launch", fake)
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    return fake


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_train_runs_the_job_and_says_what_to_do_next(driver: FakeDriver) -> None:
    result = run("train", "job.yaml", "--set", "rounds=2", "--address", "auto")
    assert result.exit_code == 0, result.output
    (call,) = driver.calls
    assert call["job"].rounds == 2
    assert (call["run_dir"], call["address"], call["resume"], call["stop_after"]) == (
        Path("runs/demo"),
        "auto",
        False,
        None,
    )
    assert "round 2/2  train 2.00" in result.stdout
    assert "eval loss   5.00 -> 2.50 (-50 %)" in result.stdout
    assert "xcloud export runs/demo OUT" in result.stdout
    assert [row.round for row in read_rounds("runs/demo")] == [1, 2]


def test_train_takes_the_next_free_folder(driver: FakeDriver) -> None:
    Path("runs/demo-2").mkdir(parents=True)  # empty: as good as new
    folders = []
    for _ in range(3):
        assert run("train", "job.yaml").exit_code == 0
        folders.append(driver.calls[-1]["run_dir"])
    assert folders == [Path("runs/demo"), Path("runs/demo-2"), Path("runs/demo-3")]


def test_a_run_that_never_started_leaves_its_folder_free(driver: FakeDriver) -> None:
    def refuse(*arguments: Any, **more: Any) -> Outcome:
        raise QuorumError("nobody came")

    played = driver.train
    driver.train = refuse  # type: ignore[method-assign]
    assert run("train", "job.yaml").exit_code == 1
    driver.train = played  # type: ignore[method-assign]
    assert run("train", "job.yaml").exit_code == 0
    assert driver.calls[-1]["run_dir"] == Path("runs/demo")


def test_an_explicit_folder_with_a_run_is_refused(driver: FakeDriver) -> None:
    assert run("train", "job.yaml", "--run-dir", "mine").exit_code == 0
    result = run("train", "job.yaml", "--set", "rounds=4", "--run-dir", "mine")
    assert result.exit_code == 2
    assert "xcloud train job.yaml --set rounds=4 --resume mine" in result.stderr
    assert len(driver.calls) == 1


@pytest.mark.parametrize("named", ["demo", "runs/demo"])
def test_stop_after_and_resume(driver: FakeDriver, named: str) -> None:
    stopped = run("train", "job.yaml", "--stop-after", "1")
    assert stopped.exit_code == 0
    assert "stopped after round 1/3 (stop-after)" in stopped.stdout
    assert "xcloud train job.yaml --resume runs/demo" in stopped.stdout
    resumed = run("train", "job.yaml", "--resume", named)
    assert resumed.exit_code == 0
    assert "resuming after round 1" in resumed.stdout
    assert driver.calls[-1]["resume"] is True
    assert driver.calls[-1]["run_dir"] == Path("runs/demo")
    assert [row.round for row in read_rounds("runs/demo")] == [1, 2, 3]


def test_resume_of_an_unknown_run_names_the_nearest(driver: FakeDriver) -> None:
    run("train", "job.yaml")
    result = run("train", "job.yaml", "--resume", "demmo")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: demmo: no run there")
    assert "did you mean 'runs/demo'?" in result.stderr
    assert run("train", "job.yaml", "--resume", "demo", "--run-dir", "x").exit_code == 2


def test_a_run_is_written_by_one_process_at_a_time(driver: FakeDriver) -> None:
    run("train", "job.yaml", "--stop-after", "1")
    with RunLog("runs/demo"):
        result = run("train", "job.yaml", "--resume", "demo")
    assert result.exit_code == 1
    assert "another process is writing this run" in result.stderr


def test_json_is_all_there_is_on_stdout(driver: FakeDriver) -> None:
    result = run("train", "job.yaml", "--json")
    kinds = [json.loads(line)["kind"] for line in result.stdout.splitlines()]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("round") == 3


def test_an_error_is_one_line_and_says_how_to_go_on(driver: FakeDriver) -> None:
    def fail(number: int, stop: threading.Event) -> None:
        if number == 2:
            raise QuorumError("round 2: 0 of 1 regions answered")

    driver.hook = fail
    result = run("train", "job.yaml")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "round 1 is saved; continue with: xcloud train job.yaml --resume runs/demo",
        "error: round 2: 0 of 1 regions answered",
    ]


def test_a_traceback_is_shown_when_asked_for(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCLOUD_TRACEBACK", "1")
    result = run("validate", "nowhere.yaml")
    assert type(result.exception).__name__ == "ConfigError"


def test_an_unexpected_exception_keeps_its_traceback(driver: FakeDriver) -> None:
    def fail(number: int, stop: threading.Event) -> None:
        raise ZeroDivisionError

    driver.hook = fail
    assert isinstance(run("train", "job.yaml").exception, ZeroDivisionError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_after_the_round(
    driver: FakeDriver, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def interrupt(round_: int, stop: threading.Event) -> None:
        # As Ray does when it starts: the handler has to come back with the next event.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        driver.calls[-1]["log"].event("region_ready", region="a")
        os.kill(os.getpid(), number)
        assert stop.is_set()

    driver.hook = interrupt
    result = run("train", "job.yaml")
    assert result.exit_code == 130
    assert "stopped after round 1/3 (interrupted)" in result.stdout
    assert "press Ctrl-C again to stop now" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_the_second_signal_stops_at_once(driver: FakeDriver) -> None:
    def interrupt(number: int, stop: threading.Event) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    driver.hook = interrupt
    result = run("train", "job.yaml")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "round 1 is saved; continue with: xcloud train job.yaml --resume runs/demo",
        "interrupted",
    ]
    assert [row.round for row in read_rounds("runs/demo")] == [1]
    assert read_events("runs/demo")[-1].kind == "checkpoint_committed"


def test_validate(driver: FakeDriver) -> None:
    result = run("validate", "job.yaml", "--set", "inner.steps=5")
    assert result.exit_code == 0
    assert "job.yaml is valid" in result.stdout
    record = json.loads(run("validate", "job.yaml", "--json").stdout)
    assert record["valid"] is True
    assert record["tokens"] == 3 * 8 * 32 * 10


def test_validate_of_a_wrong_job(driver: FakeDriver) -> None:
    result = run("validate", "job.yaml", "--set", "inner.stepz=5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["error: job.yaml: inner.stepz: unknown key; did you mean 'steps'?"]


def test_status(driver: FakeDriver) -> None:
    run("train", "job.yaml")
    assert "demo  finished  round 3/3" in run("status", "demo").stdout
    record = json.loads(run("status", "runs/demo", "--json").stdout)
    assert (record["state"], record["round"], record["tokens"]) == ("finished", 3, 30)
    missing = run("status", "nowhere")
    assert missing.exit_code == 2
    assert "known runs: demo" in missing.stderr


@dataclass(frozen=True)
class ExportSummary:
    out: Path
    round: int
    parameters: int
    files: list[str]


def test_export(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("xcloud.export")

    def export_run(run_dir: Path, out: Path, round: int | None = None) -> ExportSummary:
        assert run_dir == Path("runs/demo")
        return ExportSummary(out, round or 3, 650_000, ["model.safetensors"])

    fake.export_run = export_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xcloud.export", fake)
    run("train", "job.yaml")
    text = run("export", "demo", "out").stdout
    assert text.startswith("round 3, 650,000 parameters, in out\n")
    assert "AutoModelForCausalLM.from_pretrained('out')" in text
    record = json.loads(run("export", "demo", "out", "--round", "2", "--json").stdout)
    assert record == {"out": "out", "round": 2, "parameters": 650_000, "files": ["model.safetensors"]}


def test_usage_errors_and_version() -> None:
    assert run("train").exit_code == 2
    assert run("train", "job.yaml", "--stop-after", "0").exit_code == 2
    assert run("--version").stdout.startswith("xcloud ")


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "-m", "xcloud", "--help"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "export" in shown.stdout
    # Processor time: wall time would measure what else the machine is doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    script = """if True:
        import sys, xcloud.cli
        xcloud.cli._load("jobs/three_clouds.yaml", [])
        heavy = {"torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "tensorboard"}
        print(sorted(heavy & set(sys.modules)))
    """
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert loaded.stdout.strip() == "[]"


def test_libraries_are_quiet_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info"})
    apply_quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "DS_ACCELERATOR" not in quiet_environment()


def test_a_run_that_ends_for_its_budget_fails_and_says_what_to_raise(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it was to stop early anyway."""
    played = driver.train

    def train(job: JobConfig, **arguments: Any) -> Outcome:
        return replace(played(job, **arguments), finished=False, reason="budget")

    monkeypatch.setattr(driver, "train", train)
    result = run("train", "job.yaml", "--set", "cost.budget_usd=5", "--stop-after", "2")
    assert result.exit_code == 1
    assert "error: runs/demo: another round would exceed cost.budget_usd" in result.stderr

"""The run folder's records: written, read back, rewound, damaged."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xcloud.cost.bill import CostRow, RegionCost
from xcloud.errors import XCloudError
from xcloud.messages import Progress, RankInfo
from xcloud.metrics import (
    Event,
    RegionRow,
    RoundRow,
    RunLog,
    holds_run,
    read_events,
    read_rounds,
    run_state,
)

KEYS = "round train_loss eval_loss tokens bytes_up bytes_down compute_s sync_s regions"


def region_row(**changes: Any) -> RegionRow:
    fields: dict[str, Any] = {
        "tokens": 100,
        "train_loss": 2.5,
        "eval_loss": 2.25,
        "tokens_per_s": 50.0,
        "bytes_up": 1000,
        "bytes_down": 2000,
        "compute_s": 2.0,
        "sync_s": 0.5,
        "update_norm": 1.5,
        "cursor": 7,
    }
    return RegionRow(**{**fields, **changes})


def row(number: int, **changes: Any) -> RoundRow:
    fields: dict[str, Any] = {
        "round": number,
        "attempt": 1,
        "train_loss": 3.0 - number / 10,
        "eval_loss": 3.5 - number / 10,
        "tokens": 200,
        "bytes_up": 2000,
        "bytes_down": 4000,
        "compute_s": 2.0,
        "sync_s": 0.5,
        "regions": {"a": region_row(), "b": region_row(eval_loss=None)},
        "model_digest": f"digest-{number}",
    }
    return RoundRow(**{**fields, **changes})


class Recorder:
    """A listener that keeps what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[object] = []
        self.closed = 0
        self.error = error

    def on_event(self, event: Event) -> None:
        self._keep(event)

    def on_round(self, row: RoundRow) -> None:
        self._keep(row)

    def on_progress(self, progress: Progress) -> None:
        self._keep(progress)

    def close(self) -> None:
        self.closed += 1

    def _keep(self, what: object) -> None:
        self.told.append(what)
        if self.error:
            raise self.error


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads from a run folder: tag -> step -> value."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {point.step: point.value for point in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def test_rows_and_events_round_trip(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.event("run_started", job="j", rounds=2)
        log.round(row(1))
        log.round(row(2))
        log.event("run_finished", rounds=2, eval_loss=3.3, seconds=1.0)
    assert read_rounds(tmp_path / "run") == [row(1), row(2)]
    assert [event.kind for event in read_events(tmp_path / "run")] == ["run_started", "run_finished"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert set(KEYS.split()) <= set(json.loads(lines[0]))


def test_a_number_that_does_not_exist_is_null_in_every_file(tmp_path: Path) -> None:
    nan = math.nan
    silent = row(1, train_loss=nan, eval_loss=nan, regions={"a": region_row(train_loss=nan, update_norm=nan)})
    with RunLog(tmp_path) as log:
        log.round(silent)
        log.event("region_ready", eval_loss=nan, pools=[[{"loss": math.inf}]])
    for name in ("metrics.jsonl", "events.jsonl"):
        text = (tmp_path / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        json.loads(text)
    (back,) = read_rounds(tmp_path)
    assert back.eval_loss is None
    assert math.isnan(back.train_loss)
    assert read_events(tmp_path)[0].fields == {"eval_loss": None, "pools": [[{"loss": None}]]}
    assert "loss/eval" not in scalars(tmp_path)


def test_event_fields_become_plain_json(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    rank = RankInfo(
        rank=0, node="n", device="cpu", parameter_bytes=1, optimizer_state_bytes=2, owned_chunks=3
    )
    with RunLog(tmp_path) as log:
        log.event("x", path=Path("a/b"), count=numpy.int64(3), loss=numpy.float32(0.5), pools=((rank,),))
    fields = read_events(tmp_path)[0].fields
    assert fields["path"] == "a/b"
    assert fields["count"] == 3
    assert fields["loss"] == 0.5
    assert fields["pools"][0][0]["optimizer_state_bytes"] == 2


def test_every_line_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.event("round_started", round=1)
    log.round(row(1))
    assert [event.kind for event in read_events(tmp_path)] == ["round_started"]
    assert read_rounds(tmp_path) == [row(1)]
    log.close()


def test_rewind_drops_uncommitted_rows_and_appends(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for number in (1, 2, 3):
            log.round(row(number))
    with RunLog(tmp_path) as log:
        log.rewind(1)
        assert read_rounds(tmp_path) == [row(1)]
        log.round(row(2, train_loss=9.0))
    assert [(r.round, r.train_loss) for r in read_rounds(tmp_path)] == [(1, 2.9), (2, 9.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_rewind_to_zero_forgets_everything(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.round(row(1))
        log.rewind(0)
        assert read_rounds(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"round": 3, "att', b"\0\0\0\0", b'{"round"'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    with RunLog(tmp_path) as log:
        log.event("run_started", rounds=3)
        log.round(row(1))
        log.round(row(2))
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    assert read_rounds(tmp_path) == [row(1), row(2)]
    assert len(read_events(tmp_path)) == 1
    with RunLog(tmp_path) as log:
        log.event("run_started", rounds=3)
        log.round(row(3))
    assert read_rounds(tmp_path) == [row(1), row(2), row(3)]
    assert len(read_events(tmp_path)) == 2


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1).model_dump_json())
    assert read_rounds(tmp_path) == [row(1)]
    with RunLog(tmp_path) as log:
        log.round(row(2))
    assert read_rounds(tmp_path) == [row(1), row(2)]


def test_damage_elsewhere_names_file_and_line(tmp_path: Path) -> None:
    good = row(1).model_dump_json()
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{good[:40]}\n{good}\n")
    with pytest.raises(XCloudError, match=r"metrics\.jsonl:2: damaged record"):
        read_rounds(tmp_path)
    with RunLog(tmp_path) as log, pytest.raises(XCloudError, match=r"metrics\.jsonl:2"):
        log.rewind(1)
    (tmp_path / "metrics.jsonl").write_text(good.replace('"tokens":200', '"tokens":"many"') + "\n")
    with pytest.raises(XCloudError, match=r"metrics\.jsonl:1: damaged record: tokens: "):
        read_rounds(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"time": 1.0}\n')
    with pytest.raises(XCloudError, match=r"events\.jsonl:1"):
        read_events(tmp_path)


def test_listeners_hear_everything_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    progress = Progress(region="a", round=1, step=1, steps=2, tokens=10, loss=None, tokens_per_s=5.0)
    with RunLog(tmp_path, [recorder]) as log:
        log.event("round_started", round=1)
        log.progress(progress)
        log.round(row(1))
    kinds = [type(what).__name__ for what in recorder.told]
    assert kinds == ["Event", "Progress", "RoundRow"]
    assert recorder.closed == 1


def test_a_listener_whose_pipe_broke_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    broken, healthy = Recorder(BrokenPipeError()), Recorder()
    with RunLog(tmp_path, [broken, healthy]) as log:
        log.event("a")
        log.event("b")
    assert len(broken.told) == 1
    assert len(healthy.told) == 2
    with RunLog(tmp_path, [Recorder(ValueError("a bug"))]) as log, pytest.raises(ValueError, match="a bug"):
        log.event("c")


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.round(row(1))
        log.round(row(2))
    read = scalars(tmp_path)
    assert read["loss/train"] == pytest.approx({1: 2.9, 2: 2.8})
    assert read["loss/eval"] == pytest.approx({1: 3.4, 2: 3.3})
    assert read["tokens"] == {1: 200, 2: 200}
    assert read["bytes/up"] == {1: 2000, 2: 2000}
    assert read["a/eval_loss"] == {1: 2.25, 2: 2.25}
    assert "b/eval_loss" not in read
    assert read["b/tokens_per_s"] == {1: 50.0, 2: 50.0}


def test_tensorboard_reads_costs_and_an_unknown_price_is_no_number(tmp_path: Path) -> None:
    part = {
        "accelerator_hours": 2.0,
        "core_hours": 0.0,
        "instance_hours": 0.25,
        "egress_bytes": 10,
        "egress_usd": 0.09,
    }
    regions = {"a": RegionCost(machines_usd=1.5, **part), "b": RegionCost(machines_usd=None, **part)}
    cost = CostRow(
        seconds=9.0,
        machines_usd=1.5,
        egress_usd=0.18,
        spent_usd=3.25,
        unpriced=("machines of b",),
        regions=regions,
    )
    with RunLog(tmp_path) as log:
        log.round(row(1, cost=cost))
    assert read_rounds(tmp_path)[0].cost == cost
    found = scalars(tmp_path)
    assert found["cost/spent_usd"] == {1: 3.25}
    assert found["a/cost/machines_usd"] == {1: 1.5}
    assert "b/cost/machines_usd" not in found


def test_tensorboard_forgets_rewound_rounds(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for number in (1, 2, 3):
            log.round(row(number))
    with RunLog(tmp_path) as log:
        log.rewind(1)
        log.round(row(2, train_loss=9.0))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path)["loss/train"] == pytest.approx({1: 2.9, 2: 9.0})


def test_a_log_that_was_never_written_to_leaves_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    assert not holds_run(tmp_path)


def test_two_writers_of_one_run_are_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.event("run_started")
        with pytest.raises(XCloudError, match="another process is writing this run"):
            RunLog(tmp_path)
    with RunLog(tmp_path):
        pass


def started(log: RunLog, **changes: Any) -> None:
    fields = {"job": "j", "rounds": 4, "pid": os.getpid(), "host": socket.gethostname(), "regions": ["a"]}
    log.event("run_started", **{**fields, **changes})


@pytest.mark.parametrize(
    ("kind", "fields", "state"),
    [
        ("run_finished", {"rounds": 4}, "finished"),
        ("run_stopped", {"round": 2, "reason": "asked to"}, "stopped"),
        ("run_failed", {"reason": "quorum"}, "failed"),
    ],
)
def test_state_of_a_run_that_ended(tmp_path: Path, kind: str, fields: dict[str, Any], state: str) -> None:
    with RunLog(tmp_path) as log:
        started(log)
        log.round(row(1))
        log.round(row(2))
        log.event(kind, **fields)
    found = run_state(tmp_path)
    assert (found.state, found.round, found.rounds) == (state, 2, 4)
    assert found.reason == fields.get("reason", "")
    assert found.age_s is not None
    assert found.age_s < 60


def test_state_of_a_run_without_an_ending(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # exited, but not yet reaped: a zombie
    with RunLog(tmp_path) as log:
        log.event("run_stopped", round=0, reason="an earlier start")
        started(log)
        assert run_state(tmp_path).state == "running"
        started(log, pid=gone.pid)
        assert run_state(tmp_path).state == "died"
        gone.wait()
        assert run_state(tmp_path).state == "died"
        started(log, host="elsewhere")
        assert run_state(tmp_path).state == "unknown"


def test_state_of_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(XCloudError, match="no run here"):
        run_state(tmp_path)

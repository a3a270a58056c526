"""A resumed run is the same run, bit for bit: after a stop, after kill -9 of the driver, after a rank dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import ROUNDS, Finished, Killer, play
from tests.e2e.test_equivalence import committed_model
from xcloud.checkpoint import CheckpointStore
from xcloud.cluster_region import ClusterRegion
from xcloud.errors import CheckpointError
from xcloud.metrics import Event, read_events, read_rounds


def test_three_rounds_and_three_more_equal_six(finished: Finished, tmp_path: Path) -> None:
    """Weights, outer momentum, inner moments, cursors and totals: every file digest in the commit is equal."""
    raw = finished.raw
    assert play(raw, tmp_path / "run", stop_after=3).round == 3
    assert play(raw, tmp_path / "run", resume=True) == finished.record
    assert [row.round for row in read_rounds(tmp_path / "run")] == list(range(1, ROUNDS + 1))
    with pytest.raises(CheckpointError, match=r"seed = 5, now 6"):
        play(raw | {"seed": 6}, tmp_path / "run", resume=True)


def test_kill_9_of_the_driver_mid_round(finished: Finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with command_line(finished.raw, tmp_path, run_dir) as driver:
        wait_for_round(run_dir, 4, driver)
        os.kill(driver.pid, signal.SIGKILL)
    assert CheckpointStore(run_dir / "checkpoints").rounds()[-1] < ROUNDS
    assert play(finished.raw, run_dir, resume=True) == finished.record


def test_ctrl_c_ends_with_a_checkpoint_and_other_pools_may_go_on(finished: Finished, tmp_path: Path) -> None:
    """One SIGINT, in a job that saves at its end only; then the same regions, with their pools swapped."""
    run_dir = tmp_path / "run"
    raw = finished.raw | {"checkpoint": {"every": 0}}
    with command_line(raw, tmp_path, run_dir) as driver:
        wait_for_round(run_dir, 2, driver)
        os.kill(driver.pid, signal.SIGINT)
        assert driver.wait(120) == 130
    stopped = CheckpointStore(run_dir / "checkpoints").rounds()[-1]
    assert 2 <= stopped < ROUNDS
    assert read_events(run_dir)[-1].fields["reason"] == "interrupted"
    pair, single = raw["regions"]
    swapped = [
        pair | {"pools": [{"workers": 1, "zero_stage": 3, "micro_batch": 4}]},
        single | {"pools": [{"workers": 3, "zero_stage": 1, "micro_batch": 1}]},
    ]
    record = play(raw | {"regions": swapped}, run_dir, resume=True)
    assert record.regions["pair"].cursor == finished.record.regions["pair"].cursor
    moved = committed_model(run_dir) - committed_model(finished.run_dir)
    assert abs(moved).max() < 2e-5  # the same sequences in each step, summed in another order


@contextmanager
def command_line(raw: dict[str, Any], folder: Path, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`xcloud train` of a job in a process of its own."""
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "xcloud", "train", str(job), "--run-dir", str(run_dir)]
    with (folder / "stderr").open("wb") as stderr:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def wait_for_round(run_dir: Path, round: int, driver: subprocess.Popen[bytes]) -> None:
    """Until the run is inside `round`."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert driver.poll() is None, (run_dir.parent / "stderr").read_text()
        if (run_dir / "events.jsonl").exists():
            events = read_events(run_dir)
            if any(e.kind == "round_started" and e.fields["round"] == round for e in events):
                return
        time.sleep(0.02)
    raise AssertionError(f"round {round} did not start")


def test_a_region_that_dies_below_quorum_redoes_its_round(
    finished: Finished, tmp_path: Path, handles: dict[str, ClusterRegion]
) -> None:
    """Quorum is all: the round is retried, and the run ends as if nothing had happened."""
    assert play(finished.raw, tmp_path / "run", Killer(handles, "pair", 3)) == finished.record
    kinds = [(e.kind, e.fields.get("round")) for e in read_events(tmp_path / "run")]
    assert kinds.count(("region_failed", 3)) == 1
    assert ("round_retried", 3) in kinds
    assert ("region_rejoined", 3) in kinds


def test_a_region_that_dies_above_quorum_misses_a_round_and_rejoins(
    finished: Finished, tmp_path: Path, handles: dict[str, ClusterRegion]
) -> None:
    """Quorum is one: the other region commits alone, and the lost one comes back to the committed model."""
    raw = finished.raw | {"rounds": 200, "failure": {"quorum": 1}}
    stopper = StopAfterRejoin()
    record = play(raw, tmp_path / "run", Killer(handles, "single", 2), stopper, stop=stopper.stop)
    rows = {row.round: row for row in read_rounds(tmp_path / "run")}
    assert list(rows[2].regions) == ["pair"]
    assert set(rows[record.round].regions) == {"pair", "single"}
    contributed = [row for row in rows.values() if "single" in row.regions]
    assert (
        record.regions["single"].cursor == len(contributed) * 2 * 3
    )  # its data went on where it had stopped


class StopAfterRejoin:
    """Listener that stops the run one round after a region came back."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.back = False

    def on_event(self, event: Event) -> None:
        self.back = self.back or event.kind == "region_rejoined"

    def on_round(self, row: Any) -> None:
        if self.back:
            self.stop.set()

    def on_progress(self, progress: Any) -> None: ...

    def close(self) -> None: ...

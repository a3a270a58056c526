"""Regions that wait for room say so in the run's log, once for each new state."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import xcloud.fleet
from xcloud.errors import PlacementError
from xcloud.fleet import Fleet
from xcloud.metrics import RunLog, read_events
from xcloud.policies import FailureConfig


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class Waiting:
    """A region handle that starts once its script of what is missing has been told."""

    def __init__(self, name: str, script: list[Any]) -> None:
        self.name, self.script = name, script
        self.started: Future[Any] = Future()

    def start(self, evaluate: bool) -> Future[Any]:
        return self.started

    def waiting(self) -> Future[Any]:
        if not self.script:
            self.started.set_exception(PlacementError("the end of the script"))
            return done(None)
        return done(self.script.pop(0))

    def kill(self) -> None: ...


def told(folder: Path, script: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(xcloud.fleet, "WAITING_S", 0.0)
    monkeypatch.setattr(xcloud.fleet, "TICK_S", 0.001)
    with RunLog(folder, ()) as log:
        fleet = Fleet(["r"], lambda name: Waiting(name, script), FailureConfig(), log)  # type: ignore[arg-type]
        with pytest.raises(PlacementError, match="the end of the script"):
            fleet.start(evaluate=False)
    return [e.fields["missing"] for e in read_events(folder) if e.kind == "placement_waiting"]


def test_each_new_state_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [None, "no node", "no node", "one is launched", "one is launched", None, None]
    assert told(tmp_path, script, monkeypatch) == ["no node", "one is launched", None]


def test_a_region_that_finds_room_at_once_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(tmp_path, [None, None], monkeypatch) == []


def test_not_being_able_to_say_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, ["no node", RuntimeError("no GCS"), None], monkeypatch) == ["no node", None]

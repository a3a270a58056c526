"""Following a job over a connection that breaks, and where a token may be sent. A real cluster: tests/e2e/test_submit.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobStatus

from xcloud.cloud.jobs import JobService, record_of
from xcloud.errors import ConfigError, PlacementError


class Client:
    """A Jobs API whose log connections break: after so many chunks each, in so many ways."""

    def __init__(self, chunks: list[str], breaks: list[tuple[int, Exception]]) -> None:
        self.chunks, self.breaks = chunks, breaks

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        after, error = self.breaks.pop(0) if self.breaks else (len(self.chunks), None)
        for chunk in self.chunks[:after]:
            yield chunk
        if error is not None:
            raise error

    def get_job_info(self, job_id: str) -> Any:
        status = JobStatus.RUNNING if self.breaks else JobStatus.FAILED
        return SimpleNamespace(status=status, driver_exit_code=3, message="it failed", metadata={})


def service(client: Client, monkeypatch: pytest.MonkeyPatch) -> JobService:
    monkeypatch.setattr("xcloud.cloud.jobs.JobSubmissionClient", lambda address: client)
    monkeypatch.setattr("xcloud.cloud.jobs.POLL_S", 0.0)
    return JobService("http://127.0.0.1:8265")


def test_each_line_is_told_once_however_often_the_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = ["one\ntw", "o\n", "three\nfo", "ur"]
    breaks = [
        (2, aiohttp.ServerDisconnectedError()),
        (3, RuntimeError("WebSocket connection closed unexpectedly")),
        (1, ConnectionResetError()),
    ]
    lines: list[str] = []
    end = service(Client(chunks, list(breaks)), monkeypatch).follow("job", lines.append)
    assert lines == ["one", "two", "three", "four"]
    assert (end.exit_code, end.status, end.message) == (3, "failed", "it failed")


def test_a_cluster_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Client(["one\n"], [(0, aiohttp.ClientPayloadError("gone"))] * 50)
    with pytest.raises(
        PlacementError, match="does not answer any more: gone; the job may go on: xcloud logs job"
    ):
        service(broken, monkeypatch).follow("job", lambda line: None)


@pytest.mark.parametrize("address", ["http://192.0.2.7:8265", "http://nobody.invalid:8265"])
def test_a_token_does_not_cross_a_network_in_the_clear(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"would cross the network in the clear.*tunnel"):
        JobService(address)
    monkeypatch.setattr("xcloud.cloud.jobs.JobSubmissionClient", lambda found: found)
    assert JobService(address, insecure=True).address == address
    JobService("https://192.0.2.7")


def test_an_address_of_the_cluster_itself_is_not_that_of_its_dashboard() -> None:
    with pytest.raises(ConfigError, match="expected the dashboard's URL"):
        JobService("127.0.0.1:6379")


def test_records_are_told_from_text() -> None:
    assert record_of('{"kind": "round", "round": 1}') == {"kind": "round", "round": 1}
    for text in ("error: no such file", "{torn", '{"no": "kind"}', '["kind"]'):
        assert record_of(text) is None

"""What a machine's metadata service says of its end, from real answers on loopback."""

from __future__ import annotations

import datetime as dt
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from xcloud.cloud.preemption import Notice, notice, watch


class Service(BaseHTTPRequestHandler):
    """Answers by path: status and text; 404 for all else. It insists on the headers that clouds insist on."""

    answers: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []
    needs: ClassVar[dict[str, tuple[str, str]]] = {
        "/computeMetadata/v1/instance/preempted": ("Metadata-Flavor", "Google"),
        "/metadata/scheduledevents?api-version=2020-07-01": ("Metadata", "true"),
        "/latest/meta-data/spot/instance-action": ("X-aws-ec2-metadata-token", "a-token"),
    }

    def do_PUT(self) -> None:
        self.asked.append(("PUT", self.path))
        if self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            self.reply(200, "a-token")
        else:
            self.reply(400, "")

    def do_GET(self) -> None:
        self.asked.append(("GET", self.path))
        header, value = self.needs[self.path]
        if self.headers[header] != value:
            self.reply(401, "")
        elif self.path in self.answers:
            self.reply(200, self.answers[self.path])
        else:
            self.reply(404, "not found")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002


@pytest.fixture
def service() -> Iterator[str]:
    Service.answers, Service.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def soon(seconds: float) -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=seconds)


def test_aws(service: str) -> None:
    assert notice("aws", service) is None
    at = soon(120).strftime("%Y-%m-%dT%H:%M:%SZ")
    Service.answers["/latest/meta-data/spot/instance-action"] = json.dumps(
        {"action": "terminate", "time": at}
    )
    told = notice("aws", service)
    assert told is not None
    assert 110 < told.seconds <= 120
    assert told.reason == f"AWS will terminate this spot instance at {at}"
    assert ("PUT", "/latest/api/token") in Service.asked


def test_gcp(service: str) -> None:
    Service.answers["/computeMetadata/v1/instance/preempted"] = "FALSE"
    assert notice("gcp", service) is None
    Service.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert notice("gcp", service) == Notice(30.0, "Google Cloud preempts this spot VM")


@pytest.mark.parametrize(
    "events", [[], [{"EventType": "Freeze", "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}]]
)
def test_azure_has_other_events(service: str, events: list[dict[str, str]]) -> None:
    path = "/metadata/scheduledevents?api-version=2020-07-01"
    Service.answers[path] = json.dumps({"DocumentIncarnation": 1, "Events": events})
    assert notice("azure", service) is None
    at = soon(30).strftime("%a, %d %b %Y %H:%M:%S GMT")
    events = [*events, {"EventType": "Preempt", "NotBefore": at}]
    Service.answers[path] = json.dumps({"DocumentIncarnation": 2, "Events": events})
    told = notice("azure", service)
    assert told is not None
    assert 20 < told.seconds <= 30
    assert at in told.reason


def test_the_watch_asks_on_until_there_is_a_notice(service: str) -> None:
    found: list[Notice] = []

    def later() -> None:
        Service.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"

    timer = threading.Timer(0.3, later)
    timer.start()
    watch("gcp", found.append, service, poll_s=0.05)
    timer.join()
    assert [one.seconds for one in found] == [30.0]
    assert len(Service.asked) > 2


def test_a_service_that_is_not_there_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class EnoughError(Exception):
        pass

    asked = []

    def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            raise EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xcloud.cloud.preemption.time.sleep", sleep)
        with pytest.raises(EnoughError):
            watch("aws", lambda told: None, "http://127.0.0.1:9", poll_s=0.01)
    assert sum("does not answer" in record.message for record in caplog.records) == 1

"""What a machine's metadata service says of its end, from real answers on loopback."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from xcloud.cloud.preemption import Notice, main, notice, watch, watched
from xcloud.errors import ConfigError

ROOT = Path(__file__).parents[2]


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


SPOT = {"ray.io/market-type": "spot", "cloud": "gcp"}


def test_a_node_is_watched_by_its_labels() -> None:
    assert watched("auto", SPOT, spot_only=True) == "gcp"
    assert watched("aws", SPOT, spot_only=True) == "aws"
    assert watched("azure", {}, spot_only=False) == "azure"
    for labels in ({}, SPOT | {"ray.io/market-type": "on-demand"}):
        assert watched("auto", labels, spot_only=True) is None
    with pytest.raises(
        ConfigError, match="label cloud of this node is 'lab'; expected one of aws, azure, gcp"
    ):
        watched("auto", SPOT | {"cloud": "lab"}, spot_only=True)


@pytest.mark.parametrize(("market", "drained"), [("spot", ["ab"]), ("on-demand", [])])
def test_the_command_drains_a_spot_node_and_leaves_others(
    market: str, drained: list[str], service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, which says only which node this is; draining for real: tests/e2e/test_preemption.py."""
    Service.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    nodes = [
        {"NodeID": "cd", "Labels": {"ray.io/market-type": "spot", "cloud": "aws"}},
        {"NodeID": "ab", "Labels": {"ray.io/market-type": market, "cloud": "gcp"}},
    ]
    context = SimpleNamespace(get_node_id=lambda: "ab", gcs_address="10.0.0.1:6379")
    fake = SimpleNamespace(init=lambda **_: None, nodes=lambda: nodes, get_runtime_context=lambda: context)
    found: list[str] = []
    monkeypatch.setattr("xcloud.cloud.preemption.ray", fake)
    monkeypatch.setattr("xcloud.cloud.preemption.drain", lambda address, node, told: found.append(node))
    main(["auto", "--spot-only", "--metadata-url", service])
    assert found == drained


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "multi_cloud"])
def test_cluster_files_start_the_watch_beside_ray(name: str, tmp_path: Path) -> None:
    """bash runs the shipped command; programs that stand in for ray and python say what they were given."""
    raw = yaml.safe_load((ROOT / "clusters" / f"{name}.yaml").read_text(encoding="utf-8"))
    bin_ = tmp_path / ".xcloud" / "venv" / "bin"
    bin_.mkdir(parents=True)
    done = tmp_path / "done"
    os.mkfifo(done)
    for program in ("ray", "python"):
        (bin_ / program).write_text(
            f'#!/bin/sh\necho "{program} $* $RAY_USE_TLS $RAY_AUTH_MODE $RAY_TLS_CA_CERT" >> "$HOME/words"\n'
            + ("" if program == "ray" else f"echo > {done}\n")
        )
        (bin_ / program).chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"}
    command = raw["worker_start_ray_commands"][-1]
    subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
    done.read_text()  # ends when the one in the background has run
    secured = f"1 token {tmp_path}/.xcloud/keys/ca.crt"
    assert (tmp_path / "words").read_text().splitlines() == [
        f"ray start --address=10.0.0.1:6379 --object-manager-port=8076 {secured}",
        f"python -m xcloud.cloud.preemption auto --spot-only {secured}",
    ]

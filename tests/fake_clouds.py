"""Clouds on one machine: Ray's fake multi-node provider, several times in one cluster, behind the composite provider.

Their nodes are real raylets. A cloud's API and its capacity fail by files in its control folder, since its provider
runs inside Ray's monitor process. The head, its monitor and all nodes carry a mark in their environment, by which
`FakeClouds` finds and ends them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler._private.util import prepare_config

from xcloud.cloud.composite import CompositeNodeProvider
from xcloud.quiet import quiet_environment

REPOSITORY = Path(__file__).parents[1]
MARK = "XCLOUD_TEST_CLUSTER"
IP = "127.0.0.1"
STORE_BYTES = 100 << 20

ALL_KEYS: dict[str, Any] = {
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
"""What Ray fills in for its own providers, and asks for in the file of any other."""

_LAUNCH = threading.Lock()


class FakeCloud(FakeMultiNodeProvider):
    """One of several: node ids of its own (`id_base`), the head only at `home`, failures by file.

    `down` in the control folder: its API does not answer. `full-TYPE`: it has no node of this type; the text says why.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._next_node_id = provider_config["id_base"]
        self._control = Path(provider_config["control"])
        if not provider_config.get("home"):
            self._nodes.pop(self._head_node_id)
        else:
            self._nodes[self._head_node_id]["tags"]["ray-user-node-type"] = "head"

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self._answer()
        nodes = dict(self._nodes)  # without the lock that a launch holds for seconds, as no real API does
        return [node for node, facts in nodes.items() if tag_filters.items() <= facts["tags"].items()]

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._nodes[node_id]["tags"])

    def is_running(self, node_id: str) -> bool:
        return node_id in self._nodes

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._nodes

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._nodes[node_id]["tags"].update(tags)

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, *rest: Any
    ) -> None:
        self._answer()
        full = self._control / f"full-{tags['ray-user-node-type']}"
        if full.exists():
            raise RuntimeError(full.read_text())
        super().create_node_with_resources_and_labels(node_config, tags, count, *rest)

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], *rest: Any
    ) -> None:
        with _LAUNCH:  # Ray hands a new node its id through os.environ
            # Listed before its raylet joins, as machines are; else Ray books it as somebody else's node.
            node = f"{FAKE_HEAD_NODE_ID[:-5]}{self._next_node_id + 1:05d}"
            self._nodes[node] = {"tags": dict(tags)}
            try:
                super()._create_node_with_resources_and_labels(node_config, tags, *rest)
            except BaseException:
                del self._nodes[node]
                raise

    def _answer(self) -> None:
        if (self._control / "down").exists():
            raise ConnectionError("the fake API does not answer")


class FakeClouds:
    """A head with an autoscaler over fake clouds.

    Attributes:
        address: of the Ray cluster.
        environment: of every process that joins.
    """

    def __init__(
        self, folder: Path, node_types: dict[str, Any], idle_s: float = 25.0, **provider: Any
    ) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind((IP, 0))
            port = probe.getsockname()[1]
        self.address = f"{IP}:{port}"
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.mark = secrets.token_hex(8)
        self.environment = (
            os.environ
            | quiet_environment()
            | {
                MARK: self.mark,
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
            }
        )
        names = sorted({t["node_config"]["_cloud"] for t in node_types.values()})
        self._controls = {name: folder / "control" / name for name in names}
        for control in self._controls.values():
            control.mkdir(parents=True)
        self.config = self._config(node_types, idle_s, provider)

    def _config(self, node_types: dict[str, Any], idle_s: float, provider: dict[str, Any]) -> Path:
        limits = provider.pop("limits", {})
        clouds = {
            name: {
                "provider": {
                    "type": "external",
                    "module": "tests.fake_clouds.FakeCloud",
                    "home": number == 0,
                    "id_base": 10000 * (number + 1),
                    "launch_multiple": True,
                    "gcs_address": self.address,
                    "control": str(control),
                },
                "qualify_ids": False,
                **limits.get(name, {}),
            }
            for number, (name, control) in enumerate(self._controls.items())
        }
        home = next(iter(clouds))
        head = {"resources": {"CPU": 1}, "labels": {"ray.io/region": "hub"}, "node_config": {"_cloud": home}}
        workers = {
            name: {"min_workers": 0, "max_workers": 3, **settings} for name, settings in node_types.items()
        }
        cluster = {
            "cluster_name": "fake",
            "max_workers": 8,
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                "type": "external",
                "module": "xcloud.cloud.composite.CompositeNodeProvider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "retry_first_s": 1.0,
                "retry_most_s": 4.0,
                "home": home,
                "clouds": clouds,
                **provider,
            },
            "available_node_types": {"head": {**head, "max_workers": 0}, **workers},
            "head_node_type": "head",
            **ALL_KEYS,
        }
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(CompositeNodeProvider.bootstrap_config(prepare_config(cluster))))
        return path

    def up(self) -> None:
        """Start the head."""
        ray = Path(sys.executable).with_name("ray")
        command = [
            str(ray),
            "start",
            "--head",
            "--block",
            f"--port={self.address.split(':')[1]}",
            "--num-cpus=1",
        ]
        command += [f"--node-ip-address={IP}", "--include-dashboard=false", "--disable-usage-stats"]
        command += ["--labels=ray.io/region=hub", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--autoscaling-config={self.config}"]
        log = self.folder / "head.log"
        environment = self.environment | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": "head",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        with log.open("wb") as file:
            self._head = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        until(lambda: b"Ray runtime started" in log.read_bytes(), 120, lambda: log.read_text()[-2000:])

    def down(self) -> None:
        """End every process that carries this cluster's mark."""
        for _ in range(5):
            marked = list(self._marked())
            if not marked:
                break
            for process in marked:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(marked, timeout=10)
        self._head.wait(10)

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    yield process
            except psutil.Error:
                continue

    def raylets(self) -> dict[str, psutil.Process]:
        """Those of all nodes but the head, by Ray's node id."""
        found = {}
        for process in self._marked():
            try:
                node = process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "")
                if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                    found[node] = process
            except psutil.Error:
                continue
        return {node: process for node, process in found.items() if node != FAKE_HEAD_NODE_ID}

    def fail(self, cloud: str, how: str, reason: str = "") -> None:
        """From now on, the cloud is `down`, or `full-TYPE`."""
        (self._controls[cloud] / how).write_text(reason)

    def heal(self, cloud: str, how: str) -> None:
        """It is not any more."""
        (self._controls[cloud] / how).unlink()

    def nodes(self, cloud: str) -> list[str]:
        """Ids of the cloud's worker nodes whose raylets run."""
        base = 1 + list(self._controls).index(cloud)
        return [node for node in self.raylets() if int(node[-5:]) // 10000 == base]

    def monitor_log(self) -> str:
        """What the autoscaler has logged."""
        session = next(
            argument.split("=", 1)[1]
            for process in self._marked()
            for argument in process.cmdline()
            if argument.startswith("--logs-dir=")
        )
        lines = (Path(session) / "monitor.log").read_text().splitlines()
        return "\n".join(line for line in lines if "empty legacy field" not in line)


@contextmanager
def fake_clouds(folder: Path, node_types: dict[str, Any], **options: Any) -> Iterator[FakeClouds]:
    """A cluster for a while."""
    folder.mkdir(parents=True, exist_ok=True)
    clouds = FakeClouds(folder, node_types, **options)
    try:
        clouds.up()
        yield clouds
    except BaseException:
        print(clouds.monitor_log())
        raise
    finally:
        clouds.down()


def until(true: Callable[[], Any], seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds:.0f} s: {told()}"
        time.sleep(0.1)


def node_type(cloud: str, region: str, **more: Any) -> dict[str, Any]:
    """A small worker type of one cloud."""
    labels = {"ray.io/region": region, "cloud": cloud, **more.pop("labels", {})}
    config = {"_cloud": cloud, **more.pop("node_config", {})}
    resources = {"CPU": 1, "object_store_memory": STORE_BYTES}
    return {"resources": resources, "labels": labels, "node_config": config, **more}


def told(value: Any) -> str:
    """For assertion messages."""
    return json.dumps(value, indent=1, default=str)

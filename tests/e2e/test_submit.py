"""The same job through `ray job submit` on a running Ray cluster with two labelled nodes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.factory import raw_job, region
from xcloud.cloud.certificates import ClusterKeys, Node, addresses_here
from xcloud.metrics import read_events, read_rounds

REPOSITORY = Path(__file__).parents[2]


NODES = ("us-east-1", "europe-west4")

SERVE = """
import json, sys
from ray.cluster_utils import Cluster
port, *agents = map(int, sys.argv[1].split(","))
head = dict(num_cpus=int(sys.argv[2]), include_dashboard=True, dashboard_port=port, labels={"ray.io/region": "hub"})
cluster = Cluster(initialize_head=True, head_node_args=head | {"dashboard_agent_listen_port": agents.pop()})
ids = {}
for name in sys.argv[3:]:
    options = {"labels": {"ray.io/region": name}, "dashboard_agent_listen_port": agents.pop()}
    ids[name] = cluster.add_node(num_cpus=2, **options).node_id
print(json.dumps({"url": "http://" + cluster.webui_url, "ids": ids}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Served:
    """A cluster in a process of its own."""

    url: str
    ids: dict[str, str]
    environment: dict[str, str]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Served]:
    """A head with a dashboard and one node for each of two regions."""
    with served(tmp_path, 2, *NODES) as cluster:
        yield cluster


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Served]:
    """A head alone: nodes of one machine share the folder that working directories are unpacked in, and delete each other's."""
    with served(tmp_path, 6) as cluster:
        yield cluster


@contextmanager
def served(tmp_path: Path, cpus: int, *names: str) -> Iterator[Served]:
    """A cluster with TLS and a token, since it is not on loopback.

    A submitted driver joins the Ray that was started last on its machine, so nothing else may start one meanwhile. Ray reads these variables when it is first imported, so the cluster has its own process.
    """
    keys = ClusterKeys(tmp_path / "keys")
    keys.make([Node("node", tuple(addresses_here()))], days=1)
    environment = os.environ | {
        **keys.variables("node"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ports = ",".join(map(str, free_ports(2 + len(names))))  # another Ray may run on this machine
    command = [sys.executable, "-c", SERVE, ports]
    with subprocess.Popen(
        [*command, str(cpus), *names],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            lines = (line for line in server.stdout if line.startswith("{"))
            facts = json.loads(next(lines))
            yield Served(facts["url"], facts["ids"], environment)
        finally:
            server.stdin.close()
            server.wait(60)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def test_ray_job_submit(cluster: Served, tmp_path: Path) -> None:
    """Regions land on the nodes that carry their labels; the exit status and the log come back."""
    regions = [
        region(
            tmp_path / "data", name, seed, {"workers": 1, "micro_batch": 2, "labels": {"ray.io/region": name}}
        )
        for seed, name in enumerate(NODES, 1)
    ]
    package = tmp_path / "package"
    package.mkdir()
    shutil.copytree(REPOSITORY / "xcloud", package / "xcloud", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "job.yaml").write_text(yaml.safe_dump(raw_job(tmp_path, regions, rounds=2)))
    run_dir = tmp_path / "run"
    done = submit(cluster, package, "train", "job.yaml", "--run-dir", str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row.round for row in read_rounds(run_dir)] == [1, 2]
    assert "round 2/2" in done.stdout
    nodes = {
        e.fields["region"]: e.fields["pools"] for e in read_events(run_dir) if e.kind == "region_sharding"
    }
    assert set(nodes) == set(NODES)
    for name in NODES:
        assert nodes[name][0][0]["node"].endswith(cluster.ids[name][:12])
    wrong = submit(cluster, package, "train", "job.yaml", "--set", "inner.stps=1")
    assert wrong.returncode != 0
    assert "did you mean 'steps'" in wrong.stdout + wrong.stderr


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    """A working directory with a job; the data stays where it is."""
    pool = {"workers": 1, "micro_batch": 2}
    regions = [region(tmp_path / "data", name, seed, pool) for seed, name in enumerate(NODES, 1)]
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(raw_job(tmp_path, regions, **changes)))
    return folder


@pytest.mark.slow
def test_xcloud_submit(head: Served, tmp_path: Path) -> None:
    """Two runs side by side, seen from here; one is stopped with a checkpoint and goes on; a failure has its reason and its code."""
    folder = folder_of(tmp_path, rounds=3)
    home = tmp_path / "runs"

    def xcloud(*words: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "xcloud", *words, "--address", head.url]
        end = time.monotonic() + 90
        while True:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
                env=head.environment,
                cwd=folder,
            )
            if "No available agent" not in done.stderr or time.monotonic() > end:
                break
            time.sleep(1)
        assert done.returncode == expected, done.stdout + done.stderr
        return done

    begun = xcloud(
        "submit",
        "job.yaml",
        "--no-wait",
        "--json",
        "--ship",
        "--run-dir",
        str(home / "long"),
        "--set",
        "rounds=400",
    )
    long = json.loads(begun.stdout)
    assert long["run_dir"] == str(home / "long")
    beside = xcloud("submit", "job.yaml", "--ship", "--run-dir", str(home / "short"))
    assert "round 3/3" in beside.stdout
    assert f"results     {home / 'short'} on the head" in beside.stdout
    assert [row.round for row in read_rounds(home / "short")] == [1, 2, 3]
    states = {job["run_dir"]: job for job in json.loads(xcloud("jobs", "--json").stdout)}
    assert states[str(home / "short")]["status"] == "succeeded"
    assert states[str(home / "long")]["status"] == "running"

    stopped = json.loads(xcloud("stop", long["id"], "--json").stdout)
    assert stopped["status"] == "stopped"
    kinds = [event.kind for event in read_events(home / "long")]
    assert kinds[-2:] == ["checkpoint_committed", "run_stopped"]  # it ended its round
    last = read_rounds(home / "long")[-1].round
    assert 0 < last < 400
    more = ["--set", f"rounds={last + 1}", "--json"]
    resumed = xcloud("submit", "job.yaml", "--ship", "--resume", long["id"], *more)
    records = [json.loads(line) for line in resumed.stdout.splitlines()]
    assert [r["round"] for r in records if r["kind"] == "round"] == [last + 1]
    assert records[-1]["kind"] == "run_finished"

    wrong = xcloud("submit", "job.yaml", "--ship", "--set", "regions.0.data.paths=/nowhere/*.txt", expected=1)
    assert "/nowhere/*.txt" in wrong.stderr
    assert "knows no such job" in xcloud("logs", "nobody", expected=1).stderr


def submit(cluster: Served, package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir package -- python -m xcloud ...`, waiting for its end."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", cluster.url, "--working-dir", str(package), "--"]
    command += ["python", "-m", "xcloud", *arguments]
    end = time.monotonic() + 90
    while True:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=cluster.environment
        )
        if "No available agent" not in done.stderr or time.monotonic() > end:  # the head's agent starts last
            return done
        time.sleep(1)

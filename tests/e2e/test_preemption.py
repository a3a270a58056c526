"""A spot node is taken away with notice, on real raylets: the round ends early, counts, and the region moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.factory import raw_job, region
from xcloud.metrics import read_events, read_rounds

SERVE = """
import json, sys
from ray.cluster_utils import Cluster
from xcloud.cloud.preemption import Notice, drain
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, labels={"ray.io/region": "hub"}))
print(json.dumps({"address": cluster.address}), flush=True)
nodes = {}
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "add":
        for name in order["names"]:
            node = cluster.add_node(num_cpus=1, labels={"ray.io/region": name})
            nodes[node.node_id] = node
    elif order["do"] == "drain":
        drain(cluster.address, order["node"], Notice(60.0, "a test takes it away"))
    else:
        cluster.remove_node(nodes[order["node"]])
    print(json.dumps(list(nodes)), flush=True)
cluster.shutdown()
"""
Order = Callable[..., list[str]]


@pytest.mark.slow
def test_a_region_leaves_its_node_before_that_goes(tmp_path: Path) -> None:
    spot = {"workers": 1, "micro_batch": 2, "market": "spot", "labels": {"ray.io/region": "a"}}
    stays = {"workers": 1, "micro_batch": 2, "labels": {"ray.io/region": "b"}}
    regions = [
        region(tmp_path / "data", name, seed, pool)
        for seed, (name, pool) in enumerate((("a", spot), ("b", stays)), 1)
    ]
    inner = {"steps": 600, "optimizer": {"type": "adamw", "lr": 1e-3}}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(raw_job(tmp_path, regions, rounds=3, inner=inner)))
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def order(**what: Any) -> list[str]:
            server.stdin.write(json.dumps(what) + "\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            return list(json.loads(next(line for line in server.stdout or () if line.startswith("["))))

        try:
            facts = json.loads(next(line for line in server.stdout if line.startswith("{")))
            command = [
                sys.executable,
                "-m",
                "xcloud",
                "train",
                str(job),
                "--run-dir",
                str(run_dir),
                "--json",
                "--insecure",
            ]
            environment = os.environ | {"RAY_ADDRESS": facts["address"]}
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
                watchdog = threading.Timer(400, run.kill)
                watchdog.start()
                try:
                    left = follow(run, order)
                finally:
                    watchdog.cancel()
                    run.kill() if run.poll() is None else None
            assert run.returncode == 0
        finally:
            server.stdin.close()
            server.wait(60)
    events, rows = read_events(run_dir), read_rounds(run_dir)
    assert [e.fields["region"] for e in events if e.kind == "region_leaving"] == ["a"]
    assert not [e for e in events if e.kind in ("region_failed", "round_retried")]
    assert [sorted(row.regions) for row in rows] == [["a", "b"]] * 3
    whole = 600 * 2 * 32
    assert 0 < rows[0].regions["a"].tokens < whole  # what it had trained counts
    assert [row.regions["a"].tokens for row in rows[1:]] == [whole] * 2
    assert (
        rows[0].regions["a"].cursor == rows[0].regions["a"].tokens // 32
    )  # and the rest is read by the next
    places = [
        e.fields["pools"][0][0]["node"].split(":")[1]
        for e in events
        if e.kind == "region_sharding" and e.fields["region"] == "a"
    ]
    assert len(places) == 2
    assert places[0] == left[:12] != places[1]


def follow(run: subprocess.Popen[str], order: Order) -> str:
    """Bring the nodes up, and take the spot region's away while it trains the first round; returns that node.

    The driver has come before them, so that it and the aggregation actor are at the head, as they should be.
    """
    assert run.stdout is not None
    nodes, left = [], ""
    for line in run.stdout:
        event = json.loads(line)
        if event["kind"] == "run_started":
            nodes = order(do="add", names=["a", "a", "b"])
        if event["kind"] == "region_ready" and event["region"] == "a" and not left:
            place = event["pools"][0][0]["node"].split(":")[1]
            left = next(node for node in nodes if node.startswith(place))
        if event["kind"] == "round_started" and event["round"] == 1:
            time.sleep(1)
            order(do="drain", node=left)
        if event["kind"] == "region_starting" and event["region"] == "a" and event["attempt"] > 1:
            order(do="remove", node=left)
    run.wait(60)
    return left

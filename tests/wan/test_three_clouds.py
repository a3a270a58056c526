"""The main job over three wide-area links: 100 Mbit/s, 80 ms, 0.1 % loss, one raylet in each region's own network.

pytest tests/wan/test_three_clouds.py -m slow -s      shows the figures
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.wan import emulated_wan, why_not
from benchmarks.wan_link import Shape
from xcloud.metrics import read_events, read_rounds

LINK = Shape(rtt_ms=80, rate_mbit_per_s=100, loss_percent=0.1)
ROUNDS = 6
JOB = Path(__file__).parents[2] / "jobs" / "three_clouds.yaml"


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_three_cloud_job_over_wide_area_links(tmp_path: Path) -> None:
    """No region fails; what the links carry is what the ledger counts, plus what protocols add."""
    job = yaml.safe_load(JOB.read_text()) | {"rounds": ROUNDS}
    names = [region["name"] for region in job["regions"]]
    for region in job["regions"]:
        for pool in region["pools"]:
            pool["labels"] = {"site": region["name"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run_dir = tmp_path / "run"
    with emulated_wan(names, LINK) as network:
        command = [sys.executable, "-m", "xcloud", "train", str(tmp_path / "job.yaml")]
        command += ["--address", network.address, "--run-dir", str(run_dir)]
        done = subprocess.run(
            command, env=network.environment, capture_output=True, text=True, check=False, timeout=500
        )
        links = network.cables.statistics()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rounds(run_dir)
    sent = {name: sum(r.regions[name].bytes_up + r.regions[name].bytes_down for r in rows) for name in names}
    between = {
        name: sum(link["carried"] for ends, link in links.items() if name in ends and "hub" not in ends)
        for name in names
    }
    beside = max(names, key=between.__getitem__)  # the region on whose node the aggregation actor is
    crossed = sum(sent.values()) - sent[beside]
    carried = sum(link["carried"] for ends, link in links.items() if "hub" not in ends)
    figures = {
        "sync_s": [round(row.sync_s, 2) for row in rows],
        "compute_s": [round(row.compute_s, 2) for row in rows],
        "ledger_egress_bytes": sum((row.egress_bytes_up or 0) + (row.egress_bytes_down or 0) for row in rows),
        "ledger_bytes_of_the_other_regions": crossed,
        "bytes_between_regions": carried,
        "bytes_from_and_to_the_hub": sum(link["carried"] for link in links.values()) - carried,
        "lost_packets": sum(link["lost"] for link in links.values()),
        "dropped_packets": sum(link["dropped"] for link in links.values()),
    }
    print(json.dumps(figures, indent=1))
    assert [row.round for row in rows] == list(range(1, ROUNDS + 1))
    assert not {e.kind for e in read_events(run_dir)} & {"region_failed", "round_retried", "region_late"}
    assert figures["lost_packets"] > 0
    assert figures["ledger_egress_bytes"] == sum(sent.values())
    if carried > crossed / 2:  # else the actor is at the hub
        assert 1 < carried / crossed < 1.25  # headers, and what was sent again
    else:
        assert sum(link["carried"] for link in links.values()) > sum(sent.values())

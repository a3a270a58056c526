"""One autoscaler, two clouds: real raylets that come, go, fail and die, under a job that trains on them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.factory import raw_job, region
from tests.fake_clouds import FakeClouds, fake_clouds, node_type, until
from xcloud.metrics import Event, read_events, read_rounds

TYPES = {"a_cpu": node_type("a", "us-east-1"), "b_cpu": node_type("b", "europe-west4")}


def two_clouds(folder: Path, **changes: Any) -> dict[str, Any]:
    """A job of one region in each cloud."""
    regions = []
    for seed, (name, cloud) in enumerate({"us-east-1": "a", "europe-west4": "b"}.items(), 1):
        pool = {"workers": 1, "micro_batch": 2, "labels": {"ray.io/region": name}, "placement_timeout_s": 120}
        regions.append(region(folder / "data", name, seed, pool, cloud=cloud))
    return raw_job(folder, regions, **{"rounds": 2, **changes})


@contextmanager
def training(clouds: FakeClouds, raw: dict[str, Any], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`xcloud train --address` in a process of its own."""
    job = clouds.folder / "job.yaml"
    job.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "xcloud", "train", str(job), "--run-dir", str(run_dir)]
    command += ["--address", clouds.address]
    output = clouds.folder / "output"
    with output.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, text=True, env=clouds.environment)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def finish(driver: subprocess.Popen[str], clouds: FakeClouds, seconds: float = 240) -> str:
    """Wait for a good end; returns what the driver has written."""
    code = driver.wait(seconds)
    output = (clouds.folder / "output").read_text()
    assert code == 0, output
    return output


def events(run_dir: Path) -> list[Event]:
    return read_events(run_dir) if (run_dir / "events.jsonl").exists() else []


def missing(run_dir: Path, region: str) -> list[str]:
    """What a region was told to wait for, in order."""
    found = [e.fields for e in events(run_dir) if e.kind == "placement_waiting"]
    return [str(fields["missing"]) for fields in found if fields["region"] == region]


def test_nodes_come_in_both_clouds_and_go_again(tmp_path: Path) -> None:
    """There is only a head; the job brings nodes up in both clouds, trains on them, and they idle away."""
    run_dir = tmp_path / "run"
    with fake_clouds(tmp_path / "clouds", TYPES) as clouds:
        assert clouds.raylets() == {}
        with training(clouds, two_clouds(tmp_path), run_dir) as driver:
            until(lambda: clouds.nodes("a") and clouds.nodes("b"), 120, clouds.monitor_log)
            output = finish(driver, clouds)
        sharding = [e.fields for e in events(run_dir) if e.kind == "region_sharding"]
        ran_on = {fields["region"]: fields["pools"][0][0]["node"].split(":")[1] for fields in sharding}
        until(lambda: not clouds.raylets(), 120, clouds.monitor_log)
    assert [row.round for row in read_rounds(run_dir)] == [1, 2]
    assert set(ran_on) == {"us-east-1", "europe-west4"}
    for told in (missing(run_dir, "us-east-1")[0], output):
        assert "pool 0: waits for 1 x {CPU: 1} (PACK) on nodes with labels ray.io/region=us-east-1" in told
    assert "no such node yet" in output
    assert "1 x a_cpu" in output


@pytest.mark.slow
def test_a_cloud_that_is_down_does_not_stop_the_other(tmp_path: Path) -> None:
    """One API fails from the start: the other cloud's node comes up, the job says what it waits for, and goes on."""
    run_dir = tmp_path / "run"
    with fake_clouds(tmp_path / "clouds", TYPES) as clouds:
        clouds.fail("b", "down")
        until(lambda: "cloud b is down" in clouds.monitor_log(), 60)
        with training(clouds, two_clouds(tmp_path), run_dir) as driver:
            until(lambda: clouds.nodes("a"), 120, clouds.monitor_log)
            until(lambda: any("cloud b is down" in line for line in missing(run_dir, "europe-west4")), 120)
            assert clouds.nodes("b") == []
            clouds.heal("b", "down")
            output = finish(driver, clouds)
    assert "cloud b is down (ConnectionError: the fake API does not answer)" in output
    assert [row.round for row in read_rounds(run_dir)] == [1, 2]
    assert "there is room now" in output


@pytest.mark.slow
def test_a_killed_node_is_replaced(tmp_path: Path) -> None:
    """Its region is lost and restarted on the node that the autoscaler launches in its place."""
    run_dir = tmp_path / "run"
    raw = two_clouds(tmp_path, rounds=4, checkpoint={"every": 1})
    with fake_clouds(tmp_path / "clouds", TYPES) as clouds, training(clouds, raw, run_dir) as driver:
        until(lambda: any(e.kind == "checkpoint_committed" for e in events(run_dir)), 240, clouds.monitor_log)
        (before,) = clouds.nodes("b")
        clouds.raylets()[before].kill()
        until(lambda: [n for n in clouds.nodes("b") if n != before], 120, clouds.monitor_log)
        finish(driver, clouds)
    assert [row.round for row in read_rounds(run_dir)] == [1, 2, 3, 4]
    kinds = [(e.kind, e.fields.get("region")) for e in events(run_dir)]
    assert ("region_failed", "europe-west4") in kinds
    assert ("region_rejoined", "europe-west4") in kinds


@pytest.mark.slow
def test_a_full_market_falls_back_to_the_other(tmp_path: Path) -> None:
    """No spot machine is to be had: a pool that does not pin the market gets one on-demand node, and only one."""
    labels = {"spot": {"ray.io/market-type": "spot"}, "on_demand": {"ray.io/market-type": "on-demand"}}
    price = {"spot": 1.0, "on_demand": 3.0}
    types = {
        f"a_{market}": node_type(
            "a", "us-east-1", labels=labels[market], node_config={"_usd_per_hour": price[market]}
        )
        for market in labels
    }
    run_dir = tmp_path / "run"
    raw = two_clouds(tmp_path)
    raw["regions"] = raw["regions"][:1]
    with fake_clouds(tmp_path / "clouds", types) as clouds:
        clouds.fail("a", "full-a_spot", "no spot capacity")
        with training(clouds, raw, run_dir) as driver:
            until(lambda: clouds.nodes("a"), 120, clouds.monitor_log)
            output = finish(driver, clouds)
        log = clouds.monitor_log()
    assert [row.round for row in read_rounds(run_dir)] == [1, 2]
    assert log.count("launched 1 x a_on_demand instead of a_spot") == 1
    assert "the last launch of a_spot failed: a_spot: RuntimeError: no spot capacity" in output

"""Real training that is billed: what the ledger counts, what a plan makes of it, and a budget that ends it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import play
from tests.factory import job_of, raw_job, region
from xcloud.cost.bill import Spent
from xcloud.cost.model import predict
from xcloud.metrics import read_events, read_rounds
from xcloud.planning import facts_of, measured_in, plan_of
from xcloud.report import human_usd

PRICES = """
left:
  as_of: 2026-01-01
  instances: {node: {cpus: 1, memory_gb: 8, locations: {any: {on_demand: 36.0}}}}
  egress: {any: {same_location: 0, internet: 2.0}}
right:
  as_of: 2026-01-01
  instances: {node: {cpus: 2, memory_gb: 8, locations: {any: {on_demand: 72.0}}}}
  egress: {any: {same_location: 0, internet: 1.0}}
"""


def billed(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two regions in two clouds: one machine of 36 USD an hour, and one of 72."""
    prices = folder / "prices.yaml"
    prices.write_text(PRICES)
    pool = {"workers": 1, "zero_stage": 0, "micro_batch": 2, "instance": "node"}
    regions = [
        region(folder, "here", 1, pool, cloud="left"),
        region(folder, "there", 2, pool | {"workers": 2, "zero_stage": 2}, cloud="right"),
    ]
    cost = {"prices": str(prices)} | changes.pop("cost", {})
    return raw_job(folder, regions, **({"rounds": 4, "codec": "bf16", "cost": cost} | changes))


def test_a_run_is_billed_by_the_clock_and_by_what_it_sent(tmp_path: Path) -> None:
    raw, run_dir = billed(tmp_path), tmp_path / "run"
    began = time.monotonic()
    record = play(raw, run_dir)
    wall_s = time.monotonic() - began
    rows = read_rounds(run_dir)
    for row in rows:
        assert row.cost is not None
        assert row.cost.unpriced == ()
        far = row.regions["there"]
        ways = {"right/there -> left/here": far.bytes_up, "left/here -> right/there": far.bytes_down}
        assert row.cost.egress == ways  # the hub is where the first region is
        sent_usd = far.bytes_up * 1e-9 * 1.0 + far.bytes_down * 1e-9 * 2.0
        assert row.cost.egress_usd == pytest.approx(sent_usd)
        assert row.cost.machines_usd == pytest.approx(108.0 / 3600 * row.cost.seconds)
        assert row.cost.regions["there"].core_hours == pytest.approx(2 * row.cost.seconds / 3600)
    spent = Spent.kept(run_dir)
    assert spent is not None
    booked = math.fsum(row.cost.seconds for row in rows if row.cost is not None)
    assert booked <= spent.seconds < wall_s
    assert record.spent is not None
    assert record.spent.usd <= spent.usd
    # A plan from this run sends the same bytes, and takes about as long as the run did.
    job = job_of(raw)
    planned = plan_of(job, facts_of(job), measured_in(run_dir))
    forecast = predict(planned.scenario, planned.tariff.egress)
    assert sum(forecast.egress.values()) == spent.egress_bytes
    assert forecast.egress_usd == pytest.approx(spent.egress_usd)
    assert forecast.seconds == pytest.approx(spent.seconds, rel=0.25)
    # What ranks hold of Adam's states is what the estimate of memory says, less the masters where something is sharded.
    sharded = {
        e.fields["region"]: e.fields["pools"][0] for e in read_events(run_dir) if e.kind == "region_sharding"
    }
    for name, masters in (("here", 0), ("there", 1)):
        expected = planned.memory[name][0].optimizer_bytes * 2 / (2 + masters)
        for rank in sharded[name]:
            assert rank["optimizer_state_bytes"] == pytest.approx(expected, rel=0.02)
    told = subprocess.run(
        [sys.executable, "-m", "xcloud", "status", str(run_dir), "--json"], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["cost"]["usd"] == pytest.approx(spent.usd)


@pytest.mark.slow
def test_a_budget_ends_a_run_and_a_larger_one_lets_it_go_on(tmp_path: Path) -> None:
    """Through the command line: exit status 1 with what to raise, then 0."""
    raw = billed(tmp_path, rounds=4)
    prices = tmp_path / "prices.yaml"
    # Machines for next to nothing, and dear traffic: what a round costs does not depend on the machine that the test runs on.
    text = (
        prices.read_text()
        .replace("on_demand: 36.0", "on_demand: 0.001")
        .replace("on_demand: 72.0", "on_demand: 0.001")
    )
    prices.write_text(
        text.replace("internet: 2.0", "internet: 1000").replace("internet: 1.0", "internet: 1000")
    )
    job = job_of(raw)
    wire = plan_of(job, facts_of(job), None).scenario.wire
    round_usd = (wire.up + wire.down) / 1e9 * 1000
    raw["cost"]["budget_usd"] = 2.5 * round_usd
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))

    def train(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "xcloud", "train", str(path), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=300,
        )

    run_dir = tmp_path / "run"
    stopped = train("--run-dir", str(run_dir))
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "another round would exceed cost.budget_usd" in stopped.stderr
    assert "--set cost.budget_usd=MORE --resume" in stopped.stdout
    spent = Spent.kept(run_dir)
    assert spent is not None
    assert spent.egress_usd == pytest.approx(2 * round_usd)
    assert read_rounds(run_dir)[-1].round == 2
    again = train("--set", "cost.budget_usd=100", "--resume", str(run_dir))
    assert again.returncode == 0, again.stdout + again.stderr
    more = Spent.kept(run_dir)
    assert more is not None
    assert more.egress_usd == pytest.approx(4 * round_usd)
    assert more.machines_usd > spent.machines_usd
    assert f"cost        {human_usd(more.usd)} (machines" in again.stdout

"""From a job and a run folder to a scenario: model, bytes, speeds, and what else the job could be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from xcloud.cli import app
from xcloud.codecs import CODECS, Frame
from xcloud.config import JobConfig, parse_job
from xcloud.cost.model import predict
from xcloud.errors import ConfigError
from xcloud.ledger import keep_job
from xcloud.metrics import PoolRow, RegionRow, RoundRow
from xcloud.planning import Facts, axes_of, facts_of, measured_in, plan_of, wire_of
from xcloud.prices import Place
from xcloud.secure.primitives import TAG_BYTES
from xcloud.training.models import build_model, trainable

JOB = """
name: planned
rounds: 6
sequence_length: 32
chunk_size: 4096
model:
  config: {model_type: llama, hidden_size: 30, intermediate_size: 45, num_hidden_layers: 2, num_attention_heads: 3,
           num_key_value_heads: 3, max_position_embeddings: 64, tie_word_embeddings: true}
regions:
  - name: us-east-1
    cloud: aws
    data: {type: stdlib, kind: modules}
    pools: [{micro_batch: 4, instance: m7i.xlarge}]
  - name: us-west-2
    cloud: aws
    data: {type: stdlib, kind: tests}
    pools: [{micro_batch: 4, instance: m7i.xlarge}]
  - name: europe-west4
    cloud: gcp
    data: {type: stdlib, kind: reference}
    pools: [{micro_batch: 2, instance: e2-standard-4}, {micro_batch: 2, instance: e2-standard-4}]
inner: {steps: 10}
"""
STEP_TOKENS = 4 * 32


@pytest.fixture(scope="module")
def facts() -> Facts:
    return facts_of(parse_job(JOB))


def job_of(*sets: str) -> JobConfig:
    return parse_job(JOB, sets)


def reload(sets: Sequence[str]) -> JobConfig:
    return job_of(*sets)


def row(number: int, speeds: dict[str, list[float]], steps: int = 10, evaluated: bool = True) -> RoundRow:
    """A round of so many tokens/s in each pool; sync takes 2 seconds."""
    common: dict[str, Any] = {
        "train_loss": 2.0,
        "eval_loss": 2.5 if evaluated else None,
        "bytes_up": 1,
        "bytes_down": 1,
    }
    regions = {}
    for name, rates in speeds.items():
        tokens = steps * STEP_TOKENS // len(rates)
        pools = tuple(PoolRow(tokens=tokens, compute_s=tokens / rate) for rate in rates)
        taken = max(pool.compute_s for pool in pools)
        regions[name] = RegionRow(
            **common,
            tokens=tokens * len(rates),
            tokens_per_s=tokens * len(rates) / taken,
            compute_s=taken,
            sync_s=0.1,
            update_norm=1.0,
            cursor=1,
            pools=pools,
        )
    longest = max(region.compute_s for region in regions.values())
    return RoundRow(
        **common,
        round=number,
        attempt=1,
        tokens=sum(region.tokens for region in regions.values()),
        compute_s=longest,
        sync_s=2.0,
        regions=regions,
        model_digest="d",
    )


SPEEDS = {"us-east-1": [64.0], "us-west-2": [128.0], "europe-west4": [64.0, 32.0]}
"""A step of the regions takes 2, 1 and 2 seconds."""


def write_run(folder: Path, rounds: int = 4, *, first_extra: float = 5.0, retried: int | None = None) -> Path:
    """A run folder as if each round had taken 20 s of training, 2 of sync and 1.5 beside."""
    keep_job(job_of(f"rounds={rounds}"), folder)
    events: list[dict[str, Any]] = [{"time": 1000.0, "kind": "run_started"}]
    rows, now = [], 1030.0
    for number in range(1, rounds + 1):
        rows.append(row(number, SPEEDS))
        events.append({"time": now, "kind": "round_started", "round": number, "attempt": 1})
        if number == retried:
            now += 100
            events.append({"time": now, "kind": "round_retried", "round": number, "attempt": 2})
        now += rows[-1].compute_s + 2.0 + 1.0 + (first_extra if number == 1 else 0.0)
        events.append({"time": now, "kind": "checkpoint_committed", "round": number})
        now += 0.5
    events.append({"time": now + 7.0, "kind": "run_finished"})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in rows))
    return folder


def test_the_layout_is_that_of_the_real_model(facts: Facts) -> None:
    job = job_of()
    real = trainable(build_model(job.model, 257, 0))
    assert facts.parameters == sum(p.numel() for p in real.values())
    assert sum(chunk.length for chunk in facts.layout) == facts.parameters
    assert (facts.shape.hidden, facts.shape.layers, facts.shape.heads, facts.shape.vocab) == (30, 2, 3, 257)


@pytest.mark.parametrize("name", sorted(set(CODECS.names)))
def test_bytes_are_those_of_the_codec(facts: Facts, name: str) -> None:
    config = CODECS.parse(name)
    codec, noise = config.build(), np.random.default_rng(1)
    real = 0
    for chunk in facts.layout:
        values = (1e-3 * noise.standard_normal(chunk.length)).astype(np.float32)
        frame = Frame(members=3, matrices=chunk.matrices)
        if name == "grid":  # its step and its noise come from dp; its width is all that counts here
            real += codec.ring(chunk.length, frame).size
        else:
            real += codec.encode(values, frame).nbytes
    wire = wire_of(job_of(), facts, config, CODECS.parse("bf16"))
    tags = TAG_BYTES * len(facts.layout)
    assert wire.up == pytest.approx(real + tags, rel=0.02)  # sparse codes depend on the values
    if codec.linear and name != "identity":
        assert wire.down == wire.up
    else:
        assert wire.down == 2 * facts.parameters + tags


def test_a_model_of_many_different_chunks_is_sampled(facts: Facts) -> None:
    small = parse_job(JOB, ["chunk_size=1024"])
    fine = facts_of(small)
    assert len({(c.length, c.matrices) for c in fine.layout}) > 16
    wire = wire_of(small, fine, CODECS.parse("bf16"), CODECS.parse("identity"))
    assert wire.up == 2 * fine.parameters + TAG_BYTES * len(fine.layout)
    assert wire.down == 4 * fine.parameters + TAG_BYTES * len(fine.layout)


def test_a_run_is_measured(tmp_path: Path) -> None:
    found = measured_in(write_run(tmp_path / "run"))
    assert found.speeds == {"us-east-1": (64.0,), "us-west-2": (128.0,), "europe-west4": (64.0, 32.0)}
    assert (found.pace.setup_s, found.pace.sync_s) == (30.0, 2.0)
    assert found.pace.else_s == {(True, True): pytest.approx(1.5)}
    assert found.rounds == 3  # the first fills caches


def test_the_same_job_again_takes_as_long_as_it_took(tmp_path: Path, facts: Facts) -> None:
    folder = write_run(tmp_path / "run", rounds=5, first_extra=5.0)
    seconds = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["time"] - 1000.0
    plan = plan_of(job_of("rounds=5"), facts, measured_in(folder))
    assert predict(plan.scenario, plan.tariff.egress).seconds == pytest.approx(seconds, abs=0.01)
    # Twice the rounds: only what a round takes comes on top.
    more = plan_of(job_of("rounds=10"), facts, measured_in(folder))
    assert predict(more.scenario, plan.tariff.egress).seconds == pytest.approx(seconds + 5 * 23.5, abs=0.01)


def test_rounds_that_were_tried_again_measure_nothing(tmp_path: Path) -> None:
    whole = measured_in(write_run(tmp_path / "whole", rounds=6))
    cut = measured_in(write_run(tmp_path / "cut", rounds=6, retried=3))
    assert cut.pace.else_s == whole.pace.else_s
    assert cut.rounds == whole.rounds - 1


def test_only_the_last_start_of_a_run_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "events.jsonl"
    before = [
        {"time": 10.0, "kind": "run_started"},
        {"time": 900.0, "kind": "round_started", "round": 1, "attempt": 1},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in before) + path.read_text())
    assert measured_in(folder).pace.setup_s == 30.0


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["buffer={goal: 2}"], "with 'buffer' a round lasts as long as whoever answers first"),
        (["model.config.hidden_size=60"], "model there is another than in the job"),
        (["sequence_length=16"], "sequence_length there is another"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    tmp_path: Path, facts: Facts, sets: list[str], expected: str
) -> None:
    measured = measured_in(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=expected):
        plan_of(job_of(*sets), facts, measured)


def test_a_run_without_a_round_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no committed round to measure"):
        measured_in(folder)


def test_speeds_grow_with_the_workers_and_what_is_not_measured_is_said(tmp_path: Path, facts: Facts) -> None:
    measured = measured_in(write_run(tmp_path / "run"))
    plan = plan_of(job_of("regions.0.pools.0.workers=2"), facts, measured)
    assert plan.scenario.regions["us-east-1"].pools[0].speed == 128.0
    assert any("measured with 1 workers" in note for note in plan.notes)
    gpu = "regions.0.pools.0={accelerator: H100, workers: 8, instance: p5.48xlarge, precision: bf16}"
    other = plan_of(job_of(gpu), facts, measured)
    assert any("35% of 989 TFLOP/s (H100, bf16) are assumed" in note for note in other.notes)
    flops = 6 * facts.parameters + 12 * 2 * 30 * 32
    assert other.scenario.regions["us-east-1"].pools[0].speed == pytest.approx(8 * 0.35 * 989e12 / flops)
    with pytest.raises(ConfigError, match=r"accelerator 'M1': its peak is not known"):
        plan_of(job_of("regions.0.pools.0={accelerator: M1}"), facts, None)


def test_every_alternative_is_a_valid_job_that_takes_what_was_said(tmp_path: Path, facts: Facts) -> None:
    """What a choice does to the scenario is what its `--set` does to the job."""
    measured = measured_in(write_run(tmp_path / "run"))
    plan = plan_of(job_of(), facts, measured)
    axes = axes_of(plan, reload)
    assert [axis.name for axis in axes] == ["steps", "codec", "hierarchy", "market", "balance", "hub"]
    for axis in axes:
        for choice in axis.choices:
            again = plan_of(reload(choice.sets), facts, measured)
            assert predict(again.scenario, plan.tariff.egress) == predict(
                choice.change(plan.scenario), plan.tariff.egress
            )


def test_axes_that_are_kept_or_ruled_out_are_not_there(facts: Facts) -> None:
    plan = plan_of(job_of(), facts, None)
    assert [axis.name for axis in axes_of(plan, reload, ("steps", "codec", "market"))] == [
        "hierarchy",
        "balance",
        "hub",
    ]
    with pytest.raises(ConfigError, match="--keep stepz: expected one of steps, codec"):
        axes_of(plan, reload, ("stepz",))

    def masked(sets: Sequence[str]) -> JobConfig:
        return job_of("secure_aggregation={}", "codec=fixed", *sets)

    found = {axis.name: axis for axis in axes_of(plan_of(masked(()), facts, None), masked)}
    assert {choice.label for choice in found["codec"].choices} == {
        "fixed, 8 bits"
    }  # the only other one that adds
    assert "balance" not in found
    assert "hierarchy" not in found


def test_the_hub_is_where_the_job_says(facts: Facts) -> None:
    plan = plan_of(job_of("cost.hub={cloud: gcp, location: europe-west4}"), facts, None)
    assert plan.scenario.hub == Place("gcp", "europe-west4")
    (hub,) = (axis for axis in axes_of(plan, reload) if axis.name == "hub")
    assert [choice.label for choice in hub.choices] == [
        "aggregate in aws/us-east-1",
        "aggregate in aws/us-west-2",
    ]


def test_a_market_is_chosen_with_the_label_that_pins_it(facts: Facts) -> None:
    """What is paid for and what machines are asked for are one thing; other labels stay as they are."""
    labels = "{ray.io/region: us-east-1, memory: '80', ray.io/market-type: spot}"
    pinned = f"regions.0.pools.0={{micro_batch: 4, instance: m7i.xlarge, market: spot, labels: {labels}}}"
    either = "regions.1.pools.0.labels={ray.io/market-type: 'in(spot,on-demand)'}"

    def again(sets: Sequence[str]) -> JobConfig:
        return job_of(pinned, either, *sets)

    axes = {axis.name: axis for axis in axes_of(plan_of(again(()), facts, None), again)}
    found = {choice.label: again(choice.sets) for choice in axes["market"].choices}
    here = {"ray.io/region": "us-east-1", "memory": "80"}
    on_demand = found["all on demand"].regions[0].pools[0]
    assert (on_demand.market, on_demand.labels) == ("on_demand", here | {"ray.io/market-type": "on-demand"})
    spot = found["all on spot machines"].regions[0].pools[0]
    assert (spot.market, spot.labels) == ("spot", here | {"ray.io/market-type": "spot"})
    open_to_both = found["all on spot machines"].regions[1].pools[0]
    assert (open_to_both.market, open_to_both.labels) == (
        "spot",
        {"ray.io/market-type": "in(spot,on-demand)"},
    )


def test_another_hub_says_what_no_setting_does(facts: Facts) -> None:
    plan = plan_of(job_of(), facts, None)
    for axis in axes_of(plan, reload):
        for choice in axis.choices:
            assert bool(choice.by_hand) == (axis.name == "hub")
            if choice.by_hand:
                assert (
                    f"start it on a machine in {choice.label.removeprefix('aggregate in ')}:"
                    in choice.by_hand
                )


def test_checkpoints_in_a_store_cost(facts: Facts) -> None:
    plan = plan_of(job_of("checkpoint.url=s3://bucket/run", "checkpoint.keep=3"), facts, None)
    assert plan.scenario.storage_usd == 0.023
    state = 4 * facts.parameters
    assert plan.scenario.stored_bytes == 3 * (
        2 * state + 3 * 2 * state
    )  # anchor and momentum; Adam in three regions
    assert plan_of(job_of(), facts, None).scenario.storage_usd is None


def test_settings_that_are_chosen_from_memory_are_planned_with_and_explained(facts: Facts) -> None:
    pool = "regions.0.pools.0={micro_batch: 4, fit: auto, instance: m7i.xlarge}"
    plan = plan_of(job_of(pool), facts, None)
    assert plan.job.regions[0].pools[0].fit is None
    assert plan.job.regions[0].pools[0].zero_stage == 0  # one worker shards nothing
    assert any("regions.us-east-1.pools[0]: ZeRO-0, fp32, micro-batch 4 needs" in note for note in plan.notes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a job file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def xcloud(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_command_tells_programs_what_it_found(here: Path) -> None:
    write_run(here / "runs" / "before")
    words = ["plan", "job.yaml", "--from", "before", "--json", "--keep", "steps"]
    told = subprocess.run(
        [sys.executable, "-m", "xcloud", *words], capture_output=True, text=True, check=True, timeout=120
    )
    record = json.loads(told.stdout)
    assert record["measured"] == "runs/before"
    assert record["regions"]["europe-west4"]["instances"] == 2
    assert record["regions"]["us-west-2"]["idle_share"] > 0.3
    assert record["best"]["saving_ratio"] > 0.25
    assert not any(one["axis"] == "steps" for one in record["alternatives"])
    # The line that is shown is a job.
    sets = [word for one in record["best"]["set"] for word in ("--set", one)]
    assert xcloud("validate", "job.yaml", *sets).exit_code == 0


def test_the_command_marks_the_best_for_people(here: Path) -> None:
    write_run(here / "runs" / "before")
    shown = xcloud("plan", "job.yaml", "--from", "before", "--under", "time=1h", "--keep", "learning")
    assert shown.exit_code == 0, shown.output
    assert "* best under time=1h" in shown.stdout
    assert "xcloud train job.yaml --set" in shown.stdout
    best = shown.stdout.split("* best")[1]
    assert ("cost.hub=" in best) == ("start it on a machine in" in best)
    assert "inner.steps=" not in shown.stdout.split("* best")[1]
    assert "not fetched: check them" in shown.stdout
    none = xcloud("plan", "job.yaml", "--from", "before", "--under", "budget=0.000001")
    assert "none of the alternatives stays within the limit" in none.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--under", "budget"], "the job has no cost.budget_usd"),
        (["--under", "soon"], "expected budget, budget=USD"),
        (["--from", "nowhere"], "no run there, nor under runs/"),
        (["--set", "regions.0.pools.0.instance=m7i.xlrge"], "did you mean 'm7i.xlarge'?"),
    ],
)
def test_a_wrong_command_line_ends_with_2(here: Path, words: list[str], expected: str) -> None:
    done = xcloud("plan", "job.yaml", *words)
    assert done.exit_code == 2, done.output
    assert expected in done.stderr


def test_validate_looks_at_instances_and_budgets_too(here: Path) -> None:
    raw = yaml.safe_load(JOB)
    raw["cost"] = {"budget_usd": 5}
    del raw["regions"][2]["pools"][1]["instance"]
    (here / "job.yaml").write_text(yaml.safe_dump(raw))
    done = xcloud("validate", "job.yaml")
    assert done.exit_code == 2
    assert "cost.budget_usd: regions[2].pools[1] names no instance" in done.stderr

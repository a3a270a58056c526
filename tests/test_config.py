"""The job file: every way to get it wrong ends in one error that says where, what and what is near."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.merging import Store, merge, noise, open_sum
from tests.strategies import quick
from xcloud.aggregators import AGGREGATORS, MeanConfig
from xcloud.config import JobConfig, dump_job, load_job, parse_job
from xcloud.data import StdlibSourceConfig, TextSourceConfig
from xcloud.errors import ConfigError
from xcloud.outer import NesterovConfig, SGDConfig
from xcloud.training.settings import AdamWConfig, CosineConfig

ROOT = Path(__file__).resolve().parent.parent
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))

JOB: dict[str, Any] = {
    "name": "demo",
    "rounds": 3,
    "sequence_length": 32,
    "model": {"config": {"model_type": "llama", "max_position_embeddings": 64}},
    "regions": [
        {"name": "a", "cloud": "aws", "data": {"type": "stdlib", "kind": "modules"}, "pools": [{}]},
        {
            "name": "eu-1",
            "cloud": "gcp",
            "data": [{"type": "text", "paths": ["x.txt"]}, {"type": "stdlib", "kind": "tests"}],
            "pools": [{"workers": 2, "zero_stage": 3}, {"micro_batch": 2}],
        },
    ],
}
"""Two regions; every section that has a default is left out."""

ABSENT = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    """`JOB` with one value set (or, with ABSENT, taken away); list indices stand between dots."""
    raw = copy.deepcopy(JOB)
    node: Any = raw
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in parents:
        node = node[key]
    if value is ABSENT:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return raw


def parse(raw: dict[str, Any], *overrides: str) -> JobConfig:
    return parse_job(yaml.safe_dump(raw), overrides)


def error(raw: dict[str, Any] | str, *overrides: str) -> str:
    """The whole message that `raw` is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_job(raw if isinstance(raw, str) else yaml.safe_dump(raw), overrides)
    assert caught.value.__cause__ is None, "a user is not shown pydantic's own words"
    return str(caught.value)


# -- what is right ------------------------------------------------------------------------


def test_defaults() -> None:
    job = parse(JOB)
    assert job.aggregator == MeanConfig()
    assert job.outer == NesterovConfig()
    assert job.inner.optimizer == AdamWConfig()
    assert job.inner.schedule == CosineConfig()
    assert job.regions[0].data == (StdlibSourceConfig(kind="modules"),)
    assert isinstance(job.regions[1].data[0], TextSourceConfig)
    assert job.regions[0].evaluate_on is None
    assert job.failure.quorum is None
    assert job.checkpoint.url is None
    assert job.cpus == 4
    assert job.region("eu-1").sequences_per_step == 2 * 8 + 2
    assert not job.regions[0].pools[0].on_gpu


def test_a_name_stands_for_a_part_with_defaults() -> None:
    assert parse(changed("outer", "sgd")).outer == SGDConfig()
    assert parse(changed("outer", {"type": "sgd", "lr": 0.5})).outer == SGDConfig(lr=0.5)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", ".1e-2", "0.001", "+1e-3"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    """YAML 1.1 reads 1e-3 as text; nobody who writes a learning rate means that."""
    assert parse(JOB, f"outer={{type: sgd, lr: {text}}}").outer == SGDConfig(lr=1e-3)


def test_yaml_anchors_and_merge_keys() -> None:
    """Pools of equal settings are written once."""
    text = yaml.safe_dump(changed("regions", ABSENT)) + textwrap.dedent(
        """
        regions:
          - {name: a, cloud: aws, data: &text {type: stdlib, kind: tests}, pools: [&pool {workers: 2}]}
          - {name: b, cloud: gcp, data: *text, pools: [*pool, {<<: *pool, micro_batch: 2, workers: 3}]}
        """
    )
    job = parse_job(text)
    assert job.regions[1].data == job.regions[0].data
    first, second = job.regions[1].pools
    assert first == job.regions[0].pools[0]
    assert (second.workers, second.micro_batch) == (3, 2)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_jobs_are_right(path: Path) -> None:
    job = load_job(path)
    assert parse_job(dump_job(job)) == job


def test_the_default_job_is_shipped() -> None:
    assert ROOT / "jobs" / "three_clouds.yaml" in JOBS


# -- one wrong thing ----------------------------------------------------------------------


UNKNOWN = [
    ("round", "round", "rounds"),
    ("regions.0.pool", "regions[0].pool", "pools"),
    ("regions.1.pools.1.worker", "regions[1].pools[1].worker", "workers"),
    ("regions.1.pools.1.stage", "regions[1].pools[1].stage", "zero_stage"),
    ("regions.0.data.kinds", "regions[0].data[0].kinds", "kind"),
    ("regions.1.data.0.path", "regions[1].data[0].path", "paths"),
    ("model.pretraind", "model.pretraind", "pretrained"),
    ("inner", "inner.step", "steps"),
    ("inner", "inner.optimizer.beta", "betas"),
    ("inner", "inner.schedule.warmup", "warmup_steps"),
    ("outer", "outer.momentun", "momentum"),
    ("aggregator", "aggregator.weight_by", "weigh_by"),
    ("codec", "codec.typ", "type"),
    ("tokenizer", "tokenizer.paths", "path"),
    ("data", "data.cachedir", "cache_dir"),
    ("evaluation", "evaluation.sequence", "sequences"),
    ("failure", "failure.quorums", "quorum"),
    ("checkpoint", "checkpoint.ever", "every"),
]
VALUES: dict[str, Any] = {
    "inner.step": {"step": 3},
    "inner.optimizer.beta": {"optimizer": {"type": "adamw", "beta": 1}},
    "inner.schedule.warmup": {"schedule": {"type": "cosine", "warmup": 1}},
    "outer.momentun": {"type": "nesterov", "momentun": 0.5},
    "aggregator.weight_by": {"type": "mean", "weight_by": "equal"},
    "codec.typ": {"type": "identity", "typ": 1},
    "tokenizer.paths": {"type": "huggingface", "path": "x", "paths": "y"},
    "data.cachedir": {"cachedir": "x"},
    "evaluation.sequence": {"sequence": 3},
    "failure.quorums": {"quorums": 1},
    "checkpoint.ever": {"ever": 1},
}


@pytest.mark.parametrize(("place", "path", "near"), UNKNOWN, ids=[path for _, path, _ in UNKNOWN])
def test_an_unknown_key_at_every_level(place: str, path: str, near: str) -> None:
    assert error(changed(place, VALUES.get(path, 1))) == f"job: {path}: unknown key; did you mean {near!r}?"


def test_an_unknown_key_inside_evaluate_on() -> None:
    raw = changed("regions.0.evaluate_on", {"type": "stdlib", "kind": "tests", "max_byte": 1})
    assert error(raw) == "job: regions[0].evaluate_on[0].max_byte: unknown key; did you mean 'max_bytes'?"


def test_an_unknown_key_near_to_nothing_lists_the_known_ones() -> None:
    raw = changed("outer", {"type": "sgd", "momentum": 0.5})
    assert error(raw) == "job: outer.momentum: unknown key; known keys: lr, type"
    assert error(changed("zzz", 1)).startswith(
        "job: zzz: unknown key; known keys: aggregation_actors, aggregator, "
    )


WRONG: list[tuple[str, Any, str]] = [
    # wrong types
    ("rounds", "many", "rounds: Input should be a valid integer"),
    ("rounds", 2.5, "rounds: Input should be a valid integer"),
    ("rounds", None, "rounds: Input should be a valid integer"),
    ("rounds", [3], "rounds: Input should be a valid integer"),
    ("name", 3, "name: Input should be a valid string, got 3"),
    ("regions", 3, "regions: Input should be a valid tuple, got 3"),
    ("regions.0", "a", "regions[0]: Input should be a valid dictionary"),
    ("regions.1.pools.1", 3, "regions[1].pools[1]: Input should be a valid dictionary"),
    ("regions.1.pools.1.workers", "two", "regions[1].pools[1].workers: Input should be a valid integer"),
    ("regions.1.pools.1.labels", {"zone": 1}, "regions[1].pools[1].labels.zone: Input should be a valid string"),
    ("regions.0.data", 3, "regions[0].data[0]: expected a data source name or a mapping with 'type:', got 3"),
    ("regions.0.evaluate_on", [3], "regions[0].evaluate_on[0]: expected a data source name or a mapping"),
    ("model", None, "model: Input should be a valid dictionary"),
    ("inner", "adamw", "inner: Input should be a valid dictionary"),
    ("inner", {"optimizer": {"type": "adamw", "lr": "fast"}}, "inner.optimizer.lr: Input should be a valid number"),
    ("plugins", "numpy", "plugins: Input should be a valid tuple, got 'numpy'"),
    # out of range, or not one of the choices
    ("rounds", 0, "rounds: Input should be greater than or equal to 1, got 0"),
    ("seed", -1, "seed: Input should be greater than or equal to 0, got -1"),
    ("seed", 2**31, "seed: Input should be less than 2147483648, got 2147483648"),
    ("sequence_length", 1, "sequence_length: Input should be greater than or equal to 2, got 1"),
    ("chunk_size", 10, "chunk_size: Input should be greater than or equal to 1024, got 10"),
    ("name", "a b", "name: String should match pattern"),
    ("regions.0.name", "../a", "regions[0].name: String should match pattern"),
    ("regions", [], "regions: "),
    ("regions.0.pools", [], "regions[0].pools: "),
    ("regions.0.data", [], "regions[0].data: "),
    ("regions.1.pools.1.zero_stage", 4, "regions[1].pools[1].zero_stage: Input should be 0, 1, 2 or 3, got 4"),
    (
        "regions.1.pools.1.precision",
        "bf61",
        "regions[1].pools[1].precision: Input should be 'fp32', 'bf16' or 'fp16', got 'bf61'",
    ),
    ("outer", {"type": "sgd", "lr": 0}, "outer.lr: Input should be greater than 0, got 0"),
    ("aggregator", {"type": "mean", "weigh_by": "size"}, "aggregator.weigh_by: Input should be 'tokens' or 'equal'"),
    ("failure", {"quorum": 0}, "failure.quorum: Input should be greater than or equal to 1, got 0"),
    ("failure", {"below_quorum": "wait"}, "failure.below_quorum: Input should be 'retry', 'skip' or 'abort'"),
    ("data", {"held_out_fraction": 0.5}, "data.held_out_fraction: Input should be less than 0.5, got 0.5"),
    # missing
    ("name", ABSENT, "name: required key is missing"),
    ("rounds", ABSENT, "rounds: required key is missing"),
    ("model", ABSENT, "model: required key is missing"),
    ("regions", ABSENT, "regions: required key is missing"),
    ("regions.1.name", ABSENT, "regions[1].name: required key is missing"),
    ("regions.1.cloud", ABSENT, "regions[1].cloud: required key is missing"),
    ("regions.1.data", ABSENT, "regions[1].data: required key is missing"),
    ("regions.1.pools", ABSENT, "regions[1].pools: required key is missing"),
    ("regions.1.data.0.paths", ABSENT, "regions[1].data[0].paths: required key is missing"),
    ("regions.0.data", "stdlib", "regions[0].data[0].kind: required key is missing"),
    ("tokenizer", "huggingface", "tokenizer.path: required key is missing"),
    # unknown parts
    ("outer", "nestorov", "outer: unknown outer optimizer 'nestorov'; known outer optimizer types: adam, delayed_nesterov, nesterov, sgd, yogi (did"),
    ("outer", {"lr": 1}, "outer: 'type' is missing; known outer optimizer types: adam, delayed_nesterov, nesterov, sgd, yogi"),
    ("codec", "identty", "codec: unknown codec 'identty'; "),
    ("aggregator", "median2", "aggregator: unknown aggregator 'median2'; "),
    ("tokenizer", "byte", "tokenizer: unknown tokenizer 'byte'; known tokenizer types: bytes, "),
    ("inner", {"correction": "fedprocks"}, "inner.correction: unknown correction 'fedprocks'; "),
    ("inner", {"optimizer": "adam"}, "inner.optimizer: unknown inner optimizer 'adam'; "),
    ("inner", {"schedule": "cosin"}, "inner.schedule: unknown learning-rate schedule 'cosin'; "),
    ("regions.0.data", {"type": "stdlb"}, "regions[0].data[0]: unknown data source 'stdlb'; "),
    # combinations that cannot be
    ("regions.1.name", "a", "regions: the name 'a' is used twice; names must be unique"),
    ("failure", {"quorum": 3}, "failure.quorum is 3, but 'regions' lists only 2; expected at most that many"),
    (
        "inner",
        {"correction": "scaffold"},
        "inner: correction scaffold takes the way that a region went for the sum of its gradients, which holds",
    ),
    (
        "inner",
        {"correction": "scaffold", "optimizer": {"type": "sgd", "momentum": 0.9}},
        "inner: correction scaffold takes the way that a region went for the sum of its gradients, which holds",
    ),
    (
        "inner",
        {"correction": {"type": "fedprox", "mu": 20}, "optimizer": {"type": "sgd", "lr": 0.1}},
        "inner: correction fedprox with mu 20 and optimizer.lr 0.1 steps past the anchor; expected mu * lr well below 1",
    ),
    (
        "inner",
        {"correction": "scaffold", "optimizer": "sgd", "steps": 0},
        "inner: correction scaffold needs inner steps; steps is 0, expected at least 1",
    ),
    (
        "inner",
        {"optimizer": {"type": "muon", "adjust_lr": "original"}},
        "inner.optimizer: adjust_lr original measures 'lr' in other units than AdamW's; set 'adamw_lr' too",
    ),
    (
        "outer",
        {"type": "delayed_nesterov", "c": 0.5},
        "outer: c is 0.5 and delay 4; expected c <= 1 / delay = 0.25",
    ),
    (
        "regions.1.pools.0.precision",
        "fp16",
        "regions[1].pools[0]: precision fp16 needs a gpu accelerator; expected fp32 or bf16 on cpu",
    ),
    ("regions.0.pools.0", {"offload": "optimizer", "zero_stage": 0}, "regions[0].pools[0]: offload optimizer needs zero_stage 1, 2 or 3"),
    (
        "sequence_length",
        65,
        "sequence_length is 65, but model.config.max_position_embeddings allows only 64",
    ),
    ("model", {}, "model: expected exactly one of 'config' and 'pretrained'"),
    ("model.pretrained", "gpt2", "model: expected exactly one of 'config' and 'pretrained'"),
    ("model.revision", "main", "model: 'revision' needs 'pretrained'"),
    ("model", {"config": {"hidden_size": 3}}, "model: config needs 'model_type'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[f"{p}={v!r:.40}" for p, v, _ in WRONG])
def test_one_mistake_gives_one_line(path: str, value: Any, message: str) -> None:
    raw = changed(path, value)
    said = error(raw)
    assert said.startswith(f"job: {message}")
    assert "\n" not in said


@pytest.mark.parametrize(
    "unknown", ["outer=nestorov", "codec=identty", "tokenizer=byte", "inner.optimizer=adam", "aggregator=men"]
)
def test_an_unknown_part_has_a_nearest_name(unknown: str) -> None:
    assert re.search(r"\(did you mean '(nesterov|identity|bytes|adamw|mean)'\?\)$", error(JOB, unknown))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("regions.0.pools.0.workers", "regions[0].pools[0].workers"),
        ("regions.0.pools.0.zero_stage", "regions[0].pools[0].zero_stage"),
        ("regions.0.data.max_bytes", "regions[0].data[0].max_bytes"),
        ("rounds", "rounds"),
        ("seed", "seed"),
    ],
)
def test_a_switch_is_not_a_number(path: str, told: str) -> None:
    """`workers: yes` is a wrong type, not one worker."""
    assert error(changed(path, True)).startswith(f"job: {told}: ")


def test_many_mistakes_are_told_at_once() -> None:
    raw = changed("rounds", "many") | {"zzz": 1}
    del raw["regions"][0]["cloud"]
    raw["regions"][1]["pools"][0]["worker"] = 1
    lines = error(raw).splitlines()
    assert lines[0] == "job: "
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "  rounds",
        "  regions[0].cloud",
        "  regions[1].pools[0].worker",
        "  zzz",
    ]


def test_muon_does_not_step_on_the_host() -> None:
    raw = changed("inner", {"optimizer": "muon"})
    raw["regions"][0]["pools"][0] |= {"offload": "optimizer", "zero_stage": 2}
    assert "regions[0].pools[0]: offload optimizer keeps the masters in host memory" in error(raw)


def test_fp16_is_fine_on_a_gpu() -> None:
    raw = changed("regions.0.pools.0", {"accelerator": "H100", "precision": "fp16"})
    assert parse(raw).regions[0].pools[0].on_gpu


# -- YAML and files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML: "),
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
        ("x: {b: {c: 1, c: 2}}", "the key 'c' is given twice"),
        ("x: [{b: 1, b: 2}]", "the key 'b' is given twice"),
        ("? [1]\n: 2", "found unhashable key"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("- a", "expected a mapping of job keys, got list"),
        ("", "expected a mapping of job keys, got NoneType"),
        ("just words", "expected a mapping of job keys, got str"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_what_is_no_job_at_all(text: str, message: str) -> None:
    said = error(text)
    assert said.startswith("job: ")
    assert message in said


def test_a_key_given_twice_says_where() -> None:
    assert re.search(
        r"line 5, column 3", error("rounds: 1\nmodel:\n  pretrained: a\nregions:\n- name: b\n  name: c")
    )


def test_load_job_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(ConfigError, match=re.escape(f"{path}: no such job file")):
        load_job(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot be read: ")):
        load_job(path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be read: ")):
        load_job(tmp_path)
    path.write_text(yaml.safe_dump(changed("round", 1)), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: round: unknown key; did you mean 'rounds'?")):
        load_job(path)
    path.write_text(yaml.safe_dump(JOB), encoding="utf-8")
    assert load_job(str(path), ["rounds=7"]) == parse(JOB, "rounds=7")


# -- overrides ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rounds=9", "rounds", 9),
        ("inner.steps=50", "inner", {"steps": 50}),
        ("checkpoint.url=s3://bucket/run?a=b", "checkpoint", {"url": "s3://bucket/run?a=b"}),
        ("regions.0.pools.0.workers=2", "regions.0.pools.0.workers", 2),
        ("regions.eu-1.pools.1.micro_batch=4", "regions.1.pools.1.micro_batch", 4),
        ("regions.eu-1.data.1.kind=modules", "regions.1.data.1.kind", "modules"),
        ("regions.0.pools.0={workers: 3}", "regions.0.pools.0", {"workers": 3}),
        ("regions.1.pools=[{}]", "regions.1.pools", [{}]),
        ("outer.type=sgd", "outer", {"type": "sgd"}),
        ("outer=sgd", "outer", "sgd"),
        ("failure.quorum=null", "failure", {"quorum": None}),
        ("inner.optimizer={type: sgd, lr: 1e-2}", "inner", {"optimizer": {"type": "sgd", "lr": 0.01}}),
        (" rounds =9", "rounds", 9),
    ],
)
def test_override(override: str, path: str, value: Any) -> None:
    assert parse(JOB, override) == parse(changed(path, value))


def test_overrides_apply_in_order() -> None:
    assert parse(JOB, "rounds=4", "rounds=5").rounds == 5
    assert parse(JOB, "outer={type: sgd}", "outer.lr=0.5").outer == SGDConfig(lr=0.5)


def test_an_override_does_not_change_the_file_read(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB), encoding="utf-8")
    load_job(path, ["rounds=9"])
    assert load_job(path).rounds == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "--set 'rounds': expected path=value, for example inner.steps=50"),
        ("=3", "--set '=3': expected path=value"),
        ("inner..steps=3", "--set 'inner..steps=3': expected path=value"),
        ("inner.=3", "--set 'inner.=3': expected path=value"),
        ("rounds=[", "--set 'rounds=[': the value is not valid YAML: "),
        ("outer={lr: 1, lr: 2}", "--set 'outer={lr: 1, lr: 2}': the value is not valid YAML: the key 'lr' is given"),
        ("regions.us.cloud=x", "--set 'regions.us.cloud=x': regions has no entry 'us'; expected one of a, eu-1"),
        ("regions.2.cloud=x", "--set 'regions.2.cloud=x': regions has no entry '2'; expected one of a, eu-1"),
        ("regions.0.pools.1.cpus=1", "--set 'regions.0.pools.1.cpus=1': regions.0.pools has no entry '1'; expected"),
        ("regions.0.pools.-1.cpus=1", "--set 'regions.0.pools.-1.cpus=1': regions.0.pools has no entry '-1'"),
        ("rounds.x=1", "--set 'rounds.x=1': rounds is a single value and has no key 'x'"),
        # what is well formed but wrong is told like a wrong file
        ("inner.stepz=1", "job: inner.stepz: unknown key; did you mean 'steps'?"),
        ("inner.steps=", "job: inner.steps: Input should be a valid integer"),
        ("rounds=many", "job: rounds: Input should be a valid integer"),
    ],
)  # fmt: skip
def test_a_wrong_override(override: str, message: str) -> None:
    assert error(JOB, override).startswith(message)


def test_an_override_inside_a_part_given_by_name() -> None:
    """`outer: sgd` has no keys to set; the error says how to write it instead."""
    raw = changed("outer", "sgd")
    for override in ("outer.type=nesterov", "outer.lr=0.1"):
        expected = f"--set {override!r}: outer is the name 'sgd'; give a mapping with 'type:'"
        assert error(raw, override) == expected
    assert parse(raw, "outer={type: sgd, lr: 0.1}").outer == SGDConfig(lr=0.1)


# -- there and back -----------------------------------------------------------------------


def test_dump_and_parse_give_the_same_job() -> None:
    raw = copy.deepcopy(JOB) | {
        "outer": {"type": "sgd", "lr": 0.5},
        "inner": {"optimizer": {"type": "sgd", "lr": 1e-5, "momentum": 0.9}, "schedule": "constant"},
        "tokenizer": {"type": "huggingface", "path": "some/where"},
        "failure": {"quorum": 1, "deadline_s": 1e-6, "below_quorum": "skip"},
        "checkpoint": {"url": "s3://bucket/ü"},
        "data": {"cache_dir": "~"},
    }
    raw["inner"]["correction"] = {"type": "fedprox", "mu": 1e-5}
    raw["regions"][0]["evaluate_on"] = [{"type": "text", "paths": "held-out/*.txt", "max_bytes": 100}]
    raw["regions"][0]["pools"][0]["labels"] = {"zone": "eu"}
    job = parse(raw)
    assert parse_job(dump_job(job)) == job
    assert dump_job(parse_job(dump_job(job))) == dump_job(job)


def test_scaffold_names_the_optimizer_it_cannot_use() -> None:
    for optimizer in ("adamw", "muon", {"type": "sgd", "momentum": 0.9}):
        message = error(changed("inner", {"correction": "scaffold", "optimizer": optimizer}))
        kind = optimizer if isinstance(optimizer, str) else "sgd"
        assert f"optimizer is {kind!r}, expected sgd without momentum, or correction fedprox" in message


def test_scaffold_needs_the_mean_and_muon_survives_a_dump() -> None:
    raw = changed("inner", {"optimizer": "sgd", "correction": "scaffold"})
    assert (
        "inner.correction scaffold takes the merged update for the mean gradient of the regions; aggregator is "
        in (error(raw, "aggregator=median"))
    )
    for job in (parse(raw), parse(JOB, "inner.optimizer={type: muon, adjust_lr: original, adamw_lr: 1e-3}")):
        assert parse_job(dump_job(job)) == job


@quick
@example("\x85").via("a line end of its own")
@given(st.text(min_size=1, max_size=12) | st.from_regex(r"\A[-+]?[0-9.]{1,4}[eE][-+]?[0-9]{1,3}\Z"))
def test_any_text_survives_a_dump(text: str) -> None:
    """A region's process reads the job from `dump_job`: a label or a revision that looks like a number stays text."""
    job = parse(JOB)
    pool = job.regions[0].pools[0].model_copy(update={"labels": {"key": text}})
    region = job.regions[0].model_copy(update={"pools": (pool,)})
    job = job.model_copy(update={"regions": (region, *job.regions[1:])})
    assert parse_job(dump_job(job)) == job


def test_a_name_that_looks_like_a_number_survives_a_dump() -> None:
    job = parse(JOB, "name='1e5'", "regions.0.name='7e3'")
    assert parse_job(dump_job(job)) == job


@quick
@given(st.floats(min_value=0, exclude_min=True, max_value=1e300))
def test_any_number_survives_a_dump(lr: float) -> None:
    job = parse(JOB).model_copy(update={"outer": SGDConfig(lr=lr)})
    assert parse_job(dump_job(job)) == job


def test_a_job_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(JOB).rounds = 4


# -- plugins ------------------------------------------------------------------------------

PLUGIN = '''
"""A plugin: an aggregator of somebody else's."""

from typing import Literal

import numpy as np

from xcloud.aggregators import AGGREGATORS, AggregatorConfig


class First:
    needs_plaintext = True
    needs_gram = False
    additive = False

    def weights(self, reports, gram=None):
        return [1.0] + [0.0] * (len(reports) - 1)

    def combine(self, updates, weights, out):
        np.copyto(out, updates[0])


@AGGREGATORS.register
class FirstConfig(AggregatorConfig):
    type: Literal["first"] = "first"
    exponent: int = 1

    def build(self):
        return First()
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to write plugin modules into; what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(AGGREGATORS, "_classes", dict(AGGREGATORS._classes))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_registers_its_parts_and_merges(plugins: Path) -> None:
    (plugins / "first_plugin.py").write_text(PLUGIN, encoding="utf-8")
    raw = changed("aggregator", {"type": "first", "exponent": 2}) | {"plugins": ["first_plugin"]}
    job = parse(raw)
    out = np.empty(2, np.float32)
    job.aggregator.build().combine([np.ones(2, np.float32)], [1.0], out)
    assert out.tolist() == [1.0, 1.0]
    assert parse_job(dump_job(job)) == job
    updates, store = noise(2), Store()
    assert np.array_equal(open_sum(job, store, *merge(job, updates, store, names=("a", "eu-1"))), updates[0])
    raw["aggregator"] = {"type": "first", "exponents": 2}
    assert error(raw) == "job: aggregator.exponents: unknown key; did you mean 'exponent'?"
    said = error(raw, "aggregator=frist")
    assert " fednova, first, " in said
    assert said.endswith("(did you mean 'first'?)")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no_such_plugin", None, "No module named 'no_such_plugin'"),
        ("", None, "Empty module name"),
        (".relative", None, "relative import"),
        ("broken_syntax", "def", "invalid syntax"),
        ("broken_import", "import no_such_module_either", "No module named 'no_such_module_either'"),
        ("broken_start", "raise RuntimeError('no licence')", "no licence"),
    ],
)
def test_a_plugin_that_cannot_be_imported(plugins: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (plugins / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        parse(changed("plugins", [name]))
    assert str(caught.value).startswith(f"job: plugins: cannot import {name!r}: ")


# -- cost ---------------------------------------------------------------------------------


def test_reading_a_job_does_not_wait_for_large_libraries() -> None:
    heavy = {"torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "tensorboard"}
    code = f"import sys, xcloud.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TIMING: list[tuple[dict[str, Any], str]] = [
    ({"streaming": {"overlap": 3}, "inner": {"steps": 3}}, r"streaming.overlap is 3, but .* inner.steps: 3"),
    ({"buffer": {"goal": 4}}, "buffer.goal is 4, but 'regions' lists only"),
    ({"buffer": {}, "failure": {"quorum": 1}}, "failure.quorum and buffer.goal"),
    ({"buffer": {}, "streaming": {"fragments": 2}}, "buffer and streaming cannot be combined"),
    ({"buffer": {}, "codec": "fixed"}, "codec 'fixed' adds encodings of one round only"),
    (
        {"streaming": {"alpha": 0.5}, "inner": {"correction": {"type": "fedprox", "mu": 0.1}}},
        "inner.correction 'fedprox' corrects the drift",
    ),
    (
        {
            "buffer": {},
            "inner": {"correction": "scaffold", "optimizer": {"type": "sgd", "lr": 0.1}, "clip_norm": None},
        },
        "inner.correction scaffold needs updates of one round",
    ),
]


@pytest.mark.parametrize(("changes", "message"), TIMING, ids=[message for _, message in TIMING])
def test_what_streaming_and_buffer_cannot_do(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, error(JOB | changes))


def test_alpha_follows_overlap_unless_it_is_given() -> None:
    mixes = [
        parse(JOB | {"streaming": streaming}).streaming.mix
        for streaming in ({}, {"overlap": 1}, {"overlap": 1, "alpha": 0.0}, {"alpha": 0.25})
    ]
    assert mixes == [0.0, 0.5, 0.0, 0.25]
    keeps = [parse(JOB | {"streaming": s}).streaming.keeps_local for s in ({}, {"overlap": 1, "alpha": 0})]
    assert keeps == [False, True]


def test_stale_updates_weigh_less() -> None:
    buffer = parse(JOB | {"buffer": {"power": 0.5}}).buffer
    assert buffer is not None
    assert [buffer.factor(s) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


# -- secure aggregation and guards --------------------------------------------------------


MASKED = {"codec": {"type": "fixed", "bits": 4}, "secure_aggregation": {}}


def three(**changes: Any) -> dict[str, Any]:
    """A masked job of three regions."""
    raw = changed("name", "masked")
    extra = {**raw["regions"][0], "name": "third"}
    raw["regions"] = [*raw["regions"][:2], extra]
    return raw | MASKED | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"codec": "identity"},
            "codec 'identity' sends none that add; expected codec fixed, grid, or random_k with 'bits'",
        ),
        ({"codec": "lowrank"}, "codec 'lowrank' sends none that add"),
        ({"codec": "random_k"}, "codec 'random_k' sends none that add"),
        ({"codec": "topk"}, "codec 'topk' sends none that add"),
        (
            {"aggregator": "median"},
            "codec 'fixed' is added up and never opened one by one, which aggregator 'median' needs",
        ),
        ({"hierarchy": "cloud"}, "hierarchy 'cloud' merges those of a cloud first; expected hierarchy flat"),
        ({"buffer": {"goal": 2}}, "codec 'fixed' adds encodings of one round only"),
        (
            {"secure_aggregation": {"minimum": 2}},
            "minimum is 2, with which each region learns the other's update",
        ),
        (
            {"failure": {"quorum": 2}},
            "failure.quorum is 2, but secure_aggregation opens no sum of fewer than 3",
        ),
        ({"secure_aggregation": {"minimum": 3, "colluders": 2}}, "minimum is 3, and colluders 2: "),
        ({"secure_aggregation": {"minimum": 4}}, "needs 4 regions in a sum, but 'regions' lists only 3"),
        ({"secure_aggregation": {"colluders": 2}}, "needs 4 regions in a sum, but 'regions' lists only 3"),
        (
            {"secure_aggregation": {"colluder": 1}},
            "secure_aggregation.colluder: unknown key; did you mean 'colluders'?",
        ),
    ],
)
def test_what_cannot_work_under_masks_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in error(three(**changes))


def test_two_regions_are_masked_only_if_that_is_meant() -> None:
    raw = three()
    raw["regions"] = raw["regions"][:2]
    assert "needs 3 regions in a sum, but 'regions' lists only 2" in error(raw)
    raw["secure_aggregation"] = {"allow_two": True}
    job = parse(raw)
    assert job.secure_aggregation is not None
    assert job.secure_aggregation.survivors == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": {"every": 2}}, "checkpoint.every is 2; expected 1"),
        ({"streaming": {"fragments": 2}}, "while with streaming regions go on before they know"),
        ({"buffer": {"goal": 1}}, "while with buffer regions go on before they know"),
        (
            {"evaluation": {"sequences": 8, "every": 2}, "guards": {"loss": 0.1}},
            "guards.loss looks at the held-out loss of every round",
        ),
        ({"guards": {"norm": 1}}, "guards.norm: "),
    ],
)
def test_guards_that_cannot_act_are_refused(changes: dict[str, Any], said: str) -> None:
    raw = changed("name", "guarded") | {"guards": {"norm": 4}} | changes
    assert said in error(raw)


# -- how machines are bought ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("market", "label", "right"),
    [
        ("spot", None, None),
        ("spot", "spot", None),
        ("on_demand", "on-demand", None),
        ("spot", "in(spot,on-demand)", None),
        ("on_demand", "!spot", None),
        ("on_demand", "spot", "spot"),
        ("spot", "on-demand", "on_demand"),
        ("spot", "!spot", "on_demand"),
        ("spot", "in(on-demand)", "on_demand"),
    ],
)
def test_a_pool_is_paid_as_its_labels_have_it_bought(
    market: str, label: str | None, right: str | None
) -> None:
    labels = {"cloud": "aws"} | ({"ray.io/market-type": label} if label else {})
    raw = changed("regions.1.pools.1", {"market": market, "labels": labels})
    if right is None:
        assert parse(raw).regions[1].pools[1].market == market
        return
    said = error(raw)
    assert "regions[1].pools[1]" in said
    assert f"labels.ray.io/market-type is {label!r}, but market is {market}" in said
    assert f"expected market: {right}" in said

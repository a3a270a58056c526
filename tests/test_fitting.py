"""A job whose pools leave their engine settings to their machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.factory import job_of, raw_job, region, tiny_model
from xcloud.config import dump_job, parse_job
from xcloud.errors import ConfigError
from xcloud.fitting import fit_pools
from xcloud.metrics import Event
from xcloud.report.text import event_line
from xcloud.training.models import measure_model
from xcloud.training.settings import ModelConfig

LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def fitted(tmp_path: Path, *pools: dict[str, Any], cloud: str = "aws", **changes: Any) -> Any:
    return fit_pools(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, *pools, cloud=cloud)], **changes)))


def test_a_model_is_measured_without_its_weights() -> None:
    parameters, shape = measure_model(ModelConfig(config=LARGE), 259)
    assert parameters == 6_738_415_616  # Llama 2 7B
    assert (shape.hidden, shape.layers, shape.vocab, shape.heads) == (4096, 32, 32000, 32)


def test_two_kinds_of_machines_get_two_kinds_of_settings(tmp_path: Path) -> None:
    common = {"workers": 8, "micro_batch": 16, "fit": "auto"}
    job, chosen = fitted(
        tmp_path,
        common | {"accelerator": "H100", "instance": "p5.48xlarge"},
        common | {"accelerator": "A100", "instance": "p4d.24xlarge"},
        common | {"accelerator": "V100", "instance": "p3.16xlarge", "zero_stage": 3},
        model={"config": LARGE},
        sequence_length=2048,
    )
    large, medium, small = job.regions[0].pools
    assert [pool.fit for pool in job.regions[0].pools] == [None] * 3
    assert (large.precision, medium.precision, small.precision) == ("bf16", "bf16", "fp16")
    assert not large.activation_checkpointing
    assert medium.activation_checkpointing
    assert (small.zero_stage, small.offload) == (3, "optimizer")
    assert all(pool.sequences_per_step == 8 * 16 for pool in job.regions[0].pools)
    assert parse_job(dump_job(job)) == job
    line = event_line(Event(0.0, "pool_fitted", {"region": "a", "pool": 0, "reason": chosen["a", 0].why}))
    assert line is not None
    assert line.startswith(
        "a pool 0: ZeRO-2, bf16, micro-batch 4 needs 64.1 GiB of 80.0 GiB on the device and"
    )


def test_a_job_without_fit_is_what_it_was(tmp_path: Path) -> None:
    job, chosen = fitted(tmp_path, {"workers": 1}, {"workers": 1, "fit": None})
    assert not chosen
    assert job.regions[0].pools[0].zero_stage == 1


def test_a_cpu_pool_takes_its_share_of_the_machine(tmp_path: Path) -> None:
    job, _ = fitted(tmp_path, {"workers": 2, "micro_batch": 4, "fit": {"host_gb": 4}})
    assert job.regions[0].pools[0].precision == "fp32"


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"fit": "auto"}, r"regions\[0\]\.pools\[0\]: fit needs to know the memory of a worker; expected 'instance'"),
        ({"fit": "auto", "accelerator": "gpu"}, r"fit does not know the memory of accelerator 'gpu'; expected 'instance'"),
        ({"fit": "auto", "instance": "p9.huge"}, "p9.huge"),
        ({"fit": {"host_gb": 0.001}}, r"regions\[0\]\.pools\[0\]: a model of .* parameters does not fit"),
        ({"fit": {"device": 3}}, "unknown key"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(tmp_path: Path, pool: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, pool)


def test_private_training_keeps_fp32(tmp_path: Path) -> None:
    job, _ = fitted(
        tmp_path,
        {"accelerator": "H100", "instance": "p5.48xlarge", "fit": "auto", "micro_batch": 4},
        model={"config": tiny_model()},
        dp={"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0},
        inner={"steps": 2, "clip_norm": None},
    )
    assert job.regions[0].pools[0].precision == "fp32"

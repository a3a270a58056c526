"""Engine settings from memory: the fastest that fit, and clear words where nothing does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.cost.fit import FREE, Budget, Fitted, fit_engine
from xcloud.cost.memory import ModelShape
from xcloud.errors import ConfigError

GIB = 2**30
SEVEN = 6_738_415_616, ModelShape(hidden=4096, layers=32, vocab=32000, heads=32)
SMALL = 124_000_000, ModelShape(hidden=768, layers=12, vocab=50257, heads=12)


def fit(
    model: tuple[int, ModelShape],
    device_gb: float,
    host_gb: float | None = None,
    *,
    workers: int = 8,
    batch: int = 16,
    accelerator: str = "H100",
    length: int = 2048,
    refused: tuple[str, ...] = (),
    **stated: Any,
) -> Fitted:
    return fit_engine(
        *model,
        sequence_length=length,
        workers=workers,
        batch=batch,
        accelerator=accelerator,
        budget=Budget(int(device_gb * GIB), None if host_gb is None else int(host_gb * GIB)),
        stated=stated,
        refused=refused,
        where="regions[0].pools[0]",
    )


def test_a_small_model_shards_no_more_than_it_must() -> None:
    found = fit(SMALL, 80)
    assert (found.zero_stage, found.activation_checkpointing, found.offload) == (1, False, "none")
    assert found.precision == "bf16"
    assert fit(SMALL, 80, workers=1).zero_stage == 0  # nobody to shard with


def test_less_memory_takes_thriftier_settings() -> None:
    """7B on 8 ranks: on 80 GiB without offload, on 32 GiB with checkpointing, and on 14 GiB only with the host's help."""
    large, medium, small = (fit(SEVEN, size, 200) for size in (80, 32, 14))
    assert large.offload == medium.offload == "none"
    assert not large.activation_checkpointing
    assert medium.activation_checkpointing
    assert small.offload == "optimizer"
    for found in (large, medium, small):
        assert "would need" in found.why


@given(
    st.sampled_from([SMALL, SEVEN]),
    st.floats(4, 200),
    st.integers(1, 16),
    st.sampled_from([1, 2, 6, 8, 16, 24]),
    st.sampled_from(["H100", "T4"]),
)
def test_what_is_chosen_fits_and_keeps_the_batch(
    model: tuple[int, ModelShape], size: float, workers: int, batch: int, accelerator: str
) -> None:
    try:
        found = fit(model, size, 64, workers=workers, batch=batch, accelerator=accelerator)
    except ConfigError as error:
        assert "does not fit" in str(error)  # noqa: PT017 - either is right, by the sizes
        return
    assert found.micro_batch * found.gradient_accumulation == batch
    assert found.memory.total_bytes <= (1 - FREE) * size * GIB
    assert found.memory.host_bytes <= (1 - FREE) * 64 * GIB
    assert found.precision == ("fp16" if accelerator == "T4" else "bf16")


def test_what_the_job_states_stays() -> None:
    found = fit(SMALL, 80, zero_stage=3, precision="fp32", activation_checkpointing=True, micro_batch=2)
    assert (found.zero_stage, found.precision, found.activation_checkpointing) == (3, "fp32", True)
    assert found.micro_batch == 16  # with accumulation it is the batch, and that alone was stated


def test_what_the_job_cannot_take_is_not_chosen() -> None:
    refused = ("offload", "activation_checkpointing", "low_precision")
    assert fit(SMALL, 80, refused=refused).precision == "fp32"
    with pytest.raises(ConfigError, match="does not fit"):
        fit(SEVEN, 16, refused=refused)


def test_a_cpu_pool_is_measured_by_its_host() -> None:
    found = fit(SMALL, 0, 64, accelerator="cpu", workers=2, length=128)
    assert (found.precision, found.offload) == ("fp32", "none")
    with pytest.raises(ConfigError, match=r"each worker has 1\.0 GiB on the host"):
        fit(SMALL, 0, 1, accelerator="cpu", workers=2)


def test_nothing_fits() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^regions\[0\]\.pools\[0\]: a model of 6,738,415,616 parameters does not fit: ZeRO-3, bf16, "
        r"micro-batch 1, activation checkpointing, optimizer offload still needs .* GiB of 4\.0 GiB on the device",
    ):
        fit(SEVEN, 4, 64)

from dataclasses import dataclass
from typing import Literal

import pytest

from xcloud.cost.memory import Memory, ModelShape, device_memory

PSI = 7_500_000_000
SHAPE = ModelShape(hidden=4096, layers=32, vocab=32000, heads=32)


@dataclass(frozen=True)
class Engine:
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch: int = 1
    activation_checkpointing: bool = False


def states(memory: Memory) -> int:
    return memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes


@pytest.mark.parametrize(("stage", "published_gb"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_zero_paper(stage, published_gb):
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 devices; DeepSpeed's buffers come on top."""
    found = states(device_memory(PSI, Engine(stage, "fp16"), 64, SHAPE, 1024))
    fp32_gradients = 4 * PSI / 64
    buffers = 2 * 500e6 + fp32_gradients + (2e9 if stage == 3 else 0)
    assert found - buffers == pytest.approx(published_gb * 1e9, rel=0.03)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sharding_never_costs_and_a_higher_stage_takes_no_more(stage, precision):
    one = device_memory(PSI, Engine(stage, precision), 4, SHAPE, 1024)
    assert device_memory(PSI, Engine(stage, precision), 8, SHAPE, 1024).total_bytes <= one.total_bytes
    if stage in (1, 2):
        assert device_memory(PSI, Engine(stage + 1, precision), 4, SHAPE, 1024).total_bytes < one.total_bytes


def test_stage_0_in_fp32_has_no_masters_beside_its_weights():
    found = device_memory(1000, Engine(0, "fp32"), 4, SHAPE, 16)
    assert (found.parameters_bytes, found.gradients_bytes, found.optimizer_bytes) == (4000, 4000, 8000)


def test_activations_grow_with_the_batch_and_fall_with_checkpointing():
    one = device_memory(PSI, Engine(micro_batch=1), 1, SHAPE, 2048).activations_bytes
    assert device_memory(PSI, Engine(micro_batch=4), 1, SHAPE, 2048).activations_bytes == 4 * one
    # 34 bytes x sequence x hidden for each layer (arXiv 2205.05198), statistics of attention, logits in 10 bytes
    assert one == 32 * (34 * 2048 * 4096 + 4 * 32 * 2048) + 10 * 2048 * 32000
    kept = device_memory(PSI, Engine(activation_checkpointing=True), 1, SHAPE, 2048).activations_bytes
    assert kept == 32 * 2 * 2048 * 4096 + 34 * 2048 * 4096 + 4 * 32 * 2048 + 10 * 2048 * 32000


def test_offload_moves_bytes_to_the_host_and_loses_none():
    here = device_memory(PSI, Engine(3), 8, SHAPE, 1024)
    there = device_memory(PSI, Engine(3), 8, SHAPE, 1024, offload="optimizer")
    assert there.optimizer_bytes == 0
    assert there.host_bytes - here.host_bytes == here.optimizer_bytes + 4 * PSI // 8
    away = device_memory(PSI, Engine(3), 8, SHAPE, 1024, offload="parameters")
    assert away.parameters_bytes == here.parameters_bytes - 2 * PSI // 8
    with pytest.raises(ValueError, match="higher ZeRO stage"):
        device_memory(PSI, Engine(2), 8, SHAPE, 1024, offload="parameters")


def test_the_host_holds_anchor_outer_state_and_residual():
    plain = device_memory(1_000_000, Engine(), 4, SHAPE, 16, outer_slots=0)
    assert plain.host_bytes == 1_000_000 + 4_000_000 + 1_000_000  # its anchor, the model, its part
    more = device_memory(1_000_000, Engine(), 4, SHAPE, 16, outer_slots=1, feedback=True)
    assert more.host_bytes - plain.host_bytes == 3 * 1_000_000

"""Memory of one rank: an estimate from the size of the model and the settings of its engine.

Model states follow ZeRO (arXiv 1910.02054, section 3) with the buffers that DeepSpeed adds to them. Activations follow
arXiv 2205.05198, section 4, without the matrices of attention, which fused attention never stores. What this project
itself keeps lies in host memory: the rank's chunks of the anchor, of the outer state and of the residual.

It is an estimate. It leaves out the allocator's fragmentation and the libraries' own context (0.5 to 2 GB on a GPU), so
leave a tenth of a device free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Engine", "Memory", "ModelShape", "Offload", "device_memory"]

Offload = Literal["none", "optimizer", "parameters"]
"""What DeepSpeed keeps in host memory: nothing, optimizer states with masters and gradients, or parameters as well."""

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's bucket of gradients that are reduced together (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at a time (`stage3_max_live_parameters`)."""
PARTS = 64 << 20
"""Bytes of the buffer in which a rank packs its update (`xcloud.parts.PART_BYTES`)."""


class Engine(Protocol):
    """The settings of a pool's engine that memory depends on; `EngineConfig` has them."""

    @property
    def zero_stage(self) -> Literal[0, 1, 2, 3]: ...

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def activation_checkpointing(self) -> bool: ...


@dataclass(frozen=True)
class ModelShape:
    """What activations depend on."""

    hidden: int
    layers: int
    vocab: int
    heads: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at their peak.

    Attributes:
        parameters_bytes: weights that are trained with, and what ZeRO-3 gathers of them.
        gradients_bytes: gradients, and the bucket in which they are reduced.
        optimizer_bytes: masters and states of the inner optimizer.
        activations_bytes: of one micro-batch, with logits and loss.
        host_bytes: in host memory, beside the device: see the module's docstring. On a CPU pool the device's bytes come to it.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of the device."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def device_memory(
    parameters: int,
    engine: Engine,
    workers: int,
    shape: ModelShape,
    sequence_length: int,
    *,
    offload: Offload = "none",
    optimizer_slots: int = 2,
    outer_slots: int = 1,
    feedback: bool = False,
) -> Memory:
    """Memory of one of a pool's `workers` ranks.

    Args:
        parameters: trainable ones.
        engine: its ZeRO stage, precision, micro-batch and activation checkpointing.
        workers: ranks that share what ZeRO shards.
        shape: of the model.
        sequence_length: in tokens.
        offload: optimizer needs ZeRO-1 or more, parameters ZeRO-3.
        optimizer_slots: fp32 values of optimizer state for each parameter: 2 for AdamW, 1 for momentum.
        outer_slots: of the outer optimizer: 1 for Nesterov momentum.
        feedback: whether the codec has a residual.

    Raises:
        ValueError: a number that cannot be, or an offload that the stage does not know.
    """
    if min(parameters, workers, sequence_length) < 1:
        raise ValueError("parameters, workers and sequence_length must be at least 1")
    stage = engine.zero_stage
    if (offload == "optimizer" and stage < 1) or (offload == "parameters" and stage < 3):
        raise ValueError(f"offload {offload!r} needs a higher ZeRO stage than {stage}")
    low = engine.precision != "fp32"
    width = 2 if low else FP32
    mine = -(-parameters // workers)
    held = mine if stage >= 3 else parameters

    weights = held * width
    if stage >= 3:
        weights += min(parameters, LIVE) * width
    gradients = (mine if stage >= 2 else parameters) * width
    if stage >= 1:
        gradients += min(parameters, BUCKET) * width
        if low:
            gradients += mine * FP32  # those of its own share in fp32, for the step
    elif low:
        gradients += parameters * FP32  # stage 0 accumulates in fp32 (bf16), or steps in it (fp16)
    # DeepSpeed steps on fp32 masters of its own, in fp32 too, as soon as anything is sharded.
    masters = 1 if low or stage >= 1 else 0
    optimizer = (mine if stage >= 1 else parameters) * FP32 * (masters + optimizer_slots)
    activations = _activations(engine, shape, sequence_length, width)

    # The chunks of a rank, and the whole model on its way into the engine.
    host = (
        mine * FP32 * (1 + outer_slots + (2 if feedback else 0)) + parameters * FP32 + min(PARTS, mine * FP32)
    )
    if offload != "none":
        host += optimizer + mine * FP32
        optimizer, gradients = 0, gradients - (mine * FP32 if low else 0)
    if offload == "parameters":
        host += held * width
        weights -= held * width
    return Memory(weights, gradients, optimizer, activations, host)


def _activations(engine: Engine, shape: ModelShape, length: int, width: int) -> int:
    """Bytes that a micro-batch leaves for its backward pass: 17 values a token, layer and hidden unit."""
    tokens = engine.micro_batch * length
    statistics = tokens * shape.heads * FP32  # of fused attention: one sum for each row and head
    layer = 17 * width * tokens * shape.hidden + statistics
    if engine.activation_checkpointing:
        kept = shape.layers * width * tokens * shape.hidden + layer
    else:
        kept = shape.layers * layer
    # Logits as the model makes them, in fp32 for the loss, and their gradient.
    return kept + tokens * shape.vocab * (width + 2 * FP32)

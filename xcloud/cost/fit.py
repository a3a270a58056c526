"""The engine settings of a pool, chosen from the memory of its machines.

What is chosen changes how a step is computed and never which sequences it takes: a worker's `batch` is cut into
micro-batches, and ZeRO, activation checkpointing and offload move or recompute what a device cannot hold. The settings are
tried from the fastest to the thriftiest, and the first that fits with a micro-batch worth the device's while is taken:
more sharding costs traffic, checkpointing a third of the arithmetic (arXiv 1604.06174), offload the host's speed
(arXiv 2101.06840). Memory is `xcloud.cost.memory`'s estimate; a tenth of the device stays free.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from xcloud.cost.memory import Memory, ModelShape, device_memory
from xcloud.errors import ConfigError
from xcloud.registry import PartConfig

__all__ = ["Budget", "FitConfig", "Fitted", "fit_engine"]

FREE = 0.1
"""Share of a device that stays free: fragmentation, and the libraries' own context."""
WORTHWHILE = 4
"""Sequences of a micro-batch below which thriftier settings are tried first."""
WITHOUT_BF16 = frozenset({"V100", "P100", "P4", "K80", "T4"})
"""Ray's names of accelerators that compute in fp16 and not in bf16."""

Precision = Literal["fp32", "bf16", "fp16"]


class FitConfig(PartConfig):
    """Whether a pool's engine settings are chosen from its memory; what the pool states itself stays.

    Attributes:
        device_gb: memory of one accelerator in GiB; null: by `instance`, or by the smallest known of its kind.
        host_gb: memory of one machine for one worker in GiB; null: its share of `instance`.
    """

    device_gb: Annotated[float, Field(gt=0)] | None = None
    host_gb: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Budget:
    """Memory that one worker may use, in bytes.

    Attributes:
        device: of its accelerator; 0 on CPU.
        host: of its share of the machine; None: not known.
    """

    device: int
    host: int | None


@dataclass(frozen=True)
class Fitted:
    """Engine settings that fit; field names are the pool's keys. `why` says what was tried before them."""

    zero_stage: Literal[0, 1, 2, 3]
    micro_batch: int
    gradient_accumulation: int
    precision: Precision
    activation_checkpointing: bool
    offload: Literal["none", "optimizer"]
    memory: Memory
    why: str

    def settings(self) -> dict[str, Any]:
        """The pool's keys."""
        keys = "zero_stage micro_batch gradient_accumulation precision activation_checkpointing offload"
        return {key: getattr(self, key) for key in keys.split()}


@dataclass(frozen=True)
class _Engine:
    zero_stage: Literal[0, 1, 2, 3]
    precision: Precision
    micro_batch: int
    activation_checkpointing: bool
    offload: Literal["none", "optimizer"]


def fit_engine(
    parameters: int,
    shape: ModelShape,
    *,
    sequence_length: int,
    workers: int,
    batch: int,
    accelerator: str,
    budget: Budget,
    stated: Mapping[str, Any],
    refused: Collection[str] = (),
    where: str = "pool",
) -> Fitted:
    """The fastest engine settings whose memory fits.

    Args:
        parameters: trainable ones.
        shape: of the model.
        sequence_length: in tokens.
        workers: ranks of the pool.
        batch: sequences that a worker takes in one inner step.
        accelerator: `cpu`, `gpu` or Ray's name of the accelerator.
        budget: of one worker.
        stated: keys of the pool that the job states, with their values; `micro_batch` and `gradient_accumulation` only count
            in `batch`.
        refused: settings that the job cannot take: `offload`, `activation_checkpointing`, `low_precision`.
        where: the pool, for errors.

    Raises:
        ConfigError: nothing fits; says what the thriftiest settings would need and what there is.
    """
    tried: list[tuple[_Engine, Memory]] = []
    best: tuple[_Engine, Memory] | None = None
    enough = min(batch, WORTHWHILE)
    for engine in _candidates(workers, batch, accelerator, stated, refused):
        memory = device_memory(
            parameters, engine, workers, shape, sequence_length, offload=engine.offload, feedback=True
        )
        if not _fits(memory, budget):
            tried.append((engine, memory))
        elif engine.micro_batch >= enough:
            best = engine, memory
            break
        elif best is None or engine.micro_batch > best[0].micro_batch:
            best = engine, memory
    if best is None:
        engine, memory = min(tried, key=lambda one: (one[1].total_bytes, one[1].host_bytes))
        there = f"{_gb(budget.device)} on the device and " if budget.device else ""
        host = "any" if budget.host is None else _gb(budget.host)
        raise ConfigError(
            f"{where}: a model of {parameters:,} parameters does not fit: {_name(engine)} still needs {_needs(memory, budget)}, "
            f"and each worker has {there}{host} on the host, of which {FREE:.0%} stays free; expected more workers, larger machines or "
            "a shorter sequence_length"
        )
    engine, memory = best
    return Fitted(
        **{key: getattr(engine, key) for key in ("zero_stage", "micro_batch", "precision", "offload")},
        gradient_accumulation=batch // engine.micro_batch,
        activation_checkpointing=engine.activation_checkpointing,
        memory=memory,
        why=_why(engine, memory, tried, budget),
    )


def _candidates(
    workers: int, batch: int, accelerator: str, stated: Mapping[str, Any], refused: Collection[str]
) -> Iterator[_Engine]:
    """Engine settings from the fastest to the thriftiest; within each, the largest micro-batch first."""
    cpu = accelerator.lower() == "cpu"
    low: Precision = "fp16" if accelerator in WITHOUT_BF16 else "bf16"
    precision = stated.get("precision", "fp32" if cpu or "low_precision" in refused else low)
    stages = [stated["zero_stage"]] if "zero_stage" in stated else [0] if workers == 1 else [1, 2, 3]
    offloads = ["none"] if cpu or "offload" in refused else ["none", "optimizer"]
    offloads = [stated["offload"]] if "offload" in stated else offloads
    recompute = [False] if "activation_checkpointing" in refused else [False, True]
    if "activation_checkpointing" in stated:
        recompute = [stated["activation_checkpointing"]]
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    for offload, again, stage, size in itertools.product(offloads, recompute, stages, sizes):
        if offload != "none" and stage == 0:
            if "zero_stage" in stated:
                continue
            stage = 1  # alone, a worker shards nothing by it, but DeepSpeed offloads from there on
        yield _Engine(stage, precision, size, again, offload)


def _fits(memory: Memory, budget: Budget) -> bool:
    device, host = memory.total_bytes, memory.host_bytes
    if not budget.device:
        device, host = 0, host + device
    return device <= (1 - FREE) * budget.device and (budget.host is None or host <= (1 - FREE) * budget.host)


def _why(engine: _Engine, memory: Memory, tried: list[tuple[_Engine, Memory]], budget: Budget) -> str:
    """What is taken, and the last other settings that did not fit."""
    text = f"{_name(engine)} needs {_needs(memory, budget)}"
    others = [
        one
        for one in tried
        if _name(one[0]) != _name(engine) and one[0].micro_batch == min(engine.micro_batch, WORTHWHILE)
    ] or tried
    if not others:
        return f"{text}; the fastest that there is"
    other, needed = others[-1]
    return f"{text}; {_name(other)} would need {_needs(needed, budget)}"


def _name(engine: _Engine) -> str:
    parts = [f"ZeRO-{engine.zero_stage}", engine.precision, f"micro-batch {engine.micro_batch}"]
    if engine.activation_checkpointing:
        parts.append("activation checkpointing")
    if engine.offload != "none":
        parts.append(f"{engine.offload} offload")
    return ", ".join(parts)


def _needs(memory: Memory, budget: Budget) -> str:
    if not budget.device:
        return f"{_gb(memory.total_bytes + memory.host_bytes)} of {_gb(budget.host or 0)}"
    host = f" and {_gb(memory.host_bytes)} of {_gb(budget.host)} on the host" if budget.host else ""
    return f"{_gb(memory.total_bytes)} of {_gb(budget.device)} on the device{host}"


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

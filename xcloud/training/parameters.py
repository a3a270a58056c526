"""Full fp32 values inside a live DeepSpeed engine, one parameter at a time.

DeepSpeed keeps fp32 master weights in a different place for every ZeRO stage and precision.
The classes here give one face to all of them: read or write one parameter's full fp32
value, or one of its inner-optimizer states, as a flat tensor. So the update path and the
checkpoint know nothing of sharding, and a checkpoint written under one ZeRO stage and world
size loads under any other.

Reading is collective where the stage shards (every rank calls it, in the same order);
writing is local, since every caller holds the full value. DeepSpeed's own
`safe_set_full_*` are not used: for ZeRO-3 they fail on sizes that the world does not
divide, and for ZeRO-1/2 they leave the low-precision copy stale (0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from xcloud.training.models import trainable

__all__ = ["EngineParameters", "open_parameters"]

MASTER = None
"""As a state key: the fp32 master weight itself."""


class EngineParameters(Protocol):
    """Access by parameter name. All tensors are flat fp32 on the engine's device."""

    extra: dict[str, dict[torch.Tensor, torch.Tensor]]
    """Values beside the masters that are not the optimizer's, by key and flat; `read` and `write` know them."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper."""
        ...

    def read(self, name: str, key: str | None = MASTER) -> torch.Tensor:
        """Full value of a parameter or of its state `key`; collective; do not modify it."""
        ...

    def write(self, name: str, value: torch.Tensor, key: str | None = MASTER) -> None:
        """Set the full value (flat fp32, any device); local."""
        ...

    def flats(self) -> Iterator[torch.Tensor]:
        """The tensors that the inner optimizer really steps."""
        ...

    def flat(self, name: str) -> torch.Tensor:
        """The one of them that a parameter belongs to; the same on all ranks, whoever holds its values."""
        ...

    def holds(self, name: str) -> bool:
        """Whether this rank keeps some of the parameter's values."""
        ...


class _Base:
    """What the four layouts share."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.named = trainable(engine.module)
        self.extra: dict[str, dict[torch.Tensor, torch.Tensor]] = {}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper."""
        optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        return optimizer

    def holds(self, name: str) -> bool:
        del name
        return True

    def _values(self, flat: torch.Tensor, key: str | None) -> torch.Tensor:
        """A flat's masters or state; zeros, to be read only, for one that its optimizer does not keep."""
        if key is MASTER:
            return flat.data
        states = self.extra[key] if key in self.extra else {flat: self.optimizer.state[flat].get(key)}
        values = states[flat]
        return values if values is not None else flat.new_zeros((), requires_grad=False).expand(flat.shape)


class Unsharded(_Base):
    """ZeRO-0 in fp32: the module's parameters are the master weights."""

    def flat(self, name: str) -> torch.Tensor:
        return self.named[name]

    def read(self, name: str, key: str | None = MASTER) -> torch.Tensor:
        return self._values(self.flat(name), key).reshape(-1)

    def write(self, name: str, value: torch.Tensor, key: str | None = MASTER) -> None:
        tensor = self._values(self.flat(name), key)
        tensor.copy_(value.view(tensor.shape))

    def flats(self) -> Iterator[torch.Tensor]:
        yield from self.named.values()


class Mastered(_Base):
    """ZeRO-0 in bf16 or fp16: an fp32 master beside each low-precision parameter."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        wrapper = engine.optimizer
        masters = {
            id(low): high
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        self.masters = {name: masters[id(p)] for name, p in self.named.items()}

    def flat(self, name: str) -> torch.Tensor:
        master: torch.Tensor = self.masters[name]
        return master

    def read(self, name: str, key: str | None = MASTER) -> torch.Tensor:
        return self._values(self.flat(name), key).reshape(-1)

    def write(self, name: str, value: torch.Tensor, key: str | None = MASTER) -> None:
        tensor = self._values(self.flat(name), key)
        tensor.copy_(value.view(tensor.shape))
        if key is MASTER:
            self.named[name].data.copy_(tensor)

    def flats(self) -> Iterator[torch.Tensor]:
        yield from self.masters.values()


class Zero12(_Base):
    """ZeRO-1 and -2: each rank holds a fragment of some parameters' fp32 masters."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.fp32 = all(p.dtype == torch.float32 for p in self.named.values())
        wrapper = engine.optimizer
        partitions = {
            id(p): flat
            for group, flat in zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True)
            for p in group
        }
        self.partitions = {name: partitions[id(p)] for name, p in self.named.items()}

    def flat(self, name: str) -> torch.Tensor:
        partition: torch.Tensor = self.partitions[name]
        return partition

    def holds(self, name: str) -> bool:
        parameter: Any = self.named[name]
        return parameter._hp_mapping is not None

    def _fragment(self, name: str, key: str | None) -> tuple[torch.Tensor, slice] | None:
        """This rank's fragment and where in the parameter it lies; None without one."""
        if not self.holds(name):
            return None
        parameter: Any = self.named[name]
        at, where = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        source = self._values(self.flat(name), key)
        return source.narrow(0, at.start, at.numel), slice(where.start, where.start + where.numel)

    def read(self, name: str, key: str | None = MASTER) -> torch.Tensor:
        parameter = self.named[name]
        if key is MASTER and self.fp32:
            return parameter.data.reshape(-1)  # gathered by the last step, and exact
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        own = self._fragment(name, key)
        if own is not None:
            full[own[1]] = own[0]
        dist.all_reduce(full)
        return full

    def write(self, name: str, value: torch.Tensor, key: str | None = MASTER) -> None:
        parameter = self.named[name]
        own = self._fragment(name, key)
        if own is not None:
            own[0].copy_(value[own[1]])
        if key is MASTER:
            parameter.data.copy_(value.view(parameter.shape))

    def flats(self) -> Iterator[torch.Tensor]:
        yield from self.engine.optimizer.single_partition_of_fp32_groups


class Zero3(_Base):
    """ZeRO-3: each rank holds an equal, padded slice of every parameter."""

    def _place(self, name: str) -> tuple[torch.Tensor, int, int]:
        """The parameter's flat, and where in it the slice begins and how long it is."""
        wrapper = self.engine.optimizer
        group, start, length = wrapper.grad_position[wrapper.get_param_id(self.named[name])]
        return wrapper.fp32_partitioned_groups_flat[group], start, length

    def flat(self, name: str) -> torch.Tensor:
        return self._place(name)[0]

    def _slice(self, name: str, key: str | None) -> torch.Tensor:
        flat, start, length = self._place(name)
        return self._values(flat, key).narrow(0, start, length)

    def read(self, name: str, key: str | None = MASTER) -> torch.Tensor:
        parameter: Any = self.named[name]
        own = self._slice(name, key).to(parameter.device).contiguous()
        full = torch.empty(own.numel() * dist.get_world_size(), dtype=torch.float32, device=own.device)
        dist.all_gather_single(full, own)
        return full[: parameter.ds_numel]

    def write(self, name: str, value: torch.Tensor, key: str | None = MASTER) -> None:
        parameter: Any = self.named[name]
        own = self._slice(name, key)
        start = own.numel() * dist.get_rank()
        held = max(0, min(own.numel(), parameter.ds_numel - start))
        own[:held].copy_(value[start : start + held])
        if key is MASTER:
            parameter.ds_tensor.data[:held].copy_(value[start : start + held])
            if parameter.data.numel() == parameter.ds_numel:  # gathered now, or kept gathered
                parameter.data.copy_(value.view(parameter.ds_shape))

    def flats(self) -> Iterator[torch.Tensor]:
        yield from self.engine.optimizer.fp32_partitioned_groups_flat


def open_parameters(engine: Any, zero_stage: int) -> EngineParameters:
    """The right access for an engine, by its ZeRO stage and wrapper."""
    if zero_stage == 3:
        return Zero3(engine)
    if zero_stage in (1, 2):
        return Zero12(engine)
    return Mastered(engine) if hasattr(engine.optimizer, "fp32_groups") else Unsharded(engine)

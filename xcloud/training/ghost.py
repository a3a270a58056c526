"""The gradient norm of every example in a batch, without the gradients: ghost norms (arXiv 2110.05679, 2205.10683).

A linear layer with inputs a_t and output gradients g_t over the positions t of one example has the gradient
sum_t g_t a_t^T, whose squared norm is sum_{t,s} (a_t . a_s)(g_t . g_s): two T x T matrices in place of the gradient. The
same holds for an embedding, whose inputs are one-hot. A weight that is used twice (a tied output head) has the sum of two
such gradients, so the inner products between its uses count too. Vectors (biases, norms) are few: their gradients are
taken by example.

Only modules whose every example is worked on by itself can be measured. Others are refused by name.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from xcloud.errors import ModelError

__all__ = ["GhostNorms"]

Tensor = torch.Tensor


@dataclass
class Call:
    """One call of a module in the recorded forward pass; `version` tells whether somebody wrote into its output."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    version: int


@dataclass
class Affine:
    """A use of a matrix: inputs a [B, T, p] and gradients g [B, T, d] of outputs."""

    a: Tensor
    g: Tensor


@dataclass
class Lookup:
    """A use of an embedding: ids [B, T] and gradients g [B, T, d] of the rows looked up."""

    ids: Tensor
    g: Tensor


Use = Affine | Lookup


class GhostNorms:
    """Measures the gradient norms of the examples in a batch.

    Args:
        model: hooks are put on its modules; they cost nothing outside `recording`.

    Raises:
        ModelError: a module with trainable weights cannot be measured; names it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[Call] = []
        self._recording = False
        self.embeddings = 0
        for name, module in model.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            _check(name, module)
            self.embeddings += isinstance(module, nn.Embedding)
            module.register_forward_hook(self._hook(name), with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what modules do in the forward pass inside, for one call of `norms`."""
        self._calls, self._recording = [], True
        try:
            yield
        finally:
            self._recording = False

    def norms(self, losses: Tensor) -> Tensor:
        """L2 norm of each example's gradient; fp32, shape [B], detached.

        Args:
            losses: of the examples, [B], from the forward pass that was recorded. Example i's must depend on row i only.

        Raises:
            ModelError: a module mixes examples, or its output was written over.
        """
        calls, self._calls = self._calls, []
        batch = losses.shape[0]
        for call in calls:
            if call.input.shape[0] != batch or call.output.shape[0] != batch:
                raise ModelError(
                    f"dp: module {call.name!r} ({type(call.module).__name__}) works on {tuple(call.input.shape)} for "
                    f"{batch} examples, so what each of them adds to its gradient cannot be told; "
                    "expected a model that keeps examples apart"
                )
            if call.output._version != call.version:
                raise ModelError(
                    f"dp: the output of module {call.name!r} ({type(call.module).__name__}) is written over in place, so "
                    "its gradient cannot be measured"
                )
        outputs = [call.output for call in calls]
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
        matrices: defaultdict[int, list[Use]] = defaultdict(list)
        vectors: dict[int, Tensor] = {}
        for call, gradient in zip(calls, gradients, strict=True):
            if gradient is None:
                continue
            for parameter, use in _uses(call, gradient.float()):
                if isinstance(use, torch.Tensor):
                    key = id(parameter)
                    vectors[key] = vectors[key] + use if key in vectors else use
                else:
                    matrices[id(parameter)].append(use)
        squared = torch.zeros(batch, dtype=torch.float64, device=losses.device)
        for vector in vectors.values():
            squared += vector.flatten(1).double().square().sum(1)
        for uses in matrices.values():
            for index, one in enumerate(uses):
                squared += _inner(one, one)
                for other in uses[index + 1 :]:
                    squared += 2 * _inner(one, other)
        return squared.clamp(min=0).sqrt().float()

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._recording:
                given = args[0] if args else next(iter(kwargs.values()))
                self._calls.append(Call(name, module, given.detach(), output, output._version))

        return note


def _check(name: str, module: nn.Module) -> None:
    """Refuse a module that cannot be measured."""
    why = "its kind is not known to dp"
    if isinstance(module, nn.Embedding) and type(module) is nn.Embedding:
        if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
            return
        why = "dp knows no embedding with max_norm, scale_grad_by_freq or sparse"
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1:
        why = "dp knows norms over the last dimension only"
    elif type(module) in (nn.Linear, Conv1D, nn.LayerNorm, nn.RMSNorm) or _is_rms_norm(module):
        return
    raise ModelError(
        f"dp: module {name or 'model'!r} ({type(module).__name__}) has trainable weights and cannot be measured by "
        f"example: {why}; expected Linear, Conv1D, Embedding, LayerNorm and RMSNorm only"
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it is one of the many classes that scale a normalised input by a vector `weight`."""
    own = dict(module.named_parameters(recurse=False))
    names = type(module).__name__.endswith("RMSNorm")
    # Sharded by ZeRO-3, a parameter has no shape of its own.
    return (
        names and set(own) == {"weight"} and len(getattr(own["weight"], "ds_shape", own["weight"].shape)) == 1
    )


def _uses(call: Call, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Use | Tensor]]:
    """What a call adds to the gradients of its module's weights: a use of a matrix, or a vector by example [B, n]."""
    module: Any = call.module
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    if isinstance(module, nn.Embedding):
        ids, g = call.input.flatten(1), gradient.flatten(1, -2)
        if module.padding_idx is not None:  # torch leaves that row without a gradient
            g = g * (ids != module.padding_idx).unsqueeze(-1)
        yield own["weight"], Lookup(ids, g)
        return
    positions = gradient.flatten(1, -2) if gradient.ndim > 2 else gradient.unsqueeze(1)
    if "bias" in own:
        yield own["bias"], positions.sum(1)
    if "weight" not in own:
        return
    if isinstance(module, nn.Linear | Conv1D):
        a = call.input.float()
        yield own["weight"], Affine(a.flatten(1, -2) if a.ndim > 2 else a.unsqueeze(1), positions)
    else:
        yield own["weight"], _scale_gradient(module, call.input, gradient)


def _scale_gradient(module: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a norm's scale by example: [B, n]. It does not depend on the scale, so that nothing is gathered."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = tuple(module.normalized_shape)
        normal = (
            nn.functional.layer_norm(x, shape, eps=module.eps)
            if isinstance(module, nn.LayerNorm)
            else nn.functional.rms_norm(x, shape, eps=module.eps)
        )
        product = gradient * normal
        return product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    # The module's own forward pass, with a scale for each example.
    scale = torch.ones(
        (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]), dtype=x.dtype, device=x.device
    ).requires_grad_()
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {"weight": scale}
    with torch.enable_grad():
        output = type(module).forward(twin, x)
    (found,) = torch.autograd.grad(output, scale, gradient.to(output.dtype))
    return found.flatten(1).float()


def _inner(one: Use, other: Use) -> Tensor:
    """Inner products, example by example, of the gradients that two uses of one matrix give it: fp64 [B]."""
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        same = one.ids.unsqueeze(2) == other.ids.unsqueeze(1)
        return (torch.bmm(one.g, other.g.mT) * same).sum((1, 2), dtype=torch.float64)
    if isinstance(one, Lookup) or isinstance(other, Lookup):
        lookup, affine = (one, other) if isinstance(one, Lookup) else (other, one)
        assert isinstance(lookup, Lookup)
        assert isinstance(affine, Affine)
        rows = lookup.ids.unsqueeze(1).expand(-1, affine.g.shape[1], -1)
        return (affine.g.gather(2, rows) * torch.bmm(affine.a, lookup.g.mT)).sum((1, 2), dtype=torch.float64)
    (_, length, p), d = one.a.shape, one.g.shape[2]
    if one is other and length * (p + d) > p * d:  # the gradient itself is the smaller one
        return torch.bmm(one.g.mT, one.a).square().sum((1, 2), dtype=torch.float64)
    return (torch.bmm(one.a, other.a.mT) * torch.bmm(one.g, other.g.mT)).sum((1, 2), dtype=torch.float64)

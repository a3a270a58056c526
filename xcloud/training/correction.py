"""Corrections of the drift between regions: FedProx (arXiv 1812.06127) and SCAFFOLD (arXiv 1910.06378).

Both add a term to the gradient, so both move the fp32 masters right before the optimizer steps them:

    FedProx:   theta -= lr * mu * (theta - anchor)
    SCAFFOLD:  theta -= lr * (c - c_i)

The gradient was taken before, so with plain SGD this is the paper's step; with AdamW or Muon the term
is decoupled from the gradient's scaling, as weight decay is. All of it is elementwise, on whatever
share of the masters the ZeRO stage keeps on this rank, and only where the optimizer really steps.

SCAFFOLD's control variates follow option II. Over a round of steps whose learning rates add up to L,
the region's own one becomes c_i - c + (anchor - theta) / L, which is the mean of its gradients. With all
regions present and weighted alike the paper's c becomes mean(anchor - theta) / L: the merged update over
L, which every region has anyway, so no second vector crosses the wire. Under other weights c is the mean
by these weights, of the objective that they stand for. A region that was absent keeps its c_i and is
left out of c for that round, where the paper would keep its last share in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from xcloud.training.parameters import EngineParameters

__all__ = ["COMMON", "OWN", "Correction", "FedProx", "Scaffold"]

COMMON, OWN = "control", "own_control"
"""Keys of the values beside the masters: c, equal in all regions, and c_i, private to a region's pool."""


class Correction(Protocol):
    """What a rank tells its correction."""

    controls: bool
    """Whether it keeps control variates, under `COMMON` and `OWN`."""

    def begin(self) -> None:
        """A round begins, and the masters are the anchor."""
        ...

    def settle(self, total_lr: float) -> None:
        """The round's update was merged; the masters are still the region's own."""
        ...


class FedProx:
    """A pull of strength `mu` towards the round's anchor."""

    controls = False

    def __init__(self, parameters: EngineParameters, mu: float) -> None:
        self.parameters, self.mu = parameters, mu
        self.anchor: dict[torch.Tensor, torch.Tensor] = {}
        parameters.optimizer.register_step_pre_hook(self._correct)

    def begin(self) -> None:
        _keep(self.parameters, self.anchor)

    def settle(self, total_lr: float) -> None:
        del total_lr

    def _correct(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat, lr in _stepping(optimizer):
            flat.data.lerp_(self.anchor[flat], lr * self.mu)


class Scaffold:
    """Control variates: the mean gradient of all regions in place of the region's own."""

    controls = True

    def __init__(self, parameters: EngineParameters) -> None:
        self.parameters = parameters
        self.anchor: dict[torch.Tensor, torch.Tensor] = {}
        self.common, self.own = (
            {flat: torch.zeros_like(flat, requires_grad=False) for flat in parameters.flats()}
            for _ in range(2)
        )
        parameters.extra.update({COMMON: self.common, OWN: self.own})
        parameters.optimizer.register_step_pre_hook(self._correct)

    def begin(self) -> None:
        _keep(self.parameters, self.anchor)

    def settle(self, total_lr: float) -> None:
        for flat, own in self.own.items():
            own.sub_(self.common[flat]).add_(self.anchor[flat] - flat.data, alpha=1 / total_lr)

    def _correct(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat, lr in _stepping(optimizer):
            flat.data.add_(self.own[flat] - self.common[flat], alpha=lr)


def _keep(parameters: EngineParameters, anchor: dict[torch.Tensor, torch.Tensor]) -> None:
    for flat in parameters.flats():
        if flat in anchor:
            anchor[flat].copy_(flat.data)
        else:
            anchor[flat] = flat.detach().clone()


def _stepping(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, float]]:
    """The tensors that this call of the optimizer steps, with their learning rates."""
    for group in optimizer.param_groups:
        for flat in group["params"]:
            yield flat, group["lr"]

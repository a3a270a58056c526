"""Muon: momentum whose matrices are orthogonalized, under every ZeRO stage.

Muon (Keller Jordan; arXiv 2502.16982) steps a hidden matrix along U V^T of its momentum's singular
value decomposition U S V^T, which a Newton-Schulz iteration comes close to; embeddings, the output
head, norms and vectors are stepped by AdamW. MuLoCo (arXiv 2505.23725) uses it inside DiLoCo.

Momentum is elementwise and stays in the optimizer's flat, sharded tensors, like every other
state. Only the iteration wants whole matrices, so a step has three phases: the momentum into a
scratch tensor beside each flat; each matrix read out of it whole, orthogonalized, and the part
that this rank holds written back (`EngineParameters` knows the layout); the step along the scratch.
DeepSpeed's own Muon is not used: decision 0013.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from xcloud.training.parameters import EngineParameters

__all__ = ["Muon", "hidden_matrices", "orthogonalize"]

SCRATCH = "muon_update"


def hidden_matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable two-dimensional parameters that neither embed tokens or positions nor give logits."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    ends = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) or m is head]
    outside = {id(p) for module in ends for p in module.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and id(p) not in outside
    }


def orthogonalize(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Near U V^T of `matrix` (fp32, 2-D), by Newton-Schulz; in bf16 on GPU, fp32 on CPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.mT if tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(torch.float32)


class Muon(torch.optim.Optimizer):
    """Muon on `matrices`, torch's AdamW on `groups`.

    Args:
        matrices: hidden matrices by name, not yet partitioned.
        groups: parameter groups of AdamW; the rest of the model.
        lr, weight_decay, momentum, nesterov, ns_steps: of Muon.
        adjust_lr: how the step's length follows a matrix's shape, in torch's terms: `match_rms_adamw`
            (AdamW's length) or `original` (Keller Jordan's).
        adamw: keyword arguments of AdamW.
    """

    def __init__(
        self,
        matrices: Mapping[str, torch.nn.Parameter],
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr: Literal["match_rms_adamw", "original"],
        adamw: Mapping[str, Any],
    ) -> None:
        self.shapes = {name: p.shape for name, p in matrices.items()}
        self.momentum, self.nesterov, self.ns_steps, self.adjust_lr = momentum, nesterov, ns_steps, adjust_lr
        self.parameters: EngineParameters | None = None
        self._adamw = torch.optim.AdamW(groups, **adamw)
        own = {"params": list(matrices.values()), "lr": lr, "weight_decay": weight_decay, "muon": True}
        super().__init__([own, *self._adamw.param_groups], {"muon": False})

    def bind(self, parameters: EngineParameters) -> None:
        """Give it the layout of the engine that it now steps; before that no gradient can be anything but zero."""
        self.parameters = parameters

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the groups that DeepSpeed has put in place; collective where the stage shards."""
        assert closure is None
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            flats = [flat for flat in group["params"] if flat.grad is not None]
            if group["muon"] and flats:
                self._step_matrices(flats, group["lr"], group["weight_decay"])

    def _step_matrices(self, flats: Sequence[torch.Tensor], lr: float, weight_decay: float) -> None:
        updates: dict[torch.Tensor, torch.Tensor] = {}
        for flat in flats:
            state, gradient = self.state[flat], flat.grad
            assert gradient is not None
            state.pop(
                "exp_avg_sq", None
            )  # AdamW's, which a restored checkpoint gives to all parameters alike
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            average = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
            updates[flat] = gradient.lerp(average, self.momentum) if self.nesterov else average.clone()
        if self.parameters is not None:
            self._orthogonalize_all(self.parameters, updates)
        for flat, update in updates.items():
            flat.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)

    def _orthogonalize_all(
        self, parameters: EngineParameters, updates: dict[torch.Tensor, torch.Tensor]
    ) -> None:
        parameters.extra[SCRATCH] = updates
        for name, shape in self.shapes.items():
            if parameters.flat(name) in updates:
                full = parameters.read(name, SCRATCH)
                if parameters.holds(name):
                    step = orthogonalize(full.view(shape), self.ns_steps) * self._length(*shape)
                    parameters.write(name, step.reshape(-1), SCRATCH)
        del parameters.extra[SCRATCH]

    def _length(self, rows: int, columns: int) -> float:
        if self.adjust_lr == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

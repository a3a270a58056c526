"""Outer optimizers: the step from one committed model to the next.

Every region runs the outer step itself, on its own anchor chunks, from the same merged
pseudo-gradient; so no server ever holds the model or the outer state, and the regions'
digests must agree afterwards. All arithmetic is elementwise fp32 in blocks, so that the
result does not depend on how chunks are shared among ranks.

`sgd` with learning rate 1 over averaged updates is FedAvg (arXiv 1602.05629);
`nesterov` is DiLoCo (arXiv 2311.08105), in torch's formulation of SGD with Nesterov momentum:
`v = momentum * v + g; theta = theta - lr * (g + momentum * v)`; `delayed_nesterov` (arXiv
2401.09135) takes its momentum from the mean of several merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from xcloud.registry import PartConfig, Registry

__all__ = ["OUTER_OPTIMIZERS", "Nesterov", "NesterovConfig", "OuterConfig", "OuterOptimizer", "SGDConfig"]

BLOCK = 1 << 16
"""Elements worked on at a time: 256 KiB of fp32, so that a block stays in cache."""

Array = npt.NDArray[np.float32]


class OuterOptimizer(Protocol):
    """Steps anchor chunks in place."""

    slots: tuple[str, ...]
    """Names of the per-element fp32 states, all starting at zero."""

    def step(self, anchor: Array, gradient: Array, state: Mapping[str, Array], sync: int) -> None:
        """One step on one chunk: fp32, shape (n,); `anchor` and `state` change in place.

        Args:
            sync: number of this merge among all that the chunk has seen, from 1.
        """
        ...


class OuterConfig(PartConfig):
    """Base config of the family."""

    type: str

    def build(self) -> OuterOptimizer:
        raise NotImplementedError  # every registered subclass builds its optimizer


OUTER_OPTIMIZERS: Registry[OuterConfig] = Registry("outer optimizer", OuterConfig)


class SGD:
    """`theta = theta - lr * g`."""

    slots: tuple[str, ...] = ()

    def __init__(self, lr: float) -> None:
        self.lr = np.float32(lr)
        self._work = np.empty(BLOCK, np.float32)

    def step(self, anchor: Array, gradient: Array, state: Mapping[str, Array], sync: int) -> None:
        del state, sync
        for start in range(0, anchor.size, BLOCK):
            theta = anchor[start : start + BLOCK]
            if self.lr == 1:
                np.subtract(theta, gradient[start : start + BLOCK], out=theta)
                continue
            work = self._work[: theta.size]
            np.multiply(gradient[start : start + BLOCK], self.lr, out=work)
            np.subtract(theta, work, out=theta)


class Nesterov:
    """SGD with Nesterov momentum, no dampening."""

    slots: tuple[str, ...] = ("momentum",)

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr = np.float32(lr)
        self.momentum = np.float32(momentum)
        self._work = np.empty(BLOCK, np.float32)

    def step(self, anchor: Array, gradient: Array, state: Mapping[str, Array], sync: int) -> None:
        del sync
        for start in range(0, anchor.size, BLOCK):
            block = slice(start, start + BLOCK)
            theta, g, v = anchor[block], gradient[block], state["momentum"][block]
            work = self._work[: theta.size]
            np.multiply(v, self.momentum, out=v)
            np.add(v, g, out=v)
            np.multiply(v, self.momentum, out=work)
            np.add(work, g, out=work)
            np.multiply(work, self.lr, out=work)
            np.subtract(theta, work, out=theta)


@OUTER_OPTIMIZERS.register
class SGDConfig(OuterConfig):
    """`sgd`: with lr 1 this is federated averaging."""

    type: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1.0

    def build(self) -> OuterOptimizer:
        return SGD(self.lr)


@OUTER_OPTIMIZERS.register
class NesterovConfig(OuterConfig):
    """`nesterov`: DiLoCo's outer optimizer."""

    type: Literal["nesterov"] = "nesterov"
    lr: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def build(self) -> OuterOptimizer:
        return Nesterov(self.lr, self.momentum)


class DelayedNesterov:
    """Nesterov momentum that moves only every `delay` merges, by their mean (arXiv 2401.09135).

    Between, a merge counts by itself, as `g / delay`, with the share `c` of the momentum's step.
    """

    slots: tuple[str, ...] = ("momentum", "buffer")

    def __init__(self, lr: float, momentum: float, delay: int, c: float) -> None:
        self.lr, self.momentum, self.delay = np.float32(lr), np.float32(momentum), delay
        self.between = np.float32(c) * self.momentum
        self.at_delay = np.float32(1 - c * delay + c) * self.momentum
        self._work, self._more = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)

    def step(self, anchor: Array, gradient: Array, state: Mapping[str, Array], sync: int) -> None:
        moves, count = sync % self.delay == 0, np.float32(self.delay)
        for start in range(0, anchor.size, BLOCK):
            block = slice(start, start + BLOCK)
            theta, g, m, total = (
                anchor[block],
                gradient[block],
                state["momentum"][block],
                state["buffer"][block],
            )
            work, more = self._work[: theta.size], self._more[: theta.size]
            np.add(total, g, out=total)
            if moves:
                np.multiply(m, self.momentum, out=m)
                np.divide(total, count, out=work)
                np.add(m, work, out=m)
                total.fill(0)
            np.multiply(m, self.at_delay if moves else self.between, out=work)
            np.divide(g, count, out=more)
            np.add(work, more, out=work)
            np.multiply(work, self.lr, out=work)
            np.subtract(theta, work, out=theta)


@OUTER_OPTIMIZERS.register
class DelayedNesterovConfig(OuterConfig):
    """`delayed_nesterov`: for merges that come often and hold few or stale updates."""

    type: Literal["delayed_nesterov"] = "delayed_nesterov"
    lr: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    delay: Annotated[int, Field(ge=1)] = 4
    c: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _share(self) -> DelayedNesterovConfig:
        if self.c * self.delay > 1:
            raise ValueError(
                f"c is {self.c} and delay {self.delay}; expected c <= 1 / delay = {1 / self.delay:.4g}"
            )
        return self

    def build(self) -> OuterOptimizer:
        return DelayedNesterov(self.lr, self.momentum, self.delay, self.c)


class Adaptive:
    """Adam and Yogi on the server (FedOpt, arXiv 2003.00295, algorithm 2): no bias correction, `tau` below the root."""

    slots: tuple[str, ...] = ("m", "v")

    def __init__(self, lr: float, betas: tuple[float, float], tau: float, yogi: bool) -> None:
        self.lr, self.tau = np.float32(lr), np.float32(tau)
        self.beta1, self.beta2 = (np.float32(beta) for beta in betas)
        self.yogi = yogi
        self._work, self._more = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)

    def step(self, anchor: Array, gradient: Array, state: Mapping[str, Array], sync: int) -> None:
        del sync
        one = np.float32(1.0)
        for start in range(0, anchor.size, BLOCK):
            block = slice(start, start + BLOCK)
            theta, g, m, v = anchor[block], gradient[block], state["m"][block], state["v"][block]
            work, more = self._work[: theta.size], self._more[: theta.size]
            np.multiply(m, self.beta1, out=m)
            np.multiply(g, one - self.beta1, out=work)
            np.add(m, work, out=m)
            np.multiply(g, g, out=work)
            if self.yogi:  # v -= (1 - beta2) g^2 sign(v - g^2)
                np.subtract(v, work, out=more)
                np.sign(more, out=more)
                np.multiply(work, more, out=work)
                np.multiply(work, one - self.beta2, out=work)
                np.subtract(v, work, out=v)
            else:
                np.multiply(v, self.beta2, out=v)
                np.multiply(work, one - self.beta2, out=work)
                np.add(v, work, out=v)
            np.sqrt(v, out=work)
            np.add(work, self.tau, out=work)
            np.divide(m, work, out=work)
            np.multiply(work, self.lr, out=work)
            np.subtract(theta, work, out=theta)


Beta = Annotated[float, Field(ge=0, lt=1)]


class _AdaptiveConfig(OuterConfig):
    """Settings that Adam and Yogi share; the pseudo-gradient is large beside a gradient, so `tau` is too."""

    lr: Annotated[float, Field(gt=0)] = 1e-2
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    tau: Annotated[float, Field(gt=0)] = 1e-3


@OUTER_OPTIMIZERS.register
class AdamConfig(_AdaptiveConfig):
    """`adam`: FedAdam."""

    type: Literal["adam"] = "adam"

    def build(self) -> OuterOptimizer:
        return Adaptive(self.lr, self.betas, self.tau, yogi=False)


@OUTER_OPTIMIZERS.register
class YogiConfig(_AdaptiveConfig):
    """`yogi`: FedYogi, whose second moment grows and shrinks by steps of the gradient's size."""

    type: Literal["yogi"] = "yogi"

    def build(self) -> OuterOptimizer:
        return Adaptive(self.lr, self.betas, self.tau, yogi=True)

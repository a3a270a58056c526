"""Outer optimizers: torch's own steps, whatever the chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xcloud.outer
from tests.strategies import Array, pieces, quick, vectors
from xcloud.outer import OUTER_OPTIMIZERS, OuterConfig

STEPS = 6
SETTINGS: list[dict[str, Any]] = [
    {"type": "sgd"},
    {"type": "sgd", "lr": 0.3},
    {"type": "nesterov"},
    {"type": "nesterov", "lr": 0.7, "momentum": 0.6},
    {"type": "nesterov", "lr": 1.0, "momentum": 0.0},
    {"type": "adam"},
    {"type": "yogi", "lr": 0.1, "betas": [0.8, 0.9], "tau": 0.01},
    {"type": "delayed_nesterov", "delay": 1},
    {"type": "delayed_nesterov", "delay": 2, "momentum": 0.6, "c": 0.5},
    {"type": "delayed_nesterov", "lr": 0.3, "delay": 3, "c": 0.1},
]
TORCH = [s for s in SETTINGS if s["type"] in ("sgd", "nesterov") or s.get("delay") == 1]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def start(config: OuterConfig, anchor: Array) -> tuple[Array, dict[str, Array]]:
    """A copy of the anchor, and fresh state."""
    return anchor.copy(), {slot: np.zeros_like(anchor) for slot in config.build().slots}


def gradients(size: int) -> list[Array]:
    """The merged pseudo-gradients of some rounds."""
    numbers = np.random.default_rng(size)
    return [numbers.standard_normal(size).astype(np.float32) for _ in range(STEPS)]


def test_every_outer_optimizer_is_tested() -> None:
    assert {s["type"] for s in SETTINGS} == set(OUTER_OPTIMIZERS.names)


@pytest.mark.parametrize("settings", TORCH, ids=str)
def test_steps_as_torch_does(settings: dict[str, Any]) -> None:
    config = OUTER_OPTIMIZERS.parse(settings)
    anchor = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    theta, state = start(config, anchor)
    parameter = torch.nn.Parameter(torch.from_numpy(anchor.copy()))
    momentum = getattr(config, "momentum", 0.0)
    reference = torch.optim.SGD([parameter], lr=config.lr, momentum=momentum, nesterov=momentum > 0)
    for sync, gradient in enumerate(gradients(anchor.size), 1):
        config.build().step(
            theta, gradient, state, sync
        )  # a fresh optimizer each time: all state is in `state`
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        np.testing.assert_allclose(theta, parameter.detach().numpy(), rtol=1e-6, atol=1e-6)


@every_setting
@quick
@given(data=st.data(), anchor=vectors(st.integers(1, 40)))
def test_chunks_do_not_change_a_bit(settings: dict[str, Any], data: st.DataObject, anchor: Array) -> None:
    """Ranks share the chunks out differently from region to region, and the digests must still agree."""
    config = OUTER_OPTIMIZERS.parse(settings)
    whole, whole_state = start(config, anchor)
    parts, parts_state = start(config, anchor)
    for sync, gradient in enumerate(gradients(anchor.size), 1):
        config.build().step(whole, gradient, whole_state, sync)
        for piece in data.draw(pieces(anchor.size)):
            views = {slot: values[piece] for slot, values in parts_state.items()}
            config.build().step(parts[piece], gradient[piece], views, sync)
    assert parts.tobytes() == whole.tobytes()
    assert {k: v.tobytes() for k, v in parts_state.items()} == {
        k: v.tobytes() for k, v in whole_state.items()
    }


@every_setting
@pytest.mark.parametrize("block", [1, 7, 64, 999])
def test_blocks_do_not_change_a_bit(
    settings: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, anchor = OUTER_OPTIMIZERS.parse(settings), gradients(1000)[0]
    expected, expected_state = start(config, anchor)
    for sync, gradient in enumerate(gradients(anchor.size), 1):
        config.build().step(expected, gradient, expected_state, sync)
    monkeypatch.setattr(xcloud.outer, "BLOCK", block)
    found, state = start(config, anchor)
    for sync, gradient in enumerate(gradients(anchor.size), 1):
        config.build().step(found, gradient, state, sync)
    assert found.tobytes() == expected.tobytes()


@every_setting
def test_the_gradient_is_only_read(settings: dict[str, Any]) -> None:
    """It is a read-only buffer that every rank of a node maps."""
    config, gradient = OUTER_OPTIMIZERS.parse(settings), gradients(100)[0]
    before = gradient.tobytes()
    gradient.flags.writeable = False
    theta, state = start(config, np.ones(100, np.float32))
    for sync in range(1, 4):
        config.build().step(theta, gradient, state, sync)
    assert gradient.tobytes() == before


def test_sgd_at_learning_rate_one_over_averaged_updates_is_federated_averaging() -> None:
    anchor, first, second = np.float32(5), np.float32(3), np.float32(4)
    theta = np.array([anchor])
    mean = np.array([((anchor - first) + (anchor - second)) / 2], np.float32)
    OUTER_OPTIMIZERS.parse("sgd").build().step(theta, mean, {}, 1)
    assert theta[0] == (first + second) / 2


def test_a_step_on_nothing() -> None:
    """A rank that owns no chunk."""
    for settings in SETTINGS:
        config = OUTER_OPTIMIZERS.parse(settings)
        theta, state = start(config, np.empty(0, np.float32))
        config.build().step(theta, theta.copy(), state, 1)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["type"] in ("adam", "yogi")], ids=str)
def test_adaptive_steps_as_the_paper_says(settings: dict[str, Any]) -> None:
    """Algorithm 2 of arXiv 2003.00295 in float64; its update is added, ours is a descent direction."""
    config = OUTER_OPTIMIZERS.parse(settings)
    anchor = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    theta, state = start(config, anchor)
    x, m, v = anchor.astype(np.float64), np.zeros(1001), np.zeros(1001)
    beta1, beta2 = config.betas
    for sync, gradient in enumerate(gradients(anchor.size), 1):
        config.build().step(theta, gradient, state, sync)
        delta = -gradient.astype(np.float64)
        m = beta1 * m + (1 - beta1) * delta
        square = delta**2
        if settings["type"] == "adam":
            v = beta2 * v + (1 - beta2) * square
        else:
            v = v - (1 - beta2) * square * np.sign(v - square)
        x = x + config.lr * m / (np.sqrt(v) + config.tau)
        np.testing.assert_allclose(theta, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["type"] == "delayed_nesterov"], ids=str)
def test_delayed_nesterov_steps_as_the_paper_says(settings: dict[str, Any]) -> None:
    """The delayed Nesterov update of arXiv 2401.09135 in float64, its steps counted from 0."""
    config = OUTER_OPTIMIZERS.parse(settings)
    anchor = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    theta, state = start(config, anchor)
    x, m, total = anchor.astype(np.float64), np.zeros(1001), np.zeros(1001)
    lr, beta, n, c = config.lr, config.momentum, config.delay, config.c
    for t, gradient in enumerate(gradients(anchor.size)):
        config.build().step(theta, gradient, state, t + 1)
        g = gradient.astype(np.float64)
        total = total + g
        if (t + 1) % n == 0:
            m = beta * m + total / n
            x = x - lr * ((1 - c * n + c) * beta * m + g / n)
            total = np.zeros(1001)
        else:
            x = x - lr * (c * beta * m + g / n)
        np.testing.assert_allclose(theta, x, rtol=1e-5, atol=1e-5)


def test_the_share_of_a_delayed_momentum_has_a_bound() -> None:
    with pytest.raises(ValueError, match=r"c is 0\.6 and delay 2; expected c <= 1 / delay = 0\.5"):
        OUTER_OPTIMIZERS.parse({"type": "delayed_nesterov", "delay": 2, "c": 0.6})

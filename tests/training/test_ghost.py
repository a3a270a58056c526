"""Ghost norms against the gradients themselves, one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from tests.factory import tiny_model
from xcloud.errors import ModelError
from xcloud.training.ghost import GhostNorms
from xcloud.training.models import build_model
from xcloud.training.settings import ModelConfig

GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
QWEN3 = {k: v for k, v in tiny_model(model_type="qwen3", head_dim=8).items() if k != "pretraining_tp"}
MODELS: dict[str, dict[str, Any]] = {
    "tied": tiny_model(),
    "untied": tiny_model(tie_word_embeddings=False),
    "biases and LayerNorm": GPT2 | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "norms inside attention": QWEN3,
    "padding": tiny_model(pad_token_id=3, attention_bias=True),
}


def losses_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(batch.shape[1]).expand(batch.shape)
    logits = model(input_ids=batch, position_ids=positions).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("length", [4, 48], ids=["ghosts are smaller", "gradients are smaller"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_the_gradients(name: str, length: int) -> None:
    model: Any = build_model(ModelConfig(config=MODELS[name]), 257, 0)
    with torch.no_grad():  # scales other than one, biases other than zero
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    batch = torch.randint(0, 9, (5, length))  # few tokens, so that they come again
    ghost = GhostNorms(model)
    with ghost.recording():
        losses = losses_of(model, batch)
    found = ghost.norms(losses)
    assert all(p.grad is None for p in model.parameters())
    for row, norm in zip(batch, found, strict=True):
        model.zero_grad()
        losses_of(model, row[None]).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        exact = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        assert float(norm) == pytest.approx(float(exact), rel=2e-6)


def test_only_what_is_trained_counts() -> None:
    model: Any = build_model(ModelConfig(config=tiny_model(tie_word_embeddings=False)), 257, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name or "norm" in name)
    batch = torch.randint(0, 200, (3, 8))
    ghost = GhostNorms(model)
    with ghost.recording():
        losses = losses_of(model, batch)
    found = ghost.norms(losses)
    losses_of(model, batch[1:2]).sum().backward()
    exact = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    assert float(found[1]) == pytest.approx(exact**0.5, rel=2e-6)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


class Odd(nn.Module):
    """Refused before anything runs, or when it mixes examples."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"part": part})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside["part"](x)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Scaled(), r"module 'inside.part' \(Scaled\) has trainable weights and cannot be measured"),
        (nn.Embedding(5, 3, max_norm=1.0), r"\(Embedding\).* no embedding with max_norm"),
        (nn.Conv1d(2, 2, 1), r"\(Conv1d\).* expected Linear, Conv1D, Embedding, LayerNorm and RMSNorm only"),
        (nn.BatchNorm1d(3), r"\(BatchNorm1d\)"),
        (nn.LayerNorm((4, 3)), r"\(LayerNorm\).* norms over the last dimension only"),
    ],
)
def test_other_modules_are_refused_by_name(part: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GhostNorms(Odd(part))


def test_a_module_that_sees_all_examples_at_once_is_refused() -> None:
    model = Odd(nn.Linear(3, 1))
    ghost = GhostNorms(model)
    with ghost.recording():
        losses = model(torch.randn(8, 3)).reshape(4, 2).sum(1)
    with pytest.raises(ModelError, match=r"'inside.part' \(Linear\) works on \(8, 3\) for 4 examples"):
        ghost.norms(losses)


def test_an_output_that_is_written_over_is_refused() -> None:
    model = Odd(nn.Linear(3, 3))
    ghost = GhostNorms(model)
    with ghost.recording():
        losses = model(torch.randn(4, 3)).relu_().sum(1)
    with pytest.raises(ModelError, match="written over in place"):
        ghost.norms(losses)

"""Muon under every ZeRO stage: the steps of a plain loop in torch, and state that moves between stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factory import job_of, raw_job, region, tiny_model
from tests.training.workers import start_worker
from xcloud.config import JobConfig
from xcloud.messages import RestoreOrder, RoundPlan
from xcloud.training.models import build_model
from xcloud.training.muon import hidden_matrices, orthogonalize
from xcloud.training.worker import RankWorker

STEPS, CLIP = 4, 0.5
MUON: dict[str, Any] = {"type": "muon", "lr": 1e-2, "adamw_lr": 3e-3, "weight_decay": 0.1}


def plan(round: int) -> RoundPlan:
    return RoundPlan(job="t", round=round, attempt=1, model_digest="", manifest_digest="", inner_steps=STEPS)


def muon_job(folder: Path, stage: int, **changes: Any) -> JobConfig:
    """One rank; untied, so that there is an output head of its own."""
    pool = {"workers": 1, "zero_stage": stage, "micro_batch": 4}
    inner = {"steps": STEPS, "optimizer": MUON | changes, "clip_norm": CLIP, "schedule": "cosine"}
    raw = raw_job(folder, [region(folder, "a", 1, pool)], inner=inner, rounds=2)
    return job_of(raw | {"model": {"config": tiny_model(tie_word_embeddings=False)}})


def reference_steps(job: JobConfig, worker: RankWorker) -> dict[str, torch.Tensor]:
    """The first round in plain torch; `worker` only gives the batches."""
    muon: Any = job.inner.optimizer
    model = build_model(job.model, 257, job.seed)
    named = dict(model.named_parameters())
    hidden = [n for n in named if "layers" in n and "norm" not in n]
    rest = [p for n, p in named.items() if n not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": muon.weight_decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=muon.adamw_betas,
        eps=muon.adamw_eps,
    )
    velocity = {n: torch.zeros_like(named[n]) for n in hidden}
    for step in range(STEPS):
        batch = worker._batch(worker.store.train, worker.order.indices(step * 4, 4))
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        factor = job.inner.schedule.factor(step, job.rounds * STEPS)
        for group in adamw.param_groups:
            group["lr"] = (muon.adamw_lr or muon.lr) * factor
        adamw.step()
        with torch.no_grad():
            for name in hidden:
                p = named[name]
                velocity[name] = muon.momentum * velocity[name] + p.grad
                x = p.grad + muon.momentum * velocity[name] if muon.nesterov else velocity[name]
                x = x / x.norm()
                for _ in range(muon.ns_steps):
                    x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                rows, columns = p.shape
                scale = 0.2 * math.sqrt(max(rows, columns))
                if muon.adjust_lr == "original":
                    scale = math.sqrt(max(1, rows / columns))
                p.mul_(1 - muon.lr * factor * muon.weight_decay).sub_(muon.lr * factor * scale * x)
    return {n: p.detach().reshape(-1) for n, p in named.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"nesterov": False, "momentum": 0.8, "ns_steps": 3, "adjust_lr": "original"}], ids=str
)
def test_steps_as_a_plain_loop_does(tmp_path: Path, stage: int, changes: dict[str, Any]) -> None:
    """Clipping, the schedule on both learning rates, weight decay and which parameters are AdamW's, too."""
    job = muon_job(tmp_path, stage, **changes)
    worker = start_worker(job)
    before = {s.name: worker.parameters.read(s.name).clone() for s in worker.manifest.parameters}
    worker.train(plan(1), 0)
    for name, value in reference_steps(job, worker).items():
        found = worker.parameters.read(name)
        assert torch.allclose(found, value, rtol=0, atol=2e-5), name
        assert (value - before[name]).abs().max() > 1e-3, name


def test_orthogonalizes_as_torch_does() -> None:
    """torch.optim.Muon runs the iteration in bf16, so one step from zero agrees to its precision."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((30, 45), (45, 30), (30, 30)):
        gradient = torch.randn(shape, generator=generator)
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = gradient.clone()
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        ours = -0.2 * math.sqrt(max(shape)) * orthogonalize(gradient, 5)
        assert (ours - parameter.detach()).norm() < 0.02 * ours.norm()
        singular = torch.linalg.svdvals(orthogonalize(gradient, 5))
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_position_embeddings_and_a_tied_head_are_not_hidden(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 64}
    raw = raw_job(tmp_path, [region(tmp_path, "a", 1)], model={"config": config})
    model = build_model(job_of(raw).model, 257, 0)
    assert sorted(hidden_matrices(model)) == [
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (3, 3), (2, 3), (3, 0)])
def test_state_goes_on_exactly_also_under_another_stage(tmp_path: Path, before: int, after: int) -> None:
    """A round, a checkpoint, and a round by another worker: what the first would have done."""
    url = str(tmp_path / "checkpoints")
    first, second = (start_worker(muon_job(tmp_path, stage)) for stage in (before, after))
    first.train(plan(1), 0)
    first.anchor[:] = torch.cat([first.parameters.read(s.name) for s in first.manifest.parameters]).numpy()
    files = first.save(url, 1, donor=True)
    order = RestoreOrder(round=1, inner_round=1, cursor=0, model_digest="", files=tuple(files))
    second.restore(url, order)
    for worker in (first, second):
        worker.train(plan(2), 4 * STEPS)
    for s in first.manifest.parameters:
        one, other = (w.parameters.read(s.name) for w in (first, second))
        if before == after:
            assert torch.equal(one, other), s.name
        assert torch.allclose(one, other, rtol=0, atol=2e-5), s.name
    kept = [w.info().optimizer_state_bytes for w in (first, second)]
    matrices = sum(s.size for s in first.manifest.parameters if "layers" in s.name and "norm" not in s.name)
    both = 8 * first.manifest.size - 4 * matrices  # one moment of the matrices, two of the rest
    assert all(both <= k < both + 2000 for k in kept), (kept, both)

"""A privacy audit of DP-SGD: canaries in or out by a coin, an attacker who guesses, and the epsilon that this refutes.

The audit is that of one run (arXiv 2305.08846). A small language model is trained by the code that trains every region under
`dp`: Poisson samples, ghost clipping, noise inside a DeepSpeed engine. Canaries are sequences with tokens of their own, so
their gradients hardly meet. The attacker knows the first and the last model and all canaries, and scores each by how far the
model went down its clipped gradient; without sampling no attacker can do better, since all steps see about the same model.

A claim is refuted if the audited epsilon is larger than the claimed one. The same training with next to no noise shows that
the audit can refute: there it must find more than the private runs claim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Options, Result
from xcloud.messages import PrivacyTerms
from xcloud.privacy.accounting import Mechanism, calibrated_noise_multiplier, epsilon_of
from xcloud.privacy.audit import audited_epsilon
from xcloud.quiet import apply_quiet

__all__ = ["run"]

DELTA = 1e-5
TARGET = 4.0
CLIP = 1.0
LENGTH = 8
LR = 1e-3
"""Small, so that all steps see about the same gradients; how private a step is does not depend on it."""


@dataclass(frozen=True)
class Setting:
    """One audited training."""

    name: str
    probability: float
    steps: int
    noise_multiplier: float | None = None
    """None: what the target epsilon allows."""


SETTINGS = (
    Setting("every example in every step", 1.0, 8),
    Setting("Poisson samples", 0.25, 60),
    Setting("next to no noise", 1.0, 8, 1e-3),
)


def canaries(count: int) -> npt.NDArray[np.int64]:
    """Sequences that alternate between two tokens which no other has: [count, LENGTH]."""
    pairs = np.arange(2 * count, dtype=np.int64).reshape(count, 2)
    return np.tile(pairs, (1, LENGTH // 2))


def scores_of(
    setting: Setting, noise: float, rows: npt.NDArray[np.int64], included: npt.NDArray[np.bool_], seed: int
) -> npt.NDArray[np.float64]:
    """Train on the canaries that are in; how far the model went down each canary's clipped gradient: fp64 [canaries]."""
    # Here, because DS_ACCELERATOR is read when DeepSpeed is imported.
    import torch  # noqa: PLC0415

    from xcloud.training.engine import build_engine, join_process_group  # noqa: PLC0415
    from xcloud.training.models import build_model, trainable  # noqa: PLC0415
    from xcloud.training.parameters import open_parameters  # noqa: PLC0415
    from xcloud.training.private import PrivateSteps  # noqa: PLC0415
    from xcloud.training.settings import EngineConfig, InnerConfig, ModelConfig, SGDConfig  # noqa: PLC0415

    join_process_group("127.0.0.1", 0, 0, 1, on_gpu=False, threads=1)
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    model = build_model(ModelConfig(config=config), 2 * len(rows), seed)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # what all canaries would share only hides them from each other
        parameter.requires_grad_("embed_tokens" in name or "lm_head" in name)
    engine_config = EngineConfig(zero_stage=2, micro_batch=64)
    inner = InnerConfig(optimizer=SGDConfig(lr=LR), clip_norm=None)
    train = torch.from_numpy(rows[included])
    engine = build_engine(model, engine_config, inner, world=1)
    parameters = open_parameters(engine, engine_config.zero_stage)
    private = PrivateSteps(
        engine,
        parameters,
        PrivacyTerms(unit="example", sampling_probability=setting.probability, noise_multiplier=noise),
        CLIP,
        examples=len(train),
        expected_batch=max(1, round(setting.probability * len(train))),
        length=LENGTH,
        micro_batch=engine_config.micro_batch,
        replicated=False,
        read=lambda picked: train[torch.from_numpy(picked)],
    )
    engine.train()
    first = {name: parameters.read(name).clone() for name in trainable(model)}
    for _ in range(setting.steps):
        private.step()
    went = {name: before - parameters.read(name) for name, before in first.items()}
    for name, before in first.items():
        parameters.write(name, before)
    scores = np.empty(len(rows))
    named = trainable(model)
    for index, row in enumerate(torch.from_numpy(rows)):
        batch = row[None]
        loss = model(input_ids=batch, labels=batch).loss
        gradients = torch.autograd.grad(loss, list(named.values()))
        norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        along = sum(float(went[name] @ g.reshape(-1)) for name, g in zip(named, gradients, strict=True))
        scores[index] = along * min(1.0, CLIP / norm)
    return scores


def run(options: Options) -> Result:
    """Audit each setting once."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    apply_quiet()
    count = 1000 if options.quick else 2000
    rows = canaries(count)
    coins = np.random.default_rng(options.seed)
    table: list[dict[str, Any]] = []
    for setting in SETTINGS:
        noise = setting.noise_multiplier or calibrated_noise_multiplier(
            TARGET, DELTA, setting.probability, setting.steps
        )
        included = coins.random(count) < 0.5
        claimed = epsilon_of([Mechanism(setting.probability, noise, setting.steps)], DELTA)
        scores = scores_of(setting, noise, rows, included, options.seed)
        table.append(
            {
                "training": setting.name,
                "sampling_probability": setting.probability,
                "steps": setting.steps,
                "noise_multiplier": noise,
                "epsilon_claimed": claimed,
                "epsilon_audited": audited_epsilon(scores, included, DELTA),
            }
        )
    private, broken = table[:-1], table[-1]
    return Result(
        metrics={
            "epsilon_claimed": min(float(row["epsilon_claimed"]) for row in private),
            "epsilon_audited": max(float(row["epsilon_audited"]) for row in private),
            "epsilon_audited_without_noise": broken["epsilon_audited"],
            "canaries": count,
        },
        targets={
            "epsilon_audited": "<= epsilon_claimed",
            "epsilon_audited_without_noise": "> epsilon_claimed",
        },
        rows=table,
        notes=[
            f"unit: example; delta {DELTA:g}; {count} canaries, each in or out by a coin; lower bounds at 95 % confidence",
            "an audit can refute a claimed epsilon, never prove it",
        ],
    )

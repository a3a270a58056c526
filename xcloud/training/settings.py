"""Settings of the training layer: model, engine and inner optimization. Light to import."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from xcloud.registry import PartConfig, Registry

__all__ = [
    "CORRECTIONS",
    "INNER_OPTIMIZERS",
    "SCHEDULES",
    "AdamWConfig",
    "CorrectionConfig",
    "EngineConfig",
    "FedProxConfig",
    "InnerConfig",
    "InnerOptimizerConfig",
    "ModelConfig",
    "MuonConfig",
    "SGDConfig",
    "ScaffoldConfig",
    "ScheduleConfig",
]


class ModelConfig(BaseModel):
    """A Hugging Face causal language model, from scratch or pretrained.

    Attributes:
        config: settings of `AutoConfig.for_model`, with `model_type`; random weights from the job's seed.
        pretrained: a local folder or hub id; safetensors only, and no code from the hub is run.
        revision: hub revision of `pretrained`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any] | None = None
    pretrained: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("expected exactly one of 'config' and 'pretrained'")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs 'model_type', the Hugging Face architecture (for example llama)")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("'revision' needs 'pretrained'")
        return self


class EngineConfig(BaseModel):
    """How DeepSpeed runs one pool.

    Attributes:
        zero_stage: what DeepSpeed ZeRO shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
        micro_batch: sequences in one forward pass of one rank.
        gradient_accumulation: forward passes in one inner step.
        precision: fp32, bf16 or fp16 (with dynamic loss scaling); master weights stay fp32.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        offload: what DeepSpeed keeps in host memory (arXiv 2101.06840): nothing, or the optimizer's states and masters, which
            then steps on the host.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    offload: Literal["none", "optimizer"] = "none"

    @model_validator(mode="after")
    def _shards_what_it_offloads(self) -> EngineConfig:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                "offload optimizer needs zero_stage 1, 2 or 3; at 0 DeepSpeed keeps it on the device"
            )
        return self


class InnerOptimizerConfig(PartConfig):
    """Base config of the inner optimizers."""

    type: str
    lr: Annotated[float, Field(gt=0)]

    def build(self, parameters: Any, model: Any) -> Any:
        """A torch optimizer over `parameters` (an iterable of torch.nn.Parameter), all that `model` trains."""
        raise NotImplementedError  # every registered subclass builds its optimizer


INNER_OPTIMIZERS: Registry[InnerOptimizerConfig] = Registry("inner optimizer", InnerOptimizerConfig)


@INNER_OPTIMIZERS.register
class AdamWConfig(InnerOptimizerConfig):
    """`adamw`: decoupled weight decay (arXiv 1711.05101), on matrices only."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1

    def build(self, parameters: Any, model: Any) -> Any:
        import torch  # noqa: PLC0415 - here, so that reading a job file does not wait for torch

        del model
        groups = _decayed(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


@INNER_OPTIMIZERS.register
class MuonConfig(InnerOptimizerConfig):
    """`muon`: orthogonalized momentum (arXiv 2502.16982) for hidden matrices, AdamW for all else.

    Attributes:
        adjust_lr: `match_rms_adamw` gives steps of AdamW's length, so that one `lr` serves both;
            `original` is Keller Jordan's, and needs `adamw_lr`.
        adamw_lr: of embeddings, output head, norms and vectors; null: `lr`.
    """

    type: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adamw_lr: Annotated[float, Field(gt=0)] | None = None
    adamw_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    adamw_eps: Annotated[float, Field(gt=0)] = 1e-8

    @model_validator(mode="after")
    def _units(self) -> MuonConfig:
        if self.adjust_lr == "original" and self.adamw_lr is None:
            raise ValueError(
                "adjust_lr original measures 'lr' in other units than AdamW's; set 'adamw_lr' too"
            )
        return self

    def build(self, parameters: Any, model: Any) -> Any:
        from xcloud.training.muon import Muon, hidden_matrices  # noqa: PLC0415 - it imports torch

        matrices = hidden_matrices(model)
        hidden = {id(p) for p in matrices.values()}
        return Muon(
            matrices,
            _decayed((p for p in parameters if id(p) not in hidden), self.weight_decay),
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr=self.adjust_lr,
            adamw={"lr": self.adamw_lr or self.lr, "betas": self.adamw_betas, "eps": self.adamw_eps},
        )


@INNER_OPTIMIZERS.register
class SGDConfig(InnerOptimizerConfig):
    """`sgd`: plain, or with momentum."""

    type: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def build(self, parameters: Any, model: Any) -> Any:
        import torch  # noqa: PLC0415 - here, so that reading a job file does not wait for torch

        del model
        return torch.optim.SGD(list(parameters), lr=self.lr, momentum=self.momentum)


def _decayed(parameters: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class CorrectionConfig(PartConfig):
    """Base config of the corrections of the drift between regions."""

    type: str

    def build(self, parameters: Any) -> Any:
        """A `xcloud.training.correction.Correction` over an engine's parameters."""
        raise NotImplementedError  # every registered subclass builds its correction


CORRECTIONS: Registry[CorrectionConfig] = Registry("correction", CorrectionConfig)


@CORRECTIONS.register
class FedProxConfig(CorrectionConfig):
    """`fedprox`: a pull towards the round's anchor (arXiv 1812.06127)."""

    type: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Field(gt=0)] = 0.01

    def build(self, parameters: Any) -> Any:
        from xcloud.training.correction import FedProx  # noqa: PLC0415 - it imports torch

        return FedProx(parameters, self.mu)


@CORRECTIONS.register
class ScaffoldConfig(CorrectionConfig):
    """`scaffold`: control variates (arXiv 1910.06378, option II)."""

    type: Literal["scaffold"] = "scaffold"

    def build(self, parameters: Any) -> Any:
        from xcloud.training.correction import Scaffold  # noqa: PLC0415 - it imports torch

        return Scaffold(parameters)


class ScheduleConfig(PartConfig):
    """Base config of the learning-rate schedules: pure functions of the inner step."""

    type: str
    warmup_steps: Annotated[int, Field(ge=0)] = 0

    def factor(self, step: float, total: int) -> float:
        """Factor on the inner learning rate at `step` (from 0) of `total`; between two where a round has other than its usual steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self._after(step - self.warmup_steps, max(1, total - self.warmup_steps))

    def _after(self, step: float, total: int) -> float:
        raise NotImplementedError  # every registered subclass has its shape


SCHEDULES: Registry[ScheduleConfig] = Registry("learning-rate schedule", ScheduleConfig)


@SCHEDULES.register
class ConstantConfig(ScheduleConfig):
    """`constant`: the full learning rate after warm-up."""

    type: Literal["constant"] = "constant"

    def _after(self, step: float, total: int) -> float:
        del step, total
        return 1.0


@SCHEDULES.register
class CosineConfig(ScheduleConfig):
    """`cosine`: down to `final_ratio` of the learning rate at the last step of the job."""

    type: Literal["cosine"] = "cosine"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05

    def _after(self, step: float, total: int) -> float:
        done = min(1.0, step / total)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class InnerConfig(BaseModel):
    """Local training between two merges.

    Attributes:
        optimizer: inner optimizer; its state is kept across rounds.
        steps: optimizer steps in one round (H).
        schedule: over the steps of the whole job; it never restarts.
        clip_norm: global gradient norm above which gradients are scaled down; null does not clip.
        correction: of the drift between regions; null: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Annotated[SerializeAsAny[InnerOptimizerConfig], BeforeValidator(INNER_OPTIMIZERS.parse)] = (
        AdamWConfig()
    )
    steps: Annotated[int, Field(ge=0)] = 30
    schedule: Annotated[SerializeAsAny[ScheduleConfig], BeforeValidator(SCHEDULES.parse)] = CosineConfig()
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    correction: Annotated[
        SerializeAsAny[CorrectionConfig] | None,
        BeforeValidator(lambda v: v if v is None else CORRECTIONS.parse(v)),
    ] = None

    @model_validator(mode="after")
    def _correctable(self) -> InnerConfig:
        if isinstance(self.correction, FedProxConfig) and self.correction.mu * self.optimizer.lr > 1:
            raise ValueError(
                f"correction fedprox with mu {self.correction.mu:g} and optimizer.lr {self.optimizer.lr:g} steps past "
                "the anchor; expected mu * lr well below 1"
            )
        if not isinstance(self.correction, ScaffoldConfig):
            return self
        plain = isinstance(self.optimizer, SGDConfig) and self.optimizer.momentum == 0
        if not plain:
            raise ValueError(
                "correction scaffold takes the way that a region went for the sum of its gradients, which "
                f"holds for optimizer sgd with momentum 0 only; optimizer is {self.optimizer.type!r}, "
                "expected sgd without momentum, or correction fedprox"
            )
        if self.steps == 0:
            raise ValueError("correction scaffold needs inner steps; steps is 0, expected at least 1")
        return self

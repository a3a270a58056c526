"""Models: any Hugging Face causal LM, from a config or from safetensors weights."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from xcloud.cost.memory import ModelShape
from xcloud.errors import ModelError
from xcloud.training.settings import ModelConfig

__all__ = ["build_config", "build_model", "lay_out", "measure_model", "trainable"]


def build_config(settings: ModelConfig, vocab_size: int) -> Any:
    """The Hugging Face config of a from-scratch model; its vocabulary defaults to the tokenizer's.

    Raises:
        ModelError: unknown architecture or setting, or a vocabulary smaller than the tokenizer's.
    """
    assert settings.config is not None
    wanted = dict(settings.config)
    kind = wanted.pop("model_type")
    wanted.setdefault("vocab_size", vocab_size)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted.setdefault(token, None)
    try:
        config = AutoConfig.for_model(kind, **wanted)
    except StrictDataclassError as error:
        raise ModelError(f"model.config: {error.__cause__ or error!s}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.config: {str(error).splitlines()[0]}") from None
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    for name in sorted(set(wanted) - known):
        # Names that are like nothing known pass: Hugging Face configs take older spellings too.
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise ModelError(f"model.config: {kind} knows no setting {name!r}; did you mean {close[0]!r}?")
    _check_vocabulary(config, vocab_size)
    return config


def build_model(settings: ModelConfig, vocab_size: int, seed: int) -> torch.nn.Module:
    """A causal LM in fp32 on the host, equal on every rank of every region.

    Args:
        settings: the job's model section.
        vocab_size: of the job's tokenizer; the model's may be larger, never smaller.
        seed: of the random weights of a from-scratch model.

    Raises:
        ModelError: names the setting, folder or hub id that is wrong.
    """
    torch.manual_seed(seed)  # for a pretrained folder that lacks a weight, too
    if settings.config is not None:
        config = build_config(settings, vocab_size)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ModelError(f"model.config: {str(error).splitlines()[0]}") from None
    else:
        assert settings.pretrained is not None
        try:
            model = AutoModelForCausalLM.from_pretrained(
                settings.pretrained,
                revision=settings.revision or "main",
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.pretrained: cannot load {settings.pretrained!r} as a causal LM with safetensors "
                f"weights: {str(error).splitlines()[0]}"
            ) from None
        _check_vocabulary(model.config, vocab_size)
    model.config.use_cache = False
    built: torch.nn.Module = model
    return built


def measure_model(settings: ModelConfig, vocab_size: int) -> tuple[int, ModelShape]:
    """Trainable parameters and shape of a model, without its weights.

    Raises:
        ModelError: names the setting, folder or hub id that is wrong.
    """
    named, shape = lay_out(settings, vocab_size)
    return sum(math.prod(size) for _, size in named), shape


def lay_out(settings: ModelConfig, vocab_size: int) -> tuple[list[tuple[str, tuple[int, ...]]], ModelShape]:
    """Names and shapes of a model's trainable parameters, and what its activations depend on; no weights: it is built on
    torch's meta device.

    Raises:
        ModelError: names the setting, folder or hub id that is wrong.
    """
    if settings.config is not None:
        config = build_config(settings, vocab_size)
    else:
        name = str(settings.pretrained)
        try:
            config = AutoConfig.from_pretrained(name, revision=settings.revision or "main")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.pretrained: cannot load the config of {name!r}: {str(error).splitlines()[0]}"
            ) from None
        _check_vocabulary(config, vocab_size)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"model: {str(error).splitlines()[0]}") from None
    shape = ModelShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
    )
    return [(name, tuple(p.shape)) for name, p in trainable(model).items()], shape


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name; tied weights appear once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_vocabulary(config: Any, vocab_size: int) -> None:
    if config.vocab_size < vocab_size:
        raise ModelError(
            f"model: its vocabulary of {config.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            "set model.config.vocab_size or choose the model's own tokenizer"
        )


def quiet_transformers() -> None:
    """No progress bars and no advice on a rank's output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

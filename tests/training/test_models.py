"""Models from a config and from a local folder; what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.factory import job_of, raw_job, region, tiny_model
from tests.training.workers import start_worker
from xcloud.data import BytesTokenizerConfig
from xcloud.errors import ModelError
from xcloud.training.models import build_model, trainable
from xcloud.training.settings import ModelConfig


def test_from_config_is_the_same_everywhere() -> None:
    """Equal seeds give equal weights; another seed does not."""
    settings = ModelConfig(config=tiny_model())
    one, same, other = (build_model(settings, 257, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert "lm_head.weight" not in trainable(one)  # tied to the embeddings


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2", "mistral"])
def test_any_causal_architecture(kind: str) -> None:
    config = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(ModelConfig(config=config), 257, 0)
    assert model.config.model_type == kind  # type: ignore[union-attr]
    assert model.config.vocab_size == 257  # type: ignore[union-attr]


def test_pretrained_folder_with_its_own_tokenizer_trains(tmp_path: Path) -> None:
    """The loading code that a hub id takes, on a model and tokenizer made here."""
    folder = tmp_path / "model"
    words = BytesTokenizerConfig().build()
    words.save(folder)
    build_model(ModelConfig(config=tiny_model()), words.vocab_size, 3).save_pretrained(folder)  # type: ignore[operator]
    raw = raw_job(tmp_path, [region(tmp_path, "a", 1)], model={"pretrained": str(folder)})
    worker = start_worker(job_of(raw | {"tokenizer": {"type": "huggingface", "path": str(folder)}}))
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in trainable(before).items():
        assert torch.equal(worker.parameters.read(name), parameter.detach().reshape(-1)), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "lama"),
        (tiny_model(hiden_size=3), "llama knows no setting 'hiden_size'"),
        (tiny_model(vocab_size=100), "vocabulary of 100 is smaller than the tokenizer's 257"),
        (tiny_model(num_attention_heads=7), "model.config"),
    ],
)
def test_a_wrong_config_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(config=config), 257, 0)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    """Pickled weights are never loaded."""
    model = build_model(ModelConfig(config=tiny_model()), 257, 0)
    model.config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        build_model(ModelConfig(pretrained=str(tmp_path)), 257, 0)
    with pytest.raises(ModelError, match="nowhere"):
        build_model(ModelConfig(pretrained=str(tmp_path / "nowhere")), 257, 0)

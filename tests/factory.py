"""Small jobs over small real files, for tests that run the real thing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from xcloud.config import JobConfig, parse_job

WORDS = [
    "the",
    "cloud",
    "region",
    "rank",
    "shard",
    "delta",
    "anchor",
    "round",
    "token",
    "sum",
    "of",
    "a",
    "to",
    "in",
    "and",
    "is",
    "it",
]


def write_corpus(folder: Path, seed: int, documents: int = 40, words: int = 120) -> str:
    """A folder of text files; returns its glob."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    for number in range(documents):
        text = " ".join(chooser.choice(WORDS) + str(chooser.randrange(seed + 3)) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def tiny_model(**changes: Any) -> dict[str, Any]:
    """A Llama of about 20k parameters, with odd sizes that two ranks do not divide."""
    return {
        "model_type": "llama",
        "hidden_size": 30,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "vocab_size": 259,
    } | changes


def region(folder: Path, name: str, seed: int, *pools: dict[str, Any], cloud: str = "aws") -> dict[str, Any]:
    """One region with its own corpus."""
    paths = write_corpus(folder / name, seed)
    return {
        "name": name,
        "cloud": cloud,
        "data": {"type": "text", "paths": paths},
        "pools": list(pools) or [{"workers": 1, "zero_stage": 0, "micro_batch": 4}],
    }


def raw_job(folder: Path, regions: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A job as it would stand in a YAML file."""
    return {
        "name": "tiny",
        "seed": 5,
        "rounds": 3,
        "sequence_length": 32,
        "chunk_size": 4096,
        "model": {"config": tiny_model()},
        "regions": regions,
        "inner": {
            "steps": 2,
            "optimizer": {"type": "adamw", "lr": 1e-2},
            "schedule": {"type": "cosine", "warmup_steps": 2},
        },
        "outer": {"type": "nesterov", "lr": 0.7, "momentum": 0.6},
        "evaluation": {"sequences": 8},
        "data": {"cache_dir": str(folder / "cache"), "held_out_fraction": 0.1},
    } | changes


def job_of(raw: dict[str, Any]) -> JobConfig:
    """The parsed job."""
    return parse_job(yaml.safe_dump(raw))

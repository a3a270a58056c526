"""Export: a committed round as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from xcloud.checkpoint import CheckpointStore, chunk_files
from xcloud.config import load_job
from xcloud.errors import ExportError
from xcloud.manifest import Manifest
from xcloud.training.models import build_model, quiet_transformers, trainable

__all__ = ["ExportSummary", "export_run"]


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    out: Path
    round: int
    parameters: int
    files: list[str]


def export_run(run_dir: Path, out: Path, round: int | None = None) -> ExportSummary:
    """Write a run's committed model so that `AutoModelForCausalLM.from_pretrained(out)` loads it.

    Args:
        run_dir: the run's folder.
        out: folder to create; it must not hold anything yet.
        round: committed round; the newest if None.

    Raises:
        ExportError: no run here, nothing committed, or the folder is in use.
        CheckpointError: the checkpoint is damaged.
    """
    if not (run_dir / "job.yaml").exists():
        raise ExportError(f"{run_dir}: no run here (expected a job.yaml)")
    job = load_job(run_dir / "job.yaml")
    store = CheckpointStore(job.checkpoint.url or (run_dir / "checkpoints").absolute())
    quiet_transformers()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: expected a new or empty folder to export into")
    record = store.latest() if round is None else store.record(round)
    if record is None:
        raise ExportError(f"{store.url}: no round is committed yet; nothing to export")
    words = job.tokenizer.build()
    built = build_model(job.model, words.vocab_size, job.seed)
    named = trainable(built)
    shapes = [(name, tuple(p.shape)) for name, p in named.items()]
    manifest = Manifest.of(shapes, record.chunk_size, job.streaming.fragments)
    if manifest.digest != record.manifest_digest:
        raise ExportError(
            f"{store.url}: round {record.round} holds another model than the run's job file describes"
        )
    every = range(manifest.chunk_count)
    tensors, _ = store.read_tensors(record.round, chunk_files(record.model_files, "model/"), every)
    flat = np.concatenate([tensors["anchor"][chunk] for chunk in every])
    for spec in manifest.parameters:
        values = torch.from_numpy(flat[spec.offset : spec.offset + spec.size])
        named[spec.name].data.copy_(values.view(spec.shape))
    built.config.use_cache = True  # type: ignore[union-attr]
    if getattr(built.config, "eos_token_id", None) is None:
        built.config.eos_token_id = words.eos_id  # type: ignore[union-attr]
    built.generation_config = GenerationConfig.from_model_config(built.config)  # type: ignore[arg-type, assignment]
    built.save_pretrained(out, safe_serialization=True)  # type: ignore[operator]
    words.save(out)
    files = sorted(path.name for path in out.iterdir())
    return ExportSummary(out, record.round, manifest.size, files)

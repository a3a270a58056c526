"""Secure aggregation in a whole job: the same model as in the clear, over dropouts and resumes, and nothing else to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.conftest import play
from tests.factory import raw_job, region
from xcloud.metrics import read_rounds


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three regions of unequal weight, one of two pools, one of two ranks."""
    regions = [
        region(
            folder,
            "two-pools",
            1,
            {"workers": 1, "zero_stage": 0, "micro_batch": 2},
            {"workers": 1, "zero_stage": 1, "micro_batch": 2},
        ),
        region(folder, "two-ranks", 2, {"workers": 2, "zero_stage": 2, "micro_batch": 1}),
        region(folder, "plain", 3, {"workers": 1, "zero_stage": 0, "micro_batch": 4}),
    ]
    guards = {"norm": 100, "loss": 10}  # an honest run must not trip over them
    return raw_job(folder, regions, codec={"type": "fixed", "bits": 4}, guards=guards, **changes)


def test_a_masked_job_ends_with_the_model_of_the_job_in_the_clear(tmp_path: Path) -> None:
    clear = play(job(tmp_path), tmp_path / "clear")
    masked = play(job(tmp_path, secure_aggregation={"colluders": 0}), tmp_path / "masked")
    assert masked == clear
    assert masked.norms
    open_rows, masked_rows = read_rounds(tmp_path / "clear"), read_rounds(tmp_path / "masked")
    for one, other in zip(open_rows, masked_rows, strict=True):
        for name in one.regions:
            assert one.regions[name].bytes_up == other.regions[name].bytes_up

"""Compressed updates through the whole system: real engines, actors, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import play
from tests.e2e.test_equivalence import committed_model
from tests.factory import job_of, raw_job, region
from xcloud.errors import ConfigError
from xcloud.metrics import read_rounds


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """A region of two pools (three ranks) and one of a single rank, of unequal weight."""
    regions = [
        region(
            folder,
            "two-pools",
            1,
            {"workers": 2, "zero_stage": 2, "micro_batch": 2},
            {"workers": 1, "zero_stage": 1, "micro_batch": 2},
        ),
        region(folder, "plain", 2, {"workers": 1, "zero_stage": 0, "micro_batch": 4}),
    ]
    return raw_job(folder, regions, **changes)


@pytest.mark.slow
def test_codecs_that_add_resume_bit_for_bit(tmp_path: Path) -> None:
    """Residuals (private, sharded) and scales (public) are in the checkpoint: 2 + 1 rounds equal 3."""
    raw = job(tmp_path, codec={"type": "fixed", "bits": 2})
    whole = play(raw, tmp_path / "whole")
    assert play(raw, tmp_path / "parts", stop_after=2).round == 2
    assert play(raw, tmp_path / "parts", resume=True) == whole
    last = read_rounds(tmp_path / "whole")[-1]
    for row in last.regions.values():
        assert row.bytes_up == row.bytes_down
        # ternary values of 2 regions need a ring of 3 bits; the last chunk is filled to a power of two
        assert row.bytes_up <= 4 * parameters(tmp_path / "whole") * 3 / 32 * 1.2
    assert last.eval_loss is not None


def test_sparse_both_ways(tmp_path: Path) -> None:
    """SparseLoCo's way, with an aggregator that takes the updates' inner products first."""
    raw = job(tmp_path, codec="topk", downlink="sparse", aggregator="norm_bound", rounds=2)
    play(raw, tmp_path / "run")
    size = 4 * parameters(tmp_path / "run")
    for round_row in read_rounds(tmp_path / "run"):
        for row in round_row.regions.values():
            assert row.bytes_up < size / 100
            assert row.bytes_down < size / 40  # two regions' coordinates, 12 + 8 bits each


def parameters(run_dir: Path) -> int:
    """Elements of the committed model."""
    return int(committed_model(run_dir).size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "fixed", "downlink": "bf16"}, "downlink 'bf16' has nothing to do"),
        ({"downlink": "fixed"}, "downlink 'fixed' takes its scale from what came before"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(job(tmp_path, **changes))

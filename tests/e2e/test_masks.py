"""Secure aggregation in a whole job: the same model as in the clear, over dropouts and resumes, and nothing else to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Killer, play
from tests.factory import raw_job, region
from xcloud.checkpoint import CheckpointStore, CommitRecord, chunk_files
from xcloud.cluster_region import ClusterRegion
from xcloud.metrics import read_events, read_rounds
from xcloud.secure.keyring import Keyring
from xcloud.secure.vault import Vault, is_sealed


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


def contents(record: CommitRecord, run_dir: Path) -> dict[str, Any]:
    """All that a commit holds, whether its regions have sealed their part of it or not."""
    store, found = CheckpointStore(run_dir / "checkpoints"), dict[str, Any]()
    for name, state in record.regions.items():
        found[name] = state.cursor, state.data_fingerprint, state.inner_round, state.eval_loss
    for file in (*record.model_files, *(f for state in record.regions.values() for f in state.files)):
        data = (run_dir / "checkpoints" / f"round-{record.round:06d}" / file.path).read_bytes()
        owner, vault = file.path.split("/")[1], None
        if file.path.startswith("regions/") and (run_dir / "keys").exists():
            assert is_sealed(data)
            vault = Vault.of(Keyring(run_dir / "keys").load_all(owner), record.job, strict=True)
        prefix = file.path[: file.path.index("chunks-")]
        (part,) = chunk_files([file], prefix)
        tensors, scalars = store.read_tensors(
            record.round, [part], range(part.first, part.last + 1), vault, record.round
        )
        found[file.path] = (
            scalars,
            {key: {c: v.tobytes() for c, v in chunks.items()} for key, chunks in tensors.items()},
        )
    return found | {"tokens": record.tokens, "loss": (record.eval_loss_start, record.eval_loss)}


def test_a_masked_job_ends_with_the_model_of_the_job_in_the_clear(
    tmp_path: Path, handles: dict[str, ClusterRegion]
) -> None:
    """Stopped and resumed, and with a region that dies, so that the others mask the same updates under new keys."""
    clear = play(job(tmp_path), tmp_path / "clear")
    raw = job(tmp_path, secure_aggregation={"colluders": 0, "verify": True})
    assert play(raw, tmp_path / "masked", stop_after=1).round == 1
    masked = play(raw, tmp_path / "masked", Killer(handles, "plain", 2), resume=True)
    assert masked.norms == pytest.approx(clear.norms)
    assert contents(masked, tmp_path / "masked") == contents(clear, tmp_path / "clear")
    assert len(masked.endorsements) == 3
    kinds = [(event.kind, event.fields.get("round")) for event in read_events(tmp_path / "masked")]
    assert ("round_retried", 2) in kinds
    assert ("region_rejoined", 2) in kinds
    assert "region_refused" not in {kind for kind, _ in kinds}
    open_rows, masked_rows = read_rounds(tmp_path / "clear"), read_rounds(tmp_path / "masked")
    for one, other in zip(open_rows, masked_rows, strict=True):
        for name in one.regions:
            assert one.regions[name].bytes_up == other.regions[name].bytes_up


@pytest.mark.slow
def test_masks_under_fragments_and_overlap(tmp_path: Path) -> None:
    """Two syncs are open at once, and a sum is confirmed while its regions train the next round."""
    regions = [region(tmp_path, name, i, {"zero_stage": 0, "micro_batch": 2}) for i, name in enumerate("abc")]
    raw = raw_job(
        tmp_path,
        regions,
        codec={"type": "fixed", "bits": 8},
        streaming={"fragments": 2, "overlap": 1},
        checkpoint={"every": 0},
        rounds=4,
    )
    clear = play(raw, tmp_path / "clear")
    masked = play(raw | {"secure_aggregation": {}}, tmp_path / "masked")
    assert contents(masked, tmp_path / "masked") == contents(clear, tmp_path / "clear")


@pytest.mark.slow
def test_twelve_regions_in_three_groups(tmp_path: Path) -> None:
    """All take the median of the same three sums, over a region that is away and a resume."""
    regions = [region(tmp_path, f"r{i:02}", i, {"zero_stage": 0, "micro_batch": 1}) for i in range(12)]
    raw = raw_job(
        tmp_path,
        regions,
        codec={"type": "fixed", "bits": 8},
        secure_aggregation={"groups": 3},
        evaluation={"sequences": 4},
        rounds=2,
    )
    assert play(raw, tmp_path / "grouped", stop_after=1).round == 1
    done = play(raw, tmp_path / "grouped", resume=True)
    assert done.round == 2
    assert len(done.endorsements) == 12
    (first, second) = read_rounds(tmp_path / "grouped")
    assert first.bytes_down == 3 * first.bytes_up
    assert second.eval_loss is not None
    assert first.eval_loss is not None
    assert second.eval_loss < first.eval_loss

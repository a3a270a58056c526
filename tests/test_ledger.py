"""What a run may be resumed from, and what it may not be started over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.factory import job_of, raw_job, region
from tests.strategies import report
from xcloud.checkpoint import CheckpointStore, CommitRecord, RegionState
from xcloud.errors import CheckpointError, DivergenceError
from xcloud.ledger import Ledger, check_job, find_commit, keep_job
from xcloud.messages import Applied, RegionReady, RoundPlan, RoundSum
from xcloud.metrics import RunLog


def ready(name: str, **changes: Any) -> RegionReady:
    """A region that has just started."""
    facts: dict[str, Any] = {
        "region": name,
        "manifest_digest": "layout",
        "model_digest": "weights",
        "parameters": 10,
        "chunks": 1,
        "data": "text",
        "data_fingerprint": f"data of {name}",
        "train_sequences": 5,
        "pools": (),
        "eval_loss": 5.0,
        "eval_tokens": 10,
        "layout": ((10, ()),),
    }
    return RegionReady(**facts | changes)


def record(**changes: Any) -> CommitRecord:
    """A commit of round 3."""
    state = RegionState(cursor=12, data_fingerprint="data of a", inner_round=3)
    facts: dict[str, Any] = {
        "job": "tiny",
        "round": 3,
        "manifest_digest": "layout",
        "model_digest": "later",
        "regions": {"a": state},
        "model_files": (),
        "chunk_size": 4096,
        "tokens": 7,
        "eval_loss_start": 5.0,
        "eval_loss": 4.0,
    }
    return CommitRecord(**facts | changes)


def test_a_cursor_belongs_to_its_data(tmp_path: Path) -> None:
    """Other text behind the same job: the cursor would skip and repeat sequences, so the resume is refused."""
    ledger = Ledger(
        job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)])), CheckpointStore(tmp_path / "c"), tmp_path
    )
    ledger.begin({"a": ready("a")})
    ledger.resume(record())
    assert (ledger.round, ledger.cursors["a"]) == (3, 12)
    changed = Ledger(ledger.job, ledger.store, tmp_path)
    changed.begin({"a": ready("a", data_fingerprint="other")})
    with pytest.raises(CheckpointError, match="region 'a': its data is not what round 3 was trained on"):
        changed.resume(record())
    with pytest.raises(CheckpointError, match="another model layout"):
        changed.resume(record(manifest_digest="other"))


def test_regions_must_start_alike(tmp_path: Path) -> None:
    raw = raw_job(tmp_path, [region(tmp_path, "a", 1), region(tmp_path, "b", 2)])
    ledger = Ledger(job_of(raw), CheckpointStore(tmp_path / "c"), tmp_path)
    with pytest.raises(DivergenceError, match="'a' and 'b' start from different initial weights"):
        ledger.begin({"a": ready("a"), "b": ready("b", model_digest="other")})


def test_a_new_run_never_goes_into_another_ones_checkpoints(tmp_path: Path) -> None:
    job = job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)]))
    store = CheckpointStore(tmp_path / "c")
    assert find_commit(job, store, tmp_path, resume=False) is None
    store.commit(record())
    with pytest.raises(CheckpointError, match="committed rounds of another run"):
        find_commit(job, store, tmp_path, resume=False)
    keep_job(job, tmp_path)
    found = find_commit(job, store, tmp_path, resume=True)
    assert found is not None
    assert found.round == 3


def test_a_resume_finds_its_commits_or_says_so(tmp_path: Path) -> None:
    """A run without commits starts again; one whose commits are elsewhere is refused and left as it was."""
    job = job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)]))
    empty = CheckpointStore(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no run to resume here"):
        check_job(job, tmp_path)
    keep_job(job, tmp_path)
    with RunLog(tmp_path) as log:
        log.event("run_started")
        assert find_commit(job, empty, tmp_path, resume=True) is None
        log.event("checkpoint_committed", round=1, path="x")
        with pytest.raises(CheckpointError, match=r"events\.jsonl tells of some"):
            find_commit(job, empty, tmp_path, resume=True)


def test_only_some_keys_may_change(tmp_path: Path) -> None:
    raw = raw_job(tmp_path, [region(tmp_path, "a", 1)])
    keep_job(job_of(raw), tmp_path)
    wider = dict(raw["regions"][0], pools=[{"workers": 2, "zero_stage": 1}])
    check_job(job_of(raw | {"rounds": 9, "failure": {"quorum": 1}, "regions": [wider]}), tmp_path)
    with pytest.raises(CheckpointError, match=r"inner\.optimizer\.lr = 0\.01, now 0\.5"):
        check_job(
            job_of(raw | {"inner": raw["inner"] | {"optimizer": {"type": "adamw", "lr": 0.5}}}), tmp_path
        )


@pytest.mark.parametrize(
    ("hierarchy", "up", "down"), [({}, 600, 3 * 300), ({"egress_up": 350, "near": ("aws",)}, 350, 2 * 300)]
)
def test_a_row_counts_what_crossed_between_clouds(
    tmp_path: Path, hierarchy: dict[str, Any], up: int, down: int
) -> None:
    """Two regions of one cloud and one of another that bears the name of a region."""
    places = [("a", "aws"), ("b", "aws"), ("aws", "gcp")]
    raw = raw_job(tmp_path, [region(tmp_path, name, 1, cloud=cloud) for name, cloud in places])
    ledger = Ledger(job_of(raw), CheckpointStore(tmp_path / "c"), tmp_path)
    ledger.begin({name: ready(name) for name, _ in places})
    plan = RoundPlan(job="tiny", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=1)
    names = tuple(name for name, _ in places)
    total = RoundSum(
        round=1,
        attempt=1,
        regions=names,
        weights=(1 / 3,) * 3,
        chunk_bytes=(200, 100),
        norm=1.0,
        fold_s=0.0,
        **hierarchy,
    )
    applied = {
        name: Applied(
            region=name,
            round=1,
            model_digest="next",
            eval_loss=1.0,
            eval_tokens=1,
            bytes_down=300,
            apply_s=0,
            eval_s=0,
        )
        for name in names
    }
    reports = {name: report(name, 5, chunk_bytes=(100, 100)) for name in names}
    row = ledger.close_round(plan, reports, total, applied, 9.0)
    assert (row.bytes_up, row.bytes_down) == (600, 900)
    assert (row.egress_bytes_up, row.egress_bytes_down) == (up, down)


@pytest.mark.parametrize(("streaming", "read"), [({}, 0), ({"overlap": 1}, 5)])
def test_a_region_whose_update_was_left_out_reads_its_data_again(
    tmp_path: Path, streaming: dict[str, Any], read: int
) -> None:
    """As the region does, unless it goes on from its own model."""
    names = ("a", "b", "c")
    raw = raw_job(tmp_path, [region(tmp_path, name, 1) for name in names], streaming=streaming)
    ledger = Ledger(job_of(raw), CheckpointStore(tmp_path / "c"), tmp_path)
    ledger.begin({name: ready(name) for name in names})
    plan = RoundPlan(job="tiny", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=1)
    total = RoundSum(
        round=1, attempt=1, regions=("a", "b"), weights=(0.5, 0.5), chunk_bytes=(1,), norm=None, fold_s=0.0
    )
    applied = {
        name: Applied(
            region=name, round=1, model_digest="next", eval_loss=1.0, eval_tokens=1, apply_s=0, eval_s=0
        )
        for name in names
    }
    reports = {name: report(name, 5).model_copy(update={"cursor": 5}) for name in names}
    row = ledger.close_round(plan, reports, total, applied, 9.0)
    assert set(row.regions) == {"a", "b"}
    assert row.tokens == 10
    assert ledger.cursors == {"a": 5, "b": 5, "c": read}

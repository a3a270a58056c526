"""Differential privacy through the whole system: actors, two ranks, a resume, and the end of the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import play
from tests.factory import raw_job, region
from xcloud.errors import PrivacyBudgetError
from xcloud.metrics import read_events, read_rounds
from xcloud.privacy import PrivacyLedger
from xcloud.privacy.accounting import Mechanism, epsilon_of


@pytest.mark.slow
def test_epsilon_is_told_kept_and_ends_the_run(tmp_path: Path) -> None:
    regions = [
        region(tmp_path, "pair", 1, {"workers": 2, "zero_stage": 2, "micro_batch": 2}),
        region(tmp_path, "single", 2, {"workers": 1, "zero_stage": 3, "micro_batch": 4}),
    ]
    inner = {
        "steps": 4,
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "schedule": "constant",
        "clip_norm": None,
    }
    dp: dict[str, Any] = {"unit": "example", "noise_multiplier": 0.6}
    raw = raw_job(tmp_path, regions, rounds=4, inner=inner, dp=dp, streaming={"overlap": 1})
    run_dir = tmp_path / "run"
    assert play(raw, run_dir, stop_after=2).round == 2
    record = play(raw, run_dir, resume=True)
    assert record.round == 4
    assert record.privacy == PrivacyLedger.kept(run_dir)

    ready = {e.fields["region"]: e.fields for e in read_events(run_dir) if e.kind == "region_ready"}
    rows = read_rounds(run_dir)
    assert rows[-1].privacy is not None
    for name, region_row in rows[-1].regions.items():
        assert region_row.privacy is not None
        assert region_row.privacy.unit == "example"
        mechanism = Mechanism(4 / ready[name]["train_sequences"], 0.6, 16)
        assert region_row.privacy.epsilon == epsilon_of([mechanism], 1e-5)
        assert region_row.train_loss != region_row.train_loss  # NaN: it stays in the region
    assert rows[-1].eval_loss is not None
    assert rows[0].eval_loss is not None
    assert rows[-1].eval_loss < rows[0].eval_loss  # and it learns

    budget = (rows[0].privacy or rows[-1].privacy).epsilon * 1.0001
    short = raw | {"dp": dp | {"target_epsilon": budget}, "streaming": {"overlap": 0}}
    with pytest.raises(PrivacyBudgetError, match=r"epsilon per example .* past the budget"):
        play(short, tmp_path / "short")
    assert 1 <= len(read_rounds(tmp_path / "short")) < 4


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["gaussian", "skellam"])
def test_a_region_as_a_whole_is_hidden_in_each_merge(tmp_path: Path, mechanism: str) -> None:
    """Noise by the aggregator, or by the regions under masks: booked, told, ended by its budget, and training goes on under it."""
    regions = [
        region(tmp_path, "pair", 1, {"workers": 2, "zero_stage": 2, "micro_batch": 2}),
        region(
            tmp_path,
            "two-pools",
            2,
            {"zero_stage": 0, "micro_batch": 2},
            {"zero_stage": 1, "micro_batch": 2},
        ),
        region(tmp_path, "single", 3, {"zero_stage": 3, "micro_batch": 4}),
    ]
    public = {"type": "stdlib", "kind": "reference"}
    for one in regions:
        one["evaluate_on"] = [public]
    dp: dict[str, Any] = {
        "unit": "region",
        "mechanism": mechanism,
        "clip_norm": 1.0,
        "noise_multiplier": 0.01,
    }
    masks = {"codec": {"type": "grid"}, "secure_aggregation": {}} if mechanism == "skellam" else {}
    facts = {"aggregator": {"type": "mean", "weigh_by": "equal"}, "rounds": 4, "dp": dp}
    raw = raw_job(tmp_path, regions, **facts, **masks)
    run_dir = tmp_path / "run"
    assert play(raw, run_dir, stop_after=2).round == 2
    record = play(raw, run_dir, resume=True)
    ledger = PrivacyLedger.kept(run_dir)
    assert record.privacy == ledger
    assert ledger is not None
    assert [(r.round, r.steps) for r in ledger.releases if r.region == "pair"] == [
        (n, 1) for n in (1, 2, 3, 4)
    ]
    rows = read_rounds(run_dir)
    for row in rows:
        assert row.privacy is not None
        assert row.privacy.unit == "region"
        assert row.train_loss != row.train_loss
        assert all(one.update_norm != one.update_norm for one in row.regions.values())
    assert rows[3].privacy is not None
    assert rows[3].privacy.epsilon == ledger.total > rows[0].privacy.epsilon  # type: ignore[union-attr]
    assert rows[3].eval_loss is not None
    assert record.eval_loss_start is not None
    assert rows[3].eval_loss < record.eval_loss_start
    (told, *_) = [e.fields for e in read_events(run_dir) if e.kind == "privacy_started"]
    assert told["mechanism"] == mechanism
    assert told["noise_to_signal_ratio"] > 0

    budget = rows[1].privacy.epsilon * 1.0001  # type: ignore[union-attr]
    short = raw | {"dp": dp | {"target_epsilon": budget}}
    with pytest.raises(PrivacyBudgetError, match=r"epsilon per region .* past the budget"):
        play(short, tmp_path / "short")
    assert len(read_rounds(tmp_path / "short")) == 2

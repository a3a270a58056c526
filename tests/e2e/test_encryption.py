"""CKKS in a whole job: the losses of the job in the clear, one model in all regions, and bytes counted as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Killer, play
from tests.e2e.test_masks import job
from xcloud.cluster_region import ClusterRegion
from xcloud.errors import ConfigError
from xcloud.metrics import read_events, read_rounds
from xcloud.secure.ckks import CIPHERTEXT
from xcloud.secure.primitives import TAG_BYTES

LOSS = 1e-5
"""Relative: what rounding the sums to about 1e-7 may change a loss by in three rounds."""


@pytest.mark.slow
def test_an_encrypted_job_learns_as_the_job_in_the_clear(
    tmp_path: Path, handles: dict[str, ClusterRegion]
) -> None:
    """With a region of two pools and one of two ranks, and one that dies: the others encrypt the same updates anew."""
    pytest.importorskip("tenseal")
    plain = job(tmp_path) | {"codec": {"type": "identity"}}
    clear = play(plain, tmp_path / "clear")
    raw = plain | {"secure_aggregation": {"scheme": "ckks"}}
    encrypted = play(raw, tmp_path / "encrypted", Killer(handles, "plain", 2))
    # All regions have one model, or the driver had stopped the run; it is that of the clear but for rounding.
    assert encrypted.round == clear.round
    assert encrypted.model_digest != clear.model_digest
    rows, others = read_rounds(tmp_path / "clear"), read_rounds(tmp_path / "encrypted")
    for one, other in zip(rows, others, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=LOSS)
        assert other.eval_loss == pytest.approx(one.eval_loss, rel=LOSS)
        for name in one.regions:  # chunks of 4,096 values, and a rest, each a ciphertext in an envelope
            chunks, rest = divmod(other.regions[name].bytes_up, CIPHERTEXT + TAG_BYTES)
            assert rest == 0
            assert (
                CIPHERTEXT * (chunks - 1)
                < 2.5 * (one.regions[name].bytes_up - TAG_BYTES * chunks)
                <= CIPHERTEXT * chunks
            )
    events = read_events(tmp_path / "encrypted")
    kinds = [(event.kind, event.fields.get("round")) for event in events]
    assert ("round_retried", 2) in kinds
    assert "region_refused" not in {kind for kind, _ in kinds}
    costs = {event.fields["region"]: event.fields for event in events if event.kind == "encryption"}
    assert set(costs) == {"two-pools", "two-ranks", "plain"}
    for name, cost in costs.items():
        chunks = others[0].regions[name].bytes_up // (CIPHERTEXT + TAG_BYTES)
        assert cost["sent_bytes"] == chunks * CIPHERTEXT
        assert cost["encrypt_mb_per_s"] > 0


@pytest.mark.slow
def test_a_model_that_is_no_adapter_ends_the_run_with_its_price(tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    raw = job(tmp_path) | {
        "codec": {"type": "identity"},
        "secure_aggregation": {"scheme": "ckks", "most_parameters": 1000},
    }
    with pytest.raises(ConfigError, match="for the updates of adapters: this model of"):
        play(raw, tmp_path / "run")

"""Two clouds, three regions: what stays inside a cloud is merged before it crosses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import play
from tests.factory import raw_job, region
from xcloud.metrics import read_rounds


@pytest.mark.slow
def test_less_crosses_between_clouds_and_the_model_is_the_same(tmp_path: Path) -> None:
    """Encodings that add give the flat round's bits, so the runs end with one digest."""
    places = [("a", "aws"), ("b", "aws"), ("c", "gcp")]
    regions = [region(tmp_path, name, 1 + i, cloud=cloud) for i, (name, cloud) in enumerate(places)]
    raw = raw_job(tmp_path, regions, rounds=2, codec={"type": "fixed", "bits": 8})
    flat = play(raw, tmp_path / "flat")
    tree = play(raw | {"hierarchy": "cloud", "aggregation_actors": 2}, tmp_path / "tree")
    assert tree.model_digest == flat.model_digest
    for row in read_rounds(tmp_path / "flat"):
        assert (row.egress_bytes_up, row.egress_bytes_down) == (row.bytes_up, row.bytes_down)
    for row in read_rounds(tmp_path / "tree"):
        one = row.regions["a"].bytes_up
        assert (row.bytes_up, row.bytes_down) == (3 * one, 3 * one)
        assert (row.egress_bytes_up, row.egress_bytes_down) == (2 * one, 2 * one)

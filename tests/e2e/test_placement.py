"""A region for which there is no room: what it says while it waits, and that it gives up and leaves nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from tests.e2e.test_autoscaling import until
from tests.factory import job_of, raw_job, region
from xcloud.cluster_region import ClusterRegion
from xcloud.errors import PlacementError


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One node without labels of a region's; nobody scales it."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="xcloud",
    )
    yield
    ray.shutdown()


def region_of(folder: Path, **pool: Any) -> ClusterRegion:
    settings = {"workers": 1, "micro_batch": 2, **pool}
    job = job_of(raw_job(folder, [region(folder / "data", "r", 1, settings)]))
    return ClusterRegion(job, "r", enforce_labels=True, checkpoint_url=str(folder / "checkpoints"))


def test_no_node_carries_the_labels(cluster: None, tmp_path: Path) -> None:
    """Not even the region's own process has a place, and still the run can say what it waits for."""
    waits = (
        "pool 0: waits for 1 x {CPU: 1} (PACK) on nodes with labels ray.io/region=nowhere: no such node yet"
    )
    handle = region_of(tmp_path, labels={"ray.io/region": "nowhere"}, placement_timeout_s=5)
    started = handle.start(False)
    missing = handle.waiting().result(30)
    assert missing is not None
    assert missing.startswith(f"{waits}; the autoscaler launches nothing for it now")
    with pytest.raises(PlacementError) as failed:
        started.result(60)
    assert waits in str(failed.value)
    assert str(failed.value).endswith("given up after 5 s")
    handle.kill()


def test_no_node_has_the_room(cluster: None, tmp_path: Path) -> None:
    """The pool's group waits, the region says so, gives up, and its reservation goes."""
    handle = region_of(tmp_path, cpus=999, placement_timeout_s=8)
    started = handle.start(False)
    until(lambda: any(g["state"] == "PENDING" for g in placement_group_table().values()), 60)
    missing = handle.waiting().result(30)
    assert missing is not None
    assert "waits for 1 x {CPU: 999} (PACK) on nodes of any kind: 1 such node, without the room" in missing
    with pytest.raises(PlacementError, match="not there after 8 s"):
        started.result(60)
    handle.kill()
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    assert ray.available_resources()["CPU"] == 2

"""Several aggregation actors, one of them inside a cloud, on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.merging import LAYOUT, Store, encodings, job_of, merge, noise, plan_of, send
from xcloud.aggregation import ClusterAggregation
from xcloud.cloud.session import ray_session
from xcloud.errors import PlacementError, RegionError
from xcloud.transport.blobs import RayBlobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, without training."""
    with ray_session(None, 2):
        yield


JOB: dict[str, Any] = {
    "clouds": ("aws", "aws", "gcp"),
    "aggregation_actors": 2,
    "codec": "topk",
    "downlink": "bf16",
    "hierarchy": "cloud",
    "envelope": None,  # `tests/test_mailing.py` and whole jobs have them
}


@pytest.mark.usefixtures("cluster")
def test_actors_give_the_bits_of_one_process() -> None:
    """Two shares of the root and one cloud's aggregator; a dead one is replaced with all others."""
    job, updates, blobs, store = job_of(**JOB), noise(3), RayBlobs(), Store()
    expected = merge(job, updates, store, tokens=(1, 2, 3))
    offers = [send(job, blobs, f"r{i}", update, 1 + i) for i, update in enumerate(updates)]
    reports, handles = zip(*offers, strict=True)
    aggregator = ClusterAggregation(job)
    for killed in (None, 1, "aws"):
        if killed is not None:
            ray.kill(aggregator.actors[killed])
            with pytest.raises(RegionError, match="'the aggregator': its process is gone"):
                aggregator.merge(plan_of(), LAYOUT, reports, handles).result(60)
            aggregator.restart()
        total, merged = aggregator.merge(plan_of(), LAYOUT, reports, handles).result(60)
        header = {"parts": (), "fold_s": 0.0}
        assert total.model_copy(update=header) == expected[0].model_copy(update=header)
        for cloud in ("aws", "gcp"):
            assert encodings(RayBlobs(cloud), total, merged) == encodings(store, *expected)
    assert set(aggregator.actors) == {0, 1, "aws"}


@pytest.mark.usefixtures("cluster")
def test_a_cloud_without_a_node_is_told_by_its_label() -> None:
    job, blobs = job_of(**JOB), RayBlobs()
    offers = [send(job, blobs, f"r{i}", update, 1) for i, update in enumerate(noise(3))]
    reports, handles = zip(*offers, strict=True)
    aggregator = ClusterAggregation(job, enforce_labels=True)
    with pytest.raises(PlacementError, match="no live node carries the label cloud=aws"):
        aggregator.merge(plan_of(), LAYOUT, reports, handles).result(60)

from __future__ import annotations

import pytest

from xcloud.cloud.settings import PlacementConfig
from xcloud.cloud.waiting import autoscaler_says, need

POOL = PlacementConfig(accelerator="H100", workers=2, cpus=4, labels={"ray.io/region": "us-east-1"})
TYPES = {"aws_h100": {"ray.io/region": "us-east-1"}, "gcp_a100": {"ray.io/region": "europe-west4"}}


@pytest.mark.parametrize(
    ("nodes", "have"),
    [
        ([], "no such node yet"),
        ([{"ray.io/region": "europe-west4"}], "no such node yet"),
        ([{"ray.io/region": "us-east-1"}], "1 such node, without the room"),
        ([{"ray.io/region": "us-east-1"}] * 3, "3 such nodes, without the room"),
    ],
)
def test_a_need_says_what_and_where_and_what_is_there(nodes: list[dict[str, str]], have: str) -> None:
    assert need(POOL, nodes) == (
        "waits for 2 x {CPU: 4, GPU: 1, accelerator_type:H100: 0.001} (PACK) on nodes with labels "
        f"ray.io/region=us-east-1: {have}"
    )


def test_a_pool_without_labels_takes_any_node() -> None:
    assert (
        need(PlacementConfig(), []) == "waits for 1 x {CPU: 1} (PACK) on nodes of any kind: no such node yet"
    )


def says(**given: object) -> str:
    defaults = {"launching": (), "starting": (), "clouds": {"types": TYPES}, "wanted": POOL.labels}
    return autoscaler_says(**{**defaults, **given})  # type: ignore[arg-type]


def test_only_what_helps_is_told() -> None:
    """Nodes of another region are somebody else's."""
    launching = [("aws_h100", 1), ("gcp_a100", 3), ("aws_h100", 1)]
    assert says(launching=launching) == "the autoscaler is launching 2 x aws_h100"
    assert says(starting=["aws_h100"]) == "the autoscaler waits for the start of 1 x aws_h100"
    assert says(launching=[("gcp_a100", 3)]) == "the autoscaler launches nothing for it now"


def test_types_of_an_autoscaler_that_is_not_ours_are_all_told() -> None:
    assert says(launching=[("ray.worker", 1)], clouds={}) == "the autoscaler is launching 1 x ray.worker"


def test_a_cloud_that_is_down_and_a_launch_that_failed_are_told() -> None:
    clouds = {
        "types": TYPES,
        "clouds": {"aws": {"down": None}, "gcp": {"down": "no route"}},
        "refused": {"aws_h100": "aws_h100: InsufficientInstanceCapacity", "gcp_a100": "gcp_a100: full"},
    }
    assert says(clouds=clouds) == (
        "the autoscaler launches nothing for it now; cloud gcp is down (no route); "
        "the last launch of aws_h100 failed: aws_h100: InsufficientInstanceCapacity"
    )

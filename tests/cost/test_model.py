"""What is predicted of a job, against figures computed by hand."""

import math
from dataclasses import replace

import pytest

from xcloud.cost.bill import Holding
from xcloud.cost.model import Pace, PoolLoad, RegionLoad, Scenario, Wire, predict
from xcloud.prices import Place

EAST, WEST, FAR = Place("aws", "east"), Place("aws", "west"), Place("gcp", "far")
GB = 10**9


def price(source, destination):
    if source == destination:
        return 0.0
    return 0.02 if source.cloud == destination.cloud else 0.1


def region(place, *pools, usd=36.0):
    return RegionLoad(Holding(place, instances=1, usd_per_hour=usd), tuple(PoolLoad(*p) for p in pools))


PACE = Pace(
    setup_s=50.0,
    first_s=3.0,
    sync_s=2.0,
    sync_bytes=2 * GB,
    bandwidth=1e9,
    else_s={(True, True): 1.5, (False, True): 0.5},
    end_s=7.0,
)


def scenario(**changes):
    regions = {"fast": region(EAST, (100, 50.0)), "slow": region(FAR, (100, 10.0))}  # 2 and 10 seconds a step
    base = Scenario(
        rounds=4,
        steps=5,
        regions=regions,
        hub=EAST,
        paid_hub=None,
        wire=Wire(up=GB, down=GB, relay=GB // 2),
        pace=PACE,
    )
    return replace(base, **changes)


def test_a_round_lasts_as_long_as_its_slowest_region():
    found = predict(scenario(), price)
    assert found.seconds == pytest.approx(50 + 3 + 7 + 4 * (50 + 2 + 1.5))
    assert found.round_s == pytest.approx(53.5)
    assert found.tokens == 4 * 5 * 200
    assert found.machines_usd == pytest.approx(2 * 36 * found.seconds / 3600)
    assert found.egress == {"gcp/far -> aws/east": 4 * GB, "aws/east -> gcp/far": 4 * GB}
    assert found.egress_usd == pytest.approx(0.8)
    assert found.regions["fast"].idle_share == pytest.approx(4 * 40 / found.seconds)
    assert found.regions["slow"].idle_share == 0
    assert found.storage_usd is None


def test_balanced_regions_share_the_tokens_by_speed_from_the_second_round_on():
    found = predict(scenario(balanced=True), price)
    # 1000 tokens a round at 60 tokens/s are 16.7 s; whole steps: 8 of 2 s and 2 of 10 s.
    assert (found.regions["fast"].steps, found.regions["slow"].steps) == (8, 2)
    assert found.seconds == pytest.approx(60 + 50 + 3 * 20 + 4 * 3.5)
    assert found.tokens == 4 * 5 * 200


def test_pools_of_a_region_wait_for_each_other_unless_they_are_balanced():
    regions = {"both": region(EAST, (100, 50.0), (300, 30.0))}
    found = predict(scenario(regions=regions), price)
    assert found.regions["both"].train_s == pytest.approx(50.0)
    shared = predict(scenario(regions=regions, balanced_pools=True), price)
    assert shared.regions["both"].train_s == pytest.approx(5 * 400 / 80)
    assert shared.egress == {}  # all in one place


@pytest.mark.parametrize(
    ("changes", "sync_s"),
    [
        ({}, 2.0),
        ({"wire": Wire(up=2 * GB, down=GB, relay=GB)}, 3.0),
        ({"wire": Wire(up=GB // 2, down=GB // 2, relay=0)}, 1.0),
        ({"wire": Wire(up=0, down=0, relay=0)}, 0.0),  # and never less than nothing
        ({"overlap": 1}, 0.0),  # beside the first of five steps, of 10 s
        ({"overlap": 1, "wire": Wire(up=10 * GB, down=5 * GB, relay=0)}, 5.0),
    ],
)
def test_sync_grows_with_the_bytes_and_overlap_hides_it(changes, sync_s):
    assert predict(scenario(**changes), price).round_s == pytest.approx(50 + 1.5 + sync_s)


def test_updates_of_one_cloud_cross_once():
    regions = {"a": region(EAST, (100, 50.0)), "b": region(WEST, (100, 50.0)), "c": region(FAR, (100, 50.0))}
    flat = predict(scenario(regions=regions, hub=FAR, rounds=1), price)
    tree = predict(scenario(regions=regions, hub=FAR, rounds=1, by_cloud=True), price)
    assert flat.egress_usd == pytest.approx(4 * 0.1)
    assert tree.egress == {
        "aws/west -> aws/east": GB,
        "aws/east -> aws/west": GB,
        "aws/east -> gcp/far": GB // 2,
        "gcp/far -> aws/east": GB,
    }
    assert tree.egress_usd == pytest.approx(2 * 0.02 + 1.5 * 0.1)


def test_what_a_round_does_besides_is_paid_when_it_does_it():
    rare = scenario(evaluate_every=3)  # in rounds 3 and 4, the last
    assert predict(rare, price).seconds == pytest.approx(60 + 4 * 52 + 2 * 1.5 + 2 * 0.5)
    never = scenario(evaluate_every=0)
    assert predict(never, price).seconds == pytest.approx(60 + 4 * 52 + 4 * 0.5)
    unseen = scenario(save_every=0)  # no such round was measured: those of the most that was
    assert predict(unseen, price).seconds == pytest.approx(60 + 4 * 53.5)


def test_storage_is_paid_for_the_time_of_the_run():
    found = predict(scenario(stored_bytes=1000 * GB, storage_usd=0.073), price)
    assert found.storage_usd == pytest.approx(73 * found.seconds / (730 * 3600))
    assert found.usd == pytest.approx(found.machines_usd + found.egress_usd + found.storage_usd)


def test_what_has_no_price_is_named():
    regions = {"fast": region(EAST, (100, 50.0)), "slow": region(FAR, (100, 10.0), usd=None)}
    found = predict(scenario(regions=regions), lambda a, b: None if a != b else 0.0)
    assert set(found.unpriced) == {
        "machines of slow",
        "egress gcp/far -> aws/east",
        "egress aws/east -> gcp/far",
    }
    assert found.regions["slow"].machines_usd is None
    assert found.machines_usd == pytest.approx(36 * found.seconds / 3600)


def test_the_hub_is_paid():
    paid = predict(scenario(paid_hub=Holding(EAST, instances=1, usd_per_hour=3.6)), price)
    assert paid.machines_usd - predict(scenario(), price).machines_usd == pytest.approx(paid.seconds / 1000)


@pytest.mark.parametrize("speed", [0.0, -1.0])
def test_no_speed_no_prediction(speed):
    with pytest.raises(ValueError, match="positive"):
        predict(scenario(regions={"a": region(EAST, (100, speed))}), price)


def test_more_rounds_of_fewer_steps_take_longer():
    times = [predict(scenario(rounds=20 // steps, steps=steps), price).seconds for steps in (1, 2, 5, 10)]
    assert times == sorted(times, reverse=True)
    assert all(math.isfinite(one) for one in times)

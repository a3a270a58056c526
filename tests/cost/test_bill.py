"""The arithmetic of a bill, against figures computed by hand."""

import math

import pytest

from xcloud.cost.bill import RECENT, CostRow, Holding, Route, Spent, bill, nodes_of
from xcloud.errors import CheckpointError
from xcloud.prices import Place

VIRGINIA, OREGON, GRONINGEN = Place("aws", "v"), Place("aws", "o"), Place("gcp", "g")
PRICES = {(VIRGINIA, OREGON): 0.02, (VIRGINIA, GRONINGEN): 0.09, (GRONINGEN, VIRGINIA): 0.12}


def price(source, destination):
    return 0.0 if source == destination else PRICES.get((source, destination))


def row(seconds=1800.0, routes=(), before=0.0, hub=None, **changes):
    regions = {
        "v": Holding(VIRGINIA, accelerators=16, instances=2, usd_per_hour=110.0),
        "g": Holding(GRONINGEN, cores=12, instances=1, usd_per_hour=0.8),
    }
    return bill(regions | changes, hub, seconds, routes, price, before)


@pytest.mark.parametrize(
    ("workers", "per_node", "apart", "nodes"),
    [
        (8, 8, False, 1),
        (9, 8, False, 2),
        (1, 8, False, 1),
        (16, 8, False, 2),
        (3, 8, True, 3),
        (7, 2, False, 4),
    ],
)
def test_machines_are_paid_whole(workers, per_node, apart, nodes):
    assert nodes_of(workers, per_node, apart) == nodes


def test_half_an_hour_of_machines():
    found = row()
    v, g = found.regions["v"], found.regions["g"]
    assert (v.accelerator_hours, v.core_hours, v.instance_hours, v.machines_usd) == (8.0, 0.0, 1.0, 55.0)
    assert (g.accelerator_hours, g.core_hours, g.instance_hours, g.machines_usd) == (0.0, 6.0, 0.5, 0.4)
    assert (found.machines_usd, found.egress_usd, found.usd, found.seconds) == (55.4, 0.0, 55.4, 1800.0)
    assert found.unpriced == ()


def test_what_is_sent_is_paid_by_who_sends_and_how_far():
    routes = [
        Route(VIRGINIA, VIRGINIA, 5 * 10**9, "v"),
        Route(GRONINGEN, VIRGINIA, 2 * 10**9, "g"),
        Route(VIRGINIA, GRONINGEN, 3 * 10**9, "g"),
    ]
    found = row(0.0, routes, before=1.0)
    assert found.regions["g"].egress_usd == pytest.approx(2 * 0.12 + 3 * 0.09)
    assert found.regions["g"].egress_bytes == 5 * 10**9
    assert (found.regions["v"].egress_usd, found.regions["v"].egress_bytes) == (0.0, 0)
    assert found.egress == {"gcp/g -> aws/v": 2 * 10**9, "aws/v -> gcp/g": 3 * 10**9}
    assert found.egress_usd == pytest.approx(0.51)
    assert found.spent_usd == pytest.approx(1.51)


def test_what_a_cloud_s_aggregator_sends_is_in_the_sum_and_in_no_region():
    found = row(0.0, [Route(VIRGINIA, GRONINGEN, 10**9)])
    assert found.egress_usd == pytest.approx(0.09)
    assert sum(part.egress_usd for part in found.regions.values()) == 0


def test_the_hub_is_paid_too():
    found = row(3600.0, hub=Holding(VIRGINIA, instances=1, usd_per_hour=0.2))
    assert found.hub.machines_usd == 0.2
    assert found.machines_usd == pytest.approx(111.0)


def test_an_unknown_price_is_named_and_is_not_zero():
    found = row(3600.0, [Route(OREGON, VIRGINIA, 10, "v")], g=Holding(GRONINGEN, cores=4))
    assert found.regions["g"].machines_usd is None
    assert found.regions["v"].egress_usd is None
    assert found.unpriced == ("egress aws/o -> aws/v", "machines of g")
    assert found.machines_usd == 110.0  # what is known
    assert row(0.0, [Route(OREGON, VIRGINIA, 0, "v")]).unpriced == ()  # nothing was sent


def test_sums_over_rounds_are_sums_of_rows():
    rows = [row(60.0 * n, [Route(GRONINGEN, VIRGINIA, n * 10**9, "g")]) for n in range(1, 6)]
    spent = Spent()
    for one in rows:
        spent = spent.plus(one, one.usd)
    assert spent.usd == pytest.approx(math.fsum(one.usd for one in rows))
    assert spent.accelerator_hours == pytest.approx(16 * 15 / 60)
    assert spent.egress_bytes == 15 * 10**9
    assert spent.recent == tuple(one.usd for one in rows[-RECENT:])
    assert spent.next_usd == rows[-1].usd
    idle = spent.plus(row(60.0))
    assert idle.usd > spent.usd
    assert idle.recent == spent.recent  # no round


def test_it_comes_back_from_the_disk(tmp_path):
    assert Spent.kept(tmp_path) is None
    spent = Spent().plus(row(77.0, [Route(OREGON, VIRGINIA, 10, "v")]), 1.25)
    spent.keep(tmp_path / "run")
    assert Spent.kept(tmp_path / "run") == spent
    (tmp_path / "run" / "cost.json").write_text('{"machines_usd": "')
    with pytest.raises(CheckpointError, match=r"cost\.json: damaged record of costs"):
        Spent.kept(tmp_path / "run")


def test_a_row_survives_json():
    found = row(12.5, [Route(OREGON, VIRGINIA, 10, "v"), Route(GRONINGEN, VIRGINIA, 7, "g")])
    assert CostRow.model_validate_json(found.model_dump_json()) == found

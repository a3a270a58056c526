"""The planner picks what is best on cases made by hand, and nothing that the limit or the job rules out."""

from dataclasses import replace

import pytest

from tests.cost.test_model import EAST, FAR, price, region, scenario
from xcloud.cost.model import Wire
from xcloud.cost.planner import Axis, Choice, Limit, alone, best


def with_(**changes):
    return lambda s: replace(s, **changes)


BALANCE = Axis("balance", (Choice("balanced", ("balance=dynamic",), with_(balanced=True), learning=True),))
HUB = Axis("hub", (Choice("in gcp", ("cost.hub=gcp",), with_(hub=FAR)),))
CODEC = Axis(
    "codec", (Choice("small", ("codec=small",), with_(wire=Wire(10**8, 10**8, 10**8)), learning=True),)
)


def cheaper(usd):
    """Machines of both regions at another price, half as fast."""

    def change(s):
        regions = {
            "fast": region(EAST, (100, 25.0), usd=usd),
            "slow": region(FAR, (100, 5.0), usd=usd),
        }
        return replace(s, regions=regions)

    return Axis("market", (Choice("slow and cheap", ("market=spot",), change),))


def test_each_choice_is_shown_by_itself():
    rows = alone(scenario(), [BALANCE, CODEC], price)
    assert [(axis.name, one.label) for axis, one in rows] == [("balance", "balanced"), ("codec", "small")]
    assert rows[0][1].learning


def test_the_cheapest_takes_all_that_helps_and_nothing_else():
    found = best(scenario(), [BALANCE, HUB, CODEC], price, Limit())
    assert found.sets == (
        "balance=dynamic",
        "codec=small",
    )  # the hub changes nothing here: both ways cost the same


def test_who_aggregates_is_chosen_by_what_traffic_costs():
    regions = {"a": region(EAST, (100, 50.0)), "b": region(FAR, (100, 50.0)), "c": region(FAR, (100, 50.0))}
    found = best(scenario(regions=regions), [HUB], price, Limit())
    assert found.sets == ("cost.hub=gcp",)  # two of three regions are there


def test_under_a_budget_the_fastest_that_costs_no_more():
    as_it_is = best(scenario(), [], price, Limit())
    axes = [cheaper(usd=9.0)]
    assert best(scenario(), axes, price, Limit()).sets == (
        "market=spot",
    )  # dearer by the hour, cheaper in all
    assert best(scenario(), axes, price, Limit(usd=1.01 * as_it_is.forecast.usd)).sets == ()
    assert best(scenario(), axes, price, Limit(usd=0.99 * as_it_is.forecast.usd)).sets == ("market=spot",)
    assert best(scenario(), axes, price, Limit(usd=0.01)) is None


def test_under_a_time_the_cheapest_that_takes_no_longer():
    axes = [cheaper(usd=9.0)]
    as_it_is = best(scenario(), [], price, Limit()).forecast
    assert best(scenario(), axes, price, Limit(seconds=as_it_is.seconds)).sets == ()
    assert best(scenario(), axes, price, Limit(seconds=3 * as_it_is.seconds)).sets == ("market=spot",)
    assert best(scenario(), axes, price, Limit(seconds=1.0)) is None


def test_what_the_job_does_not_allow_is_passed_over():
    found = best(scenario(), [BALANCE, CODEC], price, Limit(), valid=lambda one: len(one.sets) < 2)
    assert found.sets == ("balance=dynamic",)
    assert best(scenario(), [BALANCE], price, Limit(), valid=lambda one: False) is None


def test_a_gain_that_is_hardly_one_is_not_worth_a_change():
    tiny = Axis("codec", (Choice("hardly", ("codec=hardly",), with_(wire=Wire(10**9 - 10**6, 10**9, 0))),))
    assert best(scenario(), [tiny], price, Limit()).sets == ()


def test_where_not_everything_has_a_price_time_counts_and_no_price_may_get_lost():
    regions = {"fast": region(EAST, (100, 50.0)), "slow": region(FAR, (100, 10.0), usd=None)}
    unknown = Axis("market", (Choice("unknown", ("x=y",), with_(regions=regions)),))
    found = best(scenario(), [unknown], price, Limit())
    assert found.sets == ()
    base = scenario(regions=regions)
    assert best(base, [BALANCE], price, Limit()).sets == ("balance=dynamic",)
    assert best(base, [BALANCE], price, Limit(usd=1e9)) is None  # nobody knows whether it stays within


@pytest.mark.parametrize("limit", [Limit(), Limit(usd=1e6), Limit(seconds=1e6)])
def test_the_best_is_never_worse_than_the_job(limit):
    found = best(scenario(), [BALANCE, HUB, CODEC, cheaper(usd=100.0)], price, limit)
    usual = best(scenario(), [], price, limit)
    assert (
        found.forecast.usd <= usual.forecast.usd * 1.005
        or found.forecast.seconds <= usual.forecast.seconds * 1.005
    )

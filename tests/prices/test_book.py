import datetime as dt

import pytest

from xcloud.errors import ConfigError
from xcloud.prices import Instance, Place, load_prices
from xcloud.prices.book import CLOUDS

CONTINENTS = {"north_america", "south_america", "europe", "asia"}
# What Ray names NVIDIA accelerators: the word after "NVIDIA" in the driver's name of them.
ACCELERATORS = {"T4", "V100", "A10", "A10G", "L4", "L40S", "A100", "H100", "H200"}


@pytest.fixture(scope="module")
def book():
    return load_prices()


@pytest.fixture
def user(tmp_path):
    def write(text):
        path = tmp_path / "prices.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_cloud_s_file_is_complete(book, cloud):
    held = book._clouds[cloud]
    assert dt.date(2024, 1, 1) < held.as_of < dt.date.today()  # noqa: DTZ011 - a day, anywhere
    assert held.source.startswith("https://")
    assert set(held.locations.values()) <= CONTINENTS
    kinds = {machine.accelerator for machine in book.instances(cloud)}
    assert kinds - {None} <= ACCELERATORS
    assert {None, "T4", "A100", "H100", "H200"} <= kinds
    assert sum(machine.accelerator is not None for machine in book.instances(cloud)) >= 8
    for machine in book.instances(cloud):
        assert machine.count in ((1, 2, 4, 8) if machine.accelerator else (0,))
        places = book.locations(cloud, machine.name)
        assert places
        for place in places:
            assert place in held.locations, f"{machine.name}: {place} has no continent"
            on_demand = book.per_hour(cloud, place, machine.name, "on_demand")
            spot = book.per_hour(cloud, place, machine.name, "spot")
            assert on_demand.usd > 0
            assert spot is None or 0 < spot.usd < on_demand.usd
    for place in held.locations:
        here = Place(cloud, place)
        there = next(Place(c, "us-east-1") for c in CLOUDS if c != cloud)
        assert book.egress_per_gb(here, here).usd == 0
        assert book.egress_per_gb(here, there).usd > 0
        assert all(
            book.egress_per_gb(here, Place(cloud, other)).usd > 0
            for other in held.locations
            if other != place
        )
        assert 0 < book.storage_per_gb_month(cloud, place).usd < 0.1


@pytest.mark.parametrize("cloud", CLOUDS)
def test_machines_of_one_family_cost_in_proportion(book, cloud):
    """A slip of the pen by a digit shows: what an accelerator-hour costs stays within a factor of four."""
    by_kind = {}
    for machine in book.instances(cloud):
        for place in book.locations(cloud, machine.name):
            per = book.per_hour(cloud, place, machine.name, "on_demand").usd / (machine.count or machine.cpus)
            kind = (machine.accelerator, machine.accelerator_memory_gb)
            by_kind.setdefault(kind, []).append(per)
    assert all(max(each) < 4 * min(each) for each in by_kind.values()), by_kind


def test_an_instance_is_described(book):
    assert book.instance("aws", "p5.48xlarge") == Instance(
        "p5.48xlarge", "aws", cpus=192, memory_gb=2048, accelerator="H100", count=8, accelerator_memory_gb=80
    )
    assert book.instance("aws", "m7i.xlarge") == Instance("m7i.xlarge", "aws", 4, 16)


def test_an_unknown_instance_names_the_nearest(book):
    with pytest.raises(
        ConfigError, match=r"'p5\.48xlrge': not .* known of 'aws'; did you mean 'p5\.48xlarge'"
    ):
        book.instance("aws", "p5.48xlrge")
    with pytest.raises(
        ConfigError, match=r"no instance types of cloud 'lab' are known; expected one of aws, gcp"
    ):
        book.instance("lab", "node")


def test_what_nobody_says_is_unknown_and_not_zero(book):
    assert book.per_hour("aws", "mars-north-1", "p5.48xlarge", "spot") is None
    assert book.per_hour("aws", "us-east-1", "p5en.48xlarge", "spot") is None
    assert book.egress_per_gb(Place("lab", "cellar"), Place("lab", "cellar")) is None
    assert book.egress_per_gb(Place("aws", "us-east-1"), Place("aws", "mars-north-1")) is None
    assert book.storage_per_gb_month("lab", "cellar") is None
    assert book.instances("lab") == ()


def test_egress_goes_by_who_sends_and_how_far(book):
    virginia, oregon = Place("aws", "us-east-1"), Place("aws", "us-west-2")
    tokyo, netherlands = Place("aws", "ap-northeast-1"), Place("gcp", "europe-west4")
    assert book.egress_per_gb(virginia, oregon).usd == 0.02
    assert book.egress_per_gb(tokyo, virginia).usd == 0.09
    assert book.egress_per_gb(virginia, tokyo).usd == 0.02
    assert book.egress_per_gb(virginia, netherlands).usd == 0.09
    assert book.egress_per_gb(netherlands, virginia).usd == 0.12
    assert book.egress_per_gb(tokyo, netherlands).usd == 0.114  # its own, before its continent's 0.12


def test_a_user_s_prices_go_before_and_the_rest_stays(user, book):
    path = user("""
aws:
  as_of: 2026-03-01
  source: our contract
  instances: {p5.48xlarge: {locations: {us-east-1: {spot: 9.5}}}}
  egress: {us-east-1: {internet: 0.01}}
""")
    mine = load_prices(path)
    spot = mine.per_hour("aws", "us-east-1", "p5.48xlarge", "spot")
    assert (spot.usd, spot.as_of, spot.source) == (9.5, dt.date(2026, 3, 1), "our contract")
    for place, market in (("us-east-1", "on_demand"), ("us-west-2", "spot")):
        theirs = book.per_hour("aws", place, "p5.48xlarge", market)
        assert mine.per_hour("aws", place, "p5.48xlarge", market) == theirs
    assert mine.egress_per_gb(Place("aws", "us-east-1"), Place("gcp", "us-east1")).usd == 0.01
    assert mine.egress_per_gb(Place("aws", "us-west-2"), Place("gcp", "us-east1")).usd == 0.09
    assert mine.instance("aws", "p5.48xlarge") == book.instance("aws", "p5.48xlarge")


def test_a_cloud_of_one_s_own(user):
    path = user("""
lab:
  as_of: 2026-03-01
  instances:
    node: {cpus: 64, memory_gb: 512, accelerator: A100, count: 4, accelerator_memory_gb: 80, locations: {any: {on_demand: 1.5}}}
  egress: {any: {same_location: 0, internet: 0.002}}
  storage: {standard: {any: 0.001}}
""")
    book = load_prices(path)
    assert book.instance("lab", "node").count == 4
    assert book.per_hour("lab", "cellar", "node", "on_demand").usd == 1.5
    assert book.per_hour("lab", "cellar", "node", "on_demand").source == str(path)
    assert book.per_hour("lab", "cellar", "node", "spot") is None
    assert book.egress_per_gb(Place("lab", "cellar"), Place("lab", "cellar")).usd == 0
    assert book.egress_per_gb(Place("lab", "cellar"), Place("aws", "us-east-1")).usd == 0.002
    assert book.egress_per_gb(Place("lab", "cellar"), Place("lab", "attic")) is None
    assert book.storage_per_gb_month("lab", "cellar").usd == 0.001


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "expected a mapping from clouds to their prices"),
        ("aws: 3", "aws: expected a mapping"),
        ("aws: {instances: {}}", r"aws\.as_of: expected the day"),
        ("aws: {as_of: 2026-01-01, instancs: {}}", r"aws\.instancs: unknown key; did you mean 'instances'\?"),
        (
            "aws: {as_of: 2026-01-01, instances: {p5.48xlarge: {locations: {us-east-1: {spot: -1}}}}}",
            r"aws\.instances\.p5\.48xlarge\.locations\.us-east-1\.spot: .* greater than or equal to 0, got -1",
        ),
        (
            "aws: {as_of: 2026-01-01, instances: {p5.48xlarge: {locations: {us-east-1: {sopt: 1}}}}}",
            r"aws\.instances\.p5\.48xlarge\.locations\.us-east-1\.sopt: .*'on_demand' or 'spot'",
        ),
        (
            "aws: {as_of: 2026-01-01, instances: {p9: {locations: {us-east-1: {spot: 1}}}}}",
            r"aws\.instances\.p9\.cpus: required key is missing \(this instance type does not come",
        ),
        (
            "lab: {as_of: 2026-01-01, instances: {n: {cpus: 1, memory_gb: 1, accelerator: A100}}}",
            r"lab\.instances\.n: accelerator, count and accelerator_memory_gb belong together",
        ),
        (
            "aws: {as_of: 2026-01-01, egress: {any: {internet: .nan}}}",
            r"aws\.egress\.any\.internet: .*got nan",
        ),
        ("aws: {as_of: 2026-01-01, as_of: 2026-01-01}", "'as_of' is given twice"),
    ],
)
def test_a_wrong_price_file_is_refused_by_file_and_key(user, text, expected):
    path = user(text)
    with pytest.raises(ConfigError, match=expected) as error:
        load_prices(path)
    assert str(path) in str(error.value)


def test_a_missing_price_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such price file"):
        load_prices(tmp_path / "none.yaml")

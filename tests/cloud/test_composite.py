"""The composite provider's logic, over clouds of which nothing runs."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

import xcloud.cloud.composite
from tests.fake_clouds import ALL_KEYS
from tests.paper_cloud import CLOUDS, PaperCloud
from xcloud.cloud.composite import CompositeNodeProvider
from xcloud.cloud.fallback import Bundle, parse_selector
from xcloud.errors import CloudError, ConfigError


def paper(name: str, **settings: Any) -> dict[str, Any]:
    module = "tests.paper_cloud.PaperCloud"
    return {"provider": {"type": "external", "module": module, "name": name}, **settings}


def kind(cloud: str, market: str, price: float, *fallback: str) -> dict[str, Any]:
    return {
        "resources": {"CPU": 4},
        "labels": {"cloud": cloud, "ray.io/market-type": market},
        "max_workers": 5,
        "min_workers": 0,
        "node_config": {"_cloud": cloud, "_usd_per_hour": price, "_fallback": list(fallback), "size": "big"},
    }


def cluster_file(**provider: Any) -> dict[str, Any]:
    return {
        "cluster_name": "paper",
        "max_workers": 10,
        "provider": {
            "type": "external",
            "module": "xcloud.cloud.composite.CompositeNodeProvider",
            "home": "aws",
            "clouds": {"aws": paper("aws"), "gcp": paper("gcp")},
            **provider,
        },
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "node_config": {"_usd_per_hour": 0.5}, "max_workers": 0},
            "spot": kind("aws", "spot", 2.0, "on_demand", "gcp"),
            "on_demand": kind("aws", "on-demand", 5.0),
            "gcp": kind("gcp", "spot", 3.0),
        },
        "head_node_type": "head",
        **copy.deepcopy(ALL_KEYS),
    }


def ready(**provider: Any) -> dict[str, Any]:
    return CompositeNodeProvider.bootstrap_config(prepare_config(cluster_file(**provider)))


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (xcloud.cloud.composite, xcloud.cloud.launching):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def provider(clock: Clock) -> Iterator[CompositeNodeProvider]:
    yield started()
    CLOUDS.clear()


def started(waiting: list[Bundle] | None = None, **settings: Any) -> CompositeNodeProvider:
    """A provider that has listed both clouds once, and reads `waiting` as what the cluster waits for."""
    made = CompositeNodeProvider(ready(**settings)["provider"], "paper")
    made._launcher._waiting = lambda: waiting
    made._until_listed = lambda: (
        None
    )  # nobody lists; `test_a_substitute_is_listed_before_...` has the real one
    made.non_terminated_nodes({})
    return made


def launch(provider: CompositeNodeProvider, name: str, count: int = 1) -> Any:
    settings = provider.config.node_types[name]
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_LAUNCH_REQUEST: "r1"}
    return provider.create_node_with_resources_and_labels(
        settings["node_config"], tags, count, settings["resources"], settings.get("labels", {})
    )


def types_of(provider: CompositeNodeProvider) -> list[str]:
    nodes = provider.non_terminated_nodes({})
    return sorted(provider.node_tags(node)[TAG_RAY_USER_NODE_TYPE] for node in nodes)


# -- routing ------------------------------------------------------------------------------


def test_each_call_reaches_the_nodes_own_cloud(provider: CompositeNodeProvider) -> None:
    assert launch(provider, "spot", 2) == {"aws/n0": {"made": True}, "aws/n1": {"made": True}}
    launch(provider, "gcp")
    assert provider.non_terminated_nodes({}) == ["aws/n0", "aws/n1", "gcp/n0"]
    assert provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "gcp"}) == ["gcp/n0"]
    provider.set_node_tags("gcp/n0", {TAG_RAY_NODE_STATUS: "up-to-date"})
    assert CLOUDS["gcp"].nodes["n0"][TAG_RAY_NODE_STATUS] == "up-to-date"
    assert provider.node_tags("aws/n1")[TAG_RAY_LAUNCH_REQUEST] == "r1"
    assert provider.internal_ip("gcp/n0") == "10.0.0.0"
    assert provider.get_node_id("10.0.0.1", use_internal_ip=True) == "aws/n1"
    assert provider.is_running("aws/n0")
    assert not provider.is_terminated("aws/n0")
    assert CLOUDS["aws"].configs["n0"] == {"size": "big", "subnet": "aws-subnet"}
    provider.terminate_nodes(["aws/n0", "gcp/n0"])
    assert provider.non_terminated_nodes({}) == ["aws/n1"]


def test_ids_stay_as_they_are_where_a_provider_tells_ray_itself(clock: Clock) -> None:
    provider = started(clouds={"aws": paper("aws", qualify_ids=False), "gcp": paper("gcp")})
    launch(provider, "spot")
    assert provider.non_terminated_nodes({}) == ["n0"]
    assert provider.node_tags("n0")[TAG_RAY_USER_NODE_TYPE] == "spot"
    with pytest.raises(CloudError, match="'n7' is in none of"):
        provider.node_tags("n7")


def test_ssh_uses_the_nodes_own_cloud(provider: CompositeNodeProvider) -> None:
    launch(provider, "gcp")
    provider.non_terminated_nodes({})
    runner = provider.get_command_runner("x", "gcp/n0", {"ssh_user": "u"}, "paper", None, False)
    assert runner == "runner of n0"
    assert CLOUDS["gcp"].runners == [{"ssh_user": "u", "ssh_private_key": "/keys/gcp.pem"}]


def test_a_type_without_a_cloud_is_named(provider: CompositeNodeProvider) -> None:
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "odd"}
    with pytest.raises(ConfigError, match=r"available_node_types.odd.node_config._cloud: expected one of"):
        provider.create_node({}, tags, 1)
    with pytest.raises(ConfigError, match=r"provider.node_types: 'odd' is missing"):
        provider.create_node_with_resources_and_labels({}, tags, 1, {}, {})


# -- a cloud that fails -------------------------------------------------------------------


def test_the_last_answer_of_a_cloud_that_is_down_stands(
    provider: CompositeNodeProvider, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    launch(provider, "spot")
    launch(provider, "gcp")
    provider.non_terminated_nodes({})
    CLOUDS["gcp"].broken = ConnectionError("no route")
    assert types_of(provider) == ["gcp", "spot"]
    assert provider.is_running("gcp/n0")
    assert not provider.is_terminated("gcp/n0")
    assert "cloud gcp is down: ConnectionError: no route; its last answer stands, 1 nodes" in caplog.text
    launch(provider, "spot")
    assert types_of(provider) == ["gcp", "spot", "spot"]
    with pytest.raises(NodeLaunchException, match="gcp: cloud gcp is down: ConnectionError: no route"):
        launch(provider, "gcp")
    CLOUDS["gcp"].broken = None
    clock.now += 10
    assert provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "gcp"}) == ["gcp/n0"]
    launch(provider, "gcp")
    assert "cloud gcp answers again after 1 failures" in caplog.text


def test_a_cloud_that_is_down_is_asked_less_and_less(provider: CompositeNodeProvider, clock: Clock) -> None:
    """Ray lists every few seconds; with pauses of 10, 20, 40, .. s, an hour costs few calls."""
    CLOUDS["gcp"].broken = ConnectionError("no route")
    CLOUDS["gcp"].calls.clear()
    for _ in range(720):
        provider.non_terminated_nodes({})
        clock.now += 5
    assert len(CLOUDS["gcp"].calls) == 5 + 11  # five pauses that double, then one try in five minutes
    assert CLOUDS["aws"].calls.count("list") == 721


def test_a_cloud_that_hangs_is_not_waited_for() -> None:
    provider = started(answer_timeout_s=0.2)
    CLOUDS["gcp"].hangs["list"] = threading.Event()
    launch(provider, "spot")
    assert types_of(provider) == ["spot"]
    assert provider.clouds["gcp"].api.reason == "it did not list its nodes within 0.2 s"
    CLOUDS["gcp"].hangs["list"].set()


def test_a_provider_that_does_not_start_is_tried_again(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def refuse(self: PaperCloud, *given: Any) -> None:
        if given[0]["name"] == "gcp":
            raise PermissionError("no credentials")
        make(self, *given)

    make = PaperCloud.__init__
    monkeypatch.setattr(PaperCloud, "__init__", refuse)
    provider = started()
    assert provider.clouds["gcp"].api.reason == (
        "provider 'external' does not start: PermissionError: no credentials"
    )
    launch(provider, "spot")
    with pytest.raises(NodeLaunchException, match="no credentials"):
        launch(provider, "gcp")
    monkeypatch.setattr(PaperCloud, "__init__", make)
    clock.now += 10
    provider.non_terminated_nodes({})
    launch(provider, "gcp")
    assert types_of(provider) == ["gcp", "spot"]


def test_no_second_head_while_the_first_cannot_be_seen(clock: Clock) -> None:
    """`ray up` launches a head where it sees none, so it must not be told that there is none."""
    provider = CompositeNodeProvider(ready()["provider"], "paper")
    assert provider.clouds["aws"].provider is CLOUDS["aws"]
    CLOUDS["aws"].broken = ConnectionError("no route")
    with pytest.raises(CloudError, match="cloud 'aws': ConnectionError: no route"):
        provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"})
    assert provider.non_terminated_nodes({}) == []


# -- caps, budgets, back-off, fallback ----------------------------------------------------


def test_a_clouds_cap_and_budget_hold(clock: Clock) -> None:
    clouds = {"aws": paper("aws", max_workers=3), "gcp": paper("gcp", budget_usd_per_hour=7.0)}
    provider = started(clouds=clouds)
    with pytest.raises(NodeLaunchException, match="spot: max_workers 3 of the cloud"):
        launch(provider, "spot", 4)
    with pytest.raises(NodeLaunchException, match="gcp: budget_usd_per_hour 7 of the cloud"):
        launch(provider, "gcp", 4)
    assert types_of(provider) == ["gcp", "gcp", "spot", "spot", "spot"]
    provider.terminate_node("aws/n0")
    provider.non_terminated_nodes({})
    launch(provider, "spot")


def test_nodes_on_their_way_count(clock: Clock) -> None:
    """Two launches between two listings do not exceed a cap together."""
    provider = started(clouds={"aws": paper("aws", max_workers=3), "gcp": paper("gcp")})
    launch(provider, "spot", 2)
    with pytest.raises(NodeLaunchException, match="max_workers 3 of the cloud"):
        launch(provider, "spot", 2)
    assert types_of(provider) == ["spot"] * 3
    assert sum(provider.clouds["aws"].usage().workers.values()) == 3  # counted once


def test_launches_from_many_threads_keep_the_cap(clock: Clock) -> None:
    provider = started(clouds={"aws": paper("aws", max_workers=5), "gcp": paper("gcp")})
    refused: list[Exception] = []

    def one() -> None:
        try:
            launch(provider, "spot")
        except NodeLaunchException as error:
            refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(CLOUDS["aws"].configs) == 5
    assert len(refused) == 15


def test_what_is_full_is_left_alone_for_a_while(provider: CompositeNodeProvider, clock: Clock) -> None:
    CLOUDS["gcp"].capacity["gcp"] = 0
    for _ in range(60):  # Ray asks every two seconds
        with pytest.raises(NodeLaunchException, match="gcp: RuntimeError: InsufficientInstanceCapacity"):
            launch(provider, "gcp")
        clock.now += 2
    assert CLOUDS["gcp"].calls.count("create") == 4  # at 0, 10, 30 and 70 s
    clock.now += 300
    CLOUDS["gcp"].capacity["gcp"] = 1
    launch(provider, "gcp")
    assert types_of(provider) == ["gcp"]


def test_nodes_that_were_launched_are_listed_though_the_cloud_fails(
    provider: CompositeNodeProvider, clock: Clock
) -> None:
    """Else Ray would meet a node that nobody has launched, and wait for the launched one for ten minutes."""
    launch(provider, "gcp")
    CLOUDS["gcp"].broken = ConnectionError("no route")
    assert provider.non_terminated_nodes({}) == ["gcp/n0"]
    assert provider.node_tags("gcp/n0")[TAG_RAY_LAUNCH_REQUEST] == "r1"
    assert sum(provider.clouds["gcp"].usage().workers.values()) == 1


ANY = Bundle({"CPU": 4}, count=5)
IN_AWS = Bundle({"CPU": 4}, (parse_selector({"cloud": "aws"}),), count=5)
SPOT_IN_AWS = Bundle({"CPU": 4}, (parse_selector({"cloud": "aws", "ray.io/market-type": "spot"}),), count=5)


@pytest.mark.parametrize(
    ("waiting", "got", "told"),
    [
        ([ANY], ["gcp", "gcp"], "launched 2 x gcp instead"),
        ([IN_AWS], ["on_demand", "on_demand"], "launched 2 x on_demand instead"),
        ([SPOT_IN_AWS], [], "on_demand: nothing that waits would run on it"),
        ([], [], "nothing that waits would run on it"),
        (None, [], "no fallback: what the cluster waits for cannot be read"),
    ],
)
def test_a_full_market_falls_back_to_what_the_job_allows(
    waiting: list[Bundle] | None, got: list[str], told: str, clock: Clock
) -> None:
    """The cheapest type that holds what waits: another cloud's, the on-demand one, or none."""
    provider = started(waiting)
    CLOUDS["aws"].capacity["spot"] = 0
    with pytest.raises(NodeLaunchException, match=told):
        launch(provider, "spot", 2)
    assert types_of(provider) == got


def test_fallback_goes_on_where_the_first_substitute_is_full_too(clock: Clock) -> None:
    provider = started([ANY])
    CLOUDS["aws"].capacity["spot"] = 1
    CLOUDS["gcp"].capacity["gcp"] = 1
    with pytest.raises(NodeLaunchException, match=r"1 of 3 launched.*1 x gcp instead.*1 x on_demand instead"):
        launch(provider, "spot", 3)
    assert types_of(provider) == ["gcp", "on_demand", "spot"]
    assert provider._state()["refused"].keys() == {"spot"}


def test_what_a_failed_launch_made_counts(clock: Clock) -> None:
    """Four of five are made before the quota ends: a fifth node fills the cap, and five more would pass it."""
    clouds = {"aws": paper("aws", max_workers=5, budget_usd_per_hour=20.0), "gcp": paper("gcp")}
    provider = started([IN_AWS], clouds=clouds)
    CLOUDS["aws"].quota = 4
    create = CLOUDS["aws"].create_node

    def unlimited(node_config: Any, tags: dict[str, str], count: int) -> Any:
        if tags[TAG_RAY_USER_NODE_TYPE] == "on_demand":
            CLOUDS["aws"].quota = None  # the quota is the spot market's
        return create(node_config, tags, count)

    CLOUDS["aws"].create_node = unlimited  # type: ignore[method-assign]
    told = r"spot: RuntimeError: quota exceeded \(4 of 5 launched\);.* launched 1 x on_demand instead"
    with pytest.raises(NodeLaunchException, match=told):
        launch(provider, "spot", 5)
    assert types_of(provider) == ["on_demand", *["spot"] * 4]
    assert provider.clouds["aws"].usage().workers == {"spot": 4, "on_demand": 1}


def test_launches_that_fail_side_by_side_count_each_node_once(clock: Clock) -> None:
    """Ray splits one request into several launches; what one of them made is not taken for the other's."""
    provider = started([ANY])
    CLOUDS["aws"].quota = 3
    with pytest.raises(NodeLaunchException, match=r"\(3 of 4 launched\); launched 1 x gcp instead"):
        launch(provider, "spot", 4)
    clock.now += 10
    with pytest.raises(NodeLaunchException, match=r"quota exceeded; launched 2 x gcp instead"):
        launch(provider, "spot", 2)
    assert types_of(provider) == [*["gcp"] * 3, *["spot"] * 3]


def test_a_failed_launch_counts_until_its_cloud_is_heard_of(clock: Clock) -> None:
    """The API goes away in the middle of a launch: what it made cannot be seen, so all of it may be there."""
    provider = started([IN_AWS], clouds={"aws": paper("aws", max_workers=5), "gcp": paper("gcp")})
    aws = CLOUDS["aws"]
    aws.quota = 4
    create = aws.create_node

    def then_silent(*given: Any) -> Any:
        try:
            return create(*given)
        finally:
            aws.broken = ConnectionError("no route")

    aws.create_node = then_silent  # type: ignore[method-assign]
    with pytest.raises(NodeLaunchException, match="on_demand: cloud aws is down: ConnectionError"):
        launch(provider, "spot", 5)
    assert provider.clouds["aws"].usage().workers == {"spot": 5}
    aws.broken = None
    clock.now += 10
    assert types_of(provider).count("spot") == 4
    assert provider.clouds["aws"].usage().workers == {"spot": 4}


def test_a_launch_without_an_answer_counts_until_it_ends() -> None:
    """The listings in between do not have its nodes yet, and must not be taken for proof that there are none."""
    provider = started(launch_timeout_s=0.1, clouds={"aws": paper("aws", max_workers=3), "gcp": paper("gcp")})
    aws, cloud = CLOUDS["aws"], provider.clouds["aws"]
    aws.hangs["create"] = threading.Event()
    with pytest.raises(NodeLaunchException, match=r"spot: it did not launch within 0\.1 s"):
        launch(provider, "spot", 3)
    for _ in range(3):
        assert types_of(provider) == []
        assert cloud.usage().workers == {"spot": 3}
    with pytest.raises(NodeLaunchException, match="on_demand: max_workers 3 of the cloud"):
        launch(provider, "on_demand")
    aws.hangs["create"].set()
    for thread in threading.enumerate():
        if thread.name == "cloud aws: launch":
            thread.join()
    assert types_of(provider) == ["spot"] * 3
    assert cloud.usage().workers == {"spot": 3}
    provider.terminate_node("aws/n0")
    provider.non_terminated_nodes({})
    assert cloud.usage().workers == {"spot": 2}


class Once:
    """Does something at the first call, and nothing at those that come of it or follow."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done = False

    def __call__(self) -> None:
        if not self.done:
            self.done = True
            self._work()


class Between:
    """A lock; something happens each time that it has been released."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._happens = happens

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self._happens()


def test_usage_is_one_snapshot(provider: CompositeNodeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that lands whenever it can does not hide a launch that it replaces."""
    cloud = provider.clouds["aws"]
    launch(provider, "spot", 2)
    monkeypatch.setattr(cloud, "_lock", Between(refresh := Once(lambda: cloud.refresh(1000.0))))
    assert cloud.usage().workers == {"spot": 2}
    assert refresh.done
    assert cloud.usage().workers == {"spot": 2}


def test_an_old_listing_does_not_undo_a_newer_one(provider: CompositeNodeProvider) -> None:
    """Ray's own listing may be under way while a failed launch asks for one."""
    cloud, aws = provider.clouds["aws"], CLOUDS["aws"]
    old_reads, old_ends = threading.Event(), threading.Event()
    listed = cloud._list

    def slow() -> Any:
        found = listed()
        old_reads.set()
        old_ends.wait(30)
        return found

    cloud._list = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=cloud.refresh, args=(1000.0,))
    thread.start()
    assert old_reads.wait(30)
    cloud._list = listed  # type: ignore[method-assign]
    launch(provider, "spot")
    cloud.refresh(1000.0)
    old_ends.set()
    thread.join()
    assert list(cloud.nodes) == list(aws.nodes) == ["n0"]
    assert cloud.usage().workers == {"spot": 1}


def test_a_cloud_that_is_down_falls_back_to_the_other(clock: Clock) -> None:
    provider = started([ANY])
    CLOUDS["aws"].broken = ConnectionError("no route")
    provider.non_terminated_nodes({})
    with pytest.raises(NodeLaunchException, match=r"cloud aws is down.*launched 1 x gcp instead"):
        launch(provider, "spot")
    assert types_of(provider) == ["gcp"]


def test_a_substitute_is_listed_before_its_launch_is_said_to_have_failed() -> None:
    """Ray books the substitute first, and so asks for no other node in place of the one that failed."""
    provider = CompositeNodeProvider(ready()["provider"], "paper")
    provider._launcher._waiting = lambda: [ANY]
    provider.non_terminated_nodes({})
    CLOUDS["aws"].capacity["spot"] = 0
    failed = threading.Event()

    def asked() -> None:
        with pytest.raises(NodeLaunchException):
            launch(provider, "spot")
        failed.set()

    thread = threading.Thread(target=asked)
    thread.start()
    while not CLOUDS["gcp"].nodes:
        time.sleep(0.01)
    assert not failed.wait(0.2)
    assert types_of(provider) == ["gcp"]
    assert types_of(provider) == ["gcp"]
    assert failed.wait(10)
    thread.join()


# -- ending -------------------------------------------------------------------------------


def test_a_cloud_that_does_not_terminate_does_not_keep_the_others(
    provider: CompositeNodeProvider,
) -> None:
    launch(provider, "spot")
    launch(provider, "gcp")
    provider.non_terminated_nodes({})
    CLOUDS["aws"].broken = ConnectionError("no route")
    with pytest.raises(CloudError, match="cloud 'aws': n0 not terminated: ConnectionError: no route"):
        provider.terminate_nodes(["aws/n0", "gcp/n0"])
    assert CLOUDS["gcp"].nodes == {}


def test_a_cloud_that_hangs_does_not_keep_the_others_nodes(clock: Clock) -> None:
    """Ray terminates and hands out launches in one thread, so a cloud's silence must not hold it for long."""
    provider = started(answer_timeout_s=0.5)
    launch(provider, "spot", 2)
    launch(provider, "gcp")
    aws, gcp = CLOUDS["aws"], CLOUDS["gcp"]
    aws.hangs["terminate"] = threading.Event()
    told = r"cloud 'aws': n0 not terminated: it did not terminate within 0\.5 s"
    with pytest.raises(CloudError, match=told) as raised:
        provider.terminate_nodes(["aws/n0", "gcp/n0"])
    assert "gcp" not in str(raised.value)
    assert gcp.nodes == {}
    launch(provider, "gcp")
    for _ in range(10):  # Ray tries again every few seconds; the first try is still under way
        with pytest.raises(CloudError, match="n0 not terminated: asked for, and no answer yet"):
            provider.terminate_nodes(["aws/n0", "gcp/n1"] if "n1" in gcp.nodes else ["aws/n0"])
    assert gcp.nodes == {}
    with pytest.raises(CloudError, match=r"n1 not terminated: it did not terminate .*; next try in 10 s"):
        provider.terminate_nodes(["aws/n1"])
    assert aws.calls.count("terminate") == 1
    aws.hangs["terminate"].set()
    for thread in threading.enumerate():
        if thread.name == "cloud aws: terminate":
            thread.join()
    provider.terminate_nodes(["aws/n1"])
    assert aws.nodes == {}


def test_a_termination_that_never_answers_is_asked_for_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """After as long as a launch may take; a hung connection must not keep a machine that costs."""
    provider = started(answer_timeout_s=0.5, launch_timeout_s=60.0)
    launch(provider, "spot")
    aws = CLOUDS["aws"]
    first = aws.hangs["terminate"] = threading.Event()
    with pytest.raises(CloudError, match=r"it did not terminate within 0\.5 s"):
        provider.terminate_node("aws/n0")
    del aws.hangs["terminate"]
    clock.now += 59
    with pytest.raises(CloudError, match="asked for, and no answer yet"):
        provider.terminate_node("aws/n0")
    clock.now += 1
    provider.terminate_node("aws/n0")
    assert aws.nodes == {}
    first.set()
    for thread in threading.enumerate():
        if thread.name == "cloud aws: terminate":
            thread.join()
    assert "cloud aws: terminate failed after its time limit: KeyError: 'n0'" in caplog.text


def test_a_cloud_that_refuses_to_terminate_is_asked_less_and_less(
    provider: CompositeNodeProvider, clock: Clock
) -> None:
    launch(provider, "spot")
    CLOUDS["aws"].broken = ConnectionError("no route")
    CLOUDS["aws"].calls.clear()
    for _ in range(60):
        with pytest.raises(CloudError, match="n0 not terminated: ConnectionError: no route"):
            provider.terminate_node("aws/n0")
        clock.now += 2
    assert CLOUDS["aws"].calls.count("terminate") == 4  # at 0, 10, 30 and 70 s
    CLOUDS["aws"].broken = None
    clock.now += 300
    provider.terminate_node("aws/n0")
    assert CLOUDS["aws"].nodes == {}


def test_a_node_that_nobody_knows_does_not_keep_the_others(clock: Clock) -> None:
    provider = started(clouds={"aws": paper("aws", qualify_ids=False), "gcp": paper("gcp")})
    launch(provider, "gcp")
    with pytest.raises(CloudError, match="node 'n7' is in none of"):
        provider.terminate_nodes(["n7", "gcp/n0"])
    assert CLOUDS["gcp"].nodes == {}


def test_taking_down_does_not_wait_for_a_cloud_that_hangs(clock: Clock) -> None:
    provider = started(answer_timeout_s=0.5)
    launch(provider, "spot")
    CLOUDS["gcp"].hangs["list"] = threading.Event()
    workers = {TAG_RAY_NODE_KIND: "worker"}
    assert provider.nodes_for_teardown(workers) == ["aws/n0"]
    provider.terminate_nodes(["aws/n0"])
    with pytest.raises(CloudError, match=r"cloud 'gcp': no answer .* it did not list its nodes within"):
        provider.nodes_for_teardown(workers)
    CLOUDS["gcp"].hangs["list"].set()


def test_taking_down_waits_longer_than_the_autoscaler_may(clock: Clock) -> None:
    """`ray down` asks once, and its process ends with the answer; there are no launches to hold up."""
    provider = started(answer_timeout_s=0.5)
    launch(provider, "spot")
    aws = CLOUDS["aws"]
    aws.hangs["terminate"] = threading.Event()
    assert provider.nodes_for_teardown({TAG_RAY_NODE_KIND: "worker"}) == ["aws/n0"]
    ended = threading.Event()

    def down() -> None:
        provider.terminate_nodes(["aws/n0"])
        ended.set()

    thread = threading.Thread(target=down)
    thread.start()
    assert not ended.wait(1.0)
    aws.hangs["terminate"].set()
    assert ended.wait(30)
    thread.join()
    assert aws.nodes == {}


def test_teardown_takes_down_what_it_reaches_and_then_says_what_it_does_not(
    provider: CompositeNodeProvider,
) -> None:
    launch(provider, "spot")
    launch(provider, "gcp")
    CLOUDS["gcp"].broken = ConnectionError("no route")
    workers = {TAG_RAY_NODE_KIND: "worker"}
    assert provider.nodes_for_teardown(workers) == ["aws/n0"]
    assert provider.nodes_for_teardown({TAG_RAY_NODE_KIND: "head"}) == []
    provider.terminate_nodes(["aws/n0"])
    with pytest.raises(CloudError, match=r"cloud 'gcp': no answer while .* nodes may still run there"):
        provider.nodes_for_teardown(workers)


# -- `ray up` -----------------------------------------------------------------------------


def test_bootstrap_goes_through_every_clouds_own_provider() -> None:
    out = ready()
    validate_config({key: value for key, value in out.items() if key != "head_node"})
    types = out["available_node_types"]
    assert types["spot"]["node_config"]["subnet"] == "aws-subnet"
    assert types["gcp"]["node_config"]["subnet"] == "gcp-subnet"
    assert types["gcp"]["node_config"]["_cloud"] == "gcp"
    assert types["head"]["node_config"]["_cloud"] == "aws"
    assert out["head_node"] == {"rights": "aws"}
    assert out["auth"] == {"ssh_private_key": "/keys/aws.pem"}
    seen = out["provider"]["node_types"]
    assert seen["spot"] == types["spot"]
    assert seen["head"]["node_config"]["_usd_per_hour"] == 0.5
    assert seen["gcp"]["node_config"]["_fallback"] == []
    assert types["spot"]["priority"] > types["gcp"]["priority"] > types["on_demand"]["priority"]


def test_the_head_gets_the_other_clouds_keys_and_workers_none() -> None:
    out = ready()
    at = "~/.xcloud_ssh/gcp.pem"
    assert out["file_mounts"] == {at: "/keys/gcp.pem"}
    heads = copy.deepcopy(out)
    heads["auth"]["ssh_private_key"] = "~/ray_bootstrap_key.pem"  # as Ray has it by then
    heads["file_mounts"] = {at: at}
    read = CompositeNodeProvider(out["provider"], "paper").prepare_for_head_node(heads)
    assert read["file_mounts"] == {}
    clouds = read["provider"]["clouds"]
    assert clouds["aws"]["auth"]["ssh_private_key"] == "~/ray_bootstrap_key.pem"
    assert clouds["gcp"]["auth"]["ssh_private_key"] == at


def test_a_clouds_own_file_goes_through_bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    types = {"lab": {"resources": {"CPU": 2}, "node_config": {"size": "small"}}}
    (tmp_path / "lab.yaml").write_text(
        yaml.safe_dump({"provider": paper("lab")["provider"], "available_node_types": types})
    )
    out = ready(clouds={"aws": paper("aws"), "gcp": paper("gcp"), "lab": {"file": "lab.yaml"}})
    assert out["available_node_types"]["lab"]["node_config"] == {
        "size": "small",
        "_cloud": "lab",
        "subnet": "lab-subnet",
    }
    provider = CompositeNodeProvider(out["provider"], "paper")
    provider.non_terminated_nodes({})
    launch(provider, "lab")
    assert types_of(provider) == ["lab"]


def test_a_cloud_that_refuses_bootstrap_is_named() -> None:
    clouds = {"aws": paper("aws"), "gcp": {"provider": {"type": "external", "module": "tests.nowhere.Cloud"}}}
    with pytest.raises(ConfigError, match=r"provider.clouds.gcp.provider: ModuleNotFoundError"):
        ready(clouds=clouds)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from xcloud.cloud.clouds import CloudsConfig, expand_clouds, node_types, own_config
from xcloud.errors import ConfigError
from xcloud.prices import load_prices


def provider(**changes: Any) -> dict[str, Any]:
    return {
        "type": "external",
        "module": "xcloud.cloud.composite.CompositeNodeProvider",
        "home": "aws",
        "clouds": {"aws": {"provider": {"type": "aws", "region": "us-east-1"}}},
        **changes,
    }


def one_type(**node_config: Any) -> dict[str, Any]:
    return {"resources": {"CPU": 4}, "max_workers": 2, "node_config": {"_cloud": "aws", **node_config}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"home": "gcp"}, r"provider.home: 'gcp' is not one of \['aws'\]"),
        ({"hom": "aws", "home": "aws"}, "provider.hom: unknown key; did you mean 'home'"),
        ({"retry_frst_s": 3}, "provider.retry_frst_s: unknown key; did you mean 'retry_first_s'"),
        ({"clouds": {}}, "provider.clouds"),
        ({"clouds": {"aws": {}}}, "provider.clouds.aws: needs `provider`, or `file`"),
        (
            {"clouds": {"aws": {"provider": {"region": "x"}}}},
            "provider.clouds.aws.provider.type: required key is missing",
        ),
        (
            {"clouds": {"aws": {"provider": {"type": "aws"}, "max_worker": 3}}},
            "provider.clouds.aws.max_worker: unknown key; did you mean 'max_workers'",
        ),
        (
            {"clouds": {"aws": {"provider": {"type": "aws"}, "budget_usd_per_hour": -1}}},
            "provider.clouds.aws.budget_usd_per_hour",
        ),
    ],
)
def test_a_wrong_key_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CloudsConfig.read(provider(**changes))


def test_keys_of_rays_own_are_left_alone() -> None:
    CloudsConfig.read(provider(use_internal_ips=True, disable_node_updaters=True, _config_cache_path="/x"))


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (
            {"a": {"node_config": {"_cloud": "awz"}}},
            r"available_node_types.a.node_config._cloud: expected one of \['aws'\], got 'awz'",
        ),
        ({"a": {}}, "available_node_types.a.node_config._cloud: expected one of"),
        ({"a": one_type(_usd_per_hour="2")}, "a.node_config._usd_per_hour: expected dollars per hour"),
        ({"a": one_type(_fallback="b")}, "a.node_config._fallback: expected a list"),
        ({"a": one_type(_fallback=["a"])}, "'a' is not another node type"),
        (
            {"a": one_type(_fallback=["spott"]), "spot": one_type()},
            "'spott' is not another node type; did you mean 'spot'",
        ),
        (
            {"a": one_type(_fallback=["b"]), "b": {**one_type(), "resources": {"CPU": 2}}},
            "'b' has less than 'a' of {'CPU': 4}",
        ),
    ],
)
def test_a_wrong_node_type_is_named(types: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        node_types(CloudsConfig.read(provider()), types)


def test_a_budget_needs_prices() -> None:
    clouds = {"aws": {"provider": {"type": "aws"}, "budget_usd_per_hour": 4}}
    config = CloudsConfig.read(provider(clouds=clouds))
    with pytest.raises(
        ConfigError, match=r"required, because provider.clouds.aws.budget_usd_per_hour is set"
    ):
        node_types(config, {"a": one_type()})
    assert node_types(config, {"a": one_type(_usd_per_hour=2)})["a"].usd_per_hour == 2


def test_prices_come_from_the_book_where_a_type_has_none() -> None:
    clouds = {
        "aws": {"provider": {"type": "aws", "region": "us-east-1"}, "budget_usd_per_hour": 400},
        "gcp": {"provider": {"type": "gcp", "region": "europe-west4"}},
        "azure": {"provider": {"type": "azure", "location": "westeurope"}},
    }
    arm = {"vmSize": "Standard_NC24ads_A100_v4"}
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    available = {
        "aws": one_type(InstanceType="p5.48xlarge"),
        "aws_spot": one_type(InstanceType="p5.48xlarge", **spot),
        "gcp": one_type(_cloud="gcp", machineType="a2-highgpu-8g"),
        "gcp_spot": one_type(_cloud="gcp", machineType="a2-highgpu-8g", scheduling=[{"preemptible": True}]),
        "azure": one_type(_cloud="azure", azure_arm_parameters=arm),
        "azure_spot": one_type(_cloud="azure", azure_arm_parameters={**arm, "priority": "Spot"}),
    }
    found = node_types(CloudsConfig.read(provider(clouds=clouds)), available)
    book = load_prices()
    for cloud, place, machine in (
        ("aws", "us-east-1", "p5.48xlarge"),
        ("gcp", "europe-west4", "a2-highgpu-8g"),
        ("azure", "westeurope", "Standard_NC24ads_A100_v4"),
    ):
        on_demand, cheaper = (book.per_hour(cloud, place, machine, m) for m in ("on_demand", "spot"))
        assert on_demand is not None
        assert cheaper is not None
        assert found[cloud].usd_per_hour == on_demand.usd
        assert found[f"{cloud}_spot"].usd_per_hour == cheaper.usd


def test_a_type_falls_back_to_the_other_market_of_its_cloud_by_itself() -> None:
    def labelled(market: str, **more: Any) -> dict[str, Any]:
        return {**one_type(**more), "labels": {"ray.io/region": "r", "ray.io/market-type": market}}

    available = {
        "spot": labelled("spot"),
        "on_demand": labelled("on-demand"),
        "never": labelled("spot", _fallback=[]),
        "bigger": {**labelled("on-demand"), "resources": {"CPU": 8}},
        "plain": one_type(),
    }
    found = node_types(CloudsConfig.read(provider()), available)
    fallback = {name: one.fallback for name, one in found.items()}
    assert fallback == {
        "spot": ("on_demand",),
        "on_demand": ("spot", "never"),
        "never": (),
        "bigger": (),
        "plain": (),
    }


def test_the_head_lies_at_home_if_it_does_not_say() -> None:
    config = CloudsConfig.read(provider())
    assert node_types(config, {"head": {"node_config": {}}}, head_type="head")["head"].cloud == "aws"


def test_a_clouds_own_provider_sees_none_of_our_keys() -> None:
    given = {"_cloud": "aws", "_usd_per_hour": 1, "_fallback": [], "InstanceType": "g5.xlarge", "_theirs": 1}
    assert own_config(given) == {"InstanceType": "g5.xlarge", "_theirs": 1}


@pytest.fixture
def gcp_file(tmp_path: Path) -> dict[str, Any]:
    content = {
        "cluster_name": "gcp",
        "max_workers": 3,
        "provider": {"type": "gcp", "region": "europe-west4", "project_id": "p"},
        "auth": {"ssh_user": "ubuntu"},
        "setup_commands": ["pip install xcloud"],
        "initialization_commands": ["true"],
        "available_node_types": {
            "gcp_head": {"node_config": {}, "resources": {"CPU": 2}},
            "gcp_l4": {"node_config": {"machineType": "g2-standard-8"}, "resources": {"CPU": 8, "GPU": 1}},
        },
        "head_node_type": "gcp_head",
    }
    (tmp_path / "gcp.yaml").write_text(yaml.safe_dump(content))
    return content


def test_a_clouds_file_is_taken_in(gcp_file: dict[str, Any], tmp_path: Path) -> None:
    """Its provider, auth and workers; not its head, and what it sets up stays with its own nodes."""
    clouds = {
        "aws": {"provider": {"type": "aws", "region": "us-east-1"}},
        "gcp": {"file": "gcp.yaml", "auth": {"ssh_user": "me"}, "max_workers": 1},
    }
    cluster = {"provider": provider(clouds=clouds), "available_node_types": {"head": one_type()}}
    out = expand_clouds(cluster, tmp_path)
    spec = out["provider"]["clouds"]["gcp"]
    assert spec == {"provider": gcp_file["provider"], "auth": {"ssh_user": "me"}, "max_workers": 1}
    assert set(out["available_node_types"]) == {"head", "gcp_l4"}
    assert out["available_node_types"]["gcp_l4"] == {
        "node_config": {"machineType": "g2-standard-8", "_cloud": "gcp"},
        "resources": {"CPU": 8, "GPU": 1},
        "min_workers": 0,
        "max_workers": 3,
        "worker_setup_commands": ["pip install xcloud"],
        "initialization_commands": ["true"],
    }
    assert expand_clouds(out, tmp_path) == out
    assert "file" in cluster["provider"]["clouds"]["gcp"]  # what was given is left as it was


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "provider.clouds.gcp.file: .*gcp.yaml: No such file"),
        ("a: [", "provider.clouds.gcp.file: .*gcp.yaml: "),
        ("provider: {type: gcp}", "gcp.yaml: available_node_types: required key is missing"),
        (
            "provider: {type: gcp}\navailable_node_types: {a: {node_config: {}}}",
            "gcp.yaml: available_node_types.a: another file has that node type, too",
        ),
    ],
)
def test_a_wrong_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "gcp.yaml").write_text(content)
    clouds = {"aws": {"provider": {"type": "aws"}}, "gcp": {"file": "gcp.yaml"}}
    cluster = {"provider": provider(clouds=clouds), "available_node_types": {"a": one_type()}}
    with pytest.raises(ConfigError, match=message):
        expand_clouds(cluster, tmp_path)


def test_the_projects_own_file_of_three_clouds_is_read() -> None:
    """Every type has a price, as its cloud's budget asks for, and every GPU type its other market to fall back to."""
    cluster = yaml.safe_load((Path(__file__).parents[2] / "clusters" / "multi_cloud.yaml").read_text())
    expanded = expand_clouds(cluster, Path())
    assert expanded == cluster
    config = CloudsConfig.read(cluster["provider"])
    found = node_types(config, cluster["available_node_types"], cluster["head_node_type"])
    assert {one.cloud for one in found.values()} == {"aws", "gcp", "azure"}
    for name, one in found.items():
        assert one.usd_per_hour, name
        if "GPU" in one.resources:
            assert len(one.fallback) == 1, name
            (other,) = one.fallback
            assert {name, other} == {name.removesuffix("_spot"), f"{name.removesuffix('_spot')}_spot"}

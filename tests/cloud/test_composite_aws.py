"""The AWS part of `clusters/multi_cloud.yaml` against an EC2- and IAM-compatible API: Ray's AWS provider, moto's HTTP server.

Google's and Azure's parts have no such server; while the test runs, their providers do not start, which AWS must survive.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.e2e.test_submit import free_ports
from xcloud.cloud.composite import CompositeNodeProvider
from xcloud.cloud.fallback import Bundle, parse_selector
from xcloud.prices import load_prices

FILE = Path(__file__).parents[2] / "clusters" / "multi_cloud.yaml"
REGION = "us-east-1"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's server in a process of its own, and this process pointed at it; $HOME is a scratch folder."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir(mode=0o700)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(home),
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    with (
        pytest.MonkeyPatch.context() as patch,
        (home / "log").open("wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        for name, value in settings.items():
            patch.setenv(name, value)
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None, (home / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        yield url
        server.terminate()


@dataclass
class Aws:
    """The cluster file as `ray up` has it after bootstrap, and a client of the same API."""

    cluster: dict[str, Any]
    ec2: Any

    def instances(self) -> dict[str, Any]:
        """Those that are not terminated, by id."""
        found = {
            i["InstanceId"]: i for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]
        }
        return {
            name: i for name, i in found.items() if i["State"]["Name"] not in ("terminated", "shutting-down")
        }


@pytest.fixture(scope="module")
def bootstrapped(endpoint: str) -> dict[str, Any]:
    """The file with what only a user of the account knows filled in (an image, a security group), after bootstrap."""
    ec2 = boto3.client("ec2", REGION)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="xcloud", Description="d", VpcId=vpc)
    cluster = yaml.safe_load(FILE.read_text())
    types = cluster["available_node_types"]
    cluster["available_node_types"] = {
        name: settings for name, settings in types.items() if settings["node_config"]["_cloud"] == "aws"
    }
    for settings in cluster["available_node_types"].values():
        settings["node_config"] |= {"ImageId": image, "SecurityGroupIds": [group["GroupId"]]}
    cluster["provider"]["clouds"] = {"aws": cluster["provider"]["clouds"]["aws"]}
    cluster["provider"]["clouds"]["aws"]["provider"]["cache_stopped_nodes"] = False  # terminate, and not stop
    filled = CompositeNodeProvider.fillout_available_node_types_resources(prepare_config(cluster))
    validate_config(filled)
    with pytest.MonkeyPatch.context() as patch:  # Ray waits half a minute for IAM to know what was made
        patch.setattr(aws_config, "time", SimpleNamespace(sleep=lambda _: None))
        return CompositeNodeProvider.bootstrap_config(filled)


@pytest.fixture
def aws(bootstrapped: dict[str, Any]) -> Iterator[Aws]:
    """An account without instances."""
    account = Aws(copy.deepcopy(bootstrapped), boto3.client("ec2", REGION))
    yield account
    if account.instances():
        account.ec2.terminate_instances(InstanceIds=list(account.instances()))


def provider_of(cluster: dict[str, Any], **clouds: Any) -> CompositeNodeProvider:
    settings = copy.deepcopy(cluster["provider"])
    settings["clouds"] |= clouds
    provider = CompositeNodeProvider(settings, cluster["cluster_name"])
    provider._until_listed = lambda: None
    provider.non_terminated_nodes({})
    return provider


def tags(kind: str, name: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_NAME: f"ray-xcloud-multi-{kind}",
        TAG_RAY_NODE_KIND: kind,
        TAG_RAY_USER_NODE_TYPE: name,
        TAG_RAY_NODE_STATUS: "uninitialized",
        TAG_RAY_LAUNCH_CONFIG: "hash",
        TAG_RAY_LAUNCH_REQUEST: "request",
    }


def launch(provider: CompositeNodeProvider, aws: Aws, name: str, count: int) -> Any:
    settings = aws.cluster["available_node_types"][name]
    return provider.create_node_with_resources_and_labels(
        settings["node_config"],
        tags(NODE_KIND_WORKER, name),
        count,
        settings["resources"],
        settings["labels"],
    )


def test_bootstrap_fills_in_what_ec2_knows(aws: Aws) -> None:
    """Subnets, the key pair and the head's instance profile come from the API; the profile is the head's alone."""
    for name, settings in aws.cluster["available_node_types"].items():
        assert settings["node_config"]["SubnetIds"], name
        assert settings["node_config"]["KeyName"].startswith("ray-autoscaler"), name
        assert "IamInstanceProfile" not in settings["node_config"]
    assert aws.cluster["head_node"]["IamInstanceProfile"]["Arn"]
    key = Path(aws.cluster["auth"]["ssh_private_key"])
    assert key.stat().st_mode & 0o077 == 0
    assert aws.cluster["provider"]["clouds"]["aws"]["auth"]["ssh_private_key"] == str(key)


def test_launch_tag_list_terminate(aws: Aws) -> None:
    """Head and spot workers, with the file's tags and markets, while two other clouds do not answer."""
    clouds = yaml.safe_load(FILE.read_text())["provider"]["clouds"]
    provider = provider_of(aws.cluster, gcp=clouds["gcp"], azure=clouds["azure"])
    assert provider.clouds["gcp"].api.failures
    head = {**aws.cluster["head_node"], **aws.cluster["available_node_types"]["head"]["node_config"]}
    provider.create_node(head, tags(NODE_KIND_HEAD, "head"), 1)
    for _ in range(2):  # moto launches MinCount instances, which is 1 in Ray's requests
        launch(provider, aws, "aws_a10g_spot", 1)
    launch(provider, aws, "aws_cpu", 1)

    nodes = provider.non_terminated_nodes({})
    kinds = sorted(provider.node_tags(node)[TAG_RAY_USER_NODE_TYPE] for node in nodes)
    assert kinds == ["aws_a10g_spot", "aws_a10g_spot", "aws_cpu", "head"]
    instances = aws.instances()
    assert sorted(nodes) == sorted(f"aws/{name}" for name in instances)
    (heads,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
    assert "IamInstanceProfile" in instances[heads.removeprefix("aws/")]
    for node in provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "aws_a10g_spot"}):
        instance = instances[node.removeprefix("aws/")]
        assert instance["InstanceLifecycle"] == "spot"
        assert instance["InstanceType"] == "g5.12xlarge"
        assert {tag["Key"]: tag["Value"] for tag in instance["Tags"]}[TAG_RAY_CLUSTER_NAME] == "xcloud-multi"
        assert provider.node_tags(node)[TAG_RAY_LAUNCH_REQUEST] == "request"
        assert provider.is_running(node)
        assert provider.internal_ip(node) == instance["PrivateIpAddress"]

    (cpu,) = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "aws_cpu"})
    assert "InstanceLifecycle" not in instances[cpu.removeprefix("aws/")]
    provider.set_node_tags(cpu, {TAG_RAY_NODE_STATUS: "up-to-date"})
    assert provider_of(aws.cluster).node_tags(cpu)[TAG_RAY_NODE_STATUS] == "up-to-date"
    runner = provider.get_command_runner("", cpu, aws.cluster["auth"], "xcloud-multi", subprocess, True, None)
    assert runner.ssh_user == "ubuntu"

    provider.terminate_nodes(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}))
    assert list(aws.instances()) == [heads.removeprefix("aws/")]
    assert provider.nodes_for_teardown({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}) == []
    provider.terminate_nodes(provider.nodes_for_teardown({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}))
    assert aws.instances() == {}


def test_what_ec2_refuses_falls_back_to_the_other_market(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subnet that is not there makes the API itself refuse the spot request; an on-demand node comes instead."""
    provider = provider_of(aws.cluster)
    assert provider.types["aws_a10g_spot"].fallback == ("aws_a10g",)
    wanted = parse_selector({"cloud": "aws", "ray.io/accelerator-type": "A10G"})
    monkeypatch.setattr(provider._launcher, "_waiting", lambda: [Bundle({"GPU": 1}, (wanted,), 4)])
    monkeypatch.setitem(
        aws.cluster["available_node_types"]["aws_a10g_spot"]["node_config"],
        "SubnetIds",
        ["subnet-00000000"],
    )
    with pytest.raises(
        NodeLaunchException, match=r"aws_a10g_spot: .*InvalidSubnet.*; launched 1 x aws_a10g inst"
    ):
        launch(provider, aws, "aws_a10g_spot", 1)
    (node,) = provider.non_terminated_nodes({})
    assert provider.node_tags(node)[TAG_RAY_USER_NODE_TYPE] == "aws_a10g"
    assert not any("InstanceLifecycle" in instance for instance in aws.instances().values())


def test_the_clouds_budget_counts_what_runs(aws: Aws) -> None:
    """So many of the machine as the cloud's dollars an hour pay for, at the price book's price, and no more."""
    settings = copy.deepcopy(aws.cluster)
    price = load_prices().per_hour("aws", REGION, "c7i.4xlarge", "on_demand")
    assert price is not None
    settings["provider"]["clouds"]["aws"]["budget_usd_per_hour"] = 2.5 * price.usd
    provider = provider_of(settings)
    launch(provider, aws, "aws_cpu", 1)
    launch(provider, aws, "aws_cpu", 1)
    with pytest.raises(NodeLaunchException, match=r"aws_cpu: budget_usd_per_hour .* of the cloud"):
        launch(provider, aws, "aws_cpu", 1)
    assert len(aws.instances()) == 2

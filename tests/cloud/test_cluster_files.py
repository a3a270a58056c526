"""Shipped cluster files are right, and each thing that can be wrong in one gives an error with file and key."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from xcloud.cloud.cluster_file import ClusterFile, dump_cluster, parse_cluster, read_cluster
from xcloud.cloud.cluster_jobs import job_problems, selects
from xcloud.cloud.cluster_rules import fill_ins, rule_problems
from xcloud.cloud.cluster_schema import composite_problems, kuberay_problems, launcher_problems, read_crds
from xcloud.cloud.settings import PlacementConfig
from xcloud.config import load_job
from xcloud.errors import ConfigError
from xcloud.prices import load_prices

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "clusters").glob("*.yaml"))
BOOK = load_prices()
CRDS = os.environ.get("XCLOUD_KUBERAY_CRDS")


def problems_of(cluster: ClusterFile) -> list[str]:
    """As `xcloud clusters validate` finds them: the rules take the schema for granted."""
    found = [*launcher_problems(cluster), *composite_problems(cluster)] if cluster.form == "launcher" else []
    return [str(problem) for problem in found or rule_problems(cluster, BOOK)]


def changed(name: str, change: Callable[[Any], Any]) -> ClusterFile:
    """A shipped file with something changed in its first document."""
    documents = list(yaml.safe_load_all((ROOT / "clusters" / name).read_text(encoding="utf-8")))
    change(documents[0])
    return parse_cluster(yaml.safe_dump_all(documents), Path(name))


def test_every_kind_of_cluster_has_a_file() -> None:
    names = {"aws", "gcp", "azure", "kuberay", "on_prem", "local", "multi_cloud"}
    assert {file.stem for file in FILES} == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_is_right_and_survives_a_round_trip(file: Path) -> None:
    cluster = read_cluster(file)
    assert problems_of(cluster) == []
    again = parse_cluster(dump_cluster(cluster), file)
    assert again == cluster
    assert again.node_types == cluster.node_types
    assert sum(node.head for node in cluster.node_types) == 1


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "kuberay", "multi_cloud"])
def test_accelerators_of_several_kinds_come_as_spot_and_on_demand(name: str) -> None:
    workers = [node for node in read_cluster(ROOT / "clusters" / f"{name}.yaml").node_types if node.gpus]
    assert len({node.labels["ray.io/accelerator-type"] for node in workers}) >= 2
    spot = {node.instance for node in workers if node.market == "spot"}
    assert spot
    assert spot <= {node.instance for node in workers if node.market == "on-demand"}


def test_the_job_for_three_clouds_fits_its_cluster_and_no_other() -> None:
    job = load_job(ROOT / "jobs" / "multi_cloud.yaml")
    pools = [(f"regions.{r.name}.pools[{n}]", pool) for r in job.regions for n, pool in enumerate(r.pools)]
    home = read_cluster(ROOT / "clusters" / "multi_cloud.yaml")
    assert list(job_problems(home, "job", pools)) == []
    for region in job.regions:  # and every pool names an instance that its cloud has
        for pool in region.pools:
            assert pool.instance is not None
            assert BOOK.instance(region.cloud, pool.instance).accelerator == pool.accelerator
    other = read_cluster(ROOT / "clusters" / "kuberay.yaml")
    assert len(list(job_problems(other, "job", pools))) == len(pools)


def node(name: str, **changes: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for path, value in changes.items():
            held = raw["available_node_types"][name]
            *parents, last = path.split("__")
            for parent in parents:
                held = held[parent]
            if value is None:
                del held[last.replace("_of_", ".")]
            else:
                held[last] = value

    return change


def put(path: str, value: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for parent in parents:
            raw = raw[parent]
        if value is None:
            del raw[last]
        else:
            raw[last] = value

    return change


def label(of: str, name: str, value: str | None) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        labels = raw["available_node_types"][of]["labels"]
        labels.pop(name)
        if value is not None:
            labels[name] = value

    return change


def in_command(key: str, old: str, new: str) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        assert old in raw[key][-1]
        raw[key][-1] = raw[key][-1].replace(old, new)

    return change


WRONG = {
    "unknown key": ("aws.yaml", put("max_worker", 3), "aws.yaml: Additional properties", "'max_worker'"),
    "type": ("aws.yaml", node("h100", max_workers="many"), "available_node_types.h100.max_workers", "'many'"),
    "head type": ("gcp.yaml", put("head_node_type", "boss"), "gcp.yaml: Ray refuses it", "head_node_type"),
    "unknown instance": (
        "aws.yaml",
        node("a100", node_config__InstanceType="p4d.24xlarg"),
        "aws.yaml: available_node_types.a100.node_config.InstanceType: ",
        "did you mean 'p4d.24xlarge'",
    ),
    "unknown instance of gcp": (
        "gcp.yaml",
        node("l4", node_config__machineType="g2-standrd-48"),
        "gcp.yaml: available_node_types.l4.node_config.machineType: ",
        "did you mean 'g2-standard-48'",
    ),
    "unknown instance of azure": (
        "azure.yaml",
        node("t4", node_config__azure_arm_parameters__vmSize="Standard_NC64as_T4_v4"),
        "azure.yaml: available_node_types.t4.node_config.azure_arm_parameters.vmSize: ",
        "did you mean 'Standard_NC64as_T4_v3'",
    ),
    "no instance": (
        "aws.yaml",
        node("a100", node_config__InstanceType=None),
        "available_node_types.a100.node_config.InstanceType: is missing",
        "expected an instance type of 'aws'",
    ),
    "wrong accelerator": (
        "multi_cloud.yaml",
        label("gcp_a100", "ray.io/accelerator-type", "H100"),
        "multi_cloud.yaml: available_node_types.gcp_a100.labels.ray.io/accelerator-type: 'H100'",
        "a2-highgpu-8g has 8 x A100",
    ),
    "accelerator without one": (
        "aws.yaml",
        lambda raw: raw["available_node_types"]["cpu"]["labels"].update({"ray.io/accelerator-type": "T4"}),
        "available_node_types.cpu.labels.ray.io/accelerator-type",
        "c7i.4xlarge has no accelerator",
    ),
    "no accelerator resource": (
        "aws.yaml",
        put("available_node_types/h100/resources", {"CPU": 192, "GPU": 8}),
        "available_node_types.h100.resources.accelerator_type:H100: is missing",
        "expected 1",
    ),
    "too many GPUs": (
        "azure.yaml",
        node("a100", resources__GPU=2),
        "azure.yaml: available_node_types.a100.resources.GPU: 2 is more than the 1",
        "Standard_NC24ads_A100_v4",
    ),
    "too many CPUs": (
        "gcp.yaml",
        node("cpu", resources__CPU=64),
        "available_node_types.cpu.resources.CPU: 64 is more than the 16",
        "n2-standard-16",
    ),
    "missing label": (
        "gcp.yaml",
        label("l4", "ray.io/region", None),
        "gcp.yaml: available_node_types.l4.labels.ray.io/region: is missing",
        "jobs select",
    ),
    "wrong region": (
        "aws.yaml",
        label("h100", "ray.io/region", "eu-west-1"),
        "available_node_types.h100.labels.ray.io/region: 'eu-west-1'",
        "stand in 'us-east-1'",
    ),
    "wrong cloud": (
        "multi_cloud.yaml",
        label("azure_t4", "cloud", "aws"),
        "available_node_types.azure_t4.labels.cloud: 'aws'",
        "stand in 'azure'",
    ),
    "wrong market": (
        "azure.yaml",
        label("t4_spot", "ray.io/market-type", "on-demand"),
        "available_node_types.t4_spot.labels.ray.io/market-type: 'on-demand'",
        "bought spot",
    ),
    "more than the file's cap": (
        "aws.yaml",
        node("a10g", max_workers=40),
        "available_node_types.a10g.max_workers: 40 is more than the file's max_workers of 16",
        "",
    ),
    "more than the cloud's cap": (
        "multi_cloud.yaml",
        node("gcp_cpu", max_workers=9),
        "available_node_types.gcp_cpu.max_workers: 9 is more than provider.clouds.gcp.max_workers of 8",
        "",
    ),
    "unknown cloud": (
        "multi_cloud.yaml",
        node("gcp_cpu", node_config___cloud="gpc"),
        "multi_cloud.yaml: available_node_types.gcp_cpu.node_config._cloud: expected one of",
        "got 'gpc'",
    ),
    "no price under a budget": (
        "multi_cloud.yaml",
        node("azure_t4", node_config__azure_arm_parameters__vmSize="Standard_Unheard"),
        "multi_cloud.yaml: available_node_types.azure_t4.node_config._usd_per_hour: ",
        "budget_usd_per_hour is set",
    ),
    "quota": (
        "aws.yaml",
        put("provider/xcloud/quota/spot/H100", 16),
        "aws.yaml: provider.xcloud.quota.spot.H100: 16, but the node types may take 32 x H100",
        "h100_spot 32",
    ),
    "quota of one of the clouds": (
        "multi_cloud.yaml",
        put("provider/clouds/azure/provider/xcloud/quota/on-demand/T4", 8),
        "multi_cloud.yaml: provider.clouds.azure.provider.xcloud.quota.on-demand.T4: 8",
        "azure_t4 16",
    ),
    "open to the world": (
        "aws.yaml",
        put(
            "provider/security_group",
            {"GroupName": "x", "IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
        ),
        "aws.yaml: provider.security_group.IpPermissions[0].IpRanges[0].CidrIp: '0.0.0.0/0' opens it",
        "",
    ),
    "a security group of Ray's": (
        "aws.yaml",
        node("h100", node_config__SecurityGroupIds=None),
        "available_node_types.h100.node_config.SecurityGroupIds: is missing",
        "opens SSH to the whole internet",
    ),
    "the default network": (
        "gcp.yaml",
        node("l4", node_config__networkInterfaces=None),
        "available_node_types.l4.node_config.networkInterfaces: is missing",
        "open SSH to the whole internet",
    ),
    "public addresses on azure": (
        "multi_cloud.yaml",
        put("provider/clouds/azure/provider/use_internal_ips", False),
        "provider.clouds.azure.provider.use_internal_ips",
        "opens SSH to any source",
    ),
    "an open dashboard": (
        "gcp.yaml",
        in_command("head_start_ray_commands", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        "gcp.yaml: head_start_ray_commands[1]: --dashboard-host=0.0.0.0",
        "expected 127.0.0.1",
    ),
    "no TLS": (
        "on_prem.yaml",
        in_command("worker_start_ray_commands", "RAY_USE_TLS=1", ""),
        "on_prem.yaml: worker_start_ray_commands[1]: RAY_USE_TLS is not set",
        "expected RAY_USE_TLS=1",
    ),
    "TLS off": (
        "aws.yaml",
        in_command("head_start_ray_commands", "RAY_USE_TLS=1", "RAY_USE_TLS=0"),
        "aws.yaml: head_start_ray_commands[1]: RAY_USE_TLS is 0",
        "expected 1",
    ),
    "no token": (
        "azure.yaml",
        in_command("head_start_ray_commands", "RAY_AUTH_MODE=token", ""),
        "azure.yaml: head_start_ray_commands[1]: RAY_AUTH_MODE is not set",
        "",
    ),
    "Ray's own start commands": (
        "aws.yaml",
        put("worker_start_ray_commands", None),
        "aws.yaml: worker_start_ray_commands: is missing",
        "neither TLS nor a token",
    ),
    "Ray's own start commands in a container": (
        "aws.yaml",
        lambda raw: (
            raw.pop("head_start_ray_commands"),
            raw.pop("worker_start_ray_commands"),
            raw.update(docker={"image": "here/xcloud:1", "container_name": "ray"}),
        ),
        "aws.yaml: head_start_ray_commands: is missing",
        "neither TLS nor a token",
    ),
    "Ray's own machines": (
        "aws.yaml",
        lambda raw: (raw.pop("available_node_types"), raw.pop("head_node_type")),
        "aws.yaml: available_node_types: is missing",
        "open SSH",
    ),
    "a start in the set-up": (
        "gcp.yaml",
        lambda raw: raw["setup_commands"].append("ray start --address=$RAY_HEAD_IP:6379"),
        "gcp.yaml: setup_commands[6]: RAY_USE_TLS is not set",
        "",
    ),
    "a start in a node type's set-up": (
        "gcp.yaml",
        node("l4", worker_setup_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
        "gcp.yaml: available_node_types.l4.worker_setup_commands[0]: RAY_AUTH_MODE is not set",
        "",
    ),
    "a start in a machine's own script": (
        "aws.yaml",
        node("l40s", node_config__UserData="#!/bin/sh\nray start --address=10.0.0.1:6379\n"),
        "aws.yaml: available_node_types.l40s.node_config.UserData: RAY_USE_TLS is not set",
        "",
    ),
    "TLS in a comment": (
        "aws.yaml",
        put(
            "worker_start_ray_commands/1",
            "ray start --address=$RAY_HEAD_IP:6379 # RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=a RAY_TLS_SERVER_KEY=b "
            "RAY_TLS_CA_CERT=c RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=d",
        ),
        "aws.yaml: worker_start_ray_commands[1]: RAY_USE_TLS is not set",
        "before `ray start`",
    ),
    "TLS after the start": (
        "aws.yaml",
        lambda raw: raw["head_start_ray_commands"].__setitem__(
            1, "ray start --head; " + raw["head_start_ray_commands"][1].partition("ulimit")[0]
        ),
        "aws.yaml: head_start_ray_commands[1]: RAY_TLS_CA_CERT is not set",
        "",
    ),
    "a quote without its end": (
        "azure.yaml",
        in_command("head_start_ray_commands", "--head", "--head '"),
        "azure.yaml: head_start_ray_commands[1]: cannot be read",
        "has no end",
    ),
    "this machine, for the network": (
        "local.yaml",
        in_command("head_start_ray_commands", "--node-ip-address=127.0.0.2", "--node-ip-address=0.0.0.0"),
        "local.yaml: head_start_ray_commands[3]: --node-ip-address is 0.0.0.0",
        "such as 127.0.0.2",
    ),
    "this machine, by a name that Ray replaces": (
        "local.yaml",
        in_command("head_start_ray_commands", "--node-ip-address=127.0.0.2", "--node-ip-address 127.0.0.1"),
        "local.yaml: head_start_ray_commands[3]: --node-ip-address is 127.0.0.1",
        "",
    ),
    "this machine, wherever Ray likes": (
        "local.yaml",
        in_command("head_start_ray_commands", "--node-ip-address=127.0.0.2", ""),
        "local.yaml: head_start_ray_commands[3]: --node-ip-address is missing",
        "",
    ),
    "this machine, for everybody": (
        "local.yaml",
        in_command("head_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "local.yaml: head_start_ray_commands[3]: RAY_AUTH_MODE is disabled",
        "expected token",
    ),
    "a public service": (
        "kuberay.yaml",
        put("spec/headGroupSpec/serviceType", "LoadBalancer"),
        "kuberay.yaml: [0].spec.headGroupSpec.serviceType: 'LoadBalancer'",
        "expected ClusterIP",
    ),
    "a public service by its own spec": (
        "kuberay.yaml",
        put("spec/headGroupSpec/headService", {"spec": {"type": "NodePort"}}),
        "kuberay.yaml: [0].spec.headGroupSpec.headService.spec.type: 'NodePort'",
        "expected ClusterIP",
    ),
    "a service with an address outside": (
        "kuberay.yaml",
        put("spec/headGroupSpec/headService", {"spec": {"externalIPs": ["192.0.2.1"]}}),
        "kuberay.yaml: [0].spec.headGroupSpec.headService.spec.externalIPs: lets others",
        "",
    ),
    "a port of the machine": (
        "kuberay.yaml",
        put(
            "spec/headGroupSpec/template/spec/containers/0/ports", [{"containerPort": 8265, "hostPort": 8265}]
        ),
        "kuberay.yaml: [0].spec.headGroupSpec.template.spec.containers[0].ports[0].hostPort: puts ports",
        "",
    ),
    "a kind that is not Ray's": (
        "kuberay.yaml",
        lambda raw: raw.update({"apiVersion": "example.org/v1"}),
        "kuberay.yaml: [0].kind: example.org/v1 RayCluster: nothing here knows",
        "expected ray.io RayCluster or RayJob",
    ),
    "no TLS on Kubernetes": (
        "kuberay.yaml",
        put("spec/tlsOptions", None),
        "kuberay.yaml: [0].spec.tlsOptions.enabled: is missing",
        "",
    ),
    "no token on Kubernetes": (
        "kuberay.yaml",
        put("spec/authOptions/mode", "disabled"),
        "kuberay.yaml: [0].spec.authOptions.mode",
        "expected token",
    ),
    "no network policy": (
        "kuberay.yaml",
        put("spec/networkPolicy", None),
        "kuberay.yaml: [0].spec.networkPolicy.mode: is missing",
        "",
    ),
    "wrong accelerator on Kubernetes": (
        "kuberay.yaml",
        lambda raw: raw["spec"]["workerGroupSpecs"][3]["labels"].update({"ray.io/accelerator-type": "T4"}),
        "kuberay.yaml: [0].spec.workerGroupSpecs[3].labels.ray.io/accelerator-type: 'T4'",
        "g2-standard-48 has 4 x L4",
    ),
    "no workers": (
        "on_prem.yaml",
        put("provider/worker_ips", None),
        "on_prem.yaml: provider: ",
        "worker_ips",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told_with_file_and_key(what: str) -> None:
    name, change, start, hint = WRONG[what]
    found = problems_of(changed(name, change))
    told = [problem for problem in found if start in problem]
    assert told, found
    assert all(problem.startswith(name) for problem in found)
    assert any(hint in problem for problem in told)


@pytest.mark.parametrize(
    ("version", "kind"), [("v1", "Service"), ("ray.io/v1", "RayService"), ("networking.k8s.io/v1", "Ingress")]
)
def test_documents_that_would_open_a_door_are_not_applied(version: str, kind: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "clusters" / "kuberay.yaml").read_text(encoding="utf-8")))
    documents.append({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}, "spec": {}})
    (problem,) = problems_of(parse_cluster(yaml.safe_dump_all(documents), Path("k.yaml")))
    assert problem.startswith(f"k.yaml: [2].kind: {version} {kind}: ")


def test_a_quota_on_kubernetes_is_an_annotation() -> None:
    def lower(raw: Any) -> None:
        raw["metadata"]["annotations"]["xcloud/quota"] = "{spot: {L4: 8}}"

    (problem,) = problems_of(changed("kuberay.yaml", lower))
    assert problem.startswith("kuberay.yaml: [0].metadata.annotations.xcloud/quota.spot.L4: 8, but")
    assert "l4-spot 32" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2\n", "given twice"),
        ("rounds: 3\n", "expected a file for Ray's cluster launcher"),
        ("- 1\n", "[0]: expected a mapping, got list"),
        ("provider: {type: aws}\navailable_node_types: {a: {labels: 3}}\n", "not in the format of launcher"),
    ],
)
def test_what_is_no_cluster_file_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml: ") as caught:
        parse_cluster(text, Path("x.yaml"))
    assert problem in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such cluster file"):
        read_cluster(Path("none.yaml"))


def test_a_cloud_may_be_taken_from_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load((ROOT / "clusters" / "multi_cloud.yaml").read_text(encoding="utf-8"))
    raw["provider"]["clouds"]["azure"] = {"file": "clusters/azure.yaml", "max_workers": 8}
    for name in [name for name in raw["available_node_types"] if name.startswith("azure_")]:
        del raw["available_node_types"][name]
    cluster = parse_cluster(yaml.safe_dump(raw), tmp_path / "multi.yaml")
    assert problems_of(cluster) == []
    taken = {node.name: node for node in cluster.node_types}["a100x8_spot"]
    assert (taken.cloud, taken.place, taken.market) == ("azure", "westeurope", "spot")
    assert parse_cluster(dump_cluster(cluster), cluster.path) == cluster
    assert "file" in dump_cluster(cluster)
    raw["provider"]["clouds"]["azure"]["file"] = "none.yaml"
    with pytest.raises(ConfigError, match=r"multi\.yaml: provider\.clouds\.azure\.file: none\.yaml"):
        parse_cluster(yaml.safe_dump(raw), tmp_path / "multi.yaml")


def test_a_file_that_is_taken_in_is_held_to_the_same_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load((ROOT / "clusters" / "multi_cloud.yaml").read_text(encoding="utf-8"))
    raw["provider"]["clouds"]["gcp"] = {"file": "gcp.yaml", "max_workers": 8}
    for name in [name for name in raw["available_node_types"] if name.startswith("gcp_")]:
        del raw["available_node_types"][name]
    taken = yaml.safe_load((ROOT / "clusters" / "gcp.yaml").read_text(encoding="utf-8"))
    taken["setup_commands"].append("ray start --address=$RAY_HEAD_IP:6379 --dashboard-host=0.0.0.0")
    taken["provider"]["firewall"] = {"sourceRanges": ["0.0.0.0/0"]}
    taken["available_node_types"]["l4"]["node_config"]["open"] = "::/0"
    (tmp_path / "gcp.yaml").write_text(yaml.safe_dump(taken))
    cluster = parse_cluster(yaml.safe_dump(raw), Path("multi.yaml"))
    found = problems_of(cluster)
    for told in (
        "gcp.yaml: provider.firewall.sourceRanges[0]: '0.0.0.0/0' opens it",
        "gcp.yaml: available_node_types.l4.node_config.open: '::/0' opens it",
        "gcp.yaml: setup_commands[6]: --dashboard-host=0.0.0.0",
        "gcp.yaml: setup_commands[6]: RAY_USE_TLS is not set",
    ):
        assert sum(problem.startswith(told) for problem in found) == 1, found
    assert ("gcp.yaml", "provider.project_id") in [(one.file, one.key) for one in fill_ins(cluster)]
    raw["provider"]["clouds"]["gcp"]["provider"] = {"type": "gcp", "project_id": "mine", "zone": "0.0.0.0/0"}
    cluster = parse_cluster(yaml.safe_dump(raw), Path("multi.yaml"))
    assert "provider.project_id" not in [one.key for one in fill_ins(cluster)]
    assert any(
        told.startswith("multi.yaml: provider.clouds.gcp.provider.zone: ") for told in problems_of(cluster)
    )


def test_what_is_to_be_filled_in_is_told_once_for_each_value() -> None:
    (one,) = fill_ins(read_cluster(ROOT / "clusters" / "aws.yaml"))
    assert one.key == "available_node_types.head.node_config.SecurityGroupIds[0]"
    assert "'sg-FILL-IN' (and 9 more keys)" in one.text


CRD = {
    "spec": {
        "group": "ray.io",
        "names": {"kind": "RayCluster"},
        "versions": [
            {
                "name": "v1",
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": {"type": "string"},
                            "kind": {"type": "string"},
                            "metadata": {"type": "object"},
                            "spec": {
                                "type": "object",
                                "required": ["rayVersion"],
                                "properties": {
                                    "rayVersion": {"type": "string", "format": "version"},
                                    "size": {"x-kubernetes-int-or-string": True, "anyOf": []},
                                    "any": {
                                        "type": "object",
                                        "properties": {},
                                        "x-kubernetes-preserve-unknown-fields": True,
                                    },
                                },
                            },
                        },
                    }
                },
            }
        ],
    }
}


def test_documents_for_kuberay_are_checked_against_given_crds(tmp_path: Path) -> None:
    (tmp_path / "raycluster-crd.yaml").write_text(yaml.safe_dump(CRD))
    crds = read_crds(tmp_path)

    def told(spec: Any, kind: str = "RayCluster") -> list[str]:
        text = yaml.safe_dump(
            {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "x"}, "spec": spec}
        )
        return [str(problem) for problem in kuberay_problems(parse_cluster(text, Path("k.yaml")), crds)]

    assert told({"rayVersion": "2", "size": 3, "any": {"thing": 1}}) == []
    assert told({"rayVersion": "2", "size": "3Gi"}) == []
    assert "'rayVersion' is a required property" in told({})[0]
    assert told({"rayVersion": "2", "sise": 1})[0].startswith("k.yaml: spec: Additional properties")
    assert told({"rayVersion": 2})[0].startswith("k.yaml: spec.rayVersion: 2 is not of type 'string'")
    assert "ray.io/v1 RayServe is not known" in told({}, "RayServe")[0]
    with pytest.raises(ConfigError, match="no CustomResourceDefinitions there"):
        read_crds(tmp_path / "none")


@pytest.mark.skipif(CRDS is None, reason="XCLOUD_KUBERAY_CRDS names no folder with KubeRay's CRDs")
def test_the_shipped_documents_match_kuberays_own_crds() -> None:
    assert CRDS is not None
    crds = read_crds(Path(CRDS))
    assert list(kuberay_problems(read_cluster(ROOT / "clusters" / "kuberay.yaml"), crds)) == []
    wrong = changed("kuberay.yaml", put("spec/workerGroupSpecs/0/maxReplica", 3))
    (problem,) = map(str, kuberay_problems(wrong, crds))
    assert problem.startswith("kuberay.yaml: [0].spec.workerGroupSpecs[0]: Additional properties")


@pytest.mark.parametrize(
    ("selector", "value", "wanted"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", "a", False),
    ],
)
def test_labels_are_selected_as_ray_does(selector: str, value: str | None, wanted: bool) -> None:
    assert selects(selector, value) is wanted


def told(cluster: str, *pools: dict[str, Any]) -> list[str]:
    asked = [(f"regions.r.pools[{n}]", PlacementConfig(**pool)) for n, pool in enumerate(pools)]
    return [str(p) for p in job_problems(read_cluster(ROOT / "clusters" / cluster), "job.yaml", asked)]


H100 = {"accelerator": "H100", "labels": {"ray.io/region": "us-east-1"}}


def test_a_pool_that_no_node_type_offers() -> None:
    (problem,) = told("gcp.yaml", {**H100, "accelerator": "A100", "workers": 8})
    assert problem.startswith(
        "job.yaml: regions.r.pools[0]: needs 8 x A100 with labels {ray.io/region: us-east-1}; no node type of "
    )
    assert problem.endswith(
        "gcp.yaml offers it (nearest: a100_spot, but label ray.io/region is europe-west4)"
    )
    assert "accelerator is" in told("aws.yaml", {"accelerator": "B200"})[0]
    assert "it has no GPU" in told("local.yaml", {"accelerator": "gpu"})[0]
    assert "instance is" in told("aws.yaml", {**H100, "instance": "p5en.48xlarge"})[0]


def test_a_pool_that_is_too_large() -> None:
    assert told("aws.yaml", {**H100, "workers": 48}) == []  # 4 spot and 2 on-demand machines of 8
    (problem,) = told("aws.yaml", {**H100, "workers": 49})
    assert "has room for 48 (h100_spot x 4, h100 x 2, PACK)" in problem
    pinned = {**H100, "labels": {"ray.io/market-type": "on-demand"}}
    assert told("aws.yaml", {**pinned, "workers": 16}) == []
    assert "room for 16" in told("aws.yaml", {**pinned, "workers": 17})[0]
    assert "room for 8 " in told("aws.yaml", {**H100, "workers": 9, "strategy": "STRICT_PACK"})[0]
    assert "room for 6 " in told("aws.yaml", {**H100, "workers": 7, "strategy": "STRICT_SPREAD"})[0]
    assert "room for 6 " in told("aws.yaml", {**H100, "workers": 7, "cpus": 100})[0]


def test_pools_that_fit_one_by_one_but_not_together() -> None:
    assert told("aws.yaml", {**H100, "workers": 24}, {**H100, "workers": 24}) == []
    (problem,) = told("aws.yaml", {**H100, "workers": 32}, {**H100, "workers": 24})
    assert problem.startswith(
        "job.yaml: regions.r.pools[0], regions.r.pools[1]: need 56 GPUs at the same time"
    )
    assert told("local.yaml", {"workers": 2}, {"workers": 2}) == []
    assert "need 5 CPUs at the same time" in told("local.yaml", {"workers": 2}, {"workers": 3})[0]

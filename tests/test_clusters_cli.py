"""`xcloud clusters` and `xcloud keys cluster` as a user runs them: real files, real commands, exit codes."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from xcloud.cli import app

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ROOT / "clusters"


def xcloud(*words: str | Path, code: int = 0, **environment: str) -> Result:
    done = CliRunner().invoke(app, list(map(str, words)), env=environment)
    assert done.exit_code == code, done.output
    return done


def outside(*words: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "xcloud", *map(str, words)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("XCLOUD_KUBERAY_CRDS", raising=False)
    monkeypatch.delenv("XCLOUD_TRACEBACK", raising=False)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """A home without credentials."""
    (tmp_path / "home").mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none.json"),
        "KUBECONFIG": str(tmp_path / "none"),
    }


def broken(tmp_path: Path) -> Path:
    raw = yaml.safe_load((CLUSTERS / "aws.yaml").read_text(encoding="utf-8"))
    raw["available_node_types"]["h100"]["node_config"]["InstanceType"] = "p5.48xlagre"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_shipped_files_are_valid_and_warn_of_what_only_up_needs(bare: dict[str, str]) -> None:
    done = outside("clusters", "validate", **bare)
    for file in sorted(CLUSTERS.glob("*.yaml")):
        assert f"OK clusters/{file.name}" in done.stdout
    assert "h100_spot   p5.48xlarge    spot" in done.stdout
    assert "look at: clusters/aws.yaml: provider.type: credentials for aws are missing" in done.stdout
    assert "look at: clusters/kuberay.yaml: not checked against KubeRay's schema" in done.stdout
    assert "wrong:" not in done.stdout


def test_a_wrong_file_ends_with_2_and_says_where(tmp_path: Path) -> None:
    path = broken(tmp_path)
    key = "available_node_types.h100.node_config.InstanceType"
    shown = xcloud("clusters", "validate", path, code=2).stdout
    assert f"wrong: {path}: {key}: instance 'p5.48xlagre'" in shown
    assert "did you mean 'p5.48xlarge'" in shown
    (record,) = json.loads(xcloud("clusters", "validate", path, "--json", code=2).stdout)
    assert record["valid"] is False
    assert [(p["file"], p["key"]) for p in record["problems"]] == [(str(path), key)]
    assert {node["name"] for node in record["node_types"]} >= {"head", "h100", "cpu"}
    refused = xcloud("clusters", "up", path, "--dry-run", code=2)
    assert refused.stderr.startswith("error: nothing was started:")


def test_jobs_are_held_against_a_file() -> None:
    job = "jobs/multi_cloud.yaml"
    fits = xcloud("clusters", "validate", "clusters/multi_cloud.yaml", "--job", job)
    assert f"OK clusters/multi_cloud.yaml; it has room for {job}" in fits.stdout
    shown = xcloud("clusters", "validate", "clusters/gcp.yaml", "--job", job, code=2).stdout
    assert f"wrong: {job}: regions.us-east-1.pools[0]: needs 16 x H100" in shown
    assert "no node type of clusters/gcp.yaml offers it (nearest: h100_spot, but" in shown


def test_a_price_file_adds_instance_types(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    machine = {"cpus": 192, "memory_gb": 2048, "accelerator": "H100", "count": 8, "accelerator_memory_gb": 80}
    prices.write_text(
        yaml.safe_dump(
            {"aws": {"as_of": "2026-01-15", "source": "us", "instances": {"p5.48xlagre": machine}}}
        ).replace("'2026-01-15'", "2026-01-15")
    )
    assert "OK" in xcloud("clusters", "validate", broken(tmp_path), "--prices", prices).stdout


def test_up_asks_for_everything_first(bare: dict[str, str]) -> None:
    told = xcloud("clusters", "up", "clusters/aws.yaml", "--yes", code=2, **bare).stderr
    assert "fill in what stands as FILL-IN: 'sg-FILL-IN'" in told
    assert "credentials for aws are missing" in told
    assert "file_mounts.~/.xcloud/keys: ~/.config/xcloud/cluster: no such file or folder" in told
    told = xcloud("clusters", "up", "clusters/gcp.yaml", code=2, **bare).stderr
    assert (
        f"GOOGLE_APPLICATION_CREDENTIALS names {bare['GOOGLE_APPLICATION_CREDENTIALS']}: no such file" in told
    )
    told = xcloud("clusters", "up", "clusters/azure.yaml", code=2, **bare).stderr
    assert "azureProfile.json is not there; run: az login" in told
    told = xcloud("clusters", "down", "clusters/aws.yaml", "--yes", code=2, **bare).stderr
    assert "credentials for aws are missing" in told


def test_keys_that_ray_would_fail_on_are_found_before_up(tmp_path: Path, bare: dict[str, str]) -> None:
    folder = Path(bare["HOME"]) / ".config" / "xcloud" / "cluster"
    xcloud("keys", "cluster", folder)
    told = xcloud("clusters", "up", "clusters/aws.yaml", code=2, **bare).stderr
    assert "file_mounts.~/.xcloud/keys" not in told
    (folder / "token").write_text("short")
    told = xcloud("clusters", "up", "clusters/aws.yaml", code=2, **bare).stderr
    assert f"file_mounts.~/.xcloud/keys: {folder}/token: 5 characters, which can be guessed" in told


def test_a_dry_run_shows_the_commands() -> None:
    def shown(*words: str) -> str:
        return xcloud("clusters", *words, "--dry-run").stdout

    assert shown("up", "clusters/aws.yaml", "--yes").endswith(
        "ray.scripts.scripts up clusters/aws.yaml --yes\n"
    )
    assert shown("down", "clusters/aws.yaml").endswith("down clusters/aws.yaml\n")
    assert shown("status", "clusters/gcp.yaml").endswith("exec clusters/gcp.yaml 'ray status'\n")
    assert shown("up", "clusters/kuberay.yaml") == "$ kubectl apply --filename -\n"
    assert shown("down", "clusters/kuberay.yaml") == "$ kubectl delete --ignore-not-found --filename -\n"
    assert "raycluster/xcloud rayjob/xcloud-three-clouds" in shown("status", "clusters/kuberay.yaml")
    assert shown("up", "clusters/local.yaml").count("ray start") == 4


def test_kubectl_is_given_the_documents_and_its_exit_status_is_ours(tmp_path: Path) -> None:
    """Another program stands in for kubectl: it keeps what it is given."""
    path = tmp_path / "k.yaml"
    path.write_text((CLUSTERS / "kuberay.yaml").read_text(encoding="utf-8").replace("FILL-IN", "here"))
    (tmp_path / "config").touch()
    environment = {"KUBECONFIG": str(tmp_path / "config"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words; cat > {tmp_path}/given; exit 7\n')
    kubectl.chmod(0o755)
    xcloud("clusters", "up", path, code=7, **environment)
    assert (tmp_path / "words").read_text() == "apply --filename -\n"
    (document,) = yaml.safe_load_all((tmp_path / "given").read_text())
    assert document["kind"] == "RayCluster"
    xcloud("clusters", "up", path, "--rayjobs", code=7, **environment)
    assert [d["kind"] for d in yaml.safe_load_all((tmp_path / "given").read_text())] == [
        "RayCluster",
        "RayJob",
    ]
    told = xcloud("clusters", "status", path, code=2, **environment | {"PATH": "/none"}).stderr
    assert "kubectl is not on the PATH" in told


def test_keys_of_a_cluster(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    shown = xcloud(
        "keys", "cluster", folder, "--node", "head=10.0.0.1", "--node", "10.0.0.2", "--here", "node"
    ).stdout
    assert f"export RAY_TLS_SERVER_CERT={folder}/head.crt" in shown
    assert "export RAY_AUTH_MODE=token" in shown
    assert f". {folder}/node.env" in shown
    assert "head: for 10.0.0.1" in shown
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600
    assert (folder / "token").read_text() not in shown
    record = json.loads(xcloud("keys", "cluster", folder, "--node", "w2", "--json").stdout)
    assert record["written"] == ["w2.key", "w2.crt", "w2.env"]
    assert record["variables"]["w2"]["RAY_TLS_SERVER_KEY"] == f"{folder}/w2.key"
    assert "expected NAME, ADDRESS" in xcloud("keys", "cluster", folder, "--node", "a b", code=1).stderr


def test_train_refuses_a_cluster_over_the_network_unless_it_is_spelled_out(tmp_path: Path) -> None:
    words = ("train", "jobs/three_clouds.yaml", "--address", "192.0.2.77:6379", "--run-dir", tmp_path / "run")
    told = xcloud(*words, code=1, RAY_USE_TLS="0").stderr
    assert "error: the Ray cluster at 192.0.2.77 is not on loopback, and RAY_USE_TLS is 0" in told
    assert "or spell out --insecure" in told


@pytest.mark.slow
def test_a_cluster_of_this_machine_comes_up_and_goes(tmp_path: Path) -> None:
    """clusters/local.yaml for real, on ports of its own: four raylets with their labels, and nothing is left."""
    text = (CLUSTERS / "local.yaml").read_text(encoding="utf-8")
    port = _free_port()
    path = tmp_path / "local.yaml"
    path.write_text(text.replace("6399", str(port)).replace("9399", str(_free_port())))
    address = f"127.0.0.2:{port}"
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    (tmp_path / "token").write_text("f" * 64)
    try:
        outside("clusters", "up", path, **environment)
        status = outside("clusters", "status", path, **environment).stdout
        assert "0.0/4.0 CPU" in status
        probe = f"import ray; ray.init({address!r}, log_to_driver=False); print(*(n['Labels']['ray.io/region'] for n in ray.nodes()))"
        seen = subprocess.run(
            [sys.executable, "-c", probe],
            env=os.environ | environment | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert sorted(seen.stdout.split()) == ["europe-west4", "hub", "us-east-1", "westeurope"]
    finally:
        gone = outside("clusters", "down", path, "--yes", **environment)
    assert f"Ray processes of {address}" in gone.stdout
    left = [
        p.info["cmdline"]
        for p in psutil.process_iter(["cmdline"])
        if f"--gcs-address={address}" in (p.info["cmdline"] or ())
    ]
    assert left == []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

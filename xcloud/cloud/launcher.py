"""Commands that bring a cluster up and down, and what must be there before: credentials, files, keys.

`ray up`, `ray down` and `ray exec` for the cluster launcher, `kubectl` for KubeRay. A file whose head is this machine
(`provider: local` on loopback) needs no SSH: its start commands run here, and `down` ends the processes that hold on to
its address, and no other Ray.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from xcloud.cloud.certificates import check_certificate, check_token
from xcloud.cloud.cluster_file import ClusterFile, Problem
from xcloud.cloud.node_types import start_commands
from xcloud.errors import KeyFileError, PlacementError

__all__ = [
    "credential_problems",
    "down_commands",
    "end_local",
    "file_problems",
    "status_commands",
    "up_commands",
]

RAY = (sys.executable, "-m", "ray.scripts.scripts")
SDKS = {
    "aws": ("boto3", "boto3"),
    "gcp": ("googleapiclient", "google-api-python-client"),
    "azure": (
        "azure.mgmt.compute",
        "azure-identity azure-mgmt-compute azure-mgmt-network azure-mgmt-resource",
    ),
}
"""Module and package by which Ray calls a cloud from this machine."""

KEYS_FOLDER = re.compile(r"RAY_AUTH_TOKEN_PATH=[\"']?(?:\$HOME|~)?/?(?P<folder>[^\s\"';]*)/")
GRACE_S = 10.0


def up_commands(cluster: ClusterFile, yes: bool) -> list[list[str]]:
    """What brings the cluster up. KubeRay's documents go to standard input."""
    if cluster.form == "kuberay":
        return [["kubectl", "apply", "--filename", "-"]]
    if cluster.on_this_machine:
        return [["bash", "-c", command] for _, command in start_commands(cluster.config)]
    return [[*RAY, "up", str(cluster.path), *(["--yes"] if yes else [])]]


def down_commands(cluster: ClusterFile, yes: bool) -> list[list[str]]:
    """What takes it down; nothing for this machine, whose processes `end_local` ends."""
    if cluster.form == "kuberay":
        return [["kubectl", "delete", "--ignore-not-found", "--filename", "-"]]
    if cluster.on_this_machine:
        return []
    return [[*RAY, "down", str(cluster.path), *(["--yes"] if yes else [])]]


def status_commands(cluster: ClusterFile) -> list[list[str]]:
    """What shows how it stands: nodes, what they offer and what is pending."""
    if cluster.form == "kuberay":
        names = [f"{d['kind'].lower()}/{d['metadata']['name']}" for d in cluster.documents]
        return [["kubectl", "get", "--output", "wide", *names]]
    if cluster.on_this_machine:
        return [[*RAY, "status", "--address", local_address(cluster)]]
    return [[*RAY, "exec", str(cluster.path), "ray status"]]


def credential_problems(cluster: ClusterFile, environ: Mapping[str, str]) -> list[Problem]:
    """Clouds that this machine cannot call: credentials or the cloud's package are missing."""
    if cluster.form == "kuberay":
        return list(_kubectl(cluster, environ))
    found = []
    for key, provider in cluster.providers().values():
        kind = str(provider.get("type"))
        if kind in CREDENTIALS and (text := CREDENTIALS[kind](provider, environ)) is not None:
            found.append(cluster.error(f"{key}.type", f"credentials for {kind} are missing: {text}"))
        if kind in SDKS and not _importable(SDKS[kind][0]):
            found.append(
                cluster.error(
                    f"{key}.type", f"Ray needs packages for {kind}; run: pip install {SDKS[kind][1]}"
                )
            )
    for name in ("ssh_private_key", "ssh_public_key"):
        path = (cluster.config.get("auth") or {}).get(name)
        if path is not None and not Path(path).expanduser().is_file():
            found.append(cluster.error(f"auth.{name}", f"{path}: no such file"))
    return found


def file_problems(cluster: ClusterFile) -> list[Problem]:
    """Files to be copied that are not there, and keys of the cluster that Ray would fail on."""
    found: list[Problem] = []
    if cluster.form == "kuberay" or cluster.on_this_machine:
        return found
    mounts = cluster.config.get("file_mounts") or {}
    for remote, local in mounts.items():
        if not Path(str(local)).expanduser().exists():
            found.append(cluster.error(f"file_mounts.{remote}", f"{local}: no such file or folder"))
    for remote, local in mounts.items():
        folder = Path(str(local)).expanduser()
        if folder.exists() and any(_same(remote, used) for used in _keys_folders(cluster)):
            try:
                check_certificate(folder / "ca.crt", folder / "ca.key", folder / "ca.crt", address=None)
                check_token(folder / "token")
            except KeyFileError as problem:
                found.append(
                    cluster.error(f"file_mounts.{remote}", f"{problem}; run: xcloud keys cluster {local}")
                )
    return found


def local_address(cluster: ClusterFile) -> str:
    """`HOST:PORT` of the head that a file for this machine starts."""
    for _, command in start_commands(cluster.config):
        port = re.search(r"--port[= ](\d+)", command)
        if "--head" in command and port:
            return f"{cluster.config['provider']['head_ip']}:{port[1]}"
    raise PlacementError(f"{cluster.path}: head_start_ray_commands: no `ray start --head --port=PORT` there")


def end_local(cluster: ClusterFile) -> int:
    """End this user's Ray processes that belong to the cluster of a file for this machine.

    Returns:
        How many there were.
    """
    address = local_address(cluster)
    port = address.rpartition(":")[2]
    marks = (f"--gcs-address={address}", f"--gcs_server_port={port}", f"--address={address}")
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        words = process.info["cmdline"] or []
        own = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        of_ray = any("/ray/" in word or word.startswith("ray.") for word in words)
        if own and of_ray and any(mark in words for mark in marks) and process.pid != os.getpid():
            found.append(process)
    for process in found:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(found, timeout=GRACE_S)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)
    return len(found)


def _signal(send: Callable[[], Any]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return  # it went with another one of them


def _keys_folders(cluster: ClusterFile) -> set[str]:
    """Folders on the nodes from which start commands take the token."""
    found = (KEYS_FOLDER.search(command) for _, command in start_commands(cluster.config))
    return {match["folder"] for match in found if match}


def _same(remote: Any, folder: str) -> bool:
    return str(remote).removeprefix("~").strip("/") == folder.strip("/")


def _aws(provider: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    del provider
    if "AWS_ACCESS_KEY_ID" in environ and "AWS_SECRET_ACCESS_KEY" in environ:
        return None
    if "AWS_WEB_IDENTITY_TOKEN_FILE" in environ or any(
        n.startswith("AWS_CONTAINER_CREDENTIALS") for n in environ
    ):
        return None
    home = _home(environ) / ".aws"
    files = [
        Path(environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials")),
        Path(environ.get("AWS_CONFIG_FILE", home / "config")),
    ]
    if any(file.expanduser().is_file() for file in files):
        return None
    return f"neither AWS_ACCESS_KEY_ID nor {files[0]} is there; run: aws configure"


def _gcp(provider: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    if provider.get("gcp_credentials"):
        return None
    named = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if named is not None:
        return (
            None if Path(named).is_file() else f"GOOGLE_APPLICATION_CREDENTIALS names {named}: no such file"
        )
    folder = Path(environ.get("CLOUDSDK_CONFIG", _home(environ) / ".config" / "gcloud"))
    default = folder / "application_default_credentials.json"
    if default.is_file():
        return None
    return f"neither GOOGLE_APPLICATION_CREDENTIALS nor {default} is there; run: gcloud auth application-default login"


def _azure(provider: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    del provider
    profile = Path(environ.get("AZURE_CONFIG_DIR", _home(environ) / ".azure")) / "azureProfile.json"
    return None if profile.is_file() else f"{profile} is not there; run: az login"


CREDENTIALS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, str]], str | None]] = {
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
}


def _kubectl(cluster: ClusterFile, environ: Mapping[str, str]) -> Iterator[Problem]:
    if shutil.which("kubectl", path=environ.get("PATH")) is None:
        yield cluster.error("", "kubectl is not on the PATH; it applies files for KubeRay")
    files = environ.get("KUBECONFIG") or str(_home(environ) / ".kube" / "config")
    if "KUBERNETES_SERVICE_HOST" not in environ and not any(
        Path(f).is_file() for f in files.split(os.pathsep)
    ):
        yield cluster.error("", f"credentials for Kubernetes are missing: {files} is not there (KUBECONFIG)")


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if "HOME" in environ else Path.home()


def _importable(module: str) -> bool:
    parts: Sequence[str] = module.split(".")
    return all(importlib.util.find_spec(".".join(parts[: n + 1])) is not None for n in range(len(parts)))

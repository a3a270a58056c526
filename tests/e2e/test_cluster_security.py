"""Real Ray with real mutual TLS and a token: who has them is served, who has another authority's is not."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from xcloud.cloud.certificates import ClusterKeys, Node, addresses_here

SERVE = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(json.dumps(cluster.address), flush=True)
sys.stdin.read()
cluster.shutdown()
"""

JOIN = """
import ray, sys
from xcloud.cloud.session import ray_session
with ray_session(sys.argv[1], 1, insecure=sys.argv[2:] == ["insecure"]) as session:
    print("served", ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=60), session.exposed, flush=True)
"""


@dataclass(frozen=True)
class Served:
    address: str
    variables: dict[str, str]


def serve(environment: dict[str, str]) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield json.loads(next(line for line in server.stdout if line.startswith('"')))
        finally:
            server.stdin.close()
            server.wait(60)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = ClusterKeys(tmp_path_factory.mktemp("cluster") / "keys")
    keys.make([Node("node", tuple(addresses_here()))], days=1)
    variables = keys.variables("node")
    for address in serve(os.environ | variables):
        yield Served(address, variables)


def join(address: str, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_TLS", "RAY_AUTH"))}
    return subprocess.run(
        [sys.executable, "-c", JOIN, address, *words],
        env=bare | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_node_of_the_cluster_is_served(secured: Served) -> None:
    done = join(secured.address, secured.variables)
    assert done.returncode == 0, done.stderr
    assert "served 42 None" in done.stdout


def test_without_keys_a_session_refuses_to_join(secured: Served) -> None:
    host = secured.address.rpartition(":")[0]
    done = join(secured.address, {"RAY_AUTH_MODE": "token"})
    assert done.returncode == 1
    assert (
        f"SecurityError: the Ray cluster at {host} is not on loopback, and RAY_USE_TLS is not set"
        in done.stderr
    )


def test_another_authoritys_node_is_turned_away(secured: Served, tmp_path: Path) -> None:
    """By the cluster itself: the head's own port takes its node's certificate and refuses the other's."""
    host, _, port = secured.address.rpartition(":")
    stranger = ClusterKeys(tmp_path / "stranger")
    stranger.make([Node("node", tuple(addresses_here()))], days=1)
    assert greets(host, int(port), secured.variables)
    assert not greets(host, int(port), stranger.variables("node"))


def greets(host: str, port: int, variables: dict[str, str]) -> bool:
    """Whether Ray's head goes on with a client that shows this certificate (and looks at nothing itself)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(variables["RAY_TLS_SERVER_CERT"], variables["RAY_TLS_SERVER_KEY"])
    with socket.create_connection((host, port), timeout=20) as plain:
        try:
            with context.wrap_socket(plain) as secure:
                secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                return secure.recv(9) != b""
        except (ssl.SSLError, ConnectionError):
            return False


@pytest.mark.slow
def test_ray_itself_cannot_join_with_another_authoritys_keys(secured: Served, tmp_path: Path) -> None:
    """The certificates are in order by themselves, so that only the cluster can tell; the token is the right one."""
    stranger = ClusterKeys(tmp_path / "stranger")
    stranger.make([Node("node", tuple(addresses_here()))], days=1)
    variables = stranger.variables("node")
    variables["RAY_AUTH_TOKEN_PATH"] = secured.variables["RAY_AUTH_TOKEN_PATH"]
    command = ["timeout", "60", sys.executable, "-c", JOIN, secured.address]  # Ray goes on for minutes
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr + done.stdout


@pytest.mark.slow
def test_insecure_is_spelled_out_and_told() -> None:
    """A cluster in the clear on this machine's own address: refused, or joined with a warning."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for address in serve(bare | {"RAY_AUTH_MODE": "disabled"}):
        host = address.rpartition(":")[0]
        refused = join(address, {"RAY_AUTH_MODE": "disabled"})
        assert refused.returncode == 1
        assert "or spell out --insecure" in refused.stderr
        joined = join(address, {"RAY_AUTH_MODE": "disabled"}, "insecure")
        assert joined.returncode == 0, joined.stderr
        assert f"served 42 {host}" in joined.stdout

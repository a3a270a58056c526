"""No session joins a cluster over a network without TLS and token; loopback needs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from xcloud.cloud import guard, session
from xcloud.cloud.certificates import ClusterKeys, Node, addresses_here
from xcloud.cloud.guard import check_cluster, is_loopback
from xcloud.errors import SecurityError

AWAY = "192.0.2.77"  # TEST-NET-1 (RFC 5737)


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    keys = ClusterKeys(tmp_path / "keys")
    keys.make([Node("node", tuple(addresses_here())), Node("elsewhere", ("10.9.9.9",))], days=30)
    return keys.variables("node")


@pytest.fixture(autouse=True)
def route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network has no route to look up; its address would be one of its own anyway."""
    monkeypatch.setattr(guard, "address_towards", lambda host: "127.0.0.1")


def test_loopback_needs_nothing() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        assert is_loopback(host)
        check_cluster(host, {})
    assert not is_loopback(AWAY)
    with pytest.raises(SecurityError, match=r"nowhere\.invalid: cannot be resolved"):
        is_loopback("nowhere.invalid")


def test_a_secured_cluster_is_joined(variables: dict[str, str]) -> None:
    check_cluster(AWAY, variables)
    token = Path(variables.pop("RAY_AUTH_TOKEN_PATH")).read_text()
    check_cluster(AWAY, variables | {"RAY_AUTH_TOKEN": token})  # from a secret store


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("RAY_USE_TLS", None, "RAY_USE_TLS is not set; expected RAY_USE_TLS=1"),
        ("RAY_USE_TLS", "0", "RAY_USE_TLS is 0"),
        ("RAY_TLS_SERVER_CERT", None, "RAY_TLS_SERVER_CERT is not set; expected the file of a certificate"),
        ("RAY_TLS_SERVER_KEY", None, "RAY_TLS_SERVER_KEY is not set; expected the file of a private key"),
        ("RAY_TLS_CA_CERT", None, "RAY_TLS_CA_CERT is not set"),
        ("RAY_TLS_CA_CERT", "/none/ca.crt", "/none/ca.crt: no such file"),
        ("RAY_AUTH_MODE", None, "RAY_AUTH_MODE is not set; expected token"),
        ("RAY_AUTH_MODE", "disabled", "RAY_AUTH_MODE is disabled"),
        (
            "RAY_AUTH_TOKEN_PATH",
            None,
            "RAY_AUTH_TOKEN_PATH is not set; expected the file of the cluster's token",
        ),
        ("RAY_AUTH_TOKEN_PATH", "/none/token", "RAY_AUTH_TOKEN_PATH: /none/token: no such file"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    variables: dict[str, str], name: str, value: str | None, problem: str
) -> None:
    variables.pop(name)
    if value is not None:
        variables[name] = value
    with pytest.raises(SecurityError) as caught:
        check_cluster(AWAY, variables)
    told = str(caught.value)
    assert problem in told
    assert f"the Ray cluster at {AWAY} is not on loopback" in told
    assert "xcloud keys cluster DIR --here node" in told
    assert "--insecure" in told


def test_files_that_do_not_fit_are_refused(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ClusterKeys(tmp_path / "other")
    other.make([], days=30)
    with pytest.raises(SecurityError, match="not signed by the authority"):
        check_cluster(AWAY, variables | {"RAY_TLS_CA_CERT": str(other.folder / "ca.crt")})
    with monkeypatch.context() as patch:
        patch.setattr(guard, "address_towards", lambda host: "192.0.2.78")
        with pytest.raises(
            SecurityError, match=r"elsewhere\.crt: is for .*10\.9\.9\.9.*, not for 192\.0\.2\.78"
        ):
            check_cluster(AWAY, ClusterKeys(tmp_path / "keys").variables("elsewhere"))
    Path(variables["RAY_AUTH_TOKEN_PATH"]).chmod(0o640)
    with pytest.raises(SecurityError, match=r"token: others than its owner can use it \(mode 0640\)"):
        check_cluster(AWAY, variables)


@pytest.mark.parametrize("address", [f"{AWAY}:6379", f"ray://{AWAY}:10001", "[2001:db8::1]:6379"])
def test_a_session_asks_before_it_sends_anything(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in guard.FILES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("it went on"))
    with (
        pytest.raises(SecurityError, match="RAY_USE_TLS is not set"),
        session.ray_session(address, 1),
    ):
        pass


def test_auto_is_what_ray_takes_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a Ray job the address is `auto` or that of the cluster; the rule looks at the real one."""
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", f"{AWAY}:6379")
    with (
        pytest.raises(SecurityError, match=f"the Ray cluster at {AWAY} is not on loopback"),
        session.ray_session("auto", 1),
    ):
        pass

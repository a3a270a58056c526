"""Keys of a cluster: what is made, for whom it is readable, and what a check refuses."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import stat
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509

import xcloud.cloud.certificates as certificates
from xcloud.cloud.certificates import (
    ClusterKeys,
    Node,
    addresses_here,
    check_certificate,
    check_token,
    parse_node,
)
from xcloud.errors import KeyFileError


@pytest.fixture
def keys(tmp_path: Path) -> ClusterKeys:
    made = ClusterKeys(tmp_path / "keys")
    made.make([Node("head", ("10.0.0.1", "head.internal")), Node("w1", ("10.0.0.2",))], days=30)
    return made


def check(folder: Path, name: str, address: str | None = None, authority: Path | None = None) -> datetime:
    ca = (authority or folder) / "ca.crt"
    return check_certificate(folder / f"{name}.crt", folder / f"{name}.key", ca, address)


def test_what_is_made_is_private(keys: ClusterKeys) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()}
    public = {"ca.crt": 0o644, "head.crt": 0o644, "w1.crt": 0o644}
    private = dict.fromkeys(["ca.key", "token", "head.key", "head.env", "w1.key", "w1.env"], 0o600)
    assert modes == public | private
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700
    token = (keys.folder / "token").read_text()
    assert len(token) == 64
    assert len(bytes.fromhex(token)) * 8 == 256


def test_a_certificate_is_for_its_node(keys: ClusterKeys) -> None:
    expires = check(keys.folder, "head", "10.0.0.1")
    assert timedelta(days=29) < expires - datetime.now(timezone.utc) <= timedelta(days=30)
    for address in ("head.internal", "127.0.0.1", "localhost", "::1"):
        check(keys.folder, "head", address)
    made = x509.load_pem_x509_certificate((keys.folder / "head.crt").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("10.0.0.1") in names.get_values_for_type(x509.IPAddress)
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(KeyFileError, match=r"head\.crt: is for .*10\.0\.0\.1.*, not for 10\.0\.0\.9"):
        check(keys.folder, "head", "10.0.0.9")


def test_the_environment_file_sets_rays_variables(keys: ClusterKeys) -> None:
    lines = (keys.folder / "head.env").read_text().splitlines()
    assert "export RAY_USE_TLS=1" in lines
    assert f"export RAY_TLS_SERVER_KEY={keys.folder / 'head.key'}" in lines
    assert f"export RAY_AUTH_TOKEN_PATH={keys.folder / 'token'}" in lines
    assert len(lines) == len(keys.variables("head")) == 6


def test_made_again_only_certificates_are_new(keys: ClusterKeys) -> None:
    before = {path.name: path.read_bytes() for path in keys.folder.iterdir()}
    assert keys.make([parse_node("w1=10.0.0.2")], days=30) == ["w1.key", "w1.crt", "w1.env"]
    after = {path.name: path.read_bytes() for path in keys.folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"w1.key", "w1.crt"}
    check(keys.folder, "w1", "10.0.0.2")


def test_what_a_check_refuses(keys: ClusterKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ClusterKeys(tmp_path / "other")
    other.make([Node("head", ("10.0.0.1",))], days=30)
    with pytest.raises(KeyFileError, match=r"head\.crt: not signed by the authority in .*other/ca\.crt"):
        check(keys.folder, "head", authority=other.folder)
    with pytest.raises(KeyFileError, match=r"w1\.key: not the private key of .*head\.crt"):
        check_certificate(
            keys.folder / "head.crt", keys.folder / "w1.key", keys.folder / "ca.crt", address=None
        )
    with pytest.raises(KeyFileError, match=r"none\.crt: no such file"):
        check(keys.folder, "none")
    (keys.folder / "w1.crt").write_text("nothing")
    with pytest.raises(KeyFileError, match=r"w1\.crt: not a certificate in PEM"):
        check(keys.folder, "w1")
    (keys.folder / "head.key").chmod(0o644)
    with pytest.raises(
        KeyFileError, match=r"head\.key: others than its owner can use it \(mode 0644\); run: chmod"
    ):
        check(keys.folder, "head")
    monkeypatch.setattr(certificates, "BACKDATED", timedelta(days=3))
    other.make([Node("old", ("10.0.0.1",))], days=-1)
    with pytest.raises(KeyFileError, match=r"old\.crt: expired on "):
        check(other.folder, "old")
    monkeypatch.setattr(certificates, "BACKDATED", timedelta(days=-1))
    other.make([Node("young", ("10.0.0.1",))], days=30)
    with pytest.raises(KeyFileError, match=r"young\.crt: not valid before .* clock"):
        check(other.folder, "young")


def test_a_token_is_private_and_long(tmp_path: Path) -> None:
    token = tmp_path / "token"
    with pytest.raises(KeyFileError, match="no such file"):
        check_token(token)
    token.write_text("f" * 64)
    token.chmod(0o644)
    with pytest.raises(KeyFileError, match=r"token: others than its owner can use it \(mode 0644\)"):
        check_token(token)
    token.chmod(0o600)
    check_token(token)
    token.write_text("secret")
    with pytest.raises(KeyFileError, match="6 characters, which can be guessed"):
        check_token(token)


def test_half_an_authority_is_refused(keys: ClusterKeys, tmp_path: Path) -> None:
    (keys.folder / "ca.key").unlink()
    with pytest.raises(KeyFileError, match=r"ca\.key: no such file; only where ca\.key lies"):
        keys.make([Node("w2", ("10.0.0.3",))], days=30)
    (keys.folder / "ca.crt").unlink()
    (keys.folder / "ca.key").write_text("x")
    with pytest.raises(KeyFileError, match=r"its certificate ca\.crt is missing"):
        keys.make([], days=30)
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(KeyFileError, match="for its owner alone"):
        ClusterKeys(tmp_path / "open").make([], days=30)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("head", Node("head", ("head",))),
        ("10.0.0.1", Node("10.0.0.1", ("10.0.0.1",))),
        ("fd00::2", Node("fd00--2", ("fd00::2",))),
        ("head=10.0.0.1,head.internal", Node("head", ("10.0.0.1", "head.internal"))),
    ],
)
def test_a_node_is_a_name_an_address_or_both(text: str, node: Node) -> None:
    assert parse_node(text) == node


@pytest.mark.parametrize("text", ["", "../x", "a b", "head=", "=10.0.0.1", "ca", "token=10.0.0.1", "a=b=c"])
def test_a_wrong_node_is_refused(text: str) -> None:
    with pytest.raises(KeyFileError, match="expected NAME, ADDRESS or NAME=ADDRESS"):
        parse_node(text)


def test_this_machines_addresses() -> None:
    found = addresses_here()
    assert "127.0.0.1" in found
    assert socket.gethostname() in found


def test_both_sides_of_a_handshake_are_checked(keys: ClusterKeys, tmp_path: Path) -> None:
    """With Python's own TLS: nodes of one authority meet, another authority's node is turned away."""
    other = ClusterKeys(tmp_path / "other")
    other.make([Node("w1", ("10.0.0.2",))], days=30)
    assert _meets(keys.folder, "head", keys.folder, "w1")
    assert not _meets(keys.folder, "head", other.folder, "w1")


def _meets(server: Path, name: str, client: Path, guest: str) -> bool:
    """Whether the server takes the client, which looks at nothing itself."""
    takes = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    takes.verify_mode = ssl.CERT_REQUIRED
    takes.load_verify_locations(server / "ca.crt")
    takes.load_cert_chain(server / f"{name}.crt", server / f"{name}.key")
    asks = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asks.check_hostname, asks.verify_mode = False, ssl.CERT_NONE
    asks.load_cert_chain(client / f"{guest}.crt", client / f"{guest}.key")
    taken = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                with takes.wrap_socket(connection, server_side=True) as secure:
                    secure.sendall(b"hello")
                    taken.append(True)
            except ssl.SSLError:
                taken.append(False)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=20) as plain:
            try:
                with asks.wrap_socket(plain) as secure:
                    secure.recv(5)
            except (ssl.SSLError, ConnectionError):
                pass  # the server's side is what counts
        thread.join(20)
    return taken == [True]

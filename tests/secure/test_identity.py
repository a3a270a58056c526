"""Identities and the roster: files that are private, whole, and say who is who."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import damaged, quick
from xcloud import config
from xcloud.errors import ForeignKeyError, KeyFileError, SecurityError
from xcloud.secure.files import LIMIT, write_file
from xcloud.secure.identity import NAME, Identity, Member, PublicKey, Role, Roster, fingerprint

PRIVATE = PrivateFormat.PKCS8


def identity(name: str) -> Identity:
    """The same key for a name in every run."""
    return Identity(name, Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b".")))


def member(name: str, role: Role = "region") -> Member:
    return Member(name=name, role=role, key=identity(name).public.hex())


ROSTER = Roster.of([member("us"), member("eu"), member("hub", "driver"), member("sum", "aggregator")])


def test_names_are_those_of_a_job_file() -> None:
    assert NAME == config.NAME


def test_a_key_is_kept_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        identity("us").save(tmp_path / "us.key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "us.key").stat().st_mode) == 0o600
    loaded = Identity.load(tmp_path / "us.key")
    assert (loaded.name, loaded.public) == ("us", identity("us").public)
    assert [path.name for path in tmp_path.iterdir()] == ["us.key"]


def test_what_is_for_everybody_can_be_read_by_everybody(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        PublicKey.of(identity("us")).save(tmp_path / "us.pub")
        ROSTER.save(tmp_path / "roster.json")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "us east.key"
    identity("us").save(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"us east.key: .*{mode:04o}.*chmod 600 '.*us east.key'$"):
        Identity.load(path)


def test_a_key_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "us.key"
    identity("us").save(path)
    with pytest.raises(KeyFileError, match=r"us\.key: exists already"):
        identity("eu").save(path)
    assert Identity.load(path).public == identity("us").public
    identity("eu").save(path, replace=True)
    assert Identity.load(path).public == identity("eu").public
    assert [path.name for path in tmp_path.iterdir()] == ["us.key"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "us.key"
    identity("us").save(path)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match=r"us\.key: cannot be written: no space left"):
        identity("eu").save(path, replace=True)
    assert Identity.load(path).public == identity("us").public
    assert [path.name for path in tmp_path.iterdir()] == ["us.key"]


def test_files_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    (tmp_path / "folder.key").mkdir()
    with (tmp_path / "long.key").open("wb") as file:
        file.truncate(LIMIT + 1)
    (tmp_path / "long.key").chmod(0o600)
    for name, problem in (
        ("none", "no such file"),
        ("pipe", "not a regular file"),
        ("folder", "cannot be read: .*directory"),
        ("long", "longer than"),
    ):
        with pytest.raises(KeyFileError, match=rf"{name}\.key: {problem}"):
            Identity.load(tmp_path / f"{name}.key")


@pytest.mark.parametrize(
    ("pem", "problem"),
    [
        (b"", "not a private key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a private key in PEM"),
        (
            X25519PrivateKey.generate().private_bytes(Encoding.PEM, PRIVATE, NoEncryption()),
            "another kind .*X25519.*expected Ed25519",
        ),
        (
            Ed25519PrivateKey.generate().private_bytes(
                Encoding.PEM, PRIVATE, BestAvailableEncryption(b"pass")
            ),
            "behind a passphrase",
        ),
    ],
)
def test_what_is_no_plain_ed25519_key_is_refused(pem: bytes, problem: str) -> None:
    with pytest.raises(KeyFileError, match=f"us.key: .*{problem}"):
        Identity.parse("us", pem, "us.key")


def test_no_private_key_is_shown() -> None:
    secret = identity("us")._key.private_bytes_raw()
    shown = repr(identity("us")) + str(vars(identity("us")))
    assert secret.hex() not in shown
    assert repr(secret) not in shown


def test_a_public_key_goes_round(tmp_path: Path) -> None:
    public = PublicKey.of(identity("us"))
    public.save(tmp_path / "us.pub")
    assert PublicKey.load(tmp_path / "us.pub") == public
    assert public.public == identity("us").public


def _other_name(public: PublicKey) -> PublicKey:
    return public.model_copy(update={"name": "eu"})


def _other_key(public: PublicKey) -> PublicKey:
    return public.model_copy(update={"key": identity("eu").public.hex()})


def _other_proof(public: PublicKey) -> PublicKey:
    return public.model_copy(update={"proof": PublicKey.of(identity("eu")).proof})


@pytest.mark.parametrize("alter", [_other_name, _other_key, _other_proof])
def test_a_public_key_is_signed_by_itself(alter: Any) -> None:
    altered = alter(PublicKey.of(identity("us"))).model_dump_json().encode()
    with pytest.raises(KeyFileError, match=r"us\.pub: proof: not signed by its own key"):
        PublicKey.parse(altered, "us.pub")


def test_keys_of_small_order_are_refused_because_anybody_signs_for_them() -> None:
    """The forgery first: S = 0 and the right one of the few R is a signature, without any private key."""
    p = 2**255 - 19
    order_8 = int.from_bytes(
        bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
    )
    small = [
        (y | sign << 255).to_bytes(32, "little")
        for y in (0, 1, p - 1, p, p + 1, order_8, p - order_8)
        for sign in (0, 1)
    ]
    for key in small:
        assert any(_forged(key, r, b"message %d" % i) for i in range(64) for r in small)
        with pytest.raises(ValueError, match="small order"):
            Member(name="us", role="region", key=key.hex())


def _forged(key: bytes, r: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(r + bytes(32), message)
    except InvalidSignature:
        return False
    return True


def test_a_roster_goes_round_whatever_the_order(tmp_path: Path) -> None:
    ROSTER.save(tmp_path / "roster.json")
    assert Roster.load(tmp_path / "roster.json") == ROSTER
    shuffled = json.dumps({"version": 1, "members": [m.model_dump() for m in reversed(ROSTER.members)]})
    assert Roster.parse(shuffled.encode(), "roster.json").hash == ROSTER.hash
    assert ROSTER.names("region") == ("eu", "us")
    assert ROSTER.member("hub", "driver").public == identity("hub").public


@pytest.mark.parametrize(
    "others",
    [
        [member("us")],
        [member("us"), member("eu", "aggregator")],
        [member("us"), member("eu").model_copy(update={"key": identity("x").public.hex()})],
        [member("us"), member("uk")],
        [],
    ],
)
def test_the_hash_stands_for_names_roles_and_keys(others: list[Member]) -> None:
    assert Roster.of(others).hash != Roster.of([member("us"), member("eu")]).hash


def _text(**changes: Any) -> bytes:
    raw = {"version": 1, "members": [dict(name="us", role="region", key=identity("us").public.hex())]}
    return json.dumps({**raw, **changes}).encode()


def _with(**changes: Any) -> bytes:
    return _text(members=[{**json.loads(_text())["members"][0], **changes}])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "valid dictionary"),
        (b'{"version": 1, "version": 1}', "'version' is given twice"),
        (_text(version=2), "version: .*1"),
        (_text(extra=1), "extra: .*not permitted"),
        (_with(extra=1), r"members\.0\.extra: .*not permitted"),
        (_with(name="../us"), r"members\.0\.name: "),
        (_with(name="us\n"), r"members\.0\.name: "),
        (_with(role="root"), r"members\.0\.role: .*driver"),
        (_with(key="ab"), r"members\.0\.key: "),
        (_with(key=identity("us").public.hex().upper()), r"members\.0\.key: "),
        (_with(key="00" * 32), r"members\.0\.key: .*small order"),
        (_text(members=json.loads(_text())["members"] * 2), r"members\.1\.name: 'us' .* members\.0"),
        (
            _text(members=[member("us").model_dump(), {**member("us").model_dump(), "name": "eu"}]),
            r"members\.1\.key: .* members\.0",
        ),
        (
            _text(members=[member("a", "driver").model_dump(), member("b", "driver").model_dump()]),
            r"2 drivers \(a, b\)",
        ),
    ],
)
def test_a_wrong_roster_is_refused_by_file_and_key(data: bytes, problem: str) -> None:
    with pytest.raises(KeyFileError, match=rf"^roster\.json: .*{problem}"):
        Roster.parse(data, "roster.json")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_roster_that_others_can_change_pins_nobody(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "roster.json"
    ROSTER.save(path)
    path.chmod(mode)
    with pytest.raises(
        KeyFileError, match=rf"roster\.json: .*change it \(mode {mode:04o}\); run: chmod go-w "
    ):
        Roster.load(path)


def test_the_roster_checks_signatures_by_name() -> None:
    signature = identity("us").sign("xcloud/test/v1", "job", 3)
    ROSTER.verify("us", signature, "xcloud/test/v1", "job", 3)
    with pytest.raises(SecurityError, match=r"^us: "):
        ROSTER.verify("us", signature, "xcloud/test/v1", "job", 4)
    with pytest.raises(SecurityError, match=r"^eu: "):
        ROSTER.verify("eu", signature, "xcloud/test/v1", "job", 3)
    with pytest.raises(ForeignKeyError, match=r"'sybil' is not in the roster; it names eu, hub, sum, us"):
        ROSTER.verify("sybil", identity("sybil").sign("xcloud/test/v1"), "xcloud/test/v1")
    with pytest.raises(ForeignKeyError, match="'us' is region in the roster; expected driver"):
        ROSTER.member("us", "driver")


def test_fingerprints_are_read_in_groups() -> None:
    assert fingerprint(bytes(range(10))) == "00010203 04050607 0809"


def test_files_are_written_in_their_folder_only(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be written"):
        write_file(tmp_path / "none" / "us.pub", b"", 0o644)


PEM = identity("us")._key.private_bytes(Encoding.PEM, PRIVATE, NoEncryption())
PUBLIC = PublicKey.of(identity("us")).model_dump_json().encode()


@given(data=st.binary(max_size=200) | damaged(PEM) | damaged(PUBLIC) | damaged(_text()))
@quick
def test_no_parser_raises_anything_but_its_error(data: bytes) -> None:
    for parse in (
        lambda: Identity.parse("us", data, "file"),
        lambda: PublicKey.parse(data, "file"),
        lambda: Roster.parse(data, "file"),
    ):
        with contextlib.suppress(KeyFileError):
            parse()

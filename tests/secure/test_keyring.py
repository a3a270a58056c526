"""A folder of keys: nothing is overwritten, nothing is open to others, and a rotation loses neither key."""

from __future__ import annotations

import os
import stat
from datetime import datetime, timezone
from pathlib import Path

import pytest

from xcloud.errors import KeyFileError
from xcloud.secure.identity import Identity, PublicKey
from xcloud.secure.keyring import Keyring, default_folder

NOW = datetime(2026, 11, 25, 2, 30, 7, tzinfo=timezone.utc)


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "deep" / "keys")


def test_the_folder_is_the_users_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XCLOUD_KEYS", raising=False)
    assert default_folder() == Path("/home/somebody/.config/xcloud/keys")
    monkeypatch.setenv("XCLOUD_KEYS", "~/other")
    assert default_folder() == Path("/home/somebody/other")


def test_keys_are_made_in_a_folder_for_the_owner_alone(ring: Keyring) -> None:
    assert ring.names() == []
    made = ring.make(["us", "eu"])
    assert ring.names() == ["eu", "us"]
    assert [ring.public(name) for name in ("us", "eu")] == made
    assert stat.S_IMODE(ring.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(ring.key_file("us").stat().st_mode) == 0o600
    assert ring.load("us").public == made[0].public != made[1].public


def test_all_keys_are_made_or_none(ring: Keyring) -> None:
    before = ring.make(["us"])
    with pytest.raises(KeyFileError, match=r"us\.key: exists already.*xcloud keys rotate us"):
        ring.make(["eu", "us"])
    assert ring.names() == ["us"]
    assert ring.public("us") == before[0]


@pytest.mark.parametrize("name", ["", "../us", "a/b", ".us", "us\n", "x" * 64])
def test_a_name_that_is_none_makes_nothing(ring: Keyring, name: str) -> None:
    with pytest.raises(KeyFileError, match="a name has letters"):
        ring.make(["eu", name])
    with pytest.raises(KeyFileError, match="no key of"):
        ring.load(name)
    assert not ring.folder.exists()


def test_a_name_given_twice_makes_nothing(ring: Keyring) -> None:
    with pytest.raises(KeyFileError, match="'us' is given twice"):
        ring.make(["us", "us"])
    assert ring.names() == []


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_folder_open_to_others_is_refused(ring: Keyring, mode: int) -> None:
    ring.folder.mkdir(parents=True)
    ring.folder.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"keys: .*mode {mode:04o}.*chmod 700 .*keys"):
        ring.make(["us"])
    assert ring.names() == []


def test_a_folder_that_is_a_file_is_refused(ring: Keyring) -> None:
    ring.folder.parent.mkdir(parents=True)
    ring.folder.write_text("")
    with pytest.raises(KeyFileError, match="keys: cannot be used"):
        ring.make(["us"])
    with pytest.raises(KeyFileError, match="keys: cannot be read"):
        ring.names()


def test_a_rotation_keeps_the_old_key_aside(ring: Keyring) -> None:
    (before,) = ring.make(["us"])
    after, old = ring.rotate("us", NOW)
    assert old.name == "us.key.old-20261125T023007Z"
    assert Identity.load(old).public == before.public
    assert ring.public("us") == after
    assert ring.load("us").public == after.public != before.public
    assert ring.names() == ["us"]
    with pytest.raises(KeyFileError, match=r"the old key cannot be kept.*nothing was changed"):
        ring.rotate("us", NOW)
    assert ring.public("us") == after


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_a_rotation_that_stops_anywhere_loses_neither_key(
    ring: Keyring, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th flush to the disk fails: the name's file is the old key or the new one, and the old one can be found."""
    (before,) = ring.make(["us"])
    count = 0
    flush = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fails_at:
            raise OSError("the disk is gone")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    try:
        ring.rotate("us", NOW)
        failed = False
    except KeyFileError:
        failed = True
    monkeypatch.undo()
    assert failed == (fails_at <= count)
    assert before.public in {Identity.load(path).public for path in ring.folder.glob("us.key*")}
    ring.load("us")
    ring.rotate("us")
    assert ring.public("us").public == ring.load("us").public


def test_a_public_file_of_another_key_is_told(ring: Keyring) -> None:
    ring.make(["us", "eu"])
    PublicKey.load(ring.public_file("eu")).save(ring.public_file("us"), replace=True)
    with pytest.raises(
        KeyFileError, match=r"us\.pub: not the public side of .*us\.key.*xcloud keys rotate us"
    ):
        ring.public("us")


def test_a_public_file_that_is_missing_is_made_anew(ring: Keyring) -> None:
    """As after a crash between the two files."""
    (made,) = ring.make(["us"])
    ring.public_file("us").unlink()
    assert ring.public("us") == made == PublicKey.load(ring.public_file("us"))


def test_an_unknown_name_gets_the_nearest(ring: Keyring) -> None:
    ring.make(["us-east-1"])
    with pytest.raises(KeyFileError, match="no key of 'us-eats-1' here; did you mean 'us-east-1'"):
        ring.load("us-eats-1")
    with pytest.raises(KeyFileError, match="make it with `xcloud keys make tokyo`"):
        ring.load("tokyo")

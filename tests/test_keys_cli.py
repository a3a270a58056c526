"""`xcloud keys`, with real files: what is shown, what is written, what comes next, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from xcloud.cli import app
from xcloud.secure.identity import Roster, fingerprint
from xcloud.secure.keyring import Keyring


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XCLOUD_KEYS", str(tmp_path / "keys"))
    monkeypatch.delenv("XCLOUD_TRACEBACK", raising=False)
    return tmp_path / "keys"


def xcloud(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["keys", *arguments])
    assert done.exit_code == code, done.output
    return done


def flat(text: str) -> str:
    return " ".join(text.split())


def test_make_shows_the_keys_and_what_comes_next(folder: Path) -> None:
    shown = flat(xcloud("make", "us-east-1", "hub").stdout)
    for name in ("us-east-1", "hub"):
        assert fingerprint(Keyring(folder).public(name).public[:16]) in shown
        assert f"{folder}/{name}.pub" in shown
    assert "never copy or commit a private key" in shown
    assert "run xcloud keys roster make roster.json" in shown


def test_make_into_a_folder_of_ones_own(folder: Path, tmp_path: Path) -> None:
    xcloud("make", "us", "--dir", str(tmp_path / "mine"))
    assert Keyring(tmp_path / "mine").names() == ["us"]
    assert not folder.exists()


def test_errors_are_one_line_and_exit_with_1(folder: Path) -> None:
    xcloud("make", "us")
    before = (folder / "us.key").read_bytes()
    failed = xcloud("make", "us", code=1)
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"error: {folder}/us.key: exists already")
    assert failed.stderr.count("\n") == 1
    assert (folder / "us.key").read_bytes() == before
    assert "make it with `xcloud keys make tokyo`" in xcloud("show", "tokyo", code=1).stderr
    (folder / "us.key").chmod(0o644)
    assert f"chmod 600 {folder}/us.key" in xcloud("show", code=1).stderr
    assert "no such file" in xcloud("roster", "show", "none.json", code=1).stderr


def test_no_command_shows_a_private_key(folder: Path) -> None:
    shown = xcloud("make", "us").output
    shown += xcloud("show").output + xcloud("rotate", "us").output
    for path in folder.glob("us.key*"):
        secret = path.read_text().splitlines()[1]
        assert secret not in shown


def test_show(folder: Path) -> None:
    assert "xcloud keys make NAME" in xcloud("show").stdout
    xcloud("make", "us", "eu")
    assert "2 keys in" in xcloud("show").stdout
    record = json.loads(xcloud("show", "--json", "us").stdout)
    assert record == {"folder": str(folder), "keys": {"us": Keyring(folder).public("us").key}}


def test_rotate_says_who_must_learn_of_it(folder: Path) -> None:
    xcloud("make", "us")
    shown = flat(xcloud("rotate", "us").stdout)
    (old,) = folder.glob("us.key.old-*")
    assert f"the old one is {old.name}" in shown
    assert f"send {folder}/us.pub to whoever keeps the roster, and the new roster to everybody" in shown
    assert f"xcloud keys roster add roster.json {folder}/us.pub --replace" in shown


def test_a_roster_is_made_changed_and_shown(folder: Path) -> None:
    xcloud("make", "hub", "sum", "us", "eu")
    shown = flat(xcloud("roster", "make", "r.json", "--driver", "keys/hub.pub", "keys/us.pub").stdout)
    assert "none yet" not in shown
    made = Roster.load(Path("r.json"))
    assert [(member.name, member.role) for member in made.members] == [("hub", "driver"), ("us", "region")]
    assert fingerprint(made.hash[:16]) in shown

    xcloud("roster", "add", "r.json", "keys/eu.pub")
    xcloud("roster", "add", "r.json", "keys/sum.pub", "--role", "aggregator")
    assert Roster.load(Path("r.json")).names("region") == ("eu", "us")

    xcloud("rotate", "hub")
    assert "--replace gives it this key" in flat(
        xcloud("roster", "add", "r.json", "keys/hub.pub", code=2).stderr
    )
    xcloud("roster", "add", "r.json", "keys/hub.pub", "--replace")
    replaced = Roster.load(Path("r.json")).member("hub")
    assert replaced.role == "driver"
    assert replaced.public == Keyring(folder).public("hub").public != made.member("hub").public

    assert "--role driver (there is none yet)" in flat(
        xcloud("roster", "make", "s.json", "keys/us.pub").stdout
    )
    xcloud("roster", "remove", "r.json", "eu")
    left = Roster.load(Path("r.json"))
    assert left.names("region") == ("us",)
    record = json.loads(xcloud("roster", "show", "r.json", "--json").stdout)
    assert record["fingerprint"] == left.hash.hex()
    assert fingerprint(left.hash[16:]) in xcloud("roster", "show", "r.json").stdout


def test_what_a_roster_refuses_leaves_it_as_it_was(folder: Path) -> None:
    xcloud("make", "hub", "us")
    xcloud("roster", "make", "r.json", "--driver", "keys/hub.pub", "keys/us.pub")
    before = Path("r.json").read_bytes()
    Path("us2.pub").write_bytes((folder / "us.pub").read_bytes().replace(b'"us"', b'"us2"'))
    for arguments, code, problem in (
        (["make", "r.json", "keys/us.pub"], 1, "r.json: exists already"),
        (["make", "new.json", "keys/us.pub", "keys/us.pub"], 1, "'us' is that of members.0 already"),
        (["add", "r.json", "us2.pub"], 1, "us2.pub: proof: not signed by its own key"),
        (["add", "r.json", "keys/us.key"], 1, "us.key: not valid JSON"),
        (["add", "r.json", "keys/us.pub", "--replace", "--role", "driver"], 1, "2 drivers"),
        (["add", "r.json", "keys/us.pub", "--role", "king"], 2, "king"),
        (["remove", "r.json", "tokyo"], 1, "'tokyo' is not in the roster; it names hub, us"),
    ):
        assert problem in flat(xcloud("roster", *arguments, code=code).stderr)
        assert Path("r.json").read_bytes() == before
        assert not Path("new.json").exists()


def test_help_names_the_commands() -> None:
    shown = xcloud("--help").stdout
    assert all(word in shown for word in ("make", "show", "rotate", "roster"))

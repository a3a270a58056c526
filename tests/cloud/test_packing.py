"""What `xcloud submit` sends: Ray's own packing, on a directory with every kind of secret in it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package

from xcloud.cloud.certificates import ClusterKeys, Node
from xcloud.cloud.jobs import EXCLUDES, JobService, Submission
from xcloud.cloud.packing import kept_back, pattern_of
from xcloud.errors import ConfigError
from xcloud.secure.keyring import Keyring

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n"


class Client:
    """A Jobs API that keeps what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def submit_job(self, **given: Any) -> None:
        self.given = given


def put(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory: a job and its data, beside keys of all kinds and two runs."""
    work = tmp_path / "work"
    put(work / "job.yaml")
    put(work / "data" / "token", "a text that is called so")
    put(work / "data" / "keys" / "music.txt", "a minor")
    put(work / "notes.md", "    -----BEGIN PRIVATE KEY-----")
    put(work / "certs" / "public.pem", "-----BEGIN CERTIFICATE-----\n")
    ring = Keyring(work / "keys")
    ring.make(["us-east-1"])
    ring.rotate("us-east-1")
    ClusterKeys(work / "cluster").make([Node("node", ("127.0.0.1",))], days=1)
    put(work / "certs" / "mine.pem", "Bag Attributes\n" + PEM)
    put(work / "ssh" / "id_ed25519", PEM)
    put(work / "my [old] run #1" / "events.jsonl", "{}")
    put(work / "my [old] run #1" / "keys" / "journal")
    put(tmp_path / "elsewhere" / "events.jsonl", "{}")
    put(tmp_path / "elsewhere" / "weights")
    (work / "linked").symlink_to(tmp_path / "elsewhere")
    return work


def submit(folder: Path, monkeypatch: pytest.MonkeyPatch, ship: bool = False) -> tuple[list[str], list[str]]:
    """What was said to be kept, and what Ray packs."""
    client = Client()
    monkeypatch.setattr("xcloud.cloud.jobs.JobSubmissionClient", lambda address: client)
    service = JobService("http://127.0.0.1:8265")
    kept = service.submit(Submission("j", folder, ["job.yaml"], "~/runs/j", "", ship))
    package = folder.parent / "package.zip"
    excludes = client.given["runtime_env"]["excludes"]
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as packed:
        return [str(path) for path in kept], [name for name in packed.namelist() if not name.endswith("/")]


def test_no_secret_is_sent_and_all_else_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, sent = submit(folder, monkeypatch)
    assert sorted(kept) == ["certs/mine.pem", "cluster/token", "linked", "my [old] run #1", "ssh/id_ed25519"]
    assert sorted(sent) == sorted(
        [
            "job.yaml",
            "data/token",
            "data/keys/music.txt",
            "notes.md",
            "certs/public.pem",
            "keys/us-east-1.pub",
            "cluster/ca.crt",
            "cluster/node.crt",
            "cluster/node.env",
        ]
    )
    assert list((folder / "keys").glob("us-east-1.key.old-*"))


def test_without_these_patterns_they_would_be_sent(folder: Path) -> None:
    package = folder.parent / "all.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as packed:
        assert {"keys/us-east-1.key", "cluster/ca.key", "cluster/token", "linked/weights"} <= set(
            packed.namelist()
        )


def test_a_run_folder_is_no_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a run folder"):
        submit(folder / "my [old] run #1", monkeypatch)


def test_what_would_keep_a_part_of_xcloud_from_being_sent_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "training" / "events.jsonl")
    with pytest.raises(ConfigError, match=r"work/training: must not be sent.*--ship"):
        submit(folder, monkeypatch, ship=True)
    assert "training" in submit(folder, monkeypatch)[0]


def test_a_pattern_names_one_path(tmp_path: Path) -> None:
    assert pattern_of(Path("a b/[c]#!.pem")) == r"/a\ b/\[c\]\#\!.pem"


def test_what_is_not_packed_is_not_looked_through(tmp_path: Path) -> None:
    put(tmp_path / "runs" / "x" / "events.jsonl")
    put(tmp_path / ".git" / "key", PEM)
    assert kept_back(tmp_path, EXCLUDES) == []

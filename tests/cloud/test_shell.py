"""Which `ray start` a shell command holds, and what its environment is by then; bash itself is asked for the answer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from xcloud.cloud.shell import ray_starts

SET = {
    "before it": "A=1 ray start --head",
    "quoted": "A=\"1\" '/opt/my ray/ray' start --head",
    "exported": 'export A=1 B="x y"; ulimit -n 64; ray start --head',
    "exported by and": "export A=1 && ray start --head",
    "exported later": "A=1; export A; ray start --head",
    "by env": "env A=1 ray start --head",
    "in a subshell": "(export A=1; ray start --head)",
    "in a script": "export A=1; bash -c 'ray start --head'",
    "in a script of its own": "bash -c 'A=1 ray start --head'",
    "a sign that is no comment": "echo a#b; export A=1; ray start --head",
    "after a comment": "# ray start\nA=1 ray start --head",
    "over a pipe": "export A=1; ray start --head 2>&1 | cat",
    "put right": "export A=0; A=1 ray start --head",
}
NOT_SET = {
    "in a comment": "ray start --head # A=1",
    "after it": "ray start --head; export A=1",
    "not exported": "A=1; ray start --head",
    "for another command": "A=1 true; ray start --head",
    "an argument": "ray start --head A=1",
    "another word": "echo A=1; ray start --head",
    "in another subshell": "(export A=1); ray start --head",
    "in the background": "export A=1 & ray start --head",
    "before a pipe": "export A=1 | ray start --head",
    "taken back": "export A=1; unset A; ray start --head",
    "another name": "BA=1 ray start --head",
}


def seen_by_bash(command: str, folder: Path) -> str:
    """What a program called ray finds in A."""
    program = folder / "ray"
    program.write_text('#!/bin/sh\nprintf "%s" "${A-nothing}" > "$OUT"\n')
    program.chmod(0o755)
    command = command.replace("/opt/my ray", str(folder))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
    return (folder / "out").read_text()


@pytest.mark.parametrize("command", SET.values(), ids=SET)
def test_what_is_set_for_ray(command: str, tmp_path: Path) -> None:
    (start,) = ray_starts(command)
    assert start.environment.get("A") == "1"
    assert start.words[0] == "--head"
    assert seen_by_bash(command, tmp_path) == "1"


@pytest.mark.parametrize("command", NOT_SET.values(), ids=NOT_SET)
def test_what_is_not_set_for_ray(command: str, tmp_path: Path) -> None:
    (start,) = ray_starts(command)
    assert "A" not in start.environment
    assert seen_by_bash(command, tmp_path) == "nothing"


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("ray stop", 0),
        ("# ray start --head", 0),
        ("array start", 0),
        ("ray start --head; ray start --address=a:1", 2),
        ("~/.xcloud/venv/bin/ray start", 1),
        ('"$HOME/venv/bin/ray" --log-color false start --head', 1),
        ("python -m ray.scripts.scripts start --head", 1),
        ('test -x "$(ray start --head)"', 1),
        ("true `ray start --head`", 1),
        ("sudo -u ray ls; start", 0),
    ],
)
def test_every_start_is_found(command: str, count: int) -> None:
    assert len(ray_starts(command)) == count


def test_options_are_read_in_both_forms() -> None:
    (start,) = ray_starts('ray start --head --labels="a=b,c=d" --num-cpus 3 --block')
    assert start.options == {"--head": "", "--labels": "a=b,c=d", "--num-cpus": "3", "--block": ""}


def test_a_quote_without_its_end() -> None:
    with pytest.raises(ValueError, match="has no end"):
        ray_starts("ray start 'x")

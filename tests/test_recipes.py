"""Every job file that is shipped can be read, and says when to use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from xcloud.config import load_job

JOBS = sorted((Path(__file__).parents[1] / "jobs").rglob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_bears_the_name_of_its_file(path: Path) -> None:
    assert load_job(path).name == path.stem


@pytest.mark.parametrize(
    "path", [path for path in JOBS if path.parent.name == "recipes"], ids=lambda p: p.stem
)
def test_a_recipe_says_when_to_use_it(path: Path) -> None:
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("Use it" in line for line in comment)

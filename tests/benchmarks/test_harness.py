"""The benchmark harness: targets, validation, provenance, records, the command line."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.harness import (
    BenchmarkError,
    Options,
    Result,
    available,
    check_metrics,
    collect_provenance,
    judge,
    write_record,
)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (">= 0.98", True),
        (">=0.981", False),
        ("<= 0.98", True),
        ("< 0.98", False),
        ("> 0.5", True),
        ("== 0.98", True),
        ("< 1e3", True),
        ("> -1", True),
        ("< peer_s", True),
        ("<= 0.4 * peer_s", False),
        ("<= 0.5 * peer_s", True),
        ("< absent_s", False),
        ("< absent_s if measured", True),
        ("< 2 * absent_s if measured", True),
        ("> 0.99 if measured", False),
    ],
)
def test_a_target_is_judged(target: str, met: bool) -> None:
    metrics = {"ours_s": 0.98, "peer_s": 2, "absent_s": None}
    (verdict,) = judge(metrics, {"ours_s": target})
    assert verdict.met is met
    assert verdict.value == 0.98


def test_a_metric_that_was_not_measured_misses_its_target_unless_optional() -> None:
    verdicts = judge({"a": None, "b": None}, {"a": "< 1", "b": "< 1 if measured"})
    assert [v.met for v in verdicts] == [False, True]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("about 3", "expected an operator"),
        ("!= 3", "expected an operator"),
        ("<= ", "expected an operator"),
        ("< nobody", "no metric 'nobody'"),
        ("< host", "is the text 'here'"),
    ],
)
def test_a_target_that_cannot_be_judged_is_refused(target: str, reason: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(reason)):
        judge({"a": 1.0, "host": "here"}, {"a": target})


def test_a_target_needs_its_metric() -> None:
    with pytest.raises(BenchmarkError, match="no metric 'b'"):
        judge({"a": 1.0}, {"b": "< 1"})


def test_metrics_become_plain_scalars() -> None:
    checked = check_metrics({"a": np.float32(0.5), "b": np.int64(3), "c": None, "d": True, "e": "x"})
    assert checked == {"a": 0.5, "b": 3, "c": None, "d": True, "e": "x"}
    assert type(checked["a"]) is float
    assert type(checked["b"]) is int


@pytest.mark.parametrize(
    "metrics",
    [{}, {"Camel": 1}, {"1st": 1}, {"a-b": 1}, {"a": math.nan}, {"a": math.inf}, {"a": [1]}, {"a": {}}],
)
def test_bad_metrics_are_refused(metrics: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError):
        check_metrics(metrics)


def record(**changes: Any) -> dict[str, Any]:
    whole = {
        "benchmark": "sleep",
        "quick": False,
        "commit": "0" * 40,
        "dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "some cpu", "cores": 2, "memory_gb": 24.0, "gpus": []},
        "seed": 0,
        "command": "python -m benchmarks sleep",
        "date": "2026-01-01T00:00:00+00:00",
        "metrics": {"slept_s": None},
        "targets": {},
        "met": True,
        "rows": [{"n": np.int64(3), "where": Path("here")}],
        "notes": [],
    }
    return {key: value for key, value in (whole | changes).items() if value != "absent"}


def test_a_record_is_written_whole(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path / "results")
    assert path == tmp_path / "results" / "sleep.json"
    written = json.loads(path.read_text())
    assert list(written) == list(harness.RECORD_FIELDS)
    assert written["rows"] == [{"n": 3, "where": "here"}]


def test_a_quick_record_has_a_name_of_its_own(tmp_path: Path) -> None:
    assert write_record(record(quick=True), tmp_path).name == "sleep.quick.json"


@pytest.mark.parametrize("field", harness.RECORD_FIELDS)
def test_a_record_with_a_missing_field_is_not_written(tmp_path: Path, field: str) -> None:
    with pytest.raises(BenchmarkError, match=field):
        write_record(record(**{field: "absent"}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"commit": ""}, "commit"),
        ({"command": ""}, "command"),
        ({"metrics": {}}, "metrics"),
        ({"versions": {"python": "3.11.7", "torch": None}}, "versions.torch"),
        ({"hardware": {"cpu": "", "cores": 2}}, "hardware.cpu"),
        ({"rows": [{"loss": math.nan}]}, "not JSON"),
    ],
)
def test_a_record_with_an_empty_field_is_not_written(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(named)):
        write_record(record(**changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "code.py").write_text("one\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_provenance_names_commit_versions_and_hardware(repository: Path) -> None:
    found = collect_provenance(repository)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert found["dirty"] is False
    assert set(found["versions"]) == {"python", *harness.PACKAGES}
    assert found["hardware"]["cpu"]
    assert found["hardware"]["cores"] >= 1


def test_results_do_not_make_a_tree_dirty_but_code_does(repository: Path) -> None:
    (repository / "benchmarks" / "results" / "sleep.json").write_text("{}")
    assert collect_provenance(repository)["dirty"] is False
    (repository / "code.py").write_text("two\n")
    assert collect_provenance(repository)["dirty"] is True


def test_no_provenance_without_a_commit(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="--no-save"):
        collect_provenance(tmp_path)


def test_benchmarks_are_found_without_being_imported(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(
        '"""Sleeps.\n\nAnd more."""\nimport nowhere\n\ndef run(options): ...\n'
    )
    (tmp_path / "helper.py").write_text('"""No run here."""\n')
    assert available(tmp_path) == {"sleep": "Sleeps."}


def test_the_harness_is_no_benchmark() -> None:
    assert not {"harness", "__main__", "__init__"} & set(available())


class Fake:
    """One registered benchmark, `fake`, whose result the test sets."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.options: list[Options] = []
        self.result = Result(
            {"ours_s": 1.5, "flower_s": None},
            {"ours_s": "<= 2"},
            [{"who": "ours", "s": 1.5}, {"who": "flower [x]", "s": None, "why": "not installed"}],
            ["measured [twice]"],
        )

    def run(self, options: Options) -> Result:
        self.options.append(options)
        return self.result

    def main(self, *arguments: str) -> int:
        return harness.main(arguments, self.results)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    fake = Fake(tmp_path)
    provenance = {key: record()[key] for key in ("commit", "dirty", "versions", "hardware", "date")}
    monkeypatch.setattr(harness, "available", lambda: {"fake": "A fake."})
    monkeypatch.setattr(harness, "load", lambda _: fake.run)
    monkeypatch.setattr(harness, "collect_provenance", lambda: provenance)
    return fake


def test_the_last_line_is_one_json_object(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main("fake") == 0
    out = capsys.readouterr().out
    assert "flower [x]" in out
    assert "measured [twice]" in out
    assert json.loads(out.splitlines()[-1]) == {
        "benchmark": "fake",
        "metrics": {"ours_s": 1.5, "flower_s": None},
        "targets": {"ours_s": "<= 2"},
        "met": True,
    }


def test_a_result_is_saved_with_its_command(fake: Fake) -> None:
    assert fake.main("fake", "--seed", "7") == 0
    assert fake.options == [Options(quick=False, seed=7)]
    written = json.loads((fake.results / "fake.json").read_text())
    assert written["command"] == "python -m benchmarks fake --seed 7"
    assert written["seed"] == 7
    assert written["met"] is True


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        ([], ["fake.json"]),
        (["--no-save"], []),
        (["--quick"], []),
        (["--quick", "--save"], ["fake.quick.json"]),
    ],
)
def test_what_is_saved(fake: Fake, arguments: list[str], files: list[str]) -> None:
    assert fake.main("fake", *arguments) == 0
    assert [path.name for path in fake.results.iterdir()] == files


def test_only_strict_fails_on_a_missed_target(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.result = Result({"ours_s": 3.0}, {"ours_s": "<= 2"})
    assert fake.main("fake", "--no-save") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["met"] is False
    assert fake.main("fake", "--no-save", "--strict") == 1


def test_an_invalid_result_is_neither_printed_nor_saved(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.result = Result({"Bad key": 3.0})
    assert fake.main("fake") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Bad key" in captured.err
    assert list(fake.results.iterdir()) == []


def test_provenance_is_checked_before_measuring(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> dict[str, Any]:
        raise BenchmarkError("no commit")

    monkeypatch.setattr(harness, "collect_provenance", nothing)
    assert fake.main("fake") == 2
    assert fake.options == []


def test_without_a_name_the_benchmarks_are_listed(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main() == 0
    assert capsys.readouterr().out.split() == ["fake", "A", "fake."]


def test_an_unknown_name_lists_the_known_ones(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main("fkae") == 2
    assert "there are: fake" in capsys.readouterr().err

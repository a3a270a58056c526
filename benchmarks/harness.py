"""Runs a benchmark, judges it by its targets and keeps the result.

A benchmark measures and returns a `Result`; everything around it is here: the table, the
verdict, the JSON line that ends its output and the file under `benchmarks/results/`, which
is refused when it could not be reproduced from what it says.

Phases: find the module -> (when saving) collect the provenance -> run -> check the result ->
print -> write. Provenance comes first, so that a missing field costs no hour of measuring.

A target is `OPERATOR VALUE [if measured]`, with VALUE a number, another metric or
`NUMBER * METRIC`: `">= 0.98"`, `"< best_alone_loss"`, `"<= 1.2 * plain_ray_s"`. A metric that is
null was not measured, and its target is not met; `if measured` forgives just that.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import importlib
import importlib.metadata
import json
import keyword
import math
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "BenchmarkError",
    "Options",
    "Result",
    "Verdict",
    "available",
    "collect_provenance",
    "judge",
    "main",
    "write_record",
]

Scalar = bool | int | float | str | None

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy")
METRIC_KEY = re.compile(r"[a-z][a-z0-9_]*")
TARGET = re.compile(
    r"(?P<op><=|>=|==|<|>)\s*"
    r"(?:(?P<number>[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)(?:\s*\*\s*(?P<factor_of>[a-z][a-z0-9_]*))?"
    r"|(?P<metric>[a-z][a-z0-9_]*))"
    r"(?P<optional>\s+if measured)?"
)
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
RECORD_FIELDS = (
    "benchmark",
    "quick",
    "commit",
    "dirty",
    "versions",
    "hardware",
    "seed",
    "command",
    "date",
    "metrics",
    "targets",
    "met",
    "rows",
    "notes",
)
NEVER_EMPTY = ("benchmark", "commit", "versions", "hardware", "command", "date", "metrics")


class BenchmarkError(Exception):
    """A benchmark, its result or its record is not what the harness expects."""


@dataclass(frozen=True)
class Options:
    """What a benchmark is told.

    Attributes:
        quick: finish in about a minute, on less work; its figures are no evidence.
        seed: seeds everything that is random.
    """

    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a benchmark returns.

    Attributes:
        metrics: flat figures by key (`[a-z][a-z0-9_]*`), with the unit at the end of the key;
            None for what was not measured. `rows` may hold a list of such mappings.
        targets: for a metric, the bound it answers to.
        rows: the table for people, one mapping a row; columns in order of first appearance.
        notes: sentences a reader of the figures needs.
    """

    metrics: Mapping[str, Any]
    targets: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """One target, judged."""

    metric: str
    value: Scalar
    target: str
    met: bool


# ---------------------------------------------------------------------------- finding


def available(folder: Path = HERE) -> dict[str, str]:
    """Benchmarks in `folder`, each with the first line of its docstring; imports none of them.

    A benchmark whose name is a keyword of Python lives in a module with an underscore behind it.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            docstring = ast.get_docstring(tree) or "(no docstring)"
            found[path.stem.rstrip("_")] = docstring.splitlines()[0]
    return found


def load(name: str) -> Callable[[Options], Result]:
    """The `run` function of benchmark `name`."""
    module = f"{name}_" if keyword.iskeyword(name) else name
    run: Callable[[Options], Result] = importlib.import_module(f"benchmarks.{module}").run
    return run


# ---------------------------------------------------------------------------- judging


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` as plain JSON scalars; under `rows`, a list of mappings of such.

    Raises:
        BenchmarkError: no metric, a bad key, any other nested value, NaN or infinity.
    """
    if not metrics:
        raise BenchmarkError("the result has no metrics")
    checked: dict[str, Any] = {}
    for key, value in metrics.items():
        if not METRIC_KEY.fullmatch(key):
            raise BenchmarkError(f"metric key {key!r} does not match {METRIC_KEY.pattern}")
        if key == "rows" and isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            checked[key] = [check_metrics(row) for row in value]
        else:
            checked[key] = _scalar(key, value)
    return checked


def _scalar(key: str, value: Any) -> Scalar:
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # a numpy or torch scalar
    if value is not None and not isinstance(value, bool | int | float | str):
        raise BenchmarkError(f"metric {key!r} is a {type(value).__name__}; lists and mappings belong in rows")
    if isinstance(value, float) and not math.isfinite(value):
        raise BenchmarkError(f"metric {key!r} is {value}; what could not be measured is None")
    return value


def judge(metrics: Mapping[str, Any], targets: Mapping[str, str]) -> list[Verdict]:
    """Judge every target by its metric.

    Raises:
        BenchmarkError: a target cannot be read, or speaks of a metric that is not there.
    """
    return [Verdict(key, metrics.get(key), text, _met(metrics, key, text)) for key, text in targets.items()]


def _met(metrics: Mapping[str, Any], key: str, text: str) -> bool:
    parsed = TARGET.fullmatch(text.strip())
    if parsed is None:
        raise BenchmarkError(
            f"target {text!r} of {key!r}: expected an operator ({', '.join(OPERATORS)}) and a number, "
            "a metric or 'number * metric', then perhaps 'if measured'"
        )
    value = _number(metrics, key, text)
    other = parsed["metric"] or parsed["factor_of"]
    bound = _number(metrics, other, text) if other else 1.0
    if value is None or bound is None:
        return parsed["optional"] is not None
    return OPERATORS[parsed["op"]](value, bound * float(parsed["number"] or 1))


def _number(metrics: Mapping[str, Any], key: str, target: str) -> float | None:
    if key not in metrics:
        raise BenchmarkError(f"target {target!r}: there is no metric {key!r}")
    value = metrics[key]
    if isinstance(value, str):
        raise BenchmarkError(f"target {target!r}: metric {key!r} is the text {value!r}")
    return None if value is None else float(value)


# ------------------------------------------------------------------------- provenance


def collect_provenance(root: Path = HERE.parent) -> dict[str, Any]:
    """Where the figures come from: `commit`, `dirty`, `versions`, `hardware`, `date`.

    `dirty` leaves out `benchmarks/results/`, so that one result written does not taint the next.

    Raises:
        BenchmarkError: there is no commit, or a package's version is not to be had.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise BenchmarkError(f"{package} is not installed, so its version cannot be recorded") from None
    changes = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": _git(root, "rev-parse", "--verify", "HEAD"),
        "dirty": bool(changes),
        "versions": versions,
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": _gpu_names(),
        },
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise BenchmarkError(
            f"the commit cannot be recorded: {reason} (--no-save runs without a record)"
        ) from None
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,  # the tool without its driver: no GPU that could be used
    )
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `record` as `NAME.json` (`NAME.quick.json` for a quick run) and return the path.

    Raises:
        BenchmarkError: a field is missing or empty, or holds what JSON cannot.
    """
    missing = [name for name in RECORD_FIELDS if name not in record]
    for name in NEVER_EMPTY:
        value = record.get(name)
        if name in ("versions", "hardware") and value:
            missing += [f"{name}.{key}" for key, inner in value.items() if inner is None or inner == ""]
        if not value and name not in missing:
            missing.append(name)
    if missing:
        raise BenchmarkError(f"no record without {', '.join(missing)}")
    try:
        text = json.dumps(
            {name: record[name] for name in RECORD_FIELDS}, indent=2, allow_nan=False, default=_plain
        )
    except ValueError as error:
        raise BenchmarkError(f"the record is not JSON: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['benchmark']}{'.quick' if record['quick'] else ''}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


# --------------------------------------------------------------------------- printing


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return escape(str(value))


def _tables(name: str, result: Result, verdicts: Sequence[Verdict]) -> Iterator[Table | str]:
    if result.rows:
        table = Table(title=name)
        columns = list(dict.fromkeys(key for row in result.rows for key in row))
        for column in columns:
            values = [row[column] for row in result.rows if row.get(column) is not None]
            numeric = all(isinstance(v, int | float) for v in values)
            table.add_column(escape(column), justify="right" if numeric else "left")
        for row in result.rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        yield table
    if verdicts:
        table = Table("metric", "value", "target", "", title="targets")
        for verdict in verdicts:
            mark = "[green]met[/]" if verdict.met else "[red]not met[/]"
            table.add_row(verdict.metric, _cell(verdict.value), escape(verdict.target), mark)
        yield table
    yield from (escape(note) for note in result.notes)


# ------------------------------------------------------------------------------- main


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="without it, the benchmarks are listed")
    parser.add_argument("--quick", action="store_true", help="less work; not saved unless --save is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is not met")
    saving = parser.add_mutually_exclusive_group()
    saving.add_argument("--save", action="store_true", default=None, help="write a quick run's record too")
    saving.add_argument("--no-save", action="store_false", dest="save", help="write no record")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, results: Path = HERE / "results") -> int:
    """The command line. Returns 0 when the benchmark ran, met or not; 1 with `--strict` if not met;
    2 when there is no such benchmark or its result is not valid."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = _parse(arguments)
    screen = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    known = available()
    if given.name is None:
        for name, summary in known.items():
            screen.print(f"  [bold]{name:<24}[/] {escape(summary)}")
        return 0
    if given.name not in known:
        print(f"no benchmark {given.name!r}; there are: {', '.join(known) or 'none'}", file=sys.stderr)
        return 2
    options = Options(quick=given.quick, seed=given.seed)
    save = given.save if given.save is not None else not options.quick
    try:
        provenance = collect_provenance() if save else {}
        result = load(given.name)(options)
        metrics = check_metrics(result.metrics)
        verdicts = judge(metrics, result.targets)
        met = all(verdict.met for verdict in verdicts)
        outcome = {
            "benchmark": given.name,
            "metrics": metrics,
            "targets": dict(result.targets),
            "met": met,
        }
        for part in _tables(given.name, result, verdicts):
            screen.print(part)
        if save:
            record = {
                **provenance,
                **outcome,
                "quick": options.quick,
                "seed": options.seed,
                "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
                "rows": [dict(row) for row in result.rows],
                "notes": list(result.notes),
            }
            screen.print(f"Written: {os.path.relpath(write_record(record, results))}")
    except BenchmarkError as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(outcome, allow_nan=False), flush=True)
    return 1 if given.strict and not met else 0

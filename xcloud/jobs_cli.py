"""`xcloud submit`, `jobs`, `logs` and `stop`: runs on a cluster that is elsewhere, seen as if they were here. It only wires and shows."""

from __future__ import annotations

import datetime as dt
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xcloud.errors import ConfigError
from xcloud.messages import Progress
from xcloud.metrics import Event, RoundRow, to_plain
from xcloud.report import JsonView, LiveView, PlainView, human_seconds, text_view

if TYPE_CHECKING:
    from xcloud.cloud.jobs import JobEnd, JobService
    from xcloud.config import JobConfig

__all__ = ["jobs", "logs", "stop", "submit"]

INTERRUPTED = 130
KEPT = 20
"""Last lines of text that are shown when a job fails."""

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Of the cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Send the cluster's token to another machine without TLS.")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON on standard output, and nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `xcloud submit` and `xcloud jobs` name it.")]


def submit(
    job: Annotated[
        Path, typer.Argument(metavar="JOB", help="Job file (YAML), inside the working directory.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a key of the job. Repeatable."),
    ] = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Packed and sent along; relative paths of the job lie in it.")
    ] = Path(),
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Run folder, on the head. Default: ~/xcloud-runs/ID there."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Go on from the last checkpoint of a job that was submitted before."),
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop with a checkpoint after round N.")
    ] = None,
    ship: Annotated[
        bool,
        typer.Option(
            "--ship", help="Send this machine's xcloud along: the cluster has none, or another version."
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run until it ends.")] = True,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Train a job on a Ray cluster that runs elsewhere."""
    # Here, because they load numpy and Ray, and `xcloud --help` should not wait for that.
    from xcloud.cloud.jobs import JobService, Submission  # noqa: PLC0415
    from xcloud.config import dump_job, load_job  # noqa: PLC0415

    config = load_job(job, overrides or ())
    inside = _inside(job, working_dir)
    service = JobService(address, insecure)
    job_id = Submission.new_id(config.name)
    folder = service.record(resume)[0] if resume is not None else run_dir or f"~/xcloud-runs/{job_id}"
    arguments = [str(inside), *(word for override in overrides or () for word in ("--set", override))]
    arguments += ["--resume" if resume is not None else "--run-dir", folder, "--json", "--progress"]
    arguments += ["--stop-after", str(stop_after)] if stop_after is not None else []
    if not as_json:
        typer.echo(f"sending {working_dir.resolve()} to {service.address}", err=True)
    kept = service.submit(Submission(job_id, working_dir, arguments, folder, dump_job(config), ship))
    if kept and not as_json:
        typer.echo(f"not sent, because secret: {', '.join(map(str, kept))}", err=True)
    if not wait:
        if as_json:
            _print_json({"id": job_id, "run_dir": folder})
        else:
            typer.echo(f"submitted {job_id}\n\nnext\n" + "\n".join(_next(job_id, address, ("logs", "stop"))))
        return
    _follow(service, job_id, config, folder, address, as_json)


def logs(job_id: JobId, address: Address = None, insecure: Insecure = False, as_json: Json = False) -> None:
    """Follow a submitted run until it ends, from its beginning."""
    from xcloud.cloud.jobs import JobService  # noqa: PLC0415 - as above
    from xcloud.config import parse_job  # noqa: PLC0415

    service = JobService(address, insecure)
    folder, text = service.record(job_id)
    _follow(service, job_id, parse_job(text, origin=f"job {job_id}"), folder, address, as_json)


def stop(
    job_id: JobId,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has stopped.")] = True,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """End a submitted run after its round, with a checkpoint."""
    from xcloud.cloud.jobs import JobService  # noqa: PLC0415 - as above

    service = JobService(address, insecure)
    if not as_json:
        typer.echo(f"stopping {job_id} after its round", err=True)
    state = service.stop(job_id, wait)
    if as_json:
        _print_json(vars(state))
        return
    typer.echo(f"{job_id}: {state.status}")
    if state.status == "stopped":
        typer.echo("\nnext\n" + "\n".join(_next(job_id, address, ("resume",))))


def jobs(address: Address = None, insecure: Insecure = False, as_json: Json = False) -> None:
    """List the runs that were submitted to a cluster."""
    from xcloud.cloud.jobs import JobService  # noqa: PLC0415 - as above

    service = JobService(address, insecure)
    found = service.list()
    if as_json:
        _print_json([vars(job) for job in found])
        return
    if not found:
        typer.echo(f"{service.address}: no run was submitted with `xcloud submit`")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("id", "status", "started", "took", "run folder on the head"):
        table.add_column(column, no_wrap=column != "run folder on the head")
    for job in found:
        began = dt.datetime.fromtimestamp(job.started).astimezone() if job.started else None
        took = human_seconds(job.ended - job.started) if job.started and job.ended else "-"
        table.add_row(
            job.id, job.status, f"{began:%Y-%m-%d %H:%M}" if began else "-", took, job.run_dir or "-"
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)


def _follow(
    service: JobService, job_id: str, config: JobConfig, folder: str, address: str | None, as_json: bool
) -> None:
    """Show a run as if it were here; ends with its exit code. Ctrl-C leaves it to itself."""
    console = Console(file=sys.stdout, highlight=False)
    view = JsonView() if as_json else text_view(config, Path(folder), console)
    reader = _Reader(view, None if as_json else console)
    try:
        with closing(view):
            end = service.follow(job_id, reader)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{job_id} goes on\n\nnext\n" + "\n".join(_next(job_id, address, ("logs", "stop"))), err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    _close(view, reader, end, job_id, folder, address)
    if end.exit_code:
        raise typer.Exit(end.exit_code)


def _close(
    view: LiveView | PlainView | JsonView,
    reader: _Reader,
    end: JobEnd,
    job_id: str,
    folder: str,
    address: str | None,
) -> None:
    """How it ended, where its results are and what to do next."""
    if end.exit_code and end.status != "stopped":
        for line in reader.text[-KEPT:] or end.message.strip().splitlines()[-KEPT:]:
            typer.echo(line, err=True)
    rounds = f" after round {reader.last.round}" if reader.last is not None else ""
    lines = [f"{job_id}: {end.status}{rounds}", f"  results     {folder} on the head", "next"]
    lines += _next(job_id, address, ("logs",) if end.status == "succeeded" else ("resume", "logs"))
    view.say(lines)


def _next(job_id: str, address: str | None, verbs: tuple[str, ...]) -> list[str]:
    where = ["--address", address] if address is not None else []
    commands = {
        "logs": ["xcloud", "logs", job_id],
        "stop": ["xcloud", "stop", job_id],
        "resume": ["xcloud", "submit", "JOB", "--resume", job_id],
    }
    return [f"  {shlex.join([*commands[verb], *where])}" for verb in verbs]


class _Reader:
    """Hands the records of a log on to a view, and keeps what is text."""

    def __init__(self, view: LiveView | PlainView | JsonView, console: Console | None) -> None:
        self._view, self._console = view, console
        self._read: Callable[[str], dict[str, Any] | None] | None = None
        self.text: list[str] = []
        self.last: RoundRow | None = None

    def __call__(self, line: str) -> None:
        from xcloud.cloud.jobs import record_of  # noqa: PLC0415 - as above

        record = record_of(line)
        if record is None:
            if line.strip():
                self.text = [*self.text[-5 * KEPT :], line]
            return
        kind = record.pop("kind")
        if kind == "round":
            self.last = RoundRow.model_validate(record)
            self._view.on_round(self.last)
        elif kind == "progress":
            self._view.on_progress(Progress.model_validate(record))
        else:
            self._view.on_event(Event(float(record.pop("time")), kind, record))


def _inside(job: Path, working_dir: Path) -> PurePosixPath:
    """The job file's path in the working directory.

    Raises:
        ConfigError: one of them is not there, or the job lies outside.
    """
    if not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: no such folder")
    try:
        return PurePosixPath(job.resolve().relative_to(working_dir.resolve()).as_posix())
    except ValueError:
        raise ConfigError(
            f"{job} lies outside the working directory {working_dir.resolve()}, which is all that is sent; give --working-dir"
        ) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(to_plain(value), allow_nan=False))

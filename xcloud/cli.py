"""The `xcloud` command. It only wires: job file, run folder, view and signals around the driver."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from xcloud import __version__
from xcloud.clusters_cli import clusters
from xcloud.cost.bill import Spent
from xcloud.errors import ConfigError, XCloudError
from xcloud.jobs_cli import jobs, logs, stop, submit
from xcloud.keys_cli import keys
from xcloud.messages import Progress
from xcloud.metrics import Event, RoundRow, RunLog, holds_run, read_rounds, to_plain
from xcloud.plan_cli import plan
from xcloud.quiet import apply_quiet
from xcloud.registry import nearest
from xcloud.report import (
    JsonView,
    LiveView,
    PlainView,
    closing_lines,
    job_record,
    job_summary,
    status_record,
    status_view,
    text_view,
)

if TYPE_CHECKING:
    from xcloud.config import JobConfig

__all__ = ["app", "main"]

RUNS = Path("runs")
INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turns xcloud's own errors into one message and an exit code: 2 for a wrong job or usage, else 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except XCloudError as error:
            if os.environ.get("XCLOUD_TRACEBACK") == "1":
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Train one language model across cloud regions that never exchange their data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(keys, name="keys")
for command in (plan, submit, jobs, logs, stop):
    app.command()(command)
app.add_typer(clusters, name="clusters")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or its name under runs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Override a key of the job: inner.steps=50. Repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON on standard output, and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xcloud {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/NAME, or runs/NAME-2 and so on.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue a run from its last checkpoint: its folder, or its name under runs/.",
        ),
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop with a checkpoint after round N.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join. Default: RAY_ADDRESS, or a new one on this machine."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Join a cluster over the network without TLS and token. Default: refuse."
        ),
    ] = False,
    as_json: Json = False,
    progress: Annotated[
        bool, typer.Option("--progress", hidden=True, help="With --json: steps, too.")
    ] = False,
) -> None:
    """Train a job."""
    began = time.monotonic()
    config = _load(job, overrides)
    command = [str(job), *(word for override in overrides or () for word in ("--set", override))]
    folder = _run_folder(config.name, command, run_dir, resume)
    view = (
        JsonView(progress=progress)
        if as_json
        else text_view(config, folder, Console(file=sys.stdout, highlight=False))
    )
    signals = _Signals(view)
    with closing(view), RunLog(folder, [view, signals]) as log:
        # Here, because it loads Ray: `xcloud --help` should not wait for that, and the view already shows.
        from xcloud.launch import train as play  # noqa: PLC0415

        try:
            with signals, _kept_apart(folder / "ray.log"):
                outcome = play(
                    config,
                    run_dir=folder,
                    log=log,
                    address=address,
                    resume=resume is not None,
                    stop=signals.stop,
                    stop_after=stop_after,
                    insecure=insecure,
                )
        except (XCloudError, KeyboardInterrupt):
            view.close()
            if signals.checkpoint is not None:
                again = shlex.join(["xcloud", "train", *command, "--resume", str(folder)])
                typer.echo(f"round {signals.checkpoint} is saved; continue with: {again}", err=True)
            raise
    view.say(
        closing_lines(
            run_dir=folder,
            job_arguments=command,
            rows=read_rounds(folder),
            rounds=config.rounds,
            finished=outcome.finished,
            reason=outcome.reason,
            eval_loss_start=outcome.eval_loss_start,
            eval_loss_end=outcome.eval_loss_end,
            seconds=time.monotonic() - began,
            cost=Spent.kept(folder),
            budget_usd=config.cost.budget_usd if config.cost is not None else None,
        )
    )
    if not outcome.finished:
        if outcome.reason == "budget":
            typer.echo(
                f"error: {folder}: another round would exceed cost.budget_usd; the run is saved: raise it and resume",
                err=True,
            )
            raise typer.Exit(1)
        if signals.stop.is_set():
            raise typer.Exit(INTERRUPTED)
        if stop_after is None:
            raise typer.Exit(1)


@app.command()
def validate(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a job file and show what it amounts to. Starts nothing."""
    config = _load(job, overrides)
    # Here, because it loads the job file's parts, and `xcloud --help` should not wait for that.
    from xcloud.billing import tariff  # noqa: PLC0415

    tariff(config)
    if as_json:
        _print_json({"valid": True, **job_record(config)})
        return
    _console().print(job_summary(config))
    typer.echo(f"\n{job} is valid")


@app.command()
def status(run: RunName, as_json: Json = False) -> None:
    """Show how a run stands, from its folder alone."""
    folder = _find_run(run)
    if as_json:
        _print_json(status_record(folder))
        return
    _console().print(status_view(folder))


@app.command()
def export(
    run: RunName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    round_: Annotated[
        int | None, typer.Option("--round", min=1, metavar="N", help="A kept round. Default: the last one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's model as a Hugging Face folder."""
    folder = _find_run(run)
    # Here, because it loads torch, and `xcloud --help` should not wait for that.
    from xcloud.export import export_run  # noqa: PLC0415

    summary = export_run(folder, out, round=round_)
    if as_json:
        _print_json(asdict(summary))
        return
    path = str(summary.out)
    typer.echo(f"round {summary.round}, {summary.parameters:,} parameters, in {path}\n")
    typer.echo("from transformers import AutoModelForCausalLM, AutoTokenizer")
    typer.echo(
        f"model, tok = AutoModelForCausalLM.from_pretrained({path!r}), AutoTokenizer.from_pretrained({path!r})"
    )
    typer.echo('print(tok.decode(model.generate(**tok("def ", return_tensors="pt"), max_new_tokens=64)[0]))')


class _Signals:
    """Stops a run on SIGINT or SIGTERM: the first ends it after its round, the second at once.

    It listens to the run as well: Ray replaces the SIGTERM handler when it starts, so
    the handlers are put back whenever the driver reports something.
    """

    def __init__(self, view: LiveView | PlainView | JsonView) -> None:
        self.stop = threading.Event()
        self.checkpoint: int | None = None  # last round saved since the start
        self._view = view
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_event(self, event: Event) -> None:
        if event.kind == "checkpoint_committed":
            self.checkpoint = event.fields["round"]
        elif event.kind == "run_started":
            self.checkpoint = event.fields.get("resumed_round")
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                if signal.getsignal(number) != self._handle:
                    signal.signal(number, self._handle)

    def on_round(self, row: RoundRow) -> None:
        """Nothing: a round counts once its checkpoint is committed."""

    def on_progress(self, progress: Progress) -> None:
        """Nothing: steps neither stop nor save a run."""

    def close(self) -> None:
        """Nothing is held open."""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()
        self._view.stopping()


def _load(path: Path, overrides: list[str] | None) -> JobConfig:
    # Here, because it loads numpy and fsspec, and `xcloud --help` should not wait for that.
    from xcloud.config import load_job  # noqa: PLC0415

    return load_job(path, overrides or ())


@contextmanager
def _kept_apart(path: Path) -> Iterator[None]:
    """Standard output into a file: Ray prints its raylets' complaints there, and they must not tear the view."""
    with path.open("a", encoding="utf-8") as chatter, redirect_stdout(chatter):
        try:
            yield
        finally:
            if chatter.tell() == 0:
                path.unlink()


def _run_folder(name: str, command: list[str], run_dir: Path | None, resume: str | None) -> Path:
    """The folder of the run to start or to continue.

    Raises:
        ConfigError: it cannot be used; says what to do instead.
    """
    if resume is not None:
        if run_dir is not None:
            raise ConfigError("--resume continues in the run's own folder; leave --run-dir out")
        return _find_run(resume)
    if run_dir is not None:
        run_dir = run_dir.expanduser()
        if holds_run(run_dir):
            again = shlex.join(["xcloud", "train", *command, "--resume", str(run_dir)])
            raise ConfigError(
                f"{run_dir} already holds a run; continue it with `{again}`, or choose another folder"
            )
        return run_dir
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir() or any(folder.iterdir()):
                continue
        return folder
    raise AssertionError("unreachable: the count never ends")


def _find_run(run: str) -> Path:
    """The folder of an existing run, from its path or its name under `runs/`.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    path = Path(run).expanduser()
    for folder in (path, RUNS / run):
        if holds_run(folder):
            return folder
    known = sorted(folder.name for folder in RUNS.iterdir() if holds_run(folder)) if RUNS.is_dir() else []
    guess = nearest(path.name, known)
    hint = (
        f"; did you mean {str(RUNS / guess)!r}?"
        if guess
        else f"; known runs: {', '.join(known)}"
        if known
        else ""
    )
    raise ConfigError(f"{run}: no run there, nor under {RUNS}/{hint}")


def _console() -> Console:
    """Standard output; wide enough for a table when it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(to_plain(value), allow_nan=False))


def main() -> None:
    """Entry point of `xcloud` and `python -m xcloud`."""
    apply_quiet()
    sys.path.insert(0, str(Path.cwd()))  # where a job's `plugins` are looked for, as with `python -m`
    app()

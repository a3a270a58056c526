"""What a person sees of a run, and what a script reads of it.

`Board` keeps the state that the driver's events describe. `LiveView` draws it on a terminal,
`PlainView` writes a line for each thing worth a line, `JsonView` writes JSON lines. The
functions below turn numbers and run folders into text.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from xcloud.messages import Progress
from xcloud.metrics import Event, RoundRow, read_events, read_rounds, run_state

if TYPE_CHECKING:
    from xcloud.config import JobConfig

__all__ = [
    "Board",
    "JsonView",
    "LiveView",
    "PlainView",
    "closing_lines",
    "event_line",
    "human_bytes",
    "human_clock",
    "human_count",
    "human_loss",
    "human_seconds",
    "job_record",
    "job_summary",
    "round_line",
    "status_record",
    "status_view",
    "text_view",
]

STOPPING = "stopping after this round; press Ctrl-C again to stop now (the last checkpoint stays)"
SIMULATION = "simulation: all regions share this cluster; nothing isolates them"
NOTICES = 3


# Numbers


def human_bytes(count: float) -> str:
    """`3.1 MB`: decimal units, as clouds bill them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        digits = 0 if unit == "B" or count >= 99.95 else 1
        if round(count, digits) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.{digits}f} {unit}"


def human_count(count: float) -> str:
    """`950`, `5.8k`, `58k`, `1.2M`."""
    if not math.isfinite(count):
        return "-"
    for unit in ("", "k", "M", "G", "T"):
        digits = 0 if not unit or count >= 9.95 else 1
        if round(count, digits) < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.{digits}f}{unit}"


def human_seconds(seconds: float) -> str:
    """`6.1 s`, `42 s`, `2 m 05 s`, `1 h 02 m`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def human_clock(seconds: float) -> str:
    """`0:41`, `1:02:03`."""
    whole = max(0, int(seconds))
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole % 3600 // 60:0{2 if hours else 1}d}:{whole % 60:02d}"


def human_loss(loss: float | None) -> str:
    """`2.41`, below one `0.241`, and `-` for a loss that does not exist."""
    if loss is None or not math.isfinite(loss):
        return "-"
    return f"{loss:.{2 if abs(loss) >= 1 else 3}f}"


# Lines


def round_line(row: RoundRow, rounds: int, width: int | None = None) -> str:
    """One committed round on one line, shortened from its end to fit `width`."""
    parts = [
        f"round {row.round}/{rounds}",
        f"train {human_loss(row.train_loss)}",
        f"eval {human_loss(row.eval_loss)}",
        f"{human_count(row.tokens)} tokens",
        f"up {human_bytes(row.bytes_up)}",
        f"down {human_bytes(row.bytes_down)}",
        f"compute {human_seconds(row.compute_s)}",
        f"sync {human_seconds(row.sync_s)}",
    ]
    while width is not None and len(parts) > 3 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def event_line(event: Event) -> str | None:
    """An event worth a line of its own: a region that is ready, a failure, a retry."""
    get = event.fields.get
    region, number = get("region"), get("round")
    if event.kind == "region_starting":
        if get("attempt", 1) == 1:
            return f"{region}: loading torch, DeepSpeed"
        return f"{region}: restarting (start {get('attempt')})"
    if event.kind == "region_ready":
        return _ready_line(event.fields)
    if event.kind == "region_failed":
        return f"{region} lost in round {number}: {_one_line(get('reason'))}"
    if event.kind == "region_gone":
        return f"{region} is gone for good after {get('restarts')} restarts"
    if event.kind == "region_late":
        return f"{region} missed the deadline of round {number}"
    if event.kind == "region_rejoined":
        return f"{region} rejoined before round {number}"
    if event.kind == "round_retried":
        return f"round {number} tried again (attempt {get('attempt')}): {_one_line(get('reason'))}"
    if event.kind == "round_skipped":
        return f"round {number} skipped: {_one_line(get('reason'))}"
    return None


NOTICE_KINDS = {
    "region_failed",
    "region_gone",
    "region_late",
    "region_rejoined",
    "round_retried",
    "round_skipped",
}


def _ready_line(fields: Mapping[str, Any]) -> str:
    parts = [f"{human_count(fields.get('parameters') or 0)} parameters"]
    for pool in fields.get("pools") or ():
        devices = ", ".join(sorted({str(rank["device"]) for rank in pool}))
        states = [rank["optimizer_state_bytes"] for rank in pool]
        each = human_bytes(max(states)) + (" each" if len(states) > 1 else "")
        parts.append(f"{len(pool)} x {devices}, optimizer state {each}")
    if fields.get("eval_loss") is not None:
        parts.append(f"eval {human_loss(fields['eval_loss'])}")
    seconds = human_seconds(fields.get("seconds") or 0.0)
    return f"{fields.get('region')} ready in {seconds}: " + "; ".join(parts)


def _one_line(reason: object) -> str:
    lines = str(reason or "").strip().splitlines()
    return lines[0] if lines else "no reason given"


def closing_lines(
    *,
    run_dir: Path,
    job_file: str,
    rows: Sequence[RoundRow],
    rounds: int,
    finished: bool,
    reason: str,
    eval_loss_start: float | None,
    eval_loss_end: float | None,
    seconds: float,
) -> list[str]:
    """What a run came to, where its results are and what to do next.

    Args:
        run_dir: the run folder, as the user may type it.
        job_file: the job file, as the user typed it.
        rows: all committed rounds.
        rounds: rounds the job asks for.
        finished: whether all of them were played.
        reason: why not, otherwise.
        eval_loss_start: of the global model before training.
        eval_loss_end: after the last committed round.
        seconds: wall time of this start.
    """
    last = rows[-1].round if rows else 0
    run = shlex.quote(str(run_dir))
    if finished:
        head = f"finished {rounds} rounds in {human_seconds(seconds)}"
    else:
        head = f"stopped after round {last}/{rounds} ({reason or 'stopped'}), {human_seconds(seconds)}"
    lines = [
        head,
        f"  eval loss   {_fall(eval_loss_start, eval_loss_end)}",
        f"  trained on  {human_count(sum(row.tokens for row in rows))} tokens",
        f"  network     {human_bytes(sum(row.bytes_up for row in rows))} up, "
        f"{human_bytes(sum(row.bytes_down for row in rows))} down",
        f"  results     {run}",
        "next",
    ]
    if not finished:
        lines.append(f"  xcloud train {shlex.quote(job_file)} --resume {run}")
    lines.append(f"  xcloud status {run}")
    if rows:
        lines += [
            f"  xcloud export {run} OUT",
            f"  tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}",
        ]
    return lines


def _fall(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return "not measured"
    text = f"{human_loss(start)} -> {human_loss(end)}"
    if start and end is not None and math.isfinite(start) and math.isfinite(end):
        text += f" ({100 * (end - start) / start:+.0f} %)"
    return text


# A run that is under way


@dataclass
class RegionStand:
    """Where one region stands, as far as it has been told. Bytes are totals of the run."""

    cloud: str
    state: str = "waiting"
    since: float = 0.0
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Board:
    """The state of a run, built from what the driver reports."""

    def __init__(self, job: JobConfig, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.job = job
        self.run_dir = run_dir
        self.clock = clock
        self.regions = {region.name: RegionStand(region.cloud) for region in job.regions}
        self.rounds = job.rounds
        self.round = 0
        self.attempt = 1
        self.committed = 0
        self.phase = "starting Ray"
        self.simulation = False
        self.stopping = False
        self.notices: tuple[str, ...] = ()
        self.began = clock()
        self.round_began: float | None = None
        self._played: list[float] = []  # seconds of the last rounds

    def on_event(self, event: Event) -> None:
        change = getattr(self, f"_{event.kind}", None)
        if change is not None:
            change(event)
        if event.kind in NOTICE_KINDS:
            self.notices = (*self.notices, event_line(event) or "")[-NOTICES:]

    def on_round(self, row: RoundRow) -> None:
        for name, region in row.regions.items():
            stand = self.regions[name]
            stand.tokens_per_s, stand.train_loss = region.tokens_per_s, region.train_loss
            if region.eval_loss is not None:
                stand.eval_loss = region.eval_loss
            stand.bytes_up += region.bytes_up
            stand.bytes_down += region.bytes_down
            stand.state = "ready"
        self.committed, self.phase = row.round, "checkpointing"
        if self.round_began is not None:
            self._played = [*self._played, self.clock() - self.round_began][-5:]
            self.round_began = None

    def on_progress(self, progress: Progress) -> None:
        stand = self.regions[progress.region]
        if progress.round != self.round or stand.state != "training":
            return  # an answer that came too late
        stand.step, stand.steps = progress.step, progress.steps
        if progress.tokens:
            stand.tokens_per_s = progress.tokens_per_s
        if progress.loss is not None:
            stand.train_loss = progress.loss

    @property
    def done(self) -> float:
        """Rounds done, with the steps of the current one as its fraction."""
        if self.round <= self.committed:
            return float(self.committed)
        shares = [
            1.0 if stand.state != "training" else stand.step / stand.steps if stand.steps else 0.0
            for stand in self.regions.values()
            if stand.state in ("training", "done", "applying")
        ]
        return self.committed + (0.95 * sum(shares) / len(shares) if shares else 0.0)

    @property
    def left_s(self) -> float | None:
        """Seconds left, judged by the last rounds; None before there is one."""
        if not self._played:
            return None
        each = sum(self._played) / len(self._played)
        spent = 0.0 if self.round_began is None else min(each, self.clock() - self.round_began)
        return max(0.0, each * (self.rounds - self.committed) - spent)

    def _set(self, name: str, state: str, event: Event) -> None:
        stand = self.regions[name]
        stand.state, stand.since = state, event.time

    def _run_started(self, event: Event) -> None:
        self.simulation = bool(event.fields.get("simulation"))
        self.committed = event.fields.get("resumed_round") or 0
        for row in read_rounds(self.run_dir) if self.committed else ():
            self.on_round(row)
        self.phase = "starting regions"

    def _region_starting(self, event: Event) -> None:
        first = event.fields.get("attempt", 1) == 1
        self._set(event.fields["region"], "starting" if first else "restarting", event)

    def _region_ready(self, event: Event) -> None:
        self._set(event.fields["region"], "ready", event)
        if event.fields.get("eval_loss") is not None:
            self.regions[event.fields["region"]].eval_loss = event.fields["eval_loss"]

    def _round_started(self, event: Event) -> None:
        self.round, self.attempt = event.fields["round"], event.fields.get("attempt", 1)
        if self.round_began is None:
            self.round_began = self.clock()
        for name in event.fields.get("regions", ()):
            self._set(name, "training", event)
            self.regions[name].step = 0
            self.regions[name].steps = self.job.inner.steps
        self.phase = "training"

    def _region_finished(self, event: Event) -> None:
        self._set(event.fields["region"], "done", event)
        self.regions[event.fields["region"]].train_loss = event.fields.get("train_loss")
        if not any(stand.state == "training" for stand in self.regions.values()):
            self.phase = "merging"

    def _region_failed(self, event: Event) -> None:
        self._set(event.fields["region"], "lost", event)

    def _region_gone(self, event: Event) -> None:
        self._set(event.fields["region"], "gone", event)

    def _region_late(self, event: Event) -> None:
        self._set(event.fields["region"], "late", event)

    def _region_rejoined(self, event: Event) -> None:
        self._set(event.fields["region"], "ready", event)

    def _round_merged(self, event: Event) -> None:
        for name, stand in self.regions.items():
            if stand.state in ("done", "training"):
                self._set(name, "applying", event)
        self.phase = "applying"

    def _round_skipped(self, event: Event) -> None:
        del event
        self.round_began, self.phase = None, "skipped"

    def _checkpoint_committed(self, event: Event) -> None:
        del event
        self.phase = "committed"

    def _stop_requested(self, event: Event) -> None:
        del event
        self.stopping = True

    def _run_stopped(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "stopped", False

    def _run_failed(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "failed", False

    def _run_finished(self, event: Event) -> None:
        del event
        self.phase, self.stopping = "finished", False


class LiveView:
    """Draws the board on a terminal; a line for each region that is ready and each round scrolls above it."""

    def __init__(self, job: JobConfig, run_dir: Path, console: Console) -> None:
        self.board = Board(job, run_dir)
        self._console = console
        self._spinner = Spinner("dots" if "utf" in console.encoding.lower() else "line", style="cyan")
        # Four frames a second: on a small machine, drawing competes with training.
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4)
        self._live.start()

    def on_event(self, event: Event) -> None:
        self.board.on_event(event)
        if event.kind == "region_ready":
            self._console.print(Text(event_line(event) or "", style="dim"))

    def on_round(self, row: RoundRow) -> None:
        self.board.on_round(row)
        self._console.print(Text(round_line(row, self.board.rounds, self._console.width)))

    def on_progress(self, progress: Progress) -> None:
        self.board.on_progress(progress)

    def stopping(self) -> None:
        """Say that the run stops after this round. Called by a signal handler: it must not write."""
        self.board.stopping = True

    def say(self, lines: Iterable[str]) -> None:
        """Write lines below what has been shown."""
        _say(self._console, lines)

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The live part of the screen."""
        board = self.board
        parts: list[RenderableType] = [Text("")]
        parts.append(Text.assemble((board.job.name, "bold"), "  ", (str(board.run_dir), "dim"), overflow="ellipsis"))
        if board.simulation:
            parts.append(Text(SIMULATION, style="yellow"))
        parts += [self._bar(), self._phase(), Text(""), self._table()]
        parts += [Text(f"! {notice}", style="red", no_wrap=True, overflow="ellipsis") for notice in board.notices]
        if board.stopping:
            parts.append(Text(STOPPING, style="bold yellow"))
        return Group(*parts)

    def _bar(self) -> RenderableType:
        board = self.board
        left = board.left_s
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        ending = board.phase in ("finished", "stopped", "failed")
        clock = f"{human_clock(board.clock() - board.began)} elapsed"
        if left is not None and not ending:
            clock += f", {human_clock(left)} left"
        grid.add_row(
            f"round {max(board.round, board.committed)}/{board.rounds}",
            ProgressBar(total=board.rounds, completed=board.done),
            clock,
        )
        return grid

    def _phase(self) -> RenderableType:
        board = self.board
        text = board.phase
        if text == "starting regions":
            waiting = [name for name, stand in board.regions.items() if stand.state == "starting"]
            if waiting:
                text = f"{', '.join(waiting)}: loading torch, DeepSpeed"
        elif text == "training":
            training = sum(stand.state == "training" for stand in board.regions.values())
            text = f"training in {training} region{'s' if training != 1 else ''}"
            if board.attempt > 1:
                text += f", attempt {board.attempt}"
        elif text == "merging":
            text = "merging the regions' updates"
        elif text == "applying":
            text = "applying the merged update, evaluating"
        if board.phase in ("finished", "stopped", "failed"):
            return Text(text, style="bold green" if board.phase == "finished" else "bold yellow")
        self._spinner.update(text=Text(text, no_wrap=True, overflow="ellipsis"))
        return self._spinner

    def _table(self) -> RenderableType:
        roomy = self._console.width >= 90
        table = Table(box=None, padding=(0, 2 if roomy else 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("region", no_wrap=True, overflow="ellipsis", min_width=8)
        table.add_column("cloud", no_wrap=True, overflow="ellipsis")
        table.add_column("state", no_wrap=True, min_width=15)
        for name in ("tok/s", "train", "eval"):
            table.add_column(name, no_wrap=True, justify="right", min_width=5)
        for name in ("up", "down"):
            table.add_column(name, no_wrap=True, justify="right", min_width=8)
        for name, stand in self.board.regions.items():
            rate = "-" if stand.tokens_per_s is None else human_count(stand.tokens_per_s)
            table.add_row(
                name,
                stand.cloud,
                self._state(stand),
                rate,
                human_loss(stand.train_loss),
                human_loss(stand.eval_loss),
                human_bytes(stand.bytes_up),
                human_bytes(stand.bytes_down),
            )
        return table

    def _state(self, stand: RegionStand) -> Text:
        text, style = stand.state, ""
        if stand.state == "training":
            text, style = f"training {stand.step}/{stand.steps}", "green"
        elif stand.state in ("starting", "restarting"):
            text, style = f"{stand.state} {human_clock(self.board.clock() - stand.since)}", "cyan"
        elif stand.state == "done":
            text = "merging" if self.board.phase == "merging" else "done, waits"
        elif stand.state == "applying":
            text = "evaluating"
        elif stand.state in ("lost", "late", "gone"):
            style = "bold red"
        return Text(text, style=style)


class PlainView:
    """Writes a line for each thing worth one: for pipes, log files and `ray job submit`."""

    def __init__(self, job: JobConfig, run_dir: Path, console: Console) -> None:
        self._job = job
        self._console = console
        regions = len(job.regions)
        self.say(
            [
                f"{job.name}: {regions} region{'s' if regions != 1 else ''}, {job.rounds} rounds, run folder {run_dir}",
                "starting Ray",
            ]
        )

    def on_event(self, event: Event) -> None:
        if event.kind == "run_started":
            if event.fields.get("resumed_round"):
                self.say([f"resuming after round {event.fields['resumed_round']}"])
            if event.fields.get("simulation"):
                self.say([SIMULATION])
        line = event_line(event)
        if line is not None:
            self.say([line])

    def on_round(self, row: RoundRow) -> None:
        self.say([round_line(row, self._job.rounds)])

    def on_progress(self, progress: Progress) -> None:
        """Nothing: a line for each step would drown the rest."""

    def stopping(self) -> None:
        _write_from_signal_handler(STOPPING)

    def say(self, lines: Iterable[str]) -> None:
        _say(self._console, lines)

    def close(self) -> None:
        """Nothing is held open."""


class JsonView:
    """Writes each event and each round as one JSON object on one line; a round has the kind `round`."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream

    def on_event(self, event: Event) -> None:
        self._write(event.to_json())

    def on_round(self, row: RoundRow) -> None:
        self._write('{"kind":"round",' + row.model_dump_json()[1:])

    def on_progress(self, progress: Progress) -> None:
        """Nothing: what a script needs is in the rounds."""

    def stopping(self) -> None:
        _write_from_signal_handler(STOPPING)

    def say(self, lines: Iterable[str]) -> None:
        """Nothing: the last event says how the run ended."""

    def close(self) -> None:
        """Nothing is held open."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def text_view(job: JobConfig, run_dir: Path, console: Console) -> LiveView | PlainView:
    """The view for people that fits where `console` writes to."""
    # A file check beside Rich's: FORCE_COLOR makes a pipe count as a terminal, but it cannot be redrawn.
    if console.is_interactive and console.file.isatty():
        return LiveView(job, run_dir, console)
    return PlainView(job, run_dir, console)


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        # Never wrapped: lines hold commands and paths to copy, and scripts read them.
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _write_from_signal_handler(line: str) -> None:
    """To standard error without its buffer, which the interrupted code may be writing to."""
    import os

    os.write(2, f"{line}\n".encode())


# A job, and a run judged from its folder


def job_record(job: JobConfig) -> dict[str, Any]:
    """What a job amounts to, as plain JSON types. Tokens are those of training."""
    regions = []
    for region in job.regions:
        pools = [
            {
                "accelerator": pool.accelerator,
                "workers": pool.workers,
                "zero_stage": pool.zero_stage,
                "precision": pool.precision,
                "sequences_per_step": pool.sequences_per_step,
            }
            for pool in region.pools
        ]
        tokens = region.sequences_per_step * job.sequence_length * job.inner.steps
        regions.append(
            {"name": region.name, "cloud": region.cloud, "pools": pools, "tokens_per_round": tokens}
        )
    per_round = sum(int(region["tokens_per_round"]) for region in regions)  # type: ignore[call-overload]
    return {
        "name": job.name,
        "model": job.model.pretrained or str((job.model.config or {})["model_type"]),
        "from_scratch": job.model.pretrained is None,
        "rounds": job.rounds,
        "inner_steps": job.inner.steps,
        "sequence_length": job.sequence_length,
        "regions": regions,
        "tokens_per_round": per_round,
        "tokens": per_round * job.rounds,
    }


def job_summary(job: JobConfig) -> RenderableType:
    """The same for people."""
    record = job_record(job)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("region", "cloud", "pools"):
        table.add_column(name)
    table.add_column("tokens/round", justify="right")
    for region in record["regions"]:
        pools = [
            f"{pool['workers']} x {pool['accelerator']}, ZeRO {pool['zero_stage']}, {pool['precision']}, "
            f"{pool['sequences_per_step']} seq/step"
            for pool in region["pools"]
        ]
        table.add_row(region["name"], region["cloud"], "\n".join(pools), human_count(region["tokens_per_round"]))
    origin = "from scratch" if record["from_scratch"] else "pretrained"
    return Group(
        Text.assemble((record["name"], "bold"), f"  {record['model']}, {origin}"),
        Text(
            f"{record['rounds']} rounds x {record['inner_steps']} inner steps, "
            f"{record['sequence_length']} tokens a sequence: "
            f"{human_count(record['tokens_per_round'])} tokens a round, {human_count(record['tokens'])} in all"
        ),
        Text(""),
        table,
    )


def status_record(run_dir: Path) -> dict[str, Any]:
    """How a run stands, from its folder, as plain JSON types. Tokens and bytes are totals.

    Raises:
        XCloudError: the folder holds no run, or its records are damaged.
    """
    state, events, rows = run_state(run_dir), read_events(run_dir), read_rounds(run_dir)
    ready = {event.fields["region"]: event.fields for event in events if event.kind == "region_ready"}
    names = list(dict.fromkeys([*state.started.get("regions", ()), *(n for row in rows for n in row.regions)]))
    evals = [(row.round, row.eval_loss) for row in rows if row.eval_loss is not None]
    regions = {}
    for name in names:
        mine = [row.regions[name] for row in rows if name in row.regions]
        regions[name] = {
            "tokens": sum(row.tokens for row in mine),
            "bytes_up": sum(row.bytes_up for row in mine),
            "bytes_down": sum(row.bytes_down for row in mine),
            "tokens_per_s": mine[-1].tokens_per_s if mine else None,
            "train_loss": mine[-1].train_loss if mine else None,
            "eval_loss": next((row.eval_loss for row in reversed(mine) if row.eval_loss is not None), None),
            "pools": ready.get(name, {}).get("pools", []),
        }
    checkpoints = [event.fields for event in events if event.kind == "checkpoint_committed"]
    return {
        "run": str(run_dir),
        "job": state.started.get("job"),
        "state": state.state,
        "reason": state.reason,
        "round": state.round,
        "rounds": state.rounds,
        "last_event_age_s": state.age_s,
        "host": state.started.get("host"),
        "pid": state.started.get("pid"),
        "simulation": state.started.get("simulation"),
        "train_loss": rows[-1].train_loss if rows else None,
        "first_eval": evals[0] if evals else None,
        "last_eval": evals[-1] if evals else None,
        "tokens": sum(row.tokens for row in rows),
        "bytes_up": sum(row.bytes_up for row in rows),
        "bytes_down": sum(row.bytes_down for row in rows),
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "regions": regions,
        "notices": [event_line(event) for event in events if event.kind in NOTICE_KINDS][-NOTICES:],
    }

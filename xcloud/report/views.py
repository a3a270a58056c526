"""Listeners of a run: drawn on a terminal, as plain lines, or as JSON lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from xcloud.messages import Progress
from xcloud.metrics import Event, RoundRow
from xcloud.report.board import Board, RegionStand
from xcloud.report.text import (
    CLEAR,
    SIMULATION,
    STOPPING,
    event_line,
    exposed_line,
    human_bytes,
    human_clock,
    human_count,
    human_epsilon,
    human_loss,
    human_usd,
    round_line,
)

if TYPE_CHECKING:  # the job file needs numpy and more, which `xcloud --help` should not wait for
    from xcloud.config import JobConfig

__all__ = ["JsonView", "LiveView", "PlainView", "text_view"]


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
        if event.kind in ("pool_fitted", "region_ready"):
            line = event_line(event, self._console.width) or ""
            self._console.print(Text(line, style="dim", no_wrap=True, overflow="ellipsis"))

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
        for line in ["", *lines]:
            # Never wrapped: lines hold commands and paths to copy.
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The live part of the screen."""
        board = self.board
        parts: list[RenderableType] = [Text("")]
        parts.append(
            Text.assemble((board.job.name, "bold"), "  ", (str(board.run_dir), "dim"), overflow="ellipsis")
        )
        if board.simulation:
            parts.append(Text(SIMULATION, style="yellow"))
        if board.clear:
            parts.append(Text(CLEAR, style="yellow"))
        if board.exposed:
            parts.append(Text(exposed_line(board.exposed), style="red"))
        if board.masked:
            parts.append(Text(board.masked, style="green", no_wrap=True, overflow="ellipsis"))
        parts += [self._bar(), self._phase(), *self._spent(), Text(""), self._table()]
        parts += [Text(line, style="yellow") for line in board.missing.values()]
        parts += [
            Text(f"! {notice}", style="red", no_wrap=True, overflow="ellipsis") for notice in board.notices
        ]
        if board.stopping:
            parts.append(Text(STOPPING, style="bold yellow"))
        return Group(*parts)

    def _spent(self) -> list[RenderableType]:
        """What the run has cost, and what of its budget that is."""
        cost, asked = self.board.cost, self.board.job.cost
        if cost is None:
            return []
        text = f"spent {human_usd(cost.spent_usd, whole=not cost.unpriced)}"
        if asked is not None and asked.budget_usd is not None:
            text += f" of {human_usd(asked.budget_usd)}"
        return [Text(f"{text}, {human_usd(cost.usd, whole=not cost.unpriced)} in the last round")]

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
        starting = [n for n, s in board.regions.items() if s.state in ("starting", "restarting")]
        if text == "starting regions" and starting:
            text = f"{', '.join(starting)}: loading torch, DeepSpeed"
        elif text == "training":
            training = sum(stand.state == "training" for stand in board.regions.values())
            text = f"training in {training} region{'s' if training != 1 else ''}"
            if board.attempt > 1:
                text += f", attempt {board.attempt}"
        elif text == "merging":
            text = "merging the regions' updates"
        elif text == "retrying" and starting:
            text = f"waiting for {', '.join(starting)} to come back"
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
        dp = self.board.job.dp
        if dp is not None:
            table.add_column(f"eps/{dp.unit}", no_wrap=True, justify="right")
        billed = self.board.cost is not None
        if billed:
            table.add_column("cost", no_wrap=True, justify="right", min_width=5)
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
                *([human_epsilon(stand.privacy)] if dp is not None else []),
                *([human_usd(stand.usd)] if billed else []),
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

    def __init__(self, job: JobConfig, run_dir: Path, stream: IO[str] | None = None) -> None:
        self._job = job
        self._stream = sys.stdout if stream is None else stream
        regions = f"{len(job.regions)} region{'s' if len(job.regions) != 1 else ''}"
        self.say([f"{job.name}: {regions}, {job.rounds} rounds, run folder {run_dir}", "starting Ray"])

    def on_event(self, event: Event) -> None:
        if event.kind == "run_started":
            if event.fields.get("resumed_round"):
                self.say([f"resuming after round {event.fields['resumed_round']}"])
            if event.fields.get("simulation"):
                self.say([SIMULATION])
            if event.fields.get("envelope", "made") is None:
                self.say([CLEAR])
            if event.fields.get("exposed"):
                self.say([exposed_line(event.fields["exposed"])])
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
        # Not through Rich: it answers a reader that went away with SystemExit, which would end the run.
        self._stream.writelines(f"{line}\n" for line in lines)
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held open."""


class JsonView:
    """Writes each event and each round as one JSON object on one line; a round has the kind `round`.

    Args:
        stream: where to; None: standard output.
        progress: write how far regions are, too, with the kind `progress`: for a view elsewhere.
    """

    def __init__(self, stream: IO[str] | None = None, progress: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._progress = progress

    def on_event(self, event: Event) -> None:
        self._write(event.to_json())

    def on_round(self, row: RoundRow) -> None:
        self._write('{"kind":"round",' + row.model_dump_json()[1:])

    def on_progress(self, progress: Progress) -> None:
        if self._progress:
            self._write('{"kind":"progress",' + progress.model_dump_json()[1:])

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
    return PlainView(job, run_dir, console.file)


def _write_from_signal_handler(line: str) -> None:
    """To standard error without its buffer, which the interrupted code may be writing to."""
    os.write(2, f"{line}\n".encode())

"""The run folder's records, and who is told about them.

`RunLog` writes what the driver reports, line by line, so that a crash loses one line at most:

    metrics.jsonl   one `RoundRow` per committed round
    events.jsonl    one `Event` per thing that happened
    tensorboard/    the same numbers as TensorBoard scalars

and hands each to its listeners (the live view, `--json`). A number that does not exist
(no evaluation in this round, no training step) is null in every file, never NaN.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from xcloud.cost.bill import CostRow
from xcloud.errors import XCloudError
from xcloud.messages import Message, Progress, json_safe

__all__ = [
    "Event",
    "Listener",
    "PrivacyRow",
    "RegionRow",
    "RoundRow",
    "RunLog",
    "RunState",
    "holds_run",
    "read_events",
    "read_rounds",
    "run_state",
    "to_plain",
]

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
TENSORBOARD = "tensorboard"


def _null_to_nan(value: Any) -> Any:
    return math.nan if value is None else value


def _nan_to_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Pydantic writes NaN and infinity as null; the first reads null back as NaN, the second as None.
Number = Annotated[float, BeforeValidator(_null_to_nan)]
MaybeNumber = Annotated[float | None, BeforeValidator(_nan_to_null)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrivacyRow(_Row):
    """What was released so far, under differential privacy.

    Attributes:
        unit: what epsilon protects: one `example` (a training sequence of one region) or one whole `region`.
        epsilon: spent by all rounds that were begun, of this region or, in total, of the region that spent most.
        delta: at which epsilon holds.
    """

    unit: Literal["example", "region"]
    epsilon: Number
    delta: float


class PoolRow(_Row):
    """What one pool of a region did in one round.

    Attributes:
        tokens: tokens trained on.
        compute_s: seconds of local training, of its slowest rank.
    """

    tokens: int
    compute_s: Number


class RegionRow(_Row):
    """What one region did in one round.

    Attributes:
        tokens: tokens trained on.
        train_loss: mean over this round's tokens, before the merge; NaN without training.
        eval_loss: of the merged model on this region's held-out text; None without evaluation.
        bytes_up: encoded update sent to the aggregator.
        bytes_down: encoded sum received.
        compute_s: seconds of local training.
        landing_s: seconds in the midst of training in which an earlier round's merged update was taken up.
        staleness: merges between the model that the region started from and this one.
        sync_s: seconds of everything else: encoding, transfer, merging, applying.
        update_norm: L2 norm of the update.
        cursor: position in the region's data after the round.
        privacy: None without differential privacy.
        pools: in the job's order; none in rows of runs from before they were told.
    """

    tokens: int
    train_loss: Number
    eval_loss: MaybeNumber
    tokens_per_s: Number
    bytes_up: int
    bytes_down: int
    compute_s: Number
    sync_s: Number
    update_norm: Number
    cursor: int
    landing_s: Number = 0.0
    staleness: int = 0
    privacy: PrivacyRow | None = None
    pools: tuple[PoolRow, ...] = ()


class RoundRow(_Row):
    """One committed round: totals, and a row per region that took part. Units as in `RegionRow`.

    Attributes:
        egress_bytes_up: of `bytes_up`, what crossed between clouds: all of it unless they merge inside first.
        egress_bytes_down: the same on the way down. None in rows of runs from before it was counted.
        cost: None where a run is not billed, and in rows from before it was.
    """

    round: int
    attempt: int
    train_loss: Number
    eval_loss: MaybeNumber
    tokens: int
    bytes_up: int
    bytes_down: int
    egress_bytes_up: int | None = None
    egress_bytes_down: int | None = None
    compute_s: Number
    sync_s: Number
    regions: dict[str, RegionRow]
    model_digest: str
    privacy: PrivacyRow | None = None
    cost: CostRow | None = None


@dataclass(frozen=True)
class Event:
    """One thing that happened: unix time, kind (`round_started`, ...) and JSON-safe fields."""

    time: float
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The event as one line of JSON; fields stand beside `time` and `kind`."""
        return json.dumps({"time": self.time, "kind": self.kind, **self.fields}, allow_nan=False)


class Listener(Protocol):
    """Is told about everything a run reports, in the thread that reports it."""

    def on_event(self, event: Event) -> None: ...

    def on_round(self, row: RoundRow) -> None: ...

    def on_progress(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes a run folder's records and tells the listeners.

    Opening a folder that already holds records continues them; a last line torn by a crash is dropped.

    Args:
        folder: created if missing.
        listeners: closed with the log.

    Raises:
        XCloudError: another process is writing this run.
    """

    def __init__(self, folder: str | Path, listeners: Sequence[Listener] = ()) -> None:
        self.folder = Path(folder)
        self._listeners = list(listeners)
        # Reentrant: a signal handler may report while the same thread is reporting.
        self._lock = threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events = _append(self.folder / EVENTS)
        try:
            _lock_file(self._events, self.folder)
            _drop_torn_line(self._events)
            self._metrics = _append(self.folder / METRICS)
            _drop_torn_line(self._metrics)
        except BaseException:
            self._events.close()
            raise
        self._board = _Board(self.folder / TENSORBOARD)

    def rewind(self, last: int) -> None:
        """Forget the rows of rounds after `last`, the last committed one (0: all of them).

        Raises:
            XCloudError: `metrics.jsonl` is damaged; names file and line.
        """
        path = self.folder / METRICS
        with self._lock:
            kept = [row for row in read_rounds(self.folder) if row.round <= last]
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.writelines(row.model_dump_json().encode() + b"\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._metrics.close()
            self._metrics = _append(path)
            self._board.purge(last + 1)

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened."""
        event = Event(time.time(), kind, to_plain(fields))
        with self._lock:
            self._events.write(event.to_json().encode() + b"\n")
            self._events.flush()
            self._tell("on_event", event)

    def round(self, row: RoundRow) -> None:
        """Record a committed round."""
        with self._lock:
            self._metrics.write(row.model_dump_json().encode() + b"\n")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._board.write(row)
            self._tell("on_round", row)

    def progress(self, progress: Progress) -> None:
        """Tell the listeners how far a region is; nothing is written."""
        with self._lock:
            self._tell("on_progress", progress)

    def close(self) -> None:
        """Close files and listeners. A log that was never written to leaves nothing behind."""
        with self._lock:
            for file in (self._metrics, self._events):
                if not file.closed and os.fstat(file.fileno()).st_size == 0:
                    Path(file.name).unlink(missing_ok=True)
                file.close()
            self._board.close()
            while self._listeners:
                self._listeners.pop(0).close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tell(self, method: str, argument: Event | RoundRow | Progress) -> None:
        for listener in list(self._listeners):
            try:
                getattr(listener, method)(argument)
            except OSError:
                # Its pipe or terminal is gone. That must not end a training run.
                self._listeners.remove(listener)


def read_rounds(folder: str | Path) -> list[RoundRow]:
    """The committed rounds of a run, oldest first; a torn last line is ignored.

    Raises:
        XCloudError: a line is damaged; names file and line.
    """
    path = Path(folder) / METRICS
    rows = []
    for number, line in _lines(path):
        try:
            rows.append(RoundRow.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _damaged(path, number, f"{where}: {first['msg']}" if where else first["msg"]) from None
    return rows


def read_events(folder: str | Path) -> list[Event]:
    """The events of a run, oldest first; a torn last line is ignored.

    Raises:
        XCloudError: a line is damaged; names file and line.
    """
    path = Path(folder) / EVENTS
    events = []
    for number, line in _lines(path):
        try:
            fields = json.loads(line)
            events.append(Event(float(fields.pop("time")), str(fields.pop("kind")), fields))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(path, number, "expected a JSON object with 'time' and 'kind'") from None
    return events


def holds_run(folder: str | Path) -> bool:
    """Whether a folder holds the records of a run."""
    return any((Path(folder) / name).exists() for name in (EVENTS, METRICS))


@dataclass(frozen=True)
class RunState:
    """How a run stands, judged from its folder alone.

    Attributes:
        state: `died`: its process is gone without a word; `unknown`: its process is on another
            host, or nothing was started yet.
        round: last committed round, 0 before the first.
        rounds: rounds asked for, 0 while unknown.
        age_s: seconds since the last event, None without events.
        reason: why it stopped or failed, empty otherwise.
        started: fields of the last `run_started` event.
    """

    state: Literal["running", "finished", "stopped", "failed", "died", "unknown"]
    round: int
    rounds: int
    age_s: float | None
    reason: str
    started: Mapping[str, Any]


def run_state(folder: str | Path) -> RunState:
    """Judge how the run in `folder` stands.

    Raises:
        XCloudError: the folder holds no run, or its records are damaged.
    """
    if not holds_run(folder):
        raise XCloudError(f"{folder}: no run here; expected a folder with {EVENTS}")
    events, rows = read_events(folder), read_rounds(folder)
    begins = [i for i, event in enumerate(events) if event.kind == "run_started"]
    started = events[begins[-1]].fields if begins else {}
    state: Literal["running", "finished", "stopped", "failed", "died", "unknown"] = "unknown"
    reason = ""
    endings = [event for event in events[begins[-1] if begins else 0 :] if event.kind in _ENDINGS]
    if endings:
        state = _ENDINGS[endings[-1].kind]
        reason = str(endings[-1].fields.get("reason", ""))
    elif started.get("host") == socket.gethostname() and isinstance(started.get("pid"), int):
        state = "running" if _alive(started["pid"]) else "died"
    return RunState(
        state=state,
        round=rows[-1].round if rows else 0,
        rounds=int(started.get("rounds", 0)),
        age_s=max(0.0, time.time() - events[-1].time) if events else None,
        reason=reason,
        started=started,
    )


_ENDINGS: dict[str, Literal["finished", "stopped", "failed"]] = {
    "run_finished": "finished",
    "run_stopped": "stopped",
    "run_failed": "failed",
}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a killed process whose parent has not noticed yet still has a pid
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _append(path: Path) -> IO[bytes]:
    return path.open("a+b")


def _lock_file(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise XCloudError(
            f"{folder}: another process is writing this run; stop it first, or choose another run folder"
        ) from None
    except OSError:
        pass  # a file system without locks


def _drop_torn_line(file: IO[bytes]) -> None:
    """Cut off a last line without its newline, unless only the newline is missing."""
    file.seek(0)
    whole, _, last = file.read().rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        file.truncate(len(whole) + 1 if whole else 0)
    else:
        file.write(b"\n")
        file.flush()


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered lines of a JSON-lines file without a torn last one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    *lines, last = data.split(b"\n")
    if last:
        try:
            json.loads(last)
        except ValueError:
            pass
        else:
            lines.append(last)
    return list(enumerate(lines, start=1))


def _damaged(path: Path, line: int, why: str) -> XCloudError:
    return XCloudError(f"{path}:{line}: damaged record: {why}; restore the file, or delete that line")


def to_plain(value: Any) -> Any:
    """`value` as plain JSON types; what JSON does not know becomes its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _nan_to_null(float(value))
    if isinstance(value, Message):
        return to_plain(json_safe(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    return str(value)


class _Board:
    """TensorBoard event files: one for each time the run was started, created with its first record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def purge(self, step: int) -> None:
        """Have readers forget what earlier files say about `step` and later."""
        if self._writer is not None or self.folder.exists():
            self._write(step, session_log={"status": "START"})

    def write(self, row: RoundRow) -> None:
        values = [
            {"tag": tag, "simple_value": value}
            for tag, value in _scalars(row).items()
            if value is not None and math.isfinite(value)
        ]
        self._write(row.round, summary={"value": values})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        # Here, because it takes half a second to load and `xcloud --help` should not wait for it.
        from tensorboard.compat.proto.event_pb2 import Event as Record  # noqa: PLC0415
        from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            count = len(list(self.folder.iterdir()))  # readers go through the files in name order
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{count:06d}"
            self._writer = RecordWriter(_append(self.folder / name))
            head = Record(wall_time=time.time(), file_version="brain.Event:2")
            self._writer.write(head.SerializeToString())
        self._writer.write(Record(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()


def _scalars(row: RoundRow) -> dict[str, float | None]:
    scalars: dict[str, float | None] = {
        "loss/train": row.train_loss,
        "loss/eval": row.eval_loss,
        "tokens": row.tokens,
        "egress/up": row.egress_bytes_up,
        "egress/down": row.egress_bytes_down,
        "bytes/up": row.bytes_up,
        "bytes/down": row.bytes_down,
        "seconds/compute": row.compute_s,
        "seconds/sync": row.sync_s,
    }
    if row.cost is not None:
        scalars |= {
            "cost/machines_usd": row.cost.machines_usd,
            "cost/egress_usd": row.cost.egress_usd,
            "cost/spent_usd": row.cost.spent_usd,
        }
        for name, part in row.cost.regions.items():
            scalars |= {f"{name}/cost/{key}": value for key, value in part.model_dump().items()}
    if row.privacy is not None:
        scalars[f"epsilon/{row.privacy.unit}"] = row.privacy.epsilon
    for name, region in row.regions.items():
        numbers = region.model_dump(exclude={"cursor", "privacy", "pools"})
        if region.privacy is not None:
            numbers[f"epsilon/{region.privacy.unit}"] = region.privacy.epsilon
        scalars.update({f"{name}/{key}": value for key, value in numbers.items()})
    return scalars

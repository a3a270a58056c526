"""What a region must remember over a crash, or it could be made to say twice what is safe to say once.

Three promises rest on it (`secure.member.Memory`). A plan is taken up once, and never one before the last. One set of survivors is
signed for each plan: with signatures over two, an aggregator could have both secrets of a region opened. Shares are given
away once for a plan, and to one set of survivors in each round: the difference of two sums would be somebody's update.
(Bonawitz et al. 2017, eprint 2017/281, section 6.2.)

The file has one line for each promise: a chained checksum, a space, JSON. A line is on the disk before the call returns, so
before anything is sent. A last line without its end was being written in a crash, so nothing was sent for it, and it is
cut off. Anything else that does not fit is an error: a region that has forgotten must not go on. The checksum finds
accidents; against somebody who can write the file nothing here helps.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xcloud.errors import JournalError, ReplayError
from xcloud.secure.files import check_private, explain, parse_json, sync_folder

__all__ = ["Journal"]

LINE_BYTES = 1 << 20
"""A line has at most so many; a longer one is damage, and is not read into memory."""
SUM_DIGITS = 32
POLL_S = 0.1

Text = Annotated[str, Field(min_length=1, max_length=256)]
Number = Annotated[int, Field(ge=0, lt=1 << 63)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{2,128}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Begin(_Entry):
    """The first line."""

    kind: Literal["begin"] = "begin"
    version: Literal[1] = 1
    region: Text


class _Accept(_Entry):
    kind: Literal["accept"] = "accept"
    job: Text
    start: Number
    round: Number
    attempt: Number

    @property
    def place(self) -> tuple[int, int, int]:
        return self.start, self.round, self.attempt


class _Agree(_Entry):
    kind: Literal["agree"] = "agree"
    plan: Hex
    survivors: Hex


class _Unmask(_Entry):
    kind: Literal["unmask"] = "unmask"
    job: Text
    round: Number
    plan: Hex
    names: Annotated[tuple[Text, ...], Field(strict=False, max_length=4096)]


_Promise = _Accept | _Agree | _Unmask


class _Line(_Entry):
    """What stands behind the checksum."""

    entry: Annotated[_Begin | _Accept | _Agree | _Unmask, Field(discriminator="kind")]


class Journal:
    """The memory of one region, in a file that one process at a time may use.

    Args:
        path: the file; made for its owner alone if there is none. Its folder exists.
        region: whose memory it is.
        wait_s: seconds to wait for another process to let it go, which may be on its way out.

    Raises:
        JournalError: it is open to others, in use, another region's, damaged, or cannot be read; names the file.
    """

    def __init__(self, path: Path, region: str, wait_s: float = 0.0) -> None:
        self.path = path
        self.region = region
        self._wait_s = wait_s
        self._last: dict[str, tuple[int, int, int]] = {}  # by job
        self._agreed: dict[str, str] = {}  # by plan
        self._given: set[str] = set()  # plans
        self._opened: dict[tuple[str, int], tuple[str, ...]] = {}  # by job and round
        self._sum = b""
        self._torn = False
        self._lock = threading.Lock()  # what is new must be written before anybody else asks
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise JournalError(f"{path}: cannot be opened: {problem.strerror}") from None
        try:
            self._take()
            self._replay()
            sync_folder(path.parent)  # it may be new there
        except BaseException:  # whatever it was, the lock must not stay
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def last_start(self, job: str) -> int:
        """The latest start of a job of which a plan was taken up; 0: none."""
        return self._last.get(job, (0, 0, 0))[0]

    def accept(self, job: str, start: int, round: int, attempt: int) -> None:
        """A plan is taken up: none before it in (start, round, attempt), and not this one again.

        Raises:
            ReplayError: it is one of these.
            JournalError: it cannot be written down.
        """
        self._promise(_Accept, job=job, start=start, round=round, attempt=attempt)

    def agree(self, plan: bytes, survivors: bytes) -> None:
        """These are the survivors that it signs for; no others for the same plan. The same again changes nothing.

        Raises:
            ReplayError: it has signed others.
            JournalError: it cannot be written down.
        """
        self._promise(_Agree, plan=plan.hex(), survivors=hashlib.sha256(survivors).hexdigest())

    def unmask(self, job: str, round: int, plan: bytes, names: Sequence[str]) -> None:
        """It gives its shares away: once for a plan, and for one set of survivors in each round of a job.

        Raises:
            ReplayError: it has done so before.
            JournalError: it cannot be written down.
        """
        self._promise(_Unmask, job=job, round=round, plan=plan.hex(), names=tuple(names))

    def _promise(self, kind: type[_Promise], **fields: object) -> None:
        try:
            entry = kind.model_validate(fields)
        except ValidationError as problem:
            raise JournalError(f"{self.path}: {explain(problem)}") from None
        with self._lock:
            if self._is_new(entry):
                self._write(entry)
                self._remember(entry)

    def _is_new(self, entry: _Promise) -> bool:
        """Whether a promise was not made yet. Raises ReplayError where it contradicts one that was."""
        if isinstance(entry, _Accept):
            self._check_order(entry)
            return True
        if isinstance(entry, _Agree):
            before = self._agreed.get(entry.plan)
            if before not in (None, entry.survivors):
                raise ReplayError(f"it has signed other survivors for this plan before ({self.path})")
            return before is None
        self._check_given(entry)
        return True

    def _check_order(self, entry: _Accept) -> None:
        last = self._last.get(entry.job, (0, 0, 0))
        if entry.place <= last:
            raise ReplayError(
                f"round {entry.round}, attempt {entry.attempt} of start {entry.start} of job {entry.job!r} was taken up "
                f"before, or comes before round {last[1]}, attempt {last[2]} of start {last[0]} ({self.path}); "
                "a plan is not replayed"
            )

    def _check_given(self, entry: _Unmask) -> None:
        what = f"it has given its shares for round {entry.round} of {entry.job!r}"
        if entry.plan in self._given:
            raise ReplayError(f"{what} already ({self.path})")
        before = self._opened.get((entry.job, entry.round))
        if before not in (None, entry.names):
            raise ReplayError(
                f"{what} to other survivors ({', '.join(before or ())}); "
                f"the difference of the two sums would be somebody's update ({self.path})"
            )

    def _remember(self, entry: _Promise) -> None:
        if isinstance(entry, _Accept):
            self._last[entry.job] = entry.place
        elif isinstance(entry, _Agree):
            self._agreed[entry.plan] = entry.survivors
        else:
            self._given.add(entry.plan)
            self._opened[entry.job, entry.round] = entry.names

    # -- the file

    def _take(self) -> None:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise JournalError(f"{self.path}: not a regular file")
        check_private(self.path, status, JournalError)
        end = time.monotonic() + self._wait_s
        while not self._locked():
            if time.monotonic() >= end:
                raise JournalError(
                    f"{self.path}: another process of region {self.region} has it open; end that first"
                )
            time.sleep(POLL_S)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _replay(self) -> None:
        """Read what is there, cut off a last line that was never finished, and begin a new file."""
        good = number = 0
        with open(self._file, "rb", closefd=False) as file:
            while (line := file.readline(LINE_BYTES + 1)).endswith(b"\n"):
                number += 1
                self._replay_line(line[:-1], number)
                good += len(line)
        if len(line) > LINE_BYTES:
            raise JournalError(f"{self.path}: line {number + 1} is longer than {LINE_BYTES} bytes: damaged")
        if line:
            os.ftruncate(self._file, good)
            os.fsync(self._file)
        if not good:
            self._write(_Begin(region=self.region))

    def _replay_line(self, line: bytes, number: int) -> None:
        where = f"{self.path}: line {number}"
        found, space, body = line.partition(b" ")
        if not space or found != self._next_sum(body):
            raise JournalError(
                f"{where} is damaged, so the region cannot know what it has signed. "
                "Restore the file, or give the region a new name and key"
            )
        self._sum = found
        entry = parse_json(_Line, body, where, JournalError).entry
        if isinstance(entry, _Begin) != (number == 1):
            raise JournalError(f"{where}: expected {'the' if number == 1 else 'no'} beginning")
        if isinstance(entry, _Begin):
            if entry.region != self.region:
                raise JournalError(
                    f"{self.path}: the journal of region {entry.region}; expected {self.region}"
                )
            return
        try:
            self._is_new(entry)
        except ReplayError as problem:
            raise JournalError(f"{where} contradicts an earlier one: {problem}") from None
        self._remember(entry)

    def _write(self, entry: _Begin | _Promise) -> None:
        if self._torn or self._file < 0:
            raise JournalError(f"{self.path}: closed, or a write failed before; open it anew")
        body = _Line(entry=entry).model_dump_json().encode()
        line = self._next_sum(body) + b" " + body + b"\n"
        if len(line) > LINE_BYTES:
            raise JournalError(f"{self.path}: an entry of {len(line)} bytes; expected {LINE_BYTES} at most")
        self._torn = True  # until it is whole, and on the disk; else only reading it again tells
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as problem:
            raise JournalError(f"{self.path}: cannot be written: {problem}") from None
        self._torn = False
        self._sum = self._next_sum(body)

    def _next_sum(self, body: bytes) -> bytes:
        return hashlib.sha256(self._sum + b" " + body).hexdigest()[:SUM_DIGITS].encode()

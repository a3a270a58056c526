"""What a region must remember over a crash, so that nobody gets two different answers out of it.

Three promises rest on it. A plan is accepted once, and never one older than the last. One set of survivors is signed
for each plan: with signatures over two, an aggregator could have both secrets of a region opened. One plan is unmasked
for each round and sync: two sums over different survivors differ by one region's update. (Bonawitz et al. 2017, eprint 2017/281,
section 6.2.)

The file has one line for each event: a chained checksum, a space, JSON. A line is on the disk before the call returns, so
before anything is sent. A last line without its end was being written in a crash, so nothing was sent for it, and it is
dropped. Anything else that does not fit is an error: a region that has forgotten must not go on. The checksum finds
accidents; against somebody who can write the file nothing here helps.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xcloud.errors import JournalError, ReplayError
from xcloud.secure.files import check_private, explain, parse_json, sync_folder

__all__ = ["Journal"]

LINE_BYTES = 1 << 12
"""A line has at most so many; a longer one is damage, and is not read into memory."""
SUM_DIGITS = 32

Number = Annotated[int, Field(ge=0, lt=1 << 63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Begun(_Event):
    kind: Literal["begun"] = "begun"
    version: Literal[1] = 1
    region: str


class _Accepted(_Event):
    kind: Literal["accepted"] = "accepted"
    job: Annotated[str, Field(min_length=1, max_length=256)]
    sync: Number
    round: Number
    attempt: Number
    plan: Hash


class _Signed(_Event):
    kind: Literal["signed"] = "signed"
    plan: Hash
    survivors: Hash


class _Unmasked(_Event):
    kind: Literal["unmasked"] = "unmasked"
    plan: Hash


class _Line(_Event):
    """What stands behind the checksum."""

    event: Annotated[_Begun | _Accepted | _Signed | _Unmasked, Field(discriminator="kind")]


class Journal:
    """The memory of one region, in a file that one process at a time may use.

    Args:
        path: the file; made for its owner alone if there is none. Its folder exists.
        region: whose memory it is.

    Raises:
        JournalError: the file is open to others, in use, another region's, damaged, or cannot be read.
    """

    def __init__(self, path: Path, region: str) -> None:
        self.path = path
        self.region = region
        self._accepted: dict[str, _Accepted] = {}  # by plan
        self._last: dict[tuple[str, int], tuple[int, int]] = {}  # by job and sync
        self._signed: dict[str, str] = {}  # by plan
        self._unmasked: dict[tuple[str, int, int], str] = {}  # by job, round and sync
        self._sum = b""
        self._usable = True
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise JournalError(f"{path}: cannot be opened: {problem}") from None
        try:
            self._lock()
            self._replay()
            sync_folder(path.parent)  # it may be new
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
        """Let another process use the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def last(self, job: str, sync: int = 0) -> tuple[int, int] | None:
        """Round and attempt of the last plan that was accepted for a job and sync; None: none yet."""
        return self._last.get((job, sync))

    def accept(self, job: str, round: int, attempt: int, plan: bytes, sync: int = 0) -> None:
        """Remember that a plan (its SHA-256) is followed, before anything is done for it.

        Raises:
            ReplayError: it, or a later round or attempt of the job, was accepted before.
            JournalError: it cannot be kept.
        """
        self._keep(_Accepted, job=job, sync=sync, round=round, attempt=attempt, plan=plan.hex())

    def sign(self, plan: bytes, survivors: bytes) -> None:
        """Remember the one set of survivors (its hash) that is signed for a plan, before the signature is sent.

        The same set again changes nothing: the same signature may be sent again.

        Raises:
            ReplayError: the plan was not accepted, or another set was signed for it.
            JournalError: it cannot be kept.
        """
        self._keep(_Signed, plan=plan.hex(), survivors=survivors.hex())

    def unmask(self, plan: bytes) -> None:
        """Remember that shares are given out for a plan, before they are. The same plan again changes nothing.

        Raises:
            ReplayError: no survivors were signed for the plan, or its round was unmasked under another one.
            JournalError: it cannot be kept.
        """
        self._keep(_Unmasked, plan=plan.hex())

    def _keep(self, kind: type[_Accepted | _Signed | _Unmasked], **fields: object) -> None:
        try:
            event = kind.model_validate(fields)
        except ValidationError as problem:
            raise JournalError(f"{self.path}: {explain(problem)}") from None
        if self._is_new(event):
            self._write(event)

    def _is_new(self, event: _Accepted | _Signed | _Unmasked) -> bool:
        """Whether an event adds something. Raises ReplayError where it contradicts what is remembered."""
        if isinstance(event, _Accepted):
            self._check_later(event)
            return True
        accepted = self._accepted.get(event.plan)
        if accepted is None:
            raise self._refusal(f"the plan {event.plan[:16]}... was never accepted")
        signed = self._signed.get(event.plan)
        if isinstance(event, _Signed):
            if signed not in (None, event.survivors):
                raise self._refusal(
                    f"asked to sign survivors {event.survivors[:16]}... for the plan {event.plan[:16]}...; "
                    f"it has signed {str(signed)[:16]}... and signs one set for each plan"
                )
            return signed is None
        if signed is None:
            raise self._refusal(f"no survivors were signed for the plan {event.plan[:16]}...")
        unmasked = self._unmasked.get((accepted.job, accepted.round, accepted.sync))
        if unmasked not in (None, event.plan):
            raise self._refusal(f"round {accepted.round} of {accepted.job!r} was unmasked under another plan")
        return unmasked is None

    def _check_later(self, event: _Accepted) -> None:
        last = self.last(event.job, event.sync)
        if last is not None and (event.round, event.attempt) <= last:
            raise self._refusal(
                f"a plan for round {event.round}, attempt {event.attempt} of {event.job!r}; "
                f"round {last[0]}, attempt {last[1]} was accepted before"
            )
        if event.plan in self._accepted:
            raise self._refusal(f"the plan {event.plan[:16]}... was accepted before")

    def _refusal(self, what: str) -> ReplayError:
        return ReplayError(f"region {self.region}: {what}")

    def _lock(self) -> None:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise JournalError(f"{self.path}: not a regular file")
        check_private(self.path, status, JournalError)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                f"{self.path}: in use by another process of region {self.region}; stop that one first"
            ) from None

    def _replay(self) -> None:
        """Read what is there, drop a last line that was never finished, and begin a new file."""
        good = 0
        with open(self._file, "rb", closefd=False) as file:
            for number in range(1, 1 << 62):
                line = file.readline(LINE_BYTES + 1)
                if not line.endswith(b"\n"):
                    if len(line) > LINE_BYTES:
                        raise JournalError(
                            f"{self.path}: line {number} is longer than {LINE_BYTES} bytes: damaged"
                        )
                    break
                self._replay_event(self._parse(line[:-1], number), number)
                good += len(line)
        if good < os.fstat(self._file).st_size:
            os.ftruncate(self._file, good)
            os.fsync(self._file)
        if good == 0:
            self._write(_Begun(region=self.region))

    def _parse(self, line: bytes, number: int) -> _Begun | _Accepted | _Signed | _Unmasked:
        found, space, body = line.partition(b" ")
        if not space or found != self._next_sum(body):
            raise JournalError(
                f"{self.path}: line {number} is damaged. The region cannot know what it has signed: "
                "restore the file, or give the region a new name and key"
            )
        self._sum = found
        return parse_json(_Line, body, f"{self.path}: line {number}", JournalError).event

    def _replay_event(self, event: _Begun | _Accepted | _Signed | _Unmasked, number: int) -> None:
        if isinstance(event, _Begun) != (number == 1):
            raise JournalError(
                f"{self.path}: line {number}: expected {'the' if number == 1 else 'no'} beginning"
            )
        if isinstance(event, _Begun):
            if event.region != self.region:
                raise JournalError(
                    f"{self.path}: the journal of region {event.region}; expected {self.region}"
                )
            return
        try:
            self._is_new(event)
        except ReplayError as problem:
            raise JournalError(f"{self.path}: line {number} contradicts an earlier one: {problem}") from None
        self._remember(event)

    def _remember(self, event: _Accepted | _Signed | _Unmasked) -> None:
        if isinstance(event, _Accepted):
            self._accepted[event.plan] = event
            self._last[event.job, event.sync] = (event.round, event.attempt)
        elif isinstance(event, _Signed):
            self._signed[event.plan] = event.survivors
        else:
            accepted = self._accepted[event.plan]
            self._unmasked[accepted.job, accepted.round, accepted.sync] = event.plan

    def _write(self, event: _Begun | _Accepted | _Signed | _Unmasked) -> None:
        if not self._usable or self._file < 0:
            raise JournalError(f"{self.path}: closed, or a write failed before; open it anew")
        body = _Line(event=event).model_dump_json().encode()
        line = self._next_sum(body) + b" " + body + b"\n"
        try:
            assert len(line) <= LINE_BYTES
            if os.write(self._file, line) < len(line):
                raise OSError("the disk is full")  # noqa: TRY301 - as if the call had raised it
            os.fsync(self._file)
        except OSError as problem:
            self._usable = False  # a torn line may be there, and only reading it again tells
            raise JournalError(f"{self.path}: cannot be written: {problem}") from None
        self._sum = self._next_sum(body)
        if not isinstance(event, _Begun):
            self._remember(event)

    def _next_sum(self, body: bytes) -> bytes:
        return hashlib.sha256(self._sum + b" " + body).hexdigest()[:SUM_DIGITS].encode()

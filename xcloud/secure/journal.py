"""What a region must remember over a crash, or it could be made to say twice what is safe to say once.

A file of JSON lines, each written and synced to the disk before the word that it is about is given. The last line may be
torn by a crash: it was never acted on, and is cut off. Any other damage is an error. One process at a time holds the
file's lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xcloud.errors import JournalError, ReplayError

__all__ = ["Journal"]

VERSION = 1


class Journal:
    """The memory of one region (`secure.member.Memory`).

    Args:
        path: of the file, made with mode 0600 if it is not there.

    Raises:
        JournalError: another process has it open, others may read it, or it is damaged; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, tuple[int, int, int]] = {}
        self._agreed: dict[str, str] = {}
        self._opened: dict[tuple[str, int], list[str]] = {}
        self._given: set[str] = set()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)

    def last_start(self, job: str) -> int:
        """The latest start of a job of which a plan was taken up; 0: none."""
        return self._last.get(job, (0, 0, 0))[0]

    def accept(self, job: str, start: int, round: int, attempt: int) -> None:
        """A plan is taken up: none before it in (start, round, attempt), and not this one again.

        Raises:
            ReplayError: it is one of these.
        """
        last = self._last.get(job, (0, 0, 0))
        if (start, round, attempt) <= last:
            raise ReplayError(
                f"round {round}, attempt {attempt} of start {start} of job {job!r} was taken up before, or comes before "
                f"round {last[1]}, attempt {last[2]} of start {last[0]} ({self.path}); a plan is not replayed"
            )
        self._write(kind="accept", job=job, start=start, round=round, attempt=attempt)

    def agree(self, plan: bytes, survivors: bytes) -> None:
        """These are the survivors that it signs for; no others for the same plan.

        Raises:
            ReplayError: it has signed others.
        """
        chosen = hashlib.sha256(survivors).hexdigest()
        before = self._agreed.get(plan.hex())
        if before not in (None, chosen):
            raise ReplayError(f"it has signed other survivors for this plan before ({self.path})")
        if before is None:
            self._write(kind="agree", plan=plan.hex(), survivors=chosen)

    def unmask(self, job: str, round: int, plan: bytes, names: Sequence[str]) -> None:
        """It gives its shares away: once for a plan, and for one set of survivors in each round of a job.

        Raises:
            ReplayError: it has done so before.
        """
        if plan.hex() in self._given:
            raise ReplayError(f"it has given its shares for round {round} of {job!r} already ({self.path})")
        before = self._opened.get((job, round))
        if before is not None and before != list(names):
            raise ReplayError(
                f"it has given its shares for round {round} of {job!r} to other survivors ({', '.join(before)}); "
                f"the difference of the two sums would be somebody's update ({self.path})"
            )
        self._write(kind="unmask", job=job, round=round, plan=plan.hex(), names=list(names))

    # -- the file -------------------------------------------------------------------------

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                f"{self.path}: another process of this region has it open; end that first"
            ) from None
        mode = stat.S_IMODE(os.fstat(self._file).st_mode)
        if mode & 0o077:
            raise JournalError(
                f"{self.path}: others may read or write it (mode {mode:04o}); chmod 600 {self.path}"
            )
        text = b""
        while piece := os.read(self._file, 1 << 20):
            text += piece
        lines = text.split(b"\n")
        torn = lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                self._remember(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise JournalError(f"{self.path}: line {number} is damaged: {error}") from None
        if torn:
            os.ftruncate(self._file, len(text) - len(torn))
            os.fsync(self._file)
        os.lseek(self._file, 0, os.SEEK_END)

    def _write(self, **entry: Any) -> None:
        line = json.dumps({"version": VERSION, **entry}, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self._remember({"version": VERSION, **entry})

    def _remember(self, entry: dict[str, Any]) -> None:
        if entry["version"] != VERSION:
            raise ValueError(f"expected an entry of version {VERSION}")
        kind = entry["kind"]
        if kind == "accept":
            at = tuple(int(entry[key]) for key in ("start", "round", "attempt"))
            self._last[str(entry["job"])] = at[0], at[1], at[2]
        elif kind == "agree":
            self._agreed[str(entry["plan"])] = str(entry["survivors"])
        elif kind == "unmask":
            names = [str(name) for name in entry["names"]]
            self._opened[str(entry["job"]), int(entry["round"])] = names
            self._given.add(str(entry["plan"]))
        else:
            raise ValueError(f"no kind of entry {kind!r}")

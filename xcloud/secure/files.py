"""Small files that matter: read with care, written whole or not at all.

A file is written under another name, flushed to the disk, and only then given its own, so that a crash leaves the
old one or the new one. A private file is for its owner alone (mode 0600, folder 0700), as OpenSSH asks for.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from xcloud.errors import KeyFileError, SecurityError

__all__ = [
    "LIMIT",
    "check_private",
    "explain",
    "parse_json",
    "private_folder",
    "read_file",
    "sync_folder",
    "write_file",
]

LIMIT = 1 << 20
"""Bytes that a key, roster or policy file may have. None comes near it; a file that does is something else."""

M = TypeVar("M", bound=BaseModel)


def read_file(path: Path, error: type[SecurityError], private: bool = False, pinned: bool = False) -> bytes:
    """The content of a regular file of at most `LIMIT` bytes.

    Args:
        path: of the file.
        error: what is raised.
        private: nobody but its owner may reach it.
        pinned: nobody but its owner may change it.

    Raises:
        error: it cannot be read, is no regular file or too long, or is open to others.
    """
    try:
        with open(path, "rb", opener=_opened) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: not a regular file")
            if private:
                check_private(path, status, error)
            if pinned:
                _check_pinned(path, status, error)
            data = file.read(LIMIT + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {problem}") from None
    if len(data) > LIMIT:
        raise error(f"{path}: longer than {LIMIT} bytes, so it is something else")
    return data


def _opened(path: str, flags: int) -> int:
    """Not blocking: a named pipe would wait for a writer that never comes."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_private(path: Path, status: os.stat_result, error: type[SecurityError]) -> None:
    """Refuse a file that others than its owner can reach.

    Raises:
        error: says how to close it.
    """
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise error(
            f"{path}: others than its owner can use it (mode {mode:04o}); run: chmod 600 {shlex.quote(str(path))}"
        )


def _check_pinned(path: Path, status: os.stat_result, error: type[SecurityError]) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o022:
        raise error(
            f"{path}: others than its owner can change it (mode {mode:04o}); run: chmod go-w {shlex.quote(str(path))}"
        )


def private_folder(path: Path) -> None:
    """Make the folder, for its owner alone; one that exists must be so.

    Raises:
        KeyFileError: it cannot be made, or is open to others; says how to close it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as problem:
        raise KeyFileError(f"{path}: cannot be used as a folder of keys: {problem}") from None
    if mode & 0o077:
        raise KeyFileError(
            f"{path}: a folder of keys is for its owner alone (mode {mode:04o}); "
            f"run: chmod 700 {shlex.quote(str(path))}, or name another one with --dir"
        )


def write_file(path: Path, data: bytes, mode: int, replace: bool = False) -> None:
    """Write a whole file, atomically and to the disk.

    Raises:
        KeyFileError: it exists and `replace` was not asked for, or it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)  # whatever the umask has left of it
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            if replace:
                fresh.replace(path)
            else:
                os.link(fresh, path)  # unlike a rename, refuses to overwrite
        finally:
            fresh.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise KeyFileError(f"{path}: exists already, and is not overwritten") from None
    except (OSError, ValueError) as problem:
        raise KeyFileError(f"{path}: cannot be written: {problem}") from None


def sync_folder(path: Path) -> None:
    """Have the disk keep the folder's names as they are now."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(model: type[M], data: bytes, origin: str, error: type[SecurityError]) -> M:
    """A strict model from JSON; a key given twice is refused, since readers would differ on which one counts.

    Raises:
        error: names `origin`, the key, and what was expected.
    """
    try:
        raw = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as problem:
        raise error(f"{origin}: not valid JSON: {problem}") from None
    try:
        return model.model_validate(raw)
    except ValidationError as problem:
        raise error(f"{origin}: {explain(problem)}") from None


def explain(problem: ValidationError) -> str:
    """The first thing that is wrong: `key: what was expected`. Shows no value, which may be a secret."""
    first = problem.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found

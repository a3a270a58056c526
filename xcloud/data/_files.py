"""Finding, fingerprinting and opening data files, local or behind any fsspec URL."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from xcloud.errors import DataError

__all__ = ["StoredFile", "digest", "list_files", "open_binary"]

_MAGIC = frozenset("*?[")
# Where the file systems that fsspec knows keep "when was this last written, or which version is it".
_VERSION_KEYS = ("mtime", "LastModified", "last_modified", "updated", "modified", "ETag", "etag", "created")


@dataclass(frozen=True)
class StoredFile:
    """One data file.

    `id` is its path below the parent of the folder that the user named, so that it is the same for
    `corpus/`, `corpus/*.txt` and `corpus/a.txt`, on any machine.
    """

    fs: AbstractFileSystem
    path: str
    id: str
    size: int
    version: str


def digest(parts: Iterable[str]) -> str:
    """Hex BLAKE2b-128 of a sequence of strings; their boundaries count."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def list_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[StoredFile]:
    """Files named by `paths`: files, globs, or folders (searched recursively for `suffixes`).

    Returns:
        Files in the order of `paths`, sorted by path within each; a file named twice comes once.

    Raises:
        DataError: a path cannot be looked at, or names no file.
    """
    found: dict[str, StoredFile] = {}
    for pattern in paths:
        try:
            fs, path = url_to_fs(os.path.expanduser(pattern))
            base, matches = _match(fs, path, suffixes)
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"cannot look for {pattern!r}: {error}") from error
        if not matches:
            raise DataError(
                f"no file matches {pattern!r} (looked in {base}); "
                f"name a file, a glob, or a folder with {' or '.join('*' + s for s in suffixes)} files"
            )
        parent = str(PurePosixPath(base).parent)
        for name in sorted(matches):
            found.setdefault(fs.unstrip_protocol(name), _stored_file(fs, name, parent, matches[name]))
    return list(found.values())


def _match(
    fs: AbstractFileSystem, path: str, suffixes: tuple[str, ...]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The named folder and the info of each file that `path` stands for."""
    if fs.isfile(path):
        return str(PurePosixPath(path).parent), {path: fs.info(path)}
    if fs.isdir(path):
        infos = fs.find(path, detail=True)
        return path, {
            name: _resolved(fs, name, info) for name, info in infos.items() if name.endswith(suffixes)
        }
    base = PurePosixPath(path)
    while _MAGIC & set(str(base)):
        base = base.parent
    infos = fs.glob(path, detail=True) if _MAGIC & set(path) else {}
    resolved = {name: _resolved(fs, name, info) for name, info in infos.items()}
    return str(base), {name: info for name, info in resolved.items() if info["type"] == "file"}


def _resolved(fs: AbstractFileSystem, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """The info of what a link points to; folder listings give that of the link itself."""
    return cast("dict[str, Any]", fs.info(name)) if info.get("islink") else info


def _stored_file(fs: AbstractFileSystem, name: str, parent: str, info: dict[str, Any]) -> StoredFile:
    relative = name[len(parent) :].lstrip("/") if parent != "." and name.startswith(parent) else name
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
    return StoredFile(fs, name, relative, int(info.get("size") or 0), version)


@contextmanager
def open_binary(file: StoredFile) -> Iterator[IO[bytes]]:
    """Open a file for streaming reads; `.gz` is unpacked on the way.

    Raises:
        DataError: the file cannot be opened, or reading it fails inside the `with` block.
    """
    try:
        with file.fs.open(file.path, "rb") as raw:
            if file.path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield cast("IO[bytes]", unpacked)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file.path}: {error}") from error

"""What of a working directory stays on this machine when it is packed for a cluster: private keys, tokens, run folders.

Ray packs by patterns of gitignore. Whoever submits a job trusts the cluster with its code, not with the keys of regions, of
the cluster itself or of other services: keys are found by their name (`NAME.key`, and `NAME.key.old-DATE` after a
rotation), or by what every private key in PEM says of itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ray._private.runtime_env.packaging import _get_excludes

from xcloud.errors import ConfigError

__all__ = ["KEY_PATTERNS", "kept_back", "pattern_of"]

KEY_PATTERNS = ("*.key", "*.key.old-*")
RUN_MARK = "events.jsonl"
"""Every run folder has it; a masked run keeps its keys in a folder beside it."""
AUTHORITY, TOKEN = "ca.crt", "token"
PEM = re.compile(rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----", re.MULTILINE)
LOOKED_AT = 65536
"""Bytes of a file in which the head of a private key is looked for."""


def kept_back(folder: Path, excludes: Sequence[str]) -> list[Path]:
    """Run folders and files with secrets in a working directory, relative to it.

    Args:
        folder: the working directory.
        excludes: patterns of what is not packed anyway.

    Raises:
        ConfigError: the directory is a run folder itself, or something in it cannot be read.
    """
    if (folder / RUN_MARK).is_file():
        raise ConfigError(
            f"{folder}: a run folder ({RUN_MARK} lies in it), with what the run keeps for itself; submit from another one"
        )
    excluded = _get_excludes(folder, list(excludes))
    return sorted(_secret(folder, Path(), excluded, (folder.resolve(),)))


def _secret(
    folder: Path, inside: Path, excluded: Callable[[Path], bool], above: tuple[Path, ...]
) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{folder / inside}: cannot be looked through for keys: {error.strerror}") from None
    names = {entry.name for entry in entries}
    for entry in entries:
        path = inside / entry.name
        if excluded(folder / path):
            continue
        if entry.is_dir():  # links as well: Ray follows them
            real = Path(entry.path).resolve()
            if (real / RUN_MARK).is_file():
                yield path
            elif real not in above:
                yield from _secret(folder, path, excluded, (*above, real))
        elif entry.is_file() and (
            (entry.name == TOKEN and AUTHORITY in names) or _holds_key(Path(entry.path))
        ):
            yield path


def _holds_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return PEM.search(file.read(LOOKED_AT)) is not None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be looked through for keys: {error.strerror}") from None


def pattern_of(path: Path) -> str:
    """The pattern of gitignore that names one path of the working directory, and no other."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", path.as_posix())

"""Where text comes from: a stream of documents with stable ids.

A source is read once, by `store.prepare_store`, and never held in memory. A document's id names
its place (file, line, row or topic) and not its position in the stream, because the id alone decides
whether the document is held out.

To add a source: a config with `type` and `build()`, decorated with `@SOURCES.register`, and a class
with the three methods of `Source`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

from xcloud.data._files import StoredFile, digest, list_files, open_binary
from xcloud.errors import DataError
from xcloud.registry import PartConfig, Registry, nearest

__all__ = [
    "SOURCES",
    "Document",
    "HuggingFaceSourceConfig",
    "JsonlSourceConfig",
    "ParquetSourceConfig",
    "Source",
    "SourceConfig",
    "StdlibSourceConfig",
    "TextSourceConfig",
]

# A text file above this many bytes is cut into several documents.
PIECE_BYTES = 1 << 20

# With less than this of .py files in Lib/test, the interpreter was installed without its test suite.
MIN_TEST_SUITE_BYTES = 1_000_000

Rows = Iterator[tuple[str, str]]  # (document id, text)


@dataclass(frozen=True)
class Document:
    """A piece of text. `id` is stable: it does not change when other documents come or go."""

    id: str
    text: str


class Source(Protocol):
    """A stream of documents that can be read again."""

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order.

        Raises:
            DataError: something is missing or not as expected; names the file and place.
        """
        ...

    def describe(self) -> str:
        """One line for humans."""
        ...

    def fingerprint(self) -> str:
        """Changes when the documents may have changed; cheap, so files count by name, size and time."""
        ...


class SourceConfig(PartConfig):
    """Base of every source config.

    `max_bytes` ends the source after that many bytes of UTF-8 text; the last document is cut to fit.
    """

    max_bytes: Annotated[int, Field(gt=0)] | None = None

    def build(self) -> Source:
        raise NotImplementedError(f"{type(self).__name__} must define build()")


SOURCES: Registry[SourceConfig] = Registry("data source", SourceConfig)


def _as_documents(rows: Iterable[tuple[str, str]], max_bytes: int | None) -> Iterator[Document]:
    """Rows as documents, up to `max_bytes` of UTF-8."""
    if max_bytes is None:
        for name, text in rows:
            yield Document(name, text)
        return
    left = max_bytes
    for name, text in rows:
        data = text.encode("utf-8")
        if len(data) >= left:
            # "ignore" drops the character that the limit cuts in two.
            yield Document(name, data[:left].decode("utf-8", "ignore"))
            return
        left -= len(data)
        yield Document(name, text)


# --- Files: text, jsonl, parquet ------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]


class _FilesConfig(SourceConfig):
    """`paths`: files, globs or folders; local (relative to the working directory) or fsspec URLs."""

    paths: Paths


class _FilesSource:
    """Files read one after the other by `read`."""

    def __init__(
        self, config: _FilesConfig, kind: str, suffixes: tuple[str, ...], read: Callable[[StoredFile], Rows]
    ) -> None:
        self._config = config
        self._kind = kind
        self._suffixes = suffixes
        self._read = read

    def documents(self) -> Iterator[Document]:
        files = list_files(self._config.paths, self._suffixes)
        return _as_documents((row for file in files for row in self._read(file)), self._config.max_bytes)

    def describe(self) -> str:
        return f"{self._kind} files {', '.join(self._config.paths)}{_limit(self._config)}"

    def fingerprint(self) -> str:
        files = list_files(self._config.paths, self._suffixes)
        return digest([self._config.model_dump_json(), *(f"{f.id}|{f.size}|{f.version}" for f in files)])


def _limit(config: SourceConfig) -> str:
    return "" if config.max_bytes is None else f" (first {config.max_bytes:,} bytes)"


@SOURCES.register
class TextSourceConfig(_FilesConfig):
    """Plain text, one document a file; files above 1 MiB are cut at blank lines. Folders: `*.txt`."""

    type: Literal["text"] = "text"

    def build(self) -> Source:
        return _FilesSource(self, "text", (".txt", ".txt.gz"), _read_text)


def _read_text(file: StoredFile) -> Rows:
    with open_binary(file) as stream:
        for number, text in enumerate(_pieces(stream)):
            yield (f"{file.id}#{number}" if number else file.id), text


def _pieces(stream: IO[bytes]) -> Iterator[str]:
    """Cut a UTF-8 stream into texts of at most PIECE_BYTES; nothing is lost or repeated."""
    rest = b""
    while block := stream.read(PIECE_BYTES):
        rest += block
        while len(rest) > PIECE_BYTES:
            cut = _cut_point(rest)
            yield rest[:cut].decode("utf-8", "replace")
            rest = rest[cut:]
    if rest:
        yield rest.decode("utf-8", "replace")


def _cut_point(data: bytes) -> int:
    """Where to cut: after the last blank line, else line, of the second half, else between characters."""
    half = PIECE_BYTES // 2
    blank = max(data.rfind(b"\n\n", half, PIECE_BYTES) + 2, data.rfind(b"\n\r\n", half, PIECE_BYTES) + 3)
    if blank > half:
        return blank
    line = data.rfind(b"\n", half, PIECE_BYTES) + 1
    if line > half:
        return line
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 3 and data[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        cut -= 1
    return cut


@SOURCES.register
class JsonlSourceConfig(_FilesConfig):
    """One JSON object a line, with the text under `field`. Folders: `*.jsonl`, `*.jsonl.gz`."""

    type: Literal["jsonl"] = "jsonl"
    field: str = "text"

    def build(self) -> Source:
        return _FilesSource(
            self, "jsonl", (".jsonl", ".jsonl.gz"), lambda file: _read_jsonl(file, self.field)
        )


def _read_jsonl(file: StoredFile, field: str) -> Rows:
    with open_binary(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                text = _field_of(json.loads(line), field)
            except ValueError as error:
                raise DataError(
                    f"{file.path}, line {number}: expected a JSON object with a string under {field!r}: "
                    f"{error}"
                ) from error
            yield f"{file.id}#{number}", text


def _field_of(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}")
    if field not in record:
        guess = nearest(field, list(record))
        raise ValueError(
            f"found keys {', '.join(map(repr, record)) or 'none'}"
            + (f" (did you mean {guess!r}?)" if guess else "")
        )
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"found {type(text).__name__} there")
    # JSON can spell half of a surrogate pair, which no UTF-8 tokenizer takes.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


@SOURCES.register
class ParquetSourceConfig(_FilesConfig):
    """The string column `column` of parquet files; null rows are left out. Folders: `*.parquet`."""

    type: Literal["parquet"] = "parquet"
    column: str = "text"

    def build(self) -> Source:
        return _FilesSource(self, "parquet", (".parquet",), lambda file: _read_parquet(file, self.column))


def _read_parquet(file: StoredFile, column: str) -> Rows:
    # Imported on use: pyarrow is heavy, and reopening a cached store must not pay for it.
    from xcloud.data import _parquet  # noqa: PLC0415

    yield from _parquet.read_column(file, column)


# --- Hugging Face datasets ------------------------------------------------------------------------


@SOURCES.register
class HuggingFaceSourceConfig(SourceConfig):
    """One split of a dataset of the Hugging Face hub or a local folder.

    A local folder may hold what `save_to_disk` wrote or what `load_dataset` reads. A hub dataset is
    packed once and not looked at again: set `revision` (a commit) to say which version that is.
    """

    type: Literal["huggingface"] = "huggingface"
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    revision: str | None = None

    def build(self) -> Source:
        return _HuggingFaceSource(self)


class _HuggingFaceSource:
    def __init__(self, config: HuggingFaceSourceConfig) -> None:
        self._config = config
        self._path = os.path.expanduser(config.path)

    def documents(self) -> Iterator[Document]:
        # Imported on use: `datasets` takes 2 s, and reopening a cached store must not pay for it.
        from xcloud.data import _hf_dataset  # noqa: PLC0415

        config = self._config
        self._check_local()
        rows = _hf_dataset.read_rows(
            self._path,
            name=config.name,
            split=config.split,
            column=config.column,
            streaming=config.streaming,
            revision=config.revision,
        )
        return _as_documents(rows, config.max_bytes)

    def describe(self) -> str:
        config = self._config
        what = " ".join(part for part in (config.path, config.name, config.split) if part)
        return f"Hugging Face dataset {what}{_limit(config)}"

    def fingerprint(self) -> str:
        files = list_files([self._path], ("",)) if self._check_local() else []
        return digest([self._config.model_dump_json(), *(f"{f.id}|{f.size}|{f.version}" for f in files)])

    def _check_local(self) -> bool:
        """Whether the dataset is a local folder; raises where it can only be one and is missing."""
        if os.path.isdir(self._path):
            return True
        if self._path.startswith((".", os.sep)) or self._path.count("/") > 1:
            raise DataError(
                f"no dataset folder {self._config.path!r}; expected a folder or a hub id 'owner/name'"
            )
        return False


# --- The Python standard library ------------------------------------------------------------------


@SOURCES.register
class StdlibSourceConfig(SourceConfig):
    """Text that every Python installation carries: three kinds that differ in style, no download.

    `modules`: the library's modules, without tests. `tests`: its test suite; where the interpreter came
    without one (Debian), the tests that installed packages such as numpy ship. `reference`: the help
    texts of the language (`help('LAMBDAS')`), about 700 KB.
    """

    type: Literal["stdlib"] = "stdlib"
    kind: Literal["modules", "tests", "reference"]

    def build(self) -> Source:
        return _StdlibSource(self)


_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_NO_MODULES = _TEST_FOLDERS | {"site-packages", "dist-packages", "pydoc_data"}
# Files of the test suite that are no valid UTF-8 Python on purpose.
_BROKEN_FOLDERS = frozenset({"encoded_modules", "tokenizedata"})
_BROKEN_PREFIXES = ("badsyntax_", "bad_coding")


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _package_folders() -> list[Path]:
    """Folders that packages are installed in, the one that numpy was imported from included."""
    folders = {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}
    numpy = importlib.util.find_spec("numpy")
    if numpy is not None and numpy.origin is not None:
        folders.add(Path(numpy.origin).parent.parent)
    return sorted(folder for folder in folders if folder.is_dir())


class _StdlibSource:
    def __init__(self, config: StdlibSourceConfig) -> None:
        self._config = config

    def documents(self) -> Iterator[Document]:
        return _as_documents(self._rows(), self._config.max_bytes)

    def describe(self) -> str:
        kind = self._config.kind
        if kind == "tests" and not _test_suite():
            what = "tests of installed packages (this Python has no test suite of its own)"
        else:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            names = {"modules": "modules", "tests": "test suite", "reference": "reference (help texts)"}
            what = f"Python {version} standard library {names[kind]}"
        return what + _limit(self._config)

    def fingerprint(self) -> str:
        settings = self._config.model_dump_json()
        if self._config.kind == "reference":
            return digest([settings, *(part for row in _topics() for part in row)])
        stats = ((name, path.stat()) for name, path in self._files())
        return digest([settings, *(f"{name}|{s.st_size}|{s.st_mtime_ns}" for name, s in stats)])

    def _rows(self) -> Rows:
        if self._config.kind == "reference":
            yield from _topics()
            return
        for name, path in self._files():
            try:
                yield name, path.read_bytes().decode("utf-8", "replace")
            except OSError as error:
                raise DataError(f"cannot read {path}: {error}") from error

    def _files(self) -> list[tuple[str, Path]]:
        """(document id, path) sorted by id."""
        if self._config.kind == "modules":
            where = [_stdlib_folder()]
            found = _python_files(where[0], "modules", skip=_NO_MODULES)
        else:
            found, where = _test_suite(), [_stdlib_folder() / "test"]
            if not found:
                where = _package_folders()
                for folder in where:
                    found |= _python_files(folder, "tests/packages", within=_TEST_FOLDERS)
        if not found:
            raise DataError(
                f"found no standard library {self._config.kind} in {', '.join(map(str, where))}; "
                "install Python's sources or name text files with type: text"
            )
        return sorted(found.items())


def _test_suite() -> dict[str, Path]:
    """The interpreter's own test modules by document id; empty where it came without them."""
    found = _python_files(_stdlib_folder() / "test", "tests", skip=_BROKEN_FOLDERS)
    return found if sum(path.stat().st_size for path in found.values()) >= MIN_TEST_SUITE_BYTES else {}


def _python_files(
    root: Path, prefix: str, *, skip: frozenset[str] = frozenset(), within: frozenset[str] | None = None
) -> dict[str, Path]:
    """The .py files below `root` by document id.

    Folders named in `skip` are left out; with `within`, only what lies in folders of these names counts.
    """
    found: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name != "__pycache__" and name not in skip]
        relative = Path(folder).relative_to(root)
        if within is not None and within.isdisjoint(relative.parts):
            continue
        for name in names:
            if name.endswith(".py") and not name.startswith(_BROKEN_PREFIXES):
                found[f"{prefix}/{(relative / name).as_posix()}"] = Path(folder, name)
    return found


def _topics() -> list[tuple[str, str]]:
    """(document id, text) of each help topic of the language reference."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f"this Python has no pydoc_data/topics.py, so stdlib has no 'reference': {error}"
        ) from error
    return [(f"reference/{name}", text) for name, text in sorted(topics.items())]

"""Documents packed into fixed-length token sequences, cached on disk and memory-mapped.

Preparing streams every document once: encode, append eos, write to a flat token file. Training reads
that file as sequences of equal length without padding; a sequence may span documents.

A cache entry is a folder named after a digest of what went in (sources, tokenizer, held-out fraction;
not the sequence length) with

    tokens.bin   uint16 or uint32, little endian: the train documents, then the held-out documents
    store.json   sizes, digest of the tokens, where the held-out documents begin

It appears under its name complete or not at all, so any number of processes may prepare it at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from xcloud.data._files import digest
from xcloud.data.sources import Source
from xcloud.data.tokenizers import Tokenizer
from xcloud.errors import ConfigError, DataError

__all__ = ["PackedSplit", "PackedStore", "prepare_store"]

# Part of every digest: raise it when the layout of the files or the choice of held-out documents changes.
FORMAT_VERSION = 1

_TOKENS = "tokens.bin"
_META = "store.json"
_PROGRESS_TOKENS = 1 << 20
_WRITE_BUFFER_BYTES = 4 << 20


class PackedSplit:
    """Sequences of `sequence_length` tokens out of a stretch of a token file.

    Cheap to pickle: the file is mapped by whoever reads first, never copied.

    Attributes:
        tokens: tokens in the split, including the last few that fill no sequence.
    """

    def __init__(self, path: Path, dtype: str, start: int, stop: int, sequence_length: int) -> None:
        self._path = path
        self._dtype = dtype
        self._start = start
        self.tokens = stop - start
        self.sequence_length = sequence_length
        self._rows: npt.NDArray[np.unsignedinteger[Any]] | None = None

    def __len__(self) -> int:
        """Number of whole sequences."""
        return self.tokens // self.sequence_length

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sequences by id: int64, shape [len(indices), sequence_length].

        Raises:
            IndexError: an id is outside [0, len(self)).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"sequence ids must lie in [0, {len(self)}), found {indices.min()}..{indices.max()}"
            )
        if not indices.size:
            return np.empty((0, self.sequence_length), dtype=np.int64)
        if self._rows is None:
            shape = (len(self), self.sequence_length)
            offset = self._start * np.dtype(self._dtype).itemsize
            self._rows = np.memmap(self._path, dtype=self._dtype, mode="r", offset=offset, shape=shape)
        return self._rows[indices].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


@dataclass(frozen=True)
class PackedStore:
    """A corpus, packed and split. No held-out document is in `train`.

    Attributes:
        documents: documents that went in, over both splits; empty ones are not counted.
        tokens: tokens over both splits, one eos a document included.
        fingerprint: digest of the settings and of every token; equal on machines with equal data.
    """

    train: PackedSplit
    held_out: PackedSplit
    documents: int
    tokens: int
    fingerprint: str
    sources: tuple[str, ...] = field(repr=False)
    cut_by_position: bool = False

    def describe(self) -> str:
        """One line for humans."""
        how = "by position: too few documents" if self.cut_by_position else "by document"
        return (
            f"{'; '.join(self.sources)}: {self.documents:,} documents, {self.tokens:,} tokens = "
            f"{self.train.tokens:,} train ({len(self.train):,} sequences of {self.train.sequence_length}) + "
            f"{self.held_out.tokens:,} held out ({len(self.held_out):,} sequences, {how})"
        )


@dataclass(frozen=True)
class _Entry:
    """What `store.json` says about the `tokens.bin` beside it."""

    dtype: str
    documents: int
    tokens: int
    train_tokens: int
    content: str
    sources: tuple[str, ...]
    version: int = FORMAT_VERSION


def prepare_store(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    held_out_fraction: float,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
) -> PackedStore:
    """Pack all documents of `sources`, or reopen what was packed from the same before.

    A document is held out if a hash of its id says so, so it stays where it is when others come or go.
    Where that leaves a split without a sequence, or most of a small corpus held out, the packed tokens
    are cut in two instead, at the document border nearest to the wished size where there is one.

    Args:
        sequence_length: tokens a sequence; changing it reuses the cache.
        held_out_fraction: expected share of documents to hold out, in [0, 0.5]; 0 holds out none.
        progress: called with the number of tokens written so far; not called on a cache hit.

    Raises:
        ConfigError: `sequence_length` or `held_out_fraction` is out of range.
        DataError: a source cannot be read, or there is too little text for one sequence a split.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length must be >= 1, found {sequence_length}")
    if not 0 <= held_out_fraction <= 0.5:
        raise ConfigError(f"held_out_fraction must lie in [0, 0.5], found {held_out_fraction}")
    key = digest(
        [
            str(FORMAT_VERSION),
            repr(float(held_out_fraction)),
            tokenizer.fingerprint(),
            *(source.fingerprint() for source in sources),
        ]
    )
    folder = Path(cache_dir) / key
    entry = _open_entry(folder)
    if entry is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            entry = _open_entry(folder)  # another process may have been faster
            if entry is None:
                entry = _write_entry(folder, sources, tokenizer, held_out_fraction, progress)
    boundary = _boundary(folder, entry, sequence_length, held_out_fraction, tokenizer.eos_id)

    def split(start: int, stop: int) -> PackedSplit:
        return PackedSplit(folder / _TOKENS, entry.dtype, start, stop, sequence_length)

    settings = [str(FORMAT_VERSION), tokenizer.fingerprint(), str(sequence_length), str(boundary)]
    return PackedStore(
        train=split(0, boundary),
        held_out=split(boundary, entry.tokens),
        documents=entry.documents,
        tokens=entry.tokens,
        fingerprint=digest([*settings, repr(float(held_out_fraction)), entry.content]),
        sources=entry.sources,
        cut_by_position=boundary != entry.train_tokens,
    )


def _open_entry(folder: Path) -> _Entry | None:
    """The cache entry, or None if it is missing, damaged or of another version: it is then rebuilt."""
    try:
        meta = json.loads((folder / _META).read_text("utf-8"))
        entry = _Entry(**{**meta, "sources": tuple(meta["sources"])})
        expected = entry.tokens * np.dtype(entry.dtype).itemsize
        intact = entry.version == FORMAT_VERSION and (folder / _TOKENS).stat().st_size == expected
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if intact else None


def _write_entry(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    held_out_fraction: float,
    progress: Callable[[int], None] | None,
) -> _Entry:
    """Read all sources once and put the cache entry in place. The caller holds the lock."""
    temporary = folder.with_name(folder.name + ".tmp")
    # Under the lock nobody else works here: what is left belongs to a process that died.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        entry = _pack(temporary, sources, tokenizer, held_out_fraction, progress)
        (temporary / _META).write_text(json.dumps(asdict(entry), indent=2), "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return entry


class _TokenWriter:
    """Appends ids to a file and keeps their count and digest."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self._file = file
        self._dtype = dtype
        self._hash = hashlib.blake2b(digest_size=16)
        self.tokens = 0

    def write(self, ids: npt.NDArray[np.uint32]) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def content(self) -> str:
        return self._hash.hexdigest()


def _pack(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    held_out_fraction: float,
    progress: Callable[[int], None] | None,
) -> _Entry:
    """Write `tokens.bin`: held-out documents go to a second file first, which is then appended."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    held_out_path = folder / "held_out.bin"
    documents = reported = 0
    with open(folder / _TOKENS, "wb", buffering=_WRITE_BUFFER_BYTES) as train_file:
        with open(held_out_path, "wb", buffering=_WRITE_BUFFER_BYTES) as held_out_file:
            train, held_out = _TokenWriter(train_file, dtype), _TokenWriter(held_out_file, dtype)
            eos = np.array([tokenizer.eos_id], dtype=np.uint32)
            for source in sources:
                for document in source.documents():
                    if not document.text:
                        continue
                    writer = held_out if _is_held_out(document.id, held_out_fraction) else train
                    writer.write(tokenizer.encode(document.text))
                    writer.write(eos)
                    documents += 1
                    written = train.tokens + held_out.tokens
                    if progress is not None and written >= reported + _PROGRESS_TOKENS:
                        progress(written)
                        reported = written
        with open(held_out_path, "rb") as appended:
            shutil.copyfileobj(appended, train_file, _WRITE_BUFFER_BYTES)
    held_out_path.unlink()
    tokens = train.tokens + held_out.tokens
    if progress is not None and tokens > reported:
        progress(tokens)
    return _Entry(
        dtype=dtype,
        documents=documents,
        tokens=tokens,
        train_tokens=train.tokens,
        content=digest([train.content(), held_out.content()]),
        sources=tuple(source.describe() for source in sources),
    )


def _is_held_out(document_id: str, fraction: float) -> bool:
    data = document_id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") < fraction * 2**64


def _boundary(folder: Path, entry: _Entry, sequence_length: int, fraction: float, eos_id: int) -> int:
    """The token that held-out begins at: where the documents say, or a cut by position if that fails.

    Raises:
        DataError: there are too few tokens for one sequence in each split.
    """
    needed = sequence_length * (2 if fraction else 1)
    if entry.tokens < needed:
        raise DataError(
            f"{'; '.join(entry.sources) or 'no data source'}: {entry.documents:,} documents with "
            f"{entry.tokens:,} tokens, but at least {needed:,} are needed for one sequence of "
            f"{sequence_length:,} a split; give more text or a smaller sequence_length"
        )
    held_out = entry.tokens - entry.train_tokens
    enough = min(entry.train_tokens, held_out) >= sequence_length
    # Few documents of unequal size can leave the largest one held out, and little to train on.
    if fraction == 0 or (enough and held_out <= max(0.5, 2 * fraction) * entry.tokens):
        return entry.train_tokens
    wished = max(1, round(fraction * entry.tokens / sequence_length)) * sequence_length
    low, high = sequence_length, entry.tokens - sequence_length
    cut = min(max(entry.tokens - wished, low), high)
    # A document border within a quarter of the wished size, if any, keeps documents whole.
    first = max(low, cut - wished // 4)
    window = np.memmap(folder / _TOKENS, dtype=entry.dtype, mode="r")[
        first - 1 : min(high, cut + wished // 4)
    ]
    borders = first + np.flatnonzero(window == eos_id)
    return int(borders[np.abs(borders - cut).argmin()]) if len(borders) else cut

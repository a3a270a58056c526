"""Checkpoints: a committed round, whole or not at all, in a folder or at any fsspec URL.

    round-000012/
        model/chunks-000000-000023.safetensors          anchor and outer state, by chunk
        regions/us-east-1/pool-0-chunks-...safetensors   inner optimizer state, by chunk
        commit.json                                      written last; without it the round does not exist

Tensors are stored by chunk of the flat manifest, so a checkpoint written by two ranks
under ZeRO-2 loads into one rank under ZeRO-3. Safetensors and JSON only: nothing here is
ever unpickled. Every file's length and digest stand in `commit.json` and are checked when read.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from xcloud.cost.bill import Spent
from xcloud.errors import CheckpointError
from xcloud.messages import CheckpointFile
from xcloud.privacy import PrivacyLedger
from xcloud.secure.vault import Vault, is_sealed

__all__ = ["CheckpointStore", "ChunkFile", "CommitRecord", "RegionState", "chunk_files"]

FILE_BYTES = 256 << 20
"""Upper bound of one tensor file, so that writing never holds a second copy of a large shard."""

Array = npt.NDArray[np.float32]


class RegionState(BaseModel):
    """What a commit knows of one region.

    Attributes:
        cursor: absolute position in the region's data order.
        data_fingerprint: of the packed data that the cursor points into.
        inner_round: committed round at which the inner state was saved; None if never.
        files: its inner optimizer state.
        eval_loss: its held-out loss, where the job has guards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cursor: int
    data_fingerprint: str = ""
    inner_round: int | None
    files: tuple[CheckpointFile, ...] = ()
    eval_loss: float | None = None


class CommitRecord(BaseModel):
    """`commit.json`: everything needed to go on from a round. `norms` are of the last merged updates, where the job has guards;
    `endorsements` the regions' signatures on the model, where their updates are masked; `spent` what the run has cost, where it is
    billed."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal[1] = 1
    job: str
    round: int
    manifest_digest: str
    model_digest: str
    regions: dict[str, RegionState]
    model_files: tuple[CheckpointFile, ...]
    chunk_size: int
    tokens: int
    eval_loss_start: float | None
    eval_loss: float | None
    norms: tuple[float, ...] = ()
    endorsements: dict[str, str] = {}
    privacy: PrivacyLedger | None = None
    spent: Spent | None = None


class ChunkFile(BaseModel):
    """A tensor file and the chunk ids it holds: `first` up to and including `last`."""

    model_config = ConfigDict(frozen=True)

    file: CheckpointFile
    first: int
    last: int


def chunk_files(files: Iterable[CheckpointFile], prefix: str) -> list[ChunkFile]:
    """The tensor files under `prefix` with their chunk ranges, in chunk order."""
    pattern = re.compile(re.escape(prefix) + r"chunks-(\d+)-(\d+)\.safetensors")
    found = [(pattern.fullmatch(file.path), file) for file in files]
    return sorted(
        (ChunkFile(file=file, first=int(m[1]), last=int(m[2])) for m, file in found if m),
        key=lambda f: f.first,
    )


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        url: local folder or fsspec URL (`s3://bucket/run`, `gs://...`, `memory://...`).
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise CheckpointError(f"checkpoint.url {self.url!r}: {error}") from None

    def folder(self, round: int) -> str:
        """Where a round's checkpoint lies."""
        return posixpath.join(self.root, f"round-{round:06d}")

    def write_tensors(
        self,
        round: int,
        prefix: str,
        chunks: range,
        tensors: Mapping[str, Mapping[int, Array]],
        scalars: dict[str, Any],
        vault: Vault | None = None,
    ) -> list[CheckpointFile]:
        """Write per-chunk tensors of the given chunk ids.

        Args:
            round: the committed round they belong to.
            prefix: path inside the checkpoint, for example `model/`.
            chunks: ids held by the writer.
            tensors: for each name, fp32 vectors by chunk id.
            scalars: small JSON-safe values kept in every file's header.
            vault: seals the files for their owner, bound to this round and their path; None: they lie open.

        Returns:
            The files written, with length and digest.
        """
        if not chunks:
            return []
        per_chunk = sum(t[chunks[0]].nbytes for t in tensors.values()) or 1
        step = max(1, FILE_BYTES // per_chunk)
        written = []
        for start in range(chunks.start, chunks.stop, step):
            ids = range(start, min(start + step, chunks.stop))
            data = safetensors.numpy.save(
                {f"{name}.{c:06d}": parts[c] for name, parts in tensors.items() for c in ids},
                metadata={"scalars": json.dumps(scalars)},
            )
            path = f"{prefix}chunks-{ids[0]:06d}-{ids[-1]:06d}.safetensors"
            if vault is not None:
                data = vault.seal(data, round, path)
            written.append(self._write(round, path, data))
        return written

    def read_tensors(
        self,
        round: int,
        files: Iterable[ChunkFile],
        chunks: range,
        vault: Vault | None = None,
        sealed_in: int | None = None,
    ) -> tuple[dict[str, dict[int, Array]], dict[str, Any]]:
        """Per-chunk tensors and scalars of the given chunk ids.

        Args:
            round: of the checkpoint.
            files: that hold them.
            chunks: ids that are wanted.
            vault: opens the files.
            sealed_in: the round in which they were written, if they were carried on into this checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or a chunk is in none of them
                (but no files at all hold nothing).
            TamperError: a file is not what its owner has sealed.
        """
        tensors: dict[str, dict[int, Array]] = {}
        scalars: dict[str, Any] = {}
        files = list(files)
        lost = [c for c in chunks if not any(part.first <= c <= part.last for part in files)]
        if files and lost:
            raise CheckpointError(f"{self.folder(round)}: no file holds chunk {lost[0]}")
        for part in files:
            if part.last < chunks.start or part.first >= chunks.stop:
                continue
            path = posixpath.join(self.folder(round), part.file.path)
            data = self._read(round, part.file)
            if vault is not None:
                at = round if sealed_in is None else sealed_in
                data = vault.open(data, path, at, part.file.path)
            elif is_sealed(data):
                raise CheckpointError(
                    f"{path}: sealed with its region's key, and this job names no keys; expected "
                    "envelope.keys or secure_aggregation as when it was saved"
                )
            try:
                loaded = safetensors.numpy.load(data)
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                scalars = json.loads(header["__metadata__"]["scalars"])
            except (SafetensorError, KeyError, ValueError) as error:
                raise CheckpointError(f"{path}: not a checkpoint tensor file: {error}") from None
            for key, value in loaded.items():
                name, _, chunk = key.rpartition(".")
                if int(chunk) in chunks:
                    tensors.setdefault(name, {})[int(chunk)] = value
        for name, parts in tensors.items():
            missing = [c for c in chunks if c not in parts]
            if missing:
                raise CheckpointError(f"{self.folder(round)}: {name} lacks chunk {missing[0]}")
        return tensors, scalars

    def carry(self, source: int, target: int, files: Iterable[CheckpointFile]) -> None:
        """Copy files of an older checkpoint into a newer one, so that each is self-contained."""
        for file in files:
            self._write(target, file.path, self._read(source, file))

    def commit(self, record: CommitRecord) -> None:
        """Make a round's checkpoint exist, once every file it names is there.

        Raises:
            CheckpointError: a file is not there in full (for example: the folder is not
                shared between the regions' nodes and the driver's).
        """
        self.fs.invalidate_cache()
        folder = self.folder(record.round)
        files = [*record.model_files, *(f for r in record.regions.values() for f in r.files)]
        for file in files:
            path = posixpath.join(folder, file.path)
            size = self.fs.size(path) if self.fs.exists(path) else None
            if size != file.size:
                raise CheckpointError(
                    f"{path}: expected {file.size} bytes, found {'no file' if size is None else size}; "
                    "checkpoint.url must be reachable from the driver and from every region"
                )
        final = posixpath.join(folder, "commit.json")
        self.fs.makedirs(folder, exist_ok=True)
        data = record.model_dump_json(indent=1).encode()
        if self._is_local:
            self.fs.pipe_file(final + ".tmp", data)
            Path(final + ".tmp").replace(final)
        else:
            self.fs.pipe_file(final, data)  # one object, put whole

    def rounds(self) -> list[int]:
        """Committed rounds, oldest first."""
        self.fs.invalidate_cache()
        if not self.fs.isdir(self.root):
            return []
        found = []
        for path in self.fs.ls(self.root, detail=False):
            match = re.fullmatch(r"round-(\d+)", posixpath.basename(path.rstrip("/")))
            if match and self.fs.exists(posixpath.join(path, "commit.json")):
                found.append(int(match[1]))
        return sorted(found)

    def record(self, round: int) -> CommitRecord:
        """The commit record of a round.

        Raises:
            CheckpointError: no such round, or its record is damaged.
        """
        path = posixpath.join(self.folder(round), "commit.json")
        try:
            return CommitRecord.model_validate_json(self.fs.cat_file(path))
        except FileNotFoundError:
            known = ", ".join(map(str, self.rounds())) or "none"
            raise CheckpointError(
                f"{self.url}: round {round} has no checkpoint; committed rounds: {known}"
            ) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise CheckpointError(f"{path}: damaged: {first['loc']}: {first['msg']}") from None

    def latest(self) -> CommitRecord | None:
        """The newest committed round, or None."""
        rounds = self.rounds()
        return self.record(rounds[-1]) if rounds else None

    def clear(self, round: int) -> None:
        """Remove what an interrupted writer left of an uncommitted round."""
        folder = self.folder(round)
        if self.fs.exists(folder):
            self.fs.rm(folder, recursive=True)

    def prune(self, keep: int) -> list[int]:
        """Delete all but the newest `keep` committed rounds; returns those deleted."""
        old = self.rounds()[:-keep]
        for round in old:
            self.fs.rm(posixpath.join(self.folder(round), "commit.json"))
            self.fs.rm(self.folder(round), recursive=True)
        return old

    @property
    def _is_local(self) -> bool:
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def _write(self, round: int, path: str, data: bytes) -> CheckpointFile:
        full = posixpath.join(self.folder(round), path)
        self.fs.makedirs(posixpath.dirname(full), exist_ok=True)
        self.fs.pipe_file(full, data)
        return CheckpointFile(path=path, size=len(data), digest=xxhash.xxh3_128_hexdigest(data))

    def _read(self, round: int, file: CheckpointFile) -> bytes:
        path = posixpath.join(self.folder(round), file.path)
        try:
            data: bytes = self.fs.cat_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: named by the commit but missing") from None
        if len(data) != file.size or xxhash.xxh3_128_hexdigest(data) != file.digest:
            raise CheckpointError(f"{path}: damaged: length or digest differs from the commit")
        return data

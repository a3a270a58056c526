"""Chunks that travel in parts, sealed one by one: in place of writing and reading them as they are."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from xcloud.parts import Bytes
from xcloud.secure.envelope import Opening, Sealing
from xcloud.secure.primitives import TAG_BYTES

__all__ = ["ChunkReader", "ChunkSealer", "SealedReader", "reader_of"]


class ChunkReader(Protocol):
    """Finds a chunk's bytes (`parts.PartReader`)."""

    def read(self, chunk: int) -> Bytes: ...


class ChunkSealer:
    """Seals chunks one after the other; without `sealing` they stay as they are.

    Attributes:
        rows: of the envelope's table, by chunk.
    """

    def __init__(self, sealing: Sealing | None) -> None:
        self._sealer = sealing.sealer() if sealing is not None else None
        self._room = np.empty(0, np.uint8)
        self.rows: dict[int, bytes] = self._sealer.rows if self._sealer is not None else {}

    def sealed(self, chunk: int, plain: Bytes) -> Bytes:
        """The sealed bytes, which are valid until the next chunk."""
        if self._sealer is None:
            return plain
        size = plain.nbytes + TAG_BYTES
        if self._room.size < size:
            self._room = np.empty(size, np.uint8)
        out = self._room[:size]
        self._sealer.seal(chunk, plain.view(np.uint8), out)
        return out


class SealedReader:
    """Reads chunks and opens them.

    Args:
        reader: of the sealed chunks.
        opening: of their envelope.
    """

    def __init__(self, reader: ChunkReader, opening: Opening) -> None:
        self._reader, self._opening = reader, opening
        self._room = np.empty(0, np.uint8)

    def read(self, chunk: int) -> Bytes:
        """The plain bytes of `chunk`, valid until another one is read.

        Raises:
            ValueError: see `PartReader.read`.
            SecurityError: they are not what the sender has sealed.
        """
        opener = self._opening.opener()  # a chunk may be read twice
        size = opener.size(chunk)
        if self._room.size < size:
            self._room = np.empty(size, np.uint8)
        out = self._room[:size]
        opener.open(chunk, self._reader.read(chunk), out)
        return out


def reader_of(reader: ChunkReader, opening: Opening | None) -> ChunkReader:
    """A reader of plain chunks, whether they are sealed or not."""
    return reader if opening is None else SealedReader(reader, opening)

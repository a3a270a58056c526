"""Codecs: how one chunk of an update becomes bytes on the wire.

A codec sees one chunk at a time, a contiguous fp32 vector, and returns the exact bytes
that cross the wire. `linear` is true exactly where the sum of encodings decodes to the
encoding of the sum: only such codecs can run under additive masks.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from xcloud.registry import PartConfig, Registry

__all__ = ["CODECS", "Codec", "CodecConfig", "Identity", "IdentityConfig"]


class Codec(Protocol):
    """Encodes and decodes one chunk."""

    linear: bool

    def encode(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Encode `values` (fp32, shape (n,)). May return a view of `values`."""
        ...

    def decode(self, data: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.float32]:
        """Decode to fp32, shape (length,). May return a read-only view of `data`.

        Raises:
            ValueError: `data` cannot be the encoding of `length` values.
        """
        ...


class CodecConfig(PartConfig):
    """Base config of the family."""

    type: str

    def build(self) -> Codec:
        raise NotImplementedError  # every registered subclass builds its codec


CODECS: Registry[CodecConfig] = Registry("codec", CodecConfig)


class Identity:
    """fp32 as it is: 4 bytes a value, little-endian, no copy."""

    linear = True

    def encode(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        return values.view(np.uint8)

    def decode(self, data: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.float32]:
        if data.nbytes != 4 * length:
            raise ValueError(f"{length} fp32 values take {4 * length} bytes, got {data.nbytes}")
        return data.view(np.float32)


@CODECS.register
class IdentityConfig(CodecConfig):
    """`identity`: no compression, no loss."""

    type: Literal["identity"] = "identity"

    def build(self) -> Codec:
        return Identity()

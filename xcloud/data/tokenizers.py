"""Text to token ids and back.

`bytes` needs no download and no vocabulary; `huggingface` takes any tokenizer of the hub or a local
folder. Both save a folder that `AutoTokenizer.from_pretrained` loads, so that an exported model can be
used without xcloud.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from xcloud.errors import ModelError
from xcloud.registry import PartConfig, Registry

__all__ = [
    "TOKENIZERS",
    "BytesTokenizer",
    "BytesTokenizerConfig",
    "HuggingFaceTokenizerConfig",
    "Tokenizer",
    "TokenizerConfig",
]


class Tokenizer(Protocol):
    """Turns text into ids in [0, vocab_size); `eos_id` ends each document."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of `text`: uint32, shape [tokens], without any special token added."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of `ids`; special tokens such as eos are left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer folder that gives the same ids."""
        ...

    def fingerprint(self) -> str:
        """Changes when the ids of some text may have changed; the same on every machine."""
        ...


class TokenizerConfig(PartConfig):
    """Base of every tokenizer config."""

    def build(self) -> Tokenizer:
        raise NotImplementedError(f"{type(self).__name__} must define build()")


TOKENIZERS: Registry[TokenizerConfig] = Registry("tokenizer", TokenizerConfig)


class BytesTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256 is eos."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of `ids` without eos; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ModelError: an id is outside [0, 257).
        """
        values = np.asarray(ids, dtype=np.int64)
        bad = values[(values < 0) | (values >= self.vocab_size)]
        if bad.size:
            raise ModelError(f"token id {bad[0]} is outside the bytes tokenizer's 0..{self.vocab_size - 1}")
        return values[values < self.eos_id].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        # Imported on use: transformers takes seconds, and only an export needs it here.
        from xcloud.data import _hf_tokenizer  # noqa: PLC0415

        _hf_tokenizer.save_bytes_tokenizer(folder, eos_id=self.eos_id)

    def fingerprint(self) -> str:
        return "bytes-eos256"


@TOKENIZERS.register
class BytesTokenizerConfig(TokenizerConfig):
    """One token a byte: 257 ids, no download."""

    type: Literal["bytes"] = "bytes"

    def build(self) -> BytesTokenizer:
        return BytesTokenizer()


@TOKENIZERS.register
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """`path`: a local tokenizer folder or a hub id. Code from the hub is never run."""

    type: Literal["huggingface"] = "huggingface"
    path: str

    def build(self) -> Tokenizer:
        """
        Raises:
            ModelError: the tokenizer cannot be loaded or has no eos token.
        """
        # Imported on use: transformers takes seconds, which jobs on bytes need not pay.
        from xcloud.data import _hf_tokenizer  # noqa: PLC0415

        return _hf_tokenizer.HuggingFaceTokenizer(self.path)

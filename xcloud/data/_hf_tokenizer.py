"""Tokenizers of the Hugging Face library.

Apart from `tokenizers`, so that only jobs that need it pay for importing transformers (2-3 s).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xcloud.errors import ModelError

__all__ = ["HuggingFaceTokenizer", "save_bytes_tokenizer"]


class HuggingFaceTokenizer:
    """A tokenizer loaded by `AutoTokenizer`; see `xcloud.data.tokenizers.Tokenizer`."""

    def __init__(self, path: str) -> None:
        local = os.path.expanduser(path)
        try:
            # A hub id is the user's choice and is not pinned; no code comes with it.
            self._inner: Any = AutoTokenizer.from_pretrained(local, trust_remote_code=False)  # nosec B615
        # A folder of the wrong shape surfaces as almost any type from transformers' class lookup.
        except Exception as error:
            raise ModelError(
                f"cannot load a tokenizer from {path!r}: {error}; "
                "expected a folder with tokenizer.json or a hub id 'owner/name'"
            ) from error
        if self._inner.eos_token_id is None:
            raise ModelError(
                f"the tokenizer {path!r} has no eos token, which must end each document; set eos_token"
            )
        self.eos_id = int(self._inner.eos_token_id)
        # Ids may have gaps, so the largest one counts and not how many there are.
        self.vocab_size = max(len(self._inner), 1 + max(self._inner.get_vocab().values()))

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        ids = self._inner(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        values = np.asarray(ids, dtype=np.int64).tolist()
        text = self._inner.decode(values, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def save(self, folder: Path) -> None:
        self._inner.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        if self._inner.is_fast:
            content = self._inner.backend_tokenizer.to_str()
        else:
            content = json.dumps([type(self._inner).__name__, sorted(self._inner.get_vocab().items())])
        settings = json.dumps([self.eos_id, bool(self._inner.split_special_tokens)])
        return hashlib.blake2b((content + settings).encode("utf-8"), digest_size=16).hexdigest()


def save_bytes_tokenizer(folder: Path, *, eos_id: int) -> None:
    """Write a byte-level BPE without merges whose ids are the byte values, and `eos_id` for eos."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    eos = AddedToken("<|endoftext|>", special=True, normalized=False)
    backend.add_special_tokens([eos])
    assert backend.token_to_id(eos.content) == eos_id
    # split_special_tokens: text that spells the eos token is encoded as its bytes, as training did.
    build: Any = PreTrainedTokenizerFast  # its __init__ carries no annotations
    wrapped = build(tokenizer_object=backend, eos_token=eos, split_special_tokens=True)
    wrapped.save_pretrained(str(folder))


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte value in byte-level BPE (Radford et al. 2019).

    Printable bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

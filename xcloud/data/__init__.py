"""From text anywhere to token sequences on disk: sources, tokenizers, the packed store, the cursor.

A region reads its own documents only; nothing in this package talks to another region.
"""

from __future__ import annotations

from xcloud.data.cursor import Order
from xcloud.data.sources import (
    SOURCES,
    Document,
    HuggingFaceSourceConfig,
    JsonlSourceConfig,
    ParquetSourceConfig,
    Source,
    SourceConfig,
    StdlibSourceConfig,
    TextSourceConfig,
)
from xcloud.data.store import PackedSplit, PackedStore, prepare_store
from xcloud.data.tokenizers import (
    TOKENIZERS,
    BytesTokenizer,
    BytesTokenizerConfig,
    HuggingFaceTokenizerConfig,
    Tokenizer,
    TokenizerConfig,
)

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "BytesTokenizer",
    "BytesTokenizerConfig",
    "Document",
    "HuggingFaceSourceConfig",
    "HuggingFaceTokenizerConfig",
    "JsonlSourceConfig",
    "Order",
    "PackedSplit",
    "PackedStore",
    "ParquetSourceConfig",
    "Source",
    "SourceConfig",
    "StdlibSourceConfig",
    "TextSourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "prepare_store",
]

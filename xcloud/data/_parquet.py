"""Reading one column of a parquet file batch by batch.

Apart from `sources`, so that only jobs that read parquet pay for importing pyarrow (0.5 s, 60 MB).
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from xcloud.data._files import StoredFile, open_binary
from xcloud.errors import DataError
from xcloud.registry import nearest

__all__ = ["read_column"]

# Rows decoded at a time: text rows are often some KB long, so a batch stays in the order of MBs.
_BATCH_ROWS = 512


def read_column(file: StoredFile, column: str) -> Iterator[tuple[str, str]]:
    """Yield (row id, text) of a string column; null rows are left out.

    Raises:
        DataError: not a parquet file, no such column, or a column that holds no strings.
    """
    with open_binary(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            _check_column(file.path, parquet.schema_arrow, column)
            row = 0
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield f"{file.id}#{row}", text
                    row += 1
        except pa.ArrowException as error:
            raise DataError(f"cannot read {file.path} as parquet: {error}") from error


def _check_column(path: str, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        guess = nearest(column, schema.names)
        raise DataError(
            f"{path} has no column {column!r}; its columns: {', '.join(schema.names)}"
            + (f" (did you mean {guess!r}?)" if guess else "")
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, expected strings")

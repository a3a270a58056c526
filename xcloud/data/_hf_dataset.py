"""Rows of a Hugging Face dataset, from the hub or a local folder.

Apart from `sources`, so that only jobs that read one pay for importing `datasets` (2 s).
`trust_remote_code` is never passed: a dataset that needs its own Python code is refused by `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from xcloud.errors import DataError
from xcloud.registry import nearest

__all__ = ["read_rows"]


def read_rows(
    path: str, *, name: str | None, split: str, column: str, streaming: bool, revision: str | None
) -> Iterator[tuple[str, str]]:
    """Yield (row id, text) of one string column; null rows are left out.

    Args:
        path: hub id, or a folder written by `save_to_disk` or readable by `load_dataset`.

    Raises:
        DataError: the dataset, split or column does not exist, or a row holds no string.
    """
    what = f"dataset {path!r} split {split!r}"
    label = Path(path).resolve().name if Path(path).is_dir() else path
    prefix = "/".join(part for part in (label, name, split) if part)
    try:
        rows = _open(path, name, split, streaming, revision)
        known = rows.column_names
        if known is not None:
            _check_column(what, list(known), column)
            rows = rows.select_columns([column])
        for index, row in enumerate(rows):
            if column not in row:
                _check_column(what, list(row), column)
            text = row[column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"{what}, row {index}: column {column!r} holds {type(text).__name__}, expected str"
                )
            yield f"{prefix}#{index}", text
    # `datasets` reports bad paths, names, splits, files and connections through these three families.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {what}: {error}") from error


def _open(path: str, name: str | None, split: str, streaming: bool, revision: str | None) -> Any:
    saved_one = Path(path, "state.json").is_file()
    if not saved_one and not Path(path, "dataset_dict.json").is_file():
        return datasets.load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    saved = datasets.load_from_disk(path)
    if saved_one:
        if saved.split is not None and str(saved.split) != split:
            raise DataError(f"dataset {path!r} holds split {str(saved.split)!r}, not {split!r}")
        return saved
    if split not in saved:
        raise DataError(f"dataset {path!r} has no split {split!r}; its splits: {', '.join(sorted(saved))}")
    return saved[split]


def _check_column(what: str, known: list[str], column: str) -> None:
    if column in known:
        return
    guess = nearest(column, known)
    hint = f" (did you mean {guess!r}?)" if guess else ""
    raise DataError(f"{what} has no column {column!r}; its columns: {', '.join(known)}{hint}")

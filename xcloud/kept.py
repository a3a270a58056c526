"""Records of a run folder that are one JSON file each: written whole or not at all, and on the disk when that returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from xcloud.errors import CheckpointError

__all__ = ["read_record", "write_record"]

R = TypeVar("R", bound=BaseModel)


def write_record(path: Path, record: BaseModel) -> None:
    """Replace the file by the record; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(record.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_record(path: Path, model: type[R], what: str, expected: str) -> R | None:
    """The record in the file; None without a file.

    Args:
        path: of the file.
        model: of the record.
        what: the record's name, for errors.
        expected: what a damaged one means, or what to do about it.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: damaged {what} ({first}); {expected}") from None

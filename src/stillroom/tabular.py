"""Rows in files as they stand there: JSON Lines and Parquet (extra ``tables``), one file or a folder of them.

A line that cannot be read is given with what is wrong with it: whoever reads decides whether that ends anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import DataError, MissingFileError, UsageError, missing_extra

PARQUET_ROWS = 1024  # read at a time: rows of log-probabilities are large


@dataclass(frozen=True)
class Line:
    """One row, or what is wrong with it."""

    place: str  # 'answers.jsonl, line 3'
    row: Mapping[str, Any] | None
    wrong: str = ""


def jsonl_lines(path: Path) -> Iterator[Line]:
    """One JSON object per line; empty lines are skipped. Raises DataError for a file that is not UTF-8."""
    number = 0
    try:
        # newline="\n": other separators (U+2028, a carriage return) may stand within a text
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _jsonl_line(f"{path.name}, line {number}", text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 (after line {number}, {error.reason}). Save it as UTF-8.") from None


def _jsonl_line(place: str, text: str) -> Line:
    try:
        row = json.loads(text)
    except ValueError as error:
        return Line(place, None, f"not JSON ({error})")
    if not isinstance(row, dict):
        return Line(place, None, f"{type(row).__name__}, not an object with named values")
    return Line(place, row)


def parquet_lines(path: Path) -> Iterator[Line]:
    """The rows of a Parquet file, a thousand in memory at a time. Raises DataError for a file that is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "tables") from error
    number = 0
    try:
        for piece in parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS):
            for row in piece.to_pylist():
                number += 1
                yield Line(f"{path.name}, row {number}", row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path.name} cannot be read as Parquet ({' '.join(str(error).split())}).") from None


READERS: Mapping[str, Callable[[Path], Iterator[Line]]] = {".jsonl": jsonl_lines, ".parquet": parquet_lines}


def files_at(path: Path) -> list[Path]:
    """The file, or a folder's JSON Lines and Parquet files in order of their names, subfolders included.

    Raises MissingFileError where there is none, UsageError for a file of another kind.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise UsageError(f"{path.name} is neither .jsonl nor .parquet: write the rows as one of these.")
        return [path]
    if not path.is_dir():
        raise MissingFileError(f"{path} does not exist.")
    found = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
    if not found:
        raise MissingFileError(f"{path} holds no .jsonl and no .parquet file.")
    return found


def lines_of(files: list[Path]) -> Iterator[Line]:
    """The rows of all files, in order."""
    for file in files:
        yield from READERS[file.suffix](file)

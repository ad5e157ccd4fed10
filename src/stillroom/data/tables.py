"""Rows in files -> Table: CSV, JSON Lines and Parquet. One clear line for whatever does not fit."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.data.table import Augment, Table
from stillroom.errors import DataError, MissingFileError, UsageError, missing_extra, nearest
from stillroom.tabular import jsonl_lines
from stillroom.types import UNLABELLED

Rows = Mapping[str, Sequence[Any]]  # column name -> one value per row; None or '' = missing


def from_csv(
    path: str | Path,
    *,
    text: str | None = None,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    id: str | None = None,
    classes: Sequence[str] | None = None,
    delimiter: str = ",",
    skip_rows: int = 0,
    folder: Path | None = None,
    **about: Any,
) -> Table:
    """A Table from a CSV file with a header line. The arguments are those of ``from_rows``.

    ``skip_rows``: rows right after the header that are no data, such as a row of types.
    Raises MissingFileError, or DataError for an empty file and for a row with too few or too many fields (which line).
    """
    if len(delimiter) != 1:
        raise UsageError(f"delimiter is {delimiter!r}; give one character, such as ',' or a tab.")
    path = existing_file(path, folder)
    header, found = _lines(path, delimiter)
    rows = {name: [row[place] for row in found[skip_rows:]] for place, name in enumerate(header)}
    if len(rows) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path.name}: the header names {twice!r} twice. Rename one of the two columns.")
    return from_rows(rows, text=text, columns=columns, label=label, id=id, classes=classes, **_known(path, about))


def _lines(path: Path, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file, all of the header's length."""
    found: list[list[str]] = []
    limit = csv.field_size_limit(2**31 - 1)  # an article is longer than the 128 KiB that Python allows a field
    # strict: a quote that is never closed would swallow the rest of the file as one field
    reader = csv.reader(io.StringIO(_read(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row and found and len(row) != len(found[0]):
                raise DataError(
                    f"{path.name}, line {reader.line_num}: {len(row)} fields, but the header has {len(found[0])} "
                    f"({', '.join(found[0][:6])}). Check the delimiter ({delimiter!r}) and the quotes."
                )
            if row:
                found.append(row)
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: not CSV ({error}). Check the quotes.") from None
    finally:
        csv.field_size_limit(limit)
    if not found:
        raise DataError(f"{path.name} is empty.")
    return found[0], found[1:]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None


def from_jsonl(
    path: str | Path,
    *,
    text: str | None = None,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    id: str | None = None,
    classes: Sequence[str] | None = None,
    folder: Path | None = None,
    **about: Any,
) -> Table:
    """A Table from a file with one JSON object per line; a key that a line lacks is missing there."""
    path = existing_file(path, folder)
    found: list[Mapping[str, Any]] = []
    for line in jsonl_lines(path):
        if line.row is None:
            raise DataError(f"{line.place}: {line.wrong}.")
        found.append(line.row)
    names = list(dict.fromkeys(name for row in found for name in row))
    rows = {name: [row.get(name) for row in found] for name in names}
    return from_rows(rows, text=text, columns=columns, label=label, id=id, classes=classes, **_known(path, about))


def from_parquet(
    path: str | Path,
    *,
    text: str | None = None,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    id: str | None = None,
    classes: Sequence[str] | None = None,
    folder: Path | None = None,
    **about: Any,
) -> Table:
    """A Table from a Parquet file (extra ``tables``). Raises DataError for a file that is not Parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "tables") from error
    path = existing_file(path, folder)
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path.name} cannot be read as Parquet ({' '.join(str(error).split())}).") from None
    rows = {name: table.column(name).to_pylist() for name in table.column_names}
    return from_rows(rows, text=text, columns=columns, label=label, id=id, classes=classes, **_known(path, about))


def from_rows(
    rows: Rows,
    *,
    text: str | None = None,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    id: str | None = None,
    classes: Sequence[str] | None = None,
    beside: Sequence[str] = (),
    name: str = "rows",
    licence: str = "unknown",
    source: str = "unknown",
    augment: Augment | None = None,
) -> Table:
    """A Table from columns of values.

    ``text``: the column that becomes the text column 'text'. ``columns``: numeric columns, stacked into 'x' float32
    [N, D]; a column of lists of numbers gives [N, ...]. ``label``: class names, or float targets where ``classes`` is
    not given, every value is a number and one of them is written with a point; a missing label is unlabelled. ``id``:
    unique names; without it rows are named by position, so a file that grows must grow at its end. ``classes``: their
    order, by default sorted. ``beside``: further columns of texts under their own names, '' where one is missing (what
    a prompt shows, a person's answer). Raises UsageError for a column that is not there (with the nearest name),
    DataError for values that do not fit (which row).
    """
    for wanted in (text, label, id, *(columns or ()), *beside):
        if wanted is not None and wanted not in rows:
            raise UsageError(f"there is no column {wanted!r}{nearest(wanted, rows)}")
    count = len(next(iter(rows.values()))) if rows else 0
    if count == 0:
        raise DataError(f"{name} holds no rows.")
    if text is None and not columns:
        raise UsageError(f"name the inputs: text='a column', or columns=[...]; there are {', '.join(rows)}.")
    ids = tuple(str(value) for value in rows[id]) if id else tuple(f"row-{row:06d}" for row in range(count))
    inputs: dict[str, Any] = {}
    if text is not None:
        inputs["text"] = tuple(_text(value, text, ids[row]) for row, value in enumerate(rows[text]))
    for also in beside:
        inputs[also] = tuple(
            "" if value is None else _text(value, also, ids[row]) for row, value in enumerate(rows[also])
        )
    if columns:
        inputs["x"] = _numbers(rows, columns, ids)
    labels, order = _labels(rows[label], classes, label, ids) if label else (None, tuple(classes) if classes else None)
    return Table(inputs, ids, labels, order, name=name, licence=licence, source=source, augment=augment)


def _labels(
    values: Sequence[Any], classes: Sequence[str] | None, name: str, ids: Sequence[str]
) -> tuple[Tensor, tuple[str, ...] | None]:
    known = [value for value in values if not _missing(value)]
    if classes is None and known and all(map(_numeric, known)) and any(map(_fraction, known)):
        numbers = [[math.nan if _missing(value) else float(value)] for value in values]
        return torch.tensor(numbers, dtype=torch.float32), None
    order = tuple(map(str, classes)) if classes else tuple(sorted({str(value) for value in known}, key=_natural))
    place = {label: number for number, label in enumerate(order)}
    found = []
    for row, value in enumerate(values):
        if _missing(value):
            found.append(UNLABELLED)
        elif str(value) not in place:
            raise DataError(
                f"{name!r} of {ids[row]!r} is {value!r}, which is none of the classes{nearest(str(value), order)}"
            )
        else:
            found.append(place[str(value)])
    return torch.tensor(found), order


def _numeric(value: Any) -> bool:
    return not isinstance(value, bool) and not isinstance(value, list | tuple) and _is_number(value)


def _fraction(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and "." in value)


def _natural(label: str) -> tuple[int, float, str]:
    return (0, float(label), label) if label.lstrip("-").isdigit() else (1, 0.0, label)


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, name: str, row: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name!r} of {row!r} is {value!r}, not text.")
    return value


def _numbers(rows: Rows, columns: Sequence[str], ids: Sequence[str]) -> Tensor:
    made = []
    for name in columns:
        try:
            made.append(torch.tensor([_number(value) for value in rows[name]], dtype=torch.float32))
        except (TypeError, ValueError):
            row = next((r for r, value in enumerate(rows[name]) if not _is_number(value)), None)
            if row is None:
                raise DataError(
                    f"the lists of numbers in {name!r} are not all of one length. Pad or cut them."
                ) from None
            raise DataError(f"{name!r} of {ids[row]!r} is {rows[name][row]!r}, not a number.") from None
    if len(made) == 1 and made[0].dim() > 1:
        return made[0]
    return torch.stack([column.reshape(len(ids), -1) for column in made], dim=-1).flatten(1)


def _number(value: Any) -> Any:
    return [_number(item) for item in value] if isinstance(value, list | tuple) else float(value)


def _is_number(value: Any) -> bool:
    try:
        _number(value)
    except (TypeError, ValueError):
        return False
    return True


def existing_file(path: str | Path, folder: Path | None) -> Path:
    """The file, looked up from ``folder`` first. Raises MissingFileError."""
    for place in ((folder / path) if folder else Path(path), Path(path)):
        if place.is_file():
            return place
    raise MissingFileError(f"{path} does not exist (looked in {folder or Path('.')}).")


def _known(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": path.stem, "source": path.name, **about}

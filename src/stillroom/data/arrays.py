"""Arrays -> Table: NumPy files, never unpickled, and arrays in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from stillroom.data.table import Table
from stillroom.data.tables import existing_file
from stillroom.errors import DataError, UsageError, nearest
from stillroom.types import Column


def from_numpy(
    path: str | Path,
    *,
    inputs: Mapping[str, str] | str = "x",
    label: str | None = "y",
    id: str | None = None,
    classes: Sequence[str] | None = None,
    scale: float = 1.0,
    folder: Path | None = None,
    **about: Any,
) -> Table:
    """A Table from a .npz file: ``inputs`` is an array's name, or {column: array}; ``label`` and ``id`` name arrays.

    A .npy file holds one array, the column 'x'. Without an array 'y', all rows are unlabelled.

    Integer inputs become float32 and all inputs are multiplied by ``scale`` (1 / 255 for bytes). Integer labels are
    class numbers (negative = unlabelled), float labels are targets. Raises UsageError for an array that is not there,
    DataError for a file that holds Python objects, which would have to be unpickled.
    """
    path = existing_file(path, folder)
    try:
        loaded = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)  # a broken zip leaves a file open
        arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise DataError(
            f"{path.name} is not a .npz file of plain arrays ({error}). Save it with numpy.savez."
        ) from None
    columns = {"x": inputs} if isinstance(inputs, str) else dict(inputs)
    optional = () if label == "y" else (label,)
    for wanted in (*columns.values(), *optional, id):
        if wanted is None:
            continue
        if wanted not in arrays:
            raise UsageError(f"{path.name} has no array {wanted!r}{nearest(wanted, arrays)}")
    known = {"name": path.stem, "source": path.name, **about}
    labels = arrays.get(label) if label else None
    names = [str(name) for name in arrays[id]] if id else None
    made = {column: arrays[name] for column, name in columns.items()}
    return from_arrays(made, labels, ids=names, classes=classes, scale=scale, **known)


def from_arrays(
    inputs: Mapping[str, Any] | Any,
    labels: Any = None,
    *,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    scale: float = 1.0,
    **about: Any,
) -> Table:
    """A Table from arrays (or one array, the column 'x'); arrays of strings become text columns.

    Without ids, rows are named by position. Raises DataError for arrays that are neither numbers nor strings.
    """
    columns = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
    made = {name: _column(name, np.asarray(array), scale) for name, array in columns.items()}
    count = len(next(iter(made.values()), ()))
    if count == 0:
        raise DataError("the arrays hold no rows.")
    names = tuple(map(str, ids)) if ids is not None else tuple(f"row-{row:06d}" for row in range(count))
    found = None
    if labels is not None:
        array = np.asarray(labels)
        if array.dtype.kind in "iu":
            found = torch.as_tensor(array.astype(np.int64))
            found = found.masked_fill(found < 0, -100)
            classes = classes or tuple(str(number) for number in range(int(found.max()) + 1))
        elif array.dtype.kind == "f":
            found = torch.as_tensor(array.astype(np.float32)).reshape(count, -1)
        else:
            raise DataError(f"the labels are {array.dtype}; give class numbers (integers) or targets (floats).")
    return Table(made, names, found, tuple(classes) if classes else None, **about)


def _column(name: str, array: np.ndarray, scale: float) -> Column:
    if array.dtype.kind in "US":
        return tuple(map(str, array.astype(str)))
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise DataError(f"the array {name!r} is {array.dtype} {list(array.shape)}; give rows of numbers or of strings.")
    return torch.as_tensor(array.astype(np.float32)) * scale

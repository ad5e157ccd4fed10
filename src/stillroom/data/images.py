"""A folder of images, one folder per class -> Table; each image is read when a batch needs it (extra ``images``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.data.table import Table
from stillroom.errors import DataError, MissingFileError, missing_extra

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Files:
    """Image files as a lazy column: float32 [C, H, W] in 0..1 per row."""

    paths: tuple[Path, ...]
    size: tuple[int, int]  # H, W
    grey: bool

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images of these rows, [B, C, H, W]. Raises DataError for a file that is not an image (which)."""
        channels = 1 if self.grey else 3
        if not len(indices):
            return torch.empty(0, channels, *self.size)
        return torch.stack([self._one(self.paths[row]) for row in indices])

    def select(self, indices: Sequence[int]) -> Files:
        return dataclasses.replace(self, paths=tuple(self.paths[row] for row in indices))

    def _one(self, path: Path) -> Tensor:
        image = _pillow()
        try:
            with image.open(path) as file:
                made = file.convert("L" if self.grey else "RGB").resize(self.size[::-1], image.Resampling.BILINEAR)
        except OSError as error:
            raise DataError(f"{path.parent.name}/{path.name} cannot be read as an image ({error}).") from None
        array = np.asarray(made, dtype=np.float32) / 255
        return torch.from_numpy(array).reshape(*self.size, -1).movedim(-1, 0).contiguous()


def from_image_folder(
    path: str | Path,
    *,
    size: int | Sequence[int] = 224,
    grey: bool = False,
    classes: Sequence[str] | None = None,
    folder: Path | None = None,
    **about: Any,
) -> Table:
    """A Table from path/CLASS/NAME.png and so on: column 'x' float32 [C, H, W] in 0..1, ids 'CLASS/NAME.png'.

    ``size`` is H = W or (H, W); images are resized to it. Images directly under ``path`` are unlabelled.
    Raises MissingFileError when the folder is not there, DataError when it holds no image.
    """
    _pillow()
    root = (folder / path) if folder and (folder / path).is_dir() else Path(path)
    if not root.is_dir():
        raise MissingFileError(f"{path} is not a folder (looked in {folder or Path('.')}).")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise DataError(f"{path} holds no images ({', '.join(sorted(ENDINGS))}).")
    kinds = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    order = tuple(classes) if classes else tuple(sorted({kind for kind in kinds if kind is not None}))
    place = {name: number for number, name in enumerate(order)}
    for file, kind in zip(files, kinds, strict=True):
        if kind is not None and kind not in place:
            raise DataError(
                f"{file.relative_to(root)} lies in {kind!r}, which is none of the classes {', '.join(order)}."
            )
    labels = torch.tensor([-100 if kind is None else place[kind] for kind in kinds])
    shape = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    ids = tuple(file.relative_to(root).as_posix() for file in files)
    known = {"name": root.name, "source": root.name, **about}
    return Table({"x": Files(tuple(files), shape, grey)}, ids, labels if order else None, order or None, **known)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images") from error
    return Image

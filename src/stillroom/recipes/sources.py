"""The tables of a recipe: read, divided by role, without rows that stand on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.data.splits import check_leakage, keep_split, label_budget, split, unlabelled
from stillroom.data.table import Table
from stillroom.errors import DataError, PairError, UsageError
from stillroom.recipes.named import DATA, call
from stillroom.recipes.parts import augment_of
from stillroom.recipes.recipe import Recipe, Split, Use


def read_sources(recipe: Recipe, base: Path) -> dict[str, Table]:
    """The data as it is read: one source, or all sides in one class order.

    Each side's file alone would number the classes that it happens to hold.
    """
    data = recipe.data
    if data.train is None or data.test is None:
        assert data.source is not None  # the recipe was checked
        return {"source": _read(data.source, base)}
    train = _read(data.train, base)
    order = {"classes": train.classes} if train.classes else {}
    parts = {"train": train, "test": _read(data.test, base, **order)}
    if data.validation is not None:
        parts["validation"] = _read(data.validation, base, **order)
    for name, part in parts.items():
        if train.classes and part.classes and train.classes != part.classes:
            raise PairError(
                f"train orders its classes {', '.join(train.classes[:6])}, {name} {', '.join(part.classes[:6])}. "
                "Give both the same, with classes: [...]."
            )
    return parts


def _read(use: Use, base: Path, **known: Any) -> Table:
    found = call(use, DATA, base, "data", {"folder": base, **known})
    if not isinstance(found, Table):
        raise DataError(f"{use.use} returned {type(found).__name__}; data is a stillroom.Table.")
    return found


def divided(recipe: Recipe, sources: dict[str, Table], folder: Path | None) -> tuple[dict[str, Table], dict[str, Any]]:
    """The parts train, test (and validation), and the pairs of rows that stood on both sides.

    A split is kept in ``folder``, so that a row that was tested is never trained on; None: it is not written.
    """
    if "source" in sources:
        shares = recipe.data.split or Split()
        wanted = {name: share for name in ("train", "validation", "test") if (share := getattr(shares, name)) > 0}
        if folder is None:
            sources = split(sources["source"], wanted, shares.seed)
        else:
            sources = keep_split(folder / "splits.json", sources["source"], wanted, shares.seed)
    return check_leakage(sources, recipe.data.duplicates)


def by_role(recipe: Recipe, parts: dict[str, Table], base: Path) -> dict[str, Any]:
    """The parts with the label budget, and what is trained on: ``labelled``, and ``pool`` (what the student sees)."""
    data, train = recipe.data, parts["train"]
    if data.labels is not None:
        train = label_budget(train, data.labels.count, seed=data.labels.seed)
    labelled = train.labelled()
    pool = train if recipe.learn_from == "all" else unlabelled(train)
    if len(pool) == 0:
        raise DataError("learn_from: unlabelled leaves no rows; give data.labels, or set learn_from: all.")
    augment = augment_of(data.views, base)
    if augment is not None:
        labelled, pool = labelled.with_augment(augment), pool.with_augment(augment)
    elif pool.augmented:
        raise UsageError("the training data augments itself: name its augmentation in data.views instead.")
    return parts | {"train": train, "labelled": labelled, "pool": pool}

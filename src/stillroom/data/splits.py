"""Which rows are for what: splits that are kept, label budgets, and rows that stand on both sides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from stillroom.data.table import Table
from stillroom.digests import input_fingerprints, key_hash
from stillroom.errors import DataError, UsageError, nearest
from stillroom.files import read_json, write_json
from stillroom.labels import labelled_rows
from stillroom.types import Column, Examples

ROWS = 512
Duplicates = Literal["drop", "refuse", "allow"]


def split(table: Table, shares: Mapping[str, float], seed: int = 0) -> dict[str, Table]:
    """Parts of a table by share, such as {"train": 0.8, "validation": 0.1, "test": 0.1}, each class in its share.

    Rows are ranked by a hash of (id, seed) within their class and dealt out, so a part depends on the ids, not on their
    order. Shares hold on average even for classes of one row, which plain rounding would send to the first part.
    Rows that are added later move a few others: ``keep_split`` moves none. Parts keep the table's order.
    Raises UsageError for shares that do not sum to 1, DataError for an empty part.
    """
    if not shares or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"the shares of a split are positive and sum to 1, not {dict(shares)}.")
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for rows in _by_class(table):
        ranked = sorted(rows, key=lambda row: key_hash(table.ids[row], seed))
        # where this class starts within the first row's share: the same for all rows of the class, uniform over seeds
        offset = key_hash(f"split of {table.ids[ranked[0]]}", seed) / 2**64
        start, reached = 0, 0.0
        for name, share in shares.items():
            reached += share
            stop = len(ranked) if name == list(shares)[-1] else math.floor(reached * len(ranked) + offset)
            parts[name] += ranked[start:stop]
            start = stop
    for name, rows in parts.items():
        if not rows:
            raise DataError(f"the split {name!r} of {len(table)} rows is empty. Give it a larger share, or more rows.")
    return {name: _part(table, sorted(rows), name) for name, rows in parts.items()}


def keep_split(path: str | Path, table: Table, shares: Mapping[str, float], seed: int = 0) -> dict[str, Table]:
    """``split``, written to ``path`` as JSON lists of ids and read back from there ever after.

    Rows that joined the data since are left out. Raises DataError when rows of the kept split are gone.
    """
    path = Path(path)
    if not path.exists():
        parts = split(table, shares, seed)
        write_json(path, {"shares": dict(shares), "seed": seed, "ids": {n: list(p.ids) for n, p in parts.items()}})
        return parts
    kept = read_json(path)["ids"]
    if set(kept) != set(shares):
        raise DataError(
            f"{path} keeps a split into {', '.join(sorted(kept))}, not {', '.join(sorted(shares))}. "
            "Delete it to split anew."
        )
    place = {name: row for row, name in enumerate(table.ids)}
    gone = [name for ids in kept.values() for name in ids if name not in place]
    if gone:
        raise DataError(
            f"{len(gone)} rows of the split in {path} are gone, such as {gone[0]!r}. Delete it to split anew."
        )
    return {name: _part(table, [place[i] for i in kept[name]], name) for name in shares}


def label_budget(table: Table, count: int, seed: int = 0, per_class_at_least: int = 1) -> Table:
    """The same rows with labels on ``count`` of them, drawn by a hash of (id, seed); the rest is unlabelled.

    Each class keeps at least ``per_class_at_least`` labels (or all it has). Raises DataError for more than there are.
    """
    labelled = labelled_rows(table.labels)
    if count > len(labelled) or table.labels is None:
        raise DataError(f"a budget of {count} labels, but only {len(labelled)} rows have one.")
    ranked = sorted(labelled, key=lambda row: key_hash(table.ids[row], seed))
    chosen: list[int] = []
    if table.classes is not None and table.labels.dim() == 1 and not table.labels.is_floating_point():
        seen = [0] * len(table.classes)
        for row, label in zip(ranked, table.labels[ranked].tolist(), strict=True):
            if seen[label] < per_class_at_least:
                seen[label] += 1
                chosen.append(row)
    if len(chosen) > count:
        raise DataError(
            f"a budget of {count} labels cannot give {per_class_at_least} to each of {len(table.classes or ())}."
        )
    taken = set(chosen)
    chosen += [row for row in ranked if row not in taken][: count - len(chosen)]
    hidden = table.without_labels().labels
    assert hidden is not None
    hidden[chosen] = table.labels[chosen]
    return dataclasses.replace(table, labels=hidden)


def leakage(kept: Examples, other: Examples) -> list[tuple[str, str]]:
    """The pairs (id in ``kept``, id in ``other``) whose inputs are equal; text is compared without case and spacing."""
    known: dict[int, str] = {}
    for name, fingerprint in _fingerprints(kept):
        known.setdefault(fingerprint, name)
    return [(known[fingerprint], name) for name, fingerprint in _fingerprints(other) if fingerprint in known]


def check_leakage(
    parts: Mapping[str, Table], duplicates: Duplicates = "drop", kept: str = "test"
) -> tuple[dict[str, Table], dict[str, list[tuple[str, str]]]]:
    """The parts without the rows that stand in ``kept`` too, and those pairs by part: what is tested was never seen.

    ``duplicates``: 'drop' leaves such rows out of the other parts, 'refuse' raises a DataError that names some,
    'allow' only reports them.
    """
    if kept not in parts:
        raise UsageError(f"there is no part {kept!r}{nearest(kept, parts)}")
    found = {name: leakage(parts[kept], part) for name, part in parts.items() if name != kept}
    found = {name: pairs for name, pairs in found.items() if pairs}
    if found and duplicates == "refuse":
        name, pairs = next(iter(found.items()))
        raise DataError(
            f"{len(pairs)} rows of {name!r} stand in {kept!r} too, such as {pairs[0][1]!r} = {pairs[0][0]!r}. "
            "Remove them, or set duplicates: drop."
        )
    clean = dict(parts)
    if duplicates == "drop":
        for name, pairs in found.items():
            gone = {row_id for _, row_id in pairs}
            clean[name] = parts[name].select([r for r, row_id in enumerate(parts[name].ids) if row_id not in gone])
    return clean, found


def _by_class(table: Table) -> list[list[int]]:
    labels = table.labels
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        return [list(range(len(table)))]
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    return [groups[label] for label in sorted(groups)]


def _part(table: Table, rows: Sequence[int], name: str) -> Table:
    return dataclasses.replace(table.select(rows), name=f"{table.name}, {name}")


def _fingerprints(examples: Examples) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for start in range(0, len(examples), ROWS):
        batch = examples.batch(range(start, min(start + ROWS, len(examples))), None)
        plain = {name: _plain(column) for name, column in batch.inputs.items()}
        found += zip(batch.ids, map(int, input_fingerprints(plain)), strict=True)
    return found


def _plain(column: Column) -> Column:
    return column if isinstance(column, torch.Tensor) else tuple(" ".join(text.lower().split()) for text in column)


def unlabelled(table: Table) -> Table:
    """The rows without a label."""
    known = set(labelled_rows(table.labels))
    return table.select([row for row in range(len(table)) if row not in known])

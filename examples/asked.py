"""A few Reuters stories (examples/reuters.py) with two topics: earnings, and all others."""

from pathlib import Path

import torch

from stillroom import Table
from stillroom.settings import resolve


def stories(split: str, count: int) -> Table:
    """So many stories of a split, spread evenly over it; about half of R8 is about earnings."""
    found: Table = resolve("reuters.py:documents", Path(__file__).parent)(split)
    rows = [number * len(found) // count for number in range(count)]
    earn = (found.classes or ()).index("earn")
    assert found.labels is not None
    return Table(
        columns={"text": tuple(found.columns["text"][row] for row in rows)},  # type: ignore[index]
        ids=tuple(found.ids[row] for row in rows),
        labels=torch.tensor([int(found.labels[row] != earn) for row in rows]),
        classes=("earn", "other"),
        name=f"Reuters R8, earnings or not, {split}",
        source=found.source,
    )

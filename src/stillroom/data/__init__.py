"""Examples: tables with stable ids, seeded views, loaders and splits."""

from stillroom.data.arrays import from_arrays, from_numpy
from stillroom.data.images import from_image_folder
from stillroom.data.packing import pack
from stillroom.data.pairs import Paired, pair
from stillroom.data.renderings import Rendered, render_apart
from stillroom.data.splits import check_leakage, keep_split, label_budget, leakage, split, unlabelled
from stillroom.data.table import LazyColumn, Table
from stillroom.data.tables import from_csv, from_jsonl, from_parquet, from_rows
from stillroom.data.tokens import Packed
from stillroom.data.views import Chain, Draws, Flip, Noise, Shift, WordDropout

__all__ = [
    "Chain",
    "Draws",
    "Flip",
    "LazyColumn",
    "Noise",
    "Packed",
    "Paired",
    "Rendered",
    "Shift",
    "Table",
    "WordDropout",
    "check_leakage",
    "from_arrays",
    "from_csv",
    "from_image_folder",
    "from_jsonl",
    "from_numpy",
    "from_parquet",
    "from_rows",
    "keep_split",
    "label_budget",
    "leakage",
    "pack",
    "pair",
    "render_apart",
    "split",
    "unlabelled",
]

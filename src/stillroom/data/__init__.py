"""Examples: tables with stable ids, seeded views, loaders and splits."""

from stillroom.data.table import LazyColumn, Table
from stillroom.data.views import Chain, Draws, Flip, Noise, Shift, WordDropout

__all__ = ["Chain", "Draws", "Flip", "LazyColumn", "Noise", "Shift", "Table", "WordDropout"]

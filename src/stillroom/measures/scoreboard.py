"""The scoreboard in a terminal: a table that fits 120 columns, and the findings below it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stillroom.measures.wording import (
    COSTS,
    Rows,
    cheaper,
    columns_in_order,
    compared,
    headline,
    in_order,
    number,
    overlapping,
    spread,
    title_of,
    verdict,
)

QUALITIES = 4  # columns of quality beside the costs, that 120 characters have room for
NARROW = 11  # characters of a heading: no wider than an interval
_ASIDE = ("memory", "prefill")  # costs that are in the report and on the page only
_FIRST = ("agreement", "kl", "calibration_error", "teacher_distance")  # after the headline
_COLOURS = {"better": "green", "worse": "red", "unclear": "yellow"}
_MARKS = {"better": "✓", "worse": "✗", "unclear": "~"}


def columns_shown(metrics: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    """The headline, then fidelity and calibration, then what else there is room for; then the costs."""
    own = [name for name in columns_in_order(metrics, metric) if name not in COSTS]
    order = dict.fromkeys([metric, *(name for name in _FIRST if name in own), *own])
    return [*list(order)[:QUALITIES], *(name for name in COSTS if name in metrics and name not in _ASIDE)]


def scoreboard(
    rows: Rows,
    metrics: Mapping[str, Mapping[str, Any]],
    metric: str,
    comparisons: Sequence[Mapping[str, Any]],
    diagnosis: Sequence[str],
    examples: int,
    seeds: Mapping[str, int],
    overlap: Mapping[str, Any] | None = None,
) -> Group:
    """Headline, table, one line for each comparison, what test and training texts share, and the diagnosis."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold")
    table.add_column("", no_wrap=True)
    columns = columns_shown(metrics, metric)
    for name in columns:
        arrow = {True: " ↑", False: " ↓", None: ""}[metrics[name]["higher_is_better"]] if name not in COSTS else ""
        title = "\n".join(textwrap.wrap(title_of(name) + arrow, NARROW))
        table.add_column(title, justify="right", no_wrap=True)  # a wrapped interval could not be read
    for row in in_order(rows):
        count = seeds.get(row, 1)
        label = Text(row, style="bold cyan" if row == "student" else "bold")
        if count > 1:
            label.append(f"\n{count} seeds", style="not bold dim")
        table.add_row(label, *(_cell(rows, row, name) for name in columns), end_section=False)
    lines: list[RenderableType] = [
        Text(headline(rows, metric, metrics[metric]["higher_is_better"], comparisons), style="bold"),
        table,
    ]
    for comparison in comparisons:
        said = verdict(comparison)
        lines.append(Text.from_markup(f"[{_COLOURS[said]}]{_MARKS[said]}[/] {escape(compared(comparison))}"))
    if overlap is not None:
        lines.append(Text(overlapping(overlap), style="yellow" if overlap["found"] else "dim"))
    if diagnosis:
        lines.append(Padding(Text("What may be the reason", style="bold"), (1, 0, 0, 0)))
        lines.extend(Padding(Text(f"· {sentence}"), (0, 0, 0, 2)) for sentence in diagnosis)
    timed = "speed" if "generation" in metrics else "latency"
    note = f"{examples:,} examples; 95 % intervals by bootstrap; {timed} at batch 1 on one thread."
    lines.append(Padding(Text(note, style="dim"), (1, 0, 0, 0)))
    return Group(*lines)


def _cell(rows: Rows, row: str, name: str) -> Text:
    """The value, its interval below, and for a cost the ratio to the teacher."""
    cell = rows[row].get(name)
    if cell is None:
        return Text("–", style="dim")
    text = Text(number(cell["value"], name))
    below = [part for part in (spread(cell, name), cheaper(rows, row, name)) if part]
    for part in below:
        text.append(f"\n{part}", style="dim")
    return text

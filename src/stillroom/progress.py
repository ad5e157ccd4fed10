"""One progress bar for all long work: shown to a person at a terminal, silent in a pipe, printed as lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)
WIDTH = 28  # characters of a title, so that the numbers fit beside it


class Step(Protocol):
    """Say that ``amount`` more is done; ``note`` replaces the text after the bar."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


@contextmanager
def bar(title: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Step]:
    """A progress bar of ``total`` steps (0: nobody knows), ``done`` of them already (resumed work). Yields a Step."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not shown) as progress:
        short = title if len(title) <= WIDTH else title[: WIDTH - 1] + "…"
        task = progress.add_task(short, total=total or None, completed=done, note="")

        def step(amount: int = 1, note: str = "") -> None:
            progress.update(task, advance=amount)
            if note:
                progress.update(task, note=note)

        yield step

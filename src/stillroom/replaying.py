"""Replay: recorded observations through what ships, one at a time, as a control loop would ask; how long each took.

Latencies are reported and never judged: they are those of this machine while it did whatever else it does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from stillroom.control import Task, drive
from stillroom.environment import environment
from stillroom.errors import DataError, UsageError
from stillroom.exporting import load_artifact
from stillroom.files import read_json, write_json
from stillroom.measures.wording import seconds
from stillroom.progress import Step, bar
from stillroom.run import Run, seal
from stillroom.students.networks import load_student
from stillroom.types import Batch, Examples, check_batch_of

FORMAT = "stillroom-replay/1"
FILE = "replay.json"
DISTINCT = 4096  # observations that are prepared, and asked in turn
WARM_UP = 200
SLOW = 100  # what is asked through PyTorch is asked this many times less often
PERCENTILES = (50, 90, 99, 99.9)
PER_DECADE = 20  # bins of the histogram
PART = 2000  # calls between two looks at the progress


@dataclass(frozen=True)
class Replayed:
    """One thing that answers one prepared observation; ``slow``: asked fewer times."""

    name: str
    prepare: Callable[[Batch], Any]
    ask: Callable[[Any], Any]
    slow: bool = False


def replay(
    asked: Sequence[Replayed],
    examples: Examples,
    folder: str | Path | None = None,
    *,
    count: int = 100_000,
    period: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every one of ``asked`` answers ``count`` observations of ``examples``, one by one. Writes ``folder``/replay.json.

    At most 4,096 observations are prepared, evenly spread, and asked in turn; after 200 that do not count. What is slow
    is asked a hundredth as often, at least 100 times. ``period``: seconds between two actions; what takes longer is
    counted. One thread, no garbage collection while the clock runs. Seconds are as seen from Python: a call into C or
    ONNX Runtime costs a microsecond or two more than it would there.
    Raises UsageError for a count or period that cannot be, DataError when there is nothing to ask.
    """
    check_batch_of(examples)
    if count < 1 or (period is not None and not period > 0):
        raise UsageError(f"count={count} is at least 1, period={period} is above 0 (seconds).")
    if not asked:
        raise DataError("there is nothing to replay: the run has no artefacts. Export it first.")
    batches = _spread(examples, min(count, DISTINCT))
    often = {one.name: max(min(count, 100), count // SLOW) if one.slow else count for one in asked}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with bar("replay", sum(often.values()), shown=progress) as step:
            rows = {one.name: _summary(_taken(one, batches, often[one.name], step), period) for one in asked}
    finally:
        torch.set_num_threads(threads)
    said = {
        "format": FORMAT,
        "period": period,
        "observations": len(batches),
        "threads": 1,
        "rows": rows,
        "environment": environment(),
    }
    if folder is not None:
        write_json(Path(folder) / FILE, said)
    return said


def _spread(examples: Examples, most: int) -> list[Batch]:
    count = len(examples)
    most = min(count, most)
    return [examples.batch([number * count // most], None) for number in range(most)]


def _taken(one: Replayed, batches: Sequence[Batch], count: int, step: Step) -> np.ndarray:
    """Nanoseconds of each call [count]."""
    prepared = [one.prepare(batch) for batch in batches]
    taken = np.empty(count, np.int64)
    ask, clock, many = one.ask, time.perf_counter_ns, len(prepared)
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            for number in range(min(WARM_UP, count)):
                ask(prepared[number % many])
            for first in range(0, count, PART):
                last = min(first + PART, count)
                for number in range(first, last):
                    observation = prepared[number % many]
                    start = clock()
                    ask(observation)
                    taken[number] = clock() - start
                step(last - first, one.name)
    finally:
        if collects:
            gc.enable()
    return taken


def _summary(taken: np.ndarray, period: float | None) -> dict[str, Any]:
    """Percentiles in seconds, a histogram over logarithmic bins, and how many took longer than the period."""
    spent = np.maximum(taken, 1) / 1e9
    first = np.floor(np.log10(spent.min()) * PER_DECADE)
    last = max(first, np.floor(np.log10(spent.max()) * PER_DECADE)) + 1
    edges = 10 ** (np.arange(first, last + 1) / PER_DECADE)
    edges[-1] = max(edges[-1], spent.max())
    counts, _ = np.histogram(spent, edges)
    said: dict[str, Any] = {
        "calls": len(spent),
        "seconds": {
            **{f"p{percent:g}": float(np.percentile(spent, percent)) for percent in PERCENTILES},
            "largest": float(spent.max()),
        },
        "histogram": {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist()},
    }
    if period is not None:
        said["longer_than_period"] = int((spent > period).sum())
    return said


def artefacts(opened: Mapping[str, Any]) -> list[Replayed]:
    """Artefacts by name: what is timed is the runtime, from prepared tensors to its output."""
    return [
        Replayed(name, lambda batch, a=artifact: a.adapter(batch.inputs), artifact.run)
        for name, artifact in opened.items()
    ]


def models(given: Mapping[str, Any]) -> list[Replayed]:
    """Models by name (the student in PyTorch, the teacher): from raw columns to the answer, asked less often."""
    return [Replayed(name, lambda batch: batch, model, slow=True) for name, model in given.items()]


def closed_loops(policies: Mapping[str, Any], tasks: Sequence[Task], starts: Sequence[int], progress: bool) -> Any:
    """Each policy drives from each of the starts: {name: {starts, mean_return, worst_return, success}}."""
    found = {}
    for name, policy in policies.items():
        driven = drive(policy, tasks, starts, title=f"{name} drives", progress=progress)
        known = all(task.succeeded is not None for task in tasks)
        found[name] = {
            "starts": len(driven),
            "mean_return": float(driven.returns.mean()),
            "worst_return": float(driven.returns.min()),
            "success": float(driven.success.mean()) if known else None,
        }
    return found


def passed(folder: Path) -> list[Path]:
    """The artefacts of a run that passed their verification and run here; one that was refused does not ship."""
    told = {path.parent: read_json(path) for path in sorted(folder.glob("exports/*/verify.json"))}
    return [place for place, verify in told.items() if verify.get("passed") is True]


def replay_run(run: Run, count: int = 100_000, period: float | None = None, starts: int = 20) -> dict[str, Any]:
    """Replay the inputs that a run's student learned from: through each of its artefacts, the student and the teacher.

    Of a control task, every artefact and the student also drive from ``starts`` unseen starts (0: none), and the period
    is the task's where none is given. Writes report/replay.json, and the page and the manifest anew.
    Raises DataError for a run without artefacts that passed.
    """
    opened = {place.name.replace("-", " "): load_artifact(place, run.base) for place in passed(run.folder)}
    if not opened:
        raise DataError(f"{run.folder} has no artefacts (exports/*/verify.json). Run stillroom export first.")
    student = load_student(run.place("student", run.recipe.seeds[0]), run.base)
    student.net.eval()
    asked = [*artefacts(opened), *models({"student": student, "teacher": run.teacher})]
    tasks = tuple(getattr(run, "tasks", ()))  # of a control task (run_driving)
    period = tasks[0].period if tasks and period is None else period
    pool = run.pool if tasks else run.data["pool"]  # type: ignore[attr-defined]
    said = replay(asked, pool, count=count, period=period, progress=run.progress)
    if tasks and starts:
        unseen = list(run.unseen)[: starts * len(tasks)]  # type: ignore[attr-defined]
        said["closed_loop"] = closed_loops({**opened, "student": student}, tasks, unseen, run.progress)
    write_json(run.folder / "report" / FILE, said)
    seal(run.folder)
    return said


def told(said: Mapping[str, Any]) -> list[Any]:
    """The percentiles of every row as a table, and a line for each closed loop, to be printed."""
    table = Table("answered by", "calls", "half within", "90 %", "99 %", "99.9 %", "longest", box=None)
    period = said["period"]
    if period is not None:
        table.add_column(f"longer than {seconds(period)}")
    for name, row in said["rows"].items():
        longer = [] if period is None else [f"{row['longer_than_period']:,}"]
        table.add_row(name, f"{row['calls']:,}", *map(seconds, row["seconds"].values()), *longer)
    lines: list[Any] = [table]
    for name, row in said.get("closed_loop", {}).items():
        done = "" if row["success"] is None else f", success {row['success']:.0%}"
        returned = f"mean return {row['mean_return']:.4g}, worst {row['worst_return']:.4g}{done}"
        lines.append(f"{name} drives from {row['starts']} unseen starts: {returned}")
    return lines

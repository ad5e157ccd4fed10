"""The part of the page about a control task: success task by task, and what a rollout looks like."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.measures.wording import in_order, number, title_of
from stillroom.report.stages import Stages

LARGEST = 8 << 20  # bytes of a picture that joins the page


def driving_of(stages: Stages) -> dict[str, Any] | None:
    """What driving.json says, as the template shows it; None for a run of rows."""
    told = stages.driving
    if told is None:
        return None
    tasks = [_task(task) for task in told["tasks"]]
    strips = [_strip(strip, stages.folder / "report") for strip in told["strips"]]
    return {"asked": f"{told['asked']:,}", "unseen": told["unseen"], "tasks": tasks, "strips": strips}


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    """One table: a line for each row, a column for each number; success as a share of the starts."""
    rows = in_order(task["rows"])
    names = list(next(iter(rows.values()), {}))
    lines = [(row, [_shown(name, cells[name]) for name in names]) for row, cells in rows.items()]
    return {
        "name": task["task"],
        "columns": [title_of(name) for name in names],
        "rows": lines,
        "control": f"{1 / task['period']:.0f} actions a second, at most {task['horizon']} of them",
        "disturbance": f"{task['disturbance']:g}" if task["disturbance"] else None,
    }


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name.startswith("success") else number(value)


def _strip(strip: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / Path(str(strip["file"])).name  # beside the report, whatever the file says
    there = path.is_file() and path.stat().st_size <= LARGEST
    ended = {True: "done", False: "not done", None: "over"}[strip["success"]]
    said = f"{strip['task']}, start {strip['start']}: {ended} after {strip['steps']} steps"
    shows = "From left to right, in equal steps of time." if strip["kind"] == "pictures" else "What it did over time."
    picture = base64.b64encode(path.read_bytes()).decode() if there else None
    return {"said": said, "shows": shows, "picture": picture}

"""What a rollout looks like: an image strip where it can be drawn without a screen, else its actions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.control.episodes import Episodes
from stillroom.control.outcomes import Outcomes
from stillroom.control.task import Task, closed
from stillroom.files import write_bytes

FORMAT = "stillroom-driving/1"
PICTURES = 6  # of a strip
HEIGHT = 240  # pixels of a picture


def told(
    tasks: Sequence[Task],
    outcomes: Mapping[str, Sequence[Outcomes]],
    driven: Mapping[str, Episodes],
    asked: int,
    folder: Path,
) -> dict[str, Any]:
    """driving.json: success by task and row, and the student's first rollout of each task, drawn in ``folder``."""
    by_task = [
        {
            "task": task.name,
            "period": task.period,
            "horizon": task.horizon,
            "disturbance": task.disturbance,
            "rows": {
                row: {name: float(np.mean([one.mean(name, task.name) for one in seeds])) for name in _columns(task)}
                for row, seeds in outcomes.items()
            },
        }
        for task in tasks
    ]
    strips = [_strip(task, driven["student"], folder) for task in tasks] if "student" in driven else []
    starts = len(next(iter(driven.values())))
    return {"format": FORMAT, "asked": asked, "unseen": starts, "tasks": by_task, "strips": strips}


def _columns(task: Task) -> list[str]:
    counted = ["success", "steps"] if task.succeeded is not None else ["return", "steps"]
    return [*counted, f"{counted[0]}_disturbed"] if task.disturbance else counted


def _strip(task: Task, episodes: Episodes, folder: Path) -> dict[str, Any]:
    """The first episode of a task: its file, and what it shows."""
    number = episodes.tasks.index(task.name)
    actions = episodes.per_episode(episodes.actions)[number]
    answers = None if episodes.answers is None else episodes.per_episode(episodes.answers)[number]
    about = {
        "task": task.name,
        "start": episodes.starts[number],
        "steps": episodes.lengths[number],
        "success": bool(episodes.success[number]) if task.succeeded is not None else None,
        "file": f"rollout-{task.name}.png",
    }
    frames = rendered(task, episodes.starts[number], actions)
    picture = plotted(task, actions, answers) if frames is None else side_by_side(frames)
    write_bytes(folder / about["file"], picture)
    return {**about, "kind": "plot" if frames is None else "pictures"}


def rendered(task: Task, start: int, actions: np.ndarray, count: int = PICTURES) -> list[np.ndarray] | None:
    """Pictures [H, W, 3] uint8 from an episode driven again by its actions [N, A], first and last among them.

    None where the task has no pictures, or the machine cannot draw them.
    """
    if task.pictured is None:
        return None
    wanted = set(np.linspace(0, len(actions) - 1, min(count, len(actions))).round().astype(int).tolist())
    environment: Any = None
    try:
        environment = task.pictured()
        environment.reset(seed=start)
        found = []
        for step, action in enumerate(actions):
            if step in wanted:
                found.append(np.asarray(environment.render(), dtype=np.uint8))
            environment.step(task.bounded(action.astype(np.float64)).astype(np.float32))
        return found
    except Exception:  # whatever a graphics library raises where there is none
        return None
    finally:
        closed([environment] if environment is not None else [])


def side_by_side(frames: Sequence[np.ndarray]) -> bytes:
    """A PNG of the pictures in one row."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    small = [p.resize((round(p.width * HEIGHT / p.height), HEIGHT)) for p in pictures]
    whole = Image.new("RGB", (sum(p.width for p in small), HEIGHT))
    left = 0
    for picture in small:
        whole.paste(picture, (left, 0))
        left += picture.width
    return _png(whole)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plotted(task: Task, actions: np.ndarray, answers: np.ndarray | None) -> bytes:
    """A PNG of what the student did over time, number by number, and what the teacher would have done there."""
    from matplotlib.figure import Figure

    shown = min(task.actions, 4)
    figure = Figure(figsize=(12, 2.4), dpi=120, layout="constrained")
    times = np.arange(len(actions)) * task.period
    for place in range(shown):
        axes = figure.add_subplot(1, shown, place + 1)
        axes.plot(times, actions[:, place], color="#0b7a6b", label="student")
        if answers is not None:
            axes.plot(times, answers[:, place], color="#5b4fa8", linestyle="--", label="teacher, asked there")
        axes.set_ylim(task.low[place] - 0.1, task.high[place] + 0.1)
        axes.set_xlabel("seconds")
        axes.set_title(f"action {place + 1}", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

"""drive: a policy in its closed loop, step by step, with the teacher asked at every state. Deterministic by seed."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stillroom.control.episodes import Episodes
from stillroom.control.task import Environment, Task, closed, environment_of
from stillroom.errors import DataError, ShapeError, SignalError, UsageError
from stillroom.progress import bar
from stillroom.types import Batch, Model

FAR = 100.0  # half ranges from the middle: an action this far out comes of a student that has diverged


@dataclass
class _Episode:
    """One episode while it is driven."""

    observations: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)
    total: float = 0.0
    success: bool = False


@torch.no_grad()
def drive(
    policy: Model,
    tasks: Task | Sequence[Task],
    starts: Sequence[int],
    *,
    teacher: Model | None = None,
    teacher_share: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    title: str = "driving",
    progress: bool = False,
) -> Episodes:
    """What happens when ``policy`` drives from each of ``starts`` (the seeds of the environment's reset).

    policy, teacher: Models that answer columns ``x`` [B, frames * D], ``state`` [B, S] and ``task`` (names) with
    values [B, A]. ``teacher`` is asked at every state that is visited; at ``teacher_share`` of the steps, drawn, its
    answer drives instead of the policy's. ``noise``: Gaussian noise on what is done, its standard deviation as a share
    of half the action's range. Several tasks are driven in turn, each from its part of the starts.
    ``limit``: stop after so many steps in all, in the middle of an episode if need be.

    An episode depends on (task, start, seed) and the models only, not on what was driven before. Raises ShapeError for
    actions of another length, SignalError for one that is not finite or far out of bounds (which start and step).
    """
    given = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    if not starts or not given:
        raise DataError(f"there is nothing to drive: {len(given)} tasks, {len(starts)} starts.")
    if not 0 <= teacher_share <= 1 or noise < 0 or (teacher_share > 0 and teacher is None):
        raise UsageError(f"teacher_share={teacher_share} is from 0 to 1 and needs a teacher; noise={noise} is >= 0.")
    made = [environment_of(task) for task in given]
    driven: list[tuple[str, int, _Episode]] = []
    left = limit if limit is not None else len(starts) * max(task.horizon for task in given)
    try:
        with bar(title, limit or len(starts), shown=progress) as advance:
            for number, start in enumerate(starts):
                which = number % len(given)
                task, draws = given[which], _draws(given[which], start, seed)
                drivers = _Drivers(policy, teacher, teacher_share, noise, draws)
                one = _episode(task, made[which], int(start), drivers, left)
                driven.append((task.name, int(start), one))
                left -= len(one.states)
                advance(len(one.states) if limit else 1)
                if left <= 0:
                    break
    finally:
        closed(made)
    return _gathered(driven, teacher is not None)


@dataclass(frozen=True)
class _Drivers:
    """Who may act at a step, and what is drawn for it."""

    policy: Model
    teacher: Model | None
    share: float
    noise: float
    draws: np.random.Generator


def _draws(task: Task, start: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, int(start), zlib.crc32(task.name.encode())])


def _episode(task: Task, environment: Environment, start: int, drivers: _Drivers, most: int) -> _Episode:
    """One episode of at most ``most`` steps."""
    one = _Episode()
    state, _ = environment.reset(seed=start)
    frames = deque([task.observation(np.asarray(state))] * task.frames, maxlen=task.frames)
    for step in range(min(task.horizon, most)):
        seen, known = np.concatenate(frames), np.asarray(state, dtype=np.float32).reshape(-1)
        intended, answer = _intended(task, seen, known, drivers, f"{task.name}/{start}/{step}")
        done = intended.astype(np.float64)
        if drivers.noise:
            done = done + drivers.noise * task.half_range * drivers.draws.standard_normal(task.actions)
        state, reward, terminated, truncated, info = environment.step(task.bounded(done).astype(np.float32))
        one.observations.append(seen)
        one.states.append(known)
        one.actions.append(intended)
        if answer is not None:
            one.answers.append(answer)
        one.total += float(reward)
        one.success = one.success or (task.succeeded is not None and bool(task.succeeded(info)))
        if terminated or truncated or (one.success and task.ends_at_success):
            break
        frames.append(task.observation(np.asarray(state)))
    return one


def _intended(
    task: Task, seen: np.ndarray, known: np.ndarray, drivers: _Drivers, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The action [A] of whoever drives this step, and the teacher's answer."""
    columns = {"x": torch.from_numpy(seen)[None], "state": torch.from_numpy(known)[None], "task": (task.name,)}
    batch = Batch((name,), columns)
    answer = None if drivers.teacher is None else _asked(drivers.teacher, "the teacher", task, batch)
    if drivers.policy is drivers.teacher:
        assert answer is not None
        return answer, answer
    if answer is not None and (drivers.share == 1 or (drivers.share > 0 and drivers.draws.random() < drivers.share)):
        return answer, answer
    return _asked(drivers.policy, "the policy", task, batch), answer


def _asked(model: Model, who: str, task: Task, batch: Batch) -> np.ndarray:
    """Its action [A], checked."""
    try:
        values = model(batch).need_values(who)
    except RuntimeError as error:
        shapes = {name: list(c.shape[1:]) for name, c in batch.inputs.items() if isinstance(c, torch.Tensor)}
        raise ShapeError(
            f"{who} cannot answer what task {task.name!r} shows, {shapes}: {str(error).splitlines()[0]}. "
            "Give it as many inputs as x has numbers."
        ) from error
    action = values.detach().reshape(-1).cpu().numpy().astype(np.float32)
    if action.shape != (task.actions,):
        raise ShapeError(f"{who} answers {len(action)} numbers, but an action of {task.name!r} has {task.actions}.")
    check_action(action, who, task, batch.ids[0])
    return action


def check_action(action: np.ndarray, who: str, task: Task, name: str) -> None:
    """Raise SignalError for an action [A] that is not finite, or further out than any trained policy goes."""
    if not np.isfinite(action).all():
        raise SignalError(f"{who} gives the action {action.tolist()} at {name}: not finite. Nothing was done with it.")
    middle = (np.asarray(task.high) + np.asarray(task.low)) / 2
    if (np.abs(action - middle) > FAR * task.half_range).any():
        raise SignalError(
            f"{who} gives the action {action.round(1).tolist()} at {name}, more than {FAR:g} times outside of its "
            f"bounds {list(task.low)} to {list(task.high)}: it has diverged. Lower fit.learning_rate."
        )


def _gathered(driven: Sequence[tuple[str, int, _Episode]], asked: bool) -> Episodes:
    def stacked(name: str) -> Any:
        return np.stack([row for _, _, one in driven for row in getattr(one, name)]).astype(np.float32)

    return Episodes(
        tasks=tuple(task for task, _, _ in driven),
        starts=tuple(start for _, start, _ in driven),
        lengths=tuple(len(one.states) for _, _, one in driven),
        observations=stacked("observations"),
        states=stacked("states"),
        actions=stacked("actions"),
        answers=stacked("answers") if asked else None,
        returns=np.array([one.total for _, _, one in driven], dtype=np.float64),
        success=np.array([one.success for _, _, one in driven], dtype=bool),
    )

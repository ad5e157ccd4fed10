"""Gymnasium's environments (extra ``control``) as tasks, some of the state's numbers hidden from the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillroom.control.task import Task
from stillroom.errors import UsageError, missing_extra


def make(environment: str) -> Any:
    """The environment of this name, without the wrapper that ends episodes (a task has its horizon).

    Raises UsageError for an unknown name, MissingExtraError without the extra ``control``.
    """
    try:
        import gymnasium
    except ImportError as error:
        if error.name != "gymnasium":
            raise
        raise missing_extra("gymnasium", "control") from None
    try:
        return gymnasium.make(environment, max_episode_steps=-1)
    except gymnasium.error.Error as error:
        raise UsageError(f"gymnasium has no environment {environment!r}: {error}") from None


def task(
    environment: str,
    sees: Sequence[int] | None = None,
    frames: int = 1,
    horizon: int = 1000,
    disturbance: float = 0.0,
) -> Task:
    """A gymnasium environment in which only the return counts; actions and period are the environment's.

    ``sees``: which numbers of the state the student sees, by index; default: all. ``frames``: how many of the last
    observations, so that a velocity that no sensor gives can still be told. Raises UsageError for an index that the
    state does not have, or an environment without a period or with actions that are not numbers within bounds.
    """
    made = make(environment)
    try:
        space, actions = made.observation_space, made.action_space
        period = getattr(made.unwrapped, "dt", None)
        size = (getattr(space, "shape", None) or (0,))[0]
        low, high = getattr(actions, "low", None), getattr(actions, "high", None)
    finally:
        made.close()
    if low is None or high is None or not (np.isfinite(low).all() and np.isfinite(high).all()) or not period:
        raise UsageError(f"{environment}: a task needs actions within bounds and a period, and this has {actions}.")
    chosen = list(range(size) if sees is None else sees)
    if not chosen or not all(0 <= index < size for index in chosen):
        raise UsageError(f"{environment}: sees={chosen}, but the state's numbers are 0 to {size - 1}.")
    return Task(
        name=environment,
        make=lambda: make(environment),
        observe=lambda state: np.asarray(state)[chosen],
        low=tuple(map(float, low)),
        high=tuple(map(float, high)),
        horizon=horizon,
        period=float(period),
        frames=frames,
        disturbance=disturbance,
    )

"""A control task: how to make its environment, what the student's sensors give, its bounds and what success is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillroom.errors import PairError, ShapeError, UsageError


class Environment(Protocol):
    """What is asked of an environment: gymnasium's ``reset`` and ``step``. All that is drawn follows from the seed."""

    def reset(self, *, seed: int) -> tuple[np.ndarray, Any]: ...

    def step(self, action: np.ndarray, /) -> tuple[np.ndarray, float, bool, bool, Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Task:
    """One closed-loop task. State [S] is what the environment gives (the teacher sees it); action [A].

    ``observe(state [S]) -> [D]``: what the student's sensors give of a state, without what a real machine cannot know;
    the student sees the last ``frames`` of them, [frames * D], oldest first (the first is repeated at the start).
    ``succeeded(info)``: whether the step's info says that the task is done; None where only the return counts.
    Functions and frozen dataclasses, so that a task can be written down. Raises UsageError for settings that cannot be.
    """

    name: str
    make: Callable[[], Environment]
    observe: Callable[[np.ndarray], np.ndarray]
    low: tuple[float, ...]  # [A] the least action that the machine takes
    high: tuple[float, ...]  # [A] the largest
    horizon: int  # steps of an episode, at most
    period: float  # seconds from one action to the next
    frames: int = 1
    succeeded: Callable[[Mapping[str, Any]], bool] | None = None
    ends_at_success: bool = True
    disturbance: float = 0.0  # action noise it is tested under: standard deviation, as a share of half the range
    pictured: Callable[[], Any] | None = None  # makes one that can ``render()`` [H, W, 3] uint8 without a screen
    licence: str = "unknown"  # of what the environment shows
    source: str = "unknown"

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not self.low:
            raise UsageError(f"task {self.name!r}: {len(self.low)} lower bounds, {len(self.high)} upper ones.")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise UsageError(f"task {self.name!r}: bounds low={self.low}, high={self.high} leave no room.")
        if self.horizon < 1 or self.frames < 1 or not self.period > 0 or not self.disturbance >= 0:
            raise UsageError(
                f"task {self.name!r}: horizon={self.horizon} and frames={self.frames} are at least 1, "
                f"period={self.period} is above 0, disturbance={self.disturbance} is not negative."
            )

    @property
    def actions(self) -> int:
        """A, the numbers of an action."""
        return len(self.low)

    @property
    def half_range(self) -> np.ndarray:
        """[A] half the distance between the bounds: the unit of noise."""
        return (np.asarray(self.high) - np.asarray(self.low)) / 2

    def bounded(self, action: np.ndarray) -> np.ndarray:
        """What the machine does of an action [A]: each number within its bounds."""
        return np.clip(action, self.low, self.high)

    def observation(self, state: np.ndarray) -> np.ndarray:
        """[D] float32. Raises ShapeError for one that is no vector, or not finite."""
        seen = np.asarray(self.observe(state), dtype=np.float32)
        if seen.ndim != 1 or not np.isfinite(seen).all():
            raise ShapeError(
                f"task {self.name!r}: observe returned {seen!r} of a state {list(np.shape(state))}; it returns a "
                "vector of finite numbers."
            )
        return seen


def environment_of(task: Task) -> Environment:
    """The task's environment, made. Raises PairError when it takes other actions than the task says."""
    made = task.make()
    shape = getattr(getattr(made, "action_space", None), "shape", None)
    if shape is not None and tuple(shape) != (task.actions,):
        raise PairError(
            f"task {task.name!r} says {task.actions} numbers of an action, but its environment takes {list(shape)}. "
            "Give the task low and high of that length."
        )
    return made


def closed(environments: Sequence[Any]) -> None:
    """Close those that can be closed."""
    for environment in environments:
        if hasattr(environment, "close"):
            environment.close()

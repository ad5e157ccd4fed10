"""Meta-World's Sawyer arm (extra ``control``): tasks as a real arm would see them, and scripted experts as teachers.

Yu et al. 2019, Meta-World; the v3 tasks of the package metaworld. A start is the seed that places object and goal.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from stillroom.control.task import Task
from stillroom.errors import DataError, UsageError, missing_extra, nearest
from stillroom.types import Batch, Identity, Signal

SAWYER = ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "button-press-topdown-v3")
TOLD = ("reach-v3", "push-v3", "pick-place-v3")  # tasks whose goal a person tells the arm; elsewhere the thing says it
MIDDLE = np.array([0.0, 0.65, 0.2])  # of the space above the table, metres
UNIT = 0.1  # metres: numbers of about 1 suit a small network
STATE = 39  # this frame [18], the last [18], the goal [3]


def _library() -> Any:
    """The package; before MuJoCo is first imported, it is told how to draw without a screen, if this machine can."""
    if "MUJOCO_GL" not in os.environ and not os.environ.get("DISPLAY"):
        known = {"egl": "EGL", "osmesa": "OSMesa"}
        os.environ["MUJOCO_GL"] = next((way for way, library in known.items() if find_library(library)), "disabled")
    try:
        import metaworld
    except ImportError as error:
        if error.name != "metaworld":
            raise
        raise missing_extra("metaworld", "control") from None
    return metaworld


@functools.cache
def _names() -> tuple[str, ...]:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # pyright: ignore[reportMissingImports]

    return tuple(ALL_V3_ENVIRONMENTS)


class Arm:
    """One Meta-World environment whose start follows from the seed alone; ``render`` gives a picture."""

    def __init__(self, name: str, pictures: bool = False):
        _library()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE  # pyright: ignore[reportMissingImports]

        kind: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"]
        self.inner = kind(seed=0, render_mode="rgb_array" if pictures else None)
        self.inner._freeze_rand_vec = False  # else every start of a seed is one and the same
        self.inner.seeded_rand_vec = True
        self.action_space = self.inner.action_space

    def reset(self, *, seed: int) -> tuple[np.ndarray, Any]:
        self.inner.seed(seed)
        return self.inner.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Mapping[str, Any]]:
        return self.inner.step(action)

    def render(self) -> np.ndarray:
        """[280, 400, 3] uint8."""
        return self.inner.render()[110:390, 40:440]  # the arm and its table, of 480 x 480

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class ArmOf:
    """Makes the arm of a task."""

    name: str
    pictures: bool = False

    def __call__(self) -> Arm:
        return Arm(self.name, self.pictures)


@dataclass(frozen=True)
class Sensors:
    """What a real arm knows of Meta-World's state [39], in decimetres: its hand [3], its gripper [1], and from a camera
    the object's place from the hand [3], and the goal's [3] where a person tells it (else 0).

    Not: orientations, a second object, velocities, or where a door's handle should end. ``grid``: metres that the
    camera tells apart. ``which``: of ``of`` tasks, as 0 and 1 [of]; of = 0 says nothing.
    """

    told: bool
    grid: float = 0.002
    which: int = 0
    of: int = 0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        hand, gripper, thing, goal = state[:3], state[3:4], state[4:7], state[36:39]
        thing = np.round(thing / self.grid) * self.grid if self.grid else thing
        goal = goal - hand if self.told else np.zeros(3)
        task = np.eye(self.of)[self.which] if self.of else np.zeros(0)
        return np.concatenate([(hand - MIDDLE) / UNIT, gripper, (thing - hand) / UNIT, goal / UNIT, task])


def succeeded(info: Mapping[str, Any]) -> bool:
    """Meta-World's own test of success."""
    return bool(info["success"])


def sawyer(
    tasks: str | list[str] | tuple[str, ...] = "reach-v3",
    horizon: int = 200,
    frames: int = 2,
    disturbance: float = 0.3,
    grid: float = 0.002,
) -> tuple[Task, ...]:
    """Tasks by name, such as 'push-v3'; several are one student's, which is told which of them it is in.

    Raises UsageError with the nearest name, MissingExtraError without the package.
    """
    _library()
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for name in names:
        if name not in _names():
            raise UsageError(f"Meta-World has no task {name!r}{nearest(name, _names())}")
    several = len(names) if len(names) > 1 else 0
    return tuple(
        Task(
            name=name,
            make=ArmOf(name),
            observe=Sensors(name in TOLD, grid, number, several),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            horizon=horizon,
            period=0.0125,  # 5 steps of MuJoCo's 2.5 ms
            frames=frames,
            succeeded=succeeded,
            disturbance=disturbance,
            pictured=ArmOf(name, pictures=True),
            licence="MIT",
            source=f"PyPI metaworld {metadata.version('metaworld')}",
        )
        for number, name in enumerate(names)
    )


@dataclass(frozen=True)
class Expert:
    """Meta-World's scripted experts, each asked in its own task: ``state`` [B, 39] -> action [B, 4] within -1 and 1."""

    @property
    def identity(self) -> Identity:
        return Identity(
            "Meta-World scripted experts",
            kind="function",
            licence="MIT",
            source=f"PyPI metaworld {metadata.version('metaworld')}",
        )

    def __call__(self, batch: Batch) -> Signal:
        states, tasks = batch.inputs["state"], batch.inputs["task"]
        if not isinstance(states, torch.Tensor) or states.shape[-1] != STATE or isinstance(tasks, torch.Tensor):
            raise DataError(f"an expert needs columns 'state' [B, {STATE}] and 'task' (names); drive a Sawyer task.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")  # clipped below
            said = [_script(task).get_action(state) for task, state in zip(tasks, states.double().numpy(), strict=True)]
        return Signal(values=torch.tensor(np.clip(np.stack(said), -1, 1), dtype=torch.float32))


def experts() -> Expert:
    """The teacher of a recipe: {use: sawyer_experts}."""
    _library()
    return Expert()


@functools.cache
def _script(task: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP  # pyright: ignore[reportMissingImports]

    if task not in ENV_POLICY_MAP:
        raise UsageError(f"Meta-World has no expert for {task!r}{nearest(task, ENV_POLICY_MAP)}")
    return ENV_POLICY_MAP[task]()

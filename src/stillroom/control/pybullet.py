"""PyBullet's locomotion (extra ``policies``): its Ant and Hopper, and the policies that it ships, as teachers.

The package is of 2017: its environments ask for ``gym`` and ``pkg_resources``, and its policies stand as numbers in the
source of its examples. Neither old package is installed for it, and no example is run: the numbers are read.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stillroom.control.task import Task
from stillroom.errors import DataError, UsageError, missing_extra, nearest
from stillroom.network import Columns
from stillroom.teachers.networks import from_network
from stillroom.types import Model

PERIOD = 0.0165  # seconds: four steps of physics
LAYERS = ("dense1", "dense2", "final")


@dataclass(frozen=True)
class _Robot:
    environment: str  # its class in pybullet_envs.gym_locomotion_envs
    policy: str  # the example that holds its weights
    actions: int


# Those whose shipped policy still walks with this build: Walker2D (a return of 15) and HalfCheetah (-1,400) do not.
ROBOTS = {
    "ant": _Robot("AntBulletEnv", "enjoy_TF_AntBulletEnv_v0_2017may.py", 8),
    "hopper": _Robot("HopperBulletEnv", "enjoy_TF_HopperBulletEnv_v0_2017may.py", 3),
}


def task(robot: str, horizon: int = 1000, disturbance: float = 0.0) -> Task:
    """Walking with ``robot`` ('ant', 'hopper'); the student sees the whole state. Only the return counts.

    Raises UsageError for a robot that is not known, MissingExtraError without the extra ``policies``.
    """
    found = _robot(robot)
    _package()
    one = (1.0,) * found.actions
    return Task(
        name=robot,
        make=lambda: Walker(found.environment),
        observe=np.asarray,
        low=tuple(-limit for limit in one),
        high=one,
        horizon=horizon,
        period=PERIOD,
        disturbance=disturbance,
        licence="Zlib",
        source=f"PyPI pybullet {metadata.version('pybullet')}",
    )


def teacher(robot: str) -> Model:
    """The policy that PyBullet ships for ``robot``: the column ``state`` [B, S] to values [B, A], not yet bounded."""
    found = _robot(robot)
    weights = _arrays(_package() / "examples" / found.policy)
    net = _network(weights)
    version = metadata.version("pybullet")
    source = f"pybullet {version}: {found.policy}"
    columns = Columns(("state",))
    return from_network(net, columns, answers="values", name=f"pybullet {robot}", licence="Zlib", source=source)


class Walker:
    """One locomotion environment. A start is made anew, since a restored one keeps what the solver had in memory."""

    def __init__(self, name: str):
        self._name, self._inner = name, None
        self.action_space: Any = None
        self._kind = _environments()[name]
        self._open()

    def _open(self) -> None:
        self.close()
        self._inner = self._kind()
        self.action_space = self._inner.action_space

    def reset(self, *, seed: int) -> tuple[np.ndarray, Any]:
        """The state [S] of the start that follows from the seed."""
        self._open()
        assert self._inner is not None
        self._inner.seed(seed)
        with _silent():
            return np.asarray(self._inner.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Mapping[str, Any]]:
        """State, reward, whether it has fallen, never cut short, nothing more."""
        assert self._inner is not None
        state, reward, fallen, _ = self._inner.step(np.asarray(action, dtype=np.float64))
        return np.asarray(state), float(reward), bool(fallen), False, {}

    def close(self) -> None:
        """Leave the physics server."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def _robot(name: str) -> _Robot:
    if name not in ROBOTS:
        raise UsageError(f"there is no robot {name!r}{nearest(name, ROBOTS)}")
    return ROBOTS[name]


def _package() -> Path:
    found = importlib.util.find_spec("pybullet_envs")  # which runs nothing
    if found is None or found.origin is None:
        raise missing_extra("pybullet", "policies")
    return Path(found.origin).parent


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The module's ``name = np.array([numbers])``, read as text: nothing of the file is run."""
    found = {}
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("weights_"):
            (target,) = statement.targets
            call: Any = statement.value
            found[ast.unparse(target)] = np.array(ast.literal_eval(call.args[0]), dtype=np.float32)
    missing = [f"weights_{layer}_{kind}" for layer in LAYERS for kind in "wb" if f"weights_{layer}_{kind}" not in found]
    if missing:
        raise DataError(
            f"{path.name} has no {', '.join(missing)}: it is not of the pybullet that this was written for."
        )
    return found


def _network(weights: Mapping[str, np.ndarray]) -> nn.Module:
    layers: list[nn.Module] = []
    for layer in LAYERS:
        weight, bias = (torch.from_numpy(weights[f"weights_{layer}_{kind}"].copy()) for kind in "wb")
        linear = nn.Linear(weight.shape[0], weight.shape[1])
        with torch.no_grad():
            linear.weight.copy_(weight.t())
            linear.bias.copy_(bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)


def _environments() -> dict[str, Any]:
    with _silent(), _as_of_2017():
        from pybullet_envs import gym_locomotion_envs  # pyright: ignore[reportMissingImports]
    return {robot.environment: getattr(gym_locomotion_envs, robot.environment) for robot in ROBOTS.values()}


@contextmanager
def _as_of_2017() -> Iterator[None]:
    """For the import alone: ``gym`` and ``pkg_resources`` are what is needed of them, made of today's packages."""
    import gymnasium
    from packaging.version import parse

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        return made

    from gymnasium.utils import seeding

    registry = types.SimpleNamespace(env_specs={})
    nothing = module("gym.envs.registration", registry=registry, make=None, spec=None, register=lambda *a, **k: None)
    envs = module("gym.envs", registration=nothing)
    utils = module("gym.utils", seeding=seeding)
    gym = module(
        "gym", Env=gymnasium.Env, spaces=gymnasium.spaces, utils=utils, envs=envs, __version__="0.21.0", __path__=[]
    )
    old = {
        "gym": gym,
        "gym.spaces": gymnasium.spaces,
        "gym.utils": utils,
        "gym.utils.seeding": seeding,
        "gym.envs": envs,
        "gym.envs.registration": nothing,
        "pkg_resources": module("pkg_resources", parse_version=parse),
    }
    kept, paths = {name: sys.modules.get(name) for name in old}, list(sys.path)
    sys.modules.update(old)
    sys.path.insert(0, str(_package()))  # its modules find each other by their bare names
    try:
        yield
    finally:
        sys.path[:] = paths
        for name, before in kept.items():
            if before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = before


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard output from the physics library itself, which greets at every start."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

"""Students, teachers and examples for the tests of training: small, seeded, on one thread."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data import Table
from stillroom.fitting import fit
from stillroom.network import Columns
from stillroom.plan import Plan
from stillroom.students.networks import Student
from stillroom.teachers.networks import Network, from_network

WIDTH, CLASSES, LENGTH = 5, 4, 6
SETTLED = {"weight_decay": 0.0, "clip_norm": None, "optimiser": "sgd", "learning_rate": 0.1}


def net(hidden: int = 8, dropout: float = 0.0, classes: int = CLASSES, width: int = WIDTH) -> nn.Module:
    """[..., width] -> [..., classes]; modules '0' to '3'."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, classes))


def seeded(make: Any, seed: int = 0, **arguments: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**arguments)


def student(seed: int = 0, **rest: Any) -> Student:
    keys = ("answers", "features", "classes", "adapter")
    own = {key: rest.pop(key) for key in keys if key in rest}
    return Student.make(net, rest, seed=seed, **own)


def teacher(seed: int = 7, hidden: int = 16, **rest: Any) -> Network:
    return from_network(seeded(net, seed, hidden=hidden), **rest)


def rows(count: int = 22, labelled: float = 1.0, seed: int = 0) -> Table:
    """[B, width] with labels [B], a share of them known."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    unknown = torch.rand(count, generator=draw) >= labelled
    return Table({"x": x}, tuple(f"row-{i}" for i in range(count)), labels=labels.masked_fill(unknown, -100))


def sequences(count: int = 22, labelled: float = 1.0, seed: int = 0) -> Table:
    """[B, T, width] with labels and masks [B, T] of differing lengths, at least one position each."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, LENGTH, WIDTH, generator=draw)
    labels = torch.randint(CLASSES, (count, LENGTH), generator=draw)
    unknown = torch.rand(count, LENGTH, generator=draw) >= labelled
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=draw)
    mask = torch.arange(LENGTH) < lengths
    ids = tuple(f"row-{i}" for i in range(count))
    return Table({"x": x}, ids, labels=labels.masked_fill(unknown, -100), mask=mask)


def trained(objective: Any, examples: Any, *, by: Any = None, start: Student | None = None, **settings: Any) -> Student:
    """Fitted for some steps of plain SGD, unless the settings say otherwise; ``folder`` and the like are for fit."""
    names = {field.name for field in dataclasses.fields(Plan)}
    rest = {name: settings.pop(name) for name in list(settings) if name not in names}
    plan = Plan(**{"steps": 7, "batch_size": 8, **SETTLED, **settings})
    return fit(start or student(), by, examples, objective, plan=plan, progress=False, **rest)


def state(model: Student) -> dict[str, Tensor]:
    return model.net.state_dict()


def apart(one: Student, other: Student) -> float:
    """The largest difference between two students' weights."""
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def same(one: Student, other: Student) -> bool:
    """Whether the weights are equal, bit for bit."""
    return all(torch.equal(state(one)[name], tensor) for name, tensor in state(other).items())


@dataclasses.dataclass(frozen=True)
class Double:
    """The adapter to float64."""

    def __call__(self, inputs: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.double() for tensor in Columns()(inputs))

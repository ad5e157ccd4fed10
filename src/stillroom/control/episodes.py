"""Episodes: what happened while something drove. Arrays in memory, one safetensors file on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from stillroom.data.table import Table
from stillroom.errors import DataError, FolderError, MissingFileError
from stillroom.files import write_bytes

FORMAT = "stillroom-episodes/1"
ABOUT = "episodes"


@dataclass(frozen=True, eq=False)
class Episodes:
    """E episodes of N steps together, one after the other.

    ``actions`` are what was intended, before noise and bounds; ``answers`` what the teacher said at the same states.
    """

    tasks: tuple[str, ...]  # [E]
    starts: tuple[int, ...]  # [E] the seed of each start
    lengths: tuple[int, ...]  # [E] steps
    observations: np.ndarray  # [N, D] float32, what the student sees (all its frames)
    states: np.ndarray  # [N, S] float32, what the teacher sees
    actions: np.ndarray  # [N, A] float32
    answers: np.ndarray | None  # [N, A] float32; None where no teacher was asked
    returns: np.ndarray  # [E] float64, the sum of the rewards
    success: np.ndarray  # [E] bool

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def steps(self) -> int:
        """N: all steps; the number of the teacher's answers where it was asked."""
        return int(sum(self.lengths))

    @property
    def ids(self) -> tuple[str, ...]:
        """[N] 'task/start/step', stable across runs."""
        return tuple(
            f"{task}/{start}/{step}"
            for task, start, length in zip(self.tasks, self.starts, self.lengths, strict=True)
            for step in range(length)
        )

    def errors(self, actions: np.ndarray | None = None) -> np.ndarray:
        """[N] mean over A of (action - answer)^2: the drivers' own actions, or these [N, A].

        Raises DataError when the teacher was not asked.
        """
        if self.answers is None:
            raise DataError("the teacher was not asked in these episodes. Drive with teacher=...")
        given = self.actions if actions is None else actions
        return np.square(given.astype(np.float64) - self.answers).mean(-1)

    def per_episode(self, values: np.ndarray) -> list[np.ndarray]:
        """Values [N, ...] cut into one array for each episode."""
        return np.split(values, np.cumsum(self.lengths)[:-1])

    def table(self, name: str = "driving", labelled: bool = False, **known: Any) -> Table:
        """The N states as examples: columns ``x`` (the student's), ``state`` (the teacher's) and ``task``.

        ``labelled``: the teacher's answers as labels, for a test set. ``known``: licence, source.
        """
        labels = torch.from_numpy(self.answers) if labelled and self.answers is not None else None
        tasks = tuple(task for task, length in zip(self.tasks, self.lengths, strict=True) for _ in range(length))
        columns = {"x": torch.from_numpy(self.observations), "state": torch.from_numpy(self.states), "task": tasks}
        return Table(columns, self.ids, labels=labels, name=name, **known)


def joined(parts: Sequence[Episodes]) -> Episodes:
    """All episodes, in this order. Raises DataError for none."""
    if not parts:
        raise DataError("there are no episodes to join.")
    answers = [part.answers for part in parts]
    return Episodes(
        tasks=tuple(task for part in parts for task in part.tasks),
        starts=tuple(start for part in parts for start in part.starts),
        lengths=tuple(length for part in parts for length in part.lengths),
        answers=None if any(a is None for a in answers) else np.concatenate(answers),  # type: ignore[arg-type]
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("observations", "states", "actions", "returns", "success")
        },
    )


def write_episodes(episodes: Episodes, path: Path) -> None:
    """One safetensors file, whole or not at all."""
    arrays = {f.name: getattr(episodes, f.name) for f in dataclasses.fields(Episodes)}
    tensors = {name: torch.from_numpy(a.copy()) for name, a in arrays.items() if isinstance(a, np.ndarray)}
    about = {"tasks": list(episodes.tasks), "starts": list(episodes.starts), "lengths": list(episodes.lengths)}
    # one entry: safetensors writes several in any order, and the same episodes are to be the same bytes
    write_bytes(path, save(tensors, {ABOUT: json.dumps({"format": FORMAT, **about})}))


def read_episodes(path: Path) -> Episodes:
    """Raises MissingFileError, or FolderError for a file of another kind."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist.")
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (found := about.pop("format", None)) != FORMAT:
            raise FolderError(f"{path} has format {found!r}, not {FORMAT!r}. Delete it, and drive again.")
    except FolderError:
        raise
    except Exception as error:  # safetensors raises its own for a cut file
        raise FolderError(f"{path} cannot be read ({error}). Delete it, and drive again.") from None
    told: dict[str, Any] = {name: tuple(values) for name, values in about.items()}
    return Episodes(answers=arrays.pop("answers", None), **arrays, **told)

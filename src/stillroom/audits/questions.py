"""What teachers, decoys and the student are asked in an audit: inputs that are fixed before any of them answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.data.table import Table
from stillroom.digests import examples_digest
from stillroom.errors import FolderError, SignalError, UsageError
from stillroom.types import Batch, Column, Dense, Projected, Signal

ROWS = 256  # asked at once
FEWEST = 20


def declared_questions(pool: Table, rows: int, seed: int) -> Table:
    """``rows`` of the declared transfer inputs (all when there are fewer), drawn by ``seed``, without augmentation."""
    if len(pool) < FEWEST:
        raise UsageError(f"the run declares {len(pool)} transfer inputs; a statistic needs at least {FEWEST}.")
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(pool))[:rows])
    return pool.select(chosen.tolist()).with_augment(None).without_labels()


def fresh_questions(table: Table, rows: int, seed: int) -> Table:
    """``rows`` inputs outside the data: each made of two examples of ``table``.

    Tensors of numbers are mixed, w x + (1 - w) y with w uniform on [.3, .7]; whole numbers are taken place by place
    from either; texts become the words of both in random order, half of them. They are nobody's training data, so what
    a student says of them it has from its teacher (or from nobody). Raises UsageError for fewer than two examples.
    """
    if len(table) < 2:
        raise UsageError(f"fresh inputs are made of two examples each; there are {len(table)}.")
    generator = np.random.default_rng([seed, 2])
    first = generator.integers(len(table), size=rows)
    second = (first + generator.integers(1, len(table), size=rows)) % len(table)
    sides = [table.batch(side.tolist()).inputs for side in (first, second)]
    columns = {name: _mixed(sides[0][name], sides[1][name], generator) for name in sides[0]}
    ids = tuple(f"fresh-{seed}-{number:05d}" for number in range(rows))
    return Table(columns, ids, classes=table.classes, name="fresh inputs")


def _mixed(left: Column, right: Column, generator: np.random.Generator) -> Column:
    if isinstance(left, tuple) or isinstance(right, tuple):
        return tuple(_shuffled(f"{one} {other}", generator) for one, other in zip(left, right, strict=True))
    if not left.is_floating_point():
        return torch.where(torch.from_numpy(generator.random(left.shape) < 0.5), left, right)
    share = torch.from_numpy(generator.uniform(0.3, 0.7, size=(len(left), *[1] * (left.dim() - 1)))).to(left.dtype)
    return share * left + (1 - share) * right


def _shuffled(text: str, generator: np.random.Generator) -> str:
    words = np.array(text.split(), dtype=object)
    return " ".join(generator.permutation(words)[: max(1, len(words) // 2)])


def described(table: Table) -> dict[str, Any]:
    """The digest of ids and inputs, and how many there are: what a commitment holds of them."""
    return {"sha256": examples_digest(table), "rows": len(table)}


def log_probs_of(model: Callable[[Batch], Signal], table: Table) -> np.ndarray:
    """[n, C] log-probabilities in nats of a model's answers. Raises SignalError for one that gives none.

    Of a student, give its ``predict``.
    """
    found = []
    with torch.no_grad():
        for start in range(0, len(table), ROWS):
            batch = table.batch(range(start, min(start + ROWS, len(table))))
            logits = model(batch).need_logits("an audit")
            if isinstance(logits, Projected):
                logits = Dense(logits.compute())
            if not isinstance(logits, Dense) or logits.values.dim() != 2:
                raise SignalError(
                    "an audit compares all log-probabilities of one answer per input; this model gives "
                    f"{type(logits).__name__} of positions {list(logits.shape)}. Test language models from Python: "
                    "stillroom.provenance.audit takes arrays (benchmarks/audit_language.py does it)."
                )
            found.append(logits.values.double().log_softmax(-1).cpu().numpy())
    return np.concatenate(found)


def right_of(answers: np.ndarray, labels: Tensor) -> int:
    """How many answers have the label as their top class."""
    return int((answers.argmax(-1) == labels.numpy()).sum())


def name_of(place: Path) -> str:
    """The student's folder below its run: no more of a path than says which one."""
    if not place.is_dir():
        raise FolderError(f"{place} is no student's folder. Give the folder that holds its model.safetensors.")
    return "/".join(place.resolve().parts[-2:])

"""Asking all models about all examples, once: each metric's statistics, and what is wrong with labels or answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillroom.errors import DataError, SignalError
from stillroom.measures.reading import read
from stillroom.progress import bar
from stillroom.types import UNLABELLED, Batch, Dense, Examples, Metric, Model, Projected, Signal, Sparse

Seeds = tuple[Model, ...]


@dataclass
class Asked:
    """What was learned from one pass over the examples."""

    statistics: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)  # row, metric -> R tensors [N, S]
    teacher_entropy: float | None = None  # nats, mean over positions
    classes: int | None = None
    labelled: int = 0  # examples that count: labelled ones, or where no metric reads labels all that were compared
    documents: Tensor | None = None  # [N] of rows of texts: the document of which each is a piece

    def independent(self, row: str, metric: Metric) -> list[Tensor] | None:
        """The statistics of a row of the scoreboard, R tensors [N, S], as what can be resampled: independent examples.

        Pieces of one document are added up (sums add): as examples of their own they would make intervals too narrow.
        """
        parts = self.statistics.get(row, {}).get(metric.name)
        if parts is None or self.documents is None or not hasattr(metric.finish, "of_sums"):
            return parts
        return [_added_up(part, self.documents) for part in parts]


def ask_all(
    rows: Mapping[str, Seeds],
    teacher: Model,
    examples: Examples,
    metrics: Sequence[Metric],
    batch_size: int,
    shown: bool = True,
) -> Asked:
    """Statistics of every metric that applies, for every row and seed.

    A model that stands in several places (the teacher as a row of its own) is asked once for each batch.
    Raises DataError for labels, SignalError for answers, both naming the example.
    """
    pieces: dict[tuple[str, str, int], list[Tensor]] = {}
    asked = Asked(statistics={name: {} for name in rows})
    entropies: list[Tensor] = []
    documents: list[Tensor | None] = []
    total = len(examples)
    needs_labels = any(not metric.against_teacher for metric in metrics)
    with bar("evaluate", total, shown=shown) as step:
        for start in range(0, total, batch_size):
            batch = examples.batch(range(start, min(start + batch_size, total)), None)
            answers: dict[int, Signal] = {}
            target = _ask(teacher, "teacher", batch, answers)
            asked.labelled += _check_labels(batch, target)
            _note_entropy(target, batch, entropies, asked)
            documents.append(_document_of_rows(batch))
            for row, seeds in rows.items():
                for index, model in enumerate(seeds):
                    answer = _ask(model, row, batch, answers)
                    for metric in metrics:
                        if applies(metric, row, model, teacher):
                            found = metric.statistics(answer, _near(target, answer), batch)
                            pieces.setdefault((row, metric.name, index), []).append(found.detach().cpu())
            step(len(batch))
    if asked.labelled == 0 and needs_labels:
        raise DataError(
            f"none of the {total} examples has a label that counts: quality cannot be measured. "
            "Evaluate on labelled examples, or pass metrics that compare with the teacher only."
        )
    for (row, name, _), parts in pieces.items():
        asked.statistics[row].setdefault(name, []).append(torch.cat(parts))
    known = [part for part in documents if part is not None]
    if len(known) == len(documents):
        asked.documents = torch.cat(known)
        asked.labelled = min(asked.labelled, len(asked.documents.unique()))
    if asked.labelled == 0:  # no labels are needed: what a comparison with the teacher judged
        parts = (part for row in asked.statistics.values() for seeds in row.values() for part in seeds)
        asked.labelled = max((int((~part.isnan().any(-1)).sum()) for part in parts), default=0)
        if asked.labelled == 0 and asked.statistics.keys() - {"teacher"}:
            raise DataError(f"none of the {total} examples counts: every label is {UNLABELLED}. Leave labels out.")
    if any(len(part) for part in entropies):
        asked.teacher_entropy = float(torch.cat(entropies).double().mean())
    return asked


def _document_of_rows(batch: Batch) -> Tensor | None:
    """[B] the document of each row, where each is of one only."""
    documents = batch.extra.get("documents")
    if documents is None or documents.ndim != 2 or (documents[:, :1] < 0).any():
        return None
    first = documents[:, :1]
    return first.squeeze(-1).cpu() if ((documents == first) | (documents < 0)).all() else None


def _added_up(statistics: Tensor, documents: Tensor) -> Tensor:
    """[M, S] of the M documents; NaN for one of which no piece counts."""
    names, place = documents.unique(return_inverse=True)
    counts = ~statistics.isnan().any(-1)
    total = torch.zeros(len(names), statistics.shape[1], dtype=statistics.dtype)
    total.index_add_(0, place[counts], statistics[counts])
    seen = torch.zeros(len(names), dtype=torch.bool)
    seen[place[counts]] = True
    return total.masked_fill(~seen.unsqueeze(-1), float("nan"))


def applies(metric: Metric, row: str, model: Model, teacher: Model) -> bool:
    """False for a comparison of the teacher with itself, and where probabilities are needed and not given."""
    if metric.against_teacher and (row == "teacher" or model is teacher):
        return False
    judged = (model, teacher) if metric.against_teacher else (model,)
    return not metric.needs_probabilities or all(gives_probabilities(m) for m in judged)


def gives_probabilities(model: Model) -> bool:
    """False for a model that says that its scores are no probabilities (a linear classifier's margins)."""
    return bool(getattr(model, "scores_are_probabilities", True))


def _ask(model: Model, row: str, batch: Batch, answers: dict[int, Signal]) -> Signal:
    if id(model) not in answers:
        signal = model(batch)
        _check_answer(signal, row, batch)
        answers[id(model)] = signal
    return answers[id(model)]


def _check_answer(signal: Signal, row: str, batch: Batch) -> None:
    """Refuse NaN and +inf where a position counts. -inf is a probability of 0."""
    logits = signal.logits
    found: list[Tensor] = []
    if isinstance(logits, Dense):
        found.append(logits.values)
    elif isinstance(logits, Projected):
        found.append(logits.hidden)
    elif isinstance(logits, Sparse):
        found.append(logits.log_probs)
    if signal.values is not None:
        found.append(signal.values)
    for tensor in found:
        if len(tensor) != len(batch):
            raise SignalError(f"{row} gives {len(tensor)} answers for {len(batch)} examples.")
        bad = tensor.isnan() | (tensor == float("inf"))
        if batch.mask is not None:
            mask = batch.mask.to(bad.device, torch.bool)
            if bad.shape[: mask.ndim] == mask.shape:
                bad = bad & mask.reshape(*mask.shape, *[1] * (bad.ndim - mask.ndim))
        wrong = bad.reshape(len(batch), -1).any(-1)
        if wrong.any():
            name = batch.ids[int(wrong.nonzero()[0])]
            raise SignalError(
                f"{row} answers NaN or infinity for example {name!r} ({int(wrong.sum())} of {len(batch)} in its "
                "batch). Check that input for missing values, and the model's weights and precision."
            )


def _check_labels(batch: Batch, teacher: Signal) -> int:
    """How many examples of the batch are labelled. Refuses labels outside the classes, naming the example."""
    if batch.labels is None:
        return 0
    labels = batch.labels.reshape(len(batch), -1)
    if labels.is_floating_point():
        known = ~labels.isnan()
    else:
        known = labels != UNLABELLED
        if teacher.logits is not None:
            vocabulary = teacher.logits.vocabulary
            wrong = (known & ((labels < 0) | (labels >= vocabulary))).nonzero()
            if len(wrong):
                row, place = wrong[0].tolist()
                raise DataError(
                    f"example {batch.ids[row]!r} has label {int(labels[row, place])}, but the teacher has classes 0 to "
                    f"{vocabulary - 1}. Check the class order; unlabelled examples have {UNLABELLED}."
                )
    if batch.mask is not None and batch.mask.numel() == known.numel():
        known = known & batch.mask.to(known.device, torch.bool).reshape(known.shape)
    return int(known.any(-1).sum())


def _note_entropy(target: Signal, batch: Batch, entropies: list[Tensor], asked: Asked) -> None:
    if target.logits is None:
        return
    asked.classes = target.logits.vocabulary
    entropy = read(target.logits, batch).entropy.detach().cpu()
    entropies.append(entropy[~entropy.isnan()])


def _near(target: Signal, answer: Signal) -> Signal:
    """The teacher's signal on the device of the model's."""
    there, here = _device(answer), _device(target)
    if there is None or here is None or there == here:
        return target
    moved = target.to(there)
    if isinstance(moved.logits, Projected):
        head = moved.logits
        bias = None if head.bias is None else head.bias.to(there)
        moved = dataclasses.replace(moved, logits=dataclasses.replace(head, weight=head.weight.to(there), bias=bias))
    return moved


def _device(signal: Signal) -> torch.device | None:
    logits = signal.logits
    if isinstance(logits, Dense):
        return logits.values.device
    if isinstance(logits, Projected):
        return logits.hidden.device
    if isinstance(logits, Sparse):
        return logits.ids.device
    return None if signal.values is None else signal.values.device

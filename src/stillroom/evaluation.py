"""The scoreboard: models, their teacher and a test set in; report.json and a Report out. Trains nothing."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group

from stillroom import measures
from stillroom.data import Packed
from stillroom.data.overlap import overlap
from stillroom.digests import data_description
from stillroom.errors import FolderError, PairError, UsageError, nearest
from stillroom.files import read_json, write_json
from stillroom.measures import Interval
from stillroom.measures.asking import Asked, Seeds, ask_all
from stillroom.measures.comparisons import comparisons_of
from stillroom.measures.cost import THREADS, answering
from stillroom.measures.disagreements import reliability_bins, where_they_differ
from stillroom.measures.generations import side_by_side
from stillroom.measures.harness import run_tasks
from stillroom.measures.language_cost import language_costs
from stillroom.measures.scoreboard import scoreboard
from stillroom.measures.wording import Cell, columns_about
from stillroom.types import Batch, Examples, Metric, Model, check_batch_of, identity_of

FORMAT = "stillroom-report/1"
FILE = "report.json"
HARNESS = "harness.json"
SINGLES = 32  # examples on which latency is measured; FLOPs are counted on the first of them
COUNTED = 8
EXAMPLES = 256  # of a batch
TOKENS = 8192  # of a batch of texts: so many hidden states and their logits by chunks fit anywhere


@dataclass(frozen=True)
class Report:
    """What report.json holds, under the same names: what is in memory is what is on disk.

    A cell of ``rows`` is {"value", "low", "high"} (95 %), or None where a number does not apply.
    """

    metric: str  # the headline
    examples: int  # labelled ones; where no metric reads labels, those that were compared with the teacher
    rows: Mapping[str, Mapping[str, Cell]]
    comparisons: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, Any]]
    reliability: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    disagreements: Sequence[Mapping[str, Any]] = ()
    diagnosis: Sequence[str] = ()
    generations: Sequence[Mapping[str, Any]] = ()  # of language models (measures.generations.side_by_side)
    overlap: Mapping[str, Any] | None = None  # of test and training texts (data.overlap)
    seeds: Mapping[str, int] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)  # what it was measured on (digests.data_description)
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "folder"]
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}}

    def scoreboard(self) -> Group:
        """The table and the findings, for a terminal of 120 columns (a rich renderable)."""
        return scoreboard(
            self.rows,
            self.metrics,
            self.metric,
            self.comparisons,
            self.diagnosis,
            self.examples,
            self.seeds,
            self.overlap,
        )

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as captured:
            console.print(self.scoreboard())
        return captured.get()


def evaluate(
    models: Mapping[str, Model | Sequence[Model]],
    teacher: Model,
    examples: Examples,
    metrics: Sequence[Metric | str] | None = None,
    folder: str | Path | None = None,
    *,
    metric: str | None = None,
    training: Examples | None = None,
    batch_size: int | None = None,
    replicates: int = 1000,
    seed: int = 0,
    costs: bool = True,
    progress: bool = True,
) -> Report:
    """Measure every model on the same examples, with 95 % intervals, and write ``folder``/report.json.

    ``models``: one per row of the scoreboard, by name; 'student', 'alone', 'untrained' and 'baseline' have a meaning.
    A sequence of models is one row: its seeds, pooled. The row 'teacher' is ``models["teacher"]``, or the teacher.
    ``metrics``: Metric values or names of ``measures.METRICS``; by default what the labels and the teacher allow.
    ``metric``: the headline, by default the first. ``replicates`` and ``seed`` are the bootstrap's.
    ``training``: packed texts that the models learned from; what the examples share with them is counted and shown.
    ``batch_size``: by default 256, and of texts as many rows as hold 8,192 tokens.
    ``costs=False`` leaves out costs, and what language models write. Only speeds differ from run to run.

    Raises DataError (no examples, no labels, a label outside the classes), SignalError (a NaN, or an answer that a
    metric needs is not given), UsageError (an unknown metric, a row without models), PairError (classes, tokenizers).
    """
    check_batch_of(examples)
    _check_pairs(rows := _rows_of(models, teacher), examples)
    tokenizer = _tokenizer_of(rows, examples)
    with answering([teacher, *(model for seeds in rows.values() for model in seeds)]):
        chosen = _metrics_of(metrics, teacher, first := examples.batch([0], None))
        headline = _headline_of(metric, chosen)
        batch_size = batch_size or _batch_size(first)
        asked = ask_all(rows, teacher, examples, chosen, batch_size, progress)
        cells = {name: _cells(name, seeds, teacher, chosen, asked, replicates, seed) for name, seeds in rows.items()}
        for name, seeds in rows.items() if costs else ():
            cells[name].update(costs_of(seeds[0], examples, seed))
        disagreements = where_they_differ(rows, teacher, examples, asked, tokenizer)
        generations = side_by_side(rows, examples, tokenizer) if costs and tokenizer is not None else []
    compared = [headline, *(m for m in chosen if m.name == "kl" and isinstance(examples, Packed) and m != headline)]
    comparisons = comparisons_of(rows, asked, compared, replicates, seed)
    about = columns_about(chosen, cells)
    report = Report(
        metric=headline.name,
        examples=asked.labelled,
        rows=cells,
        comparisons=comparisons,
        metrics=about,
        reliability=reliability_bins(rows, asked),
        disagreements=disagreements,
        diagnosis=_diagnosis(cells, comparisons, about, headline, asked),
        generations=generations,
        overlap=_overlap(training, examples, tokenizer, progress),
        seeds={name: len(seeds) for name, seeds in rows.items()},
        teacher={"name": identity_of(teacher).name, "entropy": asked.teacher_entropy, "classes": asked.classes},
        data=data_description(examples),
        settings={"replicates": replicates, "seed": seed, "batch_size": batch_size, "threads": THREADS},
        folder=None if folder is None else Path(folder),
    )
    if report.folder is not None:
        write_json(report.folder / FILE, report.as_json())
    return report


def _diagnosis(cells: Any, comparisons: Any, about: Any, headline: Metric, asked: Asked) -> list[str]:
    known = {"teacher_entropy": asked.teacher_entropy, "classes": asked.classes, "examples": asked.labelled}
    return measures.diagnose(cells, comparisons, about, metric=headline.name, **known)


def load_report(folder: str | Path) -> Report:
    """The Report of a folder (or of a run folder that has report/). Raises MissingFileError, FolderError."""
    folder = Path(folder)
    if not (folder / FILE).exists() and (folder / "report" / FILE).exists():
        folder = folder / "report"
    content = read_json(folder / FILE)
    if content.get("format") != FORMAT:
        raise FolderError(f"{folder / FILE} has format {content.get('format')!r}; expected {FORMAT!r}. Evaluate again.")
    names = {f.name for f in dataclasses.fields(Report)} - {"folder"}
    return Report(**{name: content[name] for name in names if name in content}, folder=folder)


def harness(
    models: Mapping[str, Model | Sequence[Model]],
    tasks: Sequence[str],
    folder: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness; ``settings`` of measures.harness.run_tasks. Writes ``folder``/harness.json."""
    found = run_tasks(models, tasks, **settings)
    if folder is not None:
        write_json(Path(folder) / HARNESS, found)
    return found


def _check_pairs(rows: Mapping[str, Seeds], examples: Examples) -> None:
    theirs = getattr(examples, "tokenizer", None)
    for name, seeds in rows.items():
        for model in seeds:
            identity = identity_of(model)
            check_classes(name, identity.classes, getattr(examples, "classes", None))
            if theirs and identity.tokenizer and identity.tokenizer != theirs:
                raise PairError(
                    f"row {name!r} reads tokens of tokenizer {identity.tokenizer[:12]}, the examples are of "
                    f"{theirs[:12]}: the same ids are other texts. Pack the texts with the model's own tokenizer, and "
                    "compare models of several tokenizers by measures.bits_per_byte_of_texts."
                )


def _tokenizer_of(rows: Mapping[str, Seeds], examples: Examples) -> Any:
    """The tokenizer that shows packed examples as texts: that of the first model that carries one; else None."""
    if not isinstance(examples, Packed):
        return None
    carried = (getattr(model, "tokenizer", None) for seeds in rows.values() for model in seeds)
    return next((found for found in carried if found is not None), None)


def _batch_size(first: Batch) -> int:
    tokens = first.inputs.get("tokens") if "bytes" in first.extra else None
    return EXAMPLES if tokens is None else max(1, min(EXAMPLES, TOKENS // len(tokens[0])))


def _overlap(training: Examples | None, examples: Examples, tokenizer: Any, progress: bool) -> dict[str, Any] | None:
    if not isinstance(training, Packed) or not isinstance(examples, Packed):
        return None
    return overlap(training, examples, tokenizer=tokenizer, progress=progress).as_json()


def check_classes(whose: str, ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    """Raise PairError when both orders of classes are known and one is not the beginning of the other."""
    if ours and theirs and any(a != b for a, b in zip(ours, theirs, strict=False)):
        raise PairError(
            f"the classes of {whose!r} are in the order {', '.join(ours[:6])}; of the data: {', '.join(theirs[:6])}. "
            "Labels would be compared with other classes: give both the same order."
        )


def _rows_of(models: Mapping[str, Model | Sequence[Model]], teacher: Model) -> dict[str, Seeds]:
    """Every row with its seeds; the teacher first."""
    rows: dict[str, Seeds] = {"teacher": (teacher,)}
    for name, given in models.items():
        rows[name] = tuple(given) if isinstance(given, list | tuple) else (given,)  # type: ignore[assignment]
        if not rows[name]:
            raise UsageError(f"row {name!r} has no models (an empty list). Give at least one, or leave the row out.")
        for model in rows[name]:
            if not callable(model):
                raise UsageError(f"row {name!r} holds {type(model).__name__}, which does not answer batches.")
    return rows


def _metrics_of(metrics: Sequence[Metric | str] | None, teacher: Model, first: Batch) -> tuple[Metric, ...]:
    if metrics is None:
        return measures.default_metrics(teacher(first), first)
    if not metrics:
        raise UsageError("metrics is empty. Leave it out for the default, or name some.")
    for name in metrics:
        if isinstance(name, str) and name not in measures.METRICS:
            raise UsageError(f"there is no metric {name!r}{nearest(name, measures.METRICS)}")
    return tuple(measures.METRICS[m] if isinstance(m, str) else m for m in metrics)


def _headline_of(metric: str | None, chosen: Sequence[Metric]) -> Metric:
    if metric is None:
        return chosen[0]
    for candidate in chosen:
        if candidate.name == metric:
            return candidate
    raise UsageError(f"the headline {metric!r} is not measured{nearest(metric, [m.name for m in chosen])}")


def _cells(
    row: str, seeds: Seeds, teacher: Model, chosen: Sequence[Metric], asked: Asked, replicates: int, seed: int
) -> dict[str, Cell]:
    """Every metric of one row; None where it does not apply."""
    cells: dict[str, Cell] = {}
    for metric in chosen:
        statistics = asked.independent(row, metric)
        found = None if statistics is None else measures.bootstrap(statistics, metric.finish, replicates, seed)
        cells[metric.name] = None if found is None else found.as_json()
    return cells


def costs_of(model: Model, examples: Examples, seed: int = 0) -> dict[str, Cell]:
    """Parameters, bytes, FLOPs and latency of a model, measured on a few of the examples."""
    found: dict[str, Any] = {"parameters": measures.parameter_count(model), "bytes": measures.weight_bytes(model)}
    if isinstance(examples, Packed):
        found |= language_costs(model, examples, seed)
    else:
        count = len(examples)
        picked = torch.linspace(0, count - 1, min(count, SINGLES)).long().unique().tolist()
        singles = [examples.batch([index], None) for index in picked]
        found["flops"] = measures.flops_per_example(model, singles[:COUNTED])
        found["latency"] = measures.latency(model, singles, seed=seed)
    intervals = {name: Interval.exact(v) if isinstance(v, int) else v for name, v in found.items()}
    return {name: None if cell is None else cell.as_json() for name, cell in intervals.items()}

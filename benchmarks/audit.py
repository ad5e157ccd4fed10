"""Calibration of the exchangeable-decoy rank test: false positives, power, dilution and misuse, hundreds of students.

    python benchmarks/audit.py                 # the sealed tasks; writes results/audit.json
    python benchmarks/audit.py --task digits   # the task that choices were made on; writes results/audit_digits.json

A set is one teacher with 39 decoys and students of its own; sets share nothing but the data set they draw rows from.
The statistic of each mode was chosen on digits and then run once on the sealed tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from audit_students import Networks, Recipe, Task, digits, texts, train
from stillroom.digests import json_digest
from stillroom.environment import environment
from stillroom.errors import PairError
from stillroom.files import write_json
from stillroom.provenance.audit import DECLARED, FRESH, MODES, Columns, Mode, exact_p, teacher_test, wilson
from stillroom.provenance.audit.statistics import combined, statistics_of

RESULTS = Path(__file__).parent / "results"
SEALED = ("reuters-r8", "20newsgroups")
DECOYS, ALPHA, HOT = 39, 0.05, 2.0
# kind of student: (whose answers, how they are given, share of the rows that has them, students per set)
NULLS = {
    "ground truth": ("truth", "hard", 1.0, 4),
    "other teacher, soft": ("other", "soft", 1.0, 4),
    "other teacher, hard": ("other", "hard", 1.0, 4),
    "other recipe, soft": ("better", "soft", 1.0, 2),
}
POSITIVES = {
    "soft, T = 2": ("teacher", "soft", 1.0, 6),
    "hard, declared inputs": ("teacher", "hard", 1.0, 6),
    "soft, 50 % of the rows": ("teacher", "soft", 0.5, 3),
    "soft, 25 % of the rows": ("teacher", "soft", 0.25, 3),
    "hard, 50 % of the rows": ("teacher", "hard", 0.5, 3),
    "hard, 25 % of the rows": ("teacher", "hard", 0.25, 3),
}
KINDS = NULLS | POSITIVES


@dataclasses.dataclass(frozen=True, eq=False)
class Set:
    """One teacher (column 0) with its decoys, other teachers, and the rows that each part of the set gets."""

    task: Task
    number: int
    columns: Networks
    others: dict[str, Networks]
    asked: Tensor
    fresh: Tensor
    scored: Tensor

    def answers(self, networks: Networks) -> dict[str, np.ndarray]:
        return {DECLARED: networks.log_probs(self.task.x[self.asked]), FRESH: networks.log_probs(self.fresh)}

    def right(self, networks: Networks) -> np.ndarray:
        said = networks.log_probs(self.task.x[self.scored]).argmax(-1)
        return (said == self.task.labels[self.scored].numpy()).sum(-1)


def recipe_digest(recipe: Recipe) -> str:
    return json_digest(dataclasses.asdict(recipe))


def make_set(task: Task, number: int) -> Set:
    """Train teacher, decoys and the teachers of the null students. Every seed follows from (task, number)."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{task.name}|{number}".encode()).digest()[:6])
    )
    taught, asked, scored, _ = torch.randperm(len(task.x), generator=generator).split(
        [task.taught, task.asked, task.scored, len(task.x) - task.taught - task.asked - task.scored]
    )
    first, second = torch.randint(len(scored), (2, 1000), generator=generator)
    mixed = 0.3 + 0.4 * torch.rand(1000, 1, generator=generator)
    fresh = mixed * task.x[scored[first]] + (1 - mixed) * task.x[scored[second]]

    def teachers(recipe: Recipe, count: int, kind: int) -> Networks:
        truth = task.one_hot(task.labels[taught])
        return train(
            task.x, taught.expand(count, -1), truth.expand(count, -1, -1), recipe, seeds(task, number, kind, count)
        )

    made = teachers(task.teacher, DECOYS + 2, 0)
    others = {
        "other": made.select([DECOYS + 1]),
        "better": teachers(dataclasses.replace(task.teacher, hidden=192, epochs=60), 1, 1),
        "worse": teachers(dataclasses.replace(task.teacher, hidden=4, epochs=4), 1, 2),
        "narrow": teachers(dataclasses.replace(task.teacher, hidden=40), DECOYS, 3),
    }
    return Set(task, number, made.select(range(DECOYS + 1)), others, asked, fresh, scored)


def seeds(task: Task, number: int, kind: int, count: int) -> list[int]:
    return [
        int.from_bytes(hashlib.sha256(f"{task.name}|{number}|{kind}|{index}".encode()).digest()[:6])
        for index in range(count)
    ]


def make_students(made: Set) -> tuple[list[str], Networks]:
    """All students of a set in one training; the kind of each."""
    task, x = made.task, made.task.x[made.asked]
    truth = task.one_hot(task.labels[made.asked])
    who = {"teacher": made.columns.select([0]), "other": made.others["other"], "better": made.others["better"]}
    kinds, targets = [], []
    for kind, (source, given, share, count) in KINDS.items():
        said = truth
        if source != "truth":
            logits = who[source](x)[0].detach()
            said = (logits / HOT).softmax(-1) if given == "soft" else task.one_hot(logits.argmax(-1))
        for index in range(count):
            (seed,) = seeds(task, made.number, 100 + list(KINDS).index(kind), index + 1)[-1:]
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) < share * len(x)
            kinds.append(kind)
            targets.append(torch.where(chosen[:, None], said, truth))
    # temperature 2 for all: hard labels at T = 2 are only a rescaled training
    recipe = dataclasses.replace(task.student, temperature=HOT)
    ids = seeds(task, made.number, 50, len(kinds))
    return kinds, train(task.x, made.asked.expand(len(kinds), -1), torch.stack(targets), recipe, ids)


def columns_of(made: Set, teacher: Networks | None = None, recipe: Recipe | None = None) -> Columns:
    """Teacher and decoys; another teacher in front for a misuse, which claims ``recipe``."""
    answers, right = made.answers(made.columns), made.right(made.columns)
    own = recipe_digest(made.task.teacher)
    if teacher is not None:
        front = made.answers(teacher)
        answers = {name: np.concatenate([front[name], values[1:]]) for name, values in answers.items()}
        right = np.concatenate([made.right(teacher), right[1:]])
    first = own if recipe is None else recipe_digest(recipe)
    return Columns("teacher", answers, (first, *[own] * DECOYS), tuple(range(DECOYS + 1)), right, made.task.scored)


def naive_p(student: dict[str, np.ndarray], columns: Columns, mode: Mode) -> float:
    """The invalid test: is the student nearer to the teacher than to the decoys, prompts being the only randomness?

    z = mean / standard error over prompts of (likeness to the teacher - mean likeness to the decoys). Likeness is the
    expected log-probability of the student under the teacher's answer (soft), or the same top class (hard).
    """
    names = [DECLARED, FRESH] if mode == "soft" else [DECLARED]
    above = []
    for name in names:
        theirs, own = columns.answers[name], student[name]
        each = (np.exp(theirs) * own).sum(-1) if mode == "soft" else theirs.argmax(-1) == own.argmax(-1)
        above.append(each[0] - each[1:].mean(0))
    found = np.concatenate(above)
    z = found.mean() / max(found.std(ddof=1) / len(found) ** 0.5, 1e-12)
    return 0.5 * float(torch.erfc(torch.tensor(z / 2**0.5, dtype=torch.float64)))


def tests_of(made: Set) -> list[dict[str, Any]]:
    """Every student of a set against its teacher, in both modes and by the naive test."""
    kinds, students = make_students(made)
    answers, columns = made.answers(students), columns_of(made)
    rows = []
    for index, kind in enumerate(kinds):
        student = {name: values[index] for name, values in answers.items()}
        row: dict[str, Any] = {"set": made.number, "kind": kind, "naive": {}}
        for mode in MODES:
            row["naive"][mode] = naive_p(student, columns, mode)
            row[mode] = tested(student, columns, mode, made.number * 1000 + index)
        rows.append(row)
    return rows + misused(made, kinds, answers)


def tested(student: dict[str, np.ndarray], columns: Columns, mode: Mode, seed: int) -> dict[str, Any]:
    """p, randomised p and effect; None when the test refuses, which only a misuse should meet."""
    try:
        found = teacher_test(student, columns, mode, alpha=ALPHA, randomise=seed, replicates=2)
    except PairError as error:
        return {"p": None, "refused": str(error)}
    assert found.effect is not None
    return {"p": found.p, "randomised": found.randomised, "effect": found.effect[0]}


def unchecked_p(student: dict[str, np.ndarray], columns: Columns, mode: Mode) -> float:
    """What p would have been had the misuse not been refused."""
    values = combined(np.stack([rows.value() for rows in statistics_of(student, columns.answers, mode)]))
    return exact_p(values[0], values[1:])


def misused(made: Set, kinds: list[str], answers: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Null students against teachers that were not made as their decoys were, honestly declared and not."""
    student = {name: values[kinds.index("ground truth")] for name, values in answers.items()}
    wide = dataclasses.replace(made.task.teacher, hidden=192, epochs=60)
    right = made.right(made.columns)
    best = made.columns.select([int(right.argmax()), *[i for i in range(DECOYS + 1) if i != int(right.argmax())]])
    chosen = dataclasses.replace(made, columns=best)
    # the narrow decoys are almost as good as the teacher's own would be: only their digest can tell
    narrow = columns_of(dataclasses.replace(made, columns=_joined(made.columns.select([0]), made.others["narrow"])))
    narrow_digest = recipe_digest(dataclasses.replace(made.task.teacher, hidden=40))
    cases = {
        "better teacher, recipe declared": columns_of(made, made.others["better"], wide),
        "better teacher, recipe hidden": columns_of(made, made.others["better"]),
        "worse teacher, recipe hidden": columns_of(made, made.others["worse"]),
        "decoys of a narrower recipe, declared": dataclasses.replace(
            narrow, recipes=(narrow.recipes[0], *[narrow_digest] * DECOYS)
        ),
        "best of 40 seeds, hidden": columns_of(chosen),
    }
    rows = []
    for case, columns in cases.items():
        row: dict[str, Any] = {"set": made.number, "kind": f"misuse: {case}"}
        for mode in MODES:
            row[mode] = tested(student, columns, mode, made.number)
            row[mode]["if not refused"] = unchecked_p(student, columns, mode)
        rows.append(row)
    return rows


def _joined(first: Networks, second: Networks) -> Networks:
    """The columns of both. Layers of another width are padded with units that say nothing."""
    width = max(first.layers[0].shape[-1], second.layers[0].shape[-1])

    def padded(networks: Networks) -> tuple[Tensor, ...]:
        more = width - networks.layers[0].shape[-1]
        into, bias, out, last = networks.layers
        pad = torch.nn.functional.pad
        return pad(into, (0, more)), pad(bias, (0, more)), pad(out, (0, 0, 0, more)), last

    return Networks(tuple(torch.cat(pair) for pair in zip(padded(first), padded(second), strict=True)))


def share(values: list[float | None]) -> dict[str, Any]:
    """How many p-values are at most alpha, with Wilson's interval; refusals are counted and left out."""
    there = [value for value in values if value is not None]
    found = sum(value <= ALPHA for value in there)
    low, high = wilson(found, len(there)) if there else (0.0, 1.0)
    rate = found / len(there) if there else None
    return {"rate": rate, "low": low, "high": high, "students": len(there), "refused": len(values) - len(there)}


def uniformity(values: list[float]) -> dict[str, float]:
    """Kolmogorov-Smirnov against the uniform distribution, one value per set."""
    from scipy.stats import kstest

    found: Any = kstest(values, "uniform")
    return {"statistic": float(found.statistic), "p": float(found.pvalue), "sets": len(values)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates by kind and mode, pooled nulls, uniformity over sets, misuse."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    nulls = [row for kind in NULLS for row in by_kind[kind]]

    def rates(some: list[dict[str, Any]]) -> dict[str, Any]:
        modes = {mode: share([row[mode]["p"] for row in some]) for mode in MODES}
        return modes | {f"naive z, {mode} (invalid)": share([row["naive"][mode] for row in some]) for mode in MODES}

    kinds = {kind: rates(by_kind[kind]) for kind in KINDS}
    for kind in NULLS:
        firsts = {row["task"] + str(row["set"]): row for row in reversed(by_kind[kind])}.values()
        for mode in MODES:
            there = [row[mode]["randomised"] for row in firsts if row[mode]["p"] is not None]
            kinds[kind][mode]["uniform"] = uniformity(there)
    misuse = {
        kind.removeprefix("misuse: "): {
            mode: {
                "refused": float(np.mean([row[mode]["p"] is None for row in found])),
                "false positives if not refused": share([row[mode]["if not refused"] for row in found])["rate"],
            }
            for mode in MODES
        }
        for kind, found in by_kind.items()
        if kind.startswith("misuse: ")
    }
    return {"nulls": rates(nulls), "kinds": kinds, "misuse": misuse}


def run(tasks: list[Task], sets: Sequence[int]) -> list[dict[str, Any]]:
    """All rows of all sets, in order."""
    return [{"task": task.name, **row} for task in tasks for number in sets for row in tests_of(make_set(task, number))]


def digest_of(rows: list[dict[str, Any]]) -> str:
    """sha256 of every p-value's bits: the same on every rerun on one machine."""
    found = [float("nan") if row[mode]["p"] is None else row[mode]["p"] for row in rows for mode in MODES]
    found += [row[mode].get("randomised", 2.0) for row in rows for mode in MODES]
    return hashlib.sha256(np.array(found, dtype="<f8").tobytes()).hexdigest()


def show(found: dict[str, Any], console: Console) -> None:
    table = Table("students", "n", *(found["nulls"]), "refused")
    for kind, rates in {"ALL NULLS": found["nulls"], **found["kinds"]}.items():
        cells = [f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" for rate in rates.values()]
        table.add_row(kind, str(rates["soft"]["students"]), *cells, str(rates["soft"]["refused"]))
    console.print(table)
    for kind, rates in found["kinds"].items():
        if kind in NULLS:
            console.print(kind, "uniform by KS, p:", {mode: round(rates[mode]["uniform"]["p"], 3) for mode in MODES})
    for case, modes in found["misuse"].items():
        console.print("misuse:", case, modes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(SEALED), choices=["digits", *SEALED])
    parser.add_argument("--sets", type=int, default=25, help="independent teacher sets of each task")
    parser.add_argument("--first", type=int, default=0, help="number of the first set: others than those seen before")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start, clock = time.process_time(), time.perf_counter()
    tasks = [digits() if name == "digits" else texts(name) for name in asked.task]
    rows = run(tasks, range(asked.first, asked.first + asked.sets))
    console = Console(width=140)
    each = {task.name: summary([row for row in rows if row["task"] == task.name]) for task in tasks}
    pooled = summary(rows)
    show(pooled, console)
    settings = {
        "decoys": DECOYS,
        "alpha": ALPHA,
        "sets_per_task": asked.sets,
        "first_set": asked.first,
        "tasks": asked.task,
        "modes": dict(MODES),
    }
    report = {"what": __doc__.splitlines()[0], "settings": settings, "pooled": pooled, "by_task": each}
    report |= {"p_values_sha256": digest_of(rows), "cpu_seconds": time.process_time() - start}
    report |= {"wall_seconds": time.perf_counter() - clock, "environment": environment()}
    out = asked.out or RESULTS / ("audit_digits.json" if asked.task == ["digits"] else "audit.json")
    write_json(out, report)
    console.print(f"{report['cpu_seconds']:.0f} CPU seconds; p-values {report['p_values_sha256'][:16]}; {out}")


if __name__ == "__main__":
    main()

"""What a student keeps of ADMET-AI: by property, by how many molecules, and by what it learns from.

Needs the recording of examples/admet.yaml (stillroom run examples/admet.yaml), where the five members' answers lie
beside their mean. Nothing here was measured in a laboratory: every number is agreement with the teacher.

    python benchmarks/laboratory.py --run runs/admet

Writes benchmarks/results/laboratory.json and docs/laboratory.svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

import stillroom as sr
from stillroom.digests import key_hash
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.measures.columns import by_column
from stillroom.objectives import MatchColumns
from stillroom.recording import open_recording
from stillroom.students.rdkit import Fingerprints
from stillroom.types import Batch, Signal

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "laboratory.json"
TEACHINGS = ("ensemble", "one member", "thresholded")
HARD = 12.0  # log-odds of a thresholded answer: 0.999994, yes or no


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers by id, a Model: rows of values [N, 41]."""

    rows: dict[str, Tensor]

    def __call__(self, batch: Batch) -> Signal:
        return Signal(values=torch.stack([self.rows[name] for name in batch.ids]))


def all_of(model, table) -> Signal:
    """Its answers to every row, 256 at a time."""
    parts = [model(table.batch(range(at, min(at + 256, len(table))))) for at in range(0, len(table), 256)]
    members = {name: Signal(values=torch.cat([p.parts[name].values for p in parts])) for name in parts[0].parts}
    return Signal(values=torch.cat([part.values for part in parts]), parts=members)


def with_fingerprints(table, adapter: Fingerprints):
    """The same rows as numbers, made once for all students."""
    (x,) = adapter({"smiles": table.column("smiles")})
    return sr.Table({"x": x}, table.ids)


def teachings(said: Signal, probabilities: int) -> dict[str, Tensor]:
    """What students learn from: the mean, one of the five, or the mean's yes and no (numbers as they are)."""
    hard = said.values.clone()
    hard[:, :probabilities] = torch.where(hard[:, :probabilities] > 0, HARD, -HARD)
    return {"ensemble": said.values, "one member": said.parts["0"].values, "thresholded": hard}


def learned(rows, answers: Tensor, settings: dict, seed: int, folder: Path):
    """A student of these answers, with the network, objective and steps of the recipe, for any number of rows."""
    network = {name: settings["student"][name] for name in ("inputs", "centres", "scales", "hidden", "dropout")}
    student = sr.Student.make(settings["student"]["use"], network, seed=seed, answers="values")
    objective = MatchColumns(settings["probabilities"], settings["student"]["scales"], settings["weight"])
    plan = sr.Plan(steps=settings["steps"], batch_size=64, learning_rate=2e-3, seed=seed)
    model = Answers(dict(zip(rows.ids, answers, strict=True)))
    return sr.fit(student, model, rows, objective, plan=plan, folder=folder, progress=False)


def speeds(teacher, student, adapter: Fingerprints, table) -> dict[str, float]:
    """Molecules a second from SMILES to answers on one thread, 256 together, fingerprints included; best of three."""
    whole, found = dataclasses.replace(student, adapter=adapter), {}
    batch = table.batch(range(256))
    for name, model in (("teacher", teacher), ("student", whole.predict)):
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            model(batch)
            taken.append(time.perf_counter() - start)
        found[name] = len(batch) / min(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/admet"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000, 6000, 12540])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, default=Path("runs/laboratory"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples"))
    import admet

    recipe = yaml.safe_load((given.run / "recipe.yaml").read_text())
    adapter = Fingerprints(**{k: v for k, v in recipe["student"]["adapter"].items() if k != "use"})
    settings = {"student": recipe["student"], "steps": given.steps, "probabilities": admet.PROBABILITIES}
    settings["weight"] = recipe["objective"]["weight"]
    teacher, test = admet.teacher(), admet.molecules("test", recipe["data"]["test"]["most"])
    start = time.perf_counter()
    truth = all_of(teacher, test).values
    print(f"{len(test)} molecules asked in {time.perf_counter() - start:.0f} s", flush=True)
    names = recorded(given.run / "recording")
    train = sr.Table({"smiles": names}, names)
    said = all_of(open_recording(given.run / "recording", ROOT), train)
    numbers, probes = with_fingerprints(train, adapter), with_fingerprints(test, adapter)
    taught = teachings(said, admet.PROBABILITIES)
    report: dict = {"seeds": given.seeds, "steps": given.steps, "cells": [], "environment": environment()}
    for size in given.sizes[::-1]:
        rows = numbers.select(range(min(size, len(numbers))))
        for kind in TEACHINGS:
            places = [given.work / f"{kind.replace(' ', '-')}-{len(rows)}-{seed}" for seed in given.seeds]
            asked = zip(given.seeds, places, strict=True)
            students = [learned(rows, taught[kind][: len(rows)], settings, s, p) for s, p in asked]
            answers = torch.stack([all_of(student.predict, probes).values for student in students])
            columns = by_column(answers, truth, admet.PROBABILITIES, replicates=500)
            cell = {"molecules": len(rows), "taught by": kind, **summary(columns, admet.PROBABILITIES)}
            report["cells"].append(cell)
            print(cell, flush=True)
            if kind == "ensemble" and "properties" not in report:
                report["properties"] = [
                    {"property": name, **{k: v.as_json() for k, v in cells.items() if v is not None}}
                    for name, cells in zip(teacher.properties, columns, strict=True)
                ]
                report["molecules a second"] = speeds(teacher, students[0], adapter, test)
                shipped = sr.export(students[0], probes, given.work / "exports", metric=admet.agreement, progress=False)
                report["onnx"] = {k: v for k, v in shipped.verify.items() if k != "versions"}
            write_json(RESULTS, report)
    draw(report["cells"], ROOT / "docs" / "laboratory.svg")


def recorded(folder: Path) -> tuple[str, ...]:
    """The ids of a recording, which are SMILES here, in the order of the recipe: by their own digests."""
    found: list[str] = []
    for path in sorted((folder / "shards").glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            content, ends = shard.get_tensor("ids").tobytes(), shard.get_tensor("id_offsets").tolist()
        found += [content[a:b].decode() for a, b in pairwise(ends)]
    return tuple(sorted(found, key=lambda name: key_hash(name, 0)))


def summary(columns, probabilities: int) -> dict[str, float]:
    """Means over the columns of each kind."""

    def mean(cells, name: str) -> float:
        values = [cell[name].value for cell in cells if cell[name] is not None]
        return sum(values) / len(values)

    first, rest = columns[:probabilities], columns[probabilities:]
    return {
        "explained, probabilities": mean(first, "explained"),
        "explained, numbers": mean(rest, "explained"),
        "same side": mean(first, "same_side"),
        "off by": mean(first, "distance"),
    }


def draw(cells: list[dict], path: Path) -> None:
    """Share of the teacher's variance explained, by molecules, for each teaching."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stillroom"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True)
    for panel, what in zip(panels, ("probabilities", "numbers"), strict=True):
        for kind in TEACHINGS:
            rows = [cell for cell in cells if cell["taught by"] == kind]
            panel.plot([c["molecules"] for c in rows], [c[f"explained, {what}"] for c in rows], marker="o", label=kind)
        panel.set(xscale="log", xlabel="molecules that the teacher answered", title=what)
    panels[0].set_ylabel("teacher's variance explained")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

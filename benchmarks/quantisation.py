"""Distillation in the integers that ship, against rounding after training, at the same budget of steps.

    python benchmarks/quantisation.py [--seeds 0 1 2] [--steps 400]

Each student learns from one recording: three quarters of the steps in float, then either the last quarter in float and
rounded afterwards (same layers, same calibration inputs, same scales by least squared error), or the last quarter
rounded. Two networks: a small convolutional one on Fashion-MNIST (Debian: dataset-fashion-mnist; a wider one of its
kind is the teacher), and a policy of 17 observations of unlike sizes and 6 actions (a random tanh network teaches).
Scored on rows that no student saw, paired over rows and seeds. Writes benchmarks/results/quantisation.json.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Shown
from torch import Tensor, nn

import stillroom as sr
from stillroom.divergences import forward_kl
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.measures.bootstrap import bootstrap, paired_bootstrap
from stillroom.students.architectures import mlp, small_cnn

RESULTS = Path(__file__).parent / "results" / "quantisation.json"
FASHION = Path("/usr/share/datasets/fashion-mnist")
LAST, SLOWER = 0.25, 0.3  # the rounded share of the steps, and its learning rate: the recipe's defaults
TRAIN, TEST = 8000, 3000


def fashion(kind: str, rows: int) -> sr.Table:
    """The first rows of Fashion-MNIST's 'train' or 't10k' side."""
    if not FASHION.is_dir():
        raise SystemExit("Fashion-MNIST is in the Debian package dataset-fashion-mnist.")
    parts = []
    for name, skip in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((FASHION / f"{kind}-{name}-ubyte.gz").read_bytes())
        parts.append(np.frombuffer(content, np.uint8, offset=skip))
    images = torch.tensor(parts[0].reshape(-1, 28, 28)[:rows], dtype=torch.float32) / 255
    ids = tuple(f"{kind}-{row:05d}" for row in range(rows))
    return sr.Table({"x": images}, ids, torch.tensor(parts[1][:rows].astype(np.int64)), tuple("0123456789"))


def observations(rows: int, seed: int) -> sr.Table:
    """17 numbers of unlike sizes (standard deviations from 0.1 to 10), as joints, speeds and distances are."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 17, generator=draw) * torch.logspace(-1, 1, 17)
    return sr.Table({"x": x}, tuple(f"{seed}-{row}" for row in range(rows)))


def images_case(steps: int) -> dict[str, Any]:
    train, test = fashion("train", TRAIN), fashion("t10k", TEST)
    start = sr.Student.make(small_cnn, {"channels": 1, "classes": 10, "width": 20}, classes=train.classes)
    plan = sr.Plan(steps=2 * steps, batch_size=64, learning_rate=2e-3)
    net = sr.fit(start, None, train, sr.HardLabels(), plan=plan).net

    def student(seed: int) -> sr.Student:
        arguments = {"channels": 1, "classes": 10, "width": 4}
        return sr.Student.make(small_cnn, arguments, classes=train.classes, seed=seed)

    return {
        "name": "images",
        "train": train,
        "test": test,
        "teacher": sr.from_network(net, classes=train.classes),
        "student": student,
        "objective": sr.SoftTargets(temperature=2.0),
        "measures": {"KL, nats": kl, "accuracy": accuracy},
    }


def policy_case(steps: int) -> dict[str, Any]:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6), nn.Tanh())
    with torch.no_grad():
        net[0].weight.div_(torch.logspace(-1, 1, 17)).mul_(1.5)
        net[4].weight.mul_(3)
    return {
        "name": "policy",
        "train": observations(TRAIN, 1),
        "test": observations(TEST, 2),
        "teacher": sr.from_network(net, answers="values"),
        "student": lambda seed: sr.Student.make(
            mlp, {"inputs": 17, "outputs": 6, "hidden": [64, 64]}, answers="values", seed=seed
        ),
        "objective": sr.MatchValues(),
        "measures": {"squared error": squared, "largest error of a row": largest},
    }


def kl(said: sr.Signal, truth: sr.Signal, labels: Tensor | None) -> Tensor:
    return forward_kl(said.logits, truth.logits)


def accuracy(said: sr.Signal, truth: sr.Signal, labels: Tensor | None) -> Tensor:
    return (said.logits.values.argmax(-1) == labels).float()


def squared(said: sr.Signal, truth: sr.Signal, labels: Tensor | None) -> Tensor:
    return (said.values - truth.values).square().mean(-1)


def largest(said: sr.Signal, truth: sr.Signal, labels: Tensor | None) -> Tensor:
    return (said.values - truth.values).abs().amax(-1)


def students(case: dict[str, Any], seed: int, steps: int, recording: sr.Recording) -> dict[str, sr.Student]:
    """The float student of the whole budget, and both ways to each precision."""
    last = round(steps * LAST)
    rate = 3e-3

    def go_on(student: sr.Student, steps: int, rate: float) -> sr.Student:
        plan = sr.Plan(steps=steps, batch_size=64, learning_rate=rate, seed=seed)
        return sr.fit(student, recording, case["train"], case["objective"], plan=plan, progress=False)

    start = go_on(case["student"](seed), steps - last, rate)
    whole = go_on(start, last, rate * SLOWER)
    made = {"float": whole}
    for precision in ("int8", "int4"):
        made[f"{precision} after"] = sr.quantised(whole, precision, case["train"])
        made[f"{precision} trained"] = go_on(sr.quantised(start, precision, case["train"]), last, rate * SLOWER)
    return made


@torch.no_grad()
def scores(case: dict[str, Any], student: sr.Student) -> dict[str, Tensor]:
    batch = case["test"].batch(range(len(case["test"])))
    said, truth = student.predict(batch), case["teacher"](batch)
    return {name: measure(said, truth, batch.labels) for name, measure in case["measures"].items()}


def mean(rows: Tensor) -> float:
    return float(rows.mean())


def measured(case: dict[str, Any], seeds: list[int], steps: int, work: Path) -> dict[str, Any]:
    recording = sr.record(case["teacher"], case["train"], work / case["name"])
    found: dict[str, dict[str, list[Tensor]]] = {}
    for seed in seeds:
        for name, student in students(case, seed, steps, recording).items():
            for measure, values in scores(case, student).items():
                found.setdefault(measure, {}).setdefault(name, []).append(values.unsqueeze(-1))
    rows: dict[str, Any] = {}
    for measure, by_way in found.items():
        rows[measure] = {way: bootstrap(torch.stack(v), mean).as_json() for way, v in by_way.items()}
        for precision in ("int8", "int4"):
            pair = [torch.stack(by_way[f"{precision} {way}"]) for way in ("trained", "after")]
            rows[measure][f"{precision} trained - after"] = paired_bootstrap(*pair, mean).as_json()
        if "largest" in measure:
            rows[measure]["largest of all"] = {way: max(float(t.max()) for t in v) for way, v in by_way.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of each student, over both parts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="a folder for recordings; default: a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    import tempfile

    work = given.work or Path(tempfile.mkdtemp())
    rows = {}
    for make in (policy_case, images_case):
        case = make(given.steps)
        rows[case["name"]] = measured(case, given.seeds, given.steps, work)
        show(case["name"], rows[case["name"]])
    write_json(given.results, {"steps": given.steps, "seeds": given.seeds, "rows": rows, "environment": environment()})


def show(title: str, rows: dict[str, Any]) -> None:
    table = Shown("measure", "", "value", title=title)
    for measure, by_way in rows.items():
        for way, said in by_way.items():
            if "value" in said:
                shown = f"{said['value']:.5f} ({said['low']:.5f} to {said['high']:.5f})"
            else:
                shown = ", ".join(f"{name} {value:.3f}" for name, value in said.items())
            table.add_row(measure, way, shown)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()

"""A sealed run with every stage's files in it: real student, recording and export, a report by hand."""

import shutil

import pytest
import torch
import yaml

from stillroom import provenance
from stillroom.data import Table
from stillroom.exporting import export
from stillroom.files import write_bytes, write_json
from stillroom.fitting import fit
from stillroom.objectives import HardLabels, SoftTargets
from stillroom.plan import Plan
from stillroom.recording import TopK, record
from stillroom.students.architectures import mlp
from stillroom.students.networks import Student
from stillroom.teachers.networks import from_network

RECIPE = {
    "name": "tiny",
    "data": {"path": "/home/somebody/data/rows.csv", "address": "https://example.org/a/b"},
    "own": "/home/somebody/code/own.py:objective",
    "file": "file:///home/somebody/x.csv",
    "windows": r"C:\home\somebody\y.csv",
    "relative": "data/rows.csv",
}


def number(value, around=0.0):
    return {"value": value, "low": value - around, "high": value + around}


REPORT = {
    "format": "stillroom-report/1",
    "metric": "accuracy",
    "examples": 48,
    "rows": {
        "teacher": {"accuracy": number(0.5), "agreement": None, "parameters": number(180)},
        "student": {
            "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
            "agreement": number(0.8, 0.1),
            "parameters": number(92),
            "latency": {"value": 3e-5, "low": 2e-5, "high": 4e-5},
        },
        "alone": {"accuracy": number(0.25, 0.125)},
    },
    "comparisons": [
        {"better": "student", "worse": "alone", "metric": "accuracy", "difference": 0.25, "low": 0.1, "high": 0.4,
         "seeds": 2}
    ],
    "metrics": {"accuracy": {"higher_is_better": True, "unit": "", "about": ""}},
    "diagnosis": ["With 48 test examples little can be shown."],
}  # fmt: skip


def made(folder, seed=0):
    """Run the stages in ``folder`` and seal it."""
    torch.manual_seed(seed)
    labels = torch.arange(48) % 4
    x = torch.randn(48, 6) + 2 * torch.nn.functional.one_hot(labels, 6)
    names = tuple(f"row-{row}" for row in range(48))
    examples = Table({"x": x}, ids=names, labels=labels, classes=tuple("abcd"))
    teacher = from_network(
        mlp(6, 4, [8]), name="tiny teacher", licence="Apache-2.0", source="org/tiny-teacher", classes=tuple("abcd")
    )
    recording = record(teacher, examples, folder / "recording", keep=TopK(2), progress=False)

    def student(seed):
        arguments = {"inputs": 6, "outputs": 4, "hidden": [8]}
        return Student.make("stillroom.students.architectures:mlp", arguments, seed=seed, classes=tuple("abcd"))

    plans = [Plan(epochs=1, seed=seed) for seed in (0, 1)]
    first = fit(
        student(0), recording, examples, SoftTargets(), plan=plans[0], folder=folder / "student", progress=False
    )
    place = folder / "seeds/1/student"
    fit(student(1), recording, examples, SoftTargets(), plan=plans[1], folder=place, progress=False)
    fit(student(0), None, examples, HardLabels(), plan=plans[0], folder=folder / "alone", progress=False)
    write_json(folder / "report/report.json", REPORT)
    write_bytes(folder / "report/report.html", b"<html></html>")
    export(first, examples, folder / "exports", progress=False)
    write_bytes(folder / "recipe.yaml", yaml.safe_dump(RECIPE).encode())
    provenance.write(folder)
    return folder


ONCE = []  # one run for all modules that import the fixture


@pytest.fixture(scope="session")
def sealed_run(tmp_path_factory):
    if not ONCE:
        ONCE.append(made(tmp_path_factory.mktemp("runs") / "tiny"))
    return ONCE[0]


def copied(run, tmp_path, without=None):
    """A copy that a test may damage, without one of its entries."""
    place = shutil.copytree(run, tmp_path / "run")
    if without:
        path = place / without
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place

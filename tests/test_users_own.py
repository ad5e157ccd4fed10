"""A user's own data, network and teachers, from files to a student that answers."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_iris

import stillroom as sr
from stillroom.cli import main
from stillroom.data import (
    check_leakage,
    from_csv,
    from_image_folder,
    from_jsonl,
    from_numpy,
    from_parquet,
    keep_split,
    label_budget,
    leakage,
    split,
    unlabelled,
)
from stillroom.errors import DataError, MissingFileError, PairError, UsageError

IRIS = load_iris()
NAMES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
KINDS = [str(name) for name in IRIS.target_names]
MINE = """
import torch, stillroom as sr

def centres(examples):
    "Logits by the distance to each class's mean, on the labelled rows."
    batch = examples.labelled().batch(range(len(examples.labelled())))
    means = torch.stack([batch.inputs["x"][batch.labels == c].mean(0) for c in range(len(examples.classes))])
    def answer(batch):
        return sr.Signal(logits=sr.Dense(-torch.cdist(batch.inputs["x"], means) ** 2))
    return answer

def net(classes, hidden=8):
    return torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, classes))
"""


def write(kind: str, folder: Path) -> dict:
    """The iris flowers as a file of this kind, and the recipe's words for reading it."""
    rows = [
        {"flower": f"f{i:03d}", **dict(zip(NAMES, map(float, x), strict=True)), "kind": KINDS[y]}
        for i, (x, y) in enumerate(zip(IRIS.data, IRIS.target, strict=True))
    ]
    if kind == "csv":
        with open(folder / "iris.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        (folder / "iris.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "iris.parquet")
    else:
        ids = np.array([row["flower"] for row in rows])
        np.savez(folder / "iris.npz", x=IRIS.data, y=IRIS.target, ids=ids)
        return {"use": "numpy", "path": "iris.npz", "id": "ids", "classes": KINDS}
    return {"use": kind, "path": f"iris.{kind}", "columns": NAMES, "label": "kind", "id": "flower"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "numpy"])
def test_from_a_file_to_a_student_that_answers(kind, tmp_path, monkeypatch):
    """One source with a kept split, a teacher and a network in my_file.py, a run, and an answer to a new flower."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    recipe = {
        "name": "iris",
        "seeds": [0],
        "data": {"source": write(kind, tmp_path), "split": {"train": 0.6, "validation": 0.1, "test": 0.3}},
        "teacher": {"use": "mine.py:centres"},
        "terms": {"teacher": {"licence": "own"}},
        "student": {"use": "mine.py:net", "hidden": 6},
        "objective": {"soft_targets": 0.8, "hard_labels": 0.2},
        "fit": {"epochs": 40, "learning_rate": 0.03, "batch_size": 16},
        "evaluate": {"replicates": 20, "metrics": ["accuracy", "agreement"]},
        "export": [{"target": "onnx"}],
    }
    (tmp_path / "iris.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as caught:
        main(["run", "iris.yaml", "--quiet"])
    assert caught.value.code == 0
    report = sr.load("runs/iris/report")
    assert report.rows["student"]["accuracy"]["value"] > 0.85
    kept = json.loads((tmp_path / "runs" / "iris" / "splits.json").read_text())["ids"]
    assert {name: len(ids) for name, ids in kept.items()} == {"train": 90, "validation": 15, "test": 45}
    said = sr.load("runs/iris").predict({"x": torch.tensor([[5.0, 3.4, 1.5, 0.2]])})
    assert KINDS[int(said.logits.values.argmax())] == "setosa"
    with pytest.raises(SystemExit) as caught:
        main(["verify", "runs/iris"])
    assert caught.value.code == 0


def test_a_folder_of_images_teaches(tmp_path):
    """Images are read when a batch needs them; classes are the folders; a recording and a student follow."""
    random = np.random.default_rng(0)
    for kind, shade in (("dark", 60), ("light", 190)):
        (tmp_path / kind).mkdir()
        for number in range(12):
            pixels = np.clip(random.normal(shade, 25, (10, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number:02d}.png")
    table = from_image_folder(tmp_path, size=(8, 8), grey=True)
    assert table.classes == ("dark", "light")
    assert table.batch([0, 23]).inputs["x"].shape == (2, 1, 8, 8)
    assert table.ids[0] == "dark/00.png"

    def brightness(batch):
        bright = batch.inputs["x"].mean((1, 2, 3)) - 0.5
        return sr.Signal(logits=sr.Dense(torch.stack([-20 * bright, 20 * bright], -1)))

    recording = sr.record(brightness, table, tmp_path / "recording", progress=False)
    start = sr.Student.make("stillroom.students.architectures:small_cnn", {"channels": 1, "classes": 2, "size": 8})
    student = sr.fit(
        start, recording, table, sr.SoftTargets(), plan=sr.Plan(steps=40, learning_rate=1e-2), progress=False
    )
    said = student.predict(table.batch(range(24))).logits.values.argmax(-1)
    assert (said == table.labels).float().mean() > 0.9
    (tmp_path / "dark" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="dark/broken.png"):
        from_image_folder(tmp_path).batch([12])


def test_an_ensemble_teaches_end_to_end(tmp_path):
    """The members' mean and each member's own answer are recorded, read back, and learned from."""
    table = sr.Table({"x": torch.rand(40, 2)}, tuple(map(str, range(40))), classes=("a", "b"))

    def linear(sign: float):
        def answer(batch):
            score = sign * (batch.inputs["x"][:, 0] - 0.5) * 4
            return sr.Signal(logits=sr.Dense(torch.stack([score, -score], -1)))

        return answer

    both = sr.ensemble({"one": linear(1.0), "two": linear(0.2)}, weights={"one": 3, "two": 1})
    live = both(table.batch(range(40)))
    one, two = (live.parts[name].logits.values.softmax(-1) for name in ("one", "two"))
    assert torch.allclose(live.logits.values.exp(), 0.75 * one + 0.25 * two, atol=1e-6)
    recording = sr.record(both, table, tmp_path / "recording", progress=False)
    kept = recording(table.batch(range(40)))
    assert torch.equal(kept.logits.values, live.logits.values)
    assert torch.equal(kept.parts["two"].logits.values, live.parts["two"].logits.values)
    assert {part.name for part in recording.identity.parts} == {"linear.<locals>.answer"} or recording.identity.parts
    start = sr.Student.make("stillroom.students.architectures:mlp", {"inputs": 2, "outputs": 2}, classes=("a", "b"))
    student = sr.fit(
        start, recording, table, sr.SoftTargets(), plan=sr.Plan(steps=60, learning_rate=1e-2), progress=False
    )
    said = student.predict(table.batch(range(40))).logits.values.argmax(-1)
    assert (said == live.logits.values.argmax(-1)).float().mean() > 0.9


def test_the_mean_of_an_ensemble_by_hand():
    """Probabilities (.9,.1) and (.5,.5): their mean is (.7,.3); the mean of their logits is (ln 9 / 2, 0)."""

    def fixed(p):
        return lambda batch: sr.Signal(logits=sr.Dense(torch.tensor([[p, 1 - p]]).log()))

    batch = sr.Batch(("a",), {"x": torch.zeros(1, 1)})
    mixed = sr.ensemble({"a": fixed(0.9), "b": fixed(0.5)})(batch).logits.values
    assert torch.allclose(mixed.exp(), torch.tensor([[0.7, 0.3]]))
    geometric = sr.ensemble({"a": fixed(0.9), "b": fixed(0.5)}, mean="logits")(batch).logits.values
    assert torch.allclose(geometric[0, 0] - geometric[0, 1], torch.tensor(np.log(9) / 2, dtype=torch.float32))


def test_an_ensemble_refuses_what_does_not_fit():
    def teacher(classes):
        net = torch.nn.Linear(1, 2)
        return sr.from_network(net, classes=classes)

    with pytest.raises(PairError, match="differently"):
        sr.ensemble({"a": teacher(("x", "y")), "b": teacher(("y", "x"))})
    with pytest.raises(UsageError, match="weights name"):
        sr.ensemble({"a": teacher(None), "b": teacher(None)}, weights={"a": 1.0})
    with pytest.raises(UsageError, match="two members"):
        sr.ensemble(teacher(None))


def flowers(count: int = 60) -> sr.Table:
    labels = torch.arange(count) % 3
    return sr.Table({"x": torch.randn(count, 2)}, tuple(f"r{i}" for i in range(count)), labels, ("a", "b", "c"))


def test_a_split_depends_on_the_ids_and_keeps_the_classes(tmp_path):
    table = flowers()
    shares = {"train": 0.5, "validation": 0.2, "test": 0.3}
    parts = split(table, shares, seed=3)
    assert sorted(i for part in parts.values() for i in part.ids) == sorted(table.ids)
    assert torch.bincount(parts["test"].labels).tolist() == [6, 6, 6]
    turned = table.select(list(reversed(range(60))))
    assert {n: set(p.ids) for n, p in split(turned, shares, seed=3).items()} == {
        n: set(p.ids) for n, p in parts.items()
    }
    with pytest.raises(UsageError, match="sum to 1"):
        split(table, {"train": 0.5})
    keep_split(tmp_path / "s.json", table, shares)
    grown = flowers(66)
    again = keep_split(tmp_path / "s.json", grown, shares)
    assert set(again["test"].ids) == set(split(table, shares)["test"].ids)
    with pytest.raises(DataError, match="are gone, such as"):
        keep_split(tmp_path / "s.json", table.select(range(50)), shares)


def test_a_label_budget_hides_the_other_labels():
    table = flowers()
    budget = label_budget(table, 7, seed=1)
    assert len(budget.labelled()) == 7
    assert len(unlabelled(budget)) == 53
    assert set(budget.labelled().labels.tolist()) == {0, 1, 2}
    assert label_budget(table, 7, seed=1).ids == budget.ids
    with pytest.raises(DataError, match="only 60 rows"):
        label_budget(table, 61)


def test_rows_on_both_sides_are_found():
    """Text counts as equal without regard to case and spacing; such rows leave the training side."""
    train = sr.Table({"text": ("Wheat  rose", "oil fell", "gold")}, ("a", "b", "c"))
    test = sr.Table({"text": ("wheat rose", "copper")}, ("d", "e"))
    assert leakage(test, train) == [("d", "a")]
    clean, found = check_leakage({"train": train, "test": test})
    assert clean["train"].ids == ("b", "c")
    assert found == {"train": [("d", "a")]}
    assert check_leakage({"train": train, "test": test}, "allow")[0]["train"].ids == ("a", "b", "c")
    with pytest.raises(DataError, match="'a' = 'd'"):
        check_leakage({"train": train, "test": test}, "refuse")


@pytest.mark.parametrize(
    ("content", "arguments", "error", "message"),
    [
        ("a,b\n1,2\n3\n", {"columns": ["a"]}, DataError, "line 3: 1 fields, but the header has 2"),
        ("a,b\n1,x\n", {"columns": ["b"]}, DataError, "'b' of 'row-000000' is 'x', not a number"),
        ("a,b\n1,2\n", {"columns": ["c"]}, UsageError, "there is no column 'c'"),
        ("a,b\n", {"columns": ["a"]}, DataError, "no rows"),
        ("", {"columns": ["a"]}, DataError, "is empty"),
        ("a,b\n1,2\n", {}, UsageError, "name the inputs"),
        ("a,b\n1,x\n1,y\n", {"columns": ["a"], "label": "b", "classes": ["x"]}, DataError, "none of the classes"),
        ("a,b\n1,x\n1,x\n", {"columns": ["a"], "id": "b"}, DataError, "'x'"),
    ],
)
def test_a_bad_table_is_one_clear_line(content, arguments, error, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(error, match=message) as caught:
        from_csv(tmp_path / "t.csv", **arguments)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path):
    for reader in (from_csv, from_jsonl, from_parquet):
        with pytest.raises(MissingFileError, match="absent"):
            reader(tmp_path / "absent", columns=["a"])
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="Parquet"):
        from_parquet(tmp_path / "x.parquet", columns=["a"])
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        from_jsonl(tmp_path / "x.jsonl", columns=["a"])
    np.savez(tmp_path / "x.npz", x=np.array([{"code": 1}], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        from_numpy(tmp_path / "x.npz")


def test_float_labels_and_missing_labels(tmp_path):
    (tmp_path / "t.csv").write_text("a,y,k\n1,0.5,u\n2,,\n3,2.0,v\n")
    table = from_csv(tmp_path / "t.csv", columns=["a"], label="y")
    assert table.labels.dtype == torch.float32
    assert table.labels.isnan().flatten().tolist() == [False, True, False]
    kinds = from_csv(tmp_path / "t.csv", columns=["a"], label="k")
    assert kinds.labels.tolist() == [0, -100, 1]

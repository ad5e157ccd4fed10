"""What a whole run refuses, or puts right, between its parts: sides, weights, seeds, folders and names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import stillroom as sr
from stillroom.cli import main
from stillroom.errors import FolderError, PairError, UsageError
from stillroom.recipes.parts import plan_of
from stillroom.recipes.yaml_file import check_recipe
from stillroom.run import open_run

MINE = """
import torch, stillroom as sr
def teacher(examples):
    def answer(batch):
        return sr.Signal(logits=sr.Dense(-8 * (batch.inputs["x"] - torch.tensor([[0.0, 1.0, 2.0]])) ** 2))
    return answer
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A recipe in a folder of its own, its data beside it; the test side lacks the class b."""
    place = tmp_path / "recipes"
    place.mkdir()
    rows = [(f"{'abc'[i % 3]}", i % 3 + 0.1 * (i % 5 - 2)) for i in range(90)]
    (place / "train.csv").write_text("kind,x\n" + "".join(f"{k},{x}\n" for k, x in rows))
    (place / "test.csv").write_text("kind,x\n" + "".join(f"{k},{x + 0.01}\n" for k, x in rows if k != "b"))
    (place / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return place


def recipe(here: Path, **changes) -> str:
    columns = {"columns": ["x"], "label": "kind"}
    content = {
        "name": "sides",
        "seeds": [0],
        "data": {"train": {"use": "csv", "path": "train.csv", **columns},
                 "test": {"use": "csv", "path": "test.csv", **columns}},
        "teacher": {"use": "mine.py:teacher"},
        "terms": {"teacher": {"licence": "own"}},
        "student": {"use": "mlp", "inputs": 1, "hidden": [16]},
        "fit": {"epochs": 60, "batch_size": 16, "learning_rate": "2e-2"},
        "evaluate": {"replicates": 20, "metrics": ["accuracy", "agreement"]},
    }  # fmt: skip
    (here / "r.yaml").write_text(yaml.safe_dump(content | changes))
    return "recipes/r.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_a_side_that_lacks_a_class_keeps_the_order_of_the_other(here):
    """Two files numbered alone would give c the number 1 in one and 2 in the other, and half the labels would be wrong.

    The data is found beside the recipe, and a learning rate that YAML reads as text is the number that was meant.
    """
    assert run("run", recipe(here), "--quiet") == 0
    rows = sr.load("runs/sides/report").rows
    assert rows["teacher"]["accuracy"]["value"] == 1.0
    assert rows["student"]["accuracy"]["value"] > 0.9


def test_other_class_orders_are_refused_when_measuring():
    table = sr.Table({"x": torch.rand(6, 2)}, tuple("abcdef"), torch.arange(6) % 2, ("low", "high"))
    student = sr.Student.make(
        "stillroom.students.architectures:mlp", {"inputs": 2, "outputs": 2}, classes=("high", "low")
    )
    with pytest.raises(PairError, match="order high, low; of the data: low, high"):
        sr.evaluate({"student": student}, lambda batch: student(batch), table, progress=False)


def test_weights_that_were_changed_are_not_loaded(here):
    """A student whose file was edited, or cut, is found out by every stage that opens it."""
    assert run("fit", recipe(here), "--quiet") == 2  # nothing recorded yet
    assert run("record", recipe(here), "--quiet") == 0
    assert run("fit", recipe(here), "--quiet") == 0
    path = here.parent / "runs" / "sides" / "student" / "model.safetensors"
    kept = path.read_bytes()
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(FolderError, match="other weights than"):
        sr.load("runs/sides")
    path.write_bytes(kept[:-20])
    with pytest.raises(FolderError, match="cut or damaged"):
        sr.load("runs/sides")


def test_doctor_leaves_another_runs_folder_alone(here):
    assert run("run", recipe(here), "--quiet") == 0
    source = {"source": {"use": "csv", "path": "train.csv", "columns": ["x"], "label": "kind"}}
    assert run("doctor", recipe(here, data=source)) in (0, 1)
    assert run("verify", "runs/sides") == 0


def test_a_mistake_does_not_cost_the_folder(here):
    (here / "train.csv").rename(here / "moved.csv")
    assert run("run", recipe(here), "--quiet") == 2
    assert not (here.parent / "runs").exists()


def test_a_seed_that_stands_twice_is_not_a_replicate(here):
    with pytest.raises(UsageError, match="stands twice"):
        open_run(recipe(here, seeds=[1, 1]))
    with pytest.raises(UsageError, match="seeds"):
        open_run(recipe(here, seeds=[0, -1]))


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation"])
def test_whole_numbers_are_whole(name):
    with pytest.raises(UsageError, match="whole number"):
        sr.Plan(**{name: 2.5})
    with pytest.raises(UsageError, match="is a number, not 'fast'"):
        sr.Plan(learning_rate="fast")  # type: ignore[arg-type]


def test_settings_that_can_only_fail_are_refused_first(here):
    """Before the teacher is built: precision, headline, tracker, recorded views without an augmentation."""
    bad = [
        ({"export": [{"target": "onnx", "precision": "int5"}]}, "no precision 'int5'"),
        ({"evaluate": {"metric": "nll", "metrics": ["accuracy"]}}, "not among the metrics"),
        ({"trackers": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"record": {"views": 4}}, "needs data.views"),
        ({"objective": [{"weight": 1.0}]}, "a list of objectives"),
        ({"objective": [{"use": "soft_targets", "divergence": 3}]}, "divergence is a name"),
        ({"data": {"train": {"use": "csv", "path": "a"}, "test": {"use": "csv", "path": "b"},
                   "views": {"use": "chain"}}, "record": {"views": 2}}, "needs of:"),
    ]  # fmt: skip
    for changes, message in bad:
        with pytest.raises(UsageError, match=message):
            open_run(recipe(here, **changes))
    assert plan_of(
        check_recipe(
            yaml.safe_load((here / "r.yaml").read_text()) | {"data": {"source": {"use": "csv"}}, "record": {}}
        ),
        0,
    )


def test_a_wrong_width_is_a_failed_check_not_a_traceback(here, capsys):
    assert run("doctor", recipe(here, student={"use": "mlp", "inputs": 3, "hidden": [4]})) == 1
    assert "FAIL" in capsys.readouterr().out


def test_what_was_not_foreseen_is_one_line_too(here, capsys):
    assert run("run", recipe(here, student={"use": "mlp", "inputs": 1, "hidden": 16}), "--quiet") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "STILLROOM_TRACEBACK=1" in said


def test_features_are_asked_of_the_teacher_when_they_are_learned(here):
    """match_features in a recipe: the recording holds what the objective needs."""
    (here / "mine.py").write_text(
        "import stillroom as sr\nfrom torch import nn\n"
        "def teacher(examples):\n"
        "    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))\n"
        "    return sr.from_network(net, classes=examples.classes)\n"
    )
    objective = [{"use": "soft_targets"}, {"use": "match_features", "pairs": {"hidden1": "0"}, "weight": 0.1}]
    name = recipe(here, objective=objective, fit={"epochs": 2})
    assert run("record", name, "--quiet") == 0
    assert run("fit", name, "--quiet") == 0


def test_a_tracker_leaves_no_machines_name(here):
    import socket

    assert run("run", recipe(here, trackers=["tensorboard"], fit={"epochs": 2}), "--quiet") == 0
    folder = here.parent / "runs" / "sides"
    assert list((folder / "student" / "trackers").rglob("events.out.tfevents.*"))
    assert socket.gethostname() not in (folder / "manifest.json").read_text()
    assert "tfevents" not in json.dumps(json.loads((folder / "passport.json").read_text())["student"])
    shutil.rmtree(folder)

"""Published answers as a teacher: mapped, checked row by row, joined to our ids, with the licence of their card."""

import json
import math

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import stillroom as sr
from stillroom.cli import main
from stillroom.errors import DataError, MissingFileError, PairError, UsageError
from stillroom.teachers.published import published

CLASSES = ("grain", "gold", "oil")
EXAMPLES = sr.Table({"text": ("a b", "c", "d")}, ids=("1", "2", "3"), classes=CLASSES)
ALL = EXAMPLES.batch([0, 1, 2])


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NUMBERS = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.1, 0.2, 0.7]]
LOGS = [[math.log(p) if p else -200.0 for p in row] for row in NUMBERS]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "mapping"),
    [
        ([{"p": row} for row in NUMBERS], {"probabilities": "p", "classes": CLASSES}),
        ([{"p": dict(zip(CLASSES[::-1], row[::-1]))} for row in NUMBERS], {"probabilities": "p"}),
        ([dict(zip("xyz", row)) for row in NUMBERS], {"probabilities": ["x", "y", "z"]}),
        ([{"p": row[::-1]} for row in NUMBERS], {"probabilities": "p", "classes": CLASSES[::-1]}),
        (
            [{"p": dict(zip(("G", "gold", "oil"), row))} for row in NUMBERS],
            {"probabilities": "p", "rename": {"G": "grain"}},
        ),
        ([{"p": row} for row in LOGS], {"log_probs": "p"}),
    ],
)
def test_probabilities_in_any_form_and_order_are_ours(tmp_path, suffix, rows, mapping):
    """A list, an object by class, a column each, another order, other names, logs: one teacher."""
    write(tmp_path / f"a{suffix}", [{"n": i + 1, **row} for i, row in enumerate(rows)])
    teacher = published(f"a{suffix}", id="n", examples=EXAMPLES, folder=tmp_path, **mapping)
    sr.testing.check_model(teacher, ALL)
    torch.testing.assert_close(teacher(ALL).logits.values.softmax(-1), torch.tensor(NUMBERS))
    assert teacher.identity.classes == CLASSES
    # rows are joined by id, not by their order in the file
    torch.testing.assert_close(teacher(EXAMPLES.batch([2])).logits.values.softmax(-1), torch.tensor(NUMBERS[2:]))


def test_labels_values_logits_and_texts(tmp_path):
    """A label is probability 1, with the cross-entropy's gradient; values, logits and texts are as they stand."""
    rows = [{"id": str(i + 1), "l": CLASSES[i], "v": [i, 2.0], "t": f"said {i}"} for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    labels = published(path, id="id", label="l", examples=EXAMPLES)
    assert labels(ALL).logits.values.softmax(-1).tolist() == torch.eye(3).tolist()
    student = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    loss = sr.SoftTargets(temperature=1.0)(sr.Signal(logits=sr.Dense(student)), labels(ALL), ALL)["soft_targets"]
    expected = torch.nn.functional.cross_entropy(student, torch.arange(3), reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - torch.eye(3), rtol=1e-6, atol=1e-6)
    assert published(path, id="id", values="v")(ALL).values.tolist() == [[0, 2], [1, 2], [2, 2]]
    logits = published(path, id="id", logits="v", classes=["a", "b"])
    assert logits(ALL).logits.values.tolist() == [[0, 2], [1, 2], [2, 2]]
    assert published(path, id="id", text="t")(ALL).text == ("said 0", "said 1", "said 2")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "x", "p": [0.5, 0.5]}, "2 numbers for 3 classes"),
        ({"id": "x", "p": [0.5, 0.5, 0.5]}, "does not sum to 1"),
        ({"id": "x", "p": [0.5, 0.502, 0.0]}, "does not sum to 1"),
        ({"id": "x", "p": [1.5, -0.5, 0.0]}, "a probability outside 0 to 1"),
        ({"id": "x", "p": [math.nan, 0.5, 0.5]}, "not finite"),
        ({"id": "x", "p": ["high", 0.5, 0.5]}, "not numbers"),
        ({"id": "x", "p": {"grain": 0.5, "gold": 0.5, "lead": 0.0}}, "unknown class"),
        ({"id": "x", "p": {"grain": 0.5, "gold": 0.5}}, "2 numbers for 3 classes"),
        ({"id": "x"}, "no 'p'"),
        ({"p": [1, 0, 0]}, "no 'id'"),
        ({"id": "x", "p": None}, "no 'p'"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path, row, reason):
    good = [{"id": str(n), "p": [0.3335, 0.3335, 0.3335]} for n in (1, 2, 3)]  # rounded: within 0.001
    write(tmp_path / "a.jsonl", [*good, row])
    made = published("a.jsonl", id="id", probabilities="p", examples=EXAMPLES, folder=tmp_path, workspace=tmp_path)
    assert made.told() == f"3 of 4 published rows can be used; set aside: 1 {reason}"
    (aside,) = json.loads((tmp_path / "set-aside.json").read_text())["set_aside"]
    assert aside == {"place": "a.jsonl, line 4", "key": ["x"] if row.get("id") else [], "reason": reason}
    torch.testing.assert_close(made(ALL).logits.values.softmax(-1), torch.full((3, 3), 1 / 3))


def test_what_is_no_row_does_not_end_the_reading(tmp_path):
    """Broken JSON and lists are set aside; an unknown label and an empty text too."""
    rows = '{"id": "1", "l": "oil", "t": "x"}\n{"id": "2", \n[1]\n{"id": "3", "l": "tin", "t": " "}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    labels = published(tmp_path / "a.jsonl", id="id", label="l", examples=EXAMPLES)
    reasons = [reason for _, _, reason in labels.aside]
    assert [r.partition(" (")[0] for r in reasons] == [
        "not JSON",
        "list, not an object with named values",
        "unknown class",
    ]
    texts = published(tmp_path / "a.jsonl", id="id", text="t")
    assert [reason for _, _, reason in texts.aside][-1] == "no text"


def test_an_id_with_two_answers_has_none(tmp_path):
    """The same answer twice is one; two different ones are both set aside, and the example has no answer."""
    same, other = {"id": "1", "v": [1.0]}, {"id": "2", "v": [1.0]}
    write(tmp_path / "a.jsonl", [same, same, other, {"id": "2", "v": [1.5]}, {"id": "3", "v": [0.0]}])
    teacher = published(tmp_path / "a.jsonl", id="id", values="v")
    assert [place for place, _, _ in teacher.aside] == ["a.jsonl, line 4", "a.jsonl, line 3"]
    with pytest.raises(DataError, match=r"1 of 3 examples have no published answer: '2' \(a.jsonl, line 3: an id that"):
        teacher(ALL)


def test_missing_answers_are_an_error_or_left_out_and_counted(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "1", "v": [1.0]}, {"id": "3", "v": [2.0]}, {"id": "9", "v": [2.0]}])
    strict = published(tmp_path / "a.jsonl", id="id", values="v")
    with pytest.raises(DataError, match=r"1 of 3 pool have no published answer: '2' \(not in the file\).*leave_out"):
        strict.covering(EXAMPLES, "pool")
    loose = published(tmp_path / "a.jsonl", id="id", values="v", missing="leave_out", workspace=tmp_path)
    kept = loose.covering(EXAMPLES, "pool")
    assert kept.ids == ("1", "3")
    assert json.loads((tmp_path / "left-out-pool.json").read_text()) == {"rows": 3, "left_out": ["2"]}
    assert loose(kept.batch([0, 1])).values.tolist() == [[1.0], [2.0]]
    foreign = sr.Table({"text": ("a",)}, ids=("z",))
    with pytest.raises(DataError, match="None of them has one: check that ids or match lead to the same names"):
        loose.covering(foreign)


def test_prompts_are_joined_by_their_text(tmp_path):
    """Without ids of ours: where their prompt is our text. A view is not what was answered, and is refused."""
    write(tmp_path / "a.jsonl", [{"q": "d", "t": "D"}, {"q": "a b", "t": "AB"}, {"q": "c", "t": "C"}])
    teacher = published(tmp_path / "a.jsonl", match={"q": "text"}, text="t")
    assert teacher(ALL).text == ("AB", "C", "D")
    with pytest.raises(UsageError, match="leave out views"):
        teacher(EXAMPLES.batch([0], [7]))
    with pytest.raises(UsageError, match=r"a column of texts, not 'prompt'; there are \['text'\]"):
        published(tmp_path / "a.jsonl", match={"q": "prompt"}, text="t")(ALL)


@pytest.mark.parametrize(
    ("mapping", "error", "said"),
    [
        ({"id": "id"}, UsageError, "one of label, probabilities, log_probs, logits, values, text .none is"),
        ({"id": "id", "text": "t", "values": "v"}, UsageError, "values, text are given"),
        ({"text": "t"}, UsageError, "give id: COLUMN"),
        ({"id": "id", "label": "l", "classes": None}, UsageError, "labels need classes"),
        ({"id": "id", "text": "t", "missing": "skip"}, UsageError, "choose error or leave_out"),
        ({"id": "id", "probabilities": "p", "classes": ["a", "b"], "examples": EXAMPLES}, PairError, "data's classes"),
        ({"id": "id", "text": "nowhere"}, DataError, "no row can be used. 0 of 1 published rows.*no 'nowhere'"),
        ({"id": "id", "text": "t", "split": "train"}, UsageError, "split 'train' is for a hub"),
    ],
)
def test_a_mapping_that_leads_nowhere_is_refused(tmp_path, mapping, error, said):
    path = write(tmp_path / "a.jsonl", [{"id": "1", "t": "x", "v": [1]}])
    with pytest.raises(error, match=said):
        published(path, **mapping)


def test_places_that_hold_nothing(tmp_path):
    with pytest.raises(MissingFileError, match=r"none.jsonl does not exist"):
        published("none.jsonl", id="id", text="t", folder=tmp_path)
    with pytest.raises(MissingFileError, match="holds no .jsonl and no .parquet"):
        published(tmp_path, id="id", text="t")
    (tmp_path / "a.csv").write_text("id,t\n")
    with pytest.raises(UsageError, match="neither .jsonl nor .parquet"):
        published(tmp_path / "a.csv", id="id", text="t")


CARD = "---\nlicense: mit\nlanguage: [en]\n---\n# Answers\nOf a model about flowers.\n"


def test_a_folder_is_read_whole_and_a_hub_s_data_set_the_same(tmp_path):
    """Several files of both kinds are one data set; hf: goes through datasets, which reads local folders too."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(CARD)
    write(tmp_path / "set" / "data" / "train-0.parquet", [{"id": "1", "v": [1.0]}, {"id": "2", "v": [2.0]}])
    write(tmp_path / "set" / "data" / "train-1.parquet", [{"id": "3", "v": [3.0]}])
    local = published("set", id="id", values="v", folder=tmp_path)
    hub = published(f"hf:{tmp_path / 'set'}", id="id", values="v")
    for teacher in (local, hub):
        assert teacher(ALL).values.tolist() == [[1.0], [2.0], [3.0]]
        assert (teacher.identity.licence, teacher.identity.route) == ("mit", "published-outputs")
    write(tmp_path / "set" / "data" / "train-1.parquet", [{"id": "3", "v": [3.5]}])
    assert published("set", id="id", values="v", folder=tmp_path).identity.digest != local.identity.digest
    with pytest.raises(MissingFileError, match="split 'validation', could not be had"):
        published(f"hf:{tmp_path / 'set'}", id="id", values="v", split="validation")


def recipe(folder, **teacher):
    iris = load_iris()
    names = [str(name) for name in iris.target_names]
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).tolist()
    for part, rows in (("train", order[:100]), ("test", order[100:])):
        write(
            folder / f"{part}.jsonl",
            [{"flower": f"f{n}", "x": iris.data[n].tolist(), "kind": names[iris.target[n]]} for n in rows],
        )
    model = LogisticRegression(max_iter=500).fit(iris.data[order[:100]], iris.target[order[:100]])
    said = model.predict_proba(iris.data)
    (folder / "answers").mkdir()
    (folder / "answers" / "README.md").write_text(CARD)
    write(folder / "answers" / "a.jsonl", [{"f": f"f{n}", "p": dict(zip(names, said[n]))} for n in order[5:]])
    data = {"columns": ["x"], "label": "kind", "id": "flower"}
    content = {
        "name": "flowers",
        "seeds": [0],
        "threads": 1,
        "data": {part: {"use": "jsonl", "path": f"{part}.jsonl", **data} for part in ("train", "test")},
        "teacher": {"use": "published", "path": "answers", "id": "f", "probabilities": "p", **teacher},
        "terms": {"data": {"licence": "CC-BY-4.0"}, "evasion": "none", "reasoning_traces": "not-used"},
        "student": {"use": "mlp", "inputs": 4, "hidden": [8]},
        "objective": {"use": "soft_targets", "temperature": 1.0},
        "fit": {"epochs": 40, "batch_size": 16, "learning_rate": 0.01},
        "evaluate": {"replicates": 50},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def test_a_recipe_learns_from_published_answers(tmp_path, monkeypatch, capsys):
    """From a folder with a card to a student: rows without an answer counted, the licence in gate and passport."""
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, missing="leave_out")
    _run(["run", "recipe.yaml", "--quiet"], 0)
    said = capsys.readouterr().out
    assert "145 of 145 published rows can be used; 5 rows of pool left out" in said
    run = tmp_path / "runs" / "flowers"
    passport = json.loads((run / "passport.json").read_text())
    (teacher,) = passport["teachers"]
    assert (teacher["licence"], teacher["route"]) == ("mit", "published-outputs")
    assert any(path.read_text() == CARD for path in (run / "terms").glob("*.txt"))
    assert json.loads((run / "recording" / "manifest.json").read_text())["data"]["rows"] == 94
    rows = json.loads((run / "report" / "report.json").read_text())["rows"]
    assert rows["student"]["agreement"]["value"] > 0.9
    _run(["verify", "runs/flowers"], 0)


def test_the_gate_looks_at_who_wrote_the_answers(tmp_path, monkeypatch, capsys):
    """Answers without a licence stop the run, and so do the terms of the model that wrote them."""
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, missing="leave_out", by="gpt-4o")
    _run(["run", "recipe.yaml", "--quiet"], 5)
    assert "writer of the answers gpt-4o" in capsys.readouterr().err
    (tmp_path / "answers" / "README.md").unlink()
    _run(["gate", "recipe.yaml", "--set", "teacher.by=null"], 5)
    assert "Its terms are unknown" in capsys.readouterr().out


def test_a_missing_answer_ends_a_strict_run_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)
    _run(["run", "recipe.yaml", "--quiet"], 2)
    assert "5 of 99 pool have no published answer" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "flowers" / "student").exists()


def _run(arguments, code):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code

"""The cascade: unsure questions reach the teacher, once; its answers are kept first, then given, and teach."""

import dataclasses
import json

import httpx
import pytest
import torch
import yaml
from sklearn.datasets import load_iris

import stillroom as sr
from served import running
from stillroom.cli import main
from stillroom.data import from_jsonl
from stillroom.errors import FolderError, UsageError
from stillroom.serving.app import Serving, build_app
from stillroom.serving.cascade import Cascade
from stillroom.serving.journal import Journal, name_of
from stillroom.serving.questions import raw_columns
from stillroom.serving.routes import TeacherError
from stillroom.teachers.published import published

CLASSES = ("low", "high")
ALL = sr.Table(
    {"x": torch.rand(300, 2, generator=torch.Generator().manual_seed(3)) * 4 - 2}, tuple(map(str, range(300)))
)


class Teacher:
    """Right everywhere: which side of a circle. Counts what it was asked."""

    identity = sr.Identity("circle", classes=CLASSES)

    def __init__(self):
        self.asked, self.broken = [], False

    def __call__(self, batch):
        if self.broken:
            raise ConnectionError("no route to the teacher")
        self.asked += batch.inputs["x"].tolist()
        side = 6 * (batch.inputs["x"].square().sum(-1) - 1.5)
        return sr.Signal(logits=sr.Dense(torch.stack([-side, side], -1)))


def student(rows, said, seed=0, steps=300):
    start = sr.Student.make(
        "stillroom.students.architectures:mlp", {"inputs": 2, "outputs": 2, "hidden": [16]}, classes=CLASSES, seed=seed
    )
    plan = sr.Plan(steps=steps, learning_rate=1e-2, batch_size=64)
    return sr.fit(start, said, rows, sr.SoftTargets(temperature=1.0), plan=plan, progress=False)


@pytest.fixture(scope="module")
def first():
    """A student that saw forty points: unsure along most of the circle."""
    return student(dataclasses.replace(ALL.select(range(40)), classes=CLASSES), Teacher(), steps=80)


def cascade(first, teacher, path, threshold=0.9):
    columns = raw_columns(first.adapter, ALL.batch([0]))
    second = Cascade(teacher, threshold, Journal(path, ["x"]), columns, CLASSES)
    return Serving("circle", first.predict, columns, CLASSES, second=second)


def test_the_loop_from_unsure_questions_to_a_better_student(first, tmp_path):
    """What was unsure is journalled and trains the next student: it is unsure less often, and right more often."""
    teacher, path = Teacher(), tmp_path / "journal.jsonl"
    with running(build_app(cascade(first, teacher, path))) as server, httpx.Client(timeout=60) as client:
        said = [
            client.post(f"{server.address}/predict", json={"inputs": {"x": x}}).json()
            for x in ALL.columns["x"].tolist()
        ]
        metrics = client.get(f"{server.address}/metrics").text
    kept = [one for one in said if one["by"] == "student"]
    assert all(one["confidence"] >= 0.9 for one in kept)
    assert 20 < len(kept) < 280
    assert f'stillroom_answers_total{{by="teacher"}} {300 - len(kept):.1f}' in metrics
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(teacher.asked) == 300 - len(kept)
    shown = {name_of({"x": row}): one for row, one in zip(ALL.columns["x"].tolist(), said, strict=True)}
    assert all(line["probabilities"] == shown[line["id"]]["probabilities"] for line in lines)

    rows = from_jsonl(path, columns=["x"], id="id", classes=CLASSES)
    said_before = published(path, id="id", probabilities="probabilities", examples=rows)
    recording = sr.record(said_before, rows, tmp_path / "recording", progress=False)
    after = student(rows, recording)
    fresh = torch.rand(2000, 2, generator=torch.Generator().manual_seed(4)) * 4 - 2
    truth = Teacher()(sr.Batch(tuple(map(str, range(2000))), {"x": fresh})).logits.values.argmax(-1)
    old, new = (one.predict({"x": fresh}).logits.values.softmax(-1) for one in (first, after))
    assert (new.argmax(-1) == truth).float().mean() > (old.argmax(-1) == truth).float().mean() + 0.02
    assert (new.amax(-1) < 0.9).float().mean() < (old.amax(-1) < 0.9).float().mean()


def test_a_question_is_put_to_the_teacher_once_also_after_a_restart(first, tmp_path):
    teacher, path = Teacher(), tmp_path / "journal.jsonl"
    serving = cascade(first, teacher, path, threshold=2.0)
    rows = [{"x": [1.0, 1.0]}, {"x": [0.0, 0.5]}, {"x": [1.0, 1.0]}]
    before = serving.second.answers(rows)
    assert len(teacher.asked) == 2  # twice within one batch is once
    assert serving.second.answers(rows[:1]) == before[:1]
    again = cascade(first, teacher, path, threshold=2.0)
    assert again.second.answers(rows) == before
    assert len(teacher.asked) == 2
    assert all(one.by == "teacher" for one in before)


def test_a_line_that_a_crash_cut_is_removed_and_its_question_asked_again(first, tmp_path):
    """Cut at every byte of the last line: what was whole stays, the rest goes, and the file can be read again."""
    teacher, path = Teacher(), tmp_path / "journal.jsonl"
    rows = [{"x": [1.0, 1.0]}, {"x": [0.25, 0.5]}]
    cascade(first, teacher, path, threshold=2.0).second.answers(rows)
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path, ["x"])
        assert len(journal) == 1
        assert path.read_bytes() == whole[:begin]
    cascade(first, teacher, path, threshold=2.0).second.answers(rows)
    assert path.read_bytes() == whole


def test_a_teacher_that_cannot_be_asked_is_503_and_no_answer_is_invented(first, tmp_path):
    teacher = Teacher()
    teacher.broken = True
    serving = cascade(first, teacher, tmp_path / "journal.jsonl", threshold=2.0)
    with running(build_app(serving)) as server:
        ask = {"json": {"inputs": {"x": [1.0, 1.0]}}, "timeout": 60}
        said = httpx.post(f"{server.address}/predict", **ask)
        assert (said.status_code, said.headers["retry-after"]) == (503, "1")
        assert "the teacher could not be asked (ConnectionError)" in said.json()["error"]
        assert "no route" not in said.text
        teacher.broken = False
        assert httpx.post(f"{server.address}/predict", **ask).json()["by"] == "teacher"
    teacher.broken = True
    second = cascade(first, teacher, tmp_path / "other.jsonl", 2.0).second
    with pytest.raises(TeacherError):
        second.answers([{"x": [0.0, 0.0]}])
    assert not (tmp_path / "other.jsonl").exists()


def test_what_is_no_journal_is_not_written_to(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"my": "notes"}\n')
    with pytest.raises(FolderError, match="is no journalled answer"):
        Journal(tmp_path / "notes.jsonl", ["x"])
    with pytest.raises(UsageError, match="'teacher' has a name that the journal needs"):
        Journal(tmp_path / "j.jsonl", ["teacher"])


MINE = """
import torch, stillroom as sr
from sklearn.linear_model import LogisticRegression

def logistic(examples):
    labelled = examples.labelled().batch(range(len(examples.labelled())))
    model = LogisticRegression(max_iter=500).fit(labelled.inputs["x"], labelled.labels)
    def answer(batch):
        return sr.Signal(logits=sr.Dense(torch.tensor(model.predict_log_proba(batch.inputs["x"])).float()))
    answer.identity = sr.Identity("logistic", licence="MIT", classes=examples.classes)
    return answer
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on iris flowers, each seen several times with noise, so that a risk can be promised."""
    folder = tmp_path_factory.mktemp("iris")
    iris, draw = load_iris(), torch.Generator().manual_seed(0)
    names = [str(name) for name in iris.target_names]
    for part, count in (("train", 200), ("test", 900)):
        pick = torch.randint(150, (count,), generator=draw)
        x = torch.tensor(iris.data[pick]).float() + 0.1 * torch.randn(count, 4, generator=draw)
        rows = zip(x.tolist(), iris.target[pick], strict=True)
        lines = [json.dumps({"id": f"{part}-{n}", "x": r, "kind": names[y]}) + "\n" for n, (r, y) in enumerate(rows)]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    (folder / "mine.py").write_text(MINE)
    data = {"use": "jsonl", "columns": ["x"], "label": "kind", "id": "id"}
    recipe = {
        "name": "iris",
        "seeds": [0],
        "threads": 1,
        "data": {part: {**data, "path": f"{part}.jsonl"} for part in ("train", "test")},
        "teacher": {"use": "mine.py:logistic"},
        "terms": {"teacher": {"licence": "own"}, "data": {"licence": "CC-BY-4.0"}},
        "student": {"use": "mlp", "inputs": 4, "hidden": [8]},
        "objective": {"use": "soft_targets", "temperature": 1.0},
        "alone": None,
        "fit": {"epochs": 30, "batch_size": 32, "learning_rate": 0.01},
        "evaluate": {"replicates": 20},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        command(["run", "recipe.yaml", "--quiet"])
    return folder


def command(arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_a_run_chooses_its_threshold_says_it_draws_it_and_stays_whole(run, monkeypatch, capsys):
    """`stillroom cascade`: the choice in words, report/cascade.json, the figure in the page, the manifest anew."""
    monkeypatch.chdir(run)
    command(["cascade", "runs/iris", "--risk", "0.08", "--quiet"])
    said = capsys.readouterr().out
    found = json.loads((run / "runs/iris/report/cascade.json").read_text())
    assert "with 95% certainty at most 8.0% of these answers differ from the labels" in " ".join(said.split())
    assert found["chosen_on"]["upper"] <= 0.08
    assert found["chosen_on"]["rows"] + found["measured_on"]["rows"] == 900
    point = found["measured"]
    assert point["kept_error"] <= 0.08 + 0.03
    # nobody to the teacher is the student; everybody is the teacher
    curve = sorted(found["curve"], key=lambda p: p["asked"])
    assert (curve[0]["asked"], curve[-1]["asked"] > 0.5) == (0.0, True)
    page = (run / "runs/iris/report/report.html").read_text()
    assert "Who has to answer" in page
    assert 'id="cascade-' in page
    command(["verify", "runs/iris"])
    # asked again it is read, not made again
    before = (run / "runs/iris/report/cascade.json").stat().st_mtime_ns
    command(["cascade", "runs/iris", "--risk", "0.08", "--quiet"])
    assert (run / "runs/iris/report/cascade.json").stat().st_mtime_ns == before


def test_a_risk_that_cannot_be_promised_is_said(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    command(["cascade", "runs/iris", "--risk", "0.0001", "--quiet"])
    assert "every question goes to the teacher. Allow more risk" in " ".join(capsys.readouterr().out.split())
    command(["cascade", "runs/iris", "--against", "nobody"], 2)
    (run / "runs/iris/signature").mkdir()
    command(["cascade", "runs/iris", "--risk", "0.5"], 2)
    (run / "runs/iris/signature").rmdir()
    assert "Choose the threshold first, then sign." in capsys.readouterr().err

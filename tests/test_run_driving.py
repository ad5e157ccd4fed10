"""A recipe of a control task from check to report: the teacher first, then gathering, training, closed loops, page."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from stillroom.errors import SignalError, UsageError
from stillroom.provenance import verify
from stillroom.recipes.yaml_file import check_recipe
from stillroom.run import open_run

HERE = Path(__file__).parent
RECIPE = {
    "name": "cart",
    "seeds": [0],
    "data": {"driving": {"task": {"use": "carts.py:cart"}, "questions": 200, "rounds": 2, "unseen": 6}},
    "teacher": {"use": "carts.py:Controller"},
    "student": {"use": "mlp", "hidden": [16]},
    "fit": {"steps": 80, "batch_size": 32, "learning_rate": 1e-2},
    "evaluate": {"replicates": 20},
    "terms": {"purpose": "research", "distributed": False, "data": {"licence": "own"}},
    "threads": 1,
}


def written(folder, **changes):
    shutil.copy(HERE / "control_fakes.py", folder / "carts.py")
    content = json.loads(json.dumps(RECIPE)) | changes
    (folder / "cart.yaml").write_text(yaml.safe_dump(content))
    return folder / "cart.yaml"


def opened(folder, **changes):
    return open_run(written(folder, **changes), folder / "run", progress=False)


def driving(**changes):
    return {"driving": RECIPE["data"]["driving"] | changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cart")
    run = opened(folder, export=[{"target": "onnx"}])
    checks, _ = run.check()
    assert all(check.passed for check in checks), checks
    run.record()
    run.fit()
    report = run.evaluate()
    run.export()
    run.seal()
    return run, report


def test_the_scoreboard_is_of_closed_loops(finished):
    """Teacher, student, the cloned control and the untrained start; success first, parameters and latency last."""
    run, report = finished
    assert list(report.rows) == ["teacher", "student", "cloning", "untrained"]
    assert report.metric == "success"
    assert report.rows["teacher"]["success"]["value"] == 1.0
    student = report.rows["student"]
    assert student["parameters"]["value"] == 4 * 16 + 16 + 16 + 1
    assert {"success_disturbed", "error_ratio", "error_own_states", "latency"} <= set(student)
    assert ("student", "cloning") in [(c["better"], c["worse"]) for c in report.comparisons]
    told = json.loads((run.folder / "report" / "driving.json").read_text())
    assert told["asked"] == 200
    assert told["tasks"][0]["rows"]["student"]["success"] == student["success"]["value"]
    (strip,) = told["strips"]
    assert strip["kind"] == "plot"  # a cart has no pictures
    assert (run.folder / "report" / strip["file"]).read_bytes().startswith(b"\x89PNG")


def test_the_recording_is_what_was_said_while_driving(finished):
    run, _ = finished
    manifest = json.loads((run.folder / "recording" / "manifest.json").read_text())
    assert manifest["teacher"]["name"] == "cart controller"
    assert manifest["data"]["rows"] == 200
    passport = json.loads((run.folder / "passport.json").read_text())
    assert passport["teachers"][0]["name"] == "cart controller"
    assert verify(run.folder) == []


def test_the_page_shows_what_decides(finished):
    run, _ = finished
    page = (run.folder / "report" / "report.html").read_text()
    assert "“Alone” is" not in page
    for said in ("In closed loop", "200 answers", "data:image/png;base64,", "error ratio", "cloning"):
        assert said in page, said


def test_a_finished_run_asks_nobody_again(finished, tmp_path):
    """Opened in a new process, the stages read what lies there. A copy: evaluating again measures latencies anew."""
    run, report = finished
    again = open_run(shutil.copytree(run.folder, tmp_path / "run"), files=run.base, progress=False)
    again.teacher.asked = 0
    again.record()
    again.fit()
    assert again.teacher.asked == 0
    assert again.evaluate().rows["student"]["success"] == report.rows["student"]["success"]
    assert again.teacher.asked > 0  # about the student's own states: those are answers for the report only


def test_a_teacher_that_fails_its_task_is_refused_first(tmp_path):
    run = opened(tmp_path, teacher={"use": "carts.py:Controller", "gain": 0.0})
    checks, _ = run.check()
    (first,) = checks
    assert not first.passed
    assert "success from 0% of 6 unseen starts" in first.detail
    assert "least_success asks 90%" in first.detail
    assert "A teacher that fails teaches to fail" in first.remedy
    assert not list(run.folder.glob("gathering/round-*"))


def test_a_teacher_without_success_is_asked_for_its_return(tmp_path):
    task = {"use": "carts.py:cart", "succeeded": None}
    run = opened(tmp_path, data=driving(task=task, least_return=-1.0))
    checks, _ = run.check()
    assert "mean return" in checks[0].detail
    assert not checks[0].passed


def test_a_student_of_another_size_is_said_before_anything_is_gathered(tmp_path):
    run = opened(tmp_path, student={"use": "mlp", "inputs": 7, "outputs": 1})
    checks, _ = run.check()
    assert [check.name for check in checks if not check.passed] == ["environment and student fit"]
    assert "cannot answer what task 'cart' shows, {'x': [4]" in checks[1].detail
    run = opened(tmp_path / "b", student={"use": "mlp", "outputs": 2}) if (tmp_path / "b").mkdir() is None else None
    checks, _ = run.check()
    assert "answers 2 numbers, but an action of 'cart' has 1" in checks[1].detail


def test_a_diverging_student_stops_with_its_state(tmp_path):
    fit = {"steps": 80, "optimiser": "sgd", "learning_rate": 300.0, "clip_norm": None}
    run = opened(tmp_path, data=driving(way="cloning"), fit=fit)
    run.record()
    with pytest.raises(SignalError, match=r"diverges|loss became"):
        run.fit()
    assert (run.folder / "student" / "checkpoint.pt").is_file()


def test_recipes_of_driving_are_checked():
    def fails(match, **changes):
        with pytest.raises(UsageError, match=match):
            check_recipe({**RECIPE, **changes})

    fails("way", data=driving(way="clone"))
    fails("questions", data=driving(questions=0))
    fails("or 'driving'", data={**driving(), "source": {"use": "csv"}})
    fails("no labels to learn from", alone={"objective": {"use": "hard_labels"}})
    fails("did you mean 'questions'", data=driving(question=3))
    found = check_recipe(RECIPE)
    assert found.alone is None
    assert found.student.answers == "values"
    assert found.objective.use == "match_values"

"""A recipe of answers in words, whole: what a teacher wrote is learned, measured against people, and proven."""

import json

import pytest
import yaml

import stillroom as sr
from stillroom.errors import DataError, UsageError
from stillroom.recipes.yaml_file import check_recipe
from stillroom.run import open_run
from stillroom.run_writing import WrittenRun
from stillroom.students import causal

KINDS = {"cat": "sat", "dog": "ran", "bird": "slept"}
WHERE = ["the mat", "a house", "it"]
NAMES = list(KINDS)

RECIPE = {
    "name": "tiny",
    "seeds": [0],
    "threads": 1,
    "data": {
        "train": {"use": "jsonl", "path": "train.jsonl", "text": "text", "beside": ["person"], "id": "id"},
        "test": {"use": "jsonl", "path": "test.jsonl", "text": "text", "beside": ["person"], "id": "id"},
    },
    "writes": {"prompt": "{{ text }}:", "answer": "person", "base": "base", "length": 48, "new_tokens": 12},
    "teacher": {"use": "published", "path": "said.jsonl", "id": "id", "text": "answer"},
    "student": {"use": "fresh", "hidden": 48, "layers": 2, "heads": 2},
    "terms": {"teacher": {"licence": "own"}},
    "fit": {"epochs": 30, "batch_size": 4, "learning_rate": 1e-2},
    "evaluate": {"replicates": 50},
}


def written(place, **changes):
    made = {**RECIPE, **changes}
    made["writes"] = {**made["writes"], "base": str(place / "base")}  # a model's folder is looked up from where we are
    (place / "tiny.yaml").write_text(yaml.safe_dump(made))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def place(small_tokenizer, tmp_path_factory):
    """Of 48 training questions a person answered four; the teacher answered all, wrongly where a bird is meant."""
    folder = tmp_path_factory.mktemp("writing")
    causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2, seed=3).net.save_pretrained(folder / "base")
    small_tokenizer.save_pretrained(folder / "base")
    said = []
    for role, count in (("train", 48), ("test", 18)):
        rows = []
        for number in range(count):
            name, where = NAMES[number % 3], WHERE[number // 3 % 3]
            row = {"id": f"{role}-{number}", "text": f"{number + (100 if role == 'test' else 0)} the {name} on {where}"}
            known = role == "test" or number < 4
            rows.append({**row, "person": f"it {KINDS[name]} on {where}" if known else ""})
            did = "ran" if name == "bird" else KINDS[name]
            said.append({"id": row["id"], "answer": f"it {did} on {where}"})
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return folder


@pytest.fixture(scope="module")
def finished(place):
    run = open_run(written(place, export=[{"target": "huggingface"}]), place / "run", progress=False)
    checks, _ = run.check()
    assert all(check.passed for check in checks), checks
    run.record()
    run.fit()
    report = run.evaluate()
    made = run.export()
    run.seal()
    return run, report, made


def test_the_student_writes_as_its_teacher_does_and_errs_as_it_does(finished):
    """12 of the teacher's 18 answers are a person's; the student learned all of them, the control four examples."""
    run, report, _ = finished
    assert isinstance(run, WrittenRun)
    assert report.metric == "exact"
    assert report.rows["teacher"]["exact"]["value"] == pytest.approx(12 / 18)
    assert report.rows["student"]["agreement"]["value"] > 0.9
    assert report.rows["student"]["exact"]["value"] == pytest.approx(12 / 18, abs=0.12)
    assert report.rows["alone"]["agreement"]["value"] < report.rows["student"]["agreement"]["value"]
    assert report.rows["untrained"]["exact"]["value"] == 0.0
    assert report.rows["student"]["latency"]["value"] > 0
    lines = [json.loads(line) for line in (run.folder / "report/answers.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"id", "person", "teacher", "student", "alone", "untrained"}
    equal = sum(line["student"] == line["teacher"] for line in lines) / len(lines)
    assert equal == pytest.approx(report.rows["student"]["agreement"]["value"])


def test_the_passport_says_whose_words_were_learned(finished):
    run, _, _ = finished
    passport = json.loads((run.folder / "passport.json").read_text())
    (teacher,) = passport["teachers"]
    assert teacher["signals"] == ["Texts()"]
    assert teacher["recording"] is not None
    assert teacher["requests"] == 48
    assert sr.provenance.verify(run.folder) == []
    page = (run.folder / "report/report.html").read_text()
    assert "it ran on" in page


def test_it_ships_and_answers_as_it_did(finished, small_tokenizer):
    run, _, made = finished
    assert not made.failures
    (artifact,) = made.artifacts
    assert artifact.verify["passed"]
    assert sr.load(run.folder / "student").net is not None


def test_a_finished_run_trains_and_asks_nothing_again(finished, place):
    run, _, _ = finished
    before = (run.folder / "student/model.safetensors").stat().st_mtime_ns
    again = open_run(run.folder, files=run.base, progress=False)
    again.record()
    again.fit()
    assert (run.folder / "student/model.safetensors").stat().st_mtime_ns == before


def test_what_does_not_fit_is_said_before_anything_is_trained(place):
    short = {**RECIPE["writes"], "length": 16, "new_tokens": 12}
    run = open_run(written(place, writes=short), place / "short", progress=False, claim=False)
    checks, _ = run.check()
    (failed,) = [check for check in checks if not check.passed]
    assert failed.name == "questions fit"
    assert "left for an answer" in failed.detail
    with pytest.raises(DataError, match="but a row holds 16"):
        open_run(written(place, writes=short), place / "short", progress=False).fit()


def test_without_a_persons_answers_there_is_no_control(place):
    writes = {name: value for name, value in RECIPE["writes"].items() if name != "answer"}
    run = open_run(written(place, writes=writes), place / "nobody", progress=False)
    run.record()
    with pytest.raises(DataError, match="nobody answered a training question"):
        run.fit()


def test_recipes_of_writing_are_checked(place):
    def fails(match, **changes):
        with pytest.raises(UsageError, match=match):
            check_recipe({**RECIPE, **changes})

    fails("answers in words have no tokens", tokens={"length": 64})
    fails("have no baseline", baseline={"use": "linear"})
    fails("have no alone.epochs", alone={"epochs": [1, 2]})
    fails("no JSON Schema", writes={**RECIPE["writes"], "fields": {"type": "nothing"}})
    fails("prompts", writes={"prompts": "x"})
    fails("of a language model export int8", student={**RECIPE["student"], "quantise": "int8"})
    with pytest.raises(UsageError, match="there is no metric 'exakt'; did you mean 'exact'"):
        open_run(written(place, evaluate={"metric": "exakt"}), place / "no", claim=False)
    assert check_recipe(RECIPE).record.keep[0].use == "texts"
    assert check_recipe(RECIPE).objective.use == "hard_labels"


def test_looking_asks_about_a_few_rows_only(place, monkeypatch):
    """doctor estimates before the teacher is asked about everything."""
    run = open_run(written(place), place / "look", progress=False, claim=False)
    assert run.shared == {}
    asked = []
    monkeypatch.setattr(type(run.teacher), "__call__", _counting(type(run.teacher).__call__, asked))
    run.check()
    assert 0 < sum(asked) <= 4
    assert not (place / "look").exists()


def _counting(answer, asked):
    def counted(self, batch):
        asked.append(len(batch))
        return answer(self, batch)

    return counted

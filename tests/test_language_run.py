"""Recipes for language models, whole: from texts to passport, with a small teacher that is kept as a folder."""

import json

import pytest
import yaml

import stillroom as sr
from stillroom.errors import DataError, UsageError
from stillroom.recipes import Use
from stillroom.recipes.yaml_file import check_recipe
from stillroom.run import open_run
from stillroom.students import causal

TEXTS = [f"the cat number {n} sat on the mat and the dog ran after it" for n in range(40)]

RECIPE = {
    "name": "tiny",
    "seeds": [0],
    "data": {
        "source": {"use": "jsonl", "path": "texts.jsonl", "text": "text"},
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
    },
    "tokens": {"length": 48},
    "teacher": {"use": "causal_lm", "model": "teacher"},
    "terms": {"teacher": {"licence": "own"}},
    "student": {"use": "fresh", "hidden": 16, "layers": 1, "heads": 2},
    "record": {"keep": [{"use": "top_k", "k": 16}], "batch_size": 4},
    "objective": {"use": "soft_targets", "temperature": 1.0},
    "alone": {"objective": {"use": "hard_labels"}, "epochs": [1, 2]},
    "fit": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3},
    "evaluate": {"replicates": 50},
}


@pytest.fixture
def place(small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=3)
    teacher.net.save_pretrained("teacher")
    small_tokenizer.save_pretrained("teacher")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"id": f"t{n}", "text": t}) + "\n" for n, t in enumerate(TEXTS))
    )
    return tmp_path


def written(place, **changes):
    (place / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
    return place / "tiny.yaml"


def test_a_recipe_of_texts_runs_from_data_to_passport(place):
    run = open_run(written(place), progress=False)
    checks, _ = run.check()
    assert all(check.passed for check in checks), [c for c in checks if not c.passed]
    recording = run.record()
    trained = run.fit()
    report = run.evaluate()
    run.seal()
    assert recording.manifest["teacher"]["tokenizer"] == trained["student"][0].identity.tokenizer
    choice = json.loads((run.folder / "alone" / "choice.json").read_text())
    assert choice["chosen"] == min(choice["loss"], key=choice["loss"].get)
    assert {"teacher", "student", "alone", "untrained"} <= set(report.rows)
    assert sr.provenance.verify(run.folder) == []
    opened = open_run(written(place), progress=False)  # everything is there already: nothing is trained again
    before = (run.folder / "student" / "model.safetensors").stat().st_mtime_ns
    opened.fit()
    assert (run.folder / "student" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("keep", [{"use": "likely", "least": 0.001, "coded": True}, {"use": "hidden"}])
def test_doctor_estimates_what_is_kept_not_what_is_asked(place, keep):
    """16 of 329 logits, or a hidden state and a head: not the bytes of all logits. Shard headers are the tolerance."""
    run = open_run(written(place, record={"keep": [keep], "batch_size": 4}), progress=False)
    checks, cost = run.check()
    assert cost is not None, checks
    run.record()
    found = sum(path.stat().st_size for path in (run.folder / "recording").rglob("*.safetensors"))
    assert cost.disk_bytes == pytest.approx(found, rel=0.25)


def test_budgets_of_the_control_need_rows_to_choose_by(place):
    changed = {"data": {**RECIPE["data"], "split": {"train": 0.8, "test": 0.2}}}
    with pytest.raises(UsageError, match=r"alone.epochs: give data.validation"):
        open_run(written(place, **changed), progress=False)


def test_texts_have_no_label_budget(place):
    with pytest.raises(UsageError, match="no label budget"):
        open_run(written(place, data={**RECIPE["data"], "labels": {"count": 3}}), progress=False)


def test_tokens_need_a_language_model(place):
    (place / "own.py").write_text("def teacher():\n    return lambda batch: None\n")
    run = open_run(written(place, teacher={"use": "own.py:teacher"}), progress=False)
    with pytest.raises(UsageError, match="the teacher is no causal language model"):
        run.record()


def test_a_students_function_returns_a_student(place):
    (place / "own.py").write_text("def student(tokenizer):\n    return 3\n")
    run = open_run(written(place, student={"use": "own.py:student"}), progress=False)
    with pytest.raises(UsageError, match="student 'own.py:student' returned int"):
        run.student(0)


def test_conversations_are_columns_of_json(place):
    talk = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}]
    lines = [json.dumps({"text": json.dumps([{**talk[0], "content": f"cat {n}?"}, talk[1]])}) for n in range(20)]
    (place / "texts.jsonl").write_text("\n".join(lines))
    tokens = {"length": 96, "chat": {"learn": "answers"}}
    run = open_run(written(place, tokens=tokens), progress=False)
    batch = run.data["train"].batch([0])
    assert "sat on the mat" in run.teacher.tokenizer.decode(batch.labels[batch.mask])
    assert "cat" not in run.teacher.tokenizer.decode(batch.labels[batch.mask])
    (place / "texts.jsonl").write_text(json.dumps({"text": "hello"}) + "\n" + "\n".join(lines))
    with pytest.raises(DataError, match="is not JSON"):
        _ = open_run(written(place, name="other", tokens=tokens), progress=False).data


FORWARD = {"use": "soft_targets", "temperature": 1}


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (FORWARD, "sampled"),
        ([{**FORWARD, "weight": 0.5}, {"use": "hard_labels", "weight": 0.5}], "sampled"),
        ({"use": "soft_targets"}, "likely"),  # at its own temperature of 2
        ({**FORWARD, "divergence": "reverse_kl"}, "likely"),
        ({"soft_targets": 1.0}, "likely"),
        ([FORWARD, {"use": "soft_targets", "temperature": 4}], "likely"),
        ([{"use": "hard_labels"}], "likely"),
    ],
)
def test_texts_are_not_kept_whole_by_default(objective, name):
    """At 49,152 ids a position of everything is 98 kB. Draws only where they are unbiased; what was said is kept."""
    known = {**RECIPE, "record": {"batch_size": 4}, "objective": objective}
    assert check_recipe(known).record.keep[0].use == name
    assert check_recipe(known).record.batch_size == 4
    assert check_recipe({**known, "record": {}}).record.keep[0].use == name
    assert check_recipe({**RECIPE, "objective": objective}).record.keep == [Use(use="top_k", k=16)]
    assert check_recipe({**known, "tokens": None, "teacher": {"use": "network"}}).record.keep[0].use == "everything"


def test_the_default_recording_teaches(place):
    run = open_run(written(place, record={"batch_size": 4}, alone=None), progress=False)
    assert run.record().manifest["keep"][0]["n"] == 50
    assert run.fit()["student"][0].net is not None

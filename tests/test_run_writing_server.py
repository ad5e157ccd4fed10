"""Extraction from an instructed teacher: SmolLM2 behind llama.cpp answers in JSON, a small language model learns to."""

import json

import pytest
import yaml

from endpoint_world import llama_server
from stillroom import provenance
from stillroom.run import open_run
from stillroom.students import causal

COLOURS, ANIMALS = ("red", "blue", "black"), ("cat", "dog", "bird")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": list(COLOURS)}, "animal": {"enum": list(ANIMALS)}},
    "required": ["colour", "animal"],
    "additionalProperties": False,
}


def rows(count, first):
    """Sentences, and what a person reads in them."""
    for number in range(first, first + count):
        colour, animal = COLOURS[number % 3], ANIMALS[number // 3 % 3]
        text = f"{number} times the {colour} {animal} ran after it"
        yield {"id": f"s{number}", "text": text, "person": json.dumps({"colour": colour, "animal": animal})}


@pytest.mark.slow
def test_fields_are_extracted_as_the_teacher_does_and_measured_against_people(small_tokenizer, tmp_path):
    """45 sentences without a person's answer are taught, 9 have one; 18 others measure teacher, student and control."""
    causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2, seed=3).net.save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "base")
    train = list(rows(54, 0))
    for row in train[9:]:
        row["person"] = ""
    for role, found in (("train", train), ("test", list(rows(18, 100)))):
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    read = {"use": "jsonl", "text": "text", "beside": ["person"], "id": "id"}
    with llama_server() as url:
        recipe = {
            "name": "extraction", "seeds": [0], "threads": 1,
            "data": {"train": {**read, "path": "train.jsonl"}, "test": {**read, "path": "test.jsonl"}},
            "writes": {
                "prompt": "{{ text }}:", "answer": "person", "base": str(tmp_path / "base"), "length": 96,
                "new_tokens": 40, "fields": SCHEMA,
            },
            "teacher": {
                "use": "endpoint", "url": url, "model": "smollm2", "reads": "text", "schema": SCHEMA,
                "system": "You read sentences and answer in JSON.",
                "prompt": "Which colour and which animal? Sentence: the blue bird slept. "
                          'Answer: {"colour": "blue", "animal": "bird"}. Sentence: {{ text }}. Answer:',
                "journal": str(tmp_path / "journal.sqlite"), "extra": {"cache_prompt": False}, "max_tokens": 32,
            },
            "student": {"use": "fresh", "hidden": 64, "layers": 2, "heads": 2},
            "fit": {"epochs": 40, "batch_size": 4, "learning_rate": 5e-3},
            "evaluate": {"replicates": 50},
            "terms": {"teacher": {"licence": "Apache-2.0", "route": "local-weights"}},
        }  # fmt: skip
        (tmp_path / "extraction.yaml").write_text(yaml.safe_dump(recipe))
        run = open_run(tmp_path / "extraction.yaml", tmp_path / "run", progress=False)
        checks, _ = run.check()
        assert all(check.passed for check in checks), checks
        run.record()
        run.fit()
        report = run.evaluate()
        run.seal()
    print(report)
    assert report.metric == "exact"
    teacher, student, alone = (report.rows[name] for name in ("teacher", "student", "alone"))
    assert teacher["usable"]["value"] == 1.0  # checked, and asked again where it was not
    assert teacher["fields"]["value"] > 1 / 3  # better than one guess of three
    assert student["usable"]["value"] > 0.8
    assert student["agreement"]["value"] > max(0.5, alone["agreement"]["value"])
    assert provenance.verify(run.folder) == []

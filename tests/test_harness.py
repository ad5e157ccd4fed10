"""lm-evaluation-harness on tasks that need no download: a file of questions beside a task file."""

import json
import random

import numpy as np
import pytest
import torch

from stillroom.errors import MissingFileError, UsageError
from stillroom.evaluation import harness
from stillroom.report import write_report
from stillroom.students import causal

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CITIES = ["Paris", "Rome", "Oslo"]
COUNTRIES = ["France", "Italy", "Norway"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    {how}
"""


@pytest.fixture
def tasks(tmp_path):
    """A multiple choice, and a text of which every byte is predicted."""
    lines = [
        {"question": f"What is the capital of {country}?", "choices": CITIES, "answer": place}
        for place, country in enumerate(COUNTRIES)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    choice = {
        "text": '"Question: {{question}}\\nAnswer:"',
        "target": '"{{answer}}"',
        "more": 'doc_to_choice: "{{choices}}"',
    }
    text = {"text": '""', "target": '"{{question}}"', "more": ""}
    mean = "aggregation: mean\n    higher_is_better: true"
    for name, kind, parts, metric, how in (
        ("capitals", "multiple_choice", choice, "acc", mean),
        ("sentences", "loglikelihood_rolling", text, "bits_per_byte", "aggregation: bits_per_byte"),
    ):
        made = TASK.format(name=name, folder=tmp_path, kind=kind, metric=metric, how=how, **parts)
        (tmp_path / f"{name}.yaml").write_text(made)
    return tmp_path


@pytest.fixture
def student(small_tokenizer):
    return causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)


def test_a_real_teacher_knows_the_capitals(smollm2_teacher, student, tasks, tmp_path):
    """Two rows, each with its own tokenizer; written for the page, and shown there."""
    student.net.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    models = {"teacher": smollm2_teacher, "student": [student]}
    found = harness(models, ["capitals"], tmp_path / "run" / "report", include=tasks, batch_size=2)
    assert found["rows"]["teacher"]["capitals acc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0 <= found["rows"]["student"]["capitals acc"]["value"] < 1
    assert found["tasks"] == {"capitals": 3}
    assert json.loads((tmp_path / "run" / "report" / "harness.json").read_text()) == found
    page = write_report(tmp_path / "run").read_text()
    assert "Tasks of lm-evaluation-harness" in page
    assert "capitals acc" in page
    assert student.net.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_mean_over_questions_has_an_interval_and_another_score_has_none(student, tasks):
    """A model that is uniform is right about as often as chance; bits per byte is a ratio of sums, not a mean."""
    student.net.get_output_embeddings().weight.data.zero_()
    found = harness({"student": student}, ["capitals", "sentences"], include=tasks, limit=2)
    cell, bits = (found["rows"]["student"][name] for name in ("capitals acc", "sentences bits_per_byte"))
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert bits["low"] == bits["value"] == bits["high"] > 0
    assert found["tasks"]["capitals"] == 2


def test_what_the_harness_cannot_do_is_said(student, tasks):
    with pytest.raises(UsageError, match="has no task 'capital'.*capitals"):
        harness({"student": student}, ["capital"], include=tasks)
    with pytest.raises(UsageError, match="row 'student' is no causal language model with its tokenizer"):
        harness({"student": lambda batch: None}, ["capitals"], include=tasks)
    (tasks / "questions.jsonl").unlink()
    with pytest.raises(MissingFileError, match="the data of capitals cannot be had"):
        harness({"student": student}, ["capitals"], include=tasks)

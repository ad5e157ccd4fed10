"""OpenVINO reads the ONNX file that ships and answers like the student."""

import functools
import json
import sys

import pytest
import torch

from stillroom.errors import MissingExtraError, UsageError
from stillroom.exporting import export, load_artifact
from stillroom.network import Columns
from stillroom.students.networks import Student
from stillroom.types import Batch
from test_exporting import Tensors, case

quick = functools.partial(export, target="openvino", progress=False, measure_memory=False)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "words", "attends"])
def test_float32_is_computed_as_float32(kind, tmp_path):
    """The same answers to 1e-4, whatever the batch, and with the versions of both libraries."""
    student, examples = case(kind)
    made = quick(student, examples, tmp_path)
    assert made.verify["passed"]
    assert made.verify["largest_difference"] < 1e-4 * 30
    assert {"openvino", "onnx"} <= set(json.loads((made.folder / "verify.json").read_text())["versions"])
    again = load_artifact(made.folder)
    for rows in (1, 3, 17):
        ours = student.predict(examples.batch(range(rows))).logits.values
        torch.testing.assert_close(again(examples.batch(range(rows))).logits.values, ours, atol=1e-4, rtol=1e-4)


def test_int8_is_static_and_runs(tmp_path):
    made = quick(*case("cnn"), tmp_path, precision="int8")
    assert made.verify["quantisation"]["method"] == "static"
    assert made.verify["agreement"] >= 0.97


def test_an_answer_is_kept_when_the_next_one_is_asked(tmp_path):
    """The runtime writes its own memory again: what was answered is a copy."""
    student, examples = case("mlp")
    made = quick(student, examples, tmp_path)
    first = made(examples.batch([0])).logits.values
    before = first.clone()
    made(examples.batch([1]))
    assert torch.equal(first, before)


def test_two_inputs_in_their_order(tmp_path):
    class Two(torch.nn.Module):
        def forward(self, left, right):
            return left * 2 - right

    class Pairs(Tensors):
        def batch(self, indices, views=None):
            rows = list(indices)
            return Batch(tuple(f"row-{r}" for r in rows), {"left": self.x[rows, :3], "right": self.x[rows, 3:]})

    student = Student(Two(), adapter=Columns(("left", "right")), answers="values")
    assert quick(student, Pairs(torch.randn(9, 6)), tmp_path).verify["largest_difference"] < 1e-5


def test_what_it_does_not_take_is_said(tmp_path, monkeypatch):
    student, examples = case("mlp")
    talks = Student(student.net, answers="next_token")
    with pytest.raises(UsageError, match=r"language models are not shipped to OpenVINO here\. Use onnx"):
        quick(talks, examples, tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"stillroom\[openvino\]"):
        quick(student, examples, tmp_path)

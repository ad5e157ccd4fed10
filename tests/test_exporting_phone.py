"""Files for phones and microcontrollers: refused before any work, or opened again in their own runtime and compared."""

import json
import zipfile

import pytest
import torch
from torch import nn

from stillroom.data import Table
from stillroom.errors import ParityError, UsageError
from stillroom.exporting import Tolerance, export, load_artifact, program
from stillroom.exporting.apart import process
from stillroom.network import Columns
from stillroom.students.networks import Student
from stillroom.students.quantised import quantised, unrounded
from stillroom.students.words import Words

ANY = Tolerance(difference=None, agreement=None, error=None, quality=None)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def pictures(rows=96, seed=0):
    x = torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return Table({"x": x}, ids=tuple(map(str, range(rows))), labels=torch.arange(rows) % 5, classes=tuple("abcde"))


class TwoInputs(nn.Module):
    """The order of inputs matters: a 3 wide, b 3 wide too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, a, b):
        return self.a(a) - 2 * self.b(b)


def student(net, **rest):
    torch.manual_seed(0)
    return Student(net(), name="small", **rest)


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(self.words(ids).mean(1))


@pytest.fixture
def no_environment(monkeypatch):
    """Whoever makes an environment here did not refuse before the work."""

    def made(name):
        raise AssertionError(f"the environment {name} was asked for")

    monkeypatch.setattr(process, "environment", made)


@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [
        ("tflm", "int8_dynamic", "no operators with int8 weights and float activations.*Use int8"),
        ("litert", "fp16", "litert has no precision 'fp16'; known: fp32, int8, int8_dynamic"),
    ],
)
def test_refused_before_any_work(target, precision, said, no_environment, tmp_path):
    with pytest.raises(UsageError, match=said):
        export(student(cnn), pictures(), tmp_path, target, precision, progress=False)
    assert not list(tmp_path.rglob("model*"))


@pytest.mark.parametrize("target", ["litert", "executorch", "tflm"])
def test_texts_of_any_length_are_refused(target, no_environment, tmp_path):
    """Their rows differ in length, and shapes are fixed in these files."""
    texts = Table({"text": ("one two", "three")}, ids=("a", "b"), labels=torch.tensor([0, 1]), classes=tuple("abcde"))
    net = student(Ids, adapter=Words(column="text", vocabulary=("one", "two", "three")))
    with pytest.raises(UsageError, match="differ in length.*Use onnx|holds integers. Use litert or onnx"):
        export(net, texts, tmp_path, target, progress=False)


def test_a_program_is_json_and_raw_numbers(tmp_path):
    """What goes to the other environment holds no pickle; torch would put the example inputs into one."""
    program.write_program(student(cnn), (pictures().batch([0, 1]).inputs["x"],), tmp_path / "p.pt2")
    with zipfile.ZipFile(tmp_path / "p.pt2") as file:
        configs = [json.loads(file.read(name)) for name in file.namelist() if name.endswith("_config.json")]
        assert not [entry for config in configs for entry in config["config"].values() if entry.get("use_pickle")]
        assert [file.getinfo(name).file_size for name in file.namelist() if "sample_inputs" in name] == [0]


def test_a_network_that_branches_on_values_is_named(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="torch.export cannot take the network of 'small': .*no branching on values"):
        program.write_program(student(Branches), (torch.ones(2, 3),), tmp_path / "p.pt2")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("litert", "fp32"), ("litert", "int8_dynamic"), ("tflm", "int8")])
def test_the_file_is_the_student(target, precision, tmp_path):
    """Opened in its own runtime, on every example; reloaded it answers the same, batch by batch or one by one."""
    examples = pictures()
    made = export(student(cnn), examples, tmp_path, target, precision, progress=False)
    assert made.verify["largest_difference"] < (1e-5 if precision == "fp32" else 0.05)
    assert made.verify["latency"]["median_seconds"] < made.verify["latency"]["end_to_end"]["median_seconds"]
    again = load_artifact(made.folder)
    batch = examples.batch(range(5))
    assert torch.equal(again(batch).logits.values, made(batch).logits.values)
    assert made.verify["batch_effect"] == 0.0
    assert made.path.suffix == ".tflite"
    with pytest.raises(UsageError, match=r"of shape \[1, 1, 12, 12\] and no other"):
        again.predict({"x": torch.zeros(2, 1, 8, 8)})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int8_dynamic"])
def test_executorch_is_the_student(precision, tmp_path):
    """Lowered whole to XNNPACK; a batch is asked row by row, and no dimension was narrowed on the way."""
    examples = pictures()
    made = export(student(cnn), examples, tmp_path, "executorch", precision, progress=False)
    assert made.verify["largest_difference"] < (1e-5 if precision == "fp32" else 0.05)
    assert made.verify["delegates"] == {"xnnpack": 1, "operators_outside": []}
    assert made.verify["inputs"] == [{"name": "input_0", "dtype": "float32", "shape": [1, 1, 12, 12]}]
    batch = examples.batch(range(33))
    assert torch.equal(load_artifact(made.folder)(batch).logits.values, made(batch).logits.values)


@pytest.mark.slow
def test_litert_inputs_keep_their_order_and_static_ranges_their_ends(tmp_path):
    """int8 inputs are rounded here; the ranges are the least and the largest of all rows, not a moving average.

    One row of 96 is ten times as large as the rest: ai-edge-quantizer's own average (0.95 of what was) would forget it.
    """
    a, b = torch.randn(2, 96, 3, generator=torch.Generator().manual_seed(1))
    a[40] *= 10
    examples = Table({"a": a, "b": b}, ids=tuple(map(str, range(96))))
    net = student(TwoInputs, adapter=Columns(("a", "b")), answers="values")
    made = export(net, examples, tmp_path, "litert", "int8", progress=False)
    first, second = made.verify["inputs"]
    assert first["int8"]["scale"] == pytest.approx(float(a.max() - a.min()) / 255, rel=0.02)
    assert second["int8"]["scale"] == pytest.approx(float(b.max() - b.min()) / 255, rel=0.02)
    assert made.verify["relative_error"] < 0.03


def test_a_float_copy_of_a_rounded_student_has_the_values_of_its_integers():
    """Rounded once more by the same rule it is the same integers."""
    rounded = quantised(student(cnn), "int8", pictures())
    plain = unrounded(rounded)
    assert plain.rounding is None
    assert not any("rounded" in name for name, _ in plain.net.named_modules())
    layer = rounded.net[0]
    integers, scales = layer.rounded.integers(layer)
    torch.testing.assert_close(plain.net[0].weight, integers * scales[:, :, None, None])
    again = quantised(plain, "int8", pictures()).net[0]
    assert torch.equal(again.rounded.integers(again)[0], integers)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["litert", "executorch"])
def test_a_student_trained_in_int8_is_rounded_by_the_targets_own_rules(target, tmp_path):
    """It says so, and is compared with what was trained, not with the float copy."""
    rounded = quantised(student(cnn), "int8", pictures())
    made = export(rounded, pictures(), tmp_path, target, "int8", progress=False)
    assert made.verify["quantisation"]["method"] == "static, anew"
    assert 0 < made.verify["largest_difference"] < 0.1
    with pytest.raises(UsageError, match="trained in int8: choose that"):
        export(rounded, pictures(), tmp_path, target, "fp32", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_core_ml_is_converted_and_says_that_nothing_was_proven(precision, tmp_path):
    """An .mlpackage whose program reads and answers as the network's shapes say; nothing here can run it."""
    made = export(student(cnn), pictures(), tmp_path, "coreml", precision, progress=False)
    assert made.path.name == "unproven.mlpackage"
    assert made.verify["passed"] is None
    assert "macOS" in made.verify["unproven"]
    assert made.verify["inputs"] == [{"name": "input_0", "dtype": "float32", "shape": [1, 1, 12, 12]}]
    parameters = sum(p.numel() for p in cnn().parameters())
    assert made.bytes > parameters * (2 if precision == "fp16" else 4)
    with pytest.raises(ParityError, match="cannot be run here: Core ML"):
        load_artifact(made.folder)
    with pytest.raises(ParityError, match="not of this kind of machine"):
        made(pictures().batch([0]))

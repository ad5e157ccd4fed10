"""An export is the student in another file: measured on every example, refused when it is not."""

import functools
import json
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from stillroom.data import Table
from stillroom.errors import FolderError, MissingExtraError, ParityError, UsageError
from stillroom.exporting import TARGETS, Artifact, Target, Tolerance, Written, load_artifact
from stillroom.exporting import export as export_measured
from stillroom.exporting.onnx.graph import open_model
from stillroom.measures import METRICS
from stillroom.network import Columns
from stillroom.students.networks import Student
from stillroom.students.words import Words
from stillroom.types import Batch, Dense, Signal

WORDS, EMBEDDED = 3000, 32
export = functools.partial(export_measured, measure_memory=False)  # memory has tests of its own, and takes seconds
VERSIONS = {"versions": {"onnxruntime": "1"}}


class Tensors:
    """Examples over one tensor column."""

    def __init__(self, x, labels=None, name="x"):
        self.x, self.labels, self.name = x, labels, name

    def __len__(self):
        return len(self.x)

    def batch(self, indices, views=None):
        rows = list(indices)
        labels = None if self.labels is None else self.labels[rows]
        return Batch(tuple(f"row-{row}" for row in rows), {self.name: self.x[rows]}, labels)


class MeanOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, EMBEDDED, padding_idx=0)
        self.head = nn.Linear(EMBEDDED, 4)

    def forward(self, ids):
        there = (ids != 0).unsqueeze(-1).to(torch.float32)
        return self.head((self.words(ids) * there).sum(1) / there.sum(1).clamp(min=1))


class Bag(nn.Module):
    def __init__(self, mode="mean", padding_idx=0):
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, EMBEDDED, mode=mode, padding_idx=padding_idx)
        self.head = nn.Linear(EMBEDDED, 4)

    def forward(self, ids):
        return self.head(self.words(ids))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(500, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.block(self.words(ids)).mean(1))


def mlp(outputs=5):
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def trained(net, x, labels, steps=60):
    """A student whose answers are apart, as a trained one's are: near ties would measure nothing."""
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@functools.cache
def case(kind, rows=160):
    """(student, examples): a small net fitted to a rule it can learn."""
    torch.manual_seed(0)
    classes = torch.arange(rows) % 4
    if kind == "mlp":
        x = torch.randn(rows, 16) + 2 * nn.functional.one_hot(classes, 16)
        net = mlp()
    elif kind == "cnn":
        x = torch.randn(rows, 1, 8, 8) * 0.3 + classes.float().view(-1, 1, 1, 1)
        net = cnn()
    else:
        x = torch.randint(1, WORDS if kind != "attends" else 400, (rows, 9))
        x[:, :3] = classes.unsqueeze(1) + 1
        if kind != "attends":
            x[::2, 6:] = 0
        net = {"words": MeanOfWords, "bag": Bag, "attends": Attends}[kind]()
    return Student(trained(net, x, classes), classes=("a", "b", "c", "d", "e")[: 5 if kind in ("mlp", "cnn") else 4]), (
        Tensors(x, classes)
    )


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The artefact of a case, exported once for all tests that only read it."""

    @functools.cache
    def make(kind, precision="fp32"):
        student, examples = case(kind)
        return export(student, examples, tmp_path_factory.mktemp(kind), precision=precision, progress=False)

    return make


@pytest.fixture
def mlp_case():
    return case("mlp")


@pytest.mark.parametrize("kind", ["mlp", "cnn", "words", "bag", "attends"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_shipped_is_the_student(kind, precision, shipped):
    """Every kind of net, both precisions: verified, loaded back, and the same at batch 1, 3 and 17."""
    student, examples = case(kind)
    made = shipped(kind, precision)
    loaded = load_artifact(made.folder)
    verify = json.loads((made.folder / "verify.json").read_text())
    assert verify == loaded.verify == made.verify
    assert verify["passed"] is True
    assert verify["examples"] == 160
    assert verify["bytes"] == loaded.path.stat().st_size == loaded.bytes
    limit = 1e-4 if precision == "fp32" else 1.0
    assert verify["largest_difference"] <= limit * max(
        1, float(student.predict(examples.batch(range(160))).logits.values.abs().max())
    )
    for rows in (1, 3, 17):
        ours = student.predict(examples.batch(range(rows))).logits.values
        theirs = loaded(examples.batch(range(rows))).logits
        assert isinstance(theirs, Dense)
        assert theirs.values.shape == ours.shape
        assert (theirs.values - ours).abs().max() <= limit * max(1, float(ours.abs().max()))
    assert (verify["quantisation"] is None) == (precision == "fp32")


@pytest.mark.parametrize(("kind", "method"), [("cnn", "static"), ("attends", "dynamic")])
def test_quantisation_fits_the_kind_of_net(kind, method, shipped):
    """Convolutions stay convolutions (static), transformers get their ranges at run time (dynamic)."""
    verify = shipped(kind, "int8").verify
    assert verify["quantisation"]["method"] == method


@pytest.mark.parametrize("kind", ["words", "bag"])
def test_int8_tables_are_a_quarter(kind, shipped):
    """The embedding table, nearly all of a text student, is int8 too."""
    assert shipped(kind).bytes / shipped(kind, "int8").bytes > 3.7


@pytest.mark.parametrize("kind", ["words", "bag", "attends"])
def test_texts_may_have_any_length(kind, shipped):
    """The second dimension of token ids is free."""
    student, artifact = case(kind)[0], shipped(kind)
    for length in (2, 5, 40):
        inputs = {"x": torch.randint(1, 300, (3, length))}
        torch.testing.assert_close(
            artifact.predict(inputs).logits.values, student.predict(inputs).logits.values, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("padding_idx", [0, None])
def test_bags_are_exported_without_a_loop(mode, padding_idx, tmp_path):
    """nn.EmbeddingBag and the lookup that is shipped for it agree, an empty bag included."""
    student = Student(Bag(mode, padding_idx).eval())
    x = torch.randint(0, WORDS, (20, 6))
    x[0] = 0
    artifact = export(student, Tensors(x), tmp_path, progress=False)
    operators = {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert "Loop" not in operators
    assert isinstance(student.net.words, nn.EmbeddingBag), "the student itself is not rewritten"


def test_same_student_same_bytes(mlp_case, tmp_path):
    """Exporting twice gives the same file, and no path of this machine is inside."""
    student, examples = mlp_case
    for precision in ("fp32", "int8"):
        paths = [export(student, examples, tmp_path / name, precision=precision, progress=False).path for name in "ab"]
        first, second = (path.read_bytes() for path in paths)
        assert first == second
        assert b"site-packages" not in first
        assert b"/test_export.py" not in first
        assert str(tmp_path).encode() not in first


def test_evaluated_as_a_model_it_equals_the_student(mlp_case, shipped):
    """The artefact is a Model: the same metric on the same batches gives the student's number."""
    student, examples = mlp_case
    artifact = shipped("mlp")
    batch = examples.batch(range(len(examples)))
    metric = METRICS["accuracy"]
    ours = metric.finish(metric.statistics(student.predict(batch), student.predict(batch), batch))
    assert metric.finish(metric.statistics(artifact(batch), artifact(batch), batch)) == ours
    quality = artifact.verify["quality"]
    assert quality["value"] == quality["student"]["value"] == ours
    assert quality["low"] <= ours <= quality["high"]
    assert artifact.identity.digest == artifact.verify["sha256"]


def test_latency_is_measured_in_the_runtime_and_end_to_end(shipped):
    latency = shipped("mlp").verify["latency"]
    assert latency["runs"] >= 100
    assert 0 < latency["low"] <= latency["median_seconds"] <= latency["high"]
    assert 0 < latency["end_to_end"]["low"] <= latency["end_to_end"]["median_seconds"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_regression(precision, tmp_path):
    """Continuous answers are compared by value; the quality is R2."""
    x = torch.randn(120, 16)
    labels = torch.stack([x[:, 0] + x[:, 1], x[:, 2] * 2], -1)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        (net(x) - labels).square().mean().backward()
        optimiser.step()
    student = Student(net.eval(), answers="values")
    artifact = export(student, Tensors(x, labels), tmp_path, precision=precision, progress=False)
    assert artifact.verify["agreement"] is None
    assert artifact.verify["relative_error"] < (1e-5 if precision == "fp32" else 0.1)
    assert artifact.verify["quality"]["metric"] == "r2"
    again = load_artifact(artifact.folder)
    assert again.predict({"x": x}).values.shape == (120, 2)


def test_without_labels_quality_is_null(mlp_case, tmp_path):
    student, examples = mlp_case
    assert export(student, Tensors(examples.x), tmp_path, progress=False).verify["quality"] is None


def damaged(good, change):
    """An exporter whose file is not the student: ``change`` is applied to the last weight matrix of a good artefact."""

    def write(student, tensors, calibration, path, precision):
        model = onnx.load(good.path)
        weight = [item for item in model.graph.initializer if len(item.dims) == 2][-1]
        weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()), weight.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path.with_suffix(".onnx"))
        return Written(path.with_suffix(".onnx"), open_model, VERSIONS)

    return write


@pytest.mark.parametrize(
    "change",
    [lambda w: -w, lambda w: w * 1.01, lambda w: w * 0 + float("nan"), lambda w: w[::-1].copy()],
    ids=["negated", "scaled", "nan", "reordered"],
)
def test_a_damaged_artefact_is_refused_and_named(change, mlp_case, shipped, tmp_path, monkeypatch):
    """Beyond the tolerance: the worst examples with both answers, and no file that could be shipped by accident."""
    student, examples = mlp_case
    monkeypatch.setitem(TARGETS, "other", Target(damaged(shipped("mlp"), lambda weight: weight), ("fp32",)))
    export(student, examples, tmp_path, "other", progress=False)
    monkeypatch.setitem(TARGETS, "other", Target(damaged(shipped("mlp"), change), ("fp32",)))
    with pytest.raises(ParityError, match="row-") as caught:
        export(student, examples, tmp_path, "other", progress=False)
    assert str(caught.value).count("row-") == 5
    assert "artefact '" in str(caught.value)
    place = tmp_path / "other-fp32"
    assert sorted(path.name for path in place.iterdir()) == ["failed.onnx", "verify.json"]
    verify = json.loads((place / "verify.json").read_text())
    assert verify["passed"] is False
    assert verify["file"] == "failed.onnx"
    with pytest.raises(ParityError):
        load_artifact(place)


def test_tolerance_is_the_users(mlp_case, tmp_path):
    """A difference that one user accepts is an error for another."""
    student, examples = mlp_case
    with pytest.raises(ParityError, match="largest difference"):
        export(
            student, examples, tmp_path, precision="int8", tolerance=Tolerance(1e-6, 0.9, None, None), progress=False
        )


def test_a_clear_loss_of_quality_is_refused(mlp_case, shipped, tmp_path, monkeypatch):
    """Even where agreement is not asked for, quality is; the sentence says by how much."""
    student, examples = mlp_case
    monkeypatch.setitem(TARGETS, "other", Target(damaged(shipped("mlp"), lambda w: w[::-1].copy()), ("fp32",)))
    with pytest.raises(ParityError, match="accuracy is"):
        export(student, examples, tmp_path, "other", tolerance=Tolerance(None, None, None, 0.02), progress=False)


def test_a_replaced_file_is_not_opened(shipped, tmp_path):
    """What is loaded is the file that passed."""
    place = shutil.copytree(shipped("mlp").folder, tmp_path / "copy")
    path = place / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(FolderError, match=r"model\.onnx"):
        load_artifact(place)


@pytest.mark.parametrize(("target", "precision"), [("onxx", "fp32"), ("onnx", "int7")])
def test_unknown_target_or_precision_names_the_known(target, precision, mlp_case, tmp_path):
    student, examples = mlp_case
    with pytest.raises(UsageError, match=r"onnx|int8"):
        export(student, examples, tmp_path, target, precision, progress=False)


def test_what_onnx_cannot_take_is_said(tmp_path):
    """A branch on a value: an error about the network, not a page of the exporter's."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(x) if x.sum() > 0 else -self.head(x)

    with pytest.raises(UsageError, match="onnx fp32 cannot take the network") as caught:
        export(Student(Branches()), Tensors(torch.randn(8, 16)), tmp_path, progress=False)
    assert len(str(caught.value)) < 700


def test_a_fixed_batch_size_is_said(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(x.reshape(4, 16))

    with pytest.raises(UsageError, match="batch"):
        export(Student(Fixed()), Tensors(torch.randn(4, 16)), tmp_path, progress=False)


def test_missing_library_names_the_extra(mlp_case, tmp_path, monkeypatch):
    import sys

    student, examples = mlp_case
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"stillroom\[onnx\]"):
        export(student, examples, tmp_path, progress=False)


def test_several_inputs_and_an_object_as_output(tmp_path):
    """Two columns by name, float64 parameters, and a network that returns a Signal: shipped as one float32 graph."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, left, right):
            return Signal(logits=Dense(self.head(torch.cat([left, right], -1))))

    class Pairs(Tensors):
        def batch(self, indices, views=None):
            rows = list(indices)
            columns = {"left": self.x[rows, :2], "right": self.x[rows, 2:]}
            return Batch(tuple(f"row-{row}" for row in rows), columns)

    student = Student(Two().double(), adapter=Columns(("left", "right")))
    artifact = export(student, Pairs(torch.randn(9, 6, dtype=torch.float64)), tmp_path, progress=False)
    assert [item["name"] for item in artifact.verify["inputs"]] == ["left", "right"]
    assert [item["shape"] for item in artifact.verify["inputs"]] == [["batch", 2], ["batch", 4]]
    assert isinstance(load_artifact(artifact.folder), Artifact)


def test_one_example_is_enough(tmp_path):
    artifact = export(Student(mlp()), Tensors(torch.randn(1, 16)), tmp_path, progress=False)
    assert artifact.predict({"x": torch.randn(5, 16)}).logits.values.shape == (5, 5)


def test_masked_positions_are_not_compared(tmp_path):
    """One answer per position: only positions inside the mask count, and the length is free."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.words(ids))

    class Masked(Tensors):
        def batch(self, indices, views=None):
            rows = list(indices)
            return Batch(tuple(f"row-{r}" for r in rows), {"x": self.x[rows]}, mask=self.x[rows] > 10)

    student = Student(Tagger())
    artifact = export(student, Masked(torch.randint(0, 50, (30, 7))), tmp_path, progress=False)
    assert artifact.predict({"x": torch.randint(0, 50, (2, 11))}).logits.values.shape == (2, 11, 3)


@pytest.mark.parametrize("pooling", ["mean", "sqrt", "mean+max"])
def test_texts_from_raw_columns(pooling, tmp_path):
    """The library's own text student: its artefact is opened from the folder and asked with text; the table is int8."""
    subjects = ("wheat", "ships", "money", "oil")
    texts = tuple(f"{subjects[row % 4]} prices of {row} " + "and so on " * (row % 5) for row in range(80))
    examples = Table({"text": texts}, ids=tuple(map(str, range(80))), labels=torch.arange(80) % 4, classes=subjects)
    words = Words.fit(texts, size=200)
    arguments = {"vocabulary": 3000, "classes": 4, "width": 32, "hidden": 0, "pooling": pooling}
    student = Student.make(
        "stillroom.students.architectures:bag_of_words", arguments, adapter=words, classes=examples.classes
    )
    trained(student.net, words({"text": texts})[0], torch.arange(80) % 4)
    made = export(student, examples, tmp_path, precision="int8", progress=False)
    artifact = load_artifact(made.folder)
    answers = artifact.predict({"text": ("Wheat is dear", "the oil ran out", "")}).logits.values
    assert [subjects[index] for index in answers[:2].argmax(-1)] == ["wheat", "oil"]
    assert made.verify["quality"]["value"] == 1.0
    assert made.bytes < 3000 * 32 * 4 / 3.5

"""An ONNX file as a teacher: asked by name, its classes chosen, and refused where it would be silently wrong."""

import math

import numpy as np
import pytest
import torch

import stillroom as sr
from stillroom.digests import file_digest
from stillroom.errors import DataError, MissingFileError, ShapeError, SignalError, UsageError
from stillroom.types import Batch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from stillroom.teachers.onnx import from_onnx  # noqa: E402

WEIGHT = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=np.float32)
X = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0], [0.5, 0.5], [2.0, 2.0]])
BATCH = Batch(tuple("abcde"), {"x": X})
FLOAT = TensorProto.FLOAT


def saved(path, nodes, inputs, outputs, weights=(), **options):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(w, n) for n, w in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path), **options)
    return path


def linear(path, softmax=True, rows="N", outputs=1, **options):
    """probabilities = softmax(x W), W [2, 3]; the second output, where wanted, are the logits."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["z"])]
    nodes += [helper.make_node("Softmax", ["z"], ["p"])] if softmax else []
    names = (["p"] if softmax else ["z"]) + (["z"] if outputs == 2 else [])
    shown = [helper.make_tensor_value_info(name, FLOAT, [rows, 3]) for name in names]
    return saved(path, nodes, [helper.make_tensor_value_info("x", FLOAT, [rows, 2])], shown, [("W", WEIGHT)], **options)


def expected():
    return (X @ torch.from_numpy(WEIGHT)).log_softmax(-1)


def test_probabilities_and_logits_are_the_same_teacher(tmp_path):
    """Declared as what they are, both give log-probabilities up to a constant, in batches of any size."""
    said = from_onnx(linear(tmp_path / "p.onnx"), gives="probabilities", classes=("a", "b", "c"), rows=2)
    torch.testing.assert_close(said(BATCH).logits.values, expected())
    raw = from_onnx(linear(tmp_path / "z.onnx", softmax=False), gives="logits")
    torch.testing.assert_close(raw(BATCH).logits.values.log_softmax(-1), expected())
    sr.testing.check_model(said, BATCH)
    assert said.identity.classes == ("a", "b", "c")
    assert said.identity.digest == file_digest(tmp_path / "p.onnx")
    assert (said.identity.kind, said.identity.name) == ("onnx", "p")
    assert (said.parameters_count, said.bytes) == (6, (tmp_path / "p.onnx").stat().st_size)


def test_values_are_values(tmp_path):
    teacher = from_onnx(linear(tmp_path / "z.onnx", softmax=False), gives="values")
    torch.testing.assert_close(teacher(BATCH).values, X @ torch.from_numpy(WEIGHT))
    assert teacher(BATCH).logits is None


def test_what_is_declared_wrongly_is_refused(tmp_path):
    """Probabilities taken for logits teach an almost even distribution; logits are no distribution."""
    with pytest.raises(SignalError, match="these are probabilities"):
        from_onnx(linear(tmp_path / "p.onnx"), gives="logits")(BATCH)
    with pytest.raises(SignalError, match="no distribution for example 'a'.*Declare gives: logits"):
        from_onnx(linear(tmp_path / "z.onnx", softmax=False), gives="probabilities")(BATCH)
    with pytest.raises(UsageError, match="did you mean 'logits'"):
        from_onnx(tmp_path / "z.onnx", gives="logit")


def test_a_probability_of_0_is_minus_infinity(tmp_path):
    certain = Batch(("a",), {"x": torch.tensor([[500.0, 0.0]])})
    found = from_onnx(linear(tmp_path / "p.onnx"), gives="probabilities")(certain).logits.values
    assert found[0, 2] == 0
    assert found[0, :2].tolist() == [-math.inf, -math.inf]


def test_chosen_classes_and_the_rest_in_one(tmp_path):
    """p(others) is the exact sum of what is left; without a name for it the kept ones are renormalised."""
    path, names = linear(tmp_path / "p.onnx"), ("a", "b", "c")
    some = from_onnx(path, gives="probabilities", classes=names, only=("c",), others="other")
    p = expected().exp()
    found = some(BATCH).logits.values
    torch.testing.assert_close(found.exp(), torch.stack([p[:, 2], p[:, 0] + p[:, 1]], -1))
    assert some.identity.classes == ("c", "other")
    two = from_onnx(path, gives="probabilities", classes=names, only=("c", "a"))
    torch.testing.assert_close(two(BATCH).logits.values.softmax(-1), p[:, [2, 0]] / p[:, [2, 0]].sum(-1, keepdim=True))
    assert two.identity.classes == ("c", "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("a", "b")}, "2 classes are named, but output 'p' has 3"),
        ({"only": ("a",)}, "give the file's own classes"),
        ({"classes": ("one", "two", "three"), "only": ("tow",)}, "did you mean 'two'"),
        ({"classes": ("a", "b", "c"), "only": ("a", "b"), "others": "a"}, "a class that is kept"),
        ({"others": "rest"}, "gathers what only"),
        ({"inputs": {"y": "x"}}, "no input 'y'"),
        ({"output": "q"}, "no output 'q'"),
        ({"rows": 0}, "must be 1 or more"),
        ({"licence_": "MIT"}, "did you mean 'licence'"),
    ],
)
def test_settings_that_do_not_fit_the_file(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        from_onnx(linear(tmp_path / "p.onnx"), gives="probabilities", **settings)


def test_several_outputs_are_not_guessed(tmp_path):
    path = linear(tmp_path / "both.onnx", outputs=2)
    with pytest.raises(UsageError, match="2 outputs: name one of p, z"):
        from_onnx(path, gives="probabilities")
    torch.testing.assert_close(
        from_onnx(path, gives="logits", output="z")(BATCH).logits.values.log_softmax(-1), expected()
    )


def test_a_fixed_batch_size_is_filled_up(tmp_path):
    """A file that takes exactly 4 rows answers 5: twice, and nothing of what filled it up comes out."""
    teacher = from_onnx(linear(tmp_path / "four.onnx", rows=4), gives="probabilities")
    assert (teacher.rows, teacher.fixed) == (4, True)
    torch.testing.assert_close(teacher(BATCH).logits.values, expected())


def test_columns_reach_inputs_by_name(tmp_path):
    """Two inputs of other names and orders than the columns; swapped columns would give another answer."""
    inputs = [helper.make_tensor_value_info(name, FLOAT, ["N", 2]) for name in ("left", "right")]
    out = [helper.make_tensor_value_info("out", FLOAT, ["N", 2])]
    path = saved(tmp_path / "minus.onnx", [helper.make_node("Sub", ["left", "right"], ["out"])], inputs, out)
    both = Batch(("a",), {"x": torch.tensor([[1.0, 1.0]]), "y": torch.tensor([[0.0, 3.0]])})
    teacher = from_onnx(path, gives="values", inputs={"right": "x", "left": "y"})
    assert teacher(both).values.tolist() == [[-1.0, 2.0]]
    with pytest.raises(UsageError, match="no column feeds input 'right'"):
        from_onnx(path, gives="values", inputs={"left": "x"})
    with pytest.raises(DataError, match="no column 'left'"):
        from_onnx(path, gives="values")(both)


def test_numbers_that_the_file_cannot_hold_are_refused(tmp_path):
    """300 as uint8 is 44: the file would see another number. What fits passes, whatever the column's type."""
    path = saved(
        tmp_path / "bytes.onnx",
        [helper.make_node("Cast", ["b"], ["f"], to=FLOAT)],
        [helper.make_tensor_value_info("b", TensorProto.UINT8, ["N", 2])],
        [helper.make_tensor_value_info("f", FLOAT, ["N", 2])],
    )
    teacher = from_onnx(path, gives="values", inputs={"b": "x"})
    assert teacher(Batch(("a",), {"x": torch.tensor([[255, 0]])})).values.tolist() == [[255.0, 0.0]]
    for wrong in (torch.tensor([[300, 0]]), torch.tensor([[0.5, 0.0]])):
        with pytest.raises(SignalError, match="holds what uint8 cannot.*example 'a'"):
            teacher(Batch(("a",), {"x": wrong}))
    with pytest.raises(ShapeError, match=r"rows of \[3\]; input 'b' takes \[2\]"):
        teacher(Batch(("a",), {"x": torch.tensor([[1, 2, 3]])}))
    with pytest.raises(DataError, match="holds texts"):
        teacher(Batch(("a",), {"x": ("text",)}))


def test_a_file_of_texts_is_asked_about_texts(tmp_path):
    """A column of texts feeds an input of strings."""
    node = helper.make_node(
        "LabelEncoder", ["t"], ["v"], domain="ai.onnx.ml", keys_strings=["yes", "no"], values_floats=[1.0, -1.0]
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("t", TensorProto.STRING, ["N", 1])],
        [helper.make_tensor_value_info("v", FLOAT, ["N", 1])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "t.onnx"))
    teacher = from_onnx(tmp_path / "t.onnx", gives="values", inputs={"t": "text"})
    assert teacher(Batch(("a", "b"), {"text": ("no", "yes")})).values.tolist() == [[-1.0], [1.0]]
    with pytest.raises(DataError, match="holds numbers"):
        teacher(Batch(("a",), {"text": torch.zeros(1, 1)}))


def test_who_it_is_follows_from_the_weights_beside_the_file(tmp_path):
    """Weights in a file of their own are part of the identity: other weights, another teacher."""
    digests = []
    for name, factor in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        path = linear(
            tmp_path / name / "m.onnx",
            save_as_external_data=True,
            location="w.bin",
            size_threshold=0,
            convert_attribute=False,
        )
        content = np.frombuffer((path.parent / "w.bin").read_bytes(), dtype=np.float32)
        (path.parent / "w.bin").write_bytes((content * np.float32(factor)).tobytes())
        digests.append(from_onnx(path, gives="probabilities").identity.digest)
    assert file_digest(tmp_path / "one" / "m.onnx") == file_digest(tmp_path / "two" / "m.onnx")
    assert digests[0] != digests[1]


def test_answers_that_are_not_finite_name_the_example(tmp_path):
    path = linear(tmp_path / "z.onnx", softmax=False)
    for gives in ("values", "logits"):
        with pytest.raises(SignalError, match="NaN or infinity for example 'b'"):
            from_onnx(path, gives=gives)(Batch(("a", "b"), {"x": torch.tensor([[1.0, 1.0], [math.nan, 0.0]])}))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no file nothing\.onnx"):
        from_onnx("nothing.onnx", gives="logits", folder=tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(UsageError, match=r"cannot open bad\.onnx"):
        from_onnx("bad.onnx", gives="logits", folder=tmp_path)


def test_a_black_box_is_recorded_and_taught(tmp_path):
    """A student that sees only what the file answered ends where the file is: 3 classes of 2 numbers, a linear map."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 2
    rows = sr.Table({"x": x}, tuple(map(str, range(400))), classes=("a", "b", "c"))
    teacher = from_onnx(linear(tmp_path / "p.onnx"), gives="probabilities", classes=("a", "b", "c"))
    recording = sr.record(teacher, rows, tmp_path / "recording", progress=False)
    torch.testing.assert_close(
        recording(rows.batch([3, 1])).logits.values.log_softmax(-1),
        (x[[3, 1]] @ torch.from_numpy(WEIGHT)).log_softmax(-1),
        atol=2e-3,
        rtol=2e-3,
    )
    student = sr.Student.make("stillroom.students.architectures:mlp", {"inputs": 2, "outputs": 3, "hidden": [16]})
    plan = sr.Plan(epochs=60, batch_size=50, learning_rate=0.02)
    trained = sr.fit(student, recording, rows, sr.SoftTargets(), plan=plan, folder=tmp_path / "s", progress=False)
    probe = rows.batch(range(400))
    same = trained.predict(probe).logits.values.argmax(-1) == teacher(probe).logits.values.argmax(-1)
    assert same.float().mean() > 0.95


def test_a_recipe_names_it(tmp_path):
    """{use: onnx, model: FILE}, looked up beside the recipe; the gate reads its licence without asking it."""
    from stillroom.recipes.gating import question
    from stillroom.recipes.named import TEACHERS, call
    from stillroom.recipes.recipe import Use
    from stillroom.recipes.yaml_file import check_recipe

    linear(tmp_path / "p.onnx")
    use = Use(use="onnx", model="p.onnx", gives="probabilities", licence="MIT", inputs={"x": "x"})
    teacher = call(use, TEACHERS, tmp_path, "teacher", {"folder": tmp_path, "classes": ("a", "b", "c")})
    assert teacher.identity.classes == ("a", "b", "c")
    rows = sr.Table({"x": X}, tuple("abcde"), licence="CC0-1.0")
    recipe = check_recipe(
        {
            "name": "r",
            "data": {"source": {"use": "a.py:b"}},
            "teacher": use.model_dump(),
            "student": {"use": "mlp", "inputs": 2},
        }
    )
    asked = question(recipe, tmp_path, rows, lambda _: pytest.fail("the teacher was built for the gate"))
    (source,) = [source for source in asked.sources if source.role == "outputs"]
    assert (source.name, source.licence) == ("p", "MIT")

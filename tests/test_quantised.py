"""A student trained in int8 or int4: the rounding by hand, training through it, and the same integers in the file."""

import functools
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from stillroom.data import Table
from stillroom.divergences import forward_kl
from stillroom.errors import DataError, UsageError
from stillroom.exporting import export
from stillroom.exporting.onnx.runtime import run_of
from stillroom.fitting import fit
from stillroom.loading import load
from stillroom.objectives import SoftTargets
from stillroom.plan import Plan
from stillroom.students.architectures import mlp, small_cnn
from stillroom.students.networks import Student
from stillroom.students.quantised import quantised
from stillroom.students.rounding import Rounded, Rounding, groups_of, range_of, round_layers, rounded_layers, spread
from stillroom.teachers import from_network

CLASSES = ("a", "b", "c", "d")


@functools.cache
def points(rows=192, size=8):
    """Images whose class is their brightest quarter, hidden in noise."""
    torch.manual_seed(3)
    labels = torch.arange(rows) % 4
    x = torch.rand(rows, size, size) * 0.6
    half = size // 2
    for row, label in enumerate(labels.tolist()):
        x[row, (label // 2) * half :, (label % 2) * half :][:half, :half] += 0.4
    return Table({"x": x}, tuple(f"p{row}" for row in range(rows)), labels, CLASSES)


@functools.cache
def teacher():
    torch.manual_seed(1)
    net = small_cnn(1, 4, width=12, size=8)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    batch = points().batch(range(192))
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(batch.inputs["x"]), batch.labels).backward()
        optimiser.step()
    return from_network(net, classes=CLASSES, name="teacher")


@functools.cache
def floating(kind):
    """A float student of each kind that has learned from the teacher."""
    made = {
        "cnn": lambda: Student.make(small_cnn, {"channels": 1, "classes": 4, "width": 4, "size": 8}, classes=CLASSES),
        "mlp": lambda: Student.make(mlp, {"inputs": 64, "outputs": 4, "hidden": [17, 32]}, classes=CLASSES),
    }[kind]()
    plan = Plan(steps=90, batch_size=32, learning_rate=5e-3)
    return fit(made, teacher(), points(), SoftTargets(), plan=plan, progress=False)


def train(student, steps=40, **rest):
    plan = Plan(steps=steps, batch_size=32, learning_rate=1e-3, **rest.pop("plan", {}))
    return fit(student, teacher(), points(), SoftTargets(), plan=plan, progress=False, **rest)


def layer_of(weight, bias=None, precision="int8", group=32):
    rows, columns = len(weight), len(weight[0])
    net = nn.Sequential(nn.Linear(columns, rows, bias=bias is not None))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(weight))
        if bias is not None:
            net[0].bias.copy_(torch.tensor(bias))
    round_layers(net, Rounding(precision, group))
    return net[0]


def test_int8_weights_by_hand():
    """One scale per output, the largest weight at 127; halves go to even numbers."""
    layer = layer_of([[1.27, -0.3, 0.004], [0.0, 0.0, 0.0]])
    integers, scales = layer.rounded.integers(layer)
    assert integers.tolist() == [[127, -30, 0], [0, 0, 0]]
    assert scales[0].item() == pytest.approx(0.01)
    assert spread(integers, scales)[0].tolist() == pytest.approx([1.27, -0.30, 0.0])


def test_a_rounded_layer_by_hand():
    """Input -> 8 bits, bias -> a multiple of both scales: y = 0.05 * 0.01 * (20*127 - 40*30 + 100)."""
    layer = layer_of([[1.27, -0.3]], bias=[0.0502])
    layer.rounded.scale.fill_(0.05)
    layer.rounded.zero.fill_(-8)
    assert layer(torch.tensor([[1.01, 2.02]])).item() == pytest.approx(0.05 * 0.01 * (20 * 127 - 40 * 30 + 100))
    beyond = layer(torch.tensor([[1e6, -1e6]])).item()  # cut to 127 + 8 and -128 + 8 steps
    assert beyond == pytest.approx(0.05 * 0.01 * (135 * 127 + 120 * 30 + 100))


def test_int4_groups_by_hand():
    """Each group of inputs has a scale of its own; the integers are -8 .. 7."""
    weight = [[0.7, -0.3, 0.1, 0.0, 70.0, -30.0, 10.0, 20.0]]
    layer = layer_of(weight, precision="int4", group=4)
    integers, scales = layer.rounded.integers(layer)
    assert integers.tolist() == [[7, -3, 1, 0, 7, -3, 1, 2]]
    assert scales.tolist()[0] == pytest.approx([0.1, 10.0])
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), x @ torch.tensor(weight).T, atol=1e-4)


def test_int4_cuts_an_outlier_where_that_is_nearer():
    """The scale is the one of the least squared error among those tried, not that of the largest weight."""
    weight = [[1.0, *[0.2142, -0.2142] * 30]]
    layer = layer_of(weight, precision="int4", group=64)
    integers, scales = layer.rounded.integers(layer)
    error = (spread(integers, scales) - layer.weight).square().sum()
    whole = (layer.weight / (1 / 7)).round().clamp(-8, 7) / 7
    assert error < (whole - layer.weight).square().sum() / 2


@pytest.mark.parametrize(("inputs", "groups"), [(64, 2), (17, 1), (33, 1)])
def test_a_group_that_does_not_divide_is_one_scale_per_output(inputs, groups):
    """deploy: torchao raises at 17 inputs and a caught error leaves a float network that calls itself quantised."""
    layer = layer_of([[0.1] * inputs] * 3, precision="int4")
    assert groups_of(layer, layer.rounded.rounding) == groups
    assert layer.rounded.integers(layer)[1].shape == (3, groups)


def test_a_bias_fits_int32_however_small_the_weights():
    layer = layer_of([[1e-9, 0.0]], bias=[3.0])
    integers, step = layer.rounded.bias(layer)
    assert abs(integers.item()) < 2**31
    assert (integers * step).item() == pytest.approx(3.0, rel=1e-6)


def test_gradients_pass_the_rounding():
    """Those of the layer at its rounded values; none for an input beyond the range."""
    torch.manual_seed(0)
    layer = layer_of(torch.randn(3, 5).tolist(), bias=[0.1, 0.2, 0.3])
    layer.rounded.scale.fill_(4 / 255)
    x = (torch.rand(7, 5) * 3 - 1.5).requires_grad_()
    with torch.no_grad():
        x[0, 0] = 9.0
    weight, bias = (t.detach().clone().requires_grad_() for t in layer.rounded(layer, x)[1:])
    rounded = torch.fake_quantize_per_tensor_affine(x.detach(), 4 / 255, 0, -128, 127).requires_grad_()
    nn.functional.linear(rounded, weight, bias).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad)
    assert torch.equal(layer.bias.grad, bias.grad)
    assert x.grad[0, 0] == 0
    assert torch.equal(x.grad[1:], rounded.grad[1:])


def test_ranges_hold_zero_and_cut_rare_outliers():
    """Padding and the zeros of a ReLU are exact; what is cut lowers the squared error."""
    scale, zero = range_of(torch.rand(1000) + 3)
    assert zero == -128
    assert scale == pytest.approx(4 / 255, rel=0.02)
    many = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([8.0])])
    scale, _ = range_of(many)
    assert scale < float(many.max() - many.min()) / 255 * 0.99
    assert range_of(torch.zeros(4))[0] > 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_every_layer_is_rounded(kind, precision):
    """deploy: 'check that the fake-quantised layers are really there'."""
    made = quantised(floating(kind), precision, points())
    wanted = [name for name, module in floating(kind).net.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert list(rounded_layers(made.net)) == wanted
    for layer in rounded_layers(made.net).values():
        layer(torch.rand(2, *((layer.in_channels, 8, 8) if isinstance(layer, nn.Conv2d) else (layer.in_features,))))
        integers, _ = layer.rounded.integers(layer)
        assert len(integers.unique()) <= (16 if precision == "int4" else 255)
    batch = points().batch(range(64))
    change = (made.predict(batch).logits.values - floating(kind).predict(batch).logits.values).abs().max()
    assert 0 < change < (0.5 if precision == "int8" else 5.0)
    assert not any(isinstance(module, Rounded) for module in floating(kind).net.modules())  # the one given is as it was


def test_batch_normalisation_becomes_part_of_the_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    net(torch.rand(16, 1, 8, 8) * 3)
    net.eval()
    x = torch.rand(4, 1, 8, 8)
    wanted = net(x)
    round_layers(net, Rounding("int8"))
    assert isinstance(net[1], nn.Identity)
    for layer in rounded_layers(net).values():
        layer.__class__ = type(layer).__mro__[1]
    assert torch.allclose(net(x), wanted, atol=1e-5)


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def test_what_a_subclass_does_is_its_own_affair():
    net = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.TransformerEncoderLayer(4, 1, 8))
    assert round_layers(net, Rounding("int4")) == ["0", "2.linear1", "2.linear2"]


def test_what_cannot_be_rounded_says_so(tmp_path):
    nothing = Student(nn.Flatten())
    with pytest.raises(UsageError, match=r"no nn\.Linear or nn\.Conv2d"):
        quantised(nothing, "int4")
    with pytest.raises(UsageError, match="pass examples="):
        quantised(floating("mlp"), "int8")
    with pytest.raises(UsageError, match=r"'int6'.*int8"):
        quantised(floating("mlp"), "int6")
    twice = quantised(floating("mlp"), "int4")
    with pytest.raises(UsageError, match="int4 already"):
        quantised(twice, "int4")
    with pytest.raises(UsageError, match="group is 1"):
        quantised(floating("mlp"), "int4", group=1)
    bad = Table({"x": torch.full((4, 8, 8), float("inf"))}, tuple("abcd"))
    with pytest.raises(DataError, match="'hidden1' are not finite"):
        quantised(floating("mlp"), "int8", bad)


def divergence(student):
    batch = points().batch(range(192))
    with torch.no_grad():
        return float(forward_kl(student.predict(batch).logits, teacher()(batch).logits).mean())


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_training_rounded_is_nearer_to_the_teacher_than_rounding_after_training(kind):
    start = quantised(floating(kind), "int4", points())
    assert divergence(train(start)) < 0.8 * divergence(start)


class Stop(Exception):
    pass


def stop_at(step):
    def watch(row):
        if row.step == step:
            raise Stop

    return watch


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_killed_training_goes_on_bit_for_bit(precision, tmp_path):
    """Scales and zero points are in the state."""
    start = quantised(floating("cnn"), precision, points())
    whole = train(start, folder=tmp_path / "whole")
    with pytest.raises(Stop):
        train(start, folder=tmp_path / "cut", checkpoint_seconds=0, watchers=[stop_at(11)])
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    torch.rand(5)
    train(start, folder=tmp_path / "cut")
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    batch = points().batch(range(32))
    opened = load(tmp_path / "cut")
    assert opened.rounding == start.rounding
    assert torch.equal(opened.predict(batch).logits.values, whole.predict(batch).logits.values)
    assert json.loads((tmp_path / "cut" / "student.json").read_text())["rounding"]["precision"] == precision


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_how_a_batch_is_split_changes_nothing(precision):
    """Ranges are fixed before training: observers that follow the micro-batches would differ."""
    start = quantised(floating("cnn"), precision, points())
    whole, split = (train(start, steps=6, plan={"accumulation": n}).net.state_dict() for n in (1, 4))
    for name, tensor in whole.items():
        assert torch.allclose(tensor.float(), split[name].float(), atol=2e-5), name


def test_low_precision_trains():
    made = train(quantised(floating("cnn"), "int8", points()), steps=5, plan={"precision": "bf16"})
    assert all(tensor.isfinite().all() for tensor in made.net.state_dict().values())


class Untouchable:
    def __len__(self):
        raise AssertionError("what was trained needs no calibration")


SHIPPED = [
    ("cnn", "int8"),
    ("mlp", "int4"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("cnn", "int4"), ("mlp", "int8"))),
]


@pytest.mark.parametrize(("kind", "precision"), SHIPPED)
def test_what_ships_are_the_integers_that_were_trained(kind, precision, tmp_path):
    """And the scales; ONNX Runtime answers as the student did in training, nothing was calibrated."""
    student = train(quantised(floating(kind), precision, points()), steps=20)
    made = export(student, points(), tmp_path, precision=precision, calibration=Untouchable(), progress=False)
    held = {
        t.name: torch.tensor(numpy_helper.to_array(t).astype("float64")) for t in onnx.load(made.path).graph.initializer
    }
    for name, layer in rounded_layers(student.net).items():
        integers, scales = layer.rounded.integers(layer)
        mark = "" if precision == "int8" else "int4_"
        found, steps = held[f"net.{name}.{mark}weight"], held[f"net.{name}.{'weight_' if mark == '' else ''}scale"]
        turned = found.shape != integers.shape or (scales.shape[1] > 1 and precision == "int4")
        assert torch.equal(found.T if turned else found, integers.double()), name
        assert torch.equal((steps.T if turned else steps).flatten(), scales.flatten().double()), name
    said = made.verify["quantisation"]
    assert said["method"] == "trained"
    assert said["precision"] == precision
    parameters = sum(p.numel() for p in student.net.parameters())
    weights = sum(len(t.raw_data) for t in onnx.load(made.path).graph.initializer)
    # scales, and a zero point of its own for each weight, are much of so small a network
    assert weights < (1.5 if precision == "int8" else 0.9) * parameters
    assert made.verify["agreement"] >= 0.99
    limit = 1e-4 if precision == "int4" else 0.05
    assert made.verify["largest_difference"] <= limit * 10


@pytest.mark.parametrize(
    ("target", "precision", "reason"),
    [
        ("onnx", "fp32", "trained in int8: choose that"),
        ("onnx", "int4", "trained in int8: choose that"),
        ("gguf", "q8_0", "trained in int8, which this target has not"),
    ],
)
def test_another_precision_is_refused(target, precision, reason, tmp_path):
    student = quantised(floating("mlp"), "int8", points())
    with pytest.raises(UsageError, match=reason):
        export(student, points(), tmp_path, target, precision, progress=False)


def test_sums_of_products_do_not_saturate():
    """ONNX Runtime, by default on x86 without VNNI: 127 * 127 twice is more than 16 bits hold, and was cut there."""
    one, zero = numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(np.int8(0), "zero")
    weight = numpy_helper.from_array(np.full((64, 8), 127, np.int8), "weight")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "one", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "one", "zero"], ["matrix"]),
        helper.make_node("MatMul", ["rounded", "matrix"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 64), ("y", 8))]
    graph = helper.make_graph(nodes, "sums", ends[:1], ends[1:], [one, zero, weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert run_of(model.SerializeToString())((torch.full((1, 64), 127.0),)).tolist() == [[127.0 * 127 * 64] * 8]

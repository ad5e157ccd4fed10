"""Preflight: each way in which a pair goes silently wrong is caught before anything long starts."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

import stillroom as sr
from stillroom.checking import Check, Estimate, estimate, preflight, show
from stillroom.data import Noise, Table
from stillroom.errors import DataError
from stillroom.students.architectures import mlp
from stillroom.students.networks import Student

DIGITS = load_digits()
CLASSES = tuple(map(str, range(10)))


def digits(count=400, **changes):
    x = torch.tensor(DIGITS.data[:count] / 16, dtype=torch.float32)
    table = Table(
        {"x": x}, tuple(f"d{i}" for i in range(count)), torch.tensor(DIGITS.target[:count]), CLASSES, name="digits"
    )
    return dataclasses.replace(table, **changes)


@pytest.fixture(scope="module")
def taught():
    """A real teacher: a perceptron with dropout and batch normalisation that has learned the digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 10))
    data = digits()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(data.columns["x"]), data.labels).backward()
        optimiser.step()
    return net


def student(**changes):
    made = Student.make(mlp, {"inputs": 64, "outputs": 10, "hidden": (8,)}, classes=CLASSES)
    return dataclasses.replace(made, **changes)


def failed(teacher, learner=None, data=None, objective=None, **rest):
    """The failed checks by name."""
    data = data or digits()
    checks = preflight(
        teacher, learner or student(), data, objective or sr.SoftTargets(), labelled=rest.pop("labelled", data), **rest
    )
    assert all(check.detail for check in checks)
    assert all(bool(check.remedy) != check.passed for check in checks)
    return {check.name: check for check in checks if not check.passed}


def teacher_of(net, classes=CLASSES):
    return sr.from_network(net, classes=classes)


def test_a_good_pair_passes_and_the_teachers_accuracy_is_shown(taught):
    learner, before = student(), torch.random.get_rng_state()
    state = {name: tensor.clone() for name, tensor in learner.net.state_dict().items()}
    checks = preflight(teacher_of(taught), learner, digits(), sr.SoftTargets(), labelled=digits())
    assert all(check.passed for check in checks), checks
    (score,) = [check for check in checks if "guessing" in check.name]
    assert "of 200 labelled right (9" in score.detail or "(100" in score.detail
    assert all(torch.equal(state[name], tensor) for name, tensor in learner.net.state_dict().items())
    assert torch.equal(before, torch.random.get_rng_state())


def test_teacher_silently_wrong_weights_not_loaded(taught):
    """open-mmlab/mmrazor#456: the teacher's weights were never loaded; it answers, and guesses."""
    blank = nn.Sequential(*[type(m)(*a) for m, a in zip(taught, [(64, 48), (48,), (), (0.3,), (48, 10)], strict=True)])
    found = failed(teacher_of(blank))
    assert set(found) == {"teacher is better than guessing"}
    assert "weights are loaded" in found["teacher is better than guessing"].remedy


def test_teacher_silently_wrong_class_order(taught):
    """zgcr/SimpleAICV_pytorch_training_examples#23: right answers under other numbers.

    Found by the names where the teacher says its order, and by the score where it does not.
    """
    swapped = tuple(reversed(CLASSES))
    found = failed(teacher_of(taught, swapped))["class order"]
    assert "teacher: 9, 8" in found.detail
    assert "data: 0, 1" in found.detail

    def silent(batch):
        logits = teacher_of(taught)(batch).need_logits().values
        return sr.Signal(logits=sr.Dense(logits.flip(1)))

    assert "teacher is better than guessing" in failed(silent)


def test_teacher_silently_wrong_blind_encoder(taught):
    """ZiwenZhuang/parkour#82: the encoder saw nothing of its input, so every answer is the same."""

    def blind(batch):
        return teacher_of(taught)(dataclasses.replace(batch, inputs={"x": batch.inputs["x"] * 0}))

    assert "teacher is better than guessing" in failed(blind)


def test_teacher_silently_wrong_input_scale():
    """The teacher learned pixels of 0..1 and is given 0..16; its score falls to a guess or so."""

    def fragile(batch):
        seen = (batch.inputs["x"].mean(1, keepdim=True) * 40).long() % 10
        return sr.Signal(logits=sr.Dense(nn.functional.one_hot(seen[:, 0], 10).float()))

    assert "teacher is better than guessing" in failed(fragile)


@pytest.mark.parametrize("part", ["dropout", "batch statistics"])
def test_a_teacher_in_training_mode_is_caught_behind_any_function(taught, part):
    """vrvlive/knowlege-distillation#2: no attribute says so here; its answers do."""
    net = nn.Sequential(*taught)

    def teacher(batch):
        net.eval()
        net[3 if part == "dropout" else 1].train()
        with torch.no_grad():
            return sr.Signal(logits=sr.Dense(net(batch.inputs["x"])))

    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        found = failed(teacher)["teacher answers in evaluation mode"]
    finally:
        net.load_state_dict(state)
    assert ".eval()" in found.remedy
    assert ("asked twice" if part == "dropout" else "share a batch") in found.detail


def test_a_network_left_in_training_mode_is_caught_by_its_flag(taught):
    class Own:
        net = taught

        def __call__(self, batch):
            return sr.Signal(logits=sr.Dense(self.net(batch.inputs["x"])))

    taught.train()
    try:
        assert "training mode" in failed(Own())["teacher answers in evaluation mode"].detail
    finally:
        taught.eval()


class Blind(nn.Module):
    """Syencil/mobile-yolov5-pruning-distillation#83: the student's output is detached on the way."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.used(x).detach()


class HalfBlind(Blind):
    def forward(self, x):
        return self.used(x) + self.unused(x).detach()


@pytest.mark.parametrize(("net", "message"), [(Blind(), "no gradient reaches the student"), (HalfBlind(), "unused")])
def test_a_student_without_gradient(taught, net, message):
    found = failed(teacher_of(taught), student(net=net))
    assert message in found["gradient reaches the student only"].detail


def test_a_student_whose_units_are_all_dead(taught):
    learner = student()
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter.mul_(0)

    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = learner.net

        def forward(self, x):
            return self.net(x) * 0

    found = failed(teacher_of(taught), student(net=Dead()))
    assert "0 in every parameter" in found["gradient reaches the student only"].detail


def test_an_objective_that_teaches_the_teacher(taught):
    def leaky(ours, theirs, batch):
        gap = ours.need_logits().values - theirs.need_logits().values
        return {"leaky": gap.square().mean(-1)}

    assert "teacher's answer" in failed(teacher_of(taught), objective=leaky)["gradient reaches the student only"].detail


def test_an_objective_that_is_not_zero_between_equals(taught):
    """Teacher logits on both sides, or cross-entropy in place of a divergence, go unnoticed otherwise."""

    def wrong(ours, theirs, batch):
        probabilities = theirs.need_logits().values.detach().softmax(-1)
        return {"soft_targets": -(probabilities * ours.need_logits().values.log_softmax(-1)).sum(-1)}

    assert "teacher against itself is 0" in failed(teacher_of(taught), objective=wrong)


def test_nan_far_down_the_data(taught):
    """Rows from all over are looked at, not the first few."""
    x = digits().columns["x"].clone()
    x[200:, 3] = float("nan")
    found = failed(teacher_of(taught), data=digits(columns={"x": x}))
    assert "holds NaN" in found["data"].detail
    assert "'d2" in found["data"].detail


def test_inputs_that_are_all_the_same_and_masks_that_hide_everything(taught):
    same = digits(columns={"x": torch.ones(400, 64)})
    assert "the same in" in failed(teacher_of(taught), data=same)["data"].detail
    hidden = digits(mask=torch.zeros(400, dtype=torch.bool))
    assert "no position counts" in failed(teacher_of(taught), data=hidden)["data"].detail
    empty = Table({"text": ("", " ")}, ("a", "b"))
    checks = preflight(None, student(), empty, sr.HardLabels())
    assert "no text" in checks[0].detail
    with pytest.raises(DataError, match="0 rows"):
        preflight(None, student(), digits().select([]), sr.SoftTargets())


def test_widths_that_do_not_fit(taught):
    narrow = Student.make(mlp, {"inputs": 64, "outputs": 9}, classes=CLASSES)
    assert "9 logits for 10 classes" in failed(teacher_of(taught), narrow)["class order"].detail
    assert "8 logits" in failed(teacher_of(mlp(64, 8)))["class order"].detail


def test_a_teacher_that_cannot_answer_is_a_failed_check_not_a_traceback():
    def broken(batch):
        return batch.inputs["y"]

    found = failed(broken)
    assert "KeyError" in found["teacher answers in evaluation mode"].detail
    found = failed(teacher_of(mlp(63, 10)))
    assert "shape" in found["teacher answers in evaluation mode"].detail


def test_labels_sorted_by_class_and_few_labels(taught):
    """Folders of images come sorted; a handful of labels cannot prove anything, and does not fail a good teacher."""
    data = digits()
    ordered = data.select(data.labels.argsort().tolist())
    assert not failed(teacher_of(taught), labelled=ordered)
    assert not failed(teacher_of(taught), labelled=data.select([0, 1]))
    one = data.select((data.labels == 3).nonzero().flatten().tolist())
    assert not failed(teacher_of(taught), labelled=one)


def test_values_and_augmented_examples(taught):
    """Continuous answers, views and no teacher at all are looked at too."""
    data = digits(labels=torch.randn(400, 2), classes=None, augment=Noise(0.1))
    teacher = sr.from_network(mlp(64, 2), answers="values")
    learner = Student.make(mlp, {"inputs": 64, "outputs": 2}, answers="values")
    assert not failed(teacher, learner, data, sr.MatchValues())
    assert not failed(None, student(), digits(), sr.HardLabels())


def test_the_estimate_grows_with_the_work(taught):
    plan = sr.Plan(epochs=2, views=1)
    small = estimate(teacher_of(taught), student(), digits(100), sr.SoftTargets(), plan)
    large = estimate(teacher_of(taught), student(), digits(400), sr.SoftTargets(), dataclasses.replace(plan, views=4))
    assert large.disk_bytes == 16 * small.disk_bytes == 16 * 100 * (40 + 32)
    assert small.record_seconds > 0
    assert small.fit_seconds > 0
    assert small.memory_bytes >= 4 * 4 * (64 * 8 + 8 + 80 + 10)


def test_shown_with_what_to_do():
    console = Console(width=100, record=True, file=io.StringIO())
    checks = (Check("data", True, "fine"), Check("class order", False, "they differ: [0]", "Give all the same order."))
    console.print(show(checks, Estimate(30.0, 600.0, 5_000_000, 10_000_000)))
    text = console.export_text()
    assert "ok" in text
    assert "FAIL" in text
    assert "they differ: [0]" in text
    assert "Give all the same order." in text
    assert "record 30 s, fit 10 min a training, 5.0 MB on disk" in text


def test_the_public_name_is_the_function_every_time():
    """A module of the same name would take its place once it is imported."""
    assert sr.preflight is preflight
    assert sr.preflight is preflight

"""Objectives and measures of actions: values by hand, limits, Gaussians, masks, gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence

import stillroom as sr
from stillroom.actions import gaussian_kl
from stillroom.errors import ShapeError, UsageError
from stillroom.measures import METRICS, action_metrics
from stillroom.objectives import MatchActions, MatchGaussians, masked_mean
from stillroom.recipes.parts import metrics_of, objective_of
from stillroom.recipes.recipe import Evaluate, Use
from stillroom.types import Batch, Signal

NAN = float("nan")
OBJECTIVES = [
    MatchActions(),
    MatchActions("huber", delta=0.3, weights=(1, 0.5, 2, 0), clip=(-0.5, (0.5, 1, 2, 0.1))),
    MatchActions(clip=(-1, 1), actions=2),
    MatchGaussians(),
    MatchGaussians("reverse"),
]
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:40])


def batch(count, **rest):
    return Batch(tuple(map(str, range(count))), {}, **rest)


def term(objective, student, teacher, **rest):
    (found,) = objective(Signal(values=student), Signal(values=teacher), batch(len(student), **rest)).values()
    return found


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (MatchActions(), (0.25 + 4) / 2),
        (MatchActions("huber"), (0.125 + 1.5) / 2),  # 0.5^2 / 2; 1 (2 - 1/2)
        (MatchActions("huber", delta=0.25), (0.25 * 0.375 + 0.25 * 1.875) / 2),
        (MatchActions(weights=(3, 1)), (3 * 0.25 + 4) / 4),
        (MatchActions(weights=(0, 2)), 4.0),
        (MatchActions(clip=(-1, 1)), (0.25 + 0) / 2),  # the teacher's 4 is executed as 1, and so is the student's 2
        (MatchActions(clip=((-1, -1), (1, 3))), (0.25 + 1) / 2),
        (MatchActions(actions=1), 0.25),
    ],
    ids=str,
)
def test_actions_by_hand(objective, expected):
    """Student (1, 2), teacher (0.5, 4)."""
    assert term(objective, row(1.0, 2.0), row(0.5, 4.0)).tolist() == [pytest.approx(expected, abs=1e-15)]


def test_weights_are_ratios_and_equal_ones_change_nothing():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    plain = term(MatchActions(), student, teacher)
    torch.testing.assert_close(term(MatchActions(weights=(7, 7, 7)), student, teacher), plain)


def test_beyond_a_limit_is_the_same_action_and_the_wrong_side_still_teaches():
    """A clamp on both sides would leave a student at -5, whose teacher says 3, without any gradient."""
    student = torch.tensor([[5.0], [-5.0], [0.9]], requires_grad=True)
    teacher = torch.tensor([[3.0], [3.0], [3.0]])
    found = term(MatchActions(clip=(-1, 1)), student, teacher)
    assert found.tolist() == pytest.approx([0.0, 36.0, 0.01])
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0.0, -12.0, -0.2], abs=1e-6)


def test_gaussians_by_hand():
    """Teacher N(0, 1), student N(1, 2): forward log 2 + (1 + 1) / 8 - 1/2; reverse -log 2 + (4 + 1) / 2 - 1/2."""
    student, teacher = row(1.0, math.log(2)), row(0.0, 0.0)
    forward, reverse = (term(MatchGaussians(way), student, teacher) for way in ("forward", "reverse"))
    assert forward.tolist() == [pytest.approx(math.log(2) + 0.25 - 0.5)]
    assert reverse.tolist() == [pytest.approx(-math.log(2) + 2.5 - 0.5)]
    both = torch.cat([row(1.0, 1.0), row(math.log(2), math.log(2))], -1)
    twice = term(MatchGaussians(), both, torch.zeros(1, 4, dtype=torch.float64))
    assert twice.tolist() == [pytest.approx(2 * (math.log(2) - 0.25))]  # a sum over D, not a mean


@given(st.integers(0, 10_000))
def test_gaussians_are_those_of_torch_distributions(seed):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(6, 8, generator=draw, dtype=torch.float64) for _ in range(2))

    def gaussian(values):
        mean, log_std = values.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)

    found = term(MatchGaussians(), student, teacher)
    torch.testing.assert_close(found, kl_divergence(gaussian(teacher), gaussian(student)))
    assert bool((found >= 0).all())


def test_nearly_equal_gaussians_keep_their_digits():
    """At a difference d of the logs the KL is d^2 up to d^3; the textbook formula gives 0 or less in float32."""
    d = 1e-4
    first, second = torch.tensor([[0.0, d]]), torch.zeros(1, 2)
    assert gaussian_kl(first, second).item() == pytest.approx(d**2, rel=2e-3)


@each
def test_equal_is_zero(objective):
    values = 3 * torch.randn(5, 4)
    assert term(objective, values, values).tolist() == pytest.approx([0.0] * 5, abs=1e-7)


@each
def test_gradients(objective):
    draw = torch.Generator().manual_seed(3)
    student = torch.randn(3, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda values: term(objective, values, teacher.detach()), (student,))
    term(objective, student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@each
def test_masked_is_removed(objective):
    student, teacher = torch.randn(4, 3, 4), torch.randn(4, 3, 4)
    mask = torch.tensor([[True, False, True]] * 4)
    spoiled = torch.where(mask.unsqueeze(-1), student, NAN).requires_grad_()
    spoiled_teacher = torch.where(mask.unsqueeze(-1), teacher, NAN)
    found = masked_mean(term(objective, spoiled, spoiled_teacher, mask=mask), mask)
    found.backward()
    wanted = term(objective, student[:, [0, 2]], teacher[:, [0, 2]]).mean()
    torch.testing.assert_close(found.detach(), wanted)
    assert spoiled.grad is not None
    assert bool(spoiled.grad[mask].isfinite().all())
    assert not spoiled.grad[~mask].any()


@each
def test_all_masked_is_zero_with_a_gradient(objective):
    student = torch.randn(2, 4, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool)
    found = masked_mean(term(objective, student, torch.randn(2, 4), mask=mask), mask)
    found.backward()
    assert found == 0
    assert student.grad is not None
    assert not student.grad.any()


@each
def test_low_precision_in_float32_out(objective):
    student, teacher = (torch.randn(64, 4).bfloat16() for _ in range(2))
    found = term(objective, student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), term(objective, student.double(), teacher.double()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("ours", [-1e4, -20.0, 0.0, 20.0, 1e4])
@pytest.mark.parametrize("theirs", [-1e4, 0.0, 1e4])
def test_gaussians_are_finite_and_lead_back_at_extremes(direction, ours, theirs):
    """Deviations from 0 to infinity: finite, and a step against the gradient goes towards the teacher's."""
    student = torch.tensor([[2.0, ours]], requires_grad=True)
    found = term(MatchGaussians(direction), student, torch.tensor([[2.0, theirs]]))
    found.sum().backward()
    assert student.grad is not None
    assert bool(found.isfinite())
    assert bool(student.grad.isfinite().all())
    pull, towards = -student.grad[0, 1].item(), max(min(theirs, 20), -20) - max(min(ours, 20), -20)
    assert math.copysign(1, pull) == math.copysign(1, towards) if towards else pull == 0


def test_huber_is_finite_with_its_gradient_at_extremes():
    student = torch.tensor([[3e38, -3e38]], requires_grad=True)
    term(MatchActions("huber"), student, torch.zeros(1, 2)).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MatchActions("l1"), "'mse' or 'huber'"),
        (lambda: MatchActions(delta=0), "delta=0"),
        (lambda: MatchActions(weights=(1, -1)), "not negative"),
        (lambda: MatchActions(weights=(0, 0)), "not all 0"),
        (lambda: MatchActions(clip=3), "low, high"),
        (lambda: MatchActions(clip=(1, -1)), "below its high"),
        (lambda: MatchActions(clip=((1, 2), (3, 4, 5))), "2 low limits and 3 high"),
        (lambda: MatchActions(actions=0), "at least one"),
        (lambda: MatchGaussians("both"), "'forward' or 'reverse'"),
        (lambda: action_metrics([]), "names of the actions"),
    ],
)
def test_settings_out_of_range_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()


@pytest.mark.parametrize(
    ("objective", "ours", "theirs", "says"),
    [
        (MatchActions(), 4, 8, r"\[2, 4\].*\[2, 8\].*actions=D"),
        (MatchActions(actions=5), 4, 8, "the student gives 4 values, but actions=5"),
        (MatchActions(weights=(1, 1)), 3, 3, "2 numbers, but there are 3"),
        (MatchActions(clip=((0, 0), (1, 1))), 3, 3, "2 numbers, but there are 3"),
        (MatchGaussians(), 4, 8, r"MatchActions\(actions=D\)"),
        (MatchGaussians(), 3, 3, "D log-deviations"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(objective, ours, theirs, says):
    with pytest.raises(ShapeError, match=says):
        term(objective, torch.zeros(2, ours), torch.zeros(2, theirs))


def test_a_recipe_names_them():
    named = objective_of(Use(use="match_actions", loss="huber", delta=0.1, clip=[-1, [1, 2]], weights=[1, 2]), None)
    assert named == MatchActions("huber", 0.1, (1, 2), (-1, (1, 2)))
    assert objective_of(Use(use="match_gaussians", direction="reverse"), None) == MatchGaussians("reverse")


def test_a_recorded_gaussian_teaches_a_student(tmp_path):
    """Means and log-deviations go through a recording and ``fit``; a student of means alone takes the first half."""
    torch.manual_seed(0)
    x = torch.randn(128, 3)
    examples = sr.Table({"x": x}, ids=tuple(map(str, range(128))))
    weight = torch.randn(3, 4)

    def teacher(rows):
        return Signal(values=(rows.inputs["x"] @ weight) / torch.tensor([1, 1, 4, 4]))

    recording = sr.record(teacher, examples, tmp_path / "recording", progress=False)
    plan = sr.Plan(steps=200, batch_size=64, learning_rate=0.1)
    for objective, outputs in ((MatchGaussians(), 4), (MatchActions(actions=2), 2)):
        made = sr.Student.make(nn.Linear, {"in_features": 3, "out_features": outputs}, answers="values")
        student = sr.fit(made, recording, examples, objective, plan=plan, progress=False)
        said = student.predict({"x": x}).values
        (left,) = objective(Signal(values=said), teacher(examples.batch(range(128))), batch(128)).values()
        assert left.mean() < 0.01


# Measures


def test_the_largest_error_is_seen_where_the_mean_hides_it():
    """One state of a thousand with another action: mean 0.0006, largest 0.6, in the second dimension."""
    theirs = torch.zeros(1000, 2)
    ours = theirs.clone()
    ours[7, 1] = 0.6
    numbers = {}
    for metric in (*action_metrics(["hip", "knee"]), METRICS["action_error"], METRICS["largest_action_error"]):
        numbers[metric.name] = metric.finish(metric.statistics(Signal(values=ours), Signal(values=theirs), batch(1000)))
    assert numbers == pytest.approx(
        {
            "action_error": 0.0003,
            "largest_action_error": 0.6,
            "action_error.hip": 0.0,
            "largest_action_error.hip": 0.0,
            "action_error.knee": 0.0006,
            "largest_action_error.knee": 0.6,
        }
    )


def test_errors_are_of_executed_actions_and_of_counted_positions():
    ours = torch.tensor([[[3.0, 9.0], [NAN, 0.0]], [[0.5, 9.0], [0.0, 0.0]]])
    theirs = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.25, 0.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    found = {}
    for metric in action_metrics(["grip"], clip=(-1, 1), gaussian=True):
        said = metric.statistics(Signal(values=ours), Signal(values=theirs), batch(2, mask=mask))
        found[metric.name] = metric.finish(said)
    assert found["action_error.grip"] == pytest.approx((0 + 0.5 + 0.25) / 3)
    assert found["largest_action_error.grip"] == pytest.approx(0.5)


def test_wrong_sizes_of_measured_actions_are_refused():
    metric = action_metrics(["a", "b", "c"])[-1]
    with pytest.raises(UsageError, match="there is no action 2"):
        metric.statistics(Signal(values=torch.zeros(1, 2)), Signal(values=torch.zeros(1, 2)), batch(1))
    with pytest.raises(ShapeError, match=r"\[1, 2\].*\[1, 3\]"):
        metric.statistics(Signal(values=torch.zeros(1, 2)), Signal(values=torch.zeros(1, 3)), batch(1))


def test_a_recipe_names_a_file_with_all_of_a_robots_errors(tmp_path):
    (tmp_path / "arm.py").write_text(
        "from stillroom.measures import action_metrics\n\nerrors = action_metrics(['x', 'grip'], clip=(-1, 1))\n"
    )

    class Recipe:
        evaluate = Evaluate(metrics=["mae", "arm.py:errors"])
        writes = None

    names = [metric if isinstance(metric, str) else metric.name for metric in metrics_of(Recipe(), tmp_path)]
    assert names[0] == "mae"
    assert names[-2:] == ["action_error.grip", "largest_action_error.grip"]

"""Columns that differ in kind, in one network: how they are matched, and how agreement is measured."""

import math

import pytest
import torch

from stillroom.errors import ShapeError, UsageError
from stillroom.measures.columns import by_column, distance, explained, same_side
from stillroom.objectives import MatchColumns, masked_mean
from stillroom.objectives.columns import bernoulli_kl
from stillroom.types import Batch, Signal

LOG_ODDS = torch.tensor([math.log(0.8 / 0.2)])


def batch(rows, mask=None):
    return Batch(tuple(map(str, range(rows))), {}, mask=mask)


def values(*rows):
    return Signal(values=torch.tensor(rows))


def test_bernoulli_kl_by_hand():
    """Teacher 0.8, student 0.5: 0.8 ln 1.6 + 0.2 ln 0.4; 0 on equal answers."""
    torch.testing.assert_close(
        bernoulli_kl(torch.zeros(1), LOG_ODDS), torch.tensor([0.8 * math.log(1.6) + 0.2 * math.log(0.4)])
    )
    assert float(bernoulli_kl(LOG_ODDS, LOG_ODDS)) == 0


def test_bernoulli_kl_is_the_two_class_kl():
    """The same number as KL over two classes with logits (0, z)."""
    from stillroom.divergences import forward_kl

    ours, theirs = torch.randn(2, 50, dtype=torch.float64) * 4
    two = [torch.stack([torch.zeros_like(z), z], -1) for z in (ours, theirs)]
    torch.testing.assert_close(bernoulli_kl(ours, theirs), forward_kl(*two), atol=1e-12, rtol=1e-9)


def test_bernoulli_kl_gradient():
    """It is the student's probability less the teacher's; to the teacher goes none."""
    ours = torch.randn(20, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: bernoulli_kl(z, theirs.detach()), ours)
    bernoulli_kl(ours, theirs).sum().backward()
    torch.testing.assert_close(ours.grad, ours.sigmoid() - theirs.sigmoid())
    assert theirs.grad is None


def test_bernoulli_kl_at_extremes():
    """A certain teacher (+-inf) is exact: -log of the student's share; far log-odds stay finite, as their gradient."""
    ours = torch.tensor([0.0, 0.0, 1e4, -1e4, 200.0], requires_grad=True)
    found = bernoulli_kl(ours, torch.tensor([math.inf, -math.inf, 1e4, 1e4, -300.0]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log(2), 0.0, 2e4 / 2, 200.0]))
    found.sum().backward()
    torch.testing.assert_close(ours.grad, torch.tensor([-0.5, 0.5, 0.0, -1.0, 1.0]))


def test_bernoulli_kl_in_low_precision():
    """bf16 in, float32 out, near the float64 value."""
    ours, theirs = torch.randn(2, 200).bfloat16()
    found = bernoulli_kl(ours, theirs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), bernoulli_kl(ours.double(), theirs.double()), atol=1e-5, rtol=1e-4)


def test_both_kinds_by_hand():
    """One probability and two numbers of scales 2 and 10: the numbers' term is the mean of (1/2)^2 and (5/10)^2."""
    objective = MatchColumns(probabilities=1, scales=(2.0, 10.0), weight=3.0)
    said = objective(values([0.0, 1.0, 5.0]), values([float(LOG_ODDS), 2.0, 0.0]), batch(1))
    torch.testing.assert_close(said["probabilities"], bernoulli_kl(torch.zeros(1), LOG_ODDS))
    torch.testing.assert_close(said["numbers"], torch.tensor([3 * 0.25]))
    same = objective(values([0.3, 1.0, 5.0]), values([0.3, 1.0, 5.0]), batch(1))
    assert [float(term) for term in same.values()] == [0.0, 0.0]
    assert set(MatchColumns(2)(values([0.0, 1.0]), values([0.0, 1.0]), batch(1))) == {"probabilities"}
    assert set(MatchColumns(0, (1.0,))(values([0.0]), values([1.0]), batch(1))) == {"numbers"}


def test_a_unit_does_not_change_what_is_learned():
    """The same property in milligrams or grams, with its scale: the same loss."""
    grams = MatchColumns(0, (0.5,))(values([1.0]), values([2.0]), batch(1))["numbers"]
    milligrams = MatchColumns(0, (500.0,))(values([1000.0]), values([2000.0]), batch(1))["numbers"]
    torch.testing.assert_close(grams, milligrams)


def test_masked_is_removed():
    """NaN at a row that does not count reaches neither the loss nor a gradient; where none counts it is 0, with one."""
    objective = MatchColumns(1, (1.0,))
    ours = torch.tensor([[0.5, 1.0], [math.nan, math.nan]], requires_grad=True)
    theirs = torch.tensor([[0.0, 0.0], [math.nan, 1.0]])
    kept = torch.tensor([True, False])
    said = objective(Signal(values=ours), Signal(values=theirs), batch(2, kept))
    total = sum(masked_mean(term, kept) for term in said.values())
    alone = objective(Signal(values=ours[:1]), Signal(values=theirs[:1]), batch(1))
    torch.testing.assert_close(total, sum(term.mean() for term in alone.values()))
    total.backward()
    assert ours.grad[1].tolist() == [0.0, 0.0]
    assert ours.grad[0].abs().min() > 0
    none = torch.tensor([False, False])
    fresh = torch.zeros(2, 2, requires_grad=True)
    said = objective(Signal(values=fresh), Signal(values=theirs), batch(2, none))
    total = sum(masked_mean(term, none) for term in said.values())
    total.backward()
    assert float(total.detach()) == 0
    assert fresh.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"probabilities": 0},
        {"probabilities": -1},
        {"probabilities": 1, "scales": (0.0,)},
        {"probabilities": 1, "scales": (math.nan,)},
        {"probabilities": 1, "weight": -1.0},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(UsageError):
        MatchColumns(**settings)


def test_another_number_of_columns_is_refused():
    with pytest.raises(ShapeError, match="is of 3 columns"):
        MatchColumns(2, (1.0,))(values([0.0, 0.0]), values([0.0, 0.0]), batch(1))


def test_it_is_an_objective_for_recipes():
    import stillroom as sr
    from stillroom.recipes.parts import objective_of
    from stillroom.recipes.recipe import Use

    made = objective_of(Use(use="match_columns", probabilities=2, scales=[1.0, 2.0]), None)
    assert made == MatchColumns(2, (1.0, 2.0))
    sr.testing.check_objective(MatchColumns(2, (1.0,)), Signal(values=torch.randn(6, 3)), batch(6))


def test_agreement_by_hand():
    """Probabilities are compared as such, numbers in their unit; the teacher's mean answer explains 0, itself 1."""
    teacher = torch.tensor([[0.0, 1.0], [2.0, 2.0], [-2.0, 6.0]])
    rows = batch(3)
    both = explained("r", 1)
    assert both.finish(both.statistics(Signal(values=teacher), Signal(values=teacher), rows)) == 1
    p = teacher[:, 0].double().sigmoid()
    mean = torch.stack([p.mean().logit().expand(3), teacher[:, 1].double().mean().expand(3)], -1)
    assert abs(both.finish(both.statistics(Signal(values=mean), Signal(values=teacher), rows))) < 1e-12
    ours = torch.tensor([[0.0, 1.0], [-2.0, 2.0], [-2.0, 5.0]])
    numbers = explained("n", 1, 1)
    assert numbers.finish(numbers.statistics(Signal(values=ours), Signal(values=teacher), rows)) == pytest.approx(
        1 - 1 / 14
    )
    side = same_side("s", 1)
    assert side.finish(side.statistics(Signal(values=ours), Signal(values=teacher), rows)) == pytest.approx(2 / 3)
    off = distance("d", 1, 1)
    assert off.finish(off.statistics(Signal(values=ours), Signal(values=teacher), rows)) == pytest.approx(1 / 3)


def test_a_column_on_which_the_teacher_never_differs_does_not_count():
    teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    metric = explained("r", 0)
    ours = torch.tensor([[7.0, 0.0], [9.0, 1.0]])
    assert metric.finish(metric.statistics(Signal(values=ours), Signal(values=teacher), batch(2))) == 1


def test_every_column_has_its_interval():
    """Of a good column the interval lies high, of a bad one low; the value is that of all examples."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(300, 3, generator=draw)
    noise = torch.randn(2, 300, 3, generator=draw) * torch.tensor([0.1, 1.0, 0.1])
    found = by_column(teacher + noise, teacher, probabilities=2, replicates=200)
    assert [set(cells) for cells in found] == [{"explained", "distance", "same_side"}] * 2 + [{"explained", "distance"}]
    for cells in found:
        cell = cells["explained"]
        assert cell.low < cell.value < cell.high
    assert found[0]["explained"].low > 0.95
    assert found[1]["explained"].high < 0.6
    assert found[2]["explained"].value == pytest.approx(1 - 0.01, abs=0.005)

"""Objectives: values, masks, labels, mixtures, gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillroom import divergences
from stillroom.errors import DataError, ShapeError, SignalError, UsageError
from stillroom.likeness import cosine, huber
from stillroom.objectives import (
    HardLabels,
    MatchValues,
    Mix,
    SoftTargets,
    built,
    counted_positions,
    learns,
    masked_mean,
    position_weights,
    weighted_sum,
)
from stillroom.objectives.features import MatchFeatures, MatchRelations
from stillroom.types import Batch, Dense, Projected, Signal, Sparse

NOTHING = Signal()
NAN = float("nan")


def batch(count=3, **rest):
    return Batch(tuple(f"row-{i}" for i in range(count)), {}, **rest)


def logits(values, dtype=torch.float32):
    return Signal(logits=Dense(values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)))


def values_of(values):
    return Signal(values=values)


# masked_mean


def test_masked_mean_is_the_mean_of_what_is_left():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert masked_mean(values) == 3.5
    assert masked_mean(values, mask) == (1 + 4 + 5 + 6) / 4
    assert masked_mean(values, mask, average="example").item() == pytest.approx((1 + 5) / 2)


@given(st.integers(0, 10_000), st.sampled_from(["position", "example"]))
def test_masked_is_removed(seed, average):
    """Examples and positions that the mask leaves out change nothing, even NaN and inf, in value or gradient."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=draw) < 0.5
    mask[0, 0] = True
    poisoned = torch.where(mask, values, torch.tensor(NAN, dtype=torch.float64)).requires_grad_()
    found = masked_mean(poisoned, mask, average)
    found.backward()
    kept = [values[i][mask[i]] for i in range(4) if mask[i].any()]
    wanted = torch.cat(kept).mean() if average == "position" else torch.stack([row.mean() for row in kept]).mean()
    torch.testing.assert_close(found.detach(), wanted)
    assert poisoned.grad is not None
    assert not poisoned.grad[~mask].any()
    assert bool(poisoned.grad[mask].isfinite().all())


@pytest.mark.parametrize("average", ["position", "example"])
def test_all_masked_is_zero_with_a_gradient_of_zero(average):
    """llm-peers 21: NaN on an all-masked batch (trl#5594, Liger#974)."""
    values = torch.tensor([[NAN, 1.0], [2.0, 3.0]], requires_grad=True)
    found = masked_mean(values, torch.zeros(2, 2, dtype=torch.bool), average)
    found.backward()
    assert found == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_masked_mean_of_half_precision_is_float32():
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    values[0] = 3.0
    found = masked_mean(values)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1 + 2 / 4096, abs=1e-7)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"\[3\].*\[4\]"):
        masked_mean(torch.ones(3), torch.ones(4, dtype=torch.bool))


def test_further_dimensions_are_averaged_first():
    assert weighted_sum(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([1.0, 2.0])) == 2 + 2 * 6


def test_weights_of_examples():
    counted = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert position_weights(counted).tolist() == counted.float().tolist()
    assert position_weights(counted, "example").tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert position_weights(torch.tensor([True, False]), "example").tolist() == [1.0, 0.0]


def test_counted_positions():
    assert counted_positions(batch()).tolist() == [True] * 3
    assert counted_positions(batch(labels=torch.zeros(3, 4, dtype=torch.int64))).shape == (3, 4)
    assert counted_positions(batch(labels=torch.zeros(3, 4))).shape == (3,)
    mask = torch.tensor([True, False, True])
    assert counted_positions(batch(mask=mask)).tolist() == mask.tolist()


# SoftTargets


def test_soft_targets_by_hand():
    """Two classes, T = 2: p = (1/2, 1/2), q = (e, 1) / (e + 1); KL = -log 2 - (log q1 + log q2) / 2, times T^2 = 4."""
    found = SoftTargets(temperature=2.0)(logits([[2.0, 0.0]]), logits([[0.0, 0.0]]), batch(1))
    kl = -math.log(2) - 0.5 * (1 - 2 * math.log(math.e + 1))
    assert set(found) == {"soft_targets"}
    assert found["soft_targets"].tolist() == pytest.approx([4 * kl], rel=1e-6)
    plain = SoftTargets(temperature=2.0, scale_by_temperature_squared=False)
    assert plain(logits([[2.0, 0.0]]), logits([[0.0, 0.0]]), batch(1))["soft_targets"].tolist() == pytest.approx(
        [kl], rel=1e-6
    )


@pytest.mark.parametrize("divergence", [divergences.forward_kl, divergences.reverse_kl, divergences.jensen_shannon])
def test_the_gradient_keeps_its_size_at_any_temperature(divergence):
    """Hinton et al. 2015, section 2; axolotl's kernel scaled the value but not the gradient, its tests used T = 1."""
    draw = torch.Generator().manual_seed(0)
    theirs = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    sizes = []
    for temperature in (20.0, 200.0):
        ours = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        SoftTargets(divergence, temperature)(logits(ours), logits(theirs), batch())["soft_targets"].sum().backward()
        assert ours.grad is not None
        sizes.append(float(ours.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_value_and_gradient_are_scaled_alike(temperature):
    """axolotl kernels/liger.py: finite difference / gradient = 3.99 at T = 2, 16.1 at T = 4."""
    theirs = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)

    def value(shift):
        ours = torch.tensor([[1.0 + shift, 0.2, -0.5]], dtype=torch.float64, requires_grad=True)
        return ours, SoftTargets(temperature=temperature)(logits(ours), logits(theirs), batch(1))["soft_targets"].sum()

    ours, at = value(0.0)
    at.backward()
    difference = (value(1e-5)[1] - value(-1e-5)[1]) / 2e-5
    assert ours.grad is not None
    assert float(difference.detach() / ours.grad[0, 0]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_of_zero_is_refused(temperature):
    with pytest.raises(UsageError, match="temperature must be above 0"):
        SoftTargets(temperature=temperature)


def test_soft_targets_say_what_is_missing():
    with pytest.raises(SignalError, match=r"SoftTargets needs 'logits', but the model gives \['values'\]"):
        SoftTargets()(logits([[0.0, 1.0]]), values_of(torch.zeros(1, 2)), batch(1))
    with pytest.raises(ShapeError, match=r"\[1\], the teacher at \[2\]"):
        SoftTargets()(logits([[0.0, 1.0]]), logits([[0.0, 1.0], [1.0, 0.0]]), batch(1))


SAMPLE = torch.Generator().manual_seed(3)
HIDDEN = torch.randn(2, 3, 4, generator=SAMPLE, dtype=torch.float64)
HEAD = torch.randn(6, 4, generator=SAMPLE, dtype=torch.float64)
THEIRS = torch.randn(2, 3, 6, generator=SAMPLE, dtype=torch.float64)


def as_sparse(values):
    """Every entry kept, in another order."""
    order = torch.arange(values.shape[-1]).flip(0).expand(values.shape)
    chosen = values.log_softmax(-1).gather(-1, order)
    return Sparse(order, chosen, torch.full(values.shape[:-1], -torch.inf, dtype=values.dtype), values.shape[-1])


def teachers():
    head = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.linalg.lstsq(head, THEIRS.reshape(-1, 6).T).solution.T.reshape(2, 3, 3)
    exact = hidden @ head.T
    return {"dense": Dense(exact), "sparse": as_sparse(exact), "projected": Projected(hidden, head)}


@pytest.mark.parametrize("kind", ["sparse", "projected"])
@pytest.mark.parametrize("form", ["dense", "projected"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_form_of_logits_gives_the_same_value_and_gradient(kind, form, temperature):
    """llm-peers 12: fused paths that compute another loss (trl#5731, Liger#974, trl#6629)."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = []
    for theirs, ours in ((teachers()["dense"], "dense"), (teachers()[kind], form)):
        hidden = HIDDEN.clone().requires_grad_()
        answer = Dense(hidden @ HEAD.T) if ours == "dense" else Projected(hidden, HEAD)
        terms = SoftTargets(temperature=temperature)(Signal(logits=answer), Signal(logits=theirs), batch(2, mask=mask))
        mean = masked_mean(terms["soft_targets"], mask)
        mean.backward()
        found.append((mean.detach(), hidden.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "sparse", "projected"])
def test_masked_positions_are_removed_for_every_teacher(kind):
    """NaN on either side, where the mask is False, reaches neither value nor gradient."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean, theirs = HIDDEN.clone(), teachers()[kind]
    poisoned = theirs.map(lambda t: t.masked_fill(~mask.unsqueeze(-1) if t.dim() == 3 else ~mask, NAN)
                          if t.is_floating_point() else t)  # fmt: skip
    found = []
    for hidden, target, positions in (
        (clean[mask], theirs[mask], None),
        (clean.masked_fill(~mask.unsqueeze(-1), NAN), poisoned, mask),
    ):
        ours = (hidden @ HEAD.T).requires_grad_()
        given = batch(len(hidden), mask=positions)
        terms = SoftTargets()(logits(ours), Signal(logits=target), given)["soft_targets"]
        mean = masked_mean(terms, positions)
        (grad,) = torch.autograd.grad(mean, ours)
        assert bool(grad.isfinite().all())
        where = slice(None) if positions is None else positions
        found.append((mean.detach(), terms.detach()[where], grad[where]))
    torch.testing.assert_close(found[0], found[1])


# HardLabels


def test_hard_labels_by_hand():
    terms = HardLabels()(logits([[0.0, math.log(3)], [1.0, 1.0]]), NOTHING, batch(2, labels=torch.tensor([1, 0])))
    assert set(terms) == {"hard_labels"}
    assert terms["hard_labels"].tolist() == pytest.approx([-math.log(0.75), math.log(2)])


def test_unlabelled_positions_are_zero_and_do_not_count():
    labels = torch.tensor([1, -100, 0])
    given = batch(labels=labels)
    ours = torch.tensor([[0.0, 1.0], [NAN, 5.0], [2.0, 0.0]], requires_grad=True)
    terms, counted = HardLabels()(logits(ours), NOTHING, given), HardLabels().counted(given)
    assert terms["hard_labels"][1] == 0
    assert counted["hard_labels"].tolist() == [True, False, True]
    mean = masked_mean(terms["hard_labels"], counted["hard_labels"])
    mean.backward()
    kept = torch.nn.functional.cross_entropy(ours.detach()[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(mean.detach(), kept)
    assert ours.grad is not None
    assert not ours.grad[1].any()
    assert bool(ours.grad.isfinite().all())


def test_labels_count_within_the_mask():
    labels, mask = torch.tensor([[1, -100, 0]]), torch.tensor([[True, True, False]])
    assert HardLabels().counted(batch(1, labels=labels, mask=mask))["hard_labels"].tolist() == [[True, False, False]]
    with pytest.raises(ShapeError, match=r"labels have positions \[3\], but the mask \[3, 3\]"):
        HardLabels().counted(batch(3, labels=torch.tensor([0, 1, 1]), mask=torch.ones(3, 3, dtype=torch.bool)))


def test_float_labels_are_values_and_nan_is_unlabelled():
    labels = torch.tensor([[1.0, 3.0], [NAN, 0.0], [0.0, 0.0]])
    ours = torch.tensor([[0.0, 1.0], [NAN, 2.0], [2.0, 0.0]], requires_grad=True)
    given = batch(labels=labels)
    terms = HardLabels()(values_of(ours), NOTHING, given)["hard_labels"]
    assert terms.tolist() == [(1 + 4) / 2, 0.0, 2.0]
    terms.sum().backward()
    assert ours.grad is not None
    assert bool(ours.grad.isfinite().all())
    assert HardLabels().counted(given)["hard_labels"].tolist() == [True, False, True]


@pytest.mark.parametrize("label", [3, 7, -1, -99])
def test_a_label_outside_the_classes_names_the_example(label):
    with pytest.raises(DataError, match=rf"'row-1' has label {label}, but the student has 3 classes \(0 to 2"):
        HardLabels()(logits(torch.zeros(2, 3)), NOTHING, batch(2, labels=torch.tensor([0, label])))


def test_labels_outside_the_mask_are_still_checked_and_missing_labels_refused():
    with pytest.raises(DataError, match="needs labels"):
        HardLabels()(logits(torch.zeros(2, 3)), NOTHING, batch(2))
    with pytest.raises(SignalError, match="needs 'values'"):
        HardLabels()(logits(torch.zeros(2, 3)), NOTHING, batch(2, labels=torch.zeros(2, 3)))


# MatchValues


def test_match_values_by_hand():
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    assert MatchValues()(values_of(ours), values_of(theirs), batch(2))["match_values"].tolist() == [2.0, 0.5]
    assert MatchValues(huber)(values_of(ours), values_of(theirs), batch(2))["match_values"].tolist() == [0.75, 0.25]
    assert MatchValues(cosine)(values_of(ours), values_of(ours), batch(2))["match_values"].tolist() == [0.0, 0.0]
    with pytest.raises(ShapeError, match=r"\[2, 2\], the teacher's \[2, 1\]"):
        MatchValues()(values_of(ours), values_of(theirs[:, :1]), batch(2))


def test_masked_values_are_removed():
    mask = torch.tensor([True, False])
    ours = torch.tensor([[1.0, 2.0], [NAN, 0.0]], requires_grad=True)
    theirs = torch.tensor([[3.0, 2.0], [0.0, NAN]])
    terms = MatchValues()(values_of(ours), values_of(theirs), batch(2, mask=mask))["match_values"]
    terms.sum().backward()
    assert terms.tolist() == [2.0, 0.0]
    assert ours.grad is not None
    assert ours.grad.tolist() == [[-2.0, 0.0], [0.0, 0.0]]


# Mix


def test_a_mix_weighs_and_names_its_terms():
    given = batch(2, labels=torch.tensor([0, -100]))
    ours, theirs = logits([[1.0, 0.0], [0.0, 2.0]]), logits([[0.0, 0.0], [1.0, 2.0]])
    terms = Mix({SoftTargets(): 0.9, HardLabels(): 0.1})(ours, theirs, given)
    assert list(terms) == ["soft_targets", "hard_labels"]
    torch.testing.assert_close(terms["soft_targets"], 0.9 * SoftTargets()(ours, theirs, given)["soft_targets"])
    torch.testing.assert_close(terms["hard_labels"], 0.1 * HardLabels()(ours, theirs, given)["hard_labels"])


def test_terms_of_the_same_name_are_told_apart():
    given = batch(2, labels=torch.tensor([0, -100]))
    mix = Mix([(SoftTargets(), 0.5), (SoftTargets(temperature=4), 0.2), (Mix({HardLabels(): 1}), 1), (HardLabels(), 1)])
    terms = mix(logits(torch.zeros(2, 2)), logits(torch.ones(2, 2)), given)
    assert list(terms) == ["soft_targets", "soft_targets#2", "hard_labels", "hard_labels#2"]
    assert set(mix.counted(given)) == {"hard_labels", "hard_labels#2"}


def test_a_mix_says_what_its_parts_say():
    mix = Mix({MatchFeatures({"a": "b"}): 1.0, Mix({MatchRelations(student_path="c", teacher_path="d"): 1.0}): 0.5})
    assert mix.student_features == ("a", "c")
    assert mix.teacher_features == ("b", "d")
    assert mix.couples_examples
    assert not mix.needs_labels
    assert Mix({HardLabels(): 1.0}).needs_labels
    assert not Mix({SoftTargets(): 1.0}).couples_examples
    assert learns(mix)
    assert not learns(Mix({SoftTargets(): 1.0}))


@pytest.mark.parametrize("weight", [-0.1, NAN, math.inf])
def test_weights_that_cannot_be_used(weight):
    with pytest.raises(UsageError, match="finite and not negative"):
        Mix({SoftTargets(): weight})
    with pytest.raises(UsageError, match="at least one"):
        Mix({})


# every objective


def cases(dtype=torch.float64):
    """(objective, student's tensor, from tensor to signal, teacher's signal, batch)"""
    draw = torch.Generator().manual_seed(5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    labels = torch.tensor([[1, -100, 2], [0, 1, 1]])
    three = torch.randn(2, 3, 4, generator=draw, dtype=dtype)
    other = torch.randn(2, 3, 4, generator=draw, dtype=dtype)
    masked, labelled = batch(2, mask=mask), batch(2, mask=mask, labels=labels)
    yield SoftTargets(), three, logits, logits(other), masked
    yield HardLabels(), three, logits, NOTHING, labelled
    yield HardLabels(), three, values_of, NOTHING, batch(2, mask=mask, labels=other)
    yield MatchValues(), three, values_of, values_of(other), masked
    yield Mix({SoftTargets(): 0.3, HardLabels(): 0.7}), three, logits, logits(other), labelled
    featured = lambda t: Signal(features={"f": t})  # noqa: E731
    yield MatchFeatures({"f": "f"}), three, featured, featured(other), masked
    five, others = (torch.randn(5, 3, generator=draw, dtype=dtype) for _ in range(2))
    yield MatchRelations(), five, values_of, values_of(others), batch(5)


CASES = [pytest.param(index, id=type(case[0]).__name__ + str(index)) for index, case in enumerate(cases())]


def loss(objective, ours, theirs, given):
    counted = objective.counted(given) if hasattr(objective, "counted") else {}
    terms = objective(ours, theirs, given)
    return sum(weighted_sum(term, position_weights(counted.get(name, counted_positions(given))))
               for name, term in terms.items())  # fmt: skip


@pytest.mark.parametrize("index", CASES)
def test_gradients_are_those_of_the_value(index):
    objective, tensor, signal, theirs, given = list(cases())[index]
    assert torch.autograd.gradcheck(lambda t: loss(objective, signal(t), theirs, given), tensor.requires_grad_())


@pytest.mark.parametrize("index", CASES)
def test_half_precision_is_close_to_float64(index):
    objective, tensor, signal, theirs, given = list(cases())[index]
    exact = objective(signal(tensor), theirs, given)
    rough = objective(signal(tensor.bfloat16()), theirs.map(Tensor.bfloat16), given)
    for name, values in rough.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), exact[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("index", CASES)
def test_no_gradient_goes_to_the_teacher(index):
    objective, tensor, signal, theirs, given = list(cases())[index]
    theirs = theirs.map(lambda t: t.clone().requires_grad_())
    leaves = []
    theirs.map(lambda t: leaves.append(t) or t)
    loss(objective, signal(tensor.requires_grad_()), theirs, given).backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert tensor.grad is not None
    assert bool(tensor.grad.any())


@pytest.mark.parametrize("index", CASES)
def test_extreme_answers_stay_finite(index):
    objective, tensor, signal, theirs, given = list(cases(torch.float32))[index]
    tensor = (tensor.sign() * 1e4).requires_grad_()
    found = loss(objective, signal(tensor), theirs.map(lambda t: t.sign() * -1e4), given)
    found.backward()
    assert bool(found.isfinite())
    assert tensor.grad is not None
    assert bool(tensor.grad.isfinite().all())


@pytest.mark.parametrize("index", CASES)
def test_everything_masked_is_zero_with_a_gradient_of_zero(index):
    objective, tensor, signal, theirs, given = list(cases())[index]
    shape = (5,) if isinstance(objective, MatchRelations) else (2, 3)
    nothing = Batch(given.ids, {}, labels=given.labels, mask=torch.zeros(shape, dtype=torch.bool))
    found = loss(objective, signal(tensor.requires_grad_()), theirs, nothing)
    found.backward()
    assert found == 0
    assert tensor.grad is not None
    assert not tensor.grad.any()


def test_objectives_that_learn_are_built_wherever_they_are():
    ours, theirs = Signal(features={"a": torch.zeros(2, 3)}), Signal(features={"b": torch.zeros(2, 5)})
    objective, modules = built(Mix({SoftTargets(): 1.0, Mix({MatchFeatures({"a": "b"}): 1.0}): 0.5}), ours, theirs)
    assert len(modules) == 1
    assert [tuple(p.shape) for p in modules[0].parameters()] == [(5, 3), (5,)]
    assert isinstance(objective.parts[1][0].parts[0][0], nn.Module)
    assert built(SoftTargets(), ours, theirs) == (SoftTargets(), [])

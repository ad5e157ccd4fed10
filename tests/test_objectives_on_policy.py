"""Objectives of on-policy batches: unbiased by enumeration, no mass leaks, limits of the generalised Jensen-Shannon."""

import pytest
import torch

from stillroom.divergences import forward_kl, jensen_shannon, reverse_kl
from stillroom.errors import ShapeError, SignalError, UsageError
from stillroom.objectives import SoftTargets
from stillroom.objectives.on_policy import SampledReverseKL
from stillroom.types import Batch, Dense, Projected, Signal, Sparse

V = 6


def logits(seed, scale=1.5):
    return scale * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_token(behaviour):
    """One position for each token of the vocabulary, as if it had been written: a batch to be weighed by hand."""
    tokens = torch.arange(V)[None]
    extra = {"behaviour": behaviour.log_softmax(-1)[None].detach()}
    return Batch(("all",), {"tokens": tokens}, tokens, torch.ones(1, V, dtype=torch.bool), extra=extra)


def expected(student, teacher, behaviour, objective=None):
    """E over x ~ behaviour of the objective, with the student's gradient."""
    objective = objective or SampledReverseKL()
    leaf = student.clone().requires_grad_()
    ours = Signal(logits=Dense(leaf.expand(1, V, V)))
    theirs = Signal(logits=Dense(teacher.expand(1, V, V)))
    (values,) = objective(ours, theirs, every_token(behaviour)).values()
    mean = (behaviour.softmax(-1) * values[0]).sum()
    mean.backward()
    return mean.detach(), leaf.grad


def exact(student, teacher):
    leaf = student.clone().requires_grad_()
    value = reverse_kl(leaf, teacher)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_are_those_of_the_reverse_kl_on_average(seed):
    """By enumeration: the sum over x of q(x) times the estimate is KL(student || teacher), and so is its gradient."""
    student, teacher = logits(seed), logits(seed + 100)
    for found, wanted in zip(expected(student, teacher, student), exact(student, teacher)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("behaviour", [logits(3), logits(0) / 2, torch.zeros(V, dtype=torch.float64)])
def test_a_writer_that_is_not_the_student_is_corrected_for(behaviour):
    """A stale server, or another sampling temperature: the ratio to the behaviour makes it unbiased again."""
    for found, wanted in zip(expected(logits(0), logits(1), behaviour), exact(logits(0), logits(1))):
        torch.testing.assert_close(found, wanted)


def test_the_gradient_by_hand():
    """Two tokens, q = (3/4, 1/4), p = (1/2, 1/2): dKL/dz0 = q0 q1 (log(q0/p0) - log(q1/p1)) = 3/16 log 3."""
    student = torch.tensor([3.0, 1.0], dtype=torch.float64).log().requires_grad_()
    batch = Batch(
        ("a",), {"tokens": torch.zeros(1, 2)}, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool),
        extra={"behaviour": torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()},
    )  # fmt: skip
    ours, theirs = Signal(logits=Dense(student.expand(1, 2, 2))), Signal(logits=Dense(torch.zeros(1, 2, 2)))
    values = SampledReverseKL()(ours, theirs, batch)["sampled_reverse_kl"][0]
    torch.testing.assert_close(values.detach(), torch.tensor([1.5, 0.5], dtype=torch.float64).log())
    (0.75 * values[0] + 0.25 * values[1]).backward()
    slope = 3 / 16 * torch.tensor(3.0, dtype=torch.float64).log()
    torch.testing.assert_close(student.grad, torch.stack([slope, -slope]))


def test_an_advantage_that_ignores_the_token_would_teach_nothing():
    """miles#2362: one top-k number for all tokens of a position has zero gradient; ours differs from token to token."""
    student, teacher = logits(0), logits(1)

    def same_for_all(ours, theirs, batch):
        log_q = ours.logits.values.log_softmax(-1).diagonal(dim1=1, dim2=2)
        advantage = reverse_kl(ours.logits.values.detach(), theirs.logits.values)
        return {"flawed": advantage * log_q}

    assert float(expected(student, teacher, student, same_for_all)[1].abs().max()) < 1e-12
    assert float(expected(student, teacher, student)[1].abs().max()) > 0.05


def test_the_plain_derivative_of_the_estimate_would_teach_nothing_either():
    """Rethinking-OPD#17, verl#6676 (which loss is this?): log q(x) - log p(x) as a loss has gradient 0 on average."""

    def plain(ours, theirs, batch):
        log_q, log_p = (s.logits.values.log_softmax(-1).diagonal(dim1=1, dim2=2) for s in (ours, theirs))
        return {"flawed": log_q - log_p}

    assert float(expected(logits(0), logits(1), logits(0), plain)[1].abs().max()) < 1e-12


def test_a_bounded_ratio_keeps_its_gradient():
    """Bounding the weight and not the loss: what is bounded still teaches."""
    behaviour = torch.tensor([-6.0, 2, 2, 2, 2, 2], dtype=torch.float64)
    student = torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64).requires_grad_()
    signals = [Signal(logits=Dense(value.expand(1, V, V))) for value in (student, logits(1))]
    batch = every_token(behaviour)
    free = SampledReverseKL()(*signals, batch)["sampled_reverse_kl"][0]
    bounded = SampledReverseKL(largest_ratio=2.0)(*signals, batch)["sampled_reverse_kl"][0]
    ratio = (student.detach().log_softmax(-1) - behaviour.log_softmax(-1)).exp()
    torch.testing.assert_close(bounded, free * ratio.clamp(max=2.0) / ratio)
    assert ratio[0] > 2
    (gradient,) = torch.autograd.grad(bounded[0], student)
    assert float(gradient.abs().max()) > 0


def test_dense_projected_and_kept_log_probabilities_agree():
    """One implementation for every kind of student and teacher."""
    made = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, V, 4, generator=made), torch.randn(V, 4, generator=made)
    full = torch.randn(1, V, V, generator=made).log_softmax(-1)
    ids = torch.stack([torch.arange(V), (torch.arange(V) + 1) % V], -1)[None]
    kept = full.gather(-1, ids)
    rest = torch.log1p(-kept.exp().sum(-1))
    found = []
    for ours in (Projected(hidden.clone().requires_grad_(), weight), None):
        for theirs in (Dense(full), Sparse(ids, kept, rest, V)):
            leaf = ours.hidden if ours else hidden.clone().requires_grad_()
            student = ours or Dense(leaf @ weight.T)
            batch = every_token(torch.zeros(V))
            (values,) = SampledReverseKL()(Signal(logits=student), Signal(logits=theirs), batch).values()
            found.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
    for values, gradient in found[1:]:
        torch.testing.assert_close(values, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


def test_positions_that_nobody_wrote_reach_nothing():
    """trl#5594, Liger#974: a NaN at a masked position stays there."""
    batch = every_token(torch.zeros(V))
    mask = torch.tensor([[True, True, False, True, True, True]])
    batch = Batch(batch.ids, batch.inputs, batch.labels.masked_fill(~mask, -100), mask, extra=batch.extra)
    student, teacher = torch.randn(1, V, V), torch.randn(1, V, V)
    student[0, 2] = teacher[0, 2] = float("nan")
    student.requires_grad_()
    (values,) = SampledReverseKL()(Signal(logits=Dense(student)), Signal(logits=Dense(teacher)), batch).values()
    values.sum().backward()
    assert values[0, 2] == 0
    assert student.grad.isfinite().all()


def test_what_cannot_be_estimated_is_refused():
    batch = every_token(torch.zeros(V))
    signal = Signal(logits=Dense(torch.zeros(1, V, V)))
    recorded = Batch(batch.ids, batch.inputs, batch.labels, batch.mask)
    with pytest.raises(SignalError, match=r"needs tokens that were drawn from the student .* this batch was recorded"):
        SampledReverseKL()(signal, signal, recorded)
    kept = Sparse(torch.zeros(1, V, 1, dtype=torch.int64), torch.full((1, V, 1), -1.0), torch.full((1, V), -0.5), V)
    with pytest.raises(SignalError, match=r"the teacher kept no log-probability for 5 of 6 written tokens"):
        SampledReverseKL()(signal, Signal(logits=kept), batch)
    with pytest.raises(ShapeError, match=r"have positions \[1, 6\], \[1, 5\] and \[1, 6\]"):
        SampledReverseKL()(signal, Signal(logits=Dense(torch.zeros(1, 5, V))), batch)
    with pytest.raises(UsageError, match="largest_ratio=0.5 cannot be used: choose 1 or more, or None"):
        SampledReverseKL(0.5)


# top-k with a bucket for the tail


def kept(teacher, count):
    log_probs, ids = teacher.log_softmax(-1).topk(count)
    return Sparse(ids, log_probs, torch.log1p(-log_probs.exp().sum(-1)), V)


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon, forward_kl])
def test_mass_that_leaves_the_kept_tokens_raises_the_loss(divergence):
    """verl#5041, #6676, #7590: without a bucket, top-k reverse KL falls as mass leaves the kept tokens."""
    teacher = logits(0)
    theirs = kept(teacher, 3)
    outside = torch.ones(V, dtype=torch.float64).index_fill(0, theirs.ids, 0.0)
    values, leaking = [], []
    for shift in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
        student = teacher + shift * outside
        values.append(float(divergence(student, theirs)))
        log_q = student.log_softmax(-1).gather(-1, theirs.ids)
        leaking.append(float((log_q.exp() * (log_q - theirs.log_probs)).sum()))
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values == sorted(values)
    assert values[-1] > 0.5
    assert leaking[1] < 0 < leaking[0] + 1e-12  # what the peers' formula rewards


def test_the_gradient_brings_leaked_mass_back():
    """Descent from a student that is nearly all outside the kept tokens ends at the teacher's own tail."""
    theirs = kept(logits(0), 3)
    outside = torch.ones(V, dtype=torch.float64).index_fill(0, theirs.ids, 0.0)
    student = (logits(0) + 3.0 * outside).requires_grad_()
    optimiser = torch.optim.Adam([student], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        reverse_kl(student, theirs).backward()
        optimiser.step()
    mass = float((student.detach().softmax(-1) * outside).sum())
    assert mass == pytest.approx(float(theirs.rest.exp()), abs=1e-3)


def test_top_k_never_exceeds_the_whole_and_reaches_it():
    """Merging tokens into a bucket only loses information; K = V loses none."""
    student, teacher = logits(2), logits(3)
    values = [float(reverse_kl(student, kept(teacher, count))) for count in (1, 2, 3, 4, 5)]
    whole = float(reverse_kl(student, teacher))
    assert values == sorted(values)
    assert values[-1] <= whole + 1e-12
    full = Sparse(torch.arange(V), teacher.log_softmax(-1), torch.tensor(float("-inf"), dtype=torch.float64), V)
    assert float(reverse_kl(student, full)) == pytest.approx(whole)


# generalised Jensen-Shannon (GKD)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_the_teacher_weight_is_gkds_beta(weight):
    """llm-peers, convention trap 1 (KDFlow is mirrored): M = b P + (1 - b) Q; b KL(P || M) + (1 - b) KL(Q || M)."""
    q, p = logits(0).softmax(-1), logits(1).softmax(-1)
    m = weight * p + (1 - weight) * q
    wanted = weight * (p * (p / m).log()).sum() + (1 - weight) * (q * (q / m).log()).sum()
    torch.testing.assert_close(jensen_shannon(q.log(), p.log(), teacher_weight=weight), wanted)


def test_gkds_divergence_divided_by_its_weight_tends_to_the_two_kls():
    """Its own limits are 0, so 0 and 1 are refused; per weight they are the forward and the reverse KL."""
    student, teacher = logits(0), logits(1)
    for small in (1e-4, 1e-5):
        near_forward = jensen_shannon(student, teacher, teacher_weight=small) / small
        near_reverse = jensen_shannon(student, teacher, teacher_weight=1 - small) / small
        assert float(near_forward) == pytest.approx(float(forward_kl(student, teacher)), rel=40 * small)
        assert float(near_reverse) == pytest.approx(float(reverse_kl(student, teacher)), rel=40 * small)
    for end in (0.0, 1.0):
        with pytest.raises(UsageError, match="tends to 0 there"):
            jensen_shannon(student, teacher, teacher_weight=end)


def test_the_mean_over_written_tokens_estimates_the_whole_divergence():
    """What fit reports for the sampled term is the reverse KL, up to noise that falls with the number of tokens."""
    torch.manual_seed(1)
    student, teacher, count = logits(0).float(), logits(1).float(), 20_000
    tokens = torch.multinomial(student.softmax(-1), count, replacement=True)[None]
    extra = {"behaviour": student.log_softmax(-1)[tokens]}
    batch = Batch(("a",), {"tokens": tokens}, tokens, torch.ones(1, count, dtype=torch.bool), extra=extra)
    signals = [Signal(logits=Dense(value.expand(1, count, V))) for value in (student, teacher)]
    values = SampledReverseKL()(*signals, batch)["sampled_reverse_kl"]
    (whole,) = SoftTargets(reverse_kl, temperature=1.0)(*signals, batch).values()
    error = float(values.std()) / count**0.5
    assert abs(float(values.mean() - whole.mean())) < 4 * error

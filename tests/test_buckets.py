"""Dense, projected, sparse and sampled paths say the same, whatever the vocabularies and temperatures."""

from math import inf

import pytest
import torch
from torch.autograd import gradcheck

from stillroom.divergences import bind, forward_kl, jensen_shannon, projection, reverse_kl
from stillroom.errors import PairError, ShapeError, SignalError
from stillroom.types import Dense, Projected, Sparse
from test_divergences import CASES, INFINITE, every, finite, logits, named

temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    """Seven positions are three chunks, the last of them ragged."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 3)


def head(positions=7, vocabulary=11, width=4):
    """A student head that asks for gradients."""
    shapes = ((positions, width), (vocabulary, width), (vocabulary,))
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def kept(teacher, count):
    """The ``count`` largest entries, shuffled, with the rest as the tail."""
    log_probs = teacher.log_softmax(-1)
    ids = log_probs.topk(count).indices.flip(-1)
    inside = log_probs.gather(-1, ids)
    outside = log_probs.scatter(-1, ids, -inf).logsumexp(-1)
    return Sparse(ids, inside, outside, teacher.shape[-1])


@every
@temperatures
@pytest.mark.parametrize("extra", [0, 3])
def test_every_path_agrees(divergence, temperature, extra):
    """Dense == Projected == Sparse with K = V: values and gradients, with padding or not, equal weights or not."""
    inputs, teacher = head(vocabulary=11 + extra), logits(7, 11)
    extra_ids = "ignore" if divergence in INFINITE else "zero"
    dense = Dense(inputs[0] @ inputs[1].t() + inputs[2])
    weights = [torch.full((7,), 0.3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)]
    expected = None
    for student in (dense, Projected(*inputs)):
        for wanted in (teacher, kept(teacher, 11)):
            value = divergence(student, wanted, temperature=temperature, extra_ids=extra_ids)
            gradients = [torch.autograd.grad(value @ w, inputs, retain_graph=True) for w in weights]
            expected = expected or (value, gradients)
            torch.testing.assert_close((value, gradients), expected, rtol=1e-10, atol=1e-12)


@every
@temperatures
def test_tail_is_one_bucket(divergence, temperature):
    """Top-3 of 11: the K + 1 buckets at temperature 1, tempered and compared, written out with probabilities."""
    s, t = logits(5, 11), logits(5, 11)
    sparse = kept(t, 3)

    def buckets(x):
        probs = x.softmax(-1).gather(-1, sparse.ids)
        return torch.cat([probs, 1 - probs.sum(-1, keepdim=True)], -1).log() / temperature

    torch.testing.assert_close(divergence(s, sparse, temperature=temperature), divergence(buckets(s), buckets(t)))
    assert divergence(t, sparse, temperature=temperature).abs().max() < 1e-12


@every
@pytest.mark.parametrize("projected", [False, True])
def test_gradcheck_of_sparse(divergence, projected):
    """Top-3 of 7 from a head with softcap and scale, chunk by chunk: one position at a time, and their sum."""
    inputs, teacher = head(4, 7, 3), kept(logits(4, 7), 3)

    def value(hidden, weight, bias):
        student = Projected(hidden, weight, bias, softcap=3.0, scale=0.7)
        return divergence(student if projected else student.compute(), teacher, temperature=2.0)

    assert gradcheck(value, inputs)
    assert gradcheck(lambda *inputs: value(*inputs).sum(), inputs)


@every
@pytest.mark.parametrize("gap", [20.0, 80.0])
def test_a_sure_student_keeps_its_tail(divergence, gap):
    """The student's tail of e^-80 is a number in float32, not log(1 - 1): value and gradient are float64's."""
    s = torch.full((1, 50), -gap).index_fill_(1, torch.tensor([3]), 0.0)
    wanted = kept(logits(1, 50).float(), 1)
    wanted = Sparse(torch.tensor([[3]]), torch.tensor([[-0.5]]), torch.tensor([-0.9327521]), 50)
    found = []
    for dtype in (torch.float32, torch.float64):
        x = s.to(dtype).requires_grad_()
        value = divergence(x, wanted)
        found.append((value.double(), torch.autograd.grad(value.sum(), x)[0].double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@finite
def test_sparse_without_a_tail(divergence):
    """A tail of -inf on both sides, and kept entries of -inf, give no nan in value or gradient."""
    ids = torch.tensor([[0, 1, 2], [4, 2, 0]])
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    rest = torch.full((2,), -inf, dtype=torch.float64)
    s = logits(2, 5).requires_grad_()
    value = divergence(s, Sparse(ids, log_probs, rest, 5), temperature=2.0)
    assert gradcheck(lambda s: divergence(s, Sparse(ids, log_probs, rest, 5)), (s,))
    none = torch.full((2, 5), -inf, dtype=torch.float64).scatter(-1, ids, s.detach().gather(-1, ids)).requires_grad_()
    value = divergence(none, Sparse(ids, log_probs, rest, 5))
    (gradient,) = torch.autograd.grad(value.sum(), none)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_sampled_draws_are_unbiased():
    """The mean over 200,000 draws is KL and its gradient, within 4 standard errors of each number."""
    s, t, count = logits(6).requires_grad_(), logits(6), 200_000
    ids = torch.multinomial(t.softmax(-1), count, replacement=True).reshape(count // 4, 4)
    log_probs = t.log_softmax(-1)[ids]
    drawn = Sparse(ids, log_probs, torch.zeros(count // 4), 6, sampled=True)
    many = s.detach().expand(count // 4, 6).clone().requires_grad_()
    values = forward_kl(many, drawn)
    (gradients,) = torch.autograd.grad(values.sum(), many)
    exact = forward_kl(s, t)
    (gradient,) = torch.autograd.grad(exact, s)
    for found, wanted in ((values, exact), (gradients, gradient)):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - wanted).abs() < 4 * error).all()


def test_sampled_draws_through_the_head():
    """Repeats stay separate entries, and the projected path agrees with the dense one."""
    inputs, t = head(), logits(7, 11)
    ids = torch.multinomial(t.softmax(-1), 6, replacement=True)
    drawn = Sparse(ids, t.log_softmax(-1).gather(-1, ids), torch.zeros(7), 11, sampled=True)
    dense = forward_kl(Projected(*inputs).compute(), drawn)
    log_q = Projected(*inputs).compute().log_softmax(-1)
    torch.testing.assert_close(dense, (drawn.log_probs - log_q.gather(-1, ids)).mean(-1))
    chunked = forward_kl(Projected(*inputs), drawn)
    torch.testing.assert_close(chunked, dense)
    expected = torch.autograd.grad(dense.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), inputs), expected)


@pytest.mark.parametrize(("divergence", "temperature"), [*((c, 1.0) for c in CASES[1:]), (forward_kl, 2.0)], ids=named)
def test_sampled_draws_are_refused_where_they_are_biased(divergence, temperature):
    """Anything but forward KL at temperature 1 needs probabilities that were not drawn."""
    drawn = Sparse(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2), 5, sampled=True)
    with pytest.raises(SignalError, match="unbiased for forward_kl at temperature 1 only"):
        divergence(torch.zeros(2, 5), drawn, temperature=temperature)


@finite
@temperatures
def test_padded_student_vocabulary(divergence, temperature):
    """With 'zero' the extra ids have a teacher logit of -inf; with 'ignore' the student has no such ids."""
    s, t = logits(5, 9), logits(5, 7)
    padded = torch.nn.functional.pad(t, (0, 2), value=-inf)
    zero = divergence(s, t, temperature=temperature)
    torch.testing.assert_close(zero, divergence(s, padded, temperature=temperature))
    ignored = divergence(s, t, temperature=temperature, extra_ids="ignore")
    torch.testing.assert_close(ignored, divergence(s[:, :7], t, temperature=temperature))
    torch.testing.assert_close(ignored, divergence(s, kept(t, 7), temperature=temperature, extra_ids="ignore"))


@pytest.mark.parametrize("divergence", INFINITE, ids=named)
@pytest.mark.parametrize("wanted", [lambda t: t, lambda t: kept(t, 3)], ids=["dense", "sparse"])
def test_zero_for_extra_ids_is_refused_where_it_is_infinite(divergence, wanted):
    """The error names the other choice, and that choice works."""
    s, t = logits(5, 9), wanted(logits(5, 7))
    with pytest.raises(PairError, match=r"9 ids.*7.*extra_ids='ignore'"):
        divergence(s, t)
    assert divergence(s, t, extra_ids="ignore").isfinite().all()


@pytest.mark.parametrize("extra_ids", ["zero", "ignore"])
def test_a_smaller_student_vocabulary_is_refused(extra_ids):
    for wanted in (logits(5, 9), kept(logits(5, 9), 3)):
        with pytest.raises(PairError, match=r"7 ids, the teacher's 9"):
            jensen_shannon(logits(5, 7), wanted, extra_ids=extra_ids)


def test_sparse_that_does_not_fit_together_is_refused():
    with pytest.raises(ShapeError, match=r"ids \[2, 3\].*log_probs \[2, 4\]"):
        reverse_kl(torch.zeros(2, 5), Sparse(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2), 5))


@temperatures
def test_projected_teacher(temperature):
    """A teacher with a head of its own, softcap and all, is its logits: for dense and for projected students."""
    inputs, theirs = head(), head(width=6)
    teacher = Projected(*theirs, softcap=2.0, scale=1.5)
    divergence = bind(jensen_shannon, teacher_weight=0.3)
    expected = divergence(Projected(*inputs).compute(), teacher.compute(), temperature=temperature)
    wanted = torch.autograd.grad(expected.mean(), inputs)
    for student in (Dense(Projected(*inputs).compute()), Projected(*inputs)):
        value = divergence(student, teacher, temperature=temperature)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value.mean(), inputs, retain_graph=True), wanted)
        value.mean().backward()
    assert all(tensor.grad is None for tensor in theirs)

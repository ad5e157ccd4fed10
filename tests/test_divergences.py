"""The mathematics of every divergence on dense logits: values by hand, limits, invariances, gradients, settings."""

from math import inf, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from stillroom.divergences import (
    DIVERGENCES,
    alpha_beta,
    bind,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    total_variation,
)
from stillroom.errors import DataError, ShapeError, SignalError, UsageError
from stillroom.types import Sparse

CASES = [
    forward_kl,
    reverse_kl,
    jensen_shannon,
    bind(jensen_shannon, teacher_weight=0.1),
    skew_kl,
    total_variation,
    bind(alpha_beta, alpha=0.5, beta=0.5),
    bind(alpha_beta, alpha=0.3, beta=1.2),
    bind(alpha_beta, alpha=2.0, beta=0.0),
    bind(alpha_beta, alpha=0.0, beta=0.5),
]
INFINITE = [reverse_kl, CASES[-1]]  # where only the teacher gives probability 0


def named(value):
    """A name without an address in memory: processes that share the tests call each by the same one."""
    return value.__name__ if hasattr(value, "__name__") else repr(value) if callable(value) else None


every = pytest.mark.parametrize("divergence", CASES, ids=named)
finite = pytest.mark.parametrize("divergence", [c for c in CASES if c not in INFINITE], ids=named)

P, Q = (1 / 2, 1 / 4, 1 / 4), (1 / 8, 1 / 8, 3 / 4)  # teacher, student
KL_P_M = log(8 / 5) / 2 + log(4 / 3) / 4 + log(1 / 2) / 4  # M = (P + Q) / 2 = (5/16, 3/16, 1/2)
KL_Q_M = log(2 / 5) / 8 + log(2 / 3) / 8 + log(3 / 2) * 3 / 4
KL_P_N = log(16 / 7) / 2 + log(8 / 5) / 4 + log(2 / 5) / 4  # N = P / 4 + 3 Q / 4 = (7/32, 5/32, 5/8)
KL_Q_N = log(4 / 7) / 8 + log(4 / 5) / 8 + log(6 / 5) * 3 / 4
BY_HAND = [
    (forward_kl, log(4) / 2 + log(2) / 4 + log(1 / 3) / 4),
    (reverse_kl, log(1 / 4) / 8 + log(1 / 2) / 8 + log(3) * 3 / 4),
    (jensen_shannon, KL_P_M / 2 + KL_Q_M / 2),
    (bind(jensen_shannon, teacher_weight=0.25), KL_P_N / 4 + KL_Q_N * 3 / 4),
    (bind(skew_kl, mix=0.5), KL_P_M),
    (bind(skew_kl, mix=0.25), KL_P_N),
    (total_variation, (3 / 8 + 1 / 8 + 1 / 2) / 2),
    (bind(alpha_beta, alpha=0.5, beta=0.5), 4 * (1 - (1 / 4 + 1 / sqrt(32) + sqrt(3) / 4))),
    (bind(alpha_beta, alpha=1.0, beta=1.0), (9 / 64 + 1 / 64 + 1 / 4) / 2),
    # 1/a^2 sum [p^a ln(p^a / q^a) - p^a + q^a] with a = 2, and its mirror image
    (
        bind(alpha_beta, alpha=2.0, beta=0.0),
        (2 * (log(4) / 4 + log(2) / 16 + log(1 / 3) / 16) - 3 / 8 + 38 / 64) / 4,
    ),
    (
        bind(alpha_beta, alpha=0.0, beta=2.0),
        (2 * (log(1 / 4) / 64 + log(1 / 2) / 64 + log(3) * 9 / 16) - 38 / 64 + 3 / 8) / 4,
    ),
]


def logits(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("divergence", "expected"), BY_HAND, ids=named)
def test_value_worked_by_hand(divergence, expected):
    """P = (1/2, 1/4, 1/4) and Q = (1/8, 1/8, 3/4) give the numbers written above."""
    value = divergence(torch.tensor(Q, dtype=torch.float64).log(), torch.tensor(P, dtype=torch.float64).log())
    assert value.item() == pytest.approx(expected, abs=1e-14)


def test_known_value_of_knowledge_distillation():
    """16 KL at T = 4 on the sine and cosine logits is 1.2004754167: numpy's, RepDistiller's and mdistiller's value."""
    i, j = np.arange(4)[:, None], np.arange(10)[None]
    s, t = np.sin(7 * i + 3 * j + 1), 2 * np.cos(5 * i + 2 * j + 0.5)
    q, p = (np.exp(x / 4) / np.exp(x / 4).sum(1, keepdims=True) for x in (s, t))
    by_numpy = 16 * (p * np.log(p / q)).sum(1).mean()
    ours = 16 * forward_kl(torch.tensor(s), torch.tensor(t), temperature=4).mean().item()
    assert ours == pytest.approx(1.2004754167, abs=1e-10)
    assert ours == pytest.approx(by_numpy, abs=1e-14)


rows = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=2, max_size=7)


@every
@settings(max_examples=25, deadline=None)
@given(rows, st.floats(0.25, 8), st.floats(-50, 50), st.randoms(use_true_random=False))
def test_properties(divergence, pairs, temperature, constant, random):
    """At least 0; 0 on equal inputs; blind to a constant on either side and to the order of the vocabulary."""
    s, t = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    value = divergence(s, t, temperature=temperature)
    assert value >= -1e-13
    assert divergence(t, t, temperature=temperature).abs() < 1e-13
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(divergence(s + constant, t - constant, temperature=temperature), value, **close)
    order = torch.tensor(random.sample(range(len(pairs)), len(pairs)))
    torch.testing.assert_close(divergence(s[order], t[order], temperature=temperature), value, **close)


@pytest.mark.parametrize(("end", "limit"), [(0, forward_kl), (1, reverse_kl)])
def test_jensen_shannon_over_its_weight_tends_to_a_kl(end, limit):
    """JS / b -> KL(P || Q) as b -> 0, JS / (1 - b) -> KL(Q || P) as b -> 1; JS itself -> 0."""
    s, t, small = logits(5, 7), logits(5, 7), 1e-7
    value = jensen_shannon(s, t, teacher_weight=abs(end - small))
    torch.testing.assert_close(value / small, limit(s, t), rtol=1e-4, atol=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded():
    """At b = 1/2 the sides can change places, and the value is at most log 2."""
    s, t = logits(9, 7, scale=30.0), logits(9, 7, scale=30.0)
    torch.testing.assert_close(jensen_shannon(s, t), jensen_shannon(t, s))
    assert jensen_shannon(s, t).max() <= log(2) + 1e-12


def test_skew_without_mix_is_forward_kl():
    s, t = logits(5, 7), logits(5, 7)
    assert torch.equal(skew_kl(s, t, mix=0.0), forward_kl(s, t))


@pytest.mark.parametrize(("alpha", "beta", "limit"), [(1, 0, forward_kl), (0, 1, reverse_kl)])
def test_alpha_beta_ends_are_the_kls(alpha, beta, limit):
    """(1, 0) is KL(P || Q), (0, 1) is KL(Q || P), exactly and as a limit."""
    s, t, small = logits(5, 7), logits(5, 7), 1e-6
    torch.testing.assert_close(alpha_beta(s, t, alpha=alpha, beta=beta), limit(s, t))
    near = alpha_beta(s, t, alpha=abs(alpha - small), beta=abs(beta - small))
    torch.testing.assert_close(near, limit(s, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.7])
def test_alpha_beta_is_continuous_where_one_is_zero(power):
    """The limits at alpha = 0 and beta = 0 are where the formula goes."""
    s, t, small = logits(5, 7), logits(5, 7), 1e-6
    for zero, near in (({"alpha": power, "beta": 0}, {"beta": small}), ({"alpha": 0, "beta": power}, {"alpha": small})):
        torch.testing.assert_close(alpha_beta(s, t, **zero), alpha_beta(s, t, **{**zero, **near}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_hot_limit_is_the_mean_square_of_centred_logits(divergence):
    """T^2 KL -> mean over V of (centred difference)^2 / 2 as T -> infinity; the factor T^2 is not in the value."""
    s, t, hot = logits(5, 7), logits(5, 7), 1e5
    gap = (s - t) - (s - t).mean(-1, keepdim=True)
    value = hot**2 * divergence(s, t, temperature=hot)
    torch.testing.assert_close(value, gap.square().mean(-1) / 2, rtol=1e-3, atol=1e-4)


@every
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_that_of_the_value(divergence, temperature):
    """Gradcheck in float64; the teacher gets no gradient even if it asks for one."""
    s, t = logits(3, 5).requires_grad_(), logits(3, 5).requires_grad_()
    assert gradcheck(lambda s: divergence(s, t.detach(), temperature=temperature), (s,))
    divergence(s, t, temperature=temperature).sum().backward()
    assert s.grad is not None
    assert t.grad is None


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_float32_out(divergence, dtype):
    """The arithmetic is float32 whatever the logits are; float64 stays float64."""
    s, t = logits(6, 50).to(dtype), logits(6, 50).to(dtype)
    value = divergence(s, t, temperature=2.0)
    assert value.dtype == torch.float32
    exact = divergence(s.double(), t.double(), temperature=2.0)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_huge_logits(divergence, dtype):
    """|logit| = 1e4, right and wrong: finite values and gradients."""
    s = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype)
    value = divergence(s, t)
    assert value.isfinite().all()
    assert value[1].abs() < 1e-6
    value.sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


@finite
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_probability_zero_at_the_teacher(divergence, temperature):
    """Teacher logits of -inf are probability 0: finite values and gradients, the limit of -1e3."""
    t = torch.tensor([[1.0, -inf, 0.0, -inf], [0.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    s = logits(2, 4).requires_grad_()
    value = divergence(s, t, temperature=temperature)
    torch.testing.assert_close(value, divergence(s, t.clamp_min(-1e5), temperature=temperature))
    assert gradcheck(lambda s: divergence(s, t, temperature=temperature), (s,))


@every
def test_probability_zero_on_both_sides(divergence):
    """An id that neither side can say changes nothing: finite everywhere, gradient 0 there."""
    s, t = logits(2, 4), logits(2, 4)
    s_more, t_more = (torch.nn.functional.pad(x, (0, 1), value=-inf) for x in (s, t))
    s.requires_grad_(), s_more.requires_grad_()
    value = divergence(s_more, t_more)
    torch.testing.assert_close(value, divergence(s, t))
    (padded,) = torch.autograd.grad(value.sum(), s_more)
    (plain,) = torch.autograd.grad(divergence(s, t).sum(), s)
    torch.testing.assert_close(padded, torch.nn.functional.pad(plain, (0, 1)))


@pytest.mark.parametrize("divergence", INFINITE, ids=named)
def test_infinite_where_only_the_teacher_gives_zero(divergence):
    assert divergence(torch.zeros(3), torch.tensor([0.0, 0.0, -inf])) == inf


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda s: jensen_shannon(s, s, teacher_weight=0.0), "forward_kl"),
        (lambda s: jensen_shannon(s, s, teacher_weight=1.0), "reverse_kl"),
        (lambda s: skew_kl(s, s, mix=1.0), "mix=1.0"),
        (lambda s: alpha_beta(s, s, alpha=0.0, beta=0.0), "not both 0"),
        (lambda s: alpha_beta(s, s, alpha=-1.0, beta=1.0), "alpha=-1.0"),
        (lambda s: forward_kl(s, s, temperature=0.0), "temperature=0"),
        (lambda s: forward_kl(s, s, extra_ids="drop"), "'zero' or 'ignore'"),
        (lambda s: bind(skew_kl, mix=2.0), "mix=2.0"),
        (lambda s: bind(skew_kl, mxi=0.1), "did you mean 'mix'"),
        (lambda s: bind(alpha_beta, alpha=0.1), "needs beta"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, says):
    """Each error names the value and the way out."""
    with pytest.raises(UsageError, match=says):
        wrong(torch.zeros(3))


def test_positions_and_kinds_are_checked():
    with pytest.raises(ShapeError, match=r"\[2\].*\[3\]"):
        forward_kl(torch.zeros(2, 5), torch.zeros(3, 5))
    sparse = Sparse(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), torch.full((2,), -inf), 5)
    with pytest.raises(SignalError, match="student's logits are Sparse"):
        forward_kl(sparse, torch.zeros(2, 5))


def test_bound_divergence_is_its_own_description():
    """Equal settings are equal, hash alike, print as a call, and are called like the function."""
    bound = bind(alpha_beta, beta=0.7, alpha=0.3)
    assert bound == bind(alpha_beta, alpha=0.3, beta=0.7)
    assert hash(bound) == hash(bind(alpha_beta, alpha=0.3, beta=0.7))
    assert repr(bound) == "alpha_beta(alpha=0.3, beta=0.7)"
    s, t = logits(5, 7), logits(5, 7)
    assert torch.equal(bound(s, t, temperature=2.0), alpha_beta(s, t, temperature=2.0, alpha=0.3, beta=0.7))
    assert all(DIVERGENCES[name].__name__ == name for name in DIVERGENCES)


def test_cross_entropy_and_its_gaps():
    """-log q(label); an ignored position is 0 and sends no gradient."""
    s, labels = logits(4, 6).requires_grad_(), torch.tensor([3, -100, 0, 5])
    value = cross_entropy(s, labels)
    keep = labels >= 0
    torch.testing.assert_close(value[keep], -s[keep].log_softmax(-1)[range(3), labels[keep]])
    assert value[1] == 0
    assert gradcheck(lambda s: cross_entropy(s, labels), (s,))
    with pytest.raises(DataError, match="label 6 is outside the 6 ids"):
        cross_entropy(s, torch.tensor([6, 0, 0, 0]))
    with pytest.raises(ShapeError):
        cross_entropy(s, labels[:2])

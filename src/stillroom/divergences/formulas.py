"""The mathematics of one position: log q (student), log p (teacher) [..., M] -> nats [...]. Knows no vocabulary.

An entry with probability 0 (-inf) on one side or both gives no nan, neither in the value nor in the gradient: the
difference is masked before it is multiplied. What each one is, and its source, is said in stillroom.divergences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _excess(weight: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """The product weight (log a - log b), 0 where the weight is 0."""
    return weight * torch.where(weight > 0, log_a - log_b, 0.0)


def _mixture(log_p: Tensor, log_q: Tensor, teacher_weight: float) -> Tensor:
    """log(w p + (1 - w) q); any finite number where both are 0."""
    log_p, log_q = log_p + math.log(teacher_weight), log_q + math.log1p(-teacher_weight)
    empty = torch.maximum(log_p, log_q) == float("-inf")
    return torch.logaddexp(torch.where(empty, 0.0, log_p), torch.where(empty, 0.0, log_q))


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(P || Q)."""
    return _excess(log_p.exp(), log_p, log_q).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(Q || P)."""
    return _excess(log_q.exp(), log_q, log_p).sum(-1)


def jensen_shannon(log_q: Tensor, log_p: Tensor, teacher_weight: float) -> Tensor:
    """b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q."""
    log_m = _mixture(log_p, log_q, teacher_weight)
    of_teacher, of_student = _excess(log_p.exp(), log_p, log_m), _excess(log_q.exp(), log_q, log_m)
    return (teacher_weight * of_teacher + (1 - teacher_weight) * of_student).sum(-1)


def skew_kl(log_q: Tensor, log_p: Tensor, mix: float) -> Tensor:
    """KL(P || m P + (1 - m) Q)."""
    return forward_kl(_mixture(log_p, log_q, mix) if mix else log_q, log_p)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Half the sum of |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """-1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]."""
    total = alpha + beta
    cross = (alpha * log_p + beta * log_q).exp()
    ours, theirs = (total * log_q).exp(), (total * log_p).exp()
    return ((alpha * theirs + beta * ours) / total - cross).sum(-1) / (alpha * beta)


def beta_zero(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """1/a^2 sum [p^a (log p^a - log q^a) - p^a + q^a]."""
    log_q, log_p = alpha * log_q, alpha * log_p
    return (_excess(log_p.exp(), log_p, log_q) - log_p.exp() + log_q.exp()).sum(-1) / alpha**2


def alpha_zero(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """1/b^2 sum [q^b (log q^b - log p^b) - q^b + p^b]."""
    return beta_zero(log_p, log_q, beta)


def minus_log_q(logits: Tensor, labels: Tensor) -> Tensor:
    """-log q(label); 0 where the label is negative."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels < 0, 0.0, logits.logsumexp(-1) - chosen)

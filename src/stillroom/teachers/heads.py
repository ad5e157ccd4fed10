"""A linear head on frozen embeddings: multinomial logistic regression, its strength chosen on the labelled rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # C, as in scikit-learn: the weight of the data against the penalty
FOLDS = 4


def fit_head(embeddings: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """The linear layer [D -> classes] with the least C * sum(cross-entropy) + |weight|^2 / 2, in float32.

    ``embeddings`` [N, D], ``labels`` int64 [N]. C is the one of ``STRENGTHS`` with the lowest cross-entropy in
    stratified cross-validation over these rows only. Deterministic.
    """
    embeddings = embeddings.double()
    strength = choose_strength(embeddings, labels, classes)
    weight, bias = _solve(embeddings, labels, classes, strength)
    head = nn.Linear(embeddings.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def choose_strength(embeddings: Tensor, labels: Tensor, classes: int) -> float:
    """The C of lowest held-out cross-entropy; the middle one where there are too few rows to hold any out."""
    if len(labels) < 2 * FOLDS:
        return STRENGTHS[1]
    order = torch.argsort(labels, stable=True)
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % FOLDS
    costs = []
    for strength in STRENGTHS:
        total = 0.0
        for held in range(FOLDS):
            inside, outside = fold != held, fold == held
            weight, bias = _solve(embeddings[inside], labels[inside], classes, strength)
            scores = embeddings[outside] @ weight.T + bias
            # a class with one row is unseen when it is held out: its cost is capped, or it would decide alone
            total += float(cross_entropy(scores, labels[outside], reduction="none").clamp(max=10.0).sum())
        costs.append(total)
    return STRENGTHS[costs.index(min(costs))]


def _solve(embeddings: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, embeddings.shape[1], dtype=embeddings.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=embeddings.dtype, requires_grad=True)
    penalty = 1.0 / (2.0 * strength * len(labels))
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(embeddings @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()

"""Positions that keep different numbers of entries share one tensor: the places that are left count for nothing."""

import pytest
import torch

from stillroom.divergences import DIVERGENCES, forward_kl
from stillroom.divergences.buckets import Formula, rows_for
from stillroom.measures.reading import entropy_of, label_log_probs, top_of
from stillroom.types import Dense, Projected, Sparse

V = 40
BOUND = {
    "jensen_shannon": {"teacher_weight": 0.3},
    "skew_kl": {"mix": 0.2},
    "alpha_beta": {"alpha": 0.5, "beta": 0.7},
}


def ragged(seed=0, widths=(1, 3, 8), room=8):
    """A teacher of some entries at each position: padded, and the same positions one by one without padding."""
    draw = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(len(widths), V, dtype=torch.float64, generator=draw).log_softmax(-1)
    values, ids = log_probs.topk(room, -1)
    alone = []
    for row, width in enumerate(widths):
        rest = log_probs[row].scatter(-1, ids[row, :width], -torch.inf).logsumexp(-1, keepdim=True)
        alone.append(Sparse(ids[row : row + 1, :width].clone(), values[row : row + 1, :width].clone(), rest, V))
        ids[row, width:] = ids[row, 0]
        values[row, width:] = -torch.inf
    return Sparse(ids, values, torch.cat([one.rest for one in alone]), V), alone


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_padding_changes_neither_value_nor_gradient(name, temperature, extra):
    padded, alone = ragged()
    student = torch.randn(3, V + extra, dtype=torch.float64, requires_grad=True)
    divergence, bound = DIVERGENCES[name], dict(BOUND.get(name, {}))
    bound["extra_ids"] = "ignore" if name == "reverse_kl" else "zero"
    ours = divergence(Dense(student), padded, temperature=temperature, **bound)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    for row, teacher in enumerate(alone):
        single = student.detach()[row : row + 1].requires_grad_()
        value = divergence(Dense(single), teacher, temperature=temperature, **bound)
        assert torch.allclose(ours[row], value[0], rtol=1e-12, atol=1e-14)
        assert torch.allclose(gradient[row], torch.autograd.grad(value.sum(), single)[0][0], rtol=1e-12, atol=1e-14)


def test_padding_by_chunks_equals_padding_at_once():
    padded, _ = ragged()
    padded = padded.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    head = Projected(torch.randn(3, 5), torch.randn(V, 5))
    assert torch.allclose(forward_kl(head, padded), forward_kl(Dense(head.compute()), padded), atol=1e-5)


def test_what_is_read_of_padded_logits_is_what_is_read_without():
    padded, alone = ragged()
    labels = torch.tensor([int(one.ids[0, -1]) for one in alone])
    for row, one in enumerate(alone):
        assert torch.equal(top_of(padded)[0][row], top_of(one)[0][0])
        assert torch.allclose(entropy_of(padded)[row], entropy_of(one)[0])
        assert torch.equal(label_log_probs(padded, labels)[row], label_log_probs(one, labels[row : row + 1])[0])


def test_an_entry_that_the_teacher_rules_out_is_no_padding():
    """An id of probability 0 keeps its own bucket: what the student gives it is not the tail's."""
    teacher = Sparse(torch.tensor([[4, 2]]), torch.tensor([[-0.5, -torch.inf]]), torch.tensor([-0.93]), 6)
    rows = rows_for(Formula(lambda q, p: q.exp().sum(-1)), Dense(torch.zeros(1, 6)), teacher, 1.0, "zero")
    assert rows(torch.zeros(1, 6), 1.0, teacher.ids, teacher.log_probs, teacher.rest).item() == pytest.approx(1.0)
    student = torch.tensor([[0.0, 0.0, 9.0, 0.0, 0.0, 0.0]])
    assert float(forward_kl(student, teacher)) > 7

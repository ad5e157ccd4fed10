"""X-Token, ULD and GOLD's spans: values by hand, zero where both agree, gradients, extremes, chunks."""

import dataclasses
import math

import pytest
import torch

import stillroom as sr
from stillroom.data import pair
from stillroom.errors import DataError, SignalError
from stillroom.objectives import masked_mean
from stillroom.objectives.across import AlignedTargets, SpanLikelihood, UniversalLogits, aligned_positions
from stillroom.students import causal
from stillroom.teachers.across import across
from stillroom.types import Batch, Dense, Projected, Signal, Sparse

OBJECTIVES = [AlignedTargets(), UniversalLogits(), SpanLikelihood()]
NAMES = ["aligned_targets", "universal_logits", "span_likelihood"]


def batch_by_hand():
    """Two rows of T = 4 student and U = 3 teacher positions: spans of 1:1, 2:1 (student:teacher), 1:1; 1:2, 1:1."""
    inputs = {
        "span": torch.tensor([[0, 1, 1, 2], [0, 1, -1, -1]]),
        "teacher_span": torch.tensor([[0, 1, 2], [0, 0, 1]]),
        "teacher_index": torch.tensor([[0, 1, -1, 2], [0, 2, -1, -1]]),
        "teacher_labels": torch.tensor([[1, 5, 2], [0, 3, 4]]),
    }
    labels = torch.tensor([[1, 0, 2, 3], [3, 2, -100, -100]])
    return Batch(("a", "b"), inputs, labels, labels >= 0)


def signals(dtype=torch.float64, ids=4, own=6):
    """A student over ``ids`` ids, and a teacher over 6 with its answer carried to the student's."""
    student = torch.randn(2, 4, ids, dtype=dtype, requires_grad=True)
    said = Signal(logits=Dense(torch.randn(2, 3, own, dtype=dtype, requires_grad=True)))
    carried = Dense(torch.randn(2, 4, ids, dtype=dtype, requires_grad=True))
    return student, Signal(logits=carried, parts={"teacher": said})


def values_of(objective, student, teacher, batch):
    logits = student if isinstance(student, Projected | Dense) else Dense(student)
    (values,) = objective(Signal(logits=logits), teacher, batch).values()
    return values


def logs(*probabilities):
    return torch.tensor(probabilities).log()


def test_sorted_probabilities_by_hand():
    """ULD, arXiv 2402.12030: |0.6 - 0.5| + |0.4 - 0.3| + |0 - 0.2| = 0.4, whatever ids the numbers belong to."""
    batch = Batch(("a",), {"teacher_index": torch.tensor([[0]])}, mask=torch.tensor([[True]]))
    said = Signal(parts={"teacher": Signal(logits=Dense(logs(0.2, 0.5, 0.3)[None, None]))})
    found = values_of(UniversalLogits(), logs(0.4, 0.6)[None, None], said, batch)
    assert float(found) == pytest.approx(0.4)
    kept = Sparse(torch.tensor([[[1, 2]]]), logs(0.5, 0.3)[None, None], logs(0.2).view(1, 1), vocabulary=9)
    sparse = Signal(parts={"teacher": Signal(logits=kept)})
    three = logs(0.3, 0.6, 0.1)[None, None]  # |0.6 - 0.5| + |0.3 - 0.3| + |0.1 - 0.2|
    assert float(values_of(UniversalLogits(), three, sparse, batch)) == pytest.approx(0.2)


def test_a_permutation_of_ids_costs_uld_nothing():
    batch = Batch(("a",), {"teacher_index": torch.tensor([[0]])}, mask=torch.tensor([[True]]))
    logits = torch.randn(1, 1, 7)
    said = Signal(parts={"teacher": Signal(logits=Dense(logits.flip(-1)))})
    assert float(values_of(UniversalLogits(), logits, said, batch)) == pytest.approx(0, abs=1e-6)


def test_a_span_by_hand():
    """P = 0.5 against Q = 0.5 * 0.5: 0.5 log 2 + 0.5 log(0.5 / 0.75) = 0.1438 nats, at the span's first position."""
    inputs = {
        "span": torch.tensor([[0, 0]]),
        "teacher_span": torch.tensor([[0]]),
        "teacher_index": torch.tensor([[0, -1]]),
        "teacher_labels": torch.tensor([[2]]),
    }
    batch = Batch(("a",), inputs, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    said = Signal(parts={"teacher": Signal(logits=Dense(logs(0.3, 0.2, 0.5)[None, None]))})
    found = values_of(SpanLikelihood(), torch.zeros(1, 2, 2), said, batch)
    wanted = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(found, torch.tensor([[wanted, 0.0]]))
    assert SpanLikelihood().counted(batch)["span_likelihood"].tolist() == [[True, False]]


@pytest.mark.parametrize(("label", "share"), [(2, 0.5), (1, 0.1)])
def test_a_span_against_kept_entries(label, share):
    """A label outside the K entries has the tail's mean: 0.2 over 2 ids."""
    inputs = {
        "span": torch.tensor([[0]]),
        "teacher_span": torch.tensor([[0]]),
        "teacher_index": torch.tensor([[0]]),
        "teacher_labels": torch.tensor([[label]]),
    }
    batch = Batch(("a",), inputs, torch.tensor([[0]]), torch.tensor([[True]]))
    kept = Sparse(torch.tensor([[[2, 0]]]), logs(0.5, 0.3)[None, None], logs(0.2).view(1, 1), vocabulary=4)
    said = Signal(parts={"teacher": Signal(logits=kept)})
    ours = logs(share, 1 - share)[None, None]
    assert float(values_of(SpanLikelihood(), ours, said, batch)) == pytest.approx(0, abs=1e-6)
    assert float(values_of(SpanLikelihood(), logs(0.7, 0.3)[None, None], said, batch)) > 1e-2


def test_equal_answers_cost_nothing():
    batch = batch_by_hand()
    ours = torch.randn(2, 4, 4, dtype=torch.float64)
    teacher = Signal(logits=Dense(ours), parts={"teacher": Signal(logits=Dense(torch.zeros(2, 3, 6)))})
    assert float(values_of(AlignedTargets(), ours, teacher, batch).abs().max()) < 1e-12
    one = {"span": torch.tensor([[0, 1, 2, 3]] * 2), "teacher_index": torch.tensor([[0, 1, 2, 3]] * 2)}
    labels = torch.tensor([[0, 1, 2, 3]] * 2)
    same = Batch(("a", "b"), {**one, "teacher_span": one["span"], "teacher_labels": labels}, labels, labels >= 0)
    teacher = Signal(parts={"teacher": Signal(logits=Dense(ours))})
    for objective in (UniversalLogits(), SpanLikelihood()):
        assert float(values_of(objective, ours, teacher, same).abs().max()) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_gradients_are_those_of_the_value_and_none_reaches_the_teacher(objective):
    batch = batch_by_hand()
    student, teacher = signals()
    assert torch.autograd.gradcheck(lambda logits: values_of(objective, logits, teacher, batch), (student,))
    values_of(objective, student, teacher, batch).sum().backward()
    assert teacher.logits.values.grad is None
    assert teacher.parts["teacher"].logits.values.grad is None


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "projected"])
def test_a_projected_student_by_chunks_gives_the_same(objective, kind, monkeypatch):
    """No [B, T, V]: the head runs by chunks of one position here, with the values and gradients of the whole."""
    monkeypatch.setattr("stillroom.divergences.projection._FEWEST", 1)
    monkeypatch.setenv("STILLROOM_CHUNK_MIB", "1e-6")
    batch = batch_by_hand()
    hidden, weight = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    head = torch.randn(6, 5, dtype=torch.float64)
    own = Projected(torch.randn(2, 3, 5, dtype=torch.float64), head)
    if kind == "dense":
        own = Dense(own.compute())
    if kind == "sparse":
        top = own.compute().log_softmax(-1).topk(3, -1)
        own = Sparse(top.indices, top.values, (1 - top.values.exp().sum(-1)).log(), vocabulary=6)
    teacher = Signal(logits=Dense(torch.randn(2, 4, 4, dtype=torch.float64)), parts={"teacher": Signal(logits=own)})
    found = []
    for projected in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logits = Projected(*leaves) if projected else Dense(leaves[0] @ leaves[1].T)
        values = values_of(objective, logits, teacher, batch)
        (values * torch.arange(8).view(2, 4)).sum().backward()
        found.append([values.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_masked_is_removed(objective):
    batch = batch_by_hand()
    student, teacher = signals()
    mask = batch.mask.clone()
    mask[1] = False
    poisoned = student.detach().clone()
    poisoned[1] = float("nan")
    poisoned.requires_grad_()
    less = dataclasses.replace(batch, mask=mask)
    (counted,) = objective.counted(less).values()
    values = values_of(objective, poisoned, teacher, less)
    masked_mean(values, counted).backward()
    assert poisoned.grad.isfinite().all()
    whole = values_of(objective, student, teacher, batch)
    torch.testing.assert_close(values[0], whole[0])
    assert not counted[1].any()


def test_a_span_that_counts_in_part_does_not_count():
    batch = batch_by_hand()
    mask = batch.mask.clone()
    mask[0, 2] = False  # the second of the two tokens of a span
    (counted,) = SpanLikelihood().counted(dataclasses.replace(batch, mask=mask)).values()
    assert counted.tolist() == [[True, False, False, True], [True, True, False, False]]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_positions_within_a_span_are_not_compared(objective):
    """The teacher has no answer after those bytes: comparing the nearest one would teach another position's."""
    batch = batch_by_hand()
    student, teacher = signals()
    (counted,) = objective.counted(batch).values()
    assert torch.equal(counted, aligned_positions(batch))
    assert counted.tolist() == [[True, True, False, True], [True, True, False, False]]
    values = values_of(objective, student, teacher, batch)
    assert (values[~counted] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_extreme_logits_stay_finite(objective):
    batch = batch_by_hand()
    student, teacher = signals(torch.float32)
    sharp = (student.detach().sign() * 1e4).requires_grad_()
    values = values_of(objective, sharp, teacher, batch)
    values.sum().backward()
    assert values.isfinite().all()
    assert sharp.grad.isfinite().all()
    said = {"teacher": Signal(logits=Dense(teacher.parts["teacher"].logits.values.sign() * 1e4))}
    extreme = Signal(logits=Dense(teacher.logits.values.sign() * 1e4), parts=said)
    assert values_of(objective, sharp, extreme, batch).isfinite().all()


def test_what_an_objective_lacks_is_said():
    batch = batch_by_hand()
    student, teacher = signals()
    plain = Signal(logits=teacher.logits)
    for objective in (UniversalLogits(), SpanLikelihood()):
        with pytest.raises(SignalError, match=r"needs the teacher's own answer in parts\['teacher'\], but the teacher"):
            values_of(objective, student, plain, batch)
    with pytest.raises(DataError, match="the batch has no 'teacher_index': its rows are not paired"):
        values_of(AlignedTargets(), student, teacher, dataclasses.replace(batch, inputs={}))
    with pytest.raises(DataError, match="SpanLikelihood needs labels"):
        values_of(SpanLikelihood(), student, teacher, dataclasses.replace(batch, labels=None))
    draws = Sparse(torch.zeros(2, 3, 1).long(), torch.zeros(2, 3, 1), torch.zeros(2, 3), 6, sampled=True)
    with pytest.raises(SignalError, match="UniversalLogits needs the teacher's probabilities, and these are random"):
        values_of(UniversalLogits(), student, Signal(parts={"teacher": Signal(logits=draws)}), batch)


@pytest.fixture(scope="module")
def recorded(small_tokenizer, smollm2_teacher, tmp_path_factory):
    """The real teacher on a few texts, recorded in its own ids, answering in the small tokenizer's."""
    texts = ["the cat sat on the mat", "a dog ran after it, and then it slept", "Grüße aus München"]
    rows = pair(texts, small_tokenizer, smollm2_teacher.tokenizer, 48, 24)
    folder = tmp_path_factory.mktemp("recorded") / "r"
    recording = sr.record(smollm2_teacher, rows.teacher, folder, sr.TopK(64), progress=False)
    return rows, across(recording, small_tokenizer, smollm2_teacher.tokenizer)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_a_student_of_another_tokenizer_learns_from_a_recording(objective, small_tokenizer, recorded):
    rows, teacher = recorded
    seen = []
    sr.fit(
        causal.fresh(small_tokenizer, hidden=32, layers=1, heads=2),
        teacher,
        rows,
        sr.Mix({objective: 1.0, sr.HardLabels(): 0.1}),
        plan=sr.Plan(steps=40, batch_size=3, learning_rate=1e-2),
        watchers=[seen.append],
        progress=False,
    )
    (name,) = objective.counted(rows.batch([0]))
    assert seen[-1].terms[name] < 0.7 * seen[0].terms[name]

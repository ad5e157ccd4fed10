"""Defects found in other libraries, each as a test of ours that would have failed there."""

from math import inf, log

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.divergences import (
    DIVERGENCES,
    bind,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    projection,
    reverse_kl,
    skew_kl,
)
from stillroom.errors import PairError, ShapeError, UsageError
from stillroom.objectives import HardLabels, Mix, SoftTargets, masked_mean
from stillroom.types import Batch, Dense, Projected, Signal, Sparse
from test_buckets import head, kept
from test_divergences import logits


@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("kind", ["dense", "projected", "sparse"])
def test_axolotl_gradient_matches_value_at_temperature_2(temperature, kind):
    """axolotl's fused top-k KL scaled its value by T^2 but not its gradient: 4x off at T = 2, 16x at T = 4."""
    (hidden, weight, bias), t = head(), logits(7, 11)

    def mean(hidden):
        student = Projected(hidden, weight.detach(), bias.detach())
        student = student if kind == "projected" else student.compute()
        return forward_kl(student, kept(t, 3) if kind == "sparse" else t, temperature=temperature).mean()

    step = 1e-6 * torch.randn_like(hidden)
    (gradient,) = torch.autograd.grad(mean(hidden), hidden)
    with torch.no_grad():
        difference = mean(hidden + step) - mean(hidden - step)
    assert (difference / 2 / (gradient * step).sum()).item() == pytest.approx(1.0, abs=1e-5)


def test_axolotl_chunk_without_positions_is_not_nan():
    """axolotl's chunked loss became nan when one chunk had no valid token; here what is masked is never passed."""
    inputs, mask = head(), torch.tensor([False] * 7)
    value = forward_kl(Projected(*inputs)[mask], logits(7, 11)[mask])
    value.sum().backward()
    assert all(tensor.grad.abs().sum() == 0 for tensor in inputs)


@pytest.mark.parametrize("offset", [0.0, -10.0, -20.0])
def test_liger_larger_teacher_padding_does_not_invent_logits(offset):
    """Liger filled missing student columns with logit 0: identical models differed by 13 nats at an offset of -20."""
    t = logits(5, 9) + offset
    with pytest.raises(PairError, match="7 ids, the teacher's 9"):
        forward_kl(t[:, :7], t)
    padded = torch.cat([t, logits(5, 2) + offset], -1)
    assert forward_kl(padded, t, extra_ids="ignore").abs().max() < 1e-14


def test_liger_weight_gradient_is_not_summed_in_bf16():
    """Liger's chunked losses add up weight gradients in the weight's dtype: bf16 loses small terms chunk by chunk."""
    hidden, weight = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_chunk_size", lambda *_: 1)
        cross_entropy(Projected(hidden, weight), torch.zeros(512, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]  # in bf16, 128 + 0.5 is 128 again


def test_liger_jsd_is_not_computed_in_bf16():
    """Liger's and TRL's JSD take log-softmax in the logits' dtype: bf16 has two to three digits left."""
    s, t = logits(5, 1000).bfloat16(), logits(5, 1000).bfloat16()
    torch.testing.assert_close(jensen_shannon(s, t).double(), jensen_shannon(s.double(), t.double()), rtol=1e-5, atol=0)


def test_liger_ignored_labels_are_ignored_in_chunks(monkeypatch):
    """Liger's fused path never applied ignore_index (Liger#974)."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 2)
    inputs, labels = head(), torch.tensor([1, -100, -100, -100, 2, -100, 3])
    value = cross_entropy(Projected(*inputs), labels)
    assert value[labels < 0].tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(value.mean(), inputs[0])
    assert gradient[labels < 0].abs().sum() == 0
    assert gradient[labels >= 0].abs().sum() > 0


@pytest.mark.parametrize("finish", [{"softcap": 2.0}, {"scale": 0.25}])
def test_trl_softcap_and_scale_are_not_forgotten(finish):
    """TRL's fused path ignored final softcaps and logit scales (trl#6629)."""
    student = Projected(*head(), **finish)
    assert torch.allclose(forward_kl(student, logits(7, 11) * 0), forward_kl(student.compute(), logits(7, 11) * 0))


def test_trl_jsd_beta_zero_jump():
    """TRL's JSD is 0.00029 at beta 0.001 and 0.287 at 0, where it becomes a KL; here the ends are refused."""
    s, t = logits(5, 7), logits(5, 7)
    small = [jensen_shannon(s, t, teacher_weight=b).max().item() for b in (1e-2, 1e-4, 1e-6)]
    assert small[0] > small[1] > small[2] > 0
    assert small[2] < 1e-5
    with pytest.raises(UsageError, match="tends to 0"):
        jensen_shannon(s, t, teacher_weight=0.0)


def test_trl_temperature_reaches_the_loss():
    """TRL's GKD temperature only changes how rollouts are sampled; here it changes the divergence."""
    s, t = logits(5, 7), logits(5, 7)
    torch.testing.assert_close(jensen_shannon(s, t, temperature=3.0), jensen_shannon(s / 3, t / 3))


def test_kdflow_mirrored_beta():
    """KDFlow's beta weighs the student, TRL's the teacher, under one name; here the name says whom it weighs."""
    s, t = logits(5, 7), logits(5, 7)
    b, p, q = 0.1, t.softmax(-1), s.softmax(-1)
    m = b * p + (1 - b) * q
    teachers = b * (p * (p / m).log()).sum(-1) + (1 - b) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(jensen_shannon(s, t, teacher_weight=b), teachers)
    torch.testing.assert_close(jensen_shannon(s, t, teacher_weight=b), jensen_shannon(t, s, teacher_weight=1 - b))
    assert not torch.allclose(teachers, jensen_shannon(s, t, teacher_weight=1 - b), rtol=0.01)


def test_kdflow_truncation_does_not_drop_teacher_mass():
    """KDFlow cut both sides to the smaller vocabulary, whatever the teacher had said beyond it."""
    t = torch.zeros(3, 9).index_fill_(1, torch.tensor([8]), 5.0)
    for extra_ids in ("zero", "ignore"):
        with pytest.raises(PairError, match="teacher's mass on the rest would be lost"):
            forward_kl(torch.zeros(3, 8), t, extra_ids=extra_ids)


def test_modelopt_one_scale_on_every_path():
    """Model-Optimizer multiplies by T^2 on its standard path and not on its fused one."""
    inputs, t = head(), logits(7, 11)
    dense, chunked = (forward_kl(s, t, temperature=3.0) for s in (Projected(*inputs).compute(), Projected(*inputs)))
    torch.testing.assert_close(dense, chunked)


def test_swift_does_not_copy_columns():
    """ms-swift copied the student's logits into the teacher's missing columns: the target then agrees with padding.

    With probability 0 there, the student pays -log(1 - its mass on padding) more than over the shared ids alone.
    """
    s, t = logits(5, 9), logits(5, 7)
    wasted = s.softmax(-1)[:, 7:].sum(-1)
    torch.testing.assert_close(forward_kl(s, t) - forward_kl(s, t, extra_ids="ignore"), -torch.log1p(-wasted))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_swift_top_k_feels_the_tail(divergence):
    """ms-swift renormalises the top k on both sides: logits outside get no gradient, and the tail can be anything."""
    t, s = logits(5, 11), logits(5, 11).requires_grad_()
    teacher = kept(t, 3)
    (gradient,) = torch.autograd.grad(divergence(s, teacher).sum(), s)
    outside = torch.ones(5, 11, dtype=torch.bool).scatter(-1, teacher.ids, False)
    assert (gradient[outside].abs() > 1e-6).all()


@pytest.mark.parametrize("count", [1, 4, 10])
def test_verl_topk_never_negative(count):
    """verl's top-k KL has no tail and no renormalisation: a student sure of the kept ids scores below 0."""
    t = logits(200, 11)
    teacher = kept(t, count)
    sure = t.clone().scatter_add(-1, teacher.ids, torch.full((200, count), 3.0, dtype=t.dtype))
    inside = teacher.log_probs.exp() * (teacher.log_probs - sure.log_softmax(-1).gather(-1, teacher.ids))
    assert (inside.sum(-1) < 0).any()
    for divergence in (forward_kl, reverse_kl, jensen_shannon, skew_kl):
        assert (divergence(sure, teacher) >= 0).all()


def test_torchtune_forward_kl_is_not_cross_entropy():
    """torchtune's ForwardKLLoss leaves out the teacher's entropy: 1.92 nats between a model and itself."""
    t = logits(5, 7)
    assert forward_kl(t, t).abs().max() < 1e-15
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    s = logits(5, 7)
    crossed = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(forward_kl(s, t), crossed - entropy)


def test_mdistiller_log_softmax_at_60x():
    """mdistiller takes log(softmax): nan in float32 once logits are 60 times as large."""
    s, t = (60 * logits(4, 10)).float().requires_grad_(), (60 * logits(4, 10)).float()
    assert not s.softmax(-1).log().isfinite().all()
    value = forward_kl(s, t)
    value.sum().backward()
    torch.testing.assert_close(value.double(), forward_kl(s.double(), t.double()))
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_deit_does_not_divide_by_classes():
    """DeiT divides by batch x classes: 1,000 times smaller on ImageNet. Twice the classes, twice split, same value."""
    s, t = logits(5, 10), logits(5, 10)
    halves = (torch.cat([x, x], -1) for x in (s, t))
    torch.testing.assert_close(forward_kl(*halves), forward_kl(s, t))


def test_distillkit_fewer_entries_than_k_is_not_nan():
    """DistillKit's tail became nan when a position had fewer than k log-probabilities; unused slots are -inf here."""
    ids = torch.tensor([[0, 1, 2]])
    teacher = Sparse(ids, torch.tensor([[log(0.6), log(0.3), -inf]]), torch.tensor([log(0.1)]), 5)
    s = torch.zeros(1, 5, requires_grad=True)
    value = forward_kl(s, teacher)
    value.sum().backward()
    assert value.item() == pytest.approx(0.6 * log(0.6 / 0.2) + 0.3 * log(0.3 / 0.2) + 0.1 * log(0.1 / 0.4))
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_distillkit_mass_above_one_is_normalised():
    """DistillKit's compressed top-k sums to more than 1 for half the tokens; a lossy code may not make KL negative."""
    ids = torch.tensor([[0, 1, 2]])
    teacher = Sparse(ids, torch.tensor([[0.7, 0.3, 0.1]]).log(), torch.tensor([-inf]), 3)
    s = torch.tensor([[0.7, 0.3, 0.1]]).log()
    assert forward_kl(s, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_labml_teacher_logits_on_both_sides():
    """labml's example compared the teacher with itself unnoticed: the gradient goes to the student, and only there."""
    s, t = logits(5, 7).requires_grad_(), logits(5, 7).requires_grad_()
    for divergence in (forward_kl, reverse_kl, bind(jensen_shannon, teacher_weight=0.5)):
        found = torch.autograd.grad(divergence(s, t).sum(), (s, t), allow_unused=True)
        assert found[0].abs().sum() > 0
        assert found[1] is None


def said(values):
    return Signal(logits=Dense(values))


def batch_of(count, **rest):
    return Batch(tuple(map(str, range(count))), {}, **rest)


def known():
    """The logits [4, 10] on which other libraries' values are known; labels 0, 3, 6, 9."""
    i, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(10, dtype=torch.float64)[None]
    return torch.sin(7 * i + 3 * j + 1), 2 * torch.cos(5 * i + 2 * j + 0.5)


def test_axolotl_divides_by_positions_not_by_kept_entries():
    """axolotl's fallback normaliser is tokens x k: keeping twice as many entries halved the loss."""
    s, t = logits(5, 11), logits(5, 11)
    losses = [SoftTargets(temperature=1.0)(said(s), Signal(logits=kept(t, k)), batch_of(5)) for k in (10, 11)]
    few, all_of_them = (masked_mean(loss["soft_targets"]) for loss in losses)
    torch.testing.assert_close(all_of_them, forward_kl(s, t).mean())
    torch.testing.assert_close(few, all_of_them)  # ten entries and the tail of one are the same eleven buckets


def test_axolotl_lengths_are_not_repaired_by_slicing():
    """axolotl cut the longer of student and stored teacher to the other's length: targets slid along the sequence."""
    with pytest.raises(ShapeError, match=r"\[2, 5\], the teacher at \[2, 4\]"):
        SoftTargets()(said(logits(2, 5, 7)), said(logits(2, 4, 7)), batch_of(2))


@pytest.mark.parametrize("whose", ["dense", "projected", "sparse"])
def test_liger_never_holds_the_logits_of_all_positions(whose, monkeypatch):
    """LigerFusedLinearJSD allocates [tokens, vocabulary]; others keep that for every micro-batch (ms-swift#10097)."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 2)
    positions, vocabulary, width = 64, 50, 3
    hidden, weight = torch.randn(positions, width, requires_grad=True), torch.randn(vocabulary, width)
    dense = torch.randn(positions, vocabulary)
    other = Projected(torch.randn(positions, width), weight.detach().clone())
    teacher = {"dense": dense, "projected": other, "sparse": kept(dense, 4)}[whose]
    largest = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() != dense.data_ptr():
                largest.append(found.untyped_storage().nbytes() // found.element_size())
            return found

    with Watching():
        jensen_shannon(Projected(hidden, weight.requires_grad_()), teacher).mean().backward()
    assert max(largest) < positions * vocabulary / 4


def test_trl_batchmean_counts_positions():
    """trl#4105: batchmean over [B, T, V] divides by B, or by B T V; ModelOpt's default mean divides by V as well."""
    s, t = logits(3, 4, 6), logits(3, 4, 6)

    def loss(s, t):
        return masked_mean(SoftTargets(temperature=1.0)(said(s), said(t), batch_of(len(s)))["soft_targets"])

    once = loss(s, t)
    torch.testing.assert_close(loss(s.repeat(1, 5, 1), t.repeat(1, 5, 1)), once)
    torch.testing.assert_close(loss(s.repeat(2, 1, 1), t.repeat(2, 1, 1)), once)
    torch.testing.assert_close(loss(s.repeat(1, 1, 3), t.repeat(1, 1, 3)), once)


@pytest.mark.parametrize("objective", [SoftTargets(), HardLabels()], ids=["soft_targets", "hard_labels"])
def test_areal_a_position_answers_for_itself(objective):
    """AReaL#1729, ms-swift#8436: logits one place away from labels or teacher, or a mask shifted against them."""
    s, mask = logits(1, 5, 7).requires_grad_(), torch.tensor([[False, False, True, False, False]])
    given = batch_of(1, labels=torch.tensor([[0, 1, 2, 3, 4]]), mask=mask)
    sure = torch.nn.functional.one_hot(given.labels, 7).double() * 20
    (term,) = objective(s_said := said(s), said(sure), given).values()
    (gradient,) = torch.autograd.grad(term.sum(), s_said.logits.values)
    assert term.nonzero().tolist() == [[0, 2]]
    assert gradient.abs().sum(-1).nonzero().tolist() == [[0, 2]]
    assert gradient[0, 2].argmin() == 2  # down the gradient, label 2 rises


def test_verl_reverse_kl_from_top_k_does_not_collapse():
    """verl#5041, #6676: top-k reverse KL falls without limit as the student's mass leaves the kept ids."""
    t = logits(4, 11)
    teacher, s = kept(t, 3), logits(4, 11).requires_grad_()
    optimiser = torch.optim.Adam([s], lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        reverse_kl(s, teacher).sum().backward()
        optimiser.step()
    ours = s.detach().softmax(-1).gather(-1, teacher.ids)
    torch.testing.assert_close(ours, teacher.log_probs.exp(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_mdistiller_two_classes_still_teach(name):
    """mdistiller#60: on two classes DKD's second term is 0 whatever the student says, and teaches nothing."""
    divergence = bind(DIVERGENCES[name], **({"alpha": 0.5, "beta": 0.5} if name == "alpha_beta" else {}))
    s, t = torch.tensor([[1.0, -1.0]], requires_grad=True), torch.tensor([[0.5, 1.5]])
    for teacher in (t, kept(t, 1), kept(t, 2)):
        value = divergence(s, teacher)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert value.item() > 0.05
        assert gradient[0, 0] > 0.01


def test_kd_lib_soft_targets_are_the_known_value():
    """One name, four numbers: 1.20048 here; DeiT divides by classes, KD_Lib squares softmaxes, torchdistill drops T^2.

    On the known logits at T = 4: 1.2004754167 (RepDistiller, mdistiller), 0.12005 (DeiT), 0.02402 (KD_Lib at its
    default T = 20), 0.07503 (torchdistill with alpha = 0).
    """
    s, t = known()
    ours = masked_mean(SoftTargets(temperature=4.0)(said(s), said(t), batch_of(4))["soft_targets"]).item()
    assert ours == pytest.approx(1.2004754167, abs=1e-10)
    assert ours / 10 == pytest.approx(0.12005, abs=1e-5)
    assert ours / 16 == pytest.approx(0.07503, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e-9, 1.0])
def test_torchdistill_the_factor_does_not_depend_on_the_label_weight(weight):
    """torchdistill drops T^2 when alpha is 0 or there are no labels: at T = 4, 16 times below alpha = 1e-9."""
    s, t = known()
    alone = SoftTargets(temperature=4.0)(said(s), said(t), batch_of(4))["soft_targets"]
    labelled = batch_of(4, labels=torch.tensor([0, 3, 6, 9]))
    mixed = Mix({SoftTargets(temperature=4.0): 1.0, HardLabels(): weight})(said(s), said(t), labelled)
    assert torch.equal(mixed["soft_targets"], alone)


def test_mlld_a_mask_selects_examples():
    """MLLD multiplies a KL that is already a mean by its mask: a constant near 0.5, and nothing is selected."""
    s, t = known()
    mask, s = torch.tensor([True, False, False, True]), s.requires_grad_()
    found = masked_mean(SoftTargets(temperature=4.0)(said(s), said(t), batch_of(4, mask=mask))["soft_targets"], mask)
    torch.testing.assert_close(found, 16 * forward_kl(s[mask], t[mask], temperature=4.0).mean())
    (gradient,) = torch.autograd.grad(found, s)
    assert gradient.abs().sum(-1).gt(0).tolist() == mask.tolist()


def test_hinton_the_hot_gradient_is_the_centred_difference():
    """haitongli#48, Tf-KD#5, deit#61: reductions and T^2. Hinton et al. 2015, eq. 4: (s - t, both centred) / (C B)."""
    (s, t), hot = known(), 1e4
    loss = masked_mean(SoftTargets(temperature=hot)(said(s.requires_grad_()), said(t), batch_of(4))["soft_targets"])
    (gradient,) = torch.autograd.grad(loss, s)
    s = s.detach()
    torch.testing.assert_close(gradient, (s - s.mean(1, True) - t + t.mean(1, True)) / 40, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_liger_fp16_at_1e4_is_not_nan(name):
    """Liger#862, Liger#1453, cls_KD#13: nan from losses; in half precision 1e4 is a number, e^12 is not."""
    divergence = bind(DIVERGENCES[name], **({"alpha": 0.5, "beta": 0.5} if name == "alpha_beta" else {}))
    s = torch.tensor([[6e4, -6e4, 0.0], [1e4, -1e4, 0.0]], dtype=torch.float16, requires_grad=True)
    t = torch.tensor([[-6e4, 6e4, 0.0], [1e4, -1e4, 0.0]], dtype=torch.float16)
    value = divergence(s, t)  # up to 120,000 nats: no float16
    value.sum().backward()
    torch.testing.assert_close(value.double(), divergence(s.double(), t.double()), rtol=1e-5, atol=1e-6)
    assert value.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()

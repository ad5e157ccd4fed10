"""What may be spent less than exactly: bf16 products, and a backward pass over a sample of the vocabulary's columns."""

import gc

import pytest
import torch
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillroom.divergences import forward_kl, matmuls, projection
from stillroom.divergences.projection import EXACT, Arithmetic, by_chunks
from stillroom.errors import UsageError
from stillroom.objectives import SoftTargets, masked_mean
from stillroom.types import Batch, Dense, Projected, Signal, Sparse
from test_buckets import kept
from test_divergences import INFINITE, every

POSITIONS, VOCABULARY, WIDTH = 6, 40, 5
KINDS = ("dense", "projected", "sparse")
SAMPLED, BF16 = Arithmetic(keep_columns=0.3), Arithmetic(matmul="bf16")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("how", [EXACT, SAMPLED, BF16, Arithmetic("bf16", 0.3)], ids=repr)


def head(dtype=torch.float64, positions=POSITIONS):
    """A sure student: few columns matter."""
    shapes = ((positions, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    return [(1.5 * torch.randn(*shape)).to(dtype).requires_grad_() for shape in shapes]


def teacher_of(kind, positions=POSITIONS):
    hidden, weight, bias = (tensor.detach() for tensor in head(positions=positions))
    projected = Projected(hidden, weight, bias)
    return {"projected": projected, "dense": Dense(projected.compute())}.get(kind) or kept(projected.compute(), 4)


def draws():
    """Eight draws of a teacher, as a recording keeps them."""
    log_probs = teacher_of("dense").values.log_softmax(-1)
    ids = torch.multinomial(log_probs.exp(), 8, replacement=True)
    return Sparse(ids, log_probs.gather(-1, ids), torch.zeros(POSITIONS), VOCABULARY, sampled=True)


def gradients(divergence, inputs, teacher, how, weights=None):
    value = divergence(Projected(*inputs), teacher, arithmetic=how)
    total = value.mean() if weights is None else value @ weights
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, inputs)])


def threshold_for_a_third(divergence, inputs, teacher):
    """What leaves a third of the columns, or fewer."""
    logits = Projected(*inputs).compute().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(logits, teacher).sum(), logits)
    return float(3 * gradient.abs().amax(0).mean())


def check_unbiased(divergence, teacher, weights=None):
    """The error of the mean over n repeats falls as 1/sqrt(n), for n up to 128: nothing else is left."""
    inputs = head()
    exact = gradients(divergence, inputs, teacher, EXACT, weights)
    how = Arithmetic(keep_columns=threshold_for_a_third(divergence, inputs, teacher))
    errors = torch.stack([gradients(divergence, inputs, teacher, how, weights) for _ in range(128)]) - exact
    one = errors.norm(dim=-1).square().mean().sqrt()
    assert one > 0.01 * exact.norm(), "nothing was sampled"
    for repeats in (4, 16, 64, 128):
        mean = errors.unflatten(0, (-1, repeats)).mean(1).norm(dim=-1).square().mean().sqrt()
        assert mean < 1.7 * one / repeats**0.5, f"{repeats} repeats: {mean / one * repeats**0.5:.2f}"


@every
@every_kind
def test_sampled_columns_are_unbiased(divergence, kind):
    """For every divergence and teacher, tail included: hidden, weight and bias gradients."""
    torch.manual_seed(1)
    check_unbiased(divergence, teacher_of(kind))


def test_sampled_columns_are_unbiased_from_draws_and_with_any_weights(monkeypatch):
    """Of a sampled recording; of positions that weigh differently, chunk by chunk."""
    torch.manual_seed(1)
    check_unbiased(forward_kl, draws())
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 4)
    check_unbiased(forward_kl, teacher_of("dense"), torch.rand(POSITIONS, dtype=torch.float64))


@every
@every_kind
def test_values_are_exact(divergence, kind):
    """Only backward is sampled; with more than half of the columns to keep, all are, and nothing is drawn."""
    inputs, teacher = head(), teacher_of(kind)
    value = divergence(Projected(*inputs), teacher, arithmetic=SAMPLED)
    torch.testing.assert_close(value, divergence(Projected(*inputs), teacher), rtol=0, atol=0)
    before = torch.get_rng_state()
    found = gradients(divergence, inputs, teacher, Arithmetic(keep_columns=1e-9))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found, gradients(divergence, inputs, teacher, EXACT))


def test_gradcheck_where_all_columns_are_kept():
    inputs, teacher = head(), teacher_of("projected")
    how = Arithmetic(keep_columns=1e-12)
    assert gradcheck(lambda *inputs: forward_kl(Projected(*inputs, softcap=3.0), teacher, arithmetic=how), inputs)


def test_a_seed_repeats_the_sample():
    """torch.manual_seed, as fit() sets it for every step, decides what is drawn."""
    inputs, teacher, found = head(), teacher_of("dense"), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(gradients(forward_kl, inputs, teacher, SAMPLED))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_sampling_hides_no_nan():
    """A NaN is no small gradient."""
    inputs = head()
    with torch.no_grad():
        inputs[0][2, 0] = torch.nan
    assert gradients(forward_kl, inputs, teacher_of("dense"), SAMPLED).isnan().any()


@every
@every_kind
def test_bf16_is_near_float64(divergence, kind):
    """Of float32 tensors: values and gradients are float32, and wrong by bf16's rounding of the logits at most."""
    torch.manual_seed(0)
    inputs, teacher = head(torch.float32), teacher_of(kind)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    value = divergence(Projected(*inputs), teacher, arithmetic=BF16)
    assert value.dtype == torch.float32
    exact = divergence(Projected(*exact_inputs), teacher)
    assert (value.double() - exact).norm() < 0.05 * exact.norm()
    found = torch.autograd.grad(value.mean(), inputs)
    wanted = torch.autograd.grad(exact.mean(), exact_inputs)
    for a, b in zip(found, wanted):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() < 0.05 * b.norm()


def test_a_head_has_one_bf16_copy():
    """Kept from step to step, written anew when the optimiser or an assignment changed the head, gone with it."""
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    before = len(matmuls._copies)
    copy = matmuls.in_dtype(weight, torch.bfloat16)
    assert matmuls.in_dtype(weight, torch.bfloat16) is copy
    weight.grad = torch.randn(VOCABULARY, WIDTH)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()  # leaves no mark on the tensor
    assert matmuls.in_dtype(weight, torch.bfloat16) is copy  # the same memory
    assert torch.equal(copy, weight.detach().bfloat16())
    weight.data = torch.randn(VOCABULARY, WIDTH)
    assert torch.equal(matmuls.in_dtype(weight, torch.bfloat16), weight.detach().bfloat16())
    assert len(matmuls._copies) == before + 1
    del weight
    gc.collect()
    assert len(matmuls._copies) == before


class Peak(TorchDispatchMode):
    """The most bytes in tensors at once beside the given ones; every storage counts once."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(positions, how, vocabulary=1024, width=64):
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (positions, vocabulary))
    given = (hidden, weight, torch.randn(positions, width), torch.randn(vocabulary, width))
    with Peak(*given) as peak:
        forward_kl(Projected(*given[:2]), Projected(*given[2:]), arithmetic=how).mean().backward()
    return peak.bytes


@every_option
def test_memory_does_not_grow_with_the_positions(how, monkeypatch):
    """But for hidden states and what is one number per position; and there is no second [V, D] beside the gradient."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 8)
    monkeypatch.setattr(matmuls, "_BLOCK", 2**12)
    few, many = peak_bytes(16, how), peak_bytes(256, how)
    assert many - few <= (256 - 16) * 4 * (4 * 64 + 8)  # hidden and its gradient, both sides cast
    chunks, head_bytes = 24 * 8 * 1024 * 4, 1024 * 64 * 4
    copies = head_bytes if how.matmul == "bf16" else 0  # of student and teacher, half as wide, and kept
    assert many - 256 * 64 * 4 * 4 <= head_bytes + copies + chunks


def test_no_head_is_held_twice(monkeypatch):
    """A wide head and few ids per chunk: what is held is the gradient, and less than half as much beside it."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 4)
    monkeypatch.setattr(matmuls, "_BLOCK", 2**12)
    for how in (EXACT, Arithmetic(keep_columns=1.0)):
        assert peak_bytes(8, how, 512, 512) < 1.5 * 512 * 512 * 4


@every
@every_kind
@every_option
def test_masked_is_removed(divergence, kind, how):
    """With every option: the same numbers as without the masked positions, whatever these hold; and 0 if all are."""
    inputs, teacher = head(torch.float32), teacher_of(kind)
    mask = torch.tensor([True, False, True, True, False, True])
    spoilt = torch.where(mask[:, None], inputs[0], torch.nan)
    masked = step(divergence, Projected(spoilt, *inputs[1:]), teacher, mask, how, inputs)
    removed = step(divergence, Projected(*inputs)[mask], teacher[mask], None, how, inputs)
    torch.testing.assert_close(masked, removed)
    nothing = step(divergence, Projected(*inputs), teacher, torch.zeros(POSITIONS, dtype=torch.bool), how, inputs)
    assert nothing[0] == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in nothing[1])


def step(divergence, student, teacher, mask, how, inputs):
    torch.manual_seed(0)
    objective = SoftTargets(divergence, matmul=how.matmul, keep_columns=how.keep_columns)
    ids = tuple(map(str, range(len(student.hidden))))
    (values,) = objective(Signal(logits=student), Signal(logits=teacher), Batch(ids, {}, mask=mask)).values()
    value = masked_mean(values, mask)
    return value.detach(), torch.autograd.grad(value, inputs)


@every
@every_option
def test_large_logits_stay_finite(divergence, how):
    """|logit| = 1e4 on both sides: values and gradients are numbers."""
    hidden = torch.zeros(4, 2, requires_grad=True)
    with torch.no_grad():
        hidden[:, 0] = torch.tensor([1.0, -1.0, 1.0, 0.0])
    weight = torch.zeros(VOCABULARY, 2)
    weight[0, 0], weight[1, 0] = 1e4, -1e4
    teacher = Projected(hidden.detach().flip(0), weight)
    value = divergence(Projected(hidden, weight.requires_grad_()), teacher, arithmetic=how)
    if divergence not in INFINITE:
        assert value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (hidden, weight)))


@every_option
def test_frozen_head_and_adapter(how):
    """A frozen head gets no gradient, the hidden states the same; an adapter W + s B A gets its own through the sum."""
    hidden, weight, bias = head(torch.float32)
    teacher = teacher_of("sparse")
    torch.manual_seed(0)
    full = torch.autograd.grad(forward_kl(Projected(hidden, weight, bias), teacher, arithmetic=how).sum(), hidden)
    torch.manual_seed(0)
    frozen = Projected(hidden, weight.detach(), bias.detach())
    forward_kl(frozen, teacher, arithmetic=how).sum().backward()
    torch.testing.assert_close(hidden.grad, full[0])
    assert weight.grad is None
    down, up = torch.randn(2, WIDTH, requires_grad=True), torch.randn(VOCABULARY, 2, requires_grad=True)
    adapted = Projected(hidden, weight.detach() + 0.5 * up @ down)
    found = torch.autograd.grad(forward_kl(adapted, teacher, arithmetic=EXACT).mean(), (down, up), retain_graph=True)
    wanted = torch.autograd.grad(forward_kl(adapted.compute(), teacher).mean(), (down, up))
    torch.testing.assert_close(found, wanted)


def test_low_precision_head_in_one_chunk_needs_no_float32_sum(monkeypatch):
    """bf16 parameters and few positions: one chunk whose logits take less than a float32 [V, D] would."""
    student = Projected(*(torch.empty(n, 64, device="meta", dtype=torch.bfloat16) for n in (64, 2**20)))
    student.weight.requires_grad_()
    assert projection._chunk_size(64, student, None, torch.bfloat16, False) == 64
    assert projection._chunk_size(4096, student, None, torch.bfloat16, False) < 256


@pytest.mark.parametrize(
    "settings", [{"matmul": "fp8"}, {"keep_columns": 0}, {"keep_columns": -1.0}, {"keep_columns": float("nan")}]
)
def test_arithmetic_out_of_range_is_refused(settings):
    """By the objective too, before anything runs."""
    (name,) = settings
    for make in (Arithmetic, SoftTargets):
        with pytest.raises(UsageError, match=name):
            make(**settings)


def test_arithmetic_is_for_projected_students():
    """A Dense student has done its matmul: an option that did nothing would mislead. A user's divergence needs none."""
    with pytest.raises(UsageError, match=r"bf16.*Projected"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), arithmetic=BF16)

    def own(student, teacher, *, temperature, extra_ids):
        return forward_kl(student, teacher)

    signal = Signal(logits=Dense(torch.zeros(2, 3)))
    assert SoftTargets(own)(signal, signal, Batch(("a", "b"), {}))["soft_targets"].sum() == 0


def test_chunks_draw_their_own_columns(monkeypatch):
    """Any row function; chunks of 2: an id may be kept in one chunk and not in another."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 2)
    hidden, weight, _ = head()
    seen = []
    real = projection.sample_columns
    monkeypatch.setattr(projection, "sample_columns", lambda *a: seen.append(real(*a)) or seen[-1])
    by_chunks(Projected(hidden, weight), lambda z: z.logsumexp(-1), arithmetic=SAMPLED).sum().backward()
    assert len(seen) == 3
    assert len({len(ids) for _, ids in seen if ids is not None}) > 1

"""By chunks or whole, compiled or eager, whatever gradient arrives: the same values and gradients, at less cost."""

import pytest
import torch
from torch.autograd import gradcheck

from stillroom.divergences import cross_entropy, forward_kl, projection, row_steps
from stillroom.divergences.formulas import minus_log_q
from stillroom.divergences.projection import by_chunks
from stillroom.errors import ShapeError, UsageError
from stillroom.types import Projected


def head(positions=7, vocabulary=11, width=4, dtype=torch.float64):
    shapes = ((positions, width), (vocabulary, width), (vocabulary,))
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def entropy_rows(logits):
    """Something that is no divergence."""
    log_q = logits.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("finish", [{}, {"softcap": 2.0}, {"scale": 0.3}, {"softcap": 2.0, "scale": 3.0}])
def test_chunks_of_any_size_agree(chunk, finish):
    """Values and gradients do not depend on the chunk, with softcap and scale or without."""
    inputs = head()
    expected = entropy_rows(Projected(*inputs, **finish).compute())
    value = by_chunks(Projected(*inputs, **finish), entropy_rows, chunk=chunk)
    torch.testing.assert_close(value, expected)
    wanted = torch.autograd.grad(expected.mean(), inputs)
    torch.testing.assert_close(torch.autograd.grad(value.mean(), inputs), wanted)


def test_whatever_gradient_arrives():
    """Gradcheck position by position (weights differ) and of the sum (they do not); [2, 3] positions."""
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), *head()[1:]]

    def value(*inputs):
        return by_chunks(Projected(*inputs, softcap=2.0), entropy_rows, chunk=2)

    assert value(*inputs).shape == (2, 3)
    assert gradcheck(value, inputs)
    assert gradcheck(lambda *inputs: value(*inputs).sum(), inputs)


def test_backward_twice_through_one_graph():
    """What was given away is found anew: even if the optimiser has changed the gradient in the meantime."""
    inputs = head()
    loss = by_chunks(Projected(*inputs), entropy_rows, chunk=3).mean()
    loss.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad.zero_()
    loss.backward()
    torch.testing.assert_close([tensor.grad for tensor in inputs], first)


def test_a_changed_head_is_noticed():
    """Changing the weights between forward and backward is an error, as everywhere in torch."""
    inputs = head()
    loss = by_chunks(Projected(*inputs), entropy_rows).mean()
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def counting(calls, name, function):
    def call(*arguments, **settings):
        calls.append(name)
        return function(*arguments, **settings)

    return call


def counted(monkeypatch, run):
    """The head's products that ``run`` makes: logits and hidden gradients (mm, addmm), weight gradients (add)."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", counting(calls, "mm", torch.mm))
        patch.setattr(torch, "addmm", counting(calls, "addmm", torch.addmm))
        patch.setattr(projection, "add_weight_gradient", counting(calls, "add", projection.add_weight_gradient))
        run()
    return calls


def test_three_products_with_equal_weights(monkeypatch):
    """One chunk, a mean: logits, hidden gradient, weight gradient, and backward multiplies no more matrices."""
    hidden, weight, _ = head()
    calls = counted(monkeypatch, lambda: by_chunks(Projected(hidden, weight), entropy_rows).mean().backward())
    assert calls == ["mm", "mm", "add"]


def test_frozen_head_costs_no_weight_gradient(monkeypatch):
    """Two products, however positions weigh; none but the logits under no_grad or without anything to train."""
    hidden, weight, _ = head()
    frozen = Projected(hidden, weight.detach())
    calls = counted(monkeypatch, lambda: (by_chunks(frozen, entropy_rows) @ torch.rand(7).double()).backward())
    assert calls == ["mm", "mm"]
    with torch.no_grad():
        assert counted(monkeypatch, lambda: by_chunks(Projected(hidden, weight), entropy_rows)) == ["mm"]
    assert not by_chunks(frozen[torch.arange(7)].map(torch.Tensor.detach), entropy_rows).requires_grad


def test_trainable_head_on_frozen_features():
    """Only the weight asks for a gradient: it gets the right one."""
    hidden, weight, _ = head()
    expected = torch.autograd.grad(entropy_rows(hidden.detach() @ weight.t()).mean(), weight)
    value = by_chunks(Projected(hidden.detach(), weight), entropy_rows, chunk=2).mean()
    torch.testing.assert_close(torch.autograd.grad(value, weight), expected)


def test_no_positions():
    """Nothing selected: no values, and a gradient of 0 that keeps the graph alive."""
    inputs = [torch.zeros(0, 4, dtype=torch.float64, requires_grad=True), *head()[1:]]
    value = by_chunks(Projected(*inputs), entropy_rows)
    assert value.shape == (0,)
    value.sum().backward()
    assert all(tensor.grad.abs().sum() == 0 for tensor in inputs)


def test_low_precision_head_adds_up_in_float32():
    """bf16: the weight gradient over 64 chunks is as close to float64 as over one chunk; values are float32."""
    inputs = head(256, 64, 16, torch.bfloat16)
    labels = torch.randint(64, (256,))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(cross_entropy(Projected(*exact_inputs).compute(), labels).mean(), exact_inputs)
    errors = []
    for chunk in (256, 4):
        value = by_chunks(Projected(*inputs), minus_log_q, (labels,), chunk=chunk)
        assert value.dtype == torch.float32
        found = torch.autograd.grad(value.mean(), inputs)
        assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 3
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)])
    assert max(errors[0]) < 0.02
    assert all(many < 1.5 * one + 1e-3 for one, many in zip(*errors))


def test_autocast_is_honoured():
    """Under autocast the matmuls run in its dtype, as torch.nn.functional.linear does; gradients keep theirs."""
    inputs = head(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = entropy_rows(Projected(*inputs).compute().float())
        value = by_chunks(Projected(*inputs), entropy_rows, chunk=3)
    torch.testing.assert_close(value, dense, rtol=1e-3, atol=1e-3)
    assert value.dtype == torch.float32
    value.mean().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_cross_entropy_by_chunks(monkeypatch):
    """Projected == dense, with ignored positions, and finite."""
    monkeypatch.setattr(projection, "_chunk_size", lambda *_: 3)
    inputs, labels = head(), torch.tensor([1, -100, 0, 10, -100, 5, 5])
    expected, value = cross_entropy(Projected(*inputs).compute(), labels), cross_entropy(Projected(*inputs), labels)
    torch.testing.assert_close(value, expected)
    for weights in (torch.ones(7).double(), torch.rand(7).double()):
        wanted = torch.autograd.grad(expected @ weights, inputs, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(value @ weights, inputs, retain_graph=True), wanted)


def test_compile_failure_is_not_the_end(monkeypatch, caplog):
    """Where torch.compile does not work the same function runs eagerly, and it is tried once only."""
    attempts = []

    def broken(function):
        def fail(*_):
            attempts.append(1)
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(row_steps, "_compile_failed", [])
    row_steps._compiled.cache_clear()
    inputs = head()
    value = by_chunks(Projected(*inputs), entropy_rows, chunk=3, compiled=True)
    row_steps._compiled.cache_clear()
    torch.testing.assert_close(value, entropy_rows(Projected(*inputs).compute()))
    assert len(attempts) == 1
    assert "no compiler here" in caplog.text


def test_small_inputs_are_not_compiled(monkeypatch):
    """Compiling takes seconds: a test or a table of ten classes never pays for it; STILLROOM_COMPILE=0 never does."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    by_chunks(Projected(*head()), entropy_rows).sum().backward()
    monkeypatch.setattr(projection, "_COMPILE_FROM", 1)
    monkeypatch.setenv("STILLROOM_COMPILE", "0")
    by_chunks(Projected(*head()), entropy_rows).sum().backward()
    assert compiled == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_is_eager_and_compiles_once():
    """Chunks of 5 and 4 positions, then of 6: the same numbers as eager, with no more than two compilations."""
    from torch._dynamo.utils import counters

    counters.clear()
    for positions, chunk in ((9, 5), (12, 6), (11, 6)):
        hidden, weight, bias = head(positions, 37, dtype=torch.float32)
        student, teacher = Projected(hidden, weight, bias, softcap=5.0), torch.randn(positions, 37)
        found = []
        for compiled in (True, False):
            value = by_chunks(student, _kl_rows, (torch.tensor(2.0), teacher), chunk=chunk, compiled=compiled)
            found.append((value, torch.autograd.grad(value.mean(), (hidden, weight, bias))))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not row_steps._compile_failed
    assert counters["stats"]["unique_graphs"] <= 2


def _kl_rows(logits, temperature, teacher):
    return forward_kl(logits / temperature, teacher / temperature)


def test_what_cannot_be_chunked_is_refused():
    hidden, weight, _ = head()
    with pytest.raises(ShapeError, match=r"\[7, 3\].*\[11, 4\]"):
        by_chunks(Projected(hidden[:, :3], weight), entropy_rows)
    with pytest.raises(UsageError, match="chunk=0"):
        by_chunks(Projected(hidden, weight), entropy_rows, chunk=0)


def test_chunks_are_even_and_bounded():
    """1,025 positions of a large vocabulary are no 512 + 512 + 1; the environment sets the size."""
    student = Projected(torch.empty(1025, 1, device="meta"), torch.empty(2**15, 1, device="meta"))
    assert projection._chunk_size(1025, student, 512, torch.float32, False) == 342
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CHUNK_MIB", "16")
        assert projection._chunk_size(10_000, student, None, torch.float32, False) <= 16 * 2**20 / 4 / 2**15

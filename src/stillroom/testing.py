"""Checks for a model, objective or exporter of your own: what stillroom relies on, in one call from your tests."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import CheckError
from stillroom.objectives import built, weighted_sum
from stillroom.types import Batch, Dense, Model, Objective, Projected, Signal, Sparse


def check_model(model: Model, batch: Batch) -> Signal:
    """The model's answer to ``batch``, after checking that it is one.

    It answers with a Signal, finite (logits may be -inf), one row for each example, the same twice, and the same for an
    example whatever the others in its batch are (within 1e-4). Raises CheckError that says what failed.
    """
    with torch.no_grad():
        said, again = model(batch), model(batch)
        alone = model(_rows(batch, 1)) if len(batch) > 1 else said
    _require(isinstance(said, Signal), f"the model returned {type(said).__name__}, not a Signal.")
    _require(bool(said.given), "the Signal is empty: give logits, values, features or text.")
    for name, tensor in _tensors(said).items():
        _require(not bool(tensor.isnan().any()), f"{name} holds NaN.")
        _require(not bool((tensor == torch.inf).any()), f"{name} holds +inf.")
        _require(
            len(tensor) == len(batch),
            f"{name} has {len(tensor)} rows for a batch of {len(batch)}: {list(tensor.shape)}.",
        )
        repeated, first = _tensors(again)[name], _tensors(alone)[name]
        _require(torch.equal(tensor, repeated), f"{name} differs when asked twice. Put the network in eval mode.")
        close = torch.allclose(tensor[:1].double(), first.double(), atol=1e-4, rtol=1e-4)
        _require(close, f"{name} of an example depends on the others in its batch (batch statistics, padding?).")
    return said


def check_objective(
    objective: Objective, student: Signal | None = None, teacher: Signal | None = None, batch: Batch | None = None
) -> None:
    """Check an objective on the given signals, or on random logits of 6 examples and 5 classes.

    Named terms, one finite number per position, unreduced; a gradient to the student and none to the teacher; a masked
    position, even a NaN one, reaches neither value nor gradient. Raises CheckError that says what failed.
    """
    drawn = torch.Generator().manual_seed(0)
    if student is None or teacher is None or batch is None:

        def draw(size: float) -> Signal:  # a sure teacher, a young student
            logits, values = (size * torch.randn(6, width, generator=drawn) for width in (5, 3))
            return Signal(logits=Dense(logits), values=values)

        student, teacher = draw(1.0), draw(4.0)
        labels = torch.arange(6) % 5
        batch = Batch(tuple("abcdef"), {"x": torch.zeros(6, 1)}, labels=labels)
    ready, _ = built(objective, student, teacher)
    mine, theirs = _leaves(student), _leaves(teacher)
    terms = ready(mine, theirs, batch)
    _require(bool(terms), "the objective returned no terms.")
    for name, values in terms.items():
        _require(isinstance(values, Tensor), f"the term {name!r} is {type(values).__name__}, not a tensor.")
        _require(values.dim() > 0, f"the term {name!r} is one number: return one per position, unreduced.")
        _require(bool(values.isfinite().all()), f"the term {name!r} is not finite.")
    total = torch.stack([values.sum() for values in terms.values()]).sum()
    _require(total.requires_grad, "no gradient reaches the student.")
    total.backward()
    grads = [t.grad for t in _tensors(mine).values() if t.grad is not None]
    _require(any(bool(g.abs().sum() > 0) for g in grads), "the gradient of the student is zero everywhere.")
    _require(all(t.grad is None for t in _tensors(theirs).values()), "a gradient reaches the teacher: detach it.")
    _check_mask(ready, student, teacher, batch)


def _check_mask(objective: Any, student: Signal, teacher: Signal, batch: Batch) -> None:
    shape = batch.mask.shape if batch.mask is not None else torch.Size([len(batch)])
    mask = torch.ones(shape, dtype=torch.bool)
    mask[-1] = False
    masked = dataclasses.replace(batch, mask=mask)

    def spoil(tensor: Tensor) -> Tensor:
        spoiled = tensor.detach().clone()
        spoiled[-1] = float("nan")
        return spoiled

    mine = _leaves(student.map(lambda t: spoil(t) if t.is_floating_point() else t))
    terms = objective(mine, teacher, masked)
    total = torch.stack([weighted_sum(values, mask.float()) for values in terms.values()]).sum()
    _require(bool(total.isfinite()), "a masked position reaches the value: compute counted positions only.")
    total.backward()
    for name, tensor in _tensors(mine).items():
        if tensor.grad is not None:
            finite = bool(tensor.grad[:-1].isfinite().all())
            _require(finite, f"a masked NaN reaches the gradient of {name}: select the counted positions first.")


def check_exporter(exporter: Callable[..., Any] | str, precision: str = "fp32") -> None:
    """Export a small perceptron with ``exporter`` ('onnx', or 'my_file.py:write'), and verify it in its runtime.

    Raises ParityError or CheckError when the artefact does not answer like the student.
    """
    from stillroom.data import Table
    from stillroom.exporting import export
    from stillroom.settings import name_of
    from stillroom.students import Student

    student = Student.make("stillroom.students.architectures:mlp", {"inputs": 6, "outputs": 4, "hidden": [8]})
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    examples = Table({"x": x}, ids=tuple(map(str, range(40))), labels=torch.arange(40) % 4, classes=tuple("abcd"))
    target = exporter if isinstance(exporter, str) else name_of(exporter)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(student, examples, folder, target=target, precision=precision, progress=False)
        _require(artifact.verify["passed"], f"the artefact failed: {artifact.verify}.")
        check_model(artifact, examples.batch(range(4)))


def _rows(batch: Batch, count: int) -> Batch:
    def cut(value: Any) -> Any:
        return None if value is None else value[:count]

    return Batch(
        ids=batch.ids[:count],
        inputs={name: column[:count] for name, column in batch.inputs.items()},
        labels=cut(batch.labels),
        mask=cut(batch.mask),
        views=cut(batch.views),
    )


def _leaves(signal: Signal) -> Signal:
    return signal.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))


def _tensors(signal: Signal) -> dict[str, Tensor]:
    found = {f"features[{name!r}]": tensor for name, tensor in signal.features.items()}
    if signal.values is not None:
        found["values"] = signal.values
    match signal.logits:
        case Dense(values=tensor):
            found["logits"] = tensor
        case Projected(hidden=tensor):
            found["hidden"] = tensor
        case Sparse(log_probs=tensor):
            found["log_probs"] = tensor
    return found


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckError(problem)

"""How far a student's distribution is from a teacher's: nats per position, unreduced. Knows no mask and no average.

Every divergence takes (student, teacher, *, temperature, extra_ids, arithmetic, its own settings) and returns [...],
float32 at least. student: Dense, Projected or a Tensor (= Dense). teacher: Dense, Projected, Sparse or a Tensor,
without gradient.

``temperature`` > 0 divides the logits on both sides; the value is never multiplied by its square.
``extra_ids``: what happens to ids that only the student has (padding): "zero" gives them teacher probability 0,
"ignore" cuts the student to the shared ids and renormalises.
``arithmetic``: what a Projected student's matmuls may save (projection.Arithmetic); exact by default.
A Sparse teacher is compared on its K entries and one bucket for the tail, on both sides; at a temperature other than 1
these buckets, formed at temperature 1, are tempered. Its ids must differ from each other unless they are draws.

All raise PairError (vocabularies that do not fit), ShapeError (positions that do not), SignalError (a Sparse student,
sampled draws with anything but forward_kl at temperature 1) and UsageError (settings out of range,
an arithmetic for a Dense student).
P is the teacher, Q the student, in what follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.divergences import formulas, projection
from stillroom.divergences.buckets import ExtraIds, Formula, columns_of, rows_for
from stillroom.divergences.projection import EXACT, Arithmetic
from stillroom.errors import DataError, ShapeError, SignalError, UsageError, nearest
from stillroom.types import UNLABELLED, Dense, Logits, Projected, Sparse, as_logits

Divergence = Callable[..., Tensor]  # (student, teacher, *, temperature, extra_ids) -> [...]
SHARED = ("temperature", "extra_ids", "arithmetic")  # the settings that every divergence has


def forward_kl(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
) -> Tensor:
    """KL(P || Q) = sum p (log p - log q). Hinton et al. 2015, with the teacher's entropy: 0 on equal inputs.

    With sampled draws of the teacher (Sparse(sampled=True), temperature 1): the mean over draws of log p - log q, whose
    value and gradient are unbiased.
    """
    return _compare(Formula(formulas.forward_kl), student, teacher, temperature, extra_ids, arithmetic)


def reverse_kl(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
) -> Tensor:
    """KL(Q || P) = sum q (log q - log p). Infinite where the teacher gives 0 to what the student does not."""
    return _compare(
        Formula(formulas.reverse_kl, infinite_at_zero=True), student, teacher, temperature, extra_ids, arithmetic
    )


def jensen_shannon(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
    teacher_weight: float = 0.5,
) -> Tensor:
    """Weighted sum b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q, b = ``teacher_weight`` in (0, 1).

    Agarwal et al. 2023 (GKD, arXiv 2306.13649), eq. 1. Tends to 0, not to a KL, as b -> 0 or 1: so both are refused.
    """
    if not 0 < teacher_weight < 1:
        limit = "forward_kl" if teacher_weight <= 0 else "reverse_kl"
        raise UsageError(
            f"teacher_weight={teacher_weight} cannot be used: the Jensen-Shannon divergence tends to 0 there. "
            f"For the divergence it resembles near that end, use {limit}; otherwise choose a number between 0 and 1."
        )
    return _compare(
        Formula(formulas.jensen_shannon, (teacher_weight,)), student, teacher, temperature, extra_ids, arithmetic
    )


def skew_kl(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
    mix: float = 0.1,
) -> Tensor:
    """KL(P || m P + (1 - m) Q), m = ``mix`` in [0, 1); 0 is forward_kl.

    Ko et al. 2024 (DistiLLM, arXiv 2402.03898), eq. 4.
    """
    if not 0 <= mix < 1:
        raise UsageError(f"mix={mix} cannot be used: choose a number from 0 (forward_kl) to below 1 (where it is 0).")
    return _compare(Formula(formulas.skew_kl, (mix,)), student, teacher, temperature, extra_ids, arithmetic)


def total_variation(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
) -> Tensor:
    """0.5 sum |p - q|, from 0 to 1 (no nats here)."""
    return _compare(Formula(formulas.total_variation), student, teacher, temperature, extra_ids, arithmetic)


def alpha_beta(
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    *,
    temperature: float = 1.0,
    extra_ids: ExtraIds = "zero",
    arithmetic: Arithmetic = EXACT,
    alpha: float,
    beta: float,
) -> Tensor:
    """-1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], by continuity where a or b is 0.

    Wang et al. 2025 (ABKD, arXiv 2505.04560). (1, 0) is forward_kl, (0, 1) reverse_kl, (0.5, 0.5) 4 times the squared
    Hellinger distance (1/2 sum (sqrt p - sqrt q)^2). alpha = 0 is infinite where only the teacher gives 0.
    """
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise UsageError(f"alpha={alpha}, beta={beta} cannot be used: choose numbers of at least 0, not both 0.")
    if beta == 0:
        return _compare(Formula(formulas.beta_zero, (alpha,)), student, teacher, temperature, extra_ids, arithmetic)
    if alpha == 0:
        return _compare(
            Formula(formulas.alpha_zero, (beta,), True), student, teacher, temperature, extra_ids, arithmetic
        )
    return _compare(Formula(formulas.alpha_beta, (alpha, beta)), student, teacher, temperature, extra_ids, arithmetic)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
}


@dataclass(frozen=True, repr=False)
class Bound:
    """A divergence with its settings: called like the divergence itself."""

    divergence: Divergence
    settings: tuple[tuple[str, float], ...]

    def __call__(
        self,
        student: Logits | Tensor,
        teacher: Logits | Tensor,
        *,
        temperature: float = 1.0,
        extra_ids: ExtraIds = "zero",
        arithmetic: Arithmetic = EXACT,
    ) -> Tensor:
        how = {} if arithmetic == EXACT else {"arithmetic": arithmetic}  # a divergence of one's own may not know it
        settings = how | dict(self.settings)
        return self.divergence(student, teacher, temperature=temperature, extra_ids=extra_ids, **settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{getattr(self.divergence, '__name__', self.divergence)}({settings})"


def bind(divergence: Divergence, **settings: float) -> Bound:
    """The divergence with these settings, tried once: ``bind(jensen_shannon, teacher_weight=0.1)``.

    Raises UsageError for a setting that it does not have, lacks, or cannot use.
    """
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(divergence).parameters
    own = {name: p for name, p in list(parameters.items())[2:] if name not in SHARED}
    title = getattr(divergence, "__name__", repr(divergence))
    for name in settings:
        if name not in own:
            raise UsageError(f"{title} has no setting {name!r}{nearest(name, own) if own else '.'}")
    missing = [name for name, p in own.items() if p.default is p.empty and name not in settings]
    if missing:
        raise UsageError(f"{title} needs {', '.join(missing)}: bind({title}, {missing[0]}=...).")
    bound = Bound(divergence, tuple(sorted(settings.items())))
    if divergence in DIVERGENCES.values():
        bound(torch.zeros(2), torch.zeros(2))  # a setting out of range is refused here, before anything runs
    return bound


def cross_entropy(student: Logits | Tensor, labels: Tensor, *, ignore: int = UNLABELLED) -> Tensor:
    """-log q(label), labels [...] int64 -> [...] nats; 0 without gradient where the label is ``ignore``.

    student: Dense, Projected (by chunks) or a Tensor. Raises DataError for a label outside the vocabulary, ShapeError
    when labels and positions differ, SignalError for Sparse logits.
    """
    student = as_logits(student)
    if isinstance(student, Sparse):
        raise SignalError("the logits are Sparse: cross-entropy needs all of them (Dense or Projected).")
    if labels.shape != student.shape:
        raise ShapeError(f"the student has positions {list(student.shape)}, the labels {list(labels.shape)}.")
    labels = labels.long()
    wrong = (labels != ignore) & ((labels < 0) | (labels >= student.vocabulary))
    if wrong.any():
        raise DataError(
            f"label {int(labels[wrong][0])} is outside the {student.vocabulary} ids of the student. "
            f"Check the class order and the vocabulary; unlabelled positions are {ignore}."
        )
    labels = labels.masked_fill(labels == ignore, -1)
    if isinstance(student, Projected):
        return projection.by_chunks(student, formulas.minus_log_q, (labels,))
    return formulas.minus_log_q(student.values, labels)


def _compare(
    formula: Formula,
    student: Logits | Tensor,
    teacher: Logits | Tensor,
    temperature: float,
    extra_ids: ExtraIds,
    arithmetic: Arithmetic,
) -> Tensor:
    """The one path of every divergence: check the pair, form the rows, evaluate them whole or by chunks."""
    student, teacher = as_logits(student), as_logits(teacher)
    rows = rows_for(formula, student, teacher, temperature, extra_ids)
    if rows.kind == "sampled" and (formula.function is not formulas.forward_kl or temperature != 1):
        raise SignalError(
            "the teacher's logits are sampled draws: their mean is unbiased for forward_kl at temperature 1 only, "
            f"because every other value needs probabilities of ids that were not drawn (temperature={temperature}). "
            "Use forward_kl at temperature 1, or record the teacher with TopK."
        )
    if isinstance(student, Projected):
        wide = torch.promote_types(student.hidden.dtype, torch.float32)
        heat = torch.tensor(float(temperature), dtype=wide)
        if isinstance(teacher, Projected):
            return projection.by_chunks(student, rows, (heat,), teacher, arithmetic=arithmetic)
        return projection.by_chunks(student, rows, (heat, *columns_of(teacher)), arithmetic=arithmetic)
    if arithmetic != EXACT:
        raise UsageError(
            f"{arithmetic} is for a student that gives Projected logits (hidden states and a head); this one gives "
            "Dense ones, whose matmul is already done. Leave matmul at 'auto' and keep_columns at None."
        )
    if isinstance(teacher, Projected):
        with torch.no_grad():
            teacher = Dense(teacher.compute())
    assert isinstance(student, Dense)  # rows_for refuses the rest
    return rows(student.values, temperature, *columns_of(teacher))

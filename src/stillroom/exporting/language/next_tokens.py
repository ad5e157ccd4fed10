"""Is the shipped language model still the student? The next token after real prefixes, in nats, bytes and seconds."""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import DataError, UsageError
from stillroom.exporting.artifact import Artifact
from stillroom.exporting.verify import Tolerance, quality_of
from stillroom.measures.bootstrap import median_interval
from stillroom.network import Columns
from stillroom.progress import Step
from stillroom.students.networks import Student
from stillroom.types import Batch, Examples, Metric, positions

POSITIONS = 16_384  # compared at most, in whole rows spread evenly over the examples
PREFIXES = 48  # compared where the runtime tells one next token at a time
LIKELIEST = 5  # of the student's next tokens, those whose log-probabilities are compared
WORST = 5
CHUNK = 1 << 24  # log-probabilities at once
RUNS = 5
SECONDS = 10.0  # for all of them
DECODED = 32  # tokens written for one measurement of speed

# difference: nats of log-probability; error: nats of KL; quality: the relative loss of bits per byte that is allowed.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(difference=2e-3, agreement=1.0, error=1e-5, quality=None),
    "f32": Tolerance(difference=2e-3, agreement=1.0, error=1e-5, quality=None),
    "bf16": Tolerance(difference=None, agreement=0.9, error=0.02, quality=0.02),
    "f16": Tolerance(difference=None, agreement=0.99, error=1e-4, quality=0.001),
    "q4_0": Tolerance(difference=None, agreement=0.75, error=0.1, quality=0.05),
    "q8_0": Tolerance(difference=None, agreement=0.9, error=0.02, quality=0.02),
    "fp16": Tolerance(difference=None, agreement=0.9, error=0.02, quality=0.02),
    "int4": Tolerance(difference=None, agreement=0.75, error=0.1, quality=0.05),
    "int8": Tolerance(difference=None, agreement=0.9, error=0.02, quality=0.02),
}

Places = Mapping[int, Sequence[int]]  # row of the examples -> the positions in it that are compared


@dataclass
class _Seen:
    """Sums over what has been compared; per row: nats of both, bytes and tokens of the labels."""

    largest: float = 0.0
    total: float = 0.0
    divergence: float = 0.0
    finite: bool = True
    places: int = 0
    gaps: list[float] = field(default_factory=list)  # nats between two answers of the student where the artefact flips
    worst: list[tuple[bool, float, str, str, str]] = field(default_factory=list)
    ours: list[Tensor] = field(default_factory=list)  # [3] of each row: nats, bytes, tokens
    theirs: list[Tensor] = field(default_factory=list)


def compare_next_tokens(
    student: Student, artifact: Artifact, examples: Examples, tolerance: Tolerance, step: Step
) -> tuple[dict[str, Any], list[str]]:
    """What verify.json says of a language model, and the sentences about what is beyond the tolerance.

    At each compared position: the largest |log p(student) - log p(artefact)| over the student's five likeliest
    tokens, whether both name the same likeliest token, KL(student || artefact), and -log p of the label, all in nats.
    """
    if student.adapter != Columns(("tokens", "positions")):
        raise UsageError("a language model is exported by its columns tokens and positions: Columns(('tokens', ...)).")
    places = _places(examples, artifact)
    seen = _Seen()
    for row, chosen in places.items():
        batch = examples.batch([row], None)
        with torch.no_grad():
            _add_row(seen, student, artifact, batch, torch.tensor(chosen))
        step(1)
    near = sum(gap <= 2 * tolerance.difference for gap in seen.gaps) if tolerance.difference else 0
    quality, worse = _quality(seen, tolerance.quality) if seen.finite else (None, [])
    said = {
        "examples": len(places),
        "of_examples": len(examples),
        "positions": seen.places,
        "largest_difference": seen.largest if seen.finite else None,
        "mean_difference": seen.total / max(seen.places, 1) if seen.finite else None,
        "relative_error": None,
        "kl": seen.divergence / max(seen.places, 1) if seen.finite else None,
        "agreement": 1 - len(seen.gaps) / max(seen.places, 1),
        "near_ties": near,
        "perplexity": _perplexity(seen) if seen.finite else None,
        "quality": quality,
        "tolerance": dataclasses.asdict(tolerance),
    }
    return said, [*_beyond(seen, said, tolerance, len(seen.gaps) - near), *worse]


def compared_rows(examples: Examples, one_at_a_time: bool) -> int:
    """How many rows ``compare_next_tokens`` asks about, at most."""
    length = examples.batch([0], None).inputs["tokens"].shape[-1]  # type: ignore[union-attr]
    return min(len(examples), PREFIXES if one_at_a_time else max(POSITIONS // length, 8))


def _places(examples: Examples, artifact: Artifact) -> Places:
    """Whole rows, or where one position costs one call some positions of each, spread evenly: no choice is made."""
    single = hasattr(artifact.run, "after")
    count = compared_rows(examples, single)
    found: dict[int, list[int]] = {}
    for number in range(count):
        row = number * len(examples) // count
        batch = examples.batch([row], None)
        shape = batch.inputs["tokens"].shape  # type: ignore[union-attr]
        counts = positions(batch, shape, torch.device("cpu"))[0]
        if single:
            counts = counts & (artifact.adapter(batch.inputs)[1][0] < artifact.run.longest)  # type: ignore[attr-defined]
        counted = counts.nonzero().flatten().tolist()
        if counted and single:
            # each row from another place on, so that prefixes of every length are asked about
            each = min(PREFIXES // count, len(counted))
            counted = [counted[int((n + number / count) * len(counted) / each)] for n in range(each)]
        if counted:
            found[row] = counted
    if not found:
        raise DataError("no position of the examples counts, so nothing can be compared. Give rows with labels.")
    return found


def _add_row(seen: _Seen, student: Student, artifact: Artifact, batch: Batch, chosen: Tensor) -> None:
    """Compare one row [1, T] at the chosen positions."""
    tensors = artifact.adapter(batch.inputs)
    tokens, at = tensors
    answered = student(batch).need_logits("export").map(lambda hidden: hidden[0, chosen])
    logits = answered.compute() if hasattr(answered, "compute") else answered.values  # type: ignore[union-attr]
    whole = None if hasattr(artifact.run, "after") else artifact.run(tensors)[0]
    labels = None if batch.labels is None else batch.labels[0, chosen]
    sizes = batch.extra["bytes"][0, chosen] if "bytes" in batch.extra else torch.zeros(len(chosen))
    nats = torch.zeros(2, dtype=torch.float64)
    size = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(chosen), size):
        part = slice(start, start + size)
        ours = logits[part].double().log_softmax(-1)
        if whole is None:
            said = torch.stack([artifact.run.after(_prefix(tokens[0], at[0], p)) for p in chosen[part].tolist()])  # type: ignore[attr-defined]
        else:
            said = whole[chosen[part]]
        theirs = said.double().log_softmax(-1)
        _add_places(seen, student, ours, theirs, [f"{batch.ids[0]} at {p}" for p in chosen[part].tolist()])
        if labels is not None:
            picked = [side.gather(-1, labels[part, None].clamp(min=0))[:, 0] for side in (ours, theirs)]
            nats -= torch.stack([side[labels[part] >= 0].sum() for side in picked])
    if labels is not None:
        known = (labels >= 0).sum().double()
        for kept, value in zip((seen.ours, seen.theirs), nats, strict=True):
            kept.append(torch.stack([value, sizes.sum().double(), known]))


def _prefix(tokens: Tensor, at: Tensor, place: int) -> list[int]:
    """The ids of the document up to and with this position."""
    return tokens[place - int(at[place]) : place + 1].tolist()


def _add_places(seen: _Seen, student: Student, ours: Tensor, theirs: Tensor, names: Sequence[str]) -> None:
    """ours, theirs: log-probabilities [n, V]."""
    likeliest = ours.topk(min(LIKELIEST, ours.shape[-1]), -1)
    difference = (likeliest.values - theirs.gather(-1, likeliest.indices)).abs().amax(-1)
    divergence = float((ours.exp() * (ours - theirs)).sum())
    seen.finite &= bool(difference.isfinite().all()) and math.isfinite(divergence)
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    other = theirs.argmax(-1)
    gap = likeliest.values[:, 0] - ours.gather(-1, other[:, None])[:, 0]
    flipped = (gap > 0) | theirs.isnan().any(-1)
    seen.gaps.extend(gap[flipped].tolist())
    seen.largest = max(seen.largest, float(difference.max()))
    seen.total += float(difference.sum())
    seen.divergence += divergence
    seen.places += len(ours)
    for n in (flipped.double() * 1e6 + difference.clamp(max=1e5)).topk(min(WORST, len(names))).indices.tolist():
        mine, its = (repr(student.tokenizer.decode([int(i)])) for i in (likeliest.indices[n, 0], other[n]))
        seen.worst.append((bool(flipped[n]), float(difference[n]), str(names[n]), mine, its))
    seen.worst = heapq.nlargest(WORST, seen.worst)


def _quality(seen: _Seen, allowed: float | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Bits per byte of the labels (nats per token where bytes are not known), with intervals over rows."""
    if not seen.ours:
        return None, []
    ours, theirs = torch.stack(seen.ours), torch.stack(seen.theirs)
    in_bytes = bool((ours[:, 1].sum() > 0).item())
    name = "bits_per_byte" if in_bytes else "nats_per_token"

    def finish(rows: Tensor) -> float:
        nats, sizes, tokens = rows.sum(0).tolist()
        below = sizes * math.log(2) if in_bytes else tokens
        return nats / below if below else math.nan

    metric = Metric(name, lambda said, teacher, batch: torch.empty(0), finish, higher_is_better=False)
    return quality_of(ours, theirs, metric, allowed)


def _perplexity(seen: _Seen) -> dict[str, float] | None:
    """exp(mean -log p of the label) of the artefact and of the student."""
    if not seen.ours:
        return None
    sums = [torch.stack(side).sum(0) for side in (seen.theirs, seen.ours)]
    values = [math.exp(min(float(nats / tokens.clamp(min=1)), 700.0)) for nats, _, tokens in sums]
    return dict(zip(("value", "student"), values, strict=True))


def _beyond(seen: _Seen, said: Mapping[str, Any], tolerance: Tolerance, disagreements: int) -> list[str]:
    problems = [] if seen.finite else ["it answers with numbers that are not finite where the student's are"]
    if seen.finite and tolerance.difference is not None and seen.largest > tolerance.difference:
        problems.append(
            f"the largest difference of a log-probability is {seen.largest:.3g} nats (allowed {tolerance.difference:g})"
        )
    if tolerance.agreement is not None and disagreements > math.ceil((1 - tolerance.agreement) * seen.places - 1e-9):
        problems.append(
            f"{disagreements} of {seen.places} next tokens are others (agreement {said['agreement']:.4f}, needed "
            f"{tolerance.agreement})"
        )
    if said["kl"] is not None and tolerance.error is not None and said["kl"] > tolerance.error:
        problems.append(f"KL(student || artefact) is {said['kl']:.3g} nats (allowed {tolerance.error:g})")
    if problems:
        named = "; ".join(f"{name}: student {a}, artefact {b}" for *_, name, a, b in seen.worst)
        problems.append(f"worst positions: {named}")
    return problems


@torch.no_grad()
def speed(artifact: Artifact, examples: Examples) -> dict[str, Any]:
    """Seconds of one decoded token (a runtime that decodes), or of reading one whole row; one thread, batch 1."""
    batch = examples.batch([0], None)
    tensors = artifact.adapter(batch.inputs)
    length = tensors[0].shape[-1]
    if hasattr(artifact.run, "decode_seconds"):
        prefix = tensors[0][0, : min(length, 32)].tolist()
        taken = list(_repeated(lambda: artifact.run.decode_seconds(prefix, DECODED)))  # type: ignore[attr-defined]
        what, tokens = "one decoded token", 1
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            taken = list(_repeated(lambda: _timed(lambda: artifact.run(tensors))))
        finally:
            torch.set_num_threads(threads)
        what, tokens = f"reading one row of {length} tokens", length
    middle = median_interval(taken)
    said = {"median_seconds": middle.value, "low": middle.low, "high": middle.high}
    return {
        "what": what,
        "batch": 1,
        "threads": 1,
        "runs": len(taken),
        **said,
        "tokens_per_second": tokens / middle.value,
    }


def _repeated(measure: Callable[[], float]) -> Iterator[float]:
    """After one run that does not count, up to five within ten seconds."""
    measure()
    end = time.perf_counter() + SECONDS
    for number in range(RUNS):
        if number and time.perf_counter() > end:
            return
        yield measure()


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def batch_effect_of(artifact: Artifact, examples: Examples) -> float | None:
    """The largest difference of logits between two rows asked together and one by one; null for one row at a time."""
    if hasattr(artifact.run, "after") or len(examples) < 2:
        return None
    together = artifact.run(artifact.adapter(examples.batch([0, 1], None).inputs))
    alone = [artifact.run(artifact.adapter(examples.batch([row], None).inputs)) for row in (0, 1)]
    difference = float((together - torch.cat(alone)).abs().nan_to_num(0.0).max())
    return difference if math.isfinite(difference) else None

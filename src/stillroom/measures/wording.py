"""Numbers and findings in plain words: one wording for the terminal and for the page. Knows no layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.types import Metric

Cell = Mapping[str, float] | None  # {"value", "low", "high"}, or None where a number does not apply
Rows = Mapping[str, Mapping[str, Cell]]

SAME = 0.05  # costs that differ by less are called alike
RATES = ("prefill", "generation")  # tokens per second: the only costs of which more is better
COSTS = ("parameters", "bytes", "memory", "flops", "flops_per_token", "latency", *RATES)

TITLES = {
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "nll": "surprise (nll)",
    "perplexity": "perplexity",
    "calibration_error": "calibration error",
    "agreement": "agrees with teacher",
    "top5_agreement": "teacher’s choice in top 5",
    "kl": "KL from teacher",
    "total_variation": "total variation",
    "r2": "R²",
    "mae": "mean error",
    "rmse": "RMS error",
    "largest_error": "largest error",
    "teacher_distance": "distance to teacher",
    "exact": "exact answers",
    "token_f1": "token F1",
    "fields": "right fields",
    "success": "success",
    "success_disturbed": "success, disturbed",
    "mean_return": "return",
    "worst_return": "worst return",
    "return_disturbed": "return, disturbed",
    "error_ratio": "error ratio",
    "error_own_states": "error, own states",
    "error_teacher_states": "error, teacher’s states",
    "episode_steps": "steps",
    "parameters": "parameters",
    "bytes": "size",
    "memory": "memory at work",
    "flops": "FLOPs",
    "flops_per_token": "FLOPs per token",
    "latency": "latency",
    "prefill": "reads, tokens/s",
    "generation": "writes, tokens/s",
}

ABOUT = {
    "bits_per_byte": "-log2 p of the text's tokens, over its UTF-8 bytes: compares across tokenizers. The end mark's "
    "bits count, and it has 0 bytes.",
    "accuracy": "How often the most probable class (of a text: the next token) is the label.",
    "macro_f1": "The mean over classes of the F1 score; a class that is neither predicted nor a label is left out.",
    "nll": "-log p(label) in nats, on average.",
    "perplexity": "exp of the mean of -log p(label), per token: compares models of one tokenizer only.",
    "calibration_error": "How far confidence is from accuracy: 15 equal bins, weighted by their counts.",
    "agreement": "How often the most probable class (or next token) is the teacher's.",
    "top5_agreement": "How often the teacher's most probable class (or next token) is among the model's five.",
    "kl": "KL(teacher || model) in nats, on average.",
    "total_variation": "Half the sum of |p - q| against the teacher, on average: from 0 to 1.",
    "r2": "1 - squared error / variance of the labels, averaged over outputs.",
    "mae": "The mean of |answer - label|, in the label's unit.",
    "rmse": "The root of the mean squared error, in the label's unit.",
    "largest_error": "The largest |answer - label|, in the label's unit.",
    "teacher_distance": "The mean of |answer - the teacher's answer|, in the label's unit.",
    "parameters": "Learned numbers, shared ones once.",
    "bytes": "Bytes of the weights in memory.",
    "memory": "Bytes of the weights, and of the most tensors alive at once while it reads 128 tokens and writes 4.",
    "flops": "Floating-point operations for one example; look-ups in an embedding count 0.",
    "latency": "Median seconds of one answer at batch 1, from raw columns, one thread.",
    "flops_per_token": "Floating-point operations to read one token and predict the next, over a text of 128 tokens.",
    "prefill": "Median tokens per second at which a prompt of 128 tokens is read, at batch 1, one thread.",
    "generation": "Median tokens per second written after it: greedy, with a cache, at batch 1, one thread.",
}


def title_of(name: str) -> str:
    """What a column is called."""
    return TITLES.get(name, name.replace("_", " "))


def number(value: float, name: str = "") -> str:
    """A number as a person reads it; ``name`` is the metric or cost, which decides the unit."""
    if name == "latency":
        return seconds(value)
    if name in RATES:
        return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
    if name in ("bytes", "memory"):
        return scaled(value, ("B", "kB", "MB", "GB", "TB"))
    if name in ("parameters", "flops", "flops_per_token"):
        return scaled(value, ("", "k", "M", "G", "T"))
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits and a decimal prefix: 61.2 k."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if power == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{digits} {units[power]}".strip()


def seconds(value: float) -> str:
    """Three digits in s, ms or µs."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def spread(cell: Cell, name: str = "") -> str:
    """'low–high' of a cell, in the unit in which ``number`` writes its value; nothing for an exact number."""
    if cell is None or cell["low"] == cell["high"]:
        return ""
    if name == "latency":
        size = next((size for size in (1.0, 1e-3) if abs(cell["value"]) >= size), 1e-6)
        return f"{cell['low'] / size:.3g}–{cell['high'] / size:.3g}"
    return f"{number(cell['low'], name)}–{number(cell['high'], name)}"


def times(ratio: float) -> str:
    """A ratio as '9.1×'."""
    return f"{ratio:,.0f}×" if ratio >= 99.5 else f"{ratio:.2g}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def ratio_to_teacher(rows: Rows, row: str, cost: str) -> float | None:
    """How many times cheaper, or faster, the row is than the teacher. None where either is unknown."""
    theirs, ours = rows.get("teacher", {}).get(cost), rows.get(row, {}).get(cost)
    if row == "teacher" or not theirs or not ours or not ours["value"] or not theirs["value"]:
        return None
    ratio = theirs["value"] / ours["value"]
    return 1 / ratio if cost in RATES else ratio


_FASTER = ("faster", "slower")
_MORE_OR_LESS = {
    "bytes": ("smaller", "larger"),
    "memory": ("less", "more"),
    **dict.fromkeys(("latency", *RATES), _FASTER),
}


def cheaper(rows: Rows, row: str, cost: str) -> str:
    """'58× smaller' than the teacher, '9.1× faster', or the honest opposite; nothing where it is alike or not known."""
    ratio = ratio_to_teacher(rows, row, cost) if cost in COSTS else None
    if ratio is None or math.isclose(ratio, 1, rel_tol=SAME):
        return ""
    better, worse = _MORE_OR_LESS.get(cost, ("fewer", "more"))
    return f"{times(ratio)} {better}" if ratio >= 1 else f"{times(1 / ratio)} {worse}"


def signed(value: float) -> str:
    """A difference: '+0.012'; an exact 0 as '0'."""
    return "0" if value == 0 else f"{'+' if value > 0 else '−'}{number(abs(value))}"


def verdict(comparison: Mapping[str, Any]) -> str:
    """'better', 'worse' or 'unclear': what the interval of a comparison says of its first model."""
    if comparison["low"] > 0:
        return "better"
    return "worse" if comparison["high"] < 0 else "unclear"


def compared(comparison: Mapping[str, Any]) -> str:
    """One comparison in a sentence. The difference is positive when the first model is better."""
    first, second = comparison["better"], comparison["worse"]
    said = {
        "better": f"{first} is better than {second}",
        "worse": f"{first} is WORSE than {second}",
        "unclear": f"no difference is shown between {first} and {second}",
    }[verdict(comparison)]
    low, high = signed(comparison["low"]), signed(comparison["high"])
    seeds = f", {comparison['seeds']} seeds" if comparison["seeds"] > 1 else ""
    title = title_of(comparison["metric"])
    return f"{said}: {title} {signed(comparison['difference'])} (95 % {low} to {high}{seeds})"


def in_order(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Rows as they are read: teacher, student, alone, whatever else, untrained. (JSON on disk is sorted by name.)"""
    first = [row for row in ("teacher", "student", "alone") if row in rows]
    last = [row for row in ("untrained",) if row in rows]
    return {row: rows[row] for row in (*first, *(r for r in rows if r not in (*first, *last)), *last)}


def columns_about(chosen: Sequence[Metric], cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, Any]]:
    """What each column is; the text of a user's own metric is the first line of its statistics' docstring."""
    about = {}
    for m in chosen:
        own = (getattr(m.statistics, "__doc__", None) or "").strip().splitlines()
        text = ABOUT.get(m.name) or (own[0] if own else "")
        about[m.name] = {"higher_is_better": m.higher_is_better, "unit": m.unit, "about": text}
    units = {"bytes": "bytes", "memory": "bytes", "flops": "operations", "flops_per_token": "operations"}
    units |= {"latency": "seconds", **dict.fromkeys(RATES, "tokens per second")}
    for name in COSTS:
        if name not in about and any(name in row for row in cells.values()):
            about[name] = {"higher_is_better": name in RATES, "unit": units.get(name, ""), "about": ABOUT[name]}
    return about


def columns_in_order(metrics: Mapping[str, Any], metric: str) -> list[str]:
    """Columns as they are read: the headline, quality, a user's own, what compares with the teacher, costs."""
    order = [metric, *TITLES]
    costs = [name for name in COSTS if name in metrics]
    own = [name for name in metrics if name not in COSTS]
    return [*sorted(own, key=lambda name: order.index(name) if name in order else len(order)), *costs]


def headline(rows: Rows, metric: str, higher_is_better: bool | None, comparisons: Any = ()) -> str:
    """What was kept, at what cost, and whether the teacher helped."""
    return f"{kept(rows, metric, higher_is_better)} {helped(comparisons)}"


def kept(rows: Rows, metric: str, higher_is_better: bool | None) -> str:
    """One sentence: the student's quality against the teacher's, and what it costs."""
    student, teacher = rows.get("student", {}).get(metric), rows.get("teacher", {}).get(metric)
    title = title_of(metric)
    if student is None:
        return f"There is no {title} of a student in this report."
    if teacher is None:
        first = f"The student reaches {title} {number(student['value'])}"
    elif higher_is_better and student["value"] > teacher["value"]:
        first = f"The student is above its teacher in {title} ({number(student['value'])}, {number(teacher['value'])})"
    elif higher_is_better and teacher["value"] > 0 and student["value"] >= 0:
        share = student["value"] / teacher["value"]
        first = (
            f"The student keeps {_percent(share)} of the teacher’s {title} "
            f"({number(student['value'])} of {number(teacher['value'])})"
        )
    else:
        first = f"The student reaches {title} {number(student['value'])}, the teacher {number(teacher['value'])}"
    return f"{first}{_at_what_cost(rows)}."


def _at_what_cost(rows: Rows) -> str:
    parts = []
    for cost in ("bytes", "latency", "generation"):
        said = cheaper(rows, "student", cost)
        if said:
            parts.append(f"{said} at writing" if cost == "generation" else said)
    return f", and is {' and '.join(parts)}" if parts else ""


def helped(comparisons: Any) -> str:
    """One sentence: whether the student is better than the same student trained alone; of a text, also how faithful."""
    pairs = [c for c in comparisons if c["better"] == "student" and c["worse"] == "alone"]
    if not pairs and (cloned := [c for c in comparisons if c["worse"] == "cloning"]):
        return f"Against the same student cloned with as many answers: {compared(cloned[0])}."
    if not pairs:
        return "Whether the teacher helped is not known: there is no row 'alone'."
    against, said = pairs[0], verdict(pairs[0])
    interval = f"{signed(against['difference'])}, 95 % {signed(against['low'])} to {signed(against['high'])}"
    first = {
        "better": f"The teacher helped: the same student trained alone does worse ({interval}).",
        "worse": f"The teacher did harm: the same student trained alone does better ({interval}).",
        "unclear": f"No help from the teacher is shown: against the same student trained alone, {interval}.",
    }[said]
    faithful = next((c for c in pairs[1:] if c["metric"] == "kl"), None)
    if said == "better" or faithful is None or verdict(faithful) != "better":
        return first
    gap, low, high = (number(faithful[part]) for part in ("difference", "low", "high"))
    return f"{first} It does follow the teacher more closely (KL lower by {gap} nats, 95 % {low} to {high})."


def overlapping(overlap: Mapping[str, Any]) -> str:
    """One sentence on what evaluation and training texts share (data.overlap.Overlap as JSON)."""
    run, judged = f"{overlap['n']} {overlap['unit']} in a row", f"{overlap['documents']:,} test texts"
    aside = f"; {overlap['too_short']:,} are too short to say" if overlap["too_short"] else ""
    if not overlap["found"]:
        return f"None of the {judged} shares {run} with a training text{aside}."
    share = _percent(overlap["found"] / overlap["documents"])
    return (
        f"{overlap['found']:,} of the {judged} ({share}) share {run} with a training text{aside}: "
        "what they measure may have been learned by heart."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Why distillation may not have helped: plain sentences, each with what was seen and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.measures.wording import Rows, number, signed, times, title_of

CERTAIN = 0.02  # of log V: below, the teacher says little more than a label
UNIFORM = 0.9  # of log V: above, it says hardly anything
FAR = 0.9  # agreement with the teacher below which the student has not learned to answer as it does
CLOSE = 0.98
GAP = 50.0  # times fewer parameters than the teacher


def diagnose(
    rows: Rows,
    comparisons: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
    *,
    metric: str,
    examples: int,
    teacher_entropy: float | None = None,
    classes: int | None = None,
) -> list[str]:
    """Sentences, when the student is not shown to be better than the same student alone; else none.

    Looks at the teacher's quality, its entropy (nats, mean), how far the student follows it, the capacity of the
    student, and how small a difference the test set can show at all.
    """
    against = next((c for c in comparisons if (c["better"], c["worse"]) == ("student", "alone")), None)
    found = _teacher_is_no_better(rows, metrics, metric)
    if against is None or against["low"] > 0:
        return found
    first = (
        f"The student is not shown to be better than the same student trained alone: {title_of(metric)} "
        f"{signed(against['difference'])} (95 % {signed(against['low'])} to {signed(against['high'])})."
    )
    texts = "bits_per_byte" in metrics
    return [
        first,
        *found,
        *_faithful_only(comparisons, rows),
        *_entropy(teacher_entropy, classes),
        *_following(rows, bool(found), "tokens" if texts else "examples"),
        *_capacity(rows),
        *_too_few(against, examples, "texts" if texts else "examples"),
    ]


def _faithful_only(comparisons: Sequence[Mapping[str, Any]], rows: Rows) -> list[str]:
    """A language model that follows its teacher more closely than the control, and predicts the text no better."""
    pairs = (c for c in comparisons if (c["better"], c["worse"], c["metric"]) == ("student", "alone", "kl"))
    ours, theirs = (rows.get(row, {}).get("kl") for row in ("student", "alone"))
    if not any(pair["low"] > 0 for pair in pairs) or ours is None or theirs is None:
        return []
    return [
        f"The student does follow the teacher more closely than the student trained alone (KL {number(ours['value'])} "
        f"against {number(theirs['value'])} nats), but predicts the text itself no better. On fresh text, gone over "
        "once, cross-entropy learns as much of the text. Distillation shows in bits per byte where there is little "
        "text and several epochs over one recording, since cross-entropy then overfits; and in what the student "
        "writes, where being like the teacher is the aim."
    ]


def _teacher_is_no_better(rows: Rows, metrics: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    teacher, alone = rows.get("teacher", {}).get(metric), rows.get("alone", {}).get(metric)
    direction = metrics[metric]["higher_is_better"]
    if teacher is None or alone is None or direction is None:
        return []
    gain = (teacher["value"] - alone["value"]) * (1 if direction else -1)
    if gain > 0:
        return []
    return [
        f"The teacher itself is no better than the student trained alone ({title_of(metric)} "
        f"{number(teacher['value'])} against {number(alone['value'])}): it has little to give here. Check that its "
        "weights are loaded, its class order and its preprocessing, or choose a better teacher."
    ]


def _entropy(entropy: float | None, classes: int | None) -> list[str]:
    if entropy is None or not classes or classes < 2:
        return []
    share = entropy / math.log(classes)
    seen = f"(mean entropy {number(entropy)} nats of at most {number(math.log(classes))})"
    if share < CERTAIN:
        return [
            f"The teacher is nearly certain of everything {seen}: its answers say little more than labels do. "
            "Raise the temperature (2 to 8), or distil on examples that it finds hard, or on unlabelled ones."
        ]
    if share > UNIFORM:
        return [
            f"The teacher is nearly undecided about everything {seen}: its answers say hardly anything. Check that "
            "its weights are loaded and its logits are not scaled down; lower the temperature."
        ]
    return []


def _following(rows: Rows, teacher_is_no_better: bool, what: str) -> list[str]:
    student = rows.get("student", {}).get("agreement")
    alone = rows.get("alone", {}).get("agreement")
    if student is None:
        return []
    found = []
    if alone is not None and student["value"] <= alone["value"]:
        found.append(
            f"The student agrees with the teacher no more often than the student trained alone does "
            f"({number(student['value'])} against {number(alone['value'])}): the teacher's answers hardly reached it. "
            "Train longer, give the soft targets more weight, and check that answers belong to the views trained on."
        )
    elif student["value"] < FAR and not teacher_is_no_better:
        found.append(
            f"The student follows the teacher only on {number(student['value'])} of the {what}: give it more steps, "
            f"more {'text' if what == 'tokens' else '(also unlabelled) examples'}, or more capacity."
        )
    if student["value"] >= CLOSE:
        found.append(
            f"The student already follows the teacher on {number(student['value'])} of the {what}: more "
            "distillation from this teacher cannot add much. A better teacher or harder examples could."
        )
    return found


def _capacity(rows: Rows) -> list[str]:
    student, teacher = rows.get("student", {}).get("parameters"), rows.get("teacher", {}).get("parameters")
    if not student or not teacher or not student["value"] or teacher["value"] / student["value"] < GAP:
        return []
    return [
        f"The student has {times(teacher['value'] / student['value'])} fewer parameters than the teacher: it may be "
        "too small to follow. Try a larger student, or a model of middling size as its teacher."
    ]


def _too_few(against: Mapping[str, Any], examples: int, what: str) -> list[str]:
    if not against["low"] <= 0 <= against["high"] or against["low"] == against["high"]:
        return []
    half = (against["high"] - against["low"]) / 2
    more = f"more test {what}" if against["seeds"] > 1 else f"more test {what} or several seeds"
    return [
        f"With {examples:,} test {what} this comparison cannot show a difference below about {number(half)}: "
        f"{more} could."
    ]

"""Where models differ: the most divergent examples, and how confidence relates to accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.measures.asking import Asked, Seeds, gives_probabilities
from stillroom.measures.classification import BINS
from stillroom.measures.reading import top_of
from stillroom.measures.showing import furthest_tokens, shown_inputs, token_text
from stillroom.types import UNLABELLED, Batch, Examples, Model, Signal, identity_of

WORST = 20


def reliability_bins(rows: Mapping[str, Seeds], asked: Asked) -> dict[str, list[dict[str, Any]]]:
    """For each row with a calibration error: its bins of confidence, seeds pooled. An empty bin has no numbers."""
    found = {}
    for row in rows:
        parts = asked.statistics[row].get("calibration_error")
        if parts is None:
            continue
        count, *sums = torch.cat(parts).nansum(0).chunk(3)
        found[row] = [
            {
                "low": round(i / BINS, 6),
                "high": round((i + 1) / BINS, 6),
                "count": int(count[i]),
                "confidence": float(sums[0][i] / count[i]) if count[i] else None,
                "accuracy": float(sums[1][i] / count[i]) if count[i] else None,
            }
            for i in range(BINS)
        ]
    return found


def where_they_differ(
    rows: Mapping[str, Seeds],
    teacher: Model,
    examples: Examples,
    asked: Asked,
    tokenizer: Any = None,
    worst: int = WORST,
) -> list[dict[str, Any]]:
    """The examples on which the student (its first seed) is furthest from the teacher, furthest first.

    Of a text (``tokenizer``), the token at which they are furthest: what comes before it, and what each says next.
    """
    row = "student" if "student" in rows else next((name for name in rows if name != "teacher"), None)
    divergence = None if row is None else _divergence(asked.statistics[row])
    if row is None or divergence is None:
        return []
    order = torch.argsort(divergence.nan_to_num(nan=-1.0, posinf=1e30), descending=True, stable=True)
    chosen = [i for i in order[:worst].tolist() if not divergence[i].isnan() and divergence[i] > 0]
    if not chosen:
        return []
    batch = examples.batch(chosen, None)
    said = {name: seeds[0](batch) for name, seeds in rows.items()}
    name_of = _names(rows, teacher, examples, tokenizer)
    inputs = [shown_inputs(batch, place) for place in range(len(batch))]
    if tokenizer is not None:
        batch, said, inputs = furthest_tokens(batch, said, said[row], teacher(batch), tokenizer)
    answers = {name: _answers(seeds[0], said[name], len(batch), name_of) for name, seeds in rows.items()}
    labels = _labels(batch, name_of)
    finite = divergence.isfinite()
    return [
        {
            "id": batch.ids[place],
            "input": inputs[place],
            "label": labels[place],
            "answers": {name: said[place][0] for name, said in answers.items()},
            "confidences": {name: said[place][1] for name, said in answers.items()},
            "divergence": float(divergence[index]) if finite[index] else None,
        }
        for place, index in enumerate(chosen)
    ]


def _divergence(statistics: Mapping[str, list[Tensor]]) -> Tensor | None:
    """Per example [N]: KL in nats where it is measured, else the distance of values, else 1 where the top differs."""
    for name in ("kl", "teacher_distance", "agreement"):
        if name in statistics:
            total, count = statistics[name][0].unbind(-1)
            return 1 - total / count if name == "agreement" else total / count
    return None


def _names(rows: Mapping[str, Seeds], teacher: Model, examples: Examples, tokenizer: Any) -> Callable[[int], str]:
    """How an id is shown: a class by its name, a token as text."""
    if tokenizer is not None:
        return lambda index: token_text(tokenizer, index)
    student = rows.get("student", (teacher,))[0]
    known = (identity_of(teacher).classes, getattr(examples, "classes", None), identity_of(student).classes)
    classes = next((tuple(str(name) for name in found) for found in known if found), ())
    return lambda index: classes[index] if 0 <= index < len(classes) else str(index)


def _answers(
    model: Model, signal: Signal, count: int, name_of: Callable[[int], str]
) -> list[tuple[str | None, float | None]]:
    """What the model says of each example, in words, and its confidence; None for an answer at many positions."""
    if signal.logits is not None and len(signal.logits.shape) == 1:
        top, confidence = (tensor.cpu().tolist() for tensor in top_of(signal.logits))
        sure = gives_probabilities(model)
        return [(name_of(t), round(c, 4) if sure else None) for t, c in zip(top, confidence, strict=True)]
    if signal.values is not None:
        return [(_numbers(value), None) for value in signal.values.cpu()]
    if signal.text is not None:
        return [(text, None) for text in signal.text]
    return [(None, None)] * count


def _numbers(value: Tensor) -> str:
    flat = value.reshape(-1)
    shown = ", ".join(f"{x:.4g}" for x in flat[:4].tolist())
    return f"{shown}, …" if len(flat) > 4 else shown


def _labels(batch: Batch, name_of: Callable[[int], str]) -> list[str | None]:
    labels = batch.labels
    if labels is None:
        return [None] * len(batch)
    if labels.is_floating_point():
        return [None if value.isnan().all() else _numbers(value) for value in labels.cpu()]
    if labels.ndim > 1:
        return [None] * len(batch)
    return [None if index == UNLABELLED else name_of(index) for index in labels.tolist()]

"""How an artefact's verify.json is told in one line: the same words at the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.measures.wording import number, scaled, seconds, title_of

EXPORT_COLUMNS = ("target", "precision", "size", "largest", "mean", "same", "quality", "latency", "memory")
SIZES = ("B", "kB", "MB", "GB")
NONE = "–"


def export_cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Of EXPORT_COLUMNS: largest and mean difference, share of equal answers, quality with its interval, one answer."""
    agreement, latency = found.get("agreement"), (found.get("latency") or {}).get("median_seconds")
    memory = (found.get("memory") or {}).get("peak_bytes")
    return (
        str(found.get("target", "?")),
        str(found.get("precision", "?")),
        NONE if found.get("bytes") is None else scaled(found["bytes"], SIZES),
        _small(found.get("largest_difference")),
        _small(found.get("mean_difference")),
        NONE if agreement is None else f"{100 * agreement:.2f} %",
        quality_of(found),
        NONE if latency is None else seconds(latency),
        NONE if memory is None else scaled(memory, SIZES),
    )


def quality_of(found: Mapping[str, Any]) -> str:
    """The task's own quality with its interval: 'Accuracy 0.921 (0.909–0.931)'."""
    quality = found.get("quality") or {}
    if quality.get("value") is None:
        return NONE
    title = title_of(quality["metric"]) if quality.get("metric") else "quality"
    interval = f" ({number(quality['low'])}–{number(quality['high'])})" if quality.get("low") is not None else ""
    return f"{title} {number(quality['value'])}{interval}"


def chosen_int8(found: Mapping[str, Any]) -> str | None:
    """Which way of rounding was taken, why, and what each kept: 'static (convolution): static kept 0.998, ...'."""
    how = found.get("quantisation") or {}
    if not how.get("method"):
        return None
    kept = ", ".join(f"{name} kept {said['kept']:.4f}" for name, said in (how.get("candidates") or {}).items())
    why = how.get("why", "the student's own integers and scales" if how["method"] == "trained" else "?")
    return f"{how['method']} ({why})" + (f": {kept} of the calibration inputs" if kept else "")


def _small(value: float | None) -> str:
    return NONE if value is None else f"{value:.2g}"

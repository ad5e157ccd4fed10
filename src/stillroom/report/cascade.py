"""The figure of a cascade: quality against the share of questions that still reach the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from stillroom.report.figures import FAINT, INK, STYLE, colour_of, svg


def cascade_figure(found: Mapping[str, Any]) -> str | None:
    """The curve over thresholds with its 95 % intervals, and the chosen point; None where nothing was measured."""
    points = sorted((p for p in found["curve"] if p["quality"]), key=lambda p: p["asked"])
    if not points:
        return None
    asked = [p["asked"] for p in points]
    value, low, high = ([p["quality"][part] for p in points] for part in ("value", "low", "high"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1))
        axes = figure.add_subplot()
        axes.fill_between(asked, low, high, color=FAINT, alpha=0.6, linewidth=0)
        axes.plot(asked, value, color=colour_of("student"), linewidth=1.8)
        axes.plot(asked[-1], value[-1], "o", color=colour_of("teacher"), markersize=7)
        side = "left" if asked[-1] < 0.5 else "right"
        axes.annotate("teacher alone", (asked[-1], value[-1]), (0, -14), textcoords="offset points", ha=side)
        chosen = found["measured"]
        if found["threshold"] is not None:
            place = (chosen["asked"], chosen["quality"]["value"])
            axes.plot(*place, "D", color=INK, markersize=7)
            axes.annotate("chosen", place, (8, 8), textcoords="offset points")
        axes.set_xlim(-0.02, 1.02)
        axes.margins(y=0.15)
        axes.set_xlabel("share of questions that reach the teacher")
        axes.set_ylabel("accuracy" if found["against"] == "labels" else "agrees with teacher")
        said = (
            f"{chosen['asked']:.1%} of the questions at the chosen threshold, quality {chosen['quality']['value']:.4f}"
        )
        return svg(figure, "cascade", f"Quality against the share of questions that reach the teacher: {said}.")

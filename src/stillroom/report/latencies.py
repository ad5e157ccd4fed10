"""How long what ships takes to answer, as a table and a figure of the page, from report/replay.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from stillroom.measures.wording import seconds
from stillroom.report.figures import INK, STYLE, colour_of, svg


def shown(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The figure, the percentiles of each row, and what a person should know of them."""
    if not found:
        return None
    period = found["period"]
    rows = [
        {
            "name": name,
            "calls": f"{row['calls']:,}",
            "seconds": [seconds(value) for value in row["seconds"].values()],
            "loop": _loop(found.get("closed_loop", {}).get(name)),
            "longer": "–" if period is None else f"{row['longer_than_period']:,}",
        }
        for name, row in found["rows"].items()
    ]
    return {
        "figure": replay_figure(found["rows"], period),
        "loops": "closed_loop" in found,
        "heads": ["half within", "90 % within", "99 % within", "99.9 % within", "longest"],
        "rows": rows,
        "period": None if period is None else seconds(period),
        "observations": f"{found['observations']:,}",
    }


def _loop(found: Mapping[str, Any] | None) -> str:
    """What an artefact did in its closed loop."""
    if found is None:
        return "–"
    done = "" if found["success"] is None else f", success {found['success']:.0%}"
    return f"{found['mean_return']:.4g} (worst {found['worst_return']:.4g}){done}"


def replay_figure(rows: Mapping[str, Mapping[str, Any]], period: float | None) -> str:
    """How long each answer took: the share of calls by seconds, both logarithmic, with the control period marked.

    Both in PyTorch have their rows' colours; artefacts are the student's, told apart by dashes and by their names.
    """
    dashes = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.3))
        axes = figure.add_subplot()
        for number, (name, row) in enumerate(rows.items()):
            edges, counts = row["histogram"]["edges"], row["histogram"]["counts"]
            shares = [count / row["calls"] for count in counts]
            colour = colour_of("teacher" if name == "teacher" else "student" if name == "student" else "baseline")
            style = "-" if name in ("teacher", "student") else dashes[number % len(dashes)]
            axes.stairs(shares, edges, color=colour, linestyle=style, linewidth=1.6, label=name)
        if period is not None:
            axes.axvline(period, color=INK, linewidth=1.2, linestyle=(0, (2, 2)))
            axes.annotate(
                f"period {seconds(period)}", (period, 1), (-5, -4), textcoords="offset points", ha="right", va="top",
                xycoords=axes.get_xaxis_transform(), color=INK, rotation=90,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: seconds(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlabel("time of one answer (logarithmic)")
        axes.set_ylabel("share of the calls")
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        said = "; ".join(f"{name}: half within {seconds(row['seconds']['p50'])}" for name, row in rows.items())
        return svg(figure, "replay", f"Histogram of the time of one answer. {said}.")

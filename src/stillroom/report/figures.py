"""The page's figures, as SVG that belongs to the page: its text colour, its row colours, its fonts, in light and dark.

matplotlib draws with stand-in colours; each is then replaced by the CSS variable that it stands for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillroom.measures.wording import RATES, Rows, number, title_of, verdict
from stillroom.report.stages import Curve

INK, FAINT = "#010203", "#010204"
STAND_INS = {INK: "var(--ink-2)", FAINT: "var(--line)"}
ROW_NAMES = ("teacher", "student", "alone", "untrained", "baseline")
ROW_COLOURS = {name: f"#0a0b{index:02x}" for index, name in enumerate(ROW_NAMES)}
NARROW = 8.0  # the least ratio between the ends of a logarithmic axis
OTHER = "#0a0bff"
ENOUGH = 10  # examples in a bin of confidence: fewer say nothing of its accuracy
MOST_POINTS = 300  # of a curve: a page stays small whatever the number of steps

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


def colour_of(row: str) -> str:
    """The stand-in colour of a row."""
    return ROW_COLOURS.get(row, OTHER)


def comparisons_figure(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The differences between the student and the others, each with its interval around 0.

    The untrained start is left out where there is another: it is so far away that the others could not be read.
    """
    comparisons = [c for c in comparisons if c["metric"] == comparisons[0]["metric"]]  # one axis, one unit
    comparisons = [c for c in comparisons if c["worse"] != "untrained"] or comparisons
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.75 + 0.42 * len(comparisons)))
        axes = figure.add_subplot()
        for place, c in enumerate(comparisons):
            colour = colour_of(c["worse"])
            axes.plot([c["low"], c["high"]], [place, place], color=colour, solid_capstyle="round", linewidth=3)
            axes.plot(c["difference"], place, "o", color=colour, markersize=7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(comparisons)), [f"against {c['worse']}" for c in comparisons])
        axes.set_ylim(len(comparisons) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel(f"{title_of(comparisons[0]['metric'])}: better than the other →")
        said = "; ".join(
            f"student {verdict(c)} against {c['worse']}, difference {number(c['difference'])}" for c in comparisons
        )
        return svg(figure, "comparisons", f"Differences with 95 % intervals: {said}.")


def curves_figure(curves: Sequence[Curve]) -> str:
    """Loss by step, the student's and the control's each on an axis of its own: they minimise different things."""
    rows = [row for row in ("student", "alone") if any(c.row == row for c in curves)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1))
        for place, row in enumerate(rows):
            axes = figure.add_subplot(1, len(rows), place + 1)
            own = [c for c in curves if c.row == row]
            for curve in own:
                points = _thinned([s for s in curve.steps if _finite(s.get("loss")) and _finite(s.get("step"))])
                steps, losses = [s["step"] for s in points], [s["loss"] for s in points]
                axes.plot(steps, losses, color=colour_of(row), alpha=1 if len(own) == 1 else 0.65, linewidth=1.5)
            axes.set_title(row if len(own) == 1 else f"{row}, {len(own)} seeds", fontsize=10.5, loc="left")
            axes.set_xlabel("step")
            if place == 0:
                axes.set_ylabel("training loss")
            axes.locator_params(axis="x", nbins=4)
        return svg(figure, "curves", f"Training loss by step of {' and '.join(rows)}; each minimises its own loss.")


def cost_figure(rows: Rows, metric: str, cost: str) -> str | None:
    """Quality against a cost on a logarithmic axis; None when fewer than two rows have both."""
    pairs = {row: (cells.get(cost), cells.get(metric)) for row, cells in rows.items()}
    points = {
        row: (p, q)
        for row, (p, q) in pairs.items()
        if row != "untrained" and p is not None and q is not None and p["value"] > 0  # it would flatten the others
    }
    if len(points) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1))
        axes = figure.add_subplot()
        for row, (price, quality) in points.items():
            error = [[quality["value"] - quality["low"]], [quality["high"] - quality["value"]]]
            axes.errorbar(
                price["value"],
                quality["value"],
                yerr=error,
                fmt="o",
                color=colour_of(row),
                markersize=8,
                elinewidth=1.6,
            )
            side, align = (10, "left") if row == "teacher" else (-10, "right")  # so that neighbours do not overlap
            place = (price["value"], quality["value"])
            axes.annotate(
                row, place, (side, 4), textcoords="offset points", ha=align, color=colour_of(row), annotation_clip=False
            )
        axes.set_xscale("log")
        _log_ticks(axes, cost)
        axes.margins(x=0.3, y=0.12)
        better = "right is faster" if cost in RATES else "left is cheaper"
        axes.set_xlabel(f"{title_of(cost)} (logarithmic; further {better})")
        axes.set_ylabel(title_of(metric))
        said = "; ".join(
            f"{row}: {number(p[1]['value'])} at {number(p[0]['value'], cost)}" for row, p in points.items()
        )
        return svg(figure, f"cost-{cost}", f"{title_of(metric)} against {title_of(cost)}. {said}.")


def reliability_figure(reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Accuracy by confidence in bins of at least 10; on the diagonal, a model is right as often as it says."""
    shown = {row: [b for b in bins if b["count"] >= ENOUGH] for row, bins in reliability.items() if row != "untrained"}
    if not any(shown.values()):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.5))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 4)))
        for row, bins in shown.items():
            total = sum(b["count"] for b in bins) or 1
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, color=colour_of(row), label=row, linewidth=1.4)
            sizes = [6 + 160 * b["count"] / total for b in bins]
            axes.scatter(x, y, s=sizes, color=colour_of(row), linewidths=0)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend(loc="upper left", fontsize=10)
        names = ", ".join(shown)
        return svg(figure, "reliability", f"Accuracy by confidence of {names}; the diagonal is perfect calibration.")


def _log_ticks(axes: Axes, cost: str) -> None:
    """Ticks as the table writes them: 1 ms, 10 MB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high / low < NARROW:  # two rows of almost equal cost must not look far apart
        middle = (low * high) ** 0.5
        low, high = middle / NARROW**0.5, middle * NARROW**0.5
        axes.set_xlim(low, high)
    if high / low < 30:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, cost)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _thinned(points: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MOST_POINTS of them, the last one included."""
    every = -(-len(points) // MOST_POINTS)
    return points[:: every or 1] if not points or every <= 1 else [*points[:-1:every], points[-1]]


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element: named for those who cannot see it, its ids its own, its colours the page's."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--sans)", text)
    head = f'<svg class="figure" role="img" aria-label="{escape(label, quote=True)}"'
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf"{head} \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    rows = {colour: f"var(--{row})" for row, colour in ROW_COLOURS.items()}
    for colour, variable in {**STAND_INS, **rows, OTHER: "var(--other)"}.items():
        text = text.replace(colour, variable)
    return text.strip()

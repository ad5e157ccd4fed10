"""The page: what the template shows, in the order in which a reader asks. One file, no network, no script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stillroom.files import write_bytes
from stillroom.measures.artefacts import EXPORT_COLUMNS, chosen_int8, export_cells
from stillroom.measures.wording import (
    COSTS,
    cheaper,
    columns_in_order,
    compared,
    helped,
    in_order,
    kept,
    number,
    overlapping,
    seconds,
    spread,
    title_of,
    verdict,
)
from stillroom.report import figures
from stillroom.report.cascade import cascade_figure
from stillroom.report.driving import driving_of
from stillroom.report.latencies import shown
from stillroom.report.lineage import gate_of, lineage_figure
from stillroom.report.stages import Stages, read_stages

PAGE = "report.html"
FIGURES = ("comparisons", "latency", "generation", "parameters", "reliability", "curves", "cascade")
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def write_report(run_folder: str | Path) -> Path:
    """Write report/report.html of a run from its files, and return its path. What has not run yet is left out.

    Raises MissingFileError when the folder does not exist, FolderError when one of its files cannot be read.
    """
    stages = read_stages(Path(run_folder))
    environment = Environment(
        loader=PackageLoader("stillroom.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=number, spread=spread, title=title_of, seconds=seconds)
    text = environment.get_template("report.html.j2").render(**content(stages))
    path = stages.folder / "report" / PAGE
    write_bytes(path, text.encode())
    return path


def content(stages: Stages) -> dict[str, Any]:
    """Everything that the template shows, as plain values; figures are SVG made here."""
    report = stages.report
    return {
        "name": stages.folder.resolve().name,
        "report": report,
        "kept": None if report is None else _kept(report),
        "helped": None if report is None else helped(report["comparisons"]),
        "verdict": None if report is None else _overall(report),
        "tiles": [] if report is None else _tiles(report),
        "scoreboard": None if report is None else _scoreboard(report),
        "comparisons": [] if report is None else [(verdict(c), compared(c)) for c in report["comparisons"]],
        "diagnosis": [] if report is None else report.get("diagnosis", ()),
        "figures": _figures(stages),
        "exports": [_export(found) for found in stages.exports],
        "disagreements": [] if report is None else [_disagreement(found) for found in report.get("disagreements", ())],
        "generations": [] if report is None else [_generation(found) for found in report.get("generations", ())],
        "overlap": None if report is None else _overlap(report.get("overlap")),
        "cascade": stages.cascade,
        "harness": _harness(stages.harness),
        "money": stages.money,
        "driving": driving_of(stages),
        "replay": shown(stages.replay),
        "provenance": _provenance(stages),
        "lineage": None if not stages.passport else lineage_figure(stages.passport, stages.parents),
        "gate": None if not stages.passport else gate_of(stages.passport),
    }


def _kept(report: Mapping[str, Any]) -> str:
    return kept(report["rows"], report["metric"], report["metrics"][report["metric"]]["higher_is_better"])


def _overall(report: Mapping[str, Any]) -> str:
    """better, worse, unclear, or unknown without a control: the colour of the headline."""
    against = [c for c in report["comparisons"] if (c["better"], c["worse"]) == ("student", "alone")]
    return verdict(against[0]) if against else "unknown"


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers to remember of the student: (name, value, what it is compared with)."""
    rows, metric = report["rows"], report["metric"]
    student, teacher = rows.get("student", {}), rows.get("teacher", {})
    tiles = []
    if student.get(metric):
        theirs = f"teacher {number(teacher[metric]['value'])}" if teacher.get(metric) else ""
        tiles.append((title_of(metric), number(student[metric]["value"]), theirs))
    tiles.extend(
        (title_of(cost), number(student[cost]["value"], cost), _than_teacher(rows, cost))
        for cost in ("bytes", "latency", "generation")
        if student.get(cost)
    )
    if student.get("agreement"):
        of = "of the tokens" if "bits_per_byte" in report["metrics"] else "of the examples"
        tiles.append(("agrees with teacher", f"{100 * student['agreement']['value']:.1f} %", of))
    return tiles


def _than_teacher(rows: Mapping[str, Any], cost: str) -> str:
    said = cheaper(rows, "student", cost)
    return f"{said} than the teacher" if said else ""


def _scoreboard(report: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and rows of the table; a cell carries its exact numbers beside what is shown."""
    rows, metrics = in_order(report["rows"]), report["metrics"]
    columns = columns_in_order(metrics, report["metric"])
    best = {name: _best(rows, name, metrics[name]["higher_is_better"]) for name in columns if name not in COSTS}
    table = []
    for row, cells in rows.items():
        shown = []
        for name in columns:
            cell = cells.get(name)
            shown.append({"name": name, "cell": cell, "ratio": cheaper(rows, row, name)})
        table.append({"name": row, "seeds": report.get("seeds", {}).get(row, 1), "cells": shown})
    arrows = {True: "↑", False: "↓", None: ""}
    heads = [
        {
            "name": name,
            "about": metrics[name]["about"],
            "arrow": arrows[metrics[name]["higher_is_better"]],
            "cost": name in COSTS,
        }
        for name in columns
    ]
    return {"columns": heads, "rows": table, "best": best}


def _best(rows: Mapping[str, Any], name: str, higher: bool | None) -> str | None:
    """The best row of a column, the teacher and the untrained start aside."""
    known = {
        row: cells[name]["value"]
        for row, cells in rows.items()
        if row not in ("teacher", "untrained") and cells.get(name)
    }
    if higher is None or len(known) < 2:
        return None
    return (max if higher else min)(known, key=lambda row: known[row])


def _figures(stages: Stages) -> dict[str, str | None]:
    """Every figure by name; None where there is nothing to draw."""
    found: dict[str, str | None] = dict.fromkeys(FIGURES)
    report = stages.report
    if report is not None:
        if report["comparisons"]:
            found["comparisons"] = figures.comparisons_figure(report["comparisons"])
        for cost in ("latency", "generation", "parameters"):
            found[cost] = figures.cost_figure(in_order(report["rows"]), report["metric"], cost)
        found["reliability"] = figures.reliability_figure(in_order(report.get("reliability", {})))
    if stages.cascade is not None:
        found["cascade"] = cascade_figure(stages.cascade)
    if stages.curves:
        found["curves"] = figures.curves_figure(stages.curves)
    return found


def _export(found: Mapping[str, Any]) -> dict[str, Any]:
    versions = found.get("versions") or {}
    return {
        "cells": dict(zip(EXPORT_COLUMNS, export_cells(found), strict=True)),
        "file": found.get("file", ""),
        "chosen": chosen_int8(found),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "passed": found.get("unproven") or ("passed" if found.get("passed") else "FAILED"),
        "mark": "yes" if found.get("passed") else "" if found.get("unproven") else "no",
    }


def _disagreement(found: Mapping[str, Any]) -> dict[str, Any]:
    confidences = found.get("confidences", {})
    answers = [
        {
            "row": row,
            "text": text,
            "confidence": confidences.get(row),
            "right": None if found["label"] is None or confidences.get(row) is None else text == found["label"],
        }
        for row, text in in_order(found["answers"]).items()
        if text is not None
    ]
    return {
        "id": found["id"],
        "label": found["label"],
        "divergence": None if found["divergence"] is None else number(found["divergence"]),
        "inputs": [_input(name, value) for name, value in found["input"].items()],
        "answers": answers,
    }


def _generation(found: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt, how the text itself goes on, and how each row does."""
    rows = [
        {"row": row, "text": said["text"], "ended": bool(said["ended"])}
        for row, said in in_order(found["rows"]).items()
    ]
    return {"id": found["id"], "prompt": found["prompt"], "text": found["text"], "rows": rows}


def _overlap(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"said": overlapping(found), "found": bool(found["found"]), "examples": found["examples"]}


def _harness(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The tasks of lm-evaluation-harness: its version, the columns, and one line of cells for each row."""
    if found is None:
        return None
    rows = in_order(found["rows"])
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    table = [(row, [cells.get(name) for name in columns]) for row, cells in rows.items()]
    return {"version": found["version"], "columns": columns, "rows": table}


def _input(name: str, value: Any) -> dict[str, Any]:
    """A picture only when it is one: nothing else from a file becomes the address of an image."""
    if isinstance(value, Mapping):
        address = str(value.get("image", ""))
        return {"name": name, "picture": address if _PICTURE.fullmatch(address) else None, "text": ""}
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join("–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        return {"name": name, "picture": None, "text": shown}
    return {"name": name, "picture": None, "text": str(value)}


def _provenance(stages: Stages) -> list[tuple[str, str]]:
    """(what, which) of the teacher, the data, the student and the passport, as far as the files say."""
    lines: list[tuple[str, str]] = []
    recording, student = stages.recording or {}, stages.student or {}
    teacher, data = recording.get("teacher") or {}, recording.get("data") or {}
    if teacher:
        lines.append(("Teacher", _joined(teacher.get("name"), teacher.get("source"), teacher.get("revision"))))
        lines.append(("Teacher's licence", str(teacher.get("licence", "unknown"))))
        if teacher.get("digest"):
            lines.append(("Teacher's weights (sha256)", str(teacher["digest"])))
    if data:
        rows = f"{data['rows']:,} examples" if isinstance(data.get("rows"), int) else None
        lines.append(("Learned from", _joined(data.get("name"), rows, data.get("source"))))
        lines.append(("Data's licence", str(data.get("licence", "unknown"))))
        if data.get("digest"):
            lines.append(("Data (sha256)", str(data["digest"])))
    fidelity = recording.get("fidelity") or {}
    if isinstance(fidelity.get("kl"), int | float):
        lines.append(("Recording", f"{fidelity['kl']:.2g} nats from the live teacher, on a re-asked sample"))
    cuts = (student.get("made_by") or {}).get("pruned", ())
    lines += [(f"Cut from the teacher: {choice['cut']}", _choice(choice)) for choice in cuts]
    if student.get("objective") is not None:
        lines.append(("Trained on", _method(student)))
    if student.get("content_digest"):
        lines.append(("Student's weights (sha256)", str(student["content_digest"])))
    if stages.passport is not None:
        lines.append(("Passport", "passport.json, beside this report"))
    return lines


def _choice(choice: Mapping[str, Any]) -> str:
    """'30 to 14 by KL without each layer, removed 3, 4, 5', as the choice says."""
    removed = choice.get("removed")
    gone = f"removed {', '.join(map(str, removed))}" if removed and len(removed) <= 64 else None
    return _joined(f"{choice['before']:,} to {choice['after']:,}, chosen by {choice['by']}", gone)


def _method(student: Mapping[str, Any]) -> str:
    """'SoftTargets, 504 steps, learning rate 0.01, seed 0', as far as student.json says."""
    objective, plan = student["objective"], student.get("plan") or {}
    name = objective.get("use", "an objective") if isinstance(objective, Mapping) else str(objective)
    steps = student.get("steps") or plan.get("steps")
    rate, seed = plan.get("learning_rate"), plan.get("seed")
    return _joined(
        str(name).rpartition(":")[2],
        None if steps is None else f"{steps:,} steps",
        None if rate is None else f"learning rate {rate}",
        None if seed is None else f"seed {seed}",
    )


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part and part != "unknown") or "unknown"

"""The passport as a reader sees it: a picture of what the student descends from, and what the gate decided.

The picture is SVG that belongs to the page: its colours are the page's, its text is text, every word is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH, HEIGHT, ACROSS, DOWN = 244, 62, 54, 14  # of a box, and between boxes
LONGEST = 28  # characters in a line of a box
DECISIONS = {
    "allow": "The terms allow it.",
    "conditions": "Conditions of the terms are not met.",
    "forbidden": "The terms forbid it.",
    "human": "A person must decide.",
    "not-asked": "The gate was not asked: these parts were put together by hand.",
}


@dataclass(frozen=True)
class Box:
    """One thing that the student comes from: what it is, its name, and one line about it."""

    kind: str  # student, teacher, member, data or weights: its colour
    name: str
    about: str
    sources: tuple[Box, ...] = field(default=())


def lineage_figure(passport: Mapping[str, Any], parents: Mapping[str, Mapping[str, Any]]) -> str:
    """The SVG of a passport's lineage, sources on the left. ``parents``: passports of teachers that were students."""
    root = _student(passport, dict(parents))
    columns: list[list[tuple[Box, Box | None]]] = []
    _place(root, None, 0, columns)
    tall = max(len(column) for column in columns)
    height, width = tall * (HEIGHT + DOWN) - DOWN, len(columns) * (WIDTH + ACROSS) - ACROSS
    corners: dict[int, tuple[float, float]] = {}
    shapes: list[str] = []
    for depth, column in enumerate(columns):
        left = (len(columns) - 1 - depth) * (WIDTH + ACROSS)
        top = (height - (len(column) * (HEIGHT + DOWN) - DOWN)) / 2
        for number, (box, target) in enumerate(column):
            corners[id(box)] = (left, top + number * (HEIGHT + DOWN))
            if target is not None:
                shapes.append(_arrow(corners[id(box)], corners[id(target)]))
    shapes += [_drawn(box, *corners[id(box)]) for column in columns for box, _ in column]
    title = f"What {passport['name']} descends from"
    return (
        f'<svg class="lineage" role="img" aria-label="{escape(title)}" viewBox="-1 -1 {width + 2} {height + 2}" '
        f'width="{width + 2}" xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
    )


def gate_of(passport: Mapping[str, Any]) -> dict[str, Any] | None:
    """The decision in words, its reasons, what the student must carry, and waivers; None for older passports."""
    policy = passport.get("policy")
    if not policy:
        return None
    return {
        "decision": policy["decision"],
        "says": DECISIONS.get(policy["decision"], policy["decision"]),
        "reasons": policy["reasons"],
        "obligations": policy["obligations"],
        "waivers": policy["waivers"],
        "table": policy["table_version"],
    }


def _student(passport: Mapping[str, Any], parents: dict[str, Mapping[str, Any]], kind: str = "student") -> Box:
    said = passport["student"]
    sources = [_teacher(teacher, parents) for teacher in passport["teachers"]]
    sources += [_data(data) for data in passport["data"] if data["role"] in ("training", "recorded")]
    if said["init_from"] and not any(said["init_from"] in (t["name"], t["source"]) for t in passport["teachers"]):
        sources.append(Box("weights", said["init_from"], "its first weights"))
    parameters = said["parameters"]
    about = f"licence {said['licence']}" if parameters is None else f"{parameters:,} parameters, {said['licence']}"
    return Box(kind, passport["name"], about, tuple(sources))


def _teacher(teacher: Mapping[str, Any], parents: dict[str, Mapping[str, Any]]) -> Box:
    """A teacher with its members, or, where it was a student itself, with what that came from."""
    use = (teacher.get("terms") or {}).get("output_use", "unknown")
    about = f"{teacher['licence']}: outputs {use}"
    own = next((key for key, parent in parents.items() if _is(parent, teacher)), None)
    if own is not None:  # taken out, so that a chain that names itself ends
        parent = parents.pop(own)
        return Box("teacher", teacher["name"], about, _student(parent, parents).sources)
    return Box("teacher", teacher["name"], about, tuple(_member(part, parents) for part in teacher["parts"]))


def _member(part: Mapping[str, Any], parents: dict[str, Mapping[str, Any]]) -> Box:
    found = _teacher(part, parents)
    return Box("member", found.name, found.about, found.sources)


def _is(parent: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    digest = parent["student"]["content_digest"]
    return digest is not None and digest == teacher["digest"]


def _data(data: Mapping[str, Any]) -> Box:
    rows = "" if data["rows"] is None else f"{data['rows']:,} rows, "
    made = f", by {data['generated_by']}" if data.get("generated_by") else ""
    return Box("data", data["name"], f"{rows}{data['licence']}{made}")


def _place(box: Box, target: Box | None, depth: int, columns: list[list[tuple[Box, Box | None]]]) -> None:
    if len(columns) == depth:
        columns.append([])
    columns[depth].append((box, target))
    for source in box.sources:
        _place(source, box, depth + 1, columns)


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y, to_x, to_y = start[0] + WIDTH, start[1] + HEIGHT / 2, end[0], end[1] + HEIGHT / 2
    middle = (x + to_x) / 2
    path = f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x - 7:g} {to_y:g}"
    head = f"M{to_x - 8:g} {to_y - 4:g}L{to_x - 1:g} {to_y:g}L{to_x - 8:g} {to_y + 4:g}"
    return f'<path class="edge" d="{path}"/><path class="edge" d="{head}"/>'


def _drawn(box: Box, left: float, top: float) -> str:
    lines = [(box.kind, "kind", 16), (_short(box.name), "name", 34), (_short(box.about), "about", 51)]
    words = "".join(
        f'<text class="{style}" x="{left + 12:g}" y="{top + down:g}">{escape(text)}</text>'
        for text, style, down in lines
    )
    shape = f'<rect x="{left:g}" y="{top:g}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    return f'<g class="box {box.kind}"><title>{escape(f"{box.name}: {box.about}")}</title>{shape}{words}</g>'


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

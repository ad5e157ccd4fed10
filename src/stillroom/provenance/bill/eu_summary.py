"""The public summary of training content that Article 53(1)(d) of the EU's AI Act asks of general-purpose models.

After the Commission's template of 24 July 2025. Two places follow from a passport: the models that this one depends on
(section 1), and the models whose outputs it learned from (section 2.5, synthetic data). All else is marked "to be
provided": it is for the provider to say, and nothing is guessed. Whether a model is one of general purpose is not
decided here either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.provenance.bill import words

OPEN = "to be provided"
FORMAT = "stillroom-eu-summary/1"
BLANK = {
    "2.1 Publicly available datasets": ("modalities", "list of large datasets", "description of other datasets"),
    "2.2 Private non-publicly available datasets obtained from third parties": (
        "datasets commercially licensed by rightsholders or their representatives",
        "private datasets obtained from other third parties",
    ),
    "2.3 Data crawled and scraped from online sources": (
        "names of crawlers",
        "purposes and behaviour of crawlers",
        "period of collection",
        "description of the content and sources crawled",
        "summary of the most relevant domain names",
    ),
    "2.4 User data": ("from interactions with the model", "from the provider's other services", "description"),
    "2.6 Other sources of data": ("description",),
    "3.1 Respect of reservation of rights from text and data mining": ("signatory of the Code of Practice", "measures"),
    "3.2 Removal of illegal content": ("measures",),
    "3.3 Other information": ("comments",),
}


def summary(passport: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a valid passport as plain JSON: section, then field, then what is known."""
    student = passport["student"]
    inherited = student["init_from"] if student["init"] in ("pretrained", "teacher-weights") else None
    dependencies = {"random": ["none: its weights began at random"], "unknown": [OPEN]}
    sections: dict[str, Any] = {
        "1.1 Provider identification": _open("provider name and contact details", "authorised representative"),
        "1.2 Model identification": {
            "versioned model name": passport["name"],
            "model dependencies": [inherited] if inherited else dependencies.get(student["init"], [OPEN]),
            "date of placement of the model on the Union market": OPEN,
        },
        "1.3 Modalities, overall training data size and other characteristics": _open(
            "modality and size of training data", "latest date of data acquisition", "linguistic characteristics"
        ),
        **{name: _open(*BLANK[name]) for name in BLANK if name < "2.5"},
        "2.5 Synthetic data": _synthetic(passport),
        **{name: _open(*BLANK[name]) for name in BLANK if name > "2.5"},
    }
    return {"format": FORMAT, "passport_sha256": words.digest(passport), "sections": sections}


def markdown(passport: Mapping[str, Any]) -> str:
    """The same to be read."""
    found = summary(passport)
    lines = [
        f"# Summary of training content: {_plain(passport['name'])}",
        "",
        f"Drafted from a stillroom passport (sha256 {found['passport_sha256']}),",
        "after the template of 24 July 2025 for Article 53(1)(d) of Regulation (EU) 2024/1689.",
        "What the passport cannot say is marked as to be provided.",
    ]
    for section, fields in found["sections"].items():
        lines += ["", f"## {section}", ""]
        for name, value in fields.items():
            if isinstance(value, list):
                lines.append(f"- **{name}**:")
                lines += [f"    - {_plain(_told(one))}" for one in value]
            else:
                lines.append(f"- **{name}**: {_plain(value)}")
    return "\n".join(lines) + "\n"


def _synthetic(passport: Mapping[str, Any]) -> dict[str, Any]:
    """Section 2.5: the models whose outputs the student learned from, and data that a model wrote."""
    models = [
        {
            "name": entry.name,
            "source": entry.said["source"],
            "revision": entry.said["revision"] or words.NULL,
            "licence": entry.said["licence"],
            "terms on outputs": f"{entry.said['terms']['id']} ({entry.said['terms']['output_use']})",
            "route": entry.said["access"]["route"],
            "answers": words.NULL if entry.said["access"]["requests"] is None else entry.said["access"]["requests"],
        }
        for entry in words.teachers(passport)
    ]
    written = [
        {"name": entry.said["generated_by"], "source": words.UNKNOWN, "wrote": entry.name}
        for entry in words.data(passport)
        if entry.said["generated_by"] is not None and entry.said["role"] in ("training", "recorded")
    ]
    found = [*models, *written]
    return {
        "modality": OPEN,
        "models whose outputs were learned from": found or ["none that the passport names"],
        "which of them are general-purpose models on the Union market": OPEN if found else "none is named",
        "information on their training data, where they are the provider's own": OPEN if found else "none is named",
        "comments": OPEN,
    }


def _open(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, OPEN)


def _told(value: Any) -> Any:
    return "; ".join(f"{name}: {inner}" for name, inner in value.items()) if isinstance(value, Mapping) else value


def _plain(value: Any) -> str:
    """One line without Markdown or HTML of its own."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    for mark in "\\`*_[]<>|#":
        line = line.replace(mark, f"\\{mark}")
    return line

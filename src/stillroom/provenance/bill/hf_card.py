"""A model card as the Hugging Face hub reads it: metadata by the hub's rules, then the text of the run's own card.

``base_model`` only where weights were inherited: the hub draws its family trees from it, and a student that began at
random is nobody's fine-tune. Its teachers are tags (``distilled-from:ID``) and the key ``distilled_from``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from stillroom.provenance.bill import words
from stillroom.provenance.card import render

HUB_NAME = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)")
INHERITED = ("pretrained", "teacher-weights")
# Identifiers that the hub knows; any other licence is 'other' with a name of its own (docs: "Licenses").
LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
    bsd-2-clause bsd-3-clause bsl-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-4.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-2.0 ecl-2.0 epl-2.0 eupl-1.1
    eupl-1.2 gemma gfdl gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 mit
    mpl-2.0 ms-pl ncsa ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unlicense unknown wtfpl zlib
"""


def header(passport: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a valid passport's card."""
    student = passport["student"]
    teachers = words.teachers(passport)
    named = [_hub_name(teacher.said["source"]) or teacher.name for teacher in teachers]
    found: dict[str, Any] = {
        **_licence(student["licence"]),
        "library_name": "pytorch",
        "tags": ["knowledge-distillation", "stillroom", *(f"distilled-from:{name}" for name in dict.fromkeys(named))],
    }
    base = _hub_name(student["init_from"]) if student["init"] in INHERITED else None
    if base is not None:
        found["base_model"] = base
    data = [_hub_name(part.said["source"]) for part in words.data(passport) if part.said["role"] == "training"]
    if any(data):
        found["datasets"] = [name for name in data if name is not None]
    if passport["evaluation"]:
        found["metrics"] = [passport["evaluation"]["metric"]]
    if teachers:
        found["distilled_from"] = [
            {"name": name, "licence": teacher.said["licence"], "terms": teacher.said["terms"]["id"]}
            | {"output_use": teacher.said["terms"]["output_use"]}
            for name, teacher in zip(named, teachers, strict=True)
        ]
    found["stillroom_passport_sha256"] = words.digest(passport)
    return found


def card(passport: Mapping[str, Any]) -> str:
    """The whole card of a valid passport: YAML between lines of dashes, then Markdown."""
    front = yaml.safe_dump(header(passport), sort_keys=False, allow_unicode=True, width=1000)
    body = render(passport).split("\n---\n", 1)[1]
    return f"---\n{front}---\n{body}"


def _licence(said: str) -> dict[str, str]:
    if said.lower() in LICENCES.split():
        return {"license": said.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", said.lower()).strip("-") or "unnamed"}


def _hub_name(source: str | None) -> str | None:
    """organisation/name where a source is one; None for a folder, a package or an address."""
    found = HUB_NAME.fullmatch(source or "")
    return found.group(1) if found else None

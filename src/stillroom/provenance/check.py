"""verify(): is every file of a run what it was when the run was sealed, and does the passport say so?

Nothing that a file holds can stop it: what cannot be parsed, read or rendered is a mismatch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785

from stillroom.provenance import signed
from stillroom.provenance.card import CARD, render
from stillroom.provenance.manifest import (
    LARGEST,
    MANIFEST,
    Mismatch,
    compare,
    digest_of,
    existing,
    files_of,
    form_of,
    shown,
)
from stillroom.provenance.passport import PASSPORT
from stillroom.provenance.schema import validate
from stillroom.provenance.signed import Trust
from stillroom.provenance.terms import held

# What parsing, validating and rendering of hostile JSON can raise: deep nesting, lone surrogates, huge numbers.
UNUSABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)


def verify(run_folder: str | Path, trust: Trust | None = None) -> list[Mismatch]:
    """Every file that was changed, added, removed or renamed since the run was sealed; empty when none was.

    Compares all files with manifest.json; checks passport.json by its schema, its digests against the files, and the
    model card against the passport; then the signature, where there is one, and the claims. Who changed both a file and
    the manifest of an *unsigned* run is not found out. ``trust``: whose signature it must be; None takes a signature
    for what it says of itself. Raises MissingFileError when the folder does not exist; what ``signed.check`` raises.
    """
    folder = existing(run_folder)
    found, digests = sealed(folder)
    named = {mismatch.path for mismatch in found}
    return found + [m for m in signed.check(folder, digests, trust or Trust()) if m.path not in named]


def sealed(folder: Path) -> tuple[list[Mismatch], dict[str, str | None]]:
    """What ``verify`` finds without signature and claims, and the sha256 of each sealed file by path."""
    plain, odd = files_of(folder)
    digests = {path: digest_of(place) for path, place in plain.items()}
    sizes = {path: place.stat().st_size for path, place in plain.items()}
    found = [Mismatch(path, "added", f"It is {why}.") for path, why in odd.items()]
    if MANIFEST in odd or not (folder / MANIFEST).is_file():
        found.append(Mismatch(MANIFEST, "removed", "Without it, no other file can be checked."))
    else:
        found.extend(_manifest(folder / MANIFEST, digests, sizes))
    named = {mismatch.path for mismatch in found}
    found.extend(m for m in _passport(folder, digests) if m.path not in named)
    return found, digests


def _manifest(path: Path, digests: Mapping[str, str | None], sizes: Mapping[str, int]) -> list[Mismatch]:
    manifest, problem = _parsed(path)
    if problem:
        return [Mismatch(MANIFEST, "changed", f"{problem} No file can be checked by it.")]
    found = compare(manifest, digests, sizes)
    try:
        same = form_of(manifest) == path.read_bytes()
    except (*UNUSABLE, OSError):
        same = False
    if same or any(mismatch.path == MANIFEST for mismatch in found):
        return found
    return [Mismatch(MANIFEST, "changed", "It is not in the form in which manifests are written."), *found]


def _parsed(path: Path) -> tuple[Any, str]:
    """The JSON of a file, and what is wrong with it in one sentence."""
    try:
        if path.stat().st_size > LARGEST:
            return None, "It is far too large."
        return json.loads(path.read_bytes(), parse_constant=_refuse), ""
    except OSError:
        return None, "It cannot be read."
    except UNUSABLE as error:
        return None, f"It is not JSON ({shown(str(error) or type(error).__name__, 100)})."


def _refuse(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _passport(folder: Path, digests: Mapping[str, str | None]) -> list[Mismatch]:
    if PASSPORT not in digests:
        return [Mismatch(PASSPORT, "removed", "A sealed run has one.")]
    passport, problem = _parsed(folder / PASSPORT)
    if problem:
        return [Mismatch(PASSPORT, "changed", problem)]
    try:
        if rfc8785.dumps(passport) != (folder / PASSPORT).read_bytes():
            return [Mismatch(PASSPORT, "changed", "It is not in canonical form (RFC 8785).")]
        problems = validate(passport)
        if problems:
            return [Mismatch(PASSPORT, "changed", f"It does not fit its schema: {problem}.") for problem in problems]
        found = [*_files_said(passport, digests), *_card(folder, passport, digests)]
        named = {mismatch.path for mismatch in found}
        return [*found, *(m for m in held.check(folder, passport, digests) if m.path not in named)]
    except UNUSABLE as error:
        return [Mismatch(PASSPORT, "changed", f"It cannot be used ({type(error).__name__}).")]


def _files_said(passport: Mapping[str, Any], digests: Mapping[str, str | None]) -> list[Mismatch]:
    """The files that the passport names by digest. A path is looked up among the files found, never opened."""
    entries = [*passport["student"]["artifacts"], *passport["exports"], *passport["built_from"]]
    entries += held.entries(passport)
    if passport["recipe_sha256"] is not None:
        entries.append({"path": "recipe.yaml", "sha256": passport["recipe_sha256"]})
    found: dict[str, Mismatch] = {}
    for entry in entries:
        path, said = entry["path"], entry["sha256"]
        if path not in digests:
            found[path] = Mismatch(path, "removed", f"The passport says that it was there (sha256 {said}).")
        elif digests[path] != said:
            found[path] = Mismatch(path, "changed", f"Its sha256 is {digests[path]}; the passport says {said}.")
    return list(found.values())


def _card(folder: Path, passport: Mapping[str, Any], digests: Mapping[str, str | None]) -> list[Mismatch]:
    if CARD not in digests:
        return [Mismatch(CARD, "removed", "The passport's model card is missing.")]
    if digests[CARD] is not None and (folder / CARD).read_bytes() == render(passport).encode():
        return []
    return [Mismatch(CARD, "changed", f"It is not the card of passport.json (which {passport['written_by']} wrote).")]

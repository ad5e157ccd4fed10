"""What the terms ask a student's folder to carry: written there, and found there again when a run is verified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.digests import file_digest
from stillroom.errors import CheckError
from stillroom.files import write_bytes

NOTICE = "NOTICE"
RESTRICTIONS = "USE_RESTRICTIONS.md"
SENTENCES = ("notice", "statement", "attribution", "changes-stated")
HEAD = "What this model learned from asks that the following goes with it.\n"
MOST_BYTES = 16 << 20  # of a NOTICE or a licence's text; a larger one is not ours


def apply(run_folder: Path, obligations: Sequence[Mapping[str, Any]]) -> None:
    """Write NOTICE, the terms' texts and the use restrictions into student/ and every folder of exports/.

    Raises CheckError when a text that must go with the student is not in RUN/terms.
    """
    for folder in shipped(run_folder):
        for path, content in files(run_folder, obligations).items():
            target = folder / path
            if not target.is_file() or target.read_bytes() != content:
                write_bytes(target, content)


def shipped(run_folder: Path) -> list[Path]:
    """The folders of a run that go out."""
    exports = sorted(path.parent for path in run_folder.glob("exports/*/verify.json"))
    return [folder for folder in (run_folder / "student", *exports) if folder.is_dir()]


def files(run_folder: Path, obligations: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """What a shipped folder must hold, by its path inside."""
    found: dict[str, bytes] = {}
    sentences = _unique(str(o["value"]) for o in obligations if o["id"] in SENTENCES)
    if sentences:
        found[NOTICE] = (HEAD + "".join(f"\n{sentence}\n" for sentence in sentences)).encode()
    for sha256 in _unique(str(o["value"]) for o in obligations if o["id"] == "terms-copy"):
        source = run_folder / "terms" / f"{sha256}.txt"
        if not source.is_file():
            raise CheckError(f"{source} is missing: a copy of these terms must go with the student.")
        found[f"terms/{sha256}.txt"] = source.read_bytes()
    restrictions = [o for o in obligations if o["id"] == "use-restrictions"]
    if restrictions:
        found[RESTRICTIONS] = _restrictions(restrictions).encode()
    return found


def unmet(
    obligation: Mapping[str, Any], name: str, contents: Mapping[str, bytes], digests: Mapping[str, str | None]
) -> str:
    """What a shipped folder lacks of an obligation, in one sentence; '' when it is met.

    ``contents``: of NOTICE and USE_RESTRICTIONS.md, ``digests``: of every file, both by path in the folder; ``name``:
    the student's.
    """
    kind, value = obligation["id"], str(obligation["value"])
    if kind == "name-prefix":
        return "" if name.startswith(value) else f"The student is called {name!r}; its name must begin with {value!r}."
    if kind in SENTENCES:
        held = contents.get(NOTICE, b"").decode("utf-8", "replace")
        return "" if f"\n{value}\n" in held else f"It does not say: {value}"
    if kind == "terms-copy":
        same = digests.get(f"terms/{value}.txt") == value
        return "" if same else f"The copy of the terms {obligation['terms']} is not there."
    if kind == "use-restrictions":
        held = contents.get(RESTRICTIONS, b"").decode("utf-8", "replace")
        return "" if _restriction(obligation) in held else f"It does not pass on: {value}"
    return f"Nobody knows how to meet an obligation {kind!r}."


def place_of(obligation: Mapping[str, Any]) -> str:
    """The file of a shipped folder where an obligation is met; 'passport.json' for the name."""
    kind = obligation["id"]
    if kind == "terms-copy":
        return f"terms/{obligation['value']}.txt"
    return NOTICE if kind in SENTENCES else RESTRICTIONS if kind == "use-restrictions" else ""


def missing(run_folder: Path, obligations: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[int, str, str]]:
    """(number of the obligation, folder, what it lacks) for all that is not met in a folder that goes out."""
    for folder in shipped(run_folder):
        contents = {n: _read(folder / n) for n in (NOTICE, RESTRICTIONS) if (folder / n).is_file()}
        digests: dict[str, str | None] = {f"terms/{p.name}": file_digest(p) for p in folder.glob("terms/*.txt")}
        for number, obligation in enumerate(obligations):
            lacks = unmet(obligation, name, contents, digests)
            if lacks:
                yield number, folder.relative_to(run_folder).as_posix(), lacks


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""


def _restrictions(obligations: Sequence[Mapping[str, Any]]) -> str:
    lines = _unique(_restriction(obligation) for obligation in obligations)
    return (
        "# Use restrictions\n\nThis model may be used, changed and passed on only within the following restrictions. "
        "Whoever passes it on, or a model that\nlearned from it, passes them on as an enforceable part of the terms of "
        "use.\n\n" + "".join(f"{line}\n" for line in lines)
    )


def _restriction(obligation: Mapping[str, Any]) -> str:
    return f"- {obligation['value']} (from {obligation['from_teacher']}, under {obligation['terms']})"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))

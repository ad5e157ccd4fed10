"""Several artefacts of one student: what is asked for, what cannot be had and why, and each made though others fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import StillroomError, UsageError, nearest
from stillroom.exporting.artifact import Artifact, Target
from stillroom.exporting.stage import Ready, export_ready, get_ready, refusal_of
from stillroom.exporting.targets import TARGETS, label_of, target_of
from stillroom.students.networks import Student
from stillroom.types import Examples

Wanted = tuple[str, str]  # target, precision


@dataclass(frozen=True)
class Exports:
    """What came of it: artefacts that passed, and for the others, by 'target precision', why there is none."""

    artifacts: tuple[Artifact, ...]
    failures: Mapping[str, str]
    skipped: Mapping[str, str]


def combinations(targets: Sequence[str], precisions: Sequence[str] | None = None) -> list[Wanted]:
    """Every (target, precision) that a target offers among those asked for; of each its first when none are.

    Raises UsageError, with what there is, for an unknown target, a precision that no target knows, and a target that
    has none of the precisions.
    """
    offered = {name: _offered(name, precisions) for name in dict.fromkeys(targets)}
    if precisions is None:
        return [(name, known[0]) for name, known in offered.items()]
    there_is = "; ".join(f"{name}: {', '.join(known)}" for name, known in offered.items())
    for precision in precisions:
        if not any(precision in known for known in offered.values()):
            raise UsageError(f"no chosen target has the precision {precision!r}. There is {there_is}.")
    found = [(name, p) for name, known in offered.items() for p in dict.fromkeys(precisions) if p in known]
    for name, known in offered.items():
        if not any(target == name for target, _ in found):
            raise UsageError(f"{name} has none of the precisions {', '.join(precisions)}; it has {', '.join(known)}.")
    return found


def _offered(name: str, precisions: Sequence[str] | None) -> Sequence[str]:
    if ":" in name:  # a function of the user's own takes any
        return precisions or ("fp32",)
    if name not in TARGETS:
        raise UsageError(f"there is no export target {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name].precisions


def export_several(
    student: Student,
    examples: Examples,
    folder: str | Path,
    wanted: Sequence[Wanted],
    *,
    skip_unsupported: bool = False,
    base: Path | None = None,
    **rest: Any,
) -> Exports:
    """Each wanted artefact in its folder, verified. All are asked first whether they can be had: nothing is written
    before that is known, and UsageError names every one that cannot (``skip_unsupported``: they are left out).

    One that fails does not stop the others: why is in ``failures``. ``rest``: as ``export`` has it. ``base``: where
    exporters in the user's own files are looked up.
    """
    ready = get_ready(student, examples)
    kinds = {(target, precision): target_of(target, precision, base) for target, precision in wanted}
    cannot = {_title(*pair): why for pair, kind in kinds.items() if (why := _refusal(ready, kind, pair[1])) is not None}
    if cannot and not skip_unsupported:
        said = " ".join(f"{title}: {why.rstrip('.')}." for title, why in cannot.items())
        raise UsageError(f"{student.name!r} cannot be exported as asked. {said} Nothing was written.")
    artifacts, failures = [], {}
    for (target, precision), kind in kinds.items():
        title = _title(target, precision)
        if title in cannot:
            continue
        try:
            artifacts.append(export_ready(ready, examples, folder, kind, label_of(target), precision, **rest))
        except StillroomError as error:
            failures[title] = str(error)
        except Exception as error:  # whatever a target's library raises: the other artefacts are still wanted
            failures[title] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return Exports(tuple(artifacts), failures, cannot)


def _refusal(ready: Ready, kind: Target, precision: str) -> str | None:
    try:
        return refusal_of(ready, kind, precision)
    except StillroomError as error:  # a library that is missing
        return str(error)


def _title(target: str, precision: str) -> str:
    return f"{label_of(target)} {precision}"

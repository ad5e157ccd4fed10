"""Does a second run of the same recipe give the same student, and if not, from which step on and why?

Levels, each of which includes those below it:
R3  every trained student has the same content digest
R2  every logged loss is the same
R1  the student's headline metric lies within the first run's 95 % interval
R0  the recipe is the same
A rerun that agrees shows that the record is enough to make the student; it does not show that the record is honest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillroom.digests import file_digest
from stillroom.errors import CheckError, FolderError, UsageError
from stillroom.provenance.check import verify
from stillroom.provenance.outcome import history, loss_digest
from stillroom.provenance.passport import PASSPORT, build

LEVELS = ("R3", "R2", "R1", "R0")
MEANING = {
    "R3": "the same weights, bit for bit",
    "R2": "the same loss curve",
    "R1": "the same metric within its interval",
    "R0": "the same recipe, and nothing more",
    "none": "another recipe",
}


@dataclass(frozen=True)
class Parting:
    """Where two trainings part: the first logged step whose losses differ, and the last one before it that agrees."""

    training: str
    step: int
    after: int | None  # None: they differ from the first step on
    losses: tuple[float, float]

    def __str__(self) -> str:
        since = "from the first step on" if self.after is None else f"after step {self.after}"
        return f"{self.training}: losses differ {since}; at step {self.step} {self.losses[0]!r} and {self.losses[1]!r}"


@dataclass(frozen=True)
class Reproduction:
    """How far a second run agrees with the first. ``str()`` says it in lines; ``describe()`` is what a claim holds."""

    level: str
    original: str  # sha256 of the first run's passport.json
    partings: tuple[Parting, ...] = ()
    reasons: tuple[str, ...] = ()
    metric: str = "not compared"

    def reaches(self, level: str) -> bool:
        """Whether the two agree at ``level`` or above."""
        return self.level in LEVELS[: LEVELS.index(check_level(level)) + 1]

    def __str__(self) -> str:
        lines = [f"{self.level}: {MEANING[self.level]}. Metric: {self.metric}."]
        lines += [f"  {parting}." for parting in self.partings]
        lines += [f"  different: {reason}." for reason in self.reasons]
        if self.level != "R3" and not self.reasons:
            lines.append(
                "  Nothing that was recorded differs: the cause lies outside the record (hardware, a library)."
            )
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": list(self.reasons), "partings": [str(parting) for parting in self.partings]}


def check_level(level: str) -> str:
    """``level``, or UsageError for one that is not known."""
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is unknown: choose {', '.join(LEVELS)}.")
    return level


def reproduce(run_folder: str | Path, folder: str | Path, files: str | Path = ".", quiet: bool = True) -> Reproduction:
    """Run the recipe of ``run_folder`` again in ``folder``, in a fresh process, and compare.

    ``files``: where the recipe's own files (data, functions) are looked up. The recorded thread count and kernel
    variables are set. A killed rerun goes on where it stopped.
    Raises CheckError for a run that is not as it was sealed, and for a rerun that fails (with its last line).
    """
    original = Path(run_folder)
    broken = verify(original)
    if broken:
        raise CheckError(f"{original} is not as it was sealed, so it cannot be reproduced: {broken[0]}")
    if Path(folder).resolve() == original.resolve():
        raise FolderError(f"{folder} is the run itself. Give --folder another place.")
    command = [sys.executable, "-m", "stillroom.cli", "run", str(original / "recipe.yaml"), "--folder", str(folder)]
    command += ["--files", str(files), *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, env=_environment(original), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckError(f"the rerun of {original} ended with exit code {done.returncode}: {last}")
    return compare(original, folder)


def _environment(original: Path) -> dict[str, str]:
    """The environment of this process, with the recorded threads and kernel variables."""
    said = build(original)["environment"]
    threads = {} if said["threads"] is None else {"OMP_NUM_THREADS": str(said["threads"])}
    return {**os.environ, **threads, **said["variables"]}


def compare(original: str | Path, again: str | Path) -> Reproduction:
    """How far the run in ``again`` agrees with ``original``; both folders are read, nothing runs.

    Raises what passports raise: MissingFileError for a folder without a student, CheckError for a broken one.
    """
    first, second = build(original), build(again)
    partings = tuple(_partings(Path(original), Path(again), first))
    reasons = tuple(_differences(first, second))
    same_metric, metric = _metric(first, second)
    losses = [[loss_digest(Path(run) / part["path"]) for part in first["seeds"]] for run in (original, again)]
    digests = [{part["path"]: part["content_digest"] for part in run["seeds"]} for run in (first, second)]
    reached = {
        "R3": digests[0] == digests[1] and None not in digests[0].values(),
        "R2": first["run"]["loss_sha256"] is not None and losses[0] == losses[1],
        "R1": same_metric,
        "R0": True,
    }
    same_recipe = first["run"]["recipe_sha256_canonical"] == second["run"]["recipe_sha256_canonical"]
    level = next(name for name in LEVELS if reached[name]) if same_recipe else "none"
    return Reproduction(
        level, file_digest(Path(original) / PASSPORT), partings, () if level == "R3" else reasons, metric
    )


def _partings(original: Path, again: Path, passport: Mapping[str, Any]) -> Iterator[Parting]:
    for training in (part["path"] for part in passport["seeds"]):
        before: int | None = None
        for ours, theirs in zip(history(original / training), history(again / training), strict=False):
            if (ours["step"], ours["loss"]) != (theirs["step"], theirs["loss"]):
                yield Parting(training, max(ours["step"], theirs["step"]), before, (ours["loss"], theirs["loss"]))
                break
            before = ours["step"]


def _metric(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the second run's headline lies within the first one's interval, and both in words."""
    if first["evaluation"] is None or second["evaluation"] is None:
        return False, "not measured in both runs"
    name = first["evaluation"]["metric"]
    ours, theirs = (run["evaluation"]["rows"].get("student", {}).get(name) for run in (first, second))
    if not ours or not theirs:
        return False, f"{name} of the student is not measured in both runs"
    within = ours["low"] <= theirs["value"] <= ours["high"]
    said = f"{name} {ours['value']:.6g} ({ours['low']:.6g} to {ours['high']:.6g}), again {theirs['value']:.6g}"
    return within, said


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """What was recorded of both runs and differs, the likeliest causes of other numbers first."""
    recipes = [run["recipe"] or {} for run in (first, second)]
    for key in dict.fromkeys([*recipes[0], *recipes[1]]):
        if recipes[0].get(key) != recipes[1].get(key):
            yield f"recipe key {key!r} ({_short(recipes[0].get(key))} and {_short(recipes[1].get(key))})"
    yield from _named("seeds", first["run"]["seeds"], second["run"]["seeds"])
    here, there = first["environment"], second["environment"]
    for name in ("threads", "processor", "cpu_capability", "accelerator", "platform", "python"):
        yield from _named({"threads": "thread count"}.get(name, name), here[name], there[name])
    for title in ("packages", "variables"):
        for name in sorted({*here[title], *there[title]}):
            yield from _named(f"{title[:-1]} {name}", here[title].get(name), there[title].get(name))
    yield from _named("data order", first["run"]["order_sha256"], second["run"]["order_sha256"])
    for ours, theirs in zip(first["data"], second["data"], strict=False):
        yield from _named(f"{ours['role']} data", ours["digest"], theirs["digest"])
    for ours, theirs in zip(first["teachers"], second["teachers"], strict=False):
        yield from _named(f"weights of the teacher {ours['name']}", ours["digest"], theirs["digest"])
        yield from _named(f"recorded answers of {ours['name']}", ours["recording"], theirs["recording"])


def _named(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    if ours != theirs:
        yield f"{what} ({_short(ours)} and {_short(theirs)})"


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 60 else said[:57] + "..."

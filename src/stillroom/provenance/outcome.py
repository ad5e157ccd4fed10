"""What came of a run, for its passport: trainings, how they can be done again, environment, evaluation, exports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.digests import json_digest
from stillroom.errors import FolderError
from stillroom.files import read_json


def read_part(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of a run folder; None where it is not. Raises FolderError when it is anything else."""
    if not (folder / name).is_file():
        return None
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise FolderError(f"{folder / name} holds {type(found).__name__}, not an object. Write its stage again.")
    return found


def sources(folder: Path) -> list[str]:
    """The files of a run that a passport is read from."""
    fixed = ("recipe.yaml", "recording/manifest.json", "report/report.json", "student/student.json", "policy.json")
    fixed += ("asked.json", "report/money.json")  # of a teacher that was paid: rows set aside, and costs
    found = [name for name in fixed if (folder / name).is_file()]
    for pattern in ("seeds/*/*/student.json", "exports/*/verify.json", "alone/student.json"):
        found.extend(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    return sorted(found)


def seeds(folder: Path) -> Iterator[dict[str, Any]]:
    """Every training of the run, controls included."""
    for path in sources(folder):
        if not path.endswith("/student.json"):
            continue
        config = read_part(folder, path) or {}
        yield {
            "path": path.removesuffix("/student.json"),
            "seed": (config.get("plan") or {}).get("seed"),
            "content_digest": config.get("content_digest"),
            "teacher": (config.get("teacher") or {}).get("name"),
            "steps": config.get("steps"),
            "seconds": config.get("seconds"),
        }


def rerun(folder: Path, recipe: Mapping[str, Any] | None, student: Mapping[str, Any]) -> dict[str, Any]:
    """What a second run must share with this one."""
    said = student.get("environment") or {}
    trained = [path.removesuffix("/student.json") for path in sources(folder) if path.endswith("student/student.json")]
    configs = {place: read_part(folder, f"{place}/student.json") or {} for place in trained}
    by_seed = sorted(trained, key=lambda place: _seed(configs[place]) or 0)
    used = [seed for place in by_seed if (seed := _seed(configs[place])) is not None]
    return {
        "recipe_sha256_canonical": None,  # of the recipe as the passport says it: filled there
        "seeds": list((recipe or {}).get("seeds") or used),
        "threads": said.get("threads"),
        "deterministic": said.get("deterministic"),
        "order_sha256": _all(configs[place].get("order_sha256") for place in by_seed),
        "loss_sha256": _all(loss_digest(folder / place) for place in by_seed),
        "level": None,  # how far a second run agreed is a later claim (claims.jsonl), not the run's own word
    }


def loss_digest(training: Path) -> str | None:
    """sha256 of the logged loss curve of a training's folder: canonical JSON of its [step, loss]; None without one."""
    rows = history(training)
    return json_digest([[row["step"], row["loss"]] for row in rows]) if rows else None


def history(training: Path) -> list[dict[str, Any]]:
    """The logged steps of a training, as fit wrote them. Raises FolderError for lines that are not JSON."""
    path = training / "history.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError:
        raise FolderError(f"{path} is damaged. Train again.") from None


def _seed(config: Mapping[str, Any]) -> int | None:
    return (config.get("plan") or {}).get("seed")


def _all(found: Iterable[str | None]) -> list[str] | None:
    values = list(found)
    return [value for value in values if value] if values and all(values) else None


def environment(said: Mapping[str, Any]) -> dict[str, Any]:
    """Where the student was trained, as student.json says."""
    names = ("python", "platform", "processor", "cpu_capability")
    return {
        **{name: said.get(name) or "unknown" for name in names},
        "packages": said.get("packages") or {},
        "threads": said.get("threads"),
        "accelerator": said.get("accelerator"),
        "variables": said.get("variables") or {},
        **{name: said.get(name) for name in ("lock_sha256", "git", "dirty_sha256")},
    }


def evaluation(report: Mapping[str, Any]) -> dict[str, Any]:
    """The scoreboard of report.json, without its figures."""
    rows = {
        row: {
            name: cell and {part: cell.get(part) for part in ("value", "low", "high")} for name, cell in cells.items()
        }
        for row, cells in (report.get("rows") or {}).items()
    }
    names = ("better", "worse", "metric", "difference", "low", "high", "seeds")
    comparisons = [{"seeds": 1, **{n: pair[n] for n in names if n in pair}} for pair in report.get("comparisons") or ()]
    return {
        "metric": report.get("metric", "unknown"),
        "examples": report.get("examples"),
        "rows": rows,
        "comparisons": comparisons,
        "diagnosis": list(report.get("diagnosis") or ()),
    }


def exports(folder: Path) -> Iterator[dict[str, Any]]:
    """The shipped files as their verify.json say."""
    for path in sorted(folder.glob("exports/*/verify.json")):
        said = read_part(folder, path.relative_to(folder).as_posix()) or {}
        file = (path.parent / str(said.get("file"))).relative_to(folder).as_posix()
        quality = said.get("quality")
        names = ("target", "precision", "sha256", "bytes", "passed")
        yield {
            **{name: said.get(name) for name in names},
            "path": file,
            **{name: said.get(name) for name in ("examples", "largest_difference", "agreement")},
            "quality": quality and {n: quality.get(n) for n in ("metric", "value", "low", "high", "student")},
            "mean_difference": said.get("mean_difference"),
            "latency_seconds": (said.get("latency") or {}).get("median_seconds"),
            "memory_bytes": (said.get("memory") or {}).get("peak_bytes"),
            "quantisation": (said.get("quantisation") or {}).get("method"),
            "versions": said.get("versions"),
        }

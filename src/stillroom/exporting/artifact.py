"""Artifact: the shipped file, run by its own runtime, answering like any other model. It never asks the student."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom import settings
from stillroom.digests import file_digest
from stillroom.errors import FolderError, ParityError
from stillroom.files import read_json, write_json
from stillroom.network import Adapter, Answers
from stillroom.students.networks import WEIGHTS, Student
from stillroom.types import Batch, Column, Dense, Identity, Signal

ARTIFACT = "artifact.json"
VERIFY = "verify.json"
Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors], Tensor]  # the file in its runtime: the network's input tensors to its one output, on the CPU


@dataclass(frozen=True)
class Written:
    """What an exporter returns: what it wrote, how to open it again, and what verify.json shall say of it."""

    path: Path  # a file, or a folder that holds model.safetensors
    # a module-level function: artifact.json keeps its name; None where the runtime is not of this kind of machine
    open: Callable[[Path], Run] | None
    # plain JSON; "versions", of the libraries that wrote it and run it, is demanded (``versions_of``)
    notes: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[Path, ...] = ()  # further files of the same folder that ``open`` reads (a tokenizer)
    main: str = WEIGHTS  # of a folder: the file that is the model


def versions_of(*packages: str) -> dict[str, str]:
    """The installed versions of distributions: what ``Written.notes["versions"]`` holds."""
    return {name: importlib.metadata.version(name) for name in packages}


# (student in eval mode on the CPU, some input tensors, calibration input tensors, path without suffix, precision)
Exporter = Callable[[Student, Tensors, Iterable[Tensors], Path, str], Written]


def _takes_all(student: Student, tensors: Tensors, precision: str) -> str | None:
    return None


@dataclass(frozen=True)
class Target:
    """A place where students ship to, by name in ``stage.TARGETS``."""

    write: Exporter
    precisions: tuple[str, ...]
    # asked before any work: what of (student, some input tensors, precision) it cannot take, with the alternative
    unsupported: Callable[[Student, Tensors, str], str | None] = _takes_all
    modules: tuple[str, ...] = ()  # of its runtime: imported before the memory of an answer is counted
    keeps_rounding: bool = False  # ships the integers and scales of a student that was trained in int8 or int4
    unproven: str | None = None  # why its runtime cannot be asked here: converted, never called model.*


@dataclass(frozen=True, eq=False)
class Artifact:
    """A verified file that answers through the runtime it ships in. Features are not shipped: logits or values only."""

    folder: Path
    path: Path
    target: str
    precision: str
    verify: Mapping[str, Any]  # the content of verify.json
    adapter: Adapter = field(repr=False)
    run: Run = field(repr=False)
    answers: Answers = "logits"
    classes: tuple[str, ...] | None = None
    name: str = "student"

    def __call__(self, batch: Batch) -> Signal:
        output = self.run(self.adapter(batch.inputs))
        return Signal(values=output) if self.answers == "values" else Signal(logits=Dense(output))

    def predict(self, inputs: Mapping[str, Column] | Batch) -> Signal:
        """Answer new inputs: raw columns, as in the training data."""
        if isinstance(inputs, Batch):
            return self(inputs)
        columns = {name: column if isinstance(column, Tensor) else tuple(column) for name, column in inputs.items()}
        rows = len(next(iter(columns.values()))) if columns else 0
        return self(Batch(ids=tuple(str(row) for row in range(rows)), inputs=columns))

    @property
    def bytes(self) -> int:
        """The size of the file, or of the artefact's files together."""
        return int(self.verify["bytes"])

    @property
    def identity(self) -> Identity:
        """Its name, and the digest of the file (not of the weights, which have another form)."""
        return Identity(
            f"{self.name}, {self.target} {self.precision}",
            self.verify.get("sha256"),
            kind="artifact",
            classes=self.classes,
        )


def write_config(folder: Path, student: Student, target: str, precision: str, written: Written) -> None:
    """artifact.json: how the file is opened, and how raw columns become its inputs."""
    opener = None if written.open is None else settings.name_of(written.open)
    config = {
        "format": "stillroom-artifact/1",
        "name": student.name,
        "target": target,
        "precision": precision,
        "open": opener,
        "adapter": settings.describe(student.adapter),
        "answers": student.answers,
        "classes": list(student.classes) if student.classes else None,
        "inputs": written.notes.get("inputs"),
    }
    write_json(folder / ARTIFACT, config)


def load_artifact(folder: str | Path, base: Path | None = None) -> Artifact:
    """The verified artefact of a folder written by ``export``; a user's own file is looked up from ``base``.

    Raises ParityError when it did not pass verification, FolderError when the file is not the one that passed.
    """
    folder = Path(folder)
    verify = read_json(folder / VERIFY)
    if verify.get("unproven"):
        raise ParityError(f"the artefact in {folder} cannot be run here: {verify['unproven']}.")
    if verify.get("passed") is not True:
        raise ParityError(f"the artefact in {folder} did not pass its verification (see {VERIFY}). Export it again.")
    config = read_json(folder / ARTIFACT)
    path = folder / Path(verify["file"]).parts[0]
    for name, digest in verify.get("files", {verify["file"]: verify["sha256"]}).items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise FolderError(f"{file} is not the file that was verified (sha256 {digest}). Export it again.")
    return Artifact(
        folder,
        path,
        config["target"],
        config["precision"],
        verify,
        adapter=settings.rebuild(config["adapter"], base),
        run=settings.resolve(config["open"], base)(path),
        answers=config["answers"],
        classes=tuple(config["classes"]) if config["classes"] else None,
        name=config["name"],
    )


def describe_files(written: Written, name: str) -> dict[str, Any]:
    """What verify.json says of what was written and is to be called ``name``: file, sha256, and the bytes of all.

    Of a folder ``file`` is its weights. Where there are several files, ``files`` has the digest of each.
    """
    path = written.path
    if path.is_file():
        main, found = f"{name}{path.suffix}", {f"{name}{path.suffix}": path}
    else:
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        place = f"{name}{path.suffix}"
        main = f"{place}/{written.main}"
        found = {f"{place}/{file.relative_to(path).as_posix()}": file for file in inside}
    found |= {file.name: file for file in written.beside}
    digests = {key: file_digest(file) for key, file in found.items()}
    size = sum(file.stat().st_size for file in found.values())
    return {"file": main, "sha256": digests[main], "bytes": size, **({"files": digests} if len(found) > 1 else {})}


def output_of(signal: Signal, answers: Answers) -> Tensor:
    """The one tensor that is shipped: the logits [..., V], or the values [..., D]; float32 on the CPU."""
    if answers == "values":
        output = signal.need_values("export")
    else:
        logits = signal.need_logits("export")
        if isinstance(logits, Dense):
            output = logits.values
        elif hasattr(logits, "compute"):
            output = logits.compute()  # type: ignore[union-attr]
        else:
            raise TypeError("a student does not answer with Sparse logits")
    return output.detach().to("cpu", torch.float32)

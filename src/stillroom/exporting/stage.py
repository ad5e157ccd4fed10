"""export(): write the student for a target, open it in that target's runtime, and let nothing pass that differs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.errors import ParityError, UsageError
from stillroom.exporting.artifact import (
    ARTIFACT,
    VERIFY,
    Artifact,
    Target,
    Tensors,
    Written,
    describe_files,
    write_config,
)
from stillroom.exporting.language import next_tokens
from stillroom.exporting.language.next_tokens import batch_effect_of, compare_next_tokens, speed
from stillroom.exporting.language.texts import compare_token_ids
from stillroom.exporting.memory import peak_memory
from stillroom.exporting.targets import label_of, target_of
from stillroom.exporting.verify import SINGLES, TOLERANCES, TRAINED, Tolerance, batch_effect, compare, times
from stillroom.files import write_json
from stillroom.progress import Step, bar
from stillroom.students.networks import Student
from stillroom.students.quantised import unrounded
from stillroom.types import Examples, Metric, check_batch_of

NAMES = ("model", "failed", "unproven")  # of what an export leaves
CALIBRATION_ROWS = 256
CALIBRATION_BATCH = 32
CALIBRATION_TEXTS = 16
TRACED_ROWS = 4
ANEW = "trained in int8; this target rounds the float values of those integers by its own rules"


def export(
    student: Student,
    examples: Examples,
    folder: str | Path,
    target: str = "onnx",
    precision: str = "fp32",
    *,
    calibration: Examples | None = None,
    tolerance: Tolerance | None = None,
    metric: Metric | None = None,
    progress: bool = True,
    measure_memory: bool = True,
) -> Artifact:
    """The student as a file that needs no stillroom, verified on all of ``examples``.

    Writes folder/TARGET-PRECISION/: the model, artifact.json and verify.json. The student is not changed.
    ``calibration``: inputs that fix the ranges of int8, training inputs for choice; ``examples`` where there are none
    (at most 256 rows, spread evenly). ``metric``: the task's quality; accuracy for logits, R2 for values by default.
    ``measure_memory``: of one answer, in a process of its own (seconds). Several at once: ``export_several``.

    Raises UsageError for an unknown target or precision and for a network that the target cannot take; ParityError,
    naming the worst examples, when the file is further from the student than ``tolerance`` (by precision: TOLERANCES).
    The file is then kept as failed.*, never as model.*, and verify.json says passed: false.
    """
    kind = target_of(target, precision)
    ready = get_ready(student, examples)
    refusal = refusal_of(ready, kind, precision)
    if refusal is not None:
        raise UsageError(f"{label_of(target)} {precision} cannot take the network of {student.name!r}: {refusal}")
    return export_ready(
        ready,
        examples,
        folder,
        kind,
        label_of(target),
        precision,
        calibration=calibration,
        tolerance=tolerance,
        metric=metric,
        progress=progress,
        measure_memory=measure_memory,
    )


@dataclass(frozen=True)
class Ready:
    """The student as it is exported and compared (a copy on the CPU, in evaluation mode), and inputs to trace it by."""

    student: Student
    tensors: Tensors  # a few rows
    one: Tensors  # one row


def get_ready(student: Student, examples: Examples) -> Ready:
    """What every target is given. Raises DataError where there are no examples."""
    count = check_batch_of(examples)
    plain = _on_cpu(student)
    tensors = tuple(_two(t) for t in plain.adapter(examples.batch(range(min(count, TRACED_ROWS)), None).inputs))
    return Ready(plain, tensors, plain.adapter(examples.batch([0], None).inputs))


def refusal_of(ready: Ready, kind: Target, precision: str) -> str | None:
    """What of the network the target cannot take, with the alternative. Raises MissingExtraError: its library."""
    return _other_rounding(ready.student, kind, precision) or kind.unsupported(ready.student, ready.tensors, precision)


def _other_rounding(student: Student, kind: Target, precision: str) -> str | None:
    """Why a student that computes in integers cannot ship so."""
    if student.rounding is None:
        return None
    trained = student.rounding.precision
    if trained == precision or (kind.keeps_rounding and kind.precisions == (precision,)):
        return None
    where = "" if trained in kind.precisions else ", which this target has not. Choose onnx, or the float student"
    return f"it was trained in {trained}{where or ': choose that'}"


def export_ready(
    ready: Ready,
    examples: Examples,
    folder: str | Path,
    kind: Target,
    label: str,
    precision: str,
    *,
    calibration: Examples | None = None,
    tolerance: Tolerance | None = None,
    metric: Metric | None = None,
    progress: bool = True,
    measure_memory: bool = True,
) -> Artifact:
    """``export`` of a student that the target is known to take."""
    plain, place = ready.student, Path(folder) / f"{label}-{precision}"
    speaks = plain.answers == "next_token"
    if speaks and metric is not None:
        raise UsageError("a language model's artefact is measured in bits per byte. Leave metric out.")
    _remove(place.glob("unverified*"))
    with bar(f"export {label} {precision}", 0 if speaks else len(examples) + 1, shown=progress) as step:
        inputs = _inputs(plain, examples if calibration is None else calibration)
        anew = plain.rounding is not None and not kind.keeps_rounding
        written = kind.write(
            unrounded(plain) if anew else plain, ready.tensors, inputs, place / "unverified", precision
        )
        _check_versions(written, label)
        if kind.unproven is not None:
            return _settle_unproven(plain, place, label, precision, written, kind.unproven)
        if tolerance is None:
            known = next_tokens.TOLERANCES if speaks else TOLERANCES if plain.rounding is None or anew else TRAINED
            tolerance = known.get(precision, known["int8"])
        step(1)
        artifact = _open(plain, place, label, precision, written)
        if speaks:
            said, problems = _language(plain, artifact, examples, tolerance, step)
        else:
            said, problems = _answers(plain, artifact, examples, metric, tolerance, step)
        memory = peak_memory(artifact.run, written, ready.one, kind.modules) if measure_memory else None
    verify = {
        "format": "stillroom-verify/1",
        "target": label,
        "precision": precision,
        **describe_files(written, "failed" if problems else "model"),
        **said,
        "memory": memory,
        "passed": not problems,
        **({"quantisation": {"method": "static, anew", "why": ANEW}} if anew else {}),
        **written.notes,
    }
    return _settle(artifact, plain, written, verify, problems)


def _check_versions(written: Written, label: str) -> None:
    """A number without the versions that it was measured with cannot be had again."""
    versions = written.notes.get("versions")
    if not isinstance(versions, Mapping) or not versions:
        raise UsageError(
            f"the exporter {label!r} does not say which versions it wrote and runs with. Return "
            "Written(path, open, notes={'versions': versions_of('onnx', 'onnxruntime')})."
        )


Said = tuple[dict[str, Any], list[str]]  # what verify.json says, and sentences about what is beyond the tolerance


def _answers(
    student: Student, artifact: Artifact, examples: Examples, metric: Metric | None, tolerance: Tolerance, step: Step
) -> Said:
    """Logits or values of all examples, one by one and in a batch, and their latency."""
    said, problems = compare(student, artifact, examples, metric, tolerance, step)
    singles = [examples.batch([index], None) for index in range(min(len(examples), SINGLES))]
    effect = batch_effect(artifact, examples, singles)
    return {**said, "batch_effect": effect, "latency": times(artifact, student.adapter, singles)}, problems


def _language(student: Student, artifact: Artifact, examples: Examples, tolerance: Tolerance, step: Step) -> Said:
    """Next tokens of real rows, the ids of real texts, and the speed."""
    said, problems = compare_next_tokens(student, artifact, examples, tolerance, step)
    tokenizer, different = compare_token_ids(student, artifact, examples)
    effect = batch_effect_of(artifact, examples)
    return {**said, **tokenizer, "batch_effect": effect, "latency": speed(artifact, examples)}, [*problems, *different]


def _settle(
    artifact: Artifact, student: Student, written: Written, verify: Mapping[str, Any], problems: list[str]
) -> Artifact:
    """Give the file its name, after whatever an earlier export left is gone: a model.* has always passed."""
    place = artifact.folder
    _remove([*(old for name in NAMES for old in place.glob(f"{name}*")), place / VERIFY, place / ARTIFACT])
    path = place / Path(verify["file"]).parts[0]
    if problems:
        os.replace(written.path, path)
        write_json(place / VERIFY, verify)
        raise ParityError(
            f"the {artifact.target} {artifact.precision} artefact of {student.name!r} is not its student: "
            f"{'. '.join(problems)}. The file is kept as {path.name}. Choose another precision, calibrate on "
            "training inputs, or pass a tolerance."
        )
    write_config(place, student, artifact.target, artifact.precision, written)
    os.replace(written.path, path)
    write_json(place / VERIFY, verify)
    return dataclasses.replace(artifact, path=path, verify=verify)


def _settle_unproven(student: Student, place: Path, label: str, precision: str, written: Written, why: str) -> Artifact:
    """What nothing here can run is kept as unproven.*: its sizes and versions are said, and no answer of it."""
    verify = {
        "format": "stillroom-verify/1",
        "target": label,
        "precision": precision,
        **describe_files(written, "unproven"),
        "passed": None,
        "unproven": why,
        **written.notes,
    }
    artifact = _open(student, place, label, precision, written)
    return _settle(artifact, student, written, verify, [])


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _on_cpu(student: Student) -> Student:
    """The student that is exported and compared: its own copy, on the CPU, in evaluation mode, at least float32."""
    net: Any = student.copy().net.cpu().eval()
    if hasattr(net, "merge_and_unload"):  # what is shipped has its LoRA adapters inside
        net = net.merge_and_unload()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()):
        net = net.float()
    return dataclasses.replace(student, net=net, features=())


def _inputs(student: Student, examples: Examples) -> Iterator[Tensors]:
    """The calibration inputs, in batches: evenly spread, so that sorted data shows all its classes."""
    count = len(examples)
    # a row of a language model has an answer for each of its tokens, as large as its vocabulary
    most, size = (CALIBRATION_TEXTS, 1) if student.answers == "next_token" else (CALIBRATION_ROWS, CALIBRATION_BATCH)
    rows = [index * count // min(count, most) for index in range(min(count, most))]
    for start in range(0, len(rows), size):
        yield student.adapter(examples.batch(rows[start : start + size], None).inputs)


def _two(tensor: torch.Tensor) -> torch.Tensor:
    """At least two rows: torch.export takes a batch of one for a constant."""
    return tensor if len(tensor) > 1 else torch.cat([tensor, tensor])


def _closed(tensors: Tensors) -> torch.Tensor:
    raise ParityError("this artefact's runtime is not of this kind of machine.")


def _open(student: Student, place: Path, target: str, precision: str, written: Written) -> Artifact:
    return Artifact(
        place,
        written.path,
        target,
        precision,
        verify={},
        adapter=student.adapter,
        run=_closed if written.open is None else written.open(written.path),
        answers=student.answers,
        classes=student.classes,
        name=student.name,
    )

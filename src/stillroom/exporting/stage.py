"""export(): write the student for a target, open it in that target's runtime, and let nothing pass that differs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stillroom import settings
from stillroom.errors import ParityError, UsageError, nearest
from stillroom.exporting.artifact import (
    ARTIFACT,
    VERIFY,
    Artifact,
    Exporter,
    Target,
    Tensors,
    Written,
    describe_files,
    write_config,
)
from stillroom.exporting.c import source as c
from stillroom.exporting.gguf import writing as gguf
from stillroom.exporting.language import huggingface, next_tokens
from stillroom.exporting.language.next_tokens import batch_effect_of, compare_next_tokens, speed
from stillroom.exporting.language.texts import compare_token_ids
from stillroom.exporting.onnx import graph as onnx
from stillroom.exporting.verify import SINGLES, TOLERANCES, Tolerance, batch_effect, compare, times
from stillroom.files import write_json
from stillroom.progress import Step, bar
from stillroom.students.networks import Student
from stillroom.types import Examples, Metric, check_batch_of

# An exporter is one function; a user's own is named 'my_file.py:my_exporter' or put in here.
TARGETS: dict[str, Target] = {
    "onnx": Target(onnx.write, onnx.PRECISIONS),
    "c": Target(c.write, c.PRECISIONS, c.unsupported),
    "gguf": Target(gguf.write, gguf.PRECISIONS),
    "huggingface": Target(huggingface.write, huggingface.PRECISIONS),
}
CALIBRATION_ROWS = 256
CALIBRATION_BATCH = 32
CALIBRATION_TEXTS = 16
TRACED_ROWS = 4


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
) -> Artifact:
    """The student as a file that needs no stillroom, verified on all of ``examples``.

    Writes folder/TARGET-PRECISION/: the model, artifact.json and verify.json. The student is not changed.
    ``calibration``: inputs that fix the ranges of int8, training inputs for choice; ``examples`` where there are none
    (at most 256 rows, spread evenly). ``metric``: the task's quality; accuracy for logits, R2 for values by default.

    Raises UsageError for an unknown target or precision and for a network that the target cannot take; ParityError,
    naming the worst examples, when the file is further from the student than ``tolerance`` (by precision: TOLERANCES).
    The file is then kept as failed.*, never as model.*, and verify.json says passed: false.
    """
    kind = target_of(target, precision)
    label = target.rpartition(":")[2]
    place = Path(folder) / f"{label}-{precision}"
    count = check_batch_of(examples)
    plain = _on_cpu(student)
    speaks = plain.answers == "next_token"
    if speaks and metric is not None:
        raise UsageError("a language model's artefact is measured in bits per byte. Leave metric out.")
    _remove(place.glob("unverified*"))
    with bar(f"export {label} {precision}", 0 if speaks else count + 1, shown=progress) as step:
        tensors = tuple(_two(t) for t in plain.adapter(examples.batch(range(min(count, TRACED_ROWS)), None).inputs))
        refusal = kind.unsupported(plain, tensors, precision)
        if refusal is not None:
            raise UsageError(f"{label} {precision} cannot take the network of {plain.name!r}: {refusal}")
        written = kind.write(plain, tensors, _inputs(plain, calibration or examples), place / "unverified", precision)
        if tolerance is None:
            known = next_tokens.TOLERANCES if speaks else TOLERANCES
            tolerance = known.get(precision, known["int8"])
        step(1)
        artifact = _open(plain, place, label, precision, written)
        if speaks:
            said, problems = _language(plain, artifact, examples, tolerance, step)
        else:
            said, problems = _answers(plain, artifact, examples, metric, tolerance, step)
    verify = {
        "format": "stillroom-verify/1",
        "target": label,
        "precision": precision,
        **describe_files(written, "failed" if problems else "model"),
        **said,
        "passed": not problems,
        **written.notes,
    }
    return _settle(artifact, plain, written, verify, problems)


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
    _remove([*place.glob("model*"), *place.glob("failed*"), place / VERIFY, place / ARTIFACT])
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


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def target_of(target: str, precision: str) -> Target:
    """The target of a name, or a user's own exporter, of any precision. Raises UsageError with what there is."""
    if target in TARGETS:
        known = TARGETS[target].precisions
        if precision not in known:
            raise UsageError(f"{target} has no precision {precision!r}{nearest(precision, known)}")
        return TARGETS[target]
    if ":" in target:
        write: Exporter = settings.resolve(target)
        return Target(write, (precision,))
    raise UsageError(f"there is no export target {target!r}{nearest(target, TARGETS)}")


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


def _open(student: Student, place: Path, target: str, precision: str, written: Written) -> Artifact:
    return Artifact(
        place,
        written.path,
        target,
        precision,
        verify={},
        adapter=student.adapter,
        run=written.open(written.path),
        answers=student.answers,
        classes=student.classes,
        name=student.name,
    )

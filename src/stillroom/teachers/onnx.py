"""An ONNX file as a teacher: a black box that can only be asked. ONNX Runtime is imported only here, for teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import file_digest, json_digest
from stillroom.errors import DataError, ShapeError, SignalError, UsageError, missing_extra, nearest
from stillroom.places import locate_file
from stillroom.types import Batch, Dense, Identity, Signal

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise missing_extra(error.name or "onnxruntime", "onnx") from error

Gives = Literal["logits", "probabilities", "values"]
ABOUT = ("name", "licence", "source", "route", "revision")
SUM = 1e-3  # how far the probabilities of a row may be from summing to 1: float16 files round
# shapes and indices are int64: what is learned is a floating type, or 8 bits of one
LEARNED = {
    onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8")
}
DTYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """An input of the file: its name there, the column that feeds it, its type and the sizes after the batch's."""

    name: str
    column: str
    type: str
    sizes: tuple[int | None, ...]  # None: any


@dataclass(frozen=True)
class Choice:
    """Which of the file's classes are answered, and whether a last class gathers the mass of all others."""

    kept: tuple[int, ...]
    others: tuple[int, ...]
    gathered: bool


@dataclass(frozen=True, eq=False)
class OnnxTeacher:
    """A file that answers, a Model. Make one with ``from_onnx``."""

    session: Any
    inputs: tuple[Input, ...]
    output: str
    gives: Gives
    identity: Identity
    choice: Choice | None = None
    rows: int = 64  # asked together
    fixed: bool = False  # the file takes exactly so many: the last ones are filled up, and cut off again
    bytes: int | None = None  # of the file and its weights beside it
    parameters_count: int | None = None

    def __call__(self, batch: Batch) -> Signal:
        feed = {given.name: _array(given, batch) for given in self.inputs}
        parts = [
            self._ask({name: array[at : at + self.rows] for name, array in feed.items()})
            for at in range(0, len(batch), self.rows)
        ]
        if not parts:
            raise DataError("there is nothing to answer (0 rows).")
        found = torch.cat(parts)
        finite = found.isfinite() if self.gives != "logits" else ~found.isnan() & (found != float("inf"))
        _refuse_rows(~finite, batch, f"{self.identity.name} answers with NaN or infinity")
        if self.gives == "values":
            return Signal(values=found)
        return Signal(logits=Dense(self._chosen(self._log_probabilities(found, batch))))

    def _ask(self, feed: Mapping[str, np.ndarray]) -> Tensor:
        count = len(next(iter(feed.values())))
        if self.fixed and count < self.rows:
            feed = {n: np.concatenate([a, np.repeat(a[-1:], self.rows - count, axis=0)]) for n, a in feed.items()}
        (said,) = self.session.run([self.output], dict(feed))
        if said.ndim < 2 or len(said) != (self.rows if self.fixed else count):
            raise ShapeError(
                f"output {self.output!r} has shape {list(said.shape)} for {count} examples; a teacher's is "
                "[examples, ..., classes or values]. Name another output."
            )
        return torch.from_numpy(said[:count]).float()

    def _log_probabilities(self, found: Tensor, batch: Batch) -> Tensor:
        """Logits as they are; of probabilities the logarithm (-inf where one is 0)."""
        sums = (found.sum(-1) - 1).abs() < SUM
        looks_like_probabilities = sums & (found >= 0).all(-1)
        if self.gives == "probabilities":
            what = f"output {self.output!r} of {self.identity.name} is no distribution"
            _refuse_rows(~looks_like_probabilities, batch, what, "Declare gives: logits, or values.")
            return found.log()
        if bool(looks_like_probabilities.all()):
            raise SignalError(
                f"output {self.output!r} of {self.identity.name} sums to 1 in every row: these are probabilities, "
                "and as logits they would teach an almost even distribution. Declare gives: probabilities."
            )
        return found

    def _chosen(self, logits: Tensor) -> Tensor:
        if self.choice is None:
            return logits
        logs = logits.log_softmax(-1)
        kept = logs[..., list(self.choice.kept)]
        if not self.choice.gathered:
            return kept
        return torch.cat([kept, logs[..., list(self.choice.others)].logsumexp(-1, keepdim=True)], -1)


def from_onnx(
    model: str | Path,
    *,
    gives: Gives,
    inputs: Mapping[str, str] | None = None,
    output: str | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    others: str | None = None,
    rows: int = 64,
    threads: int = 1,
    folder: Path | None = None,
    **about: Any,
) -> OnnxTeacher:
    """A teacher from an ONNX file: a path (looked up from ``folder``), or 'package:NAME/inner/file.onnx'.

    ``gives``: what its output is: logits, probabilities or values; it must be said, since no file says it.
    ``inputs``: the column that feeds each input of the file, {input: column}; by default the column of the same name.
    A column of texts feeds an input of strings. ``output``: which output, where the file has several.
    ``classes``: the order of the file's outputs. ``only``: the classes to answer, in this order; the mass of all others
    goes into a last class named ``others``, or without that name is left out (the rest is renormalised).
    ``rows``: asked together; a file of a fixed batch size is given that. ``threads``: of its session, its own.
    ``about``: name, licence, source, route, revision, as in Identity.

    Its identity is the sha256 of the file, with the files that hold its weights where they lie beside it.
    Raises UsageError for settings that do not fit the file; asking raises DataError, ShapeError or SignalError for
    columns and answers that do not.
    """
    if gives not in get_args(Gives):
        raise UsageError(f"gives is {gives!r}{nearest(str(gives), get_args(Gives))}")
    if unknown := sorted(set(about) - set(ABOUT)):
        raise UsageError(f"from_onnx has no setting {unknown[0]!r}{nearest(unknown[0], ABOUT)}")
    if rows < 1 or threads < 1:
        raise UsageError(f"rows={rows} and threads={threads} must be 1 or more.")
    if gives == "values" and (only is not None or others is not None):
        raise UsageError("only and others choose classes; a file that gives values has none.")
    path, place = locate_file(model, folder)
    session = _open(path, threads)
    found = {each.name: each for each in session.get_inputs()}
    named = _named(inputs or {name: name for name in found}, found, path)
    fixed = [each.shape[0] for each in found.values() if each.shape and isinstance(each.shape[0], int)]
    choice, order = _choose(tuple(classes) if classes else None, only, others, session, output)
    known = {"name": path.stem, "source": place.source, "licence": place.licence, **about}
    beside, parameters = _weights(onnx.load(str(path), load_external_data=False).graph)
    files = [path, *(path.parent / name for name in sorted(beside))]
    return OnnxTeacher(
        session,
        inputs=named,
        output=_output_of(session, output),
        gives=gives,
        identity=Identity(digest=_digest(files), kind="onnx", classes=order, **known),
        choice=choice,
        rows=fixed[0] if fixed else rows,
        fixed=bool(fixed),
        bytes=sum(each.stat().st_size for each in files),
        parameters_count=parameters,
    )


def _open(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types of its own: all mean that it cannot run this file
        raise UsageError(f"ONNX Runtime cannot open {path.name}: {' '.join(str(error).split())[:300]}") from None


def _named(wanted: Mapping[str, str], found: Mapping[str, Any], path: Path) -> tuple[Input, ...]:
    for name in wanted:
        if name not in found:
            raise UsageError(f"{path.name} has no input {name!r}{nearest(name, found)}")
    if missing := [name for name in found if name not in wanted]:
        raise UsageError(
            f"no column feeds input {missing[0]!r} of {path.name}: write inputs: {{{missing[0]}: COLUMN}}."
        )
    for each in found.values():
        if each.type not in DTYPES and each.type != "tensor(string)":
            raise UsageError(f"input {each.name!r} of {path.name} is {each.type}; columns are numbers or texts.")
    return tuple(
        Input(name, wanted[name], each.type, tuple(s if isinstance(s, int) else None for s in each.shape[1:]))
        for name, each in found.items()
    )


def _output_of(session: Any, output: str | None) -> str:
    names = [each.name for each in session.get_outputs()]
    if output is None and len(names) > 1:
        raise UsageError(f"the file has {len(names)} outputs: name one of {', '.join(names)} (output: NAME).")
    if output is not None and output not in names:
        raise UsageError(f"the file has no output {output!r}{nearest(output, names)}")
    return output or names[0]


def _choose(
    classes: tuple[str, ...] | None,
    only: Sequence[str] | None,
    others: str | None,
    session: Any,
    output: str | None,
) -> tuple[Choice | None, tuple[str, ...] | None]:
    """Which outputs are answered, and the order of classes that results."""
    name = _output_of(session, output)
    size = next(each.shape[-1] for each in session.get_outputs() if each.name == name and each.shape)
    if classes is not None and isinstance(size, int) and size != len(classes):
        raise UsageError(f"{len(classes)} classes are named, but output {name!r} has {size}.")
    if only is None:
        if others is not None:
            raise UsageError(f"others={others!r} gathers what only: [...] leaves; name those that are kept.")
        return None, classes
    if classes is None:
        raise UsageError("only: [...] chooses by name; give the file's own classes: [...] too.")
    for wanted in only:
        if wanted not in classes:
            raise UsageError(f"the file has no class {wanted!r}{nearest(wanted, classes)}")
    if others in only:
        raise UsageError(f"others={others!r} is a class that is kept; give the gathered rest a name of its own.")
    kept = tuple(classes.index(wanted) for wanted in only)
    left = tuple(place for place in range(len(classes)) if place not in kept)
    gathered = others is not None and bool(left)
    return Choice(kept, left, gathered), (*only, others) if gathered and others else tuple(only)


def _array(given: Input, batch: Batch) -> np.ndarray:
    """The column as the file takes it. A conversion that would change a value is refused."""
    if given.column not in batch.inputs:
        raise DataError(f"there is no column {given.column!r}{nearest(given.column, batch.inputs)}")
    column = batch.inputs[given.column]
    if (given.type == "tensor(string)") == isinstance(column, Tensor):
        held = "numbers" if isinstance(column, Tensor) else "texts"
        raise DataError(f"column {given.column!r} holds {held}; input {given.name!r} takes {given.type}.")
    if not isinstance(column, Tensor):
        texts = np.array(column, dtype=object)
        return texts.reshape(-1, *[1] * len(given.sizes))
    raw = column.detach().cpu().numpy()
    if raw.ndim != 1 + len(given.sizes) or any(
        w not in (None, s) for w, s in zip(given.sizes, raw.shape[1:], strict=True)
    ):
        raise ShapeError(
            f"column {given.column!r} has rows of {list(raw.shape[1:])}; input {given.name!r} takes "
            f"{['any' if size is None else size for size in given.sizes]}."
        )
    kind = DTYPES[given.type]
    cast = raw.astype(kind)
    if not np.issubdtype(kind, np.floating) and not np.array_equal(cast, raw):
        _refuse_rows(
            torch.from_numpy((cast != raw).reshape(len(raw), -1).any(1)),
            batch,
            f"column {given.column!r} holds what {np.dtype(kind)} cannot: input {given.name!r} would see other numbers",
        )
    return cast


def _refuse_rows(wrong: Tensor, batch: Batch, what: str, remedy: str = "") -> None:
    rows = wrong.reshape(len(batch), -1).any(1)
    if bool(rows.any()):
        first = batch.ids[int(rows.nonzero()[0])]
        raise SignalError(f"{what} for example {first!r} ({int(rows.sum())} of {len(batch)} rows). {remedy}".strip())


def _digest(files: Sequence[Path]) -> str:
    """sha256 of the file; where its weights lie in files beside it, of the digests of all."""
    if len(files) == 1:
        return file_digest(files[0])
    return json_digest({path.name: file_digest(path) for path in files})


def _weights(graph: Any) -> tuple[set[str], int]:
    """The files beside it that hold tensors of the graph, or of a graph inside it; and how many numbers it learned."""
    tensors, inner = list(graph.initializer), list[Any]()
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        tensors += [attribute.t, *attribute.tensors]
        inner += [attribute.g] if attribute.HasField("g") else []
        inner += attribute.graphs
    external = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    files = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    learned = sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type in LEARNED)
    for found, count in map(_weights, inner):
        files, learned = files | found, learned + count
    return files, learned

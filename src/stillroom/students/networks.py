"""Student: an ordinary network with the adapter from raw columns to its inputs, and how to rebuild it from a folder."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stillroom import settings
from stillroom.digests import file_digest, state_digest
from stillroom.errors import FolderError, MissingFileError, UsageError
from stillroom.files import read_json, write_bytes, write_json
from stillroom.language import describe_tokenizer, is_causal, load_causal, write_folder
from stillroom.network import Adapter, Answers, Columns, answer
from stillroom.students.rounding import Rounding, round_layers
from stillroom.types import Batch, Column, Identity, Signal

WEIGHTS = "model.safetensors"
CONFIG = "student.json"


@dataclass(frozen=True)
class Source:
    """The function and arguments that rebuild a network: ``settings.resolve(factory)(**arguments)``."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None  # sha256 of the file, for a factory in a file of the user's own


@dataclass(frozen=True, eq=False)
class Student:
    """A network that answers. ``net`` is ordinary PyTorch: it is what ``export`` ships.

    ``adapter`` turns a batch's raw columns into the network's tensors; ``answers`` says what its output means;
    ``features`` are module paths whose outputs join the signal; ``classes`` is the order of its logits.
    """

    net: nn.Module
    adapter: Adapter = field(default_factory=Columns)
    answers: Answers = "logits"
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    source: Source | None = None
    name: str = "student"
    tokenizer: Any = None  # of a language model, saved beside its weights
    made_by: Mapping[str, Any] = field(default_factory=dict)  # the choices that made the network, as plain JSON
    rounding: Rounding | None = None  # of a student that computes in int8 or int4: see students.quantised

    @classmethod
    def make(
        cls,
        factory: str | Callable[..., nn.Module],
        arguments: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        folder: Path | None = None,
        **rest: Any,
    ) -> Student:
        """Build the network from a factory (a function, 'module:name' or 'my_file.py:name') under a seed.

        A student made this way can be rebuilt from its folder by ``stillroom.load``.
        """
        make_net = settings.resolve(factory, folder) if isinstance(factory, str) else factory
        name = factory if isinstance(factory, str) else settings.name_of(factory)
        digest = None
        if name.rpartition(":")[0].endswith(".py"):
            digest = file_digest(Path(getattr(make_net, "__globals__", {}).get("__file__", name.rpartition(":")[0])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = make_net(**dict(arguments or {}))
        return cls(net, source=Source(name, dict(arguments or {}), digest), **rest)

    def __call__(self, batch: Batch) -> Signal:
        return answer(self.net, batch, self.adapter, self.answers, self.features)

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Column] | Batch) -> Signal:
        """Answer new inputs: raw columns, as in the training data. Evaluation mode, no gradient."""
        batch = inputs if isinstance(inputs, Batch) else _as_batch(inputs)
        was_training = self.net.training
        self.net.eval()
        try:
            return self(batch).detach()  # a language model answers with its head, a parameter
        finally:
            self.net.train(was_training)

    @property
    def identity(self) -> Identity:
        """Name and content digest of the weights as they are now."""
        digest = state_digest(self.net.state_dict())
        known = {} if self.tokenizer is None else describe_tokenizer(self.tokenizer)
        return Identity(self.name, digest, kind="student", licence="unknown", classes=self.classes, **known)

    def copy(self) -> Student:
        """The same student with its own weights."""
        return dataclasses.replace(self, net=copy.deepcopy(self.net))

    def with_features(self, paths: tuple[str, ...]) -> Student:
        """The same student (and network) that also gives the outputs of these modules."""
        return dataclasses.replace(self, features=tuple(dict.fromkeys((*self.features, *paths))))


def _as_batch(inputs: Mapping[str, Column]) -> Batch:
    columns = {name: column if isinstance(column, Tensor) else tuple(column) for name, column in inputs.items()}
    count = len(next(iter(columns.values()))) if columns else 0
    return Batch(ids=tuple(str(i) for i in range(count)), inputs=columns)


def describe_student(student: Student) -> dict[str, Any]:
    """How to rebuild the student, as plain JSON: the part of student.json that is known before training."""
    return {
        "format": "stillroom-student/1",
        "name": student.name,
        "answers": student.answers,
        "features": list(student.features),
        "classes": list(student.classes) if student.classes else None,
        "source": settings.describe(student.source) if student.source else None,
        "adapter": settings.describe(student.adapter),
        "layout": "transformers" if is_causal(student.net) else None,
        "parameters": sum(p.numel() for p in student.net.parameters()),
        **({"made_by": dict(student.made_by)} if student.made_by else {}),
        **({"rounding": settings.describe(student.rounding)} if student.rounding else {}),
    }


def save_student(student: Student, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write model.safetensors and student.json. ``extra`` joins student.json (what trained it)."""
    folder.mkdir(parents=True, exist_ok=True)
    if is_causal(student.net):
        write_folder(student.net, student.tokenizer, folder)
        state = load_file(folder / WEIGHTS)
    else:
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.net.state_dict().items()}
        write_bytes(folder / WEIGHTS, save(state))
    config = {**describe_student(student), "content_digest": state_digest(state), **(extra or {})}
    write_json(folder / CONFIG, config)


def load_student(folder: str | Path, base: Path | None = None) -> Student:
    """Rebuild a student from its folder; a factory in a user's own file is looked up from ``base``.

    Raises FolderError when the folder does not know how to rebuild it.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(f"{folder / WEIGHTS} does not exist: the training has not finished, or it was deleted.")
    if config.get("layout") == "transformers":
        check_weights(folder, config)
        loaded = load_causal(folder)
        loaded.net.requires_grad_(True)
        return Student(
            loaded.net,
            adapter=settings.rebuild(config["adapter"], base),
            answers=config["answers"],
            features=tuple(config["features"]),
            name=config["name"],
            tokenizer=loaded.tokenizer,
            made_by=config.get("made_by", {}),
        )
    if config["source"] is None:
        raise FolderError(
            f"{folder} does not say how to rebuild the network. Train with Student.make(factory, arguments) "
            "or load the weights into your own network from model.safetensors."
        )
    source = config["source"]
    student = Student.make(
        source["factory"],
        source["arguments"],
        folder=base,
        adapter=settings.rebuild(config["adapter"], base),
        answers=config["answers"],
        features=tuple(config["features"]),
        classes=tuple(config["classes"]) if config["classes"] else None,
        name=config["name"],
    )
    if source["digest"] and student.source and student.source.digest != source["digest"]:
        warnings.warn(f"{source['factory']} has changed since {folder} was trained.", stacklevel=2)
    if config.get("rounding"):
        rounding = settings.rebuild(config["rounding"])
        student = dataclasses.replace(student, rounding=rounding)
        round_layers(student.net, rounding)
    state = check_weights(folder, config)
    try:
        student.net.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"the weights in {folder} do not fit what {source['factory']} builds: {error}") from None
    student.net.eval()
    return student


def check_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a student's weights. Raises FolderError when they are damaged or not those student.json names."""
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:
        raise FolderError(f"{folder / WEIGHTS} cannot be read ({error}): it is cut or damaged. Train again.") from None
    if config.get("content_digest") and state_digest(state) != config["content_digest"]:
        raise FolderError(f"{folder / WEIGHTS} holds other weights than student.json says. Restore it, or train again.")
    return state

"""What a recipe may say, and its defaults. Nothing is imported or run for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stillroom.recipes.declared import Terms
from stillroom.recipes.uses import Driving, Strict, Use, Writing, driven, written

# What is kept of token distributions (decision 0010): draws teach best for their bytes, entries serve every objective.
DRAWS = {"use": "sampled", "n": 50, "bits": 0}
ENTRIES = {"use": "likely", "least": 0.0004, "bits": 7}


class Quantise(Strict):
    """The last part of the training is in the integers that ship."""

    precision: Literal["int8", "int4"] = "int8"
    share: float = Field(0.25, gt=0, lt=1, description="of the steps of fit")
    learning_rate: float = Field(0.3, gt=0, description="of that part, times fit's own")
    group: int = Field(32, ge=2, description="int4: weights of a linear layer that share a scale")


class StudentUse(Use):
    """The student's network and how raw columns reach it."""

    adapter: Use | None = Field(None, description="from raw columns to the network's tensors; default: the columns")
    answers: Literal["logits", "values"] = "logits"
    quantise: Quantise | None = Field(None, description="int8 or int4: train the last part of the steps rounded so")

    @field_validator("quantise", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"precision": given} if isinstance(given, str) else given


class Labels(Strict):
    """Keep this many labels of the training rows; the rest becomes the unlabelled pool."""

    count: int = Field(gt=0)
    seed: int = 0


class Split(Strict):
    """Shares of one source; the test share is never used for a choice."""

    train: float = 0.8
    validation: float = 0.0
    test: float = 0.2
    seed: int = 0


class Data(Strict):
    """Either train and test, or one source and a split, or the driving of a control task."""

    train: Use | None = None
    test: Use | None = None
    validation: Use | None = Field(None, description="rows that choices are made on, beside train and test")
    source: Use | None = None
    driving: Driving | None = Field(None, description="a control task: the data are what is met while driving")
    split: Split | None = None
    labels: Labels | None = Field(None, description="a label budget; default: all labels stay")
    views: Use | None = Field(None, description="a seeded augmentation")
    duplicates: Literal["drop", "refuse", "allow"] = Field(
        "drop", description="training rows that stand in the test set too"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Data:
        given = (self.source, self.train and self.test, self.driving)
        if sum(way is not None for way in given) != 1:
            raise ValueError("give either 'train' and 'test', or 'source' (with 'split'), or 'driving'")
        return self


class Record(Strict):
    """What is kept of the teacher's answers."""

    keep: list[Use] = Field(
        default=[Use(use="everything")],
        min_length=1,
        description="default for texts: 50 draws for forward KL at temperature 1, else likely",
    )
    views: int | None = Field(default=None, ge=1, description="recorded views of each example; needs data.views")
    batch_size: int = Field(default=64, gt=0)
    engine: Literal["local", "ray"] = Field(default="local", description="ray: over the workers of a Ray cluster")


class ChatUse(Strict):
    """How conversations become tokens; the text column then holds JSON lists of messages."""

    template: str | None = Field(None, description="a chat template; default: the tokenizer's own")
    thinking: bool | None = Field(None, description="the template's thinking switch, where it has one")
    learn: Literal["all", "answers", "last"] = "answers"


class Tokens(Strict):
    """The data are texts for a causal language model: how they become rows of tokens."""

    length: int = Field(512, ge=2, description="tokens of a row")
    vocabulary: int | None = Field(None, ge=300, description="cut teacher and data to so many ids; default: all")
    column: str = "text"
    too_long: Literal["split", "refuse"] = "split"
    chat: ChatUse | None = None


class Alone(Strict):
    """The control: the same student and budget without the teacher."""

    objective: Use = Use(use="hard_labels")
    epochs: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="its budgets; the best on the validation rows is the control. Default: the student's own",
    )


class Evaluate(Strict):
    """The scoreboard."""

    metric: str | None = Field(default=None, description="the headline; default: the first of metrics")
    metrics: list[str] | None = None
    replicates: int = Field(default=1000, ge=10, description="bootstrap replicates")


class Export(Strict):
    """One artefact."""

    target: str = "onnx"
    precision: str = "fp32"


class Recipe(Strict):
    """One distillation from data to passport."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    about: str = ""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    data: Data
    tokens: Tokens | None = None
    writes: Writing | None = Field(None, description="the student writes its answers, as the teacher does")
    teacher: Use
    record: Record = Record()
    student: StudentUse
    learn_from: Literal["all", "unlabelled"] = Field("all", description="the training rows that the student sees")
    objective: Use | dict[str, float] | list[Any] = Use(use="soft_targets")
    alone: Alone | None = Field(default_factory=Alone)
    baseline: Use | None = None
    fit: dict[str, Any] = Field(default_factory=dict, description="the fields of stillroom.Plan")
    trackers: list[str] = Field(default=[])
    evaluate: Evaluate = Evaluate()
    export: list[Export] = Field(default=[])
    terms: Terms = Terms()
    threads: int | None = Field(None, gt=0, description="torch threads; default: torch's own choice")

    @model_validator(mode="before")
    @classmethod
    def _keep_tokens(cls, content: Any) -> Any:
        """Texts have a default of their own: the whole vocabulary at every position would fill a disk."""
        content = written(driven(content))
        if not isinstance(content, dict) or content.get("tokens") is None:
            return content
        record = content.get("record")
        if record is not None and (not isinstance(record, dict) or "keep" in record):
            return content
        kept = dict(DRAWS if _takes_draws(content.get("objective")) else ENTRIES)
        return {**content, "record": {"keep": [kept], **(record or {})}}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed that stands twice is one training, not two")
        return seeds

    @model_validator(mode="after")
    def _fits_tokens(self) -> Recipe:
        if self.writes is not None:
            others = {
                "tokens": self.tokens, "data.views": self.data.views, "data.driving": self.data.driving,
                "baseline": self.baseline, "alone.epochs": self.alone and self.alone.epochs,
            }  # fmt: skip
            if given := [name for name, value in others.items() if value is not None]:
                raise ValueError(f"writes: answers in words have no {', '.join(given)}; leave that out")
        if self.tokens is not None and (self.data.labels is not None or self.data.views is not None):
            raise ValueError("tokens: texts have no label budget and no views; leave data.labels and data.views out")
        if self.alone is not None and self.alone.epochs is not None and not self.has_validation:
            raise ValueError("alone.epochs: give data.validation (or a validation share of the split) to choose by")
        return self

    @model_validator(mode="after")
    def _ships_what_it_trains(self) -> Recipe:
        """An export that would be refused after hours is refused before."""
        quantise = self.student.quantise
        if quantise is None:
            return self
        if self.speaks:
            raise ValueError("student.quantise: is for networks; of a language model export int8 or q8_0")
        for wanted in self.export:
            if ":" not in wanted.target and wanted.precision != quantise.precision:
                raise ValueError(f"export: the student is trained in {quantise.precision}, not {wanted.precision}")
        return self

    @property
    def speaks(self) -> bool:
        """Whether the student is a causal language model."""
        return self.tokens is not None or self.writes is not None

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to choose by."""
        return self.data.validation is not None or (self.data.split is not None and self.data.split.validation > 0)

    files: dict[str, str] = Field(default_factory=dict, description="sha256 of the user's own files, when resolved")


def _takes_draws(objective: Any) -> bool:
    """Whether every term that asks the teacher is forward KL at temperature 1: what draws are unbiased for."""
    terms = objective if isinstance(objective, list) else [objective]
    asking = [term for term in terms if not (isinstance(term, dict) and term.get("use") == "hard_labels")]
    return bool(asking) and all(
        isinstance(term, dict)
        and term.get("use") == "soft_targets"
        and term.get("temperature") == 1
        and term.get("divergence", "forward_kl") == "forward_kl"
        for term in asking
    )

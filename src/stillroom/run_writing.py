"""A run of answers in words: what the teacher wrote becomes what the student learns to write (Kim and Rush 2016)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from stillroom.checking import Check, Estimate
from stillroom.data import Packed, pack
from stillroom.data.table import Table
from stillroom.errors import DataError, UsageError
from stillroom.evaluation import FILE, Report, costs_of, evaluate
from stillroom.files import write_bytes, write_json
from stillroom.language.chat import Chat
from stillroom.language.exchanges import Exchange, answered
from stillroom.language.loading import load_causal
from stillroom.language.prompts import Prompt
from stillroom.measures.bootstrap import median_interval
from stillroom.measures.texts import beside, lines_of, metrics_for, scored
from stillroom.measures.wording import columns_about
from stillroom.progress import bar
from stillroom.recipes.asked import bill, has_endpoint, sampled
from stillroom.recipes.parts import keep_of
from stillroom.recipes.sources import by_role
from stillroom.recipes.starts import language_start
from stillroom.recipes.uses import Writing
from stillroom.recording import Recording, record
from stillroom.run import Run
from stillroom.students.networks import Student
from stillroom.teachers.causal import from_causal
from stillroom.types import UNLABELLED, Batch, Identity, Model, Signal, identity_of

ROWS = 64  # examples whose texts are read together
ANSWERS = "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class Dictated:
    """Whose words the labels are, and of which recording. Says nothing more: they are in the rows."""

    identity: Identity
    manifest: Mapping[str, Any]

    def __call__(self, batch: Batch) -> Signal:
        return Signal()


@dataclasses.dataclass(frozen=True)
class WrittenRun(Run):
    """A Run whose recipe has ``writes``."""

    @property
    def writing(self) -> Writing:
        """The recipe's part."""
        assert self.recipe.writes is not None
        return self.recipe.writes

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The questions by role, as tables."""
        return by_role(self.recipe, self._divided[0], self.base)

    @cached_property
    def asked(self) -> dict[str, Table]:
        """The questions that the teacher answers, those without an answer left out."""
        return {what: self._covered(self.tables[what], what) for what in ("pool", "test")}

    @cached_property
    def teacher(self) -> Any:
        """The teacher, which answers in words."""
        return self._teacher(self.recipe.teacher, self._offered)

    @property
    def _offered(self) -> dict[str, Any]:
        train = self.tables["train"]
        offered: dict[str, Any] = {"examples": train, "folder": self.base, "progress": self.progress}
        return offered | ({} if train.classes is None else {"classes": train.classes})

    @cached_property
    def base_model(self) -> Any:
        """The teacher's place in the making of a student: a network for its layers, and the tokenizer."""
        name = self.writing.base or self.recipe.student.arguments.get("model")
        if name is None:
            raise UsageError("writes.base: name the model whose tokenizer (and layers) the student has.")
        loaded = load_causal(name, self.recipe.student.arguments.get("gguf"))
        return from_causal(loaded.net, loaded.tokenizer, loaded.place)

    @cached_property
    def exchange(self) -> Exchange:
        """How the student is asked."""
        chat = Chat(thinking=self.writing.thinking) if self.writing.chat else None
        classes = self.tables["train"].classes or ()
        return Exchange(Prompt(self.writing.prompt), chat, {"classes": list(classes)})

    @cached_property
    def data(self) -> dict[str, Any]:
        """The rows of tokens that are learned and measured; ``labelled``: those that a person answered."""
        train = self.tables["train"]
        labelled = None if self.recipe.alone is None else self.labelled
        return {"train": train, "labelled": labelled, "pool": self.pool, "test": self.test}

    @cached_property
    def pool(self) -> Packed:
        """Questions of the pool, each with what the teacher wrote."""
        recording, rows = self.said_texts, self.asked["pool"]
        return self._packed("pool", rows, lambda batch: recording(batch).text, together=True)

    @cached_property
    def test(self) -> Packed:
        """Questions of the test, each with what the teacher wrote: for costs, and for exports."""
        return self._packed("test", self.asked["test"], lambda batch: self.teacher(batch).text, together=False)

    @cached_property
    def labelled(self) -> Packed:
        """The questions that a person answered; what the student learns from without its teacher."""
        rows = self.tables["labelled" if self.writing.answer is None else "train"]
        known = [place for place, text in enumerate(self._human(rows)) if text is not None]
        if not known:
            raise DataError("alone: nobody answered a training question. Leave the control out (alone: null).")
        kept = rows.select(known)
        texts = dict(zip(kept.ids, self._human(kept), strict=True))
        return self._packed("labelled", kept, lambda batch: [texts[name] for name in batch.ids], together=True)

    def _packed(self, role: str, rows: Table, texts: Any, together: bool) -> Packed:
        tokenizer = self.base_model.tokenizer

        def documents() -> Iterator[tuple[str, Any]]:
            for batch in _batches(rows):
                for row, text in enumerate(texts(batch)):
                    if text.strip():  # an empty answer teaches nothing
                        yield batch.ids[row], self.exchange.whole(tokenizer, batch, row, text)

        return pack(
            documents(),
            tokenizer,
            self.writing.length,
            self.folder / "tokens" / role if self.claimed else None,
            together=together,
            too_long="refuse",
            name=rows.name,
            licence=rows.licence,
            source=rows.source,
        )

    def _human(self, rows: Table) -> list[str | None]:
        """What a person answered to each row: the column, else the class; None where that is not known."""
        if self.writing.answer is not None:
            column = rows.column(self.writing.answer)
            return [str(text) if isinstance(text, str) and text.strip() else None for text in column]
        if rows.labels is None or rows.classes is None:
            return [None] * len(rows)
        return [None if label == UNLABELLED else rows.classes[label] for label in rows.labels.tolist()]

    def student(self, seed: int) -> Student:
        """The untrained student of a seed."""
        kept = self.folder / "start" / str(seed) if self.claimed else None
        return language_start(self.recipe, seed, self.base_model, self.pool, self.base, kept)

    def check(self) -> tuple[tuple[Check, ...], Estimate | None]:
        """What asking will take, and whether questions and answers fit their rows."""
        _ = self.allowed
        few = sampled(self.teacher, self.tables["pool"], self.tables["labelled"]) if self._paid else None
        rows = few.pool if few else self.asked["pool"].select(range(min(len(self.asked["pool"]), 4)))
        said = next(texts for batch in _batches(rows) if (texts := self.teacher(batch).text))
        tokenizer, longest = self.base_model.tokenizer, 0
        for batch in _batches(self.tables["pool"]):
            longest = max(longest, *(len(self.exchange.question(tokenizer, batch, row)) for row in range(len(batch))))
        room = self.writing.length - longest
        fits = Check(
            "questions fit", room >= self.writing.new_tokens,
            f"the longest has {longest} tokens, a row {self.writing.length}: {room} are left for an answer",
            "Raise writes.length, or cut what the prompt shows: {{ text[:300] }}.",
        )  # fmt: skip
        answers = Check(
            "teacher writes", bool(said and said[0].strip()), f"it says {said[0][:80]!r}", "See its prompt."
        )
        return (*(few.told() if few else ()), answers, fits), None

    @property
    def _paid(self) -> bool:
        return has_endpoint(self.recipe.teacher)

    def record(self) -> Recording:
        """What the teacher wrote, asked once."""
        _ = self.allowed
        rows, keep = self.asked["pool"], keep_of(self.recipe, self.base)
        size = self.recipe.record.batch_size
        return record(self.teacher, rows, self.folder / "recording", keep, batch_size=size, progress=self.progress)

    @cached_property
    def said_texts(self) -> Recording:
        """The recording of texts; made where it is not there yet."""
        return self.record()

    @property
    def said(self) -> Model:
        """The teacher by name: its words are the rows' labels."""
        return Dictated(identity_of(self.teacher), self.said_texts.manifest)

    def evaluate(self) -> Report:
        """Let every student answer the test's questions, and compare the words with a person's and the teacher's."""
        rows, folder = self.asked["test"], self.folder / "report"
        human = dict(zip(rows.ids, self._human(rows), strict=True))
        theirs = {name: text for batch in _batches(rows) for name, text in self._taught(batch)}
        models: dict[str, Any] = self.trained()
        models["untrained"] = [self.student(seed) for seed in self.recipe.seeds]
        written = {name: [self._written(one, rows, name) for one in seeds] for name, seeds in models.items()}
        texts = {"teacher": theirs, **{name: found[0][0] for name, found in written.items()}}
        write_bytes(folder / ANSWERS, lines_of(texts, human))
        made = {name: [self._numbers(said, theirs, human) for said, _ in found] for name, found in written.items()}
        first = self._numbers(theirs, theirs, human)
        known = any(text is not None for text in human.values())
        right = torch.ones(len(rows), 1)
        wanted = Table({"question": rows.ids}, rows.ids, labels=right, name=rows.name, licence=rows.licence)
        chosen, replicates = metrics_for(known, self.writing.fields), self.recipe.evaluate.replicates
        report = evaluate(
            {"teacher": first, **made}, first, wanted, chosen, folder, replicates=replicates, costs=False,
            metric=self.recipe.evaluate.metric, progress=False,
        )  # fmt: skip
        cells = {
            name: {**report.rows[name], **self._costs(seeds[0], written[name][0][1])} for name, seeds in models.items()
        }
        cells = {"teacher": report.rows["teacher"], **cells}
        report = dataclasses.replace(
            report, rows=cells, metrics=columns_about(chosen, cells), disagreements=(),
            generations=beside(texts, self._questions(rows), human), teacher={"name": identity_of(self.teacher).name},
        )  # fmt: skip
        write_json(folder / FILE, report.as_json())
        bill(self.teacher, self.folder)
        return report

    def _questions(self, rows: Table) -> dict[str, str]:
        """What the student is shown of each row."""
        fill, known = self.exchange.prompt.fill, self.exchange.known
        shown = ((batch, row) for batch in _batches(rows) for row in range(len(batch)))
        return {batch.ids[row]: fill(batch, row, known)[-1]["content"] for batch, row in shown}

    def _taught(self, batch: Batch) -> Iterator[tuple[str, str]]:
        said = self.teacher(batch).text
        if said is None:
            raise UsageError(
                "writes: the teacher gives no text. Use an endpoint with reads: text, published, or writer."
            )
        return zip(batch.ids, said, strict=True)

    def _numbers(self, said: Mapping[str, str], theirs: Mapping[str, str], human: Mapping[str, str | None]) -> Any:
        return scored(said, theirs, human, self.writing.fields)

    def _written(self, student: Student, rows: Table, name: str) -> tuple[dict[str, str], list[float]]:
        """The student's answers by id, and the seconds of each."""
        said, seconds = {}, []
        net = student.net.eval()
        with bar(f"{name} writes", len(rows), shown=self.progress) as step:
            for batch in _batches(rows):
                for row, question_id in enumerate(batch.ids):
                    question = self.exchange.question(student.tokenizer, batch, row)
                    began = time.perf_counter()
                    said[question_id] = answered(net, student.tokenizer, question, self.writing.new_tokens)
                    seconds.append(time.perf_counter() - began)
                    step(1)
        return said, seconds

    def _costs(self, student: Student, seconds: list[float]) -> dict[str, Any]:
        """The costs of a language model; ``latency`` is of a whole answer."""
        latency = median_interval(seconds, seed=0)
        whole = {} if latency is None else {"latency": latency.as_json()}
        return {**costs_of(student, self.test), **whole}


def _batches(rows: Table) -> Iterator[Batch]:
    for start in range(0, len(rows), ROWS):
        yield rows.batch(range(start, min(start + ROWS, len(rows))), None)


def _ones(count: int) -> Any:
    import torch

    return torch.ones(count, 1)

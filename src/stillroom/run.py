"""One run of a recipe in one folder: builds the parts a recipe names and calls the stages in order.

record, fit, evaluate, export, passport, report, then the manifest that digests every file. Each stage reads what the
ones before it wrote, so each can be run alone, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stillroom import provenance, settings
from stillroom.checking import Check, Estimate, estimate, featured, preflight
from stillroom.data.table import Table
from stillroom.evaluation import Report, evaluate
from stillroom.exporting import Exports, export_several
from stillroom.provenance.terms.gate import Decision
from stillroom.recipes.asked import asked_rows, bill, has_endpoint, sampled
from stillroom.recipes.corpus import Corpus, corpus_of
from stillroom.recipes.gating import Question, check_requests, pass_gate, question
from stillroom.recipes.named import BASELINES, TEACHERS, call, resolved
from stillroom.recipes.parts import headline_of, keep_of, look_up, metrics_of, objective_of, plan_of
from stillroom.recipes.quantising import train
from stillroom.recipes.recipe import Recipe, Use
from stillroom.recipes.sources import by_role, divided, read_sources
from stillroom.recipes.starts import best_of, language_start, network_start
from stillroom.recipes.yaml_file import keep_recipe, load_recipe
from stillroom.recording import Recording, bytes_kept, open_recording, record
from stillroom.report import write_report
from stillroom.students.networks import Student, load_student
from stillroom.teachers import ensemble
from stillroom.types import Batch, Signal, identity_of

PUBLISHED = "published"  # the one kind of teacher that may lack answers


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved recipe, the folder it runs in, and the folder its own files are looked up from."""

    recipe: Recipe
    folder: Path
    base: Path
    progress: bool = True
    claimed: bool = True  # False: only looking (doctor), nothing is written

    @cached_property
    def data(self) -> dict[str, Any]:
        """The examples by role: train (with the label budget), labelled, pool (what the student sees), test."""
        if self.recipe.tokens is not None:
            rows = dict(self.corpus.parts)
            return rows | {"labelled": rows["train"], "pool": rows["train"]}
        return by_role(self.recipe, self._divided[0], self.base)

    @property
    def shared(self) -> dict[str, Any]:
        """Pairs of rows of a part and the test that are the same."""
        return self._divided[1]

    @cached_property
    def sources(self) -> dict[str, Table]:
        """The tables as they are read."""
        return read_sources(self.recipe, self.base)

    @cached_property
    def _divided(self) -> tuple[dict[str, Table], dict[str, Any]]:
        return divided(self.recipe, self.sources, self.folder if self.claimed else None)

    @cached_property
    def corpus(self) -> Corpus:
        """The texts as rows of tokens, and the teacher in their vocabulary."""
        assert self.recipe.tokens is not None
        teacher = self._teacher(self.recipe.teacher, {"folder": self.base})
        folder = self.folder / "tokens" if self.claimed else None
        return corpus_of(self._divided[0], teacher, self.recipe.tokens, folder)

    @cached_property
    def teacher(self) -> Any:
        """The teacher, built; what it is fitted on is the labelled rows of the training data and nothing else."""
        if self.recipe.tokens is not None:
            return self.corpus.teacher
        return self._teacher(self.recipe.teacher, self._offered)

    def _teacher(self, use: Use, offered: dict[str, Any]) -> Any:
        if use.use != "ensemble":
            return call(use, TEACHERS, self.base, "teacher", offered)
        settings = {name: value for name, value in use.arguments.items() if name != "members"}
        members = {name: self._teacher(Use(**one), offered) for name, one in use.arguments["members"].items()}
        return ensemble(members, **settings)

    @property
    def _offered(self) -> dict[str, Any]:
        train = self.data["train"]
        offered: dict[str, Any] = {"examples": train, "folder": self.base, "progress": self.progress}
        if self.claimed:  # a teacher that is trained keeps its work there, so that every stage opens one
            offered["workspace"] = self.folder / "teacher"
        return offered | ({} if train.classes is None else {"classes": train.classes})

    @cached_property
    def pool(self) -> Any:
        """The rows that the student learns from, those without an answer left out where the recipe allows it."""
        return self._covered(self.data["pool"], "pool")

    @cached_property
    def test(self) -> Any:
        """The rows that are measured on; as ``pool``."""
        return self._covered(self.data["test"], "test")

    def _covered(self, rows: Any, what: str) -> Any:
        """A teacher that can be asked has answers to all rows, and need not be built for that."""
        if self.recipe.teacher.use == PUBLISHED:
            return self.teacher.covering(rows, what)
        if not has_endpoint(self.recipe.teacher):
            return rows
        _ = self.allowed
        check_requests(self.recipe.terms, len(rows))
        return asked_rows(self.teacher, rows, what, self.folder, self.progress)

    def student(self, seed: int) -> Student:
        """The untrained student of a seed; the adapter is fitted on the training inputs, labels unseen."""
        if self.recipe.tokens is not None:
            kept = self.folder / "start" / str(seed) if self.claimed else None
            return language_start(self.recipe, seed, self.teacher, self.data["train"], self.base, kept)
        return network_start(self.recipe, seed, self.data["train"], self.base)

    @cached_property
    def objective(self) -> Any:
        """What the student is asked to match."""
        return objective_of(self.recipe.objective, self.base)

    @cached_property
    def question(self) -> Question:
        """What the gate is asked: sources with their terms, and what the recipe declares."""
        rows = self.sources["source" if "source" in self.sources else "train"]
        return question(self.recipe, self.base, rows, lambda use: identity_of(self._teacher(use, self._offered)))

    @cached_property
    def allowed(self) -> Decision:
        """The gate's decision; raises what the terms do not allow (exit codes 3, 4, 5), before anything is asked."""
        return pass_gate(self.question, self.folder if self.claimed else None, self.recipe.name)

    def check(self) -> tuple[tuple[Check, ...], Estimate | None]:
        """Preflight: what would go wrong later, and what it will cost. Asks the gate first."""
        _ = self.allowed
        student, asked = self.student(self.recipe.seeds[0]), has_endpoint(self.recipe.teacher)
        labelled = self.data["labelled"]  # what the teacher is scored on before anything starts
        scored = self.teacher.answered(labelled) if self.recipe.teacher.use == PUBLISHED else labelled
        few = sampled(self.teacher, self.data["pool"], labelled) if asked else None
        pool, scored = (few.pool, few.labelled) if few else (self.pool, scored)
        whole = len(self.data["pool"] if few else pool)
        plan = plan_of(self.recipe, self.recipe.seeds[0], whole)
        told = few.told() if few else self._told()
        checks = (*told, *preflight(self.teacher, student, pool, self.objective, labelled=scored, plan=plan))
        if not all(check.passed for check in checks):
            return checks, None
        codecs = keep_of(self.recipe, self.base)

        def kept(said: Signal, batch: Batch) -> tuple[int, int]:
            return bytes_kept(codecs, said, [(name, -1) for name in batch.ids])

        cost = estimate(self.teacher, student, pool, plan=plan, objective=self.objective, kept=kept)
        return checks, few.of_all(cost, whole) if few else cost

    def _told(self) -> list[Check]:
        """What a teacher says of itself before it is asked: published answers, how many can be used and why not all."""
        if self.recipe.teacher.use != PUBLISHED:
            return []
        left = {what: len(self.data[what]) - len(rows) for what, rows in (("pool", self.pool), ("test", self.test))}
        said = "; ".join(f"{count} rows of {what} left out" for what, count in left.items() if count)
        return [Check("published answers", True, "; ".join(filter(None, (self.teacher.told(), said))))]

    def record(self) -> Recording:
        """Ask the teacher once; every seed learns from the same answers."""
        _ = self.allowed
        views = self.recipe.record.views if self.recipe.data.views is not None else None
        check_requests(self.recipe.terms, len(self.pool) * (views or 1))
        return record(
            featured(self.teacher, self.objective),
            self.pool,
            self.folder / "recording",
            keep_of(self.recipe, self.base),
            views=views,
            batch_size=self.recipe.record.batch_size,
            engine=self.recipe.record.engine,
            progress=self.progress,
        )

    @property
    def said(self) -> Any:
        """What the student learns from: the recorded answers."""
        return open_recording(self.folder / "recording", self.base)

    def place(self, role: str, seed: int) -> Path:
        """student/ and alone/ for the first seed, seeds/N/student for the others."""
        return self.folder / role if seed == self.recipe.seeds[0] else self.folder / "seeds" / str(seed) / role

    def fit(self) -> dict[str, list[Student]]:
        """Train the student, and the control alone, once per seed."""
        _ = self.allowed
        pool, labelled, said = self.pool, self.data["labelled"], self.said
        trained: dict[str, list[Student]] = {"student": [], "alone": []}
        for seed in self.recipe.seeds:
            start, plan = self.student(seed), plan_of(self.recipe, seed, len(pool))
            common: dict[str, Any] = {"plan": plan, "trackers": self.recipe.trackers, "progress": self.progress}
            common |= {"quantise": self.recipe.student.quantise, "inputs": pool}
            folder = self.place("student", seed)
            trained["student"].append(train(start, said, pool, self.objective, folder=folder, **common))
            if self.recipe.alone is not None:
                trained["alone"].append(self._control(start, seed, labelled, common))
        return trained

    def _control(self, start: Student, seed: int, labelled: Any, common: dict[str, Any]) -> Student:
        """The student alone: with the same budget, or with the one of several that the validation rows like best."""
        alone = self.recipe.alone
        assert alone is not None
        objective, folder = objective_of(alone.objective, self.base), self.place("alone", seed)
        if alone.epochs is None:
            return train(start, None, labelled, objective, folder=folder, **common)
        tried = {}
        for epochs in alone.epochs:
            plan = dataclasses.replace(common["plan"], epochs=epochs, steps=None)
            place = folder.parent / f"controls-{folder.name}" / f"epochs-{epochs:g}"
            tried[place] = train(start, None, labelled, objective, folder=place, **{**common, "plan": plan})
        return best_of(tried, self.data["validation"], objective, folder)

    def trained(self) -> dict[str, list[Student]]:
        """The students as they lie on disk."""
        roles = ["student"] if self.recipe.alone is None else ["student", "alone"]
        return {role: [load_student(self.place(role, s), self.base) for s in self.recipe.seeds] for role in roles}

    def evaluate(self) -> Report:
        """Score every row on the test set."""
        settings = self.recipe.evaluate
        models: dict[str, Any] = {"teacher": self.teacher, **self.trained()}
        models["untrained"] = [self.student(seed) for seed in self.recipe.seeds]
        if self.recipe.baseline is not None:
            models["baseline"] = call(self.recipe.baseline, BASELINES, self.base, "baseline", self._offered)
        report = evaluate(
            models, self.teacher, self.test, metrics_of(self.recipe, self.base), self.folder / "report",
            metric=settings.metric, training=self.pool, replicates=settings.replicates, progress=self.progress,
        )  # fmt: skip
        bill(self.teacher, self.folder)
        return report

    def export(self, wanted: Sequence[tuple[str, str]] | None = None, skip_unsupported: bool = False) -> Exports:
        """Ship the first seed's student, each artefact checked on the whole test set; default: the recipe's own list.

        ``wanted``: (target, precision). One that fails does not stop the others.
        """
        student = load_student(self.place("student", self.recipe.seeds[0]), self.base)
        if wanted is None:
            wanted = [(one.target, one.precision) for one in self.recipe.export]
        return export_several(
            student,
            self.test,
            self.folder / "exports",
            wanted,
            skip_unsupported=skip_unsupported,
            base=self.base,
            calibration=self.pool,
            metric=None if student.answers == "next_token" else headline_of(self.recipe, self.base),
            progress=self.progress,
        )

    def seal(self) -> None:
        """Passport and model card, then the page, then the manifest that digests every file."""
        seal(self.folder)


def seal(folder: Path) -> Path:
    """Write passport, model card, page and manifest of a run from its files. Returns the page."""
    provenance.write(folder)
    page = write_report(folder)
    provenance.write_manifest(folder)
    return page


def open_run(
    recipe: str | Path,
    folder: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    progress: bool = True,
    claim: bool = True,
    files: str | Path | None = None,
) -> Run:
    """A Run of a recipe file (or of a run's folder). Raises FolderError if its folder holds another run.

    ``claim=False`` writes nothing. ``files``: where the recipe's own files are looked up; default: beside it.
    """
    loaded, beside = load_recipe(recipe, overrides)
    base = beside if files is None else Path(files)
    if Path(recipe).is_dir() and folder is None:
        folder = Path(recipe)
    ready = resolved(loaded, base)
    look_up(ready, base)
    if ready.threads is not None:
        torch.set_num_threads(ready.threads)
    place = Path(folder) if folder is not None else Path("runs") / ready.name
    other = "run_writing:WrittenRun" if ready.writes else "run_driving:DrivenRun" if ready.data.driving else None
    kind = Run if other is None else settings.resolve(f"stillroom.{other}")
    run = kind(ready, place, base, progress, claim)
    if claim:
        _ = run.sources  # a file that is not there must not cost the folder
        keep_recipe(ready, place)
    return run

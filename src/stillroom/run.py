"""One run of a recipe in one folder: builds the parts a recipe names and calls the stages in order.

record, fit, evaluate, export, passport, report, then the manifest that digests every file. Each stage reads what the
ones before it wrote, so each can be run alone, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stillroom import provenance
from stillroom.checking import Check, Estimate, estimate, preflight
from stillroom.data.splits import check_leakage, keep_split, label_budget, split, unlabelled
from stillroom.data.views import Chain
from stillroom.divergences import DIVERGENCES, bind
from stillroom.errors import DataError, UsageError, nearest
from stillroom.evaluation import Report, evaluate
from stillroom.exporting import TARGETS, Artifact, export
from stillroom.fitting import fit
from stillroom.measures import METRICS
from stillroom.named import (
    ADAPTERS,
    BASELINES,
    DATA,
    KEEPS,
    OBJECTIVES,
    STUDENTS,
    TEACHERS,
    VIEWS,
    call,
    complete,
    function_of,
    resolved,
)
from stillroom.objectives import Mix
from stillroom.plan import Plan
from stillroom.recipe import Recipe, Split, Use, keep_recipe, load_recipe
from stillroom.recording import Recording, open_recording, record
from stillroom.report import write_report
from stillroom.settings import name_of
from stillroom.students.networks import Student, load_student


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved recipe, the folder it runs in, and the folder its own files are looked up from."""

    recipe: Recipe
    folder: Path
    base: Path
    progress: bool = True

    @cached_property
    def data(self) -> dict[str, Any]:
        """The examples by role: train (with the label budget), labelled, pool (what the student sees), test."""
        data = self.recipe.data
        if data.source is not None:
            parts = self._split(call(data.source, DATA, self.base, "source"))
        else:
            parts = {
                role: call(use, DATA, self.base, "data") for role in ("train", "test") if (use := getattr(data, role))
            }
        parts, shared = check_leakage(parts, data.duplicates)
        train = parts["train"]
        if data.labels is not None:
            train = label_budget(train, data.labels.count, seed=data.labels.seed)
        labelled = train.labelled()
        pool = train if self.recipe.learn_from == "all" else unlabelled(train)
        if len(pool) == 0:
            raise DataError("learn_from: unlabelled leaves no rows; give data.labels, or set learn_from: all.")
        augment = self._augment()
        return parts | {
            "train": train,
            "labelled": labelled.with_augment(augment),
            "pool": pool.with_augment(augment),
            "shared": shared,
        }

    def _split(self, source: Any) -> dict[str, Any]:
        """The parts of one source; kept in the run's folder, so that a row that was tested is never trained on."""
        shares = self.recipe.data.split or Split()
        wanted = {name: share for name in ("train", "validation", "test") if (share := getattr(shares, name)) > 0}
        if not self.folder.exists():  # only looking (doctor): nothing is written
            return split(source, wanted, shares.seed)
        return keep_split(self.folder / "splits.json", source, wanted, shares.seed)

    def _augment(self) -> Any:
        use = self.recipe.data.views
        if use is None:
            return None
        if use.use == "chain":
            return Chain(tuple(call(Use(**step), VIEWS, self.base, "view") for step in use.arguments["of"]))
        return call(use, VIEWS, self.base, "view")

    @cached_property
    def teacher(self) -> Any:
        """The teacher, built; what it is fitted on is the labelled rows of the training data and nothing else."""
        return call(self.recipe.teacher, TEACHERS, self.base, "teacher", self._offered)

    @property
    def _offered(self) -> dict[str, Any]:
        train = self.data["train"]
        offered: dict[str, Any] = {"examples": train, "folder": self.base}
        if (
            self.folder.exists()
        ):  # a teacher that is trained keeps its work there, so that every stage opens the same one
            offered["workspace"] = self.folder / "teacher"
        if train.classes is not None:
            offered |= {"classes": train.classes}
        return offered

    def student(self, seed: int) -> Student:
        """The untrained student of a seed; the adapter is fitted on the training inputs, labels unseen."""
        use, train = self.recipe.student, self.data["train"]
        adapter = call(use.adapter or Use(use="columns"), ADAPTERS, self.base, "adapter", {"examples": train})
        make = function_of(use, STUDENTS, self.base, "student")
        sizes = {"classes": len(train.classes), "outputs": len(train.classes)} if train.classes else {}
        if hasattr(adapter, "size"):
            sizes["vocabulary"] = adapter.size
        arguments = complete(use, make, "student", sizes)
        return Student.make(
            use.use if ":" in use.use else name_of(make),
            arguments,
            seed=seed,
            folder=self.base,
            adapter=adapter,
            answers=use.answers,
            classes=train.classes,
            name=self.recipe.name,
        )

    @cached_property
    def objective(self) -> Any:
        return self._objective(self.recipe.objective)

    @cached_property
    def keep(self) -> list[Any]:
        """The codecs of the recording."""
        return [call(use, KEEPS, self.base, "keep") for use in self.recipe.record.keep]

    def _objective(self, use: Any) -> Any:
        if isinstance(use, dict):  # {soft_targets: 0.9, hard_labels: 0.1}
            return Mix({self._objective(Use(use=name)): weight for name, weight in use.items()})
        if isinstance(use, list):  # [{use: soft_targets, temperature: 2, weight: 0.9}, ...]
            parts = [(dict(part), dict(part).pop("weight", 1.0)) for part in use]
            return Mix(
                tuple((self._objective(Use(**{k: v for k, v in p.items() if k != "weight"})), w) for p, w in parts)
            )
        arguments = dict(use.arguments)
        if "divergence" in arguments:
            arguments["divergence"] = _divergence(arguments["divergence"])
        return call(Use(use=use.use, **arguments), OBJECTIVES, self.base, "objective")

    def plan(self, seed: int, rows: int) -> Plan:
        """The recipe's plan for a seed; steps are fixed by the pool, so that the control has the same budget."""
        known = {field.name for field in dataclasses.fields(Plan)}
        for name in self.recipe.fit:
            if name not in known:
                raise UsageError(f"fit has no setting {name!r}{nearest(name, known)}")
        try:
            plan = Plan(**{**self.recipe.fit, "seed": seed})
        except TypeError as error:
            raise UsageError(f"fit: {error}.") from None
        views = self.recipe.record.views if self.recipe.data.views is not None else 0
        return dataclasses.replace(plan, steps=plan.total_steps(rows), views=plan.views if views is None else views)

    # The stages, in order.

    def check(self) -> tuple[tuple[Check, ...], Estimate]:
        """Preflight: what would go wrong later, and what it will cost.

        All that a recipe names is looked up before the teacher, which may take long, is built.
        """
        student, pool = self.student(self.recipe.seeds[0]), self.data["pool"]
        plan = self.plan(self.recipe.seeds[0], len(pool))
        _ = self.objective, self.keep
        for wanted in self.recipe.export:
            if ":" not in wanted.target and wanted.target not in TARGETS:
                raise UsageError(f"there is no export target {wanted.target!r}{nearest(wanted.target, TARGETS)}")
        for name in (*(self.recipe.evaluate.metrics or ()), self.recipe.evaluate.metric or "accuracy"):
            if name not in METRICS:
                raise UsageError(f"there is no metric {name!r}{nearest(name, METRICS)}")
        checks = preflight(self.teacher, student, pool, self.objective, labelled=self.data["labelled"], plan=plan)
        return checks, estimate(self.teacher, student, pool, plan=plan, objective=self.objective)

    def record(self) -> Recording:
        """Ask the teacher once; every seed learns from the same answers."""
        views = self.recipe.record.views if self.recipe.data.views is not None else None
        return record(
            self.teacher,
            self.data["pool"],
            self.folder / "recording",
            self.keep,
            views=views,
            batch_size=self.recipe.record.batch_size,
            progress=self.progress,
        )

    def place(self, role: str, seed: int) -> Path:
        """student/ and alone/ for the first seed, seeds/N/student for the others."""
        return self.folder / role if seed == self.recipe.seeds[0] else self.folder / "seeds" / str(seed) / role

    def fit(self) -> dict[str, list[Student]]:
        """Train the student, and the control alone, once per seed."""
        recording = open_recording(self.folder / "recording", self.base)
        pool, labelled = self.data["pool"], self.data["labelled"]
        trained: dict[str, list[Student]] = {"student": [], "alone": []}
        for seed in self.recipe.seeds:
            start, plan = self.student(seed), self.plan(seed, len(pool))
            common: dict[str, Any] = {"plan": plan, "trackers": self.recipe.trackers, "progress": self.progress}
            folder = self.place("student", seed)
            trained["student"].append(fit(start, recording, pool, self.objective, folder=folder, **common))
            if self.recipe.alone is not None:
                objective, folder = self._objective(self.recipe.alone.objective), self.place("alone", seed)
                trained["alone"].append(fit(start, None, labelled, objective, folder=folder, **common))
        return trained

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
        return evaluate(
            models,
            self.teacher,
            self.data["test"],
            settings.metrics,
            self.folder / "report",
            metric=settings.metric,
            replicates=settings.replicates,
            progress=self.progress,
        )

    def export(self) -> list[Artifact]:
        """Ship the first seed's student, each artefact checked on the whole test set."""
        student = load_student(self.place("student", self.recipe.seeds[0]), self.base)
        return [
            export(
                student,
                self.data["test"],
                self.folder / "exports",
                wanted.target,
                wanted.precision,
                calibration=self.data["pool"],
                progress=self.progress,
            )
            for wanted in self.recipe.export
        ]

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
) -> Run:
    """A Run of a recipe file (or of a run's folder). Raises FolderError if its folder holds another run.

    ``claim=False`` writes nothing.
    """
    loaded, base = load_recipe(recipe, overrides)
    if Path(recipe).is_dir() and folder is None:
        folder = Path(recipe)
    ready = resolved(loaded, base)
    if ready.threads is not None:
        torch.set_num_threads(ready.threads)
    place = Path(folder) if folder is not None else Path("runs") / ready.name
    if claim:
        keep_recipe(ready, place)
    return Run(ready, place, base, progress)


def _divergence(named: Any) -> Any:
    """A divergence from its name, or from {use: name, setting: value}."""
    name, rest = (
        (named, {}) if isinstance(named, str) else (named.get("use"), {k: v for k, v in named.items() if k != "use"})
    )
    if name not in DIVERGENCES:
        raise UsageError(f"unknown divergence {name!r}{nearest(str(name), DIVERGENCES)}")
    return bind(DIVERGENCES[name], **rest) if rest else DIVERGENCES[name]

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
from stillroom.checking import Check, Estimate, estimate, featured, preflight
from stillroom.data.splits import check_leakage, keep_split, label_budget, split, unlabelled
from stillroom.data.table import Table
from stillroom.errors import DataError, PairError, UsageError
from stillroom.evaluation import Report, evaluate
from stillroom.exporting import Artifact, export
from stillroom.fitting import fit
from stillroom.named import ADAPTERS, BASELINES, DATA, STUDENTS, TEACHERS, call, complete, function_of, resolved
from stillroom.parts import augment_of, keep_of, look_up, metrics_of, objective_of, plan_of
from stillroom.recipe import Recipe, Split, Use, keep_recipe, load_recipe
from stillroom.recording import Recording, open_recording, record
from stillroom.report import write_report
from stillroom.settings import name_of
from stillroom.students.networks import Student, load_student
from stillroom.teachers import ensemble


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
        data = self.recipe.data
        parts = dict(self.sources) if data.source is None else self._split(self.sources["source"])
        parts, shared = check_leakage(parts, data.duplicates)
        train = parts["train"]
        if data.labels is not None:
            train = label_budget(train, data.labels.count, seed=data.labels.seed)
        labelled = train.labelled()
        pool = train if self.recipe.learn_from == "all" else unlabelled(train)
        if len(pool) == 0:
            raise DataError("learn_from: unlabelled leaves no rows; give data.labels, or set learn_from: all.")
        augment = augment_of(data.views, self.base)
        if augment is not None:
            labelled, pool = labelled.with_augment(augment), pool.with_augment(augment)
        elif pool.augmented:
            raise UsageError("the training data augments itself: name its augmentation in data.views instead.")
        return parts | {
            "train": train,
            "labelled": labelled,
            "pool": pool,
            "shared": shared,
        }

    def _read(self, use: Use, **known: Any) -> Table:
        found = call(use, DATA, self.base, "data", {"folder": self.base, **known})
        if not isinstance(found, Table):
            raise DataError(f"{use.use} returned {type(found).__name__}; data is a stillroom.Table.")
        return found

    @cached_property
    def sources(self) -> dict[str, Table]:
        """The data as it is read: one source, or both sides in one class order.

        Each side's file alone would number the classes that it happens to hold.
        """
        data = self.recipe.data
        if data.train is None or data.test is None:
            assert data.source is not None  # the recipe was checked
            return {"source": self._read(data.source)}
        train = self._read(data.train)
        test = self._read(data.test, **({"classes": train.classes} if train.classes else {}))
        if train.classes and test.classes and train.classes != test.classes:
            raise PairError(
                f"train orders its classes {', '.join(train.classes[:6])}, test {', '.join(test.classes[:6])}. "
                "Give both the same, with classes: [...]."
            )
        return {"train": train, "test": test}

    def _split(self, source: Any) -> dict[str, Any]:
        """The parts of one source; kept in the run's folder, so that a row that was tested is never trained on."""
        shares = self.recipe.data.split or Split()
        wanted = {name: share for name in ("train", "validation", "test") if (share := getattr(shares, name)) > 0}
        if not self.claimed:
            return split(source, wanted, shares.seed)
        return keep_split(self.folder / "splits.json", source, wanted, shares.seed)

    @cached_property
    def teacher(self) -> Any:
        """The teacher, built; what it is fitted on is the labelled rows of the training data and nothing else."""
        return self._teacher(self.recipe.teacher)

    def _teacher(self, use: Use) -> Any:
        if use.use != "ensemble":
            return call(use, TEACHERS, self.base, "teacher", self._offered)
        settings = {name: value for name, value in use.arguments.items() if name != "members"}
        return ensemble({name: self._teacher(Use(**one)) for name, one in use.arguments["members"].items()}, **settings)

    @property
    def _offered(self) -> dict[str, Any]:
        train = self.data["train"]
        offered: dict[str, Any] = {"examples": train, "folder": self.base}
        if self.claimed:  # a teacher that is trained keeps its work there, so that every stage opens one
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
        """What the student is asked to match."""
        return objective_of(self.recipe.objective, self.base)

    # The stages, in order.

    def check(self) -> tuple[tuple[Check, ...], Estimate | None]:
        """Preflight: what would go wrong later, and what it will cost."""
        student, pool = self.student(self.recipe.seeds[0]), self.data["pool"]
        plan = plan_of(self.recipe, self.recipe.seeds[0], len(pool))
        checks = preflight(self.teacher, student, pool, self.objective, labelled=self.data["labelled"], plan=plan)
        if not all(check.passed for check in checks):
            return checks, None
        return checks, estimate(self.teacher, student, pool, plan=plan, objective=self.objective)

    def record(self) -> Recording:
        """Ask the teacher once; every seed learns from the same answers."""
        views = self.recipe.record.views if self.recipe.data.views is not None else None
        return record(
            featured(self.teacher, self.objective),
            self.data["pool"],
            self.folder / "recording",
            keep_of(self.recipe, self.base),
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
            start, plan = self.student(seed), plan_of(self.recipe, seed, len(pool))
            common: dict[str, Any] = {"plan": plan, "trackers": self.recipe.trackers, "progress": self.progress}
            folder = self.place("student", seed)
            trained["student"].append(fit(start, recording, pool, self.objective, folder=folder, **common))
            if self.recipe.alone is not None:
                objective, folder = objective_of(self.recipe.alone.objective, self.base), self.place("alone", seed)
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
            metrics_of(self.recipe, self.base),
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
    look_up(ready, base)
    if ready.threads is not None:
        torch.set_num_threads(ready.threads)
    place = Path(folder) if folder is not None else Path("runs") / ready.name
    run = Run(ready, place, base, progress, claim)
    if claim:
        _ = run.sources  # a file that is not there must not cost the folder
        keep_recipe(ready, place)
    return run

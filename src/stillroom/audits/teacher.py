"""audit teacher: does a student's likeness single out the teacher of a run among decoys of the teacher's recipe?

The order is the point: inputs, statistic, decoys and level are fixed and written down with their digest
(commitment.json); then teacher and decoys answer; then the student is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from stillroom.audits.making import Maker, maker_of, positive_of
from stillroom.audits.questions import declared_questions, described, fresh_questions, log_probs_of, name_of, right_of
from stillroom.data.table import Table
from stillroom.digests import json_digest
from stillroom.errors import DataError, UsageError
from stillroom.files import claim_folder, read_json, write_bytes, write_json
from stillroom.progress import bar
from stillroom.provenance.audit import (
    DECLARED,
    FRESH,
    MODES,
    Columns,
    Mode,
    Power,
    TeacherEvidence,
    fewest,
    floor_of,
    measured,
    over_candidates,
    teacher_test,
)
from stillroom.provenance.audit.decoys import answers_refusal
from stillroom.recording import open_recording
from stillroom.run import Run, open_run
from stillroom.students.networks import CONFIG, load_student
from stillroom.types import Model

COMMITMENT = "commitment.json"


@dataclass(frozen=True)
class Settings:
    """All that an audit decides before the student is asked."""

    mode: Mode = "soft"
    decoys: int = 39
    rows: int = 1000  # inputs of each set, where there are so many
    alpha: float = 0.05
    positives: int = 20  # self-made students, trained when nothing is rejected
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode {self.mode!r} is unknown; choose {' or '.join(MODES)}.")
        for name, least in (("decoys", 0), ("rows", 20), ("positives", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it is at least {least}.")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One run whose teacher is tested: who answers what, committed to before the student is asked."""

    run: Run
    folder: Path
    settings: Settings
    maker: Maker | None
    questions: dict[str, Table]
    scored: Table
    seeds: tuple[int, ...]

    def commitment(self) -> dict[str, Any]:
        """What is written down first; its digest goes into the result."""
        inputs = {name: described(table) for name, table in (*self.questions.items(), ("scored", self.scored))}
        fixed = {name: getattr(self.settings, name) for name in ("mode", "alpha", "seed")}
        return {
            "format": "stillroom-audit/1",
            "teacher": open_recording(self.run.folder / "recording", self.run.base).manifest["teacher"],
            "recipe": None if self.maker is None else self.maker.recipe,
            "seeds": list(self.seeds),
            "statistic": MODES[self.settings.mode],
            "inputs": inputs,
            **fixed,
        }

    def answered(self, model: Model) -> dict[str, np.ndarray]:
        """The answers to every set of inputs, and how many of the labelled ones are right."""
        found = {name: log_probs_of(model, table) for name, table in self.questions.items()}
        assert self.scored.labels is not None
        return found | {"right": np.array(right_of(log_probs_of(model, self.scored), self.scored.labels))}

    def decoy(self, seed: int) -> Model:
        """The decoy of a seed; trained once, opened afterwards where the recipe keeps its work."""
        assert self.maker is not None
        return self.maker.make(seed, self.folder / "decoys" / str(seed))

    def columns(self, progress: bool) -> Columns:
        """Teacher and decoys answer. What a decoy said is kept, so that an audit that was killed goes on."""
        recording = open_recording(self.run.folder / "recording", self.run.base)
        recording.check(self.run.teacher)  # the teacher as it was built here is the one that was asked
        said = [self.answered(self.run.teacher)]
        with bar("decoys", len(self.seeds), shown=progress) as step:
            for seed in self.seeds:
                said.append(self._kept(seed))
                step()
        recipe = "unknown" if self.maker is None else self.maker.recipe
        return Columns(
            teacher=recording.identity.name,
            answers={name: np.stack([each[name] for each in said]) for name in self.questions},
            recipes=(recipe,) * len(said),
            seeds=(-1 if self.maker is None else self.maker.seed, *self.seeds),
            right=np.array([int(each["right"]) for each in said]),
            scored=len(self.scored),
        )

    def _kept(self, seed: int) -> dict[str, np.ndarray]:
        place = self.folder / "answers" / f"{seed}.safetensors"
        if not place.exists():
            found = self.answered(self.decoy(seed))
            write_bytes(place, save({name: torch.from_numpy(np.atleast_1d(v)) for name, v in found.items()}))
        kept = {name: tensor.numpy() for name, tensor in load_file(place).items()}
        return kept | {"right": kept["right"][0]}

    def power(self, columns: Columns, progress: bool) -> Power:
        """The share of students made from decoys that the same test finds, each decoy as the candidate in its turn."""
        # accuracies are not looked at: a decoy of extreme accuracy is still a decoy
        level = dataclasses.replace(columns, right=np.zeros(columns.decoys + 1))
        led = [level.led_by(column) for column in range(1, columns.decoys + 1)]
        usable = [one for one in led if answers_refusal(one.answers) is None]
        found = []
        with bar("positives for the power", self.settings.positives, shown=progress) as step:
            for number in range(self.settings.positives):
                leading = usable[number % len(usable)]
                place = self.folder / "positives" / f"{number}-{self.settings.mode}"
                teacher = self.decoy(leading.seeds[0])
                made = positive_of(self.run, teacher, self.settings.mode, 1000 + number, place)
                answers = {name: log_probs_of(made.predict, table) for name, table in self.questions.items()}
                tested = teacher_test(answers, leading, self.settings.mode, alpha=self.settings.alpha, replicates=2)
                assert tested.p is not None
                found.append(tested.p)
                step()
        return measured(found, self.settings.alpha)


def candidate_of(run_folder: Path, folder: Path, settings: Settings) -> Candidate:
    """Fix what is asked of the teacher of a run. Raises DataError without labelled test rows."""
    run = open_run(run_folder, progress=False)
    if run.recipe.tokens is not None:
        raise UsageError(
            f"{run_folder} is a run of a language model: its answers are tested from Python "
            "(stillroom.provenance.audit takes arrays; benchmarks/audit_language.py does it)."
        )
    pool, test = run.data["pool"], run.data["test"]
    scored = test.labelled() if test.labels is not None and not test.labels.is_floating_point() else None
    if scored is None or len(scored) == 0:
        raise DataError(f"{run_folder}: the test rows have no class labels to compare the teachers' accuracies on.")
    questions = {
        DECLARED: declared_questions(pool, settings.rows, settings.seed),
        FRESH: fresh_questions(test, settings.rows, settings.seed),
    }
    maker = maker_of(run)
    seeds = () if maker is None else maker.seeds(settings.decoys, settings.seed)
    return Candidate(run, folder, settings, maker, questions, scored, seeds)


def audit_teachers(
    runs: Sequence[str | Path],
    folder: str | Path,
    student: str | Path | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> tuple[TeacherEvidence, ...]:
    """Test the teacher of each run against one student (default: that of the first run). Holm over the runs.

    ``folder`` keeps commitment.json, the decoys, their answers and result-STUDENT.json; another student of the same
    teacher is tested there with the same decoys; a folder of another audit is refused.
    Raises what ``teacher_test`` raises, PairError when the teacher is not the one that was recorded, FolderError.
    """
    settings, folder = settings or Settings(), Path(folder)
    place = Path(student) if student is not None else Path(runs[0]) / "student"
    student_name = name_of(place)
    candidates = []
    if 0 < settings.decoys < (needed := fewest(settings.alpha, len(runs))):
        raise UsageError(
            f"{settings.decoys} decoys can never reach {settings.alpha:g} over {len(runs)} candidate(s): p is at least "
            f"{floor_of(settings.decoys):.4f}. Make at least {needed} (stillroom audit power)."
        )
    for number, run in enumerate(runs):
        one = candidate_of(Path(run), folder / str(number), settings)
        claim_folder(one.folder, COMMITMENT, one.commitment(), "audit")
        one.folder.mkdir(parents=True, exist_ok=True)
        write_json(one.folder / COMMITMENT, one.commitment())
        candidates.append(one)
    asked = [(one, one.columns(progress)) for one in candidates]
    audited = load_student(place, candidates[0].run.base)  # only now
    found = []
    for one, columns in asked:
        answers = {name: log_probs_of(audited.predict, table) for name, table in one.questions.items()}
        commitment = read_json(one.folder / COMMITMENT)
        inputs = {**commitment["inputs"], "commitment": {"sha256": json_digest(commitment)}}
        tested = teacher_test(answers, columns, settings.mode, name=student_name, alpha=settings.alpha, inputs=inputs)
        found.append(dataclasses.replace(tested, caution=_shared_seed(place, one)))
    found = over_candidates(found)
    done = tuple(
        evidence if evidence.p is None or evidence.rejected else evidence.with_power(one.power(columns, progress))
        for evidence, (one, columns) in zip(found, asked, strict=True)
    )
    result = folder / f"result-{student_name.replace('/', '-')}.json"
    write_json(result, {"format": "stillroom-audit/1", "results": [evidence.as_json() for evidence in done]})
    return done


def _shared_seed(student: Path, candidate: Candidate) -> str | None:
    """A student that was trained under the teacher's own seed is not independent of it, whatever it learned from."""
    seed = (read_json(student / CONFIG).get("plan") or {}).get("seed")
    if candidate.maker is None or seed != candidate.maker.seed:
        return None
    return (
        f"student and teacher were both trained under seed {seed}, and the same order of data alone can make two "
        "trainings alike. Test a student of another seed"
    )

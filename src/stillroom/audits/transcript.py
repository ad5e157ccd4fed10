"""audit transcript: did a student learn from the very draws that a run recorded, or from others of the same teacher?

For runs that keep ``sampled`` draws: the teacher's answers are then one transcript of many that it could have given,
and fresh ones are drawn from the same distributions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillroom.audits.making import student_of
from stillroom.audits.questions import name_of
from stillroom.digests import json_digest
from stillroom.errors import SignalError, UsageError
from stillroom.files import claim_folder, write_json
from stillroom.progress import bar
from stillroom.provenance.audit import (
    TranscriptEvidence,
    deterministic,
    fewest,
    floor_of,
    measured,
    transcript_test,
)
from stillroom.recipes.parts import keep_of
from stillroom.recording import Recording, Sampled, open_recording, record
from stillroom.run import Run, open_run
from stillroom.students.networks import Student, load_student
from stillroom.types import Batch, Dense, Projected, Signal, Sparse, positions

COMMITMENT = "commitment.json"
LARGEST = 2**40
ROWS = 64


@dataclass(frozen=True)
class Settings:
    """All that the test decides before the student is asked."""

    fresh: int = 99
    alpha: float = 0.05
    positives: int = 10  # self-made students, trained when nothing is rejected
    seed: int = 0

    def __post_init__(self) -> None:
        needed = fewest(self.alpha)
        if self.fresh < needed:
            raise UsageError(
                f"{self.fresh} fresh transcripts give p >= {floor_of(max(self.fresh, 0)):.4f}, which can never reach "
                f"{self.alpha:g}. Draw at least {needed}."
            )
        for name, least in (("positives", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it is at least {least}.")


def audit_transcript(
    run_folder: str | Path,
    folder: str | Path,
    student: str | Path | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> TranscriptEvidence:
    """Test whether a student (default: the run's) learned from the run's recorded draws.

    Raises PairError when the run keeps answers that were not drawn at random, or its teacher is not the recorded one.
    """
    settings, folder = settings or Settings(), Path(folder)
    place = Path(student) if student is not None else Path(run_folder) / "student"
    student_name = name_of(place)
    run = open_run(run_folder, progress=False)
    recording = open_recording(run.folder / "recording", run.base)
    codec = next((one for one in keep_of(run.recipe, run.base) if isinstance(one, Sampled)), None)
    if codec is None:
        raise deterministic(f"the recording of {run.folder.name}")
    recording.check(run.teacher)
    commitment = {
        "format": "stillroom-audit/1",
        "transcript": json_digest(recording.manifest["shards"]),
        "draws": codec.n,
        **dataclasses.asdict(settings),
    }
    claim_folder(folder, COMMITMENT, commitment, "audit")
    write_json(folder / COMMITMENT, commitment)
    audited = load_student(place, run.base)  # only now
    declared, fresh = likelihoods(run, audited, recording, codec, settings, progress)
    found = transcript_test(
        declared,
        fresh,
        name=student_name,
        transcript=f"the draws recorded in {run.folder.name}",
        alpha=settings.alpha,
        inputs={"transcript": {"sha256": commitment["transcript"]}, "commitment": {"sha256": json_digest(commitment)}},
    )
    if not found.rejected:
        found = found.with_power(measured(_positives(run, folder, codec, settings, progress), settings.alpha))
    write_json(
        folder / f"result-{student_name.replace('/', '-')}.json",
        {"format": "stillroom-audit/1", "results": [found.as_json()]},
    )
    return found


def _positives(run: Run, folder: Path, codec: Sampled, settings: Settings, progress: bool) -> list[float]:
    """p of students that learned, by the run's recipe, from transcripts made for them."""
    found = []
    views = run.recipe.record.views if run.recipe.data.views is not None else None
    for number in range(settings.positives):
        place = folder / "positives" / str(number)
        own = dataclasses.replace(codec, seed=(codec.seed + 1 + number) % LARGEST)
        drawn = record(run.teacher, run.data["pool"], place / "recording", own, views=views, progress=False)
        made = student_of(run, drawn, 1000 + number, place / "student")
        found.append(transcript_test(*likelihoods(run, made, drawn, own, settings, progress), alpha=settings.alpha).p)
    return found


def likelihoods(
    run: Run, student: Student, recording: Recording, codec: Sampled, settings: Settings, progress: bool
) -> tuple[float, np.ndarray]:
    """L(y) of the recorded draws and L(y_k) [K] of fresh ones, in nats, over all examples and recorded views.

    The K fresh transcripts are drawn at once: the draws of a position are independent, so n K of them are K
    transcripts of n.
    """
    pool, total = run.data["pool"], np.zeros(settings.fresh + 1)
    seed = int(json_digest([codec.seed, settings.seed, "fresh"])[:10], 16)
    every = Sampled(codec.n * settings.fresh, seed=seed)
    with bar("transcripts", len(recording), shown=progress) as step:
        for view in recording.views or (None,):
            for start in range(0, len(pool), ROWS):
                rows = range(start, min(start + ROWS, len(pool)))
                batch = pool.batch(rows, None if view is None else [view] * len(rows))
                total += _batch_likelihoods(run, student, recording, batch, every, settings.fresh)
                step(len(rows))
    return float(total[0]), total[1:]


@torch.no_grad()
def _batch_likelihoods(
    run: Run, student: Student, recording: Recording, batch: Batch, every: Sampled, fresh: int
) -> np.ndarray:
    """[1 + K] sums over one batch: the recorded draws first."""
    said = _log_probs(student.predict(batch))
    recorded = recording(batch).need_logits("a transcript")
    if not isinstance(recorded, Sparse) or not recorded.sampled:
        raise SignalError(f"the recording gives {type(recorded).__name__}, not draws.")
    keys = list(zip(batch.ids, batch.views or (-1,) * len(batch), strict=True))
    kept = every.encode(run.teacher(batch), keys)
    drawn = every.decode(kept.rows, kept.facts).need_logits("a transcript")
    assert isinstance(drawn, Sparse)
    counted = positions(batch, said.shape[:-1], said.device)

    def each(ids: Tensor) -> Tensor:
        return said.gather(-1, ids.long())[counted]  # [positions, draws]

    declared = each(recorded.ids).sum().reshape(1)
    others = each(drawn.ids)
    return torch.cat([declared, others.reshape(len(others), fresh, -1).sum((0, 2))]).numpy()


def _log_probs(signal: Signal) -> Tensor:
    logits = signal.need_logits("a transcript's likelihood")
    if isinstance(logits, Projected):
        logits = Dense(logits.compute())
    if not isinstance(logits, Dense):
        raise SignalError(f"a likelihood needs all log-probabilities; the student gives {type(logits).__name__}.")
    return logits.values.double().log_softmax(-1).cpu()

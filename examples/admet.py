"""ADMET-AI teaches a small network: molecules, the teacher in an environment of its own, the student, what is measured.

ADMET-AI (Swanson et al. 2024) predicts absorption, distribution, metabolism, excretion and toxicity: 31 probabilities
and 10 numbers, each the mean of five networks. Its packages cannot share ours, so it is asked apart (stillroom.apart).
Agreement with it is agreement with a model, not with an experiment.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import rdkit
import torch
from torch import Tensor, nn

from stillroom import Batch, Identity, Signal, Table
from stillroom.apart import Asked, python_apart
from stillroom.errors import DataError, UsageError
from stillroom.measures.columns import distance, explained, same_side
from stillroom.students.rdkit import canonical, heavy_atoms, scaffold

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "admet-requirements.txt"
PROBABILITIES, NUMBERS = 31, 10
LEAST, MOST = 3, 80  # heavy atoms: drugs, not ions and not proteins
SURE = 1e-6  # probabilities nearer to 0 or 1 are taken for this: log-odds of at most 13.8
SHIPPED = {  # molecules that come with RDKit: file, column of the SMILES, what separates columns, lines of heading
    "Data/Pains/test_data/wehi_mols.csv": (0, ",", 0),
    "Data/NCI/first_5K.smi": (0, "\t", 0),
    "Contrib/NIBRSubstructureFilters/SubstructureFilter_HitTriaging_wPubChemExamples.csv": (slice(13, None, 2), ",", 1),
    "Contrib/FreeWilson/data/CHEMBL2321810.smi": (0, " ", 0),
    "Contrib/Fastcluster/cdk2.smi": (1, "\t", 0),
    "Contrib/fraggle/data/ChEMBL_11265_actives.smi": (0, " ", 0),
    "Contrib/SA_Score/data/zim.100.txt": (0, "\t", 1),
    "Contrib/mmpa/data/sample.smi": (0, " ", 0),
}

# What is measured against the teacher. Of "explained", 1 is the teacher itself and 0 its mean answer.
agreement = explained("explained", PROBABILITIES)
of_probabilities = explained("explained_probabilities", PROBABILITIES, 0, PROBABILITIES)
of_numbers = explained("explained_numbers", PROBABILITIES, PROBABILITIES)
off_by = distance("probability_distance", PROBABILITIES, 0, PROBABILITIES)
same_answer = same_side("same_side", PROBABILITIES)


def molecules(part: Literal["train", "test"], most: int | None = None) -> Table:
    """'test': DrugBank's approved list, which ADMET-AI ships. 'train': RDKit's molecules without its scaffolds.

    Bemis-Murcko scaffolds; molecules without rings share the empty one, so none of them is trained on. No labels:
    nothing here was measured. ``most``: the first so many, in an order that follows from the molecules alone.
    """
    if part not in ("train", "test"):
        raise UsageError(f"part {part!r} is unknown: choose train or test.")
    chosen = list(_tested() if part == "test" else _trained())[:most]
    if not chosen:
        raise DataError(f"there are no molecules of part {part!r}: does RDKit come with its Data and Contrib folders?")
    about = {
        "train": ("RDKit's molecules", "BSD-3-Clause", f"rdkit {rdkit.__version__}, Data and Contrib"),
        "test": (
            "DrugBank approved",
            "unknown",
            "admet-ai 2.0.1, drugbank_approved.csv (from DrugBank; its terms hold)",
        ),
    }[part]
    return Table({"smiles": tuple(chosen)}, ids=tuple(chosen), name=about[0], licence=about[1], source=about[2])


@cache
def _tested() -> tuple[str, ...]:
    (path,) = (
        python_apart(REQUIREMENTS).parents[1].glob("lib/*/site-packages/admet_ai/resources/data/drugbank_approved.csv")
    )
    with open(path, newline="", encoding="utf8") as file:
        return tuple(_usable(row["smiles"] for row in csv.DictReader(file)))


@cache
def _trained() -> tuple[str, ...]:
    seen, scaffolds = set(_tested()), {scaffold(one) for one in _tested()}
    return tuple(one for one in _usable(_shipped()) if one not in seen and scaffold(one) not in scaffolds)


def _shipped() -> Iterator[str]:
    """Every SMILES that RDKit's wheel brings."""
    for name, (column, separator, heading) in SHIPPED.items():
        with open(Path(rdkit.__file__).parent / name, newline="", encoding="utf8", errors="replace") as file:
            for row in list(csv.reader(file, delimiter=separator))[heading:]:
                found = row[column] if row else []
                yield from [found] if isinstance(found, str) else filter(None, found)


def _usable(smiles: Iterator[str]) -> list[str]:
    """Canonical, once each, of a drug's size; shuffled by their own digest."""
    from stillroom.digests import key_hash

    found = {one for each in smiles if (one := canonical(each)) is not None and LEAST <= heavy_atoms(one) <= MOST}
    return sorted(found, key=lambda one: key_hash(one, 0))


@dataclass(frozen=True, eq=False)
class AdmetAI:
    """The ensemble, a Model. values [B, 41]: log-odds of the 31 mean probabilities, then the 10 mean numbers.

    parts: the five members ('0' to '4'), each in the same form, where ``members``.
    """

    asked: Asked
    identity: Identity
    properties: tuple[str, ...]
    bytes: int
    parameters_count: int
    members: bool = False
    chosen: tuple[int, ...] = field(default=(0, 1, 2, 3, 4))  # whose mean it answers with

    def __call__(self, batch: Batch) -> Signal:
        said = self.asked.ask({"smiles": list(batch.inputs["smiles"])})["members"]
        each = torch.tensor(said, dtype=torch.float64)[list(self.chosen)]
        parts = {str(n): Signal(values=_log_odds(one)) for n, one in zip(self.chosen, each, strict=True)}
        return Signal(values=_log_odds(each.mean(0)), parts=parts if self.members else {})


def _log_odds(answers: Tensor) -> Tensor:
    """[B, 41] with the probabilities as log-odds, float32."""
    probabilities = answers[:, :PROBABILITIES].clamp(SURE, 1 - SURE)
    return torch.cat([probabilities.logit(), answers[:, PROBABILITIES:]], -1).float()


def teacher(members: bool = False, progress: bool = True) -> AdmetAI:
    """ADMET-AI 2.0.1, asked apart: its environment is made once (minutes), and it is loaded when it is first asked."""
    asked = Asked(python_apart(REQUIREMENTS, progress=progress), HERE / "admet_teacher.py")
    about = asked.ask({"about": True})
    assert about["probabilities"] == PROBABILITIES
    assert len(about["properties"]) == PROBABILITIES + NUMBERS
    known: dict[str, Any] = {
        "name": "ADMET-AI 2.0.1",
        "licence": "MIT",
        "source": "package admet-ai 2.0.1",
        "kind": "ensemble",
    }
    return AdmetAI(
        asked,
        Identity(digest=about["digest"], **known),
        tuple(about["properties"]),
        about["bytes"],
        about["parameters"],
        members,
    )


class MoleculeNet(nn.Module):
    """Fingerprint [B, inputs] -> [B, 41]: log-odds, then numbers in their units (centre + scale * what it learned)."""

    def __init__(self, inputs: int, hidden: int, centres: Sequence[float], scales: Sequence[float], dropout: float):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.answer = nn.Linear(hidden, PROBABILITIES + len(scales))
        self.register_buffer("centres", torch.tensor([0.0] * PROBABILITIES + list(centres)))
        self.register_buffer("scales", torch.tensor([1.0] * PROBABILITIES + list(scales)))

    def forward(self, x: Tensor) -> Tensor:
        return self.centres + self.scales * self.answer(self.body(x))


def student(
    inputs: int, centres: Sequence[float], scales: Sequence[float], hidden: int = 256, dropout: float = 0.2
) -> nn.Module:
    """``centres`` and ``scales``: mean and standard deviation of the teacher's numbers on the training molecules."""
    if len(centres) != NUMBERS or len(scales) != NUMBERS or not all(map(math.isfinite, (*centres, *scales))):
        raise UsageError(f"give {NUMBERS} finite centres and scales, not {len(centres)} and {len(scales)}.")
    return MoleculeNet(inputs, hidden, centres, scales, dropout)

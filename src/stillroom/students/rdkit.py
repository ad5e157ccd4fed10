"""Molecules for a network: SMILES -> fingerprints and descriptors, by RDKit. The library is only here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import DataError, UsageError, missing_extra, nearest
from stillroom.network import Adapter
from stillroom.types import Column

try:
    from rdkit import Chem, rdBase
    from rdkit.Chem import Crippen, Descriptors, rdFingerprintGenerator, rdMolDescriptors
    from rdkit.Chem.Scaffolds import MurckoScaffold
except ImportError as error:
    raise missing_extra("rdkit", "molecules") from error

descriptors: Any = Descriptors  # made when it is imported: no types
crippen: Any = Crippen

# name, function, and what is about 1 of it in a drug: a network's inputs are of like size
DESCRIPTORS: tuple[tuple[str, Any, float], ...] = (
    ("weight", descriptors.MolWt, 400.0),
    ("logp", crippen.MolLogP, 3.0),
    ("refractivity", crippen.MolMR, 100.0),
    ("polar surface", rdMolDescriptors.CalcTPSA, 80.0),
    ("acceptors", rdMolDescriptors.CalcNumHBA, 5.0),
    ("donors", rdMolDescriptors.CalcNumHBD, 3.0),
    ("rotatable bonds", rdMolDescriptors.CalcNumRotatableBonds, 5.0),
    ("rings", rdMolDescriptors.CalcNumRings, 3.0),
    ("aromatic rings", rdMolDescriptors.CalcNumAromaticRings, 2.0),
    ("sp3 carbons", rdMolDescriptors.CalcFractionCSP3, 0.5),
    ("stereo centres", rdMolDescriptors.CalcNumAtomStereoCenters, 3.0),
    ("charge", Chem.GetFormalCharge, 1.0),
)


@dataclass(frozen=True)
class Fingerprints:
    """The adapter from a column of SMILES to numbers, float32 [B, bits + 12].

    Morgan counts of ``radius`` folded into ``bits`` (Rogers & Hahn 2010), as log(1 + count); then DESCRIPTORS, each
    over what is usual of it; ``descriptors=False`` leaves those out. Raises DataError for what RDKit cannot read.
    """

    bits: int = 2048
    radius: int = 2
    descriptors: bool = True
    column: str = "smiles"

    def __post_init__(self) -> None:
        if self.bits < 1 or self.radius < 0:
            raise UsageError(f"bits={self.bits} must be above 0, and radius={self.radius} not below 0.")

    @property
    def size(self) -> int:
        """How many numbers a molecule becomes."""
        return self.bits + (len(DESCRIPTORS) if self.descriptors else 0)

    @cached_property
    def _morgan(self) -> Any:
        return rdFingerprintGenerator.GetMorganGenerator(radius=self.radius, fpSize=self.bits)

    def row(self, smiles: str) -> np.ndarray:
        """The numbers of one molecule, float32 [size]."""
        molecule = read_molecule(smiles)
        counts = np.log1p(self._morgan.GetCountFingerprintAsNumPy(molecule).astype(np.float32))
        if not self.descriptors:
            return counts
        about = np.array([function(molecule) / usual for _, function, usual in DESCRIPTORS], dtype=np.float32)
        return np.concatenate([counts, about])

    def _texts(self, inputs: Mapping[str, Column]) -> tuple[str, ...]:
        found = inputs.get(self.column)
        if found is None or isinstance(found, Tensor):
            raise DataError(f"there is no column of SMILES {self.column!r}{nearest(self.column, inputs)}")
        return found

    def __call__(self, inputs: Mapping[str, Column]) -> tuple[Tensor, ...]:
        rows = [self.row(smiles) for smiles in self._texts(inputs)]
        return (torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, self.size),)

    def remembering(self) -> Adapter:
        """The same, keeping what it found: for training, where molecules come again. This one is left as it is."""
        seen: dict[str, np.ndarray] = {}

        def row(smiles: str) -> np.ndarray:
            if smiles not in seen:
                seen[smiles] = self.row(smiles).astype(np.float16)
            return seen[smiles]

        def adapt(inputs: Mapping[str, Column]) -> tuple[Tensor, ...]:
            rows = [row(smiles) for smiles in self._texts(inputs)]
            return (torch.from_numpy(np.stack(rows)).float() if rows else torch.empty(0, self.size),)

        return adapt


def read_molecule(smiles: str) -> Any:
    """RDKit's molecule. Raises DataError, with the SMILES, for what is none."""
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise DataError(f"{smiles!r} is no molecule that RDKit can read (SMILES). Mend the row, or leave it out.")
    return molecule


def canonical(smiles: str) -> str | None:
    """RDKit's canonical SMILES, equal for equal molecules however they were written; None for what is no molecule."""
    try:
        return Chem.MolToSmiles(read_molecule(smiles))
    except DataError:
        return None


def scaffold(smiles: str) -> str:
    """The Bemis-Murcko scaffold (rings and what links them) as SMILES; '' for a molecule without rings."""
    return MurckoScaffold.MurckoScaffoldSmiles(mol=read_molecule(smiles))


def heavy_atoms(smiles: str) -> int:
    """How many atoms are not hydrogen."""
    return read_molecule(smiles).GetNumHeavyAtoms()

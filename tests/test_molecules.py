"""Molecules for a network: the same molecule is the same row however it is written."""

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")

from stillroom import settings
from stillroom.errors import DataError, UsageError
from stillroom.students.rdkit import DESCRIPTORS, Fingerprints, canonical, heavy_atoms, scaffold

ASPIRIN = ("CC(=O)Oc1ccccc1C(=O)O", "O=C(C)Oc1ccccc1C(O)=O")


def test_a_molecule_is_its_row_however_it_is_written():
    rows = Fingerprints(bits=512)({"smiles": (*ASPIRIN, "CCO")})[0]
    assert rows.shape == (3, 512 + len(DESCRIPTORS))
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert canonical(ASPIRIN[0]) == canonical(ASPIRIN[1])


def test_counts_and_descriptors_by_hand():
    """Ethanol at radius 0 is three atoms of three kinds: log 2 at three places; propane has a kind twice: log 3."""
    counts = Fingerprints(bits=4096, radius=0, descriptors=False)
    ethanol, propane = counts.row("CCO"), counts.row("CCC")
    np.testing.assert_allclose(sorted(ethanol[ethanol > 0]), [np.log(2)] * 3, rtol=1e-6)
    np.testing.assert_allclose(sorted(propane[propane > 0]), [np.log(2), np.log(3)], rtol=1e-6)
    about = dict(zip([name for name, _, _ in DESCRIPTORS], Fingerprints(bits=1).row("CCO")[1:], strict=True))
    assert about["weight"] == pytest.approx(46.069 / 400, abs=1e-4)
    assert (about["acceptors"], about["donors"], about["rings"]) == (pytest.approx(0.2), pytest.approx(1 / 3), 0)


def test_what_is_remembered_is_the_same_to_half_precision():
    plain = Fingerprints(bits=64)
    inputs = {"smiles": ASPIRIN}
    remembering = plain.remembering()
    for _ in range(2):
        torch.testing.assert_close(remembering(inputs)[0], plain(inputs)[0], atol=1e-3, rtol=1e-3)


def test_it_is_written_down_and_read_back():
    made = Fingerprints(bits=128, radius=3, descriptors=False, column="molecule")
    assert settings.rebuild(settings.describe(made)) == made
    assert made.size == 128


@pytest.mark.parametrize("wrong", ["not a molecule", "", "c1ccc"])
def test_what_is_no_molecule_is_named(wrong):
    with pytest.raises(DataError, match="is no molecule"):
        Fingerprints()({"smiles": (wrong,)})
    assert canonical(wrong) is None


def test_columns_and_settings_are_checked():
    with pytest.raises(DataError, match="did you mean 'smiles_'"):
        Fingerprints()({"smiles_": ("CCO",)})
    with pytest.raises(UsageError, match="bits=0"):
        Fingerprints(bits=0)


def test_scaffolds():
    """Rings and what links them; a molecule without rings has none."""
    assert scaffold(ASPIRIN[0]) == "c1ccccc1"
    assert scaffold("Cc1ccc(CCc2ccncc2)cc1") == "c1ccc(CCc2ccncc2)cc1"
    assert scaffold("CCO") == ""
    assert heavy_atoms(ASPIRIN[0]) == 13

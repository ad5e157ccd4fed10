"""The two teachers of the examples that can only be asked: magika about files, ADMET-AI (apart) about molecules."""

import sys
from pathlib import Path

import pytest
import torch

from stillroom.types import Batch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def file_types(monkeypatch):
    pytest.importorskip("magika")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import file_types

    return file_types


def written(tmp_path):
    """Small real files: with white space around them, shorter and longer than what the model sees, text and not."""
    contents = {
        "a.py": b"\n\n  import sys\n\n\ndef f(x):\n    return x + 1\n\n\nprint(f(1))\n   \n",
        "long.c": b"#include <stdio.h>\n" + b"int f(int a) { return a + 1; }\n" * 400,
        "own.py": Path(__file__).read_bytes(),
        "page.html": b"<!DOCTYPE html>\n<html><body><p>hello</p></body></html>\n" * 3,
        "bytes": bytes(range(256)) * 30,
        "spaced": b" " * 3000 + b"#!/bin/sh\necho hello\n" + b"\n" * 3000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


def test_the_student_sees_what_magika_sees(file_types, tmp_path):
    """Features are those of the package's own code, to the byte; what it would not ask its model about is left out."""
    from magika import Magika
    from magika.types import Seekable

    for path in written(tmp_path):
        with open(path, "rb") as file:
            theirs = Magika._extract_features_from_seekable(Seekable(file), 1024, 0, 1024, 256, 4096, False)
        assert file_types.features(path.read_bytes()).tolist() == [*theirs.beg, *theirs.end], path.name
    assert file_types.features(b"short") is None
    assert file_types.features(b" " * 5000) is None


def test_magika_as_a_teacher_is_magika(file_types, tmp_path):
    """The same class and score as the package's own answer; what is no class of ours is in the last one."""
    from magika import Magika

    paths = [path for path in written(tmp_path) if path.name != "spaced"]
    rows = torch.stack([file_types.features(path.read_bytes()) for path in paths])
    teacher = file_types.magika(["c", "html", "python", "other"])
    found = teacher(Batch(tuple(map(str, paths)), {"bytes": rows})).logits.values.exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(len(paths)))
    for path, said in zip(paths, found, strict=True):
        own = Magika().identify_path(path).prediction
        place = {"c": 0, "html": 1, "python": 2}.get(str(own.dl.label), 3)
        assert int(said.argmax()) == place, path.name
        if place < 3:
            assert float(said[place]) == pytest.approx(own.score, abs=1e-4)
    assert (teacher.bytes, teacher.parameters_count) == (3163737, 784223)
    assert teacher.identity.licence == "Apache-2.0"


def test_a_student_of_bytes_sees_where_they_stand(file_types):
    """A magic number counts at its place: the same bytes in another order give another answer."""
    torch.manual_seed(0)
    net = file_types.GramNet(5).eval()
    row = torch.randint(0, 257, (1, 2048), dtype=torch.int16)
    turned = row.clone()
    turned[:, :8] = row[:, :8].flip(1)
    assert net(row).shape == (1, 5)
    assert not torch.allclose(net(row), net(turned))
    middle = row.clone()
    middle[:, 900:1500] = 256  # neither head nor tail
    assert torch.equal(net(row), net(middle))


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_admet_answers_as_it_was_published(monkeypatch):
    """Its own environment is made on demand; DrugBank's molecules get the answers that the package ships for them.

    65 molecules: chemprop's own loader leaves out a last batch of one.
    """
    pytest.importorskip("rdkit")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import csv

    import admet

    teacher = admet.teacher(members=True, progress=False)
    (path,) = admet.python_apart(admet.REQUIREMENTS).parents[1].glob("**/resources/data/drugbank_approved.csv")
    with open(path, newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))[:65]
    asked = tuple(row["smiles"] for row in rows)
    said = teacher(Batch(tuple(map(str, range(65))), {"smiles": asked}))
    expected = torch.tensor([[float(row[name]) for name in teacher.properties] for row in rows])
    found = torch.cat([said.values[:, :31].sigmoid(), said.values[:, 31:]], -1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert set(said.parts) == set("01234")
    mean = torch.stack([part.values for part in said.parts.values()])[..., 31:].mean(0)
    torch.testing.assert_close(mean, said.values[:, 31:], atol=1e-3, rtol=1e-4)
    assert teacher.parameters_count == 3241705
    # no scaffold of the test is trained on, and no molecule twice
    train, test = admet.molecules("train", 300), admet.molecules("test", 100)
    assert not set(train.ids) & set(test.ids)
    scaffolds = {admet.scaffold(one) for one in admet.molecules("test").column("smiles")}
    assert not {admet.scaffold(one) for one in train.column("smiles")} & scaffolds
    teacher.asked.close()

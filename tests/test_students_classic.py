"""The classical comparison models."""

import numpy as np
import pytest
import torch

from stillroom.data import Table
from stillroom.errors import DataError
from stillroom.students.classic import linear, tfidf_svm

GRAIN = ("wheat corn price", "wheat harvest", "corn exports rise", "grain wheat")
SHIPS = ("ship port strike", "port cargo", "ship in port", "cargo vessel ship")


def texts(labels=(0, 0, 0, 0, 2, 2, 2, 2)):
    return Table(
        {"text": GRAIN + SHIPS}, tuple(f"r{i}" for i in range(8)), torch.tensor(labels), ("grain", "money", "ship")
    )


def test_svm_learns_and_a_class_never_seen_is_last_but_finite():
    model = tfidf_svm(texts())
    scores = model(texts().batch(range(8))).need_logits().values
    assert scores.argmax(1).tolist() == [0] * 4 + [2] * 4
    torch.testing.assert_close(scores[:, 1], scores[:, [0, 2]].amin(1) - 10)
    assert model.scores_are_probabilities is False
    assert model.identity.classes == ("grain", "money", "ship")


def test_cost_by_hand():
    model = tfidf_svm(texts(), pairs=False)
    words = {word for text in GRAIN + SHIPS for word in text.split()}
    assert model.parameters_count == 2 * len(words) + 2 + len(words)
    assert model.bytes == 4 * model.parameters_count + sum(len(word) + 1 for word in words)


def test_only_labelled_rows_are_fitted():
    """A different text on an unlabelled row leaves the model as it was."""
    labels = (0, 0, 0, -100, 2, 2, 2, -100)
    other = texts(labels)
    changed = Table({"text": (*GRAIN[:3], "zzz", *SHIPS[:3], "qqq")}, other.ids, other.labels, other.classes)
    assert tfidf_svm(other).identity.digest == tfidf_svm(changed).identity.digest
    assert tfidf_svm(other).identity.digest != tfidf_svm(texts()).identity.digest


def test_linear_folds_its_standardisation():
    generator = np.random.default_rng(0)
    x = torch.tensor(generator.normal(5, [1, 20, 300], (90, 3)), dtype=torch.float32)
    labels = (x[:, 1] > -5).long() + (x[:, 1] > 15).long()
    data = Table({"x": x}, tuple(map(str, range(90))), labels, ("a", "b", "c"))
    model = linear(data, strength=1e4)
    logits = model(data.batch(range(90))).need_logits().values
    assert (logits.argmax(1) == labels).float().mean() > 0.9
    assert model.parameters_count == 12
    assert model.bytes == 48


def test_what_cannot_be_fitted_is_refused():
    data = texts()
    with pytest.raises(DataError, match="tfidf_svm"):
        linear(data, "text")
    with pytest.raises(DataError, match="did you mean 'text'"):
        tfidf_svm(data, "texts")
    with pytest.raises(DataError, match="none of the 8"):
        tfidf_svm(data.without_labels())
    with pytest.raises(DataError, match="all 8 labelled examples are of class 'grain'"):
        tfidf_svm(texts((0,) * 8))
    with pytest.raises(DataError, match="r1"):
        linear(Table({"x": torch.tensor([[1.0], [float("nan")]])}, ("r0", "r1"), torch.tensor([0, 1])))

"""The cheap classical choices that a distilled student must be compared with. scikit-learn is imported only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import json_digest, state_digest
from stillroom.errors import DataError, missing_extra, nearest
from stillroom.labels import class_labels, labelled_batch
from stillroom.types import Batch, Column, Dense, Examples, Identity, Signal

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC
except ImportError as error:
    raise missing_extra("scikit-learn", "classic") from error

NEVER_SEEN = 10.0


@dataclass(frozen=True, eq=False)
class Classic:
    """A fitted linear model over ``features(column)``, a Model. ``scores_are_probabilities``: the logits are log-odds.

    ``weights`` [K, F] and ``bias`` [K] of the classes ``seen`` in labelled rows, as indices into ``identity.classes``;
    a class that was never seen scores 10 below the lowest of them: last, but finite. ``bytes``: float32 weights, and
    what the features need (idf weights and the vocabulary's text).
    """

    features: Callable[[Column], Any]  # a column -> [B, F], dense or sparse
    weights: np.ndarray
    bias: np.ndarray
    seen: np.ndarray
    column: str
    identity: Identity
    scores_are_probabilities: bool
    parameters_count: int
    bytes: int

    def __call__(self, batch: Batch) -> Signal:
        found = np.asarray(self.features(_column(batch.inputs, self.column)) @ self.weights.T + self.bias)
        scores = np.repeat(found.min(axis=1, keepdims=True) - NEVER_SEEN, len(self.identity.classes or ()), axis=1)
        scores[:, self.seen] = found
        return Signal(logits=Dense(torch.from_numpy(scores.astype(np.float32))))


def tfidf_svm(
    examples: Examples, column: str = "text", *, words: int = 50_000, pairs: bool = False, strength: float = 1.0
) -> Classic:
    """TF-IDF of words and a linear SVM, fitted on the labelled rows. Its scores are not probabilities.

    ``pairs``: also count pairs of words (with few labels, that is worse).
    ``words``: the most frequent features that are kept; ``strength``: the SVM's C.
    """
    batch, labels, classes = _labelled(examples)
    texts = _column(batch.inputs, column)
    if isinstance(texts, Tensor):
        raise DataError(f"column {column!r} holds tensors, not text. Use linear(examples, {column!r}).")
    vectors = TfidfVectorizer(sublinear_tf=True, max_features=words, ngram_range=(1, 2 if pairs else 1))
    machine = LinearSVC(C=strength, random_state=0, max_iter=10_000).fit(vectors.fit_transform(texts), labels)
    weights, bias = _one_row_per_class(machine)
    terms = sorted(vectors.vocabulary_, key=vectors.vocabulary_.__getitem__)
    state = {"weights": weights, "bias": bias, "idf": vectors.idf_}
    return Classic(
        features=vectors.transform,
        weights=weights,
        bias=bias,
        seen=machine.classes_,
        column=column,
        identity=_identity("TF-IDF + linear SVM", state, classes, terms),
        scores_are_probabilities=False,
        parameters_count=weights.size + bias.size + len(terms),
        bytes=4 * (weights.size + bias.size + len(terms)) + sum(len(term.encode()) + 1 for term in terms),
    )


def linear(examples: Examples, column: str = "x", *, strength: float = 1.0) -> Classic:
    """Logistic regression on a tensor column [N, ...], standardised, fitted on the labelled rows. Gives probabilities.

    The standardisation is folded into the weights. ``strength``: the regression's C. Raises DataError for text and
    for values that are not finite.
    """
    batch, labels, classes = _labelled(examples)
    values = _column(batch.inputs, column)
    if not isinstance(values, Tensor):
        raise DataError(f"column {column!r} holds text. Use tfidf_svm(examples, {column!r}).")
    rows = _flat(values)
    if not np.isfinite(rows).all():
        bad = batch.ids[int(np.argwhere(~np.isfinite(rows))[0][0])]
        raise DataError(f"column {column!r} of example {bad!r} is not finite. Fill or drop missing values first.")
    scaler = StandardScaler().fit(rows)
    machine = LogisticRegression(C=strength, max_iter=5000).fit(scaler.transform(rows), labels)
    weights, bias = _one_row_per_class(machine)
    weights = weights / np.asarray(scaler.scale_)
    bias = bias - weights @ np.asarray(scaler.mean_)
    return Classic(
        features=_flat,
        weights=weights,
        bias=bias,
        seen=machine.classes_,
        column=column,
        identity=_identity("logistic regression", {"weights": weights, "bias": bias}, classes, []),
        scores_are_probabilities=True,
        parameters_count=weights.size + bias.size,
        bytes=4 * (weights.size + bias.size),
    )


def _labelled(examples: Examples) -> tuple[Batch, np.ndarray, tuple[str, ...]]:
    batch = labelled_batch(examples)
    labels, classes = class_labels(batch, getattr(examples, "classes", None))
    return batch, labels.numpy(), classes


def _one_row_per_class(machine: Any) -> tuple[np.ndarray, np.ndarray]:
    weights, bias = np.asarray(machine.coef_, dtype=np.float64), np.asarray(machine.intercept_, dtype=np.float64)
    if len(weights) > 1:
        return weights, bias
    # two classes: scikit-learn keeps one score s; (-s/2, s/2) has the same log-odds
    return np.stack([-weights[0], weights[0]]) / 2, np.array([-bias[0], bias[0]]) / 2


def _identity(name: str, state: Mapping[str, np.ndarray], classes: tuple[str, ...], terms: list[str]) -> Identity:
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
    digest = json_digest({"state": state_digest(tensors), "terms": terms})
    return Identity(name, digest, kind="classic", licence="unknown", source="fitted here", classes=classes)


def _column(inputs: Mapping[str, Column], name: str) -> Column:
    if name not in inputs:
        raise DataError(f"there is no column {name!r}{nearest(name, inputs)}")
    return inputs[name]


def _flat(values: Column) -> np.ndarray:
    assert isinstance(values, Tensor)
    return values.reshape(len(values), -1).double().numpy()

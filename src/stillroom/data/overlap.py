"""Texts that stand on both sides: evaluation documents that share a run of n words, or tokens, with training documents.

n = 13 words after Brown et al. 2020 (GPT-3, arXiv 2005.14165), appendix C. The evaluation documents are held in memory,
the training documents only pass by, so these may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.data.tokens import Packed
from stillroom.errors import DataError, PairError, UsageError
from stillroom.progress import bar
from stillroom.types import UNLABELLED

WORDS = 13
TOKENS = 18  # about 13 words of English
SHORTEST = 8  # a shorter document is not judged: a few words stand everywhere
SHOWN = 10  # examples
_ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplying by an odd number loses nothing modulo 2^64
_WORD = re.compile(r"\w+")

Documents = Iterable[str | tuple[str, str]] | Packed
Read = Iterator[tuple[str, np.ndarray, Sequence[Any]]]  # id, one uint64 for each word or token, the words or ids


@dataclass(frozen=True)
class Shared:
    """One run of words that stands on both sides."""

    evaluation: str  # ids
    training: str
    text: str


@dataclass(frozen=True)
class Overlap:
    """How many evaluation documents have n words (or tokens) in a row that a training document has too."""

    n: int
    unit: str  # words or tokens
    documents: int  # evaluation documents that were judged
    found: int  # of them, those with a shared run
    too_short: int  # documents of fewer than SHORTEST words or tokens, not judged
    training: int  # training documents that were read
    examples: tuple[Shared, ...]  # at most SHOWN of those found, in the order of training

    @property
    def share(self) -> float:
        """Of the judged documents, from 0 to 1."""
        return self.found / self.documents if self.documents else 0.0

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {**dataclasses.asdict(self), "examples": [dataclasses.asdict(e) for e in self.examples]}


def overlap(
    training: Documents,
    evaluation: Documents,
    n: int | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = False,
) -> Overlap:
    """Evaluation documents with a run of ``n`` words that is in a training document, case and punctuation aside.

    Documents: texts or (id, text) pairs, 13 words; or Packed on both sides, 18 tokens (``tokenizer`` shows them as
    text). A document shorter than n, but of SHORTEST or more, counts when all of it stands in a training document.

    Raises DataError without evaluation documents, PairError for Packed of different tokenizers, UsageError for an n
    below SHORTEST, or texts on one side and tokens on the other.
    """
    packed = isinstance(training, Packed), isinstance(evaluation, Packed)
    if packed[0] != packed[1]:
        raise UsageError("one side is texts, the other tokens. Give both as texts, or both packed.")
    n = n or (TOKENS if packed[0] else WORDS)
    if n < SHORTEST:
        raise UsageError(f"n={n} cannot be used: runs of fewer than {SHORTEST} words stand everywhere.")
    if isinstance(training, Packed) and isinstance(evaluation, Packed):
        if training.tokenizer != evaluation.tokenizer:
            raise PairError(
                f"training tokens are of tokenizer {training.tokenizer}, evaluation tokens of {evaluation.tokenizer}: "
                "their ids do not compare. Compare the texts."
            )
        wanted = _Wanted(_of_tokens(evaluation), n, tokenizer)
        read = _of_tokens(training)
    else:
        wanted = _Wanted(_of_texts(evaluation), n, None)  # type: ignore[arg-type]
        read = _of_texts(training)  # type: ignore[arg-type]
    count = 0
    with bar("overlap", 0, shown=progress) as step:
        for name, sequence, _ in read:
            wanted.look(name, sequence)
            count += 1
            step(1)
    unit = "tokens" if packed[0] else "words"
    return Overlap(n, unit, wanted.judged, int(wanted.hit.sum()), wanted.too_short, count, tuple(wanted.examples))


class _Wanted:
    """The runs of all evaluation documents, by their length: sorted hashes, and where each stands."""

    def __init__(self, documents: Iterable[tuple[str, np.ndarray, Sequence[Any]]], n: int, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.names: list[str] = []
        self.sequences: list[np.ndarray] = []
        self.shown: list[Sequence[Any]] = []
        self.examples: list[Shared] = []
        self.too_short = 0
        runs: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for name, sequence, shown in documents:
            if len(sequence) < SHORTEST:
                self.too_short += 1
                continue
            length, number = min(n, len(sequence)), len(self.names)
            hashes = _hashes(sequence, length)
            runs.setdefault(length, []).append((hashes, np.full(len(hashes), number), np.arange(len(hashes))))
            self.names.append(name)
            self.sequences.append(sequence)
            self.shown.append(shown)
        self.judged = len(self.names)
        self.hit = np.zeros(self.judged, dtype=bool)
        if not self.judged and not self.too_short:
            raise DataError("there are no evaluation documents. Check the path, the split and the filter.")
        self.runs = {length: _sorted(parts) for length, parts in sorted(runs.items())}

    def look(self, name: str, sequence: np.ndarray) -> None:
        """Note every evaluation document that shares a run with this training document."""
        for length, (hashes, owners, places) in self.runs.items():
            if len(sequence) < length:
                continue
            ours = _hashes(sequence, length)
            first, last = np.searchsorted(hashes, ours, "left"), np.searchsorted(hashes, ours, "right")
            for at in np.flatnonzero(first < last).tolist():
                same = slice(first[at], last[at])
                for owner, place in zip(owners[same], places[same], strict=True):
                    # equal hashes of different words are rare, and must not accuse anyone
                    if not self.hit[owner] and _equal(self.sequences[owner], place, sequence, at, length):
                        self._note(int(owner), name, int(place), length)

    def _note(self, owner: int, training: str, place: int, length: int) -> None:
        self.hit[owner] = True
        if len(self.examples) < SHOWN:
            words = self.shown[owner][place : place + length]
            text = " ".join(map(str, words)) if self.tokenizer is None else self.tokenizer.decode(words)
            self.examples.append(Shared(self.names[owner], training, text))


def _equal(one: np.ndarray, place: int, other: np.ndarray, at: int, length: int) -> bool:
    return np.array_equal(one[place : place + length], other[at : at + length])


def _sorted(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hashes, owners, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(hashes, kind="stable")
    return hashes[order], owners[order], places[order]


def _hashes(sequence: np.ndarray, length: int) -> np.ndarray:
    """One uint64 for each run of ``length``: the sum of its words times powers of an odd number."""
    count = len(sequence) - length + 1
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        total = total * _ODD + sequence[offset : offset + count]
    return total


def _of_texts(documents: Iterable[str | tuple[str, str]]) -> Read:
    for number, given in enumerate(documents):
        name, text = (f"{number:08d}", given) if isinstance(given, str) else given
        words = _WORD.findall(text.lower())
        yield name, np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64), words


def _of_tokens(packed: Packed) -> Read:
    """Every document's tokens, without the begin that all share. Pieces in rows of their own are one document again."""
    waiting: tuple[str, int, list[int]] | None = None  # id, number and ids of a document that the next row may go on
    for row, name in enumerate(packed.ids):
        documents = np.asarray(packed.documents[row])
        numbers = np.unique(documents[documents >= 0])
        for number in numbers.tolist():
            part = np.flatnonzero(documents == number)
            last = np.asarray(packed.labels[row])[part[-1:]]
            # a piece begins with the token that was the last label of the piece before
            ids = [*np.asarray(packed.tokens[row])[part[1:]].tolist(), *last[last != UNLABELLED].tolist()]
            if waiting is not None and waiting[1] == number:
                waiting[2].extend(ids)
                continue
            if waiting is not None:
                yield _document(waiting[0], waiting[2])
            waiting = (name if len(numbers) == 1 else f"document {number}", number, ids)
    if waiting is not None:
        yield _document(waiting[0], waiting[2])


def _document(name: str, ids: list[int]) -> tuple[str, np.ndarray, list[int]]:
    return name, (np.array(ids, dtype=np.int64) + 1).view(np.uint64) * _ODD, ids

"""Words: text -> word numbers, fast enough that a served student spends its time in the network."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stillroom.errors import DataError, UsageError, nearest
from stillroom.network import Adapter
from stillroom.types import Column, Examples

PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2
_words = re.compile(r"[a-z0-9']+").findall
_REMEMBERED = 1 << 25  # numbers at most: 256 MiB
_ROWS = 512
_ROOM = 12  # characters per word looked at first: 100 words of a long article need not all of it


@dataclass(frozen=True)
class Words:
    """The adapter from a text column to word numbers, int64 [B, L]: 0 = padding, 1 = unknown word, 2... = vocabulary.

    Words are runs of a-z, 0-9 and ' in the lower-cased text; the first ``length`` of them are kept, and L is the
    longest text of the batch (at least 1). Raises DataError when the column is missing or not text.
    """

    vocabulary: tuple[str, ...]
    length: int = 128
    column: str = "text"

    @classmethod
    def fit(cls, texts: Iterable[str], size: int = 8000, length: int = 128, column: str = "text") -> Words:
        """The most frequent words, ties by alphabet. ``size`` counts all numbers, padding and unknown included."""
        if size <= FIRST_WORD:
            raise UsageError(f"size is {size}; it counts padding and the unknown word, so give at least 3.")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_words(text.lower()))
        if not counts:
            raise DataError("the texts hold no words (runs of a-z, 0-9 or '). Check the column, or its language.")
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls(tuple(word for word, _ in ranked[: size - FIRST_WORD]), length, column)

    @property
    def size(self) -> int:
        """How many numbers there are: the rows of an embedding for them."""
        return len(self.vocabulary) + FIRST_WORD

    @cached_property
    def _numbers(self) -> dict[str, int]:
        # kept outside the fields: the fields are the configuration that student.json writes down
        return {word: number for number, word in enumerate(self.vocabulary, FIRST_WORD)}

    def numbers(self, text: str) -> list[int]:
        """The word numbers of one text, without padding."""
        look_up, length = self._numbers.get, self.length
        found = _words(text[: _ROOM * length].lower())
        if len(found) <= length and len(text) > _ROOM * length:  # the cut may have gone through a word that is needed
            found = _words(text.lower())
        return [look_up(word, UNKNOWN) for word in found[:length]]

    def texts(self, inputs: Mapping[str, Column]) -> tuple[str, ...]:
        """The text column. Raises DataError when it is missing or not text."""
        texts = inputs.get(self.column)
        if texts is None or isinstance(texts, Tensor):
            if texts is not None:
                raise DataError(f"column {self.column!r} holds tensors; words are found in text.")
            raise DataError(f"there is no text column {self.column!r}{nearest(self.column, inputs)}")
        return texts

    def __call__(self, inputs: Mapping[str, Column]) -> tuple[Tensor, ...]:
        return (_padded([self.numbers(text) for text in self.texts(inputs)]),)

    def remembering(self) -> Adapter:
        """An adapter that answers as this one and keeps what it found: for training, where texts come again.

        This one is left as it is, so a served student is timed with the work that it does.
        """
        seen: dict[str, array[int]] = {}

        def numbers(text: str) -> array[int]:
            found = seen.get(text)
            if found is None:
                found = array("q", self.numbers(text))
                if len(seen) * self.length < _REMEMBERED:
                    seen[text] = found
            return found

        return lambda inputs: (_padded([numbers(text) for text in self.texts(inputs)]),)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, L], L the longest row, at least 1."""
    longest = max(map(len, rows), default=0) or 1
    if not rows:
        return torch.empty(0, longest, dtype=torch.int64)
    flat = array("q")
    for row in rows:
        flat.extend(row)
        flat.extend((PADDING,) * (longest - len(row)))
    # torch.tensor(list) takes four times as long, which is felt when one text is served
    return torch.frombuffer(flat, dtype=torch.int64).reshape(len(rows), longest)


def fit_words(examples: Examples, size: int = 8000, length: int = 128, column: str = "text") -> Words:
    """Words with the most frequent words of the examples' inputs; labels are not looked at."""
    reader, texts = Words((), length, column), list[str]()
    for start in range(0, len(examples), _ROWS):
        texts += reader.texts(examples.batch(range(start, min(start + _ROWS, len(examples))), None).inputs)
    return Words.fit(texts, size, length, column)

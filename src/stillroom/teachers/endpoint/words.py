"""Words of classes, and the tokens that they begin with as a server cuts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillroom.errors import UsageError


def first_tokens(words: Sequence[str], told: Mapping[str, Sequence[str] | None]) -> tuple[frozenset[str], ...]:
    """Of each word, the texts of tokens that it may begin with. ``told``: the pieces of a spelling, as the server cuts
    it; None where it does not say, and then only a token that is the whole word counts.

    Raises UsageError where two words begin with the same token: nobody could tell which one was meant.
    """
    found = []
    for word in words:
        cut = [told.get(spelling) or [spelling] for spelling in spellings(word)]
        fewest = min(len(pieces) for pieces in cut)  # a spelling that is cut finer begins as other words do
        # a space that is a token of its own begins every word
        found.append(frozenset(pieces[0] for pieces in cut if len(pieces) == fewest and pieces[0].strip()))
    for number, pieces in enumerate(found):
        for other, theirs in list(zip(words, found, strict=True))[:number]:
            if both := pieces & theirs:
                raise UsageError(
                    f"the words {other!r} and {words[number]!r} both begin with the token {min(both)!r}, so the first "
                    "token does not tell them apart. Give other words (words: {class: word}), such as A, B, C."
                )
    return tuple(found)


def spellings(word: str) -> tuple[str, ...]:
    """How an answer may begin with a word."""
    forms = dict.fromkeys((word, word[:1].upper() + word[1:]))
    return tuple(space + form for form in forms for space in ("", " "))

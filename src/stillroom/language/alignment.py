"""Two tokenizations of one text, cut at the byte positions where both have a boundary. Exact, in one pass.

Nothing is decoded and nothing compared by likeness: both sides must spell the same bytes, or the pair is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.errors import PairError
from stillroom.language.vocabulary import is_byte_level, token_bytes

Span = tuple[int, int, int, int]  # teacher's tokens t0 to t1, student's tokens s0 to s1 (ends excluded): the same bytes


def align(teacher: Sequence[bytes], student: Sequence[bytes]) -> list[Span]:
    """The finest spans [(t0, t1, s0, s1)] of equal bytes, each side's tokens covered once and in order.

    A token without bytes (a mark) pairs with one at the same place on the other side; alone, it belongs to the span
    that follows. Raises PairError, with the byte offset and both pieces, where the two do not spell the same bytes.
    """
    _refuse_difference(teacher, student)
    spans: list[Span] = []
    t = s = 0
    while t < len(teacher) and s < len(student):
        t0, s0 = t, s
        ahead = len(teacher[t]) - len(student[s])  # bytes that the teacher has written and the student has not
        t, s = t + 1, s + 1
        while ahead and (t < len(teacher) if ahead < 0 else s < len(student)):
            if ahead < 0:
                ahead, t = ahead + len(teacher[t]), t + 1
            else:
                ahead, s = ahead - len(student[s]), s + 1
        spans.append((t0, t, s0, s))
    if t < len(teacher) or s < len(student):
        whose, left = ("teacher", len(teacher) - t) if t < len(teacher) else ("student", len(student) - s)
        raise PairError(f"after the last byte of the text the {whose} has {left} marks more. Give both the same marks.")
    return spans


def _refuse_difference(teacher: Sequence[bytes], student: Sequence[bytes]) -> None:
    theirs, ours = b"".join(teacher), b"".join(student)
    if theirs == ours:
        return
    shorter = min(len(theirs), len(ours))
    at = next((n for n in range(shorter) if theirs[n] != ours[n]), shorter)
    raise PairError(
        f"teacher and student do not spell the same text: at byte {at} the teacher has {_piece_at(teacher, at)!r}, the "
        f"student {_piece_at(student, at)!r} ({len(theirs)} bytes against {len(ours)}). Tokenise the same text on "
        "both sides, whole, with tokenizers that keep every byte."
    )


def _piece_at(pieces: Sequence[bytes], byte: int) -> bytes:
    """The piece that holds this byte of the text; nothing beyond its end."""
    end = 0
    for piece in pieces:
        end += len(piece)
        if byte < end:
            return piece
    return b""


@dataclass(frozen=True)
class Coverage:
    """How much of the student's side stands against what on the teacher's: shares from 0 to 1.

    Every token is in a span. ``aligned``: positions that begin one, so that the teacher has an answer after the same
    bytes; ``one_to_one``: positions whose span is one token on both sides; ``bytes_one_to_one``: bytes in such spans.
    """

    positions: int
    aligned: float
    one_to_one: float
    bytes_one_to_one: float


def coverage_of(spans: Sequence[Span], student: Sequence[bytes]) -> Coverage:
    """The coverage of the student's tokens (their bytes, in order) by these spans."""
    return coverage_in_all([(spans, student)])


def coverage_in_all(documents: Sequence[tuple[Sequence[Span], Sequence[bytes]]]) -> Coverage:
    """The coverage over several documents, every position with the same weight."""
    singles = [
        len(student[s0]) for spans, student in documents for t0, t1, s0, s1 in spans if (t1 - t0, s1 - s0) == (1, 1)
    ]
    begun = sum(len(spans) for spans, _ in documents)
    tokens = sum(len(student) for _, student in documents)
    written = sum(len(piece) for _, student in documents for piece in student)
    return Coverage(tokens, begun / max(1, tokens), len(singles) / max(1, tokens), sum(singles) / max(1, written))


def spellings(tokenizer: Any, size: int | None = None) -> list[bytes]:
    """The UTF-8 bytes of every id [V]; none for special tokens and for ids without a token.

    ``size``: V, where the model pads its vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    byte_level = is_byte_level(tokenizer)
    found = [b""] * max(size or 0, max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if number not in special:
            found[number] = token_bytes(token, byte_level)
    return found


def pieces_of(ids: Sequence[int], text: str, spelling: Sequence[bytes], whose: str = "tokenizer") -> list[bytes]:
    """The bytes of each token [T] of ``text``, checked against it. ``spelling``: ``spellings(tokenizer)``.

    A space that the tokenizer puts before every text (SentencePiece's dummy prefix) is taken off the first piece.
    Raises PairError for a tokenizer that changes the text, has no token for a part of it, or reads a mark in it.
    """
    pieces = [spelling[number] for number in ids]
    wanted, written = text.encode(), b"".join(pieces)
    if written == b" " + wanted:
        first = next(n for n, piece in enumerate(pieces) if piece)
        pieces[first] = pieces[first][1:]
    elif written != wanted:
        shorter = min(len(wanted), len(written))
        at = next((n for n in range(shorter) if wanted[n] != written[n]), shorter)
        raise PairError(
            f"the {whose} writes {_piece_at(pieces, at)!r} at byte {at}, where the text has {wanted[at : at + 12]!r}: "
            "it changes the text, lacks a token for it, or reads a mark in it. Clean the text, or leave it out."
        )
    return pieces

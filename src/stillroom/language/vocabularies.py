"""One vocabulary in terms of another: where the mass of each of the teacher's ids goes among the student's.

In the manner of X-Token (arXiv 2605.21699): ids of equal bytes are matched, the others follow the student's own
tokenization of their bytes. There the student's distribution is carried over; here the teacher's is, so that what a
recording holds is ready for any divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.digests import state_digest
from stillroom.errors import PairError, UsageError
from stillroom.language.alignment import spellings
from stillroom.language.vocabulary import boundaries, tokenizer_digest

LONGEST = 4  # student tokens that share the mass of one teacher token, at most
UNSPELLED = 0.01  # share of the teacher's ids that the student may lack a token for (control characters, mostly)


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A sparse matrix of rows that sum to 1: teacher id -> up to M student ids, and the share that each gets.

    ``exact`` [V_t]: the ids with an id of the same bytes on the student's side. ``teacher`` and ``student`` are the
    digests of the two tokenizers.
    """

    ids: Tensor  # [V_t, M] int64, the student's
    shares: Tensor  # [V_t, M] float32; 0 where fewer than M
    exact: Tensor  # [V_t] bool
    unspelled: (
        Tensor  # [V_t] bool: the student has no token for the first byte; their mass goes to an unknown or an end
    )
    size: int  # V_s
    teacher: str
    student: str

    def __post_init__(self) -> None:
        total = self.shares.sum(-1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-5) or bool((self.shares < 0).any()):
            row = int((total - 1).abs().argmax())
            raise UsageError(f"the shares of teacher id {row} sum to {float(total[row]):.4f}: mass is lost or made up.")

    @property
    def digest(self) -> str:
        return state_digest({"ids": self.ids, "shares": self.shares, "size": torch.tensor(self.size)})

    def carry(self, probabilities: Tensor) -> Tensor:
        """Probabilities [n, V_t] -> [n, V_s]: the same total. Raises PairError for more ids than the map has."""
        width = probabilities.shape[-1]
        self.check_width(width)
        out = probabilities.new_zeros(len(probabilities), self.size)
        for ids, shares in zip(self.ids[:width].unbind(1), self.shares[:width].unbind(1), strict=True):
            out.index_add_(1, ids.to(out.device), probabilities * shares.to(probabilities))
        return out

    def carry_kept(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Kept entries, ids and probabilities [n, K] -> [n, V_s]: the same total; V_t is never spread out."""
        out = probabilities.new_zeros(len(ids), self.size)
        for column, shares in zip(self.ids.unbind(1), self.shares.unbind(1), strict=True):
            out.scatter_add_(1, column.to(ids.device)[ids], probabilities * shares.to(probabilities)[ids])
        return out

    def check_width(self, width: int) -> None:
        """Raises PairError when the teacher has more ids than the map has rows."""
        if width > len(self.ids):
            raise PairError(
                f"the teacher answers with {width} ids, but the map between the vocabularies has {len(self.ids)} rows. "
                f"Make it with map_between(..., teacher_size={width}) if the others are padding."
            )


def map_between(
    teacher: Any, student: Any, *, decay: float = 0.0, teacher_size: int | None = None, student_size: int | None = None
) -> VocabularyMap:
    """The map from the teacher's tokenizer to the student's.

    An id whose bytes are one student token: all its mass goes there. Any other: to the student's tokens of its bytes,
    the k-th (from 0) in proportion to decay^k (0^0 = 1). ``decay=0``, the default, gives all to the first: the
    probability of a next token is the sum over all continuations that begin with it. X-Token uses 0.1.
    Marks (ids without bytes): to the student's mark of the same name, else to the student's end of a document.

    An id whose first byte the student has no token for: to its unknown token, else to its end of a document.

    What it cannot know: a teacher token that is only the beginning of the student's next token counts for the
    beginning's own tokens. How much mass lands on exact matches is measured (teachers.across).
    Raises PairError when more than 1 % of the teacher's ids cannot be begun, UsageError for a decay outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise UsageError(f"decay={decay} cannot be used: choose a number from 0 to 1.")
    theirs, ours = spellings(teacher, teacher_size), spellings(student, student_size)
    known = _by_bytes(student, ours)
    exact = torch.tensor([bool(piece) and piece in known for piece in theirs])
    targets = _marks(teacher, student, len(theirs))
    apart = sorted({piece for piece in theirs if piece and piece not in known})
    written = dict(zip(apart, _tokenised(student, apart, ours, known), strict=True))
    lost = {piece for piece, found in written.items() if not found}
    unknown = student.unk_token_id if student.unk_token_id is not None else boundaries(student)[1]
    for number, piece in enumerate(theirs):
        if piece:
            targets[number] = [known[piece]] if piece in known else written[piece] or [unknown]
    for number in boundaries(teacher):
        exact[number] = True  # a document's begin and end mean the same on both sides
    unspelled = torch.tensor([piece in lost for piece in theirs])
    _refuse_unspelled(unspelled, theirs)
    ids, shares = _matrix(targets, decay)
    digests = {"teacher": tokenizer_digest(teacher), "student": tokenizer_digest(student)}
    return VocabularyMap(ids, shares, exact, unspelled, len(ours), **digests)


def _matrix(targets: Sequence[Sequence[int]], decay: float) -> tuple[Tensor, Tensor]:
    """Student ids and their shares [V_t, M], the first in place k in proportion to decay^k."""
    width = min(LONGEST if decay else 1, max(map(len, targets)))
    padded = [[*found[:width], *[-1] * (width - len(found))] for found in targets]
    ids = torch.tensor(padded)
    shares = torch.tensor([decay**k for k in range(width)]) * (ids >= 0)
    return ids.clamp(min=0), shares / shares.sum(-1, keepdim=True)


def _refuse_unspelled(unspelled: Tensor, spelling: Sequence[bytes]) -> None:
    share = float(unspelled.float().mean())
    if share > UNSPELLED:
        some = [spelling[number] for number in unspelled.nonzero()[:3, 0].tolist()]
        raise PairError(
            f"the student's vocabulary cannot begin {share:.1%} of the teacher's tokens (such as {some}): it lacks "
            "their first bytes. Keep the 256 single bytes in the student's vocabulary."
        )


def _by_bytes(tokenizer: Any, spelling: Sequence[bytes]) -> dict[bytes, int]:
    """The id of each spelling; an ordinary token before a byte-fallback token of the same byte."""
    fallback = {n for token, n in tokenizer.get_vocab().items() if token.startswith("<0x") and len(token) == 6}
    found = {spelling[number]: number for number in fallback}
    for number in range(len(spelling) - 1, -1, -1):  # of several ordinary ones, the first
        if number not in fallback:
            found[spelling[number]] = number
    found.pop(b"", None)
    return found


def _marks(teacher: Any, student: Any, size: int) -> list[list[int]]:
    """Where each id goes if it has no bytes: by name, else to the end of a document."""
    ours = student.get_vocab()
    begin, end = boundaries(student)
    targets = [[end] for _ in range(size)]
    for token, number in teacher.get_vocab().items():
        if token in ours:
            targets[number] = [ours[token]]
    first, last = boundaries(teacher)
    targets[first], targets[last] = [begin], [end]  # the end last: where both are one token, an end is predicted
    return targets


def _tokenised(
    student: Any, pieces: Sequence[bytes], spelling: Sequence[bytes], known: dict[bytes, int]
) -> list[list[int]]:
    """The student's tokens of each piece: its own tokenization, or the longest match first where that adds or loses.

    None for a piece that it cannot begin.
    """
    texts = [piece.decode(errors="replace") for piece in pieces]
    encoded = student(texts, add_special_tokens=False)["input_ids"] if texts else []
    longest = max(map(len, known))
    return [
        ids if b"".join(spelling[n] for n in ids) == piece else _longest_match(piece, known, longest)
        for piece, ids in zip(pieces, encoded, strict=True)
    ]


def _longest_match(piece: bytes, known: dict[bytes, int], longest: int) -> list[int]:
    ids: list[int] = []
    at = 0
    while at < len(piece):
        sizes = range(min(longest, len(piece) - at), 0, -1)
        size = next((size for size in sizes if piece[at : at + size] in known), 0)
        if size == 0:
            break
        ids.append(known[piece[at : at + size]])
        at += size
    return ids

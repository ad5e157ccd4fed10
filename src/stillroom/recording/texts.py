"""Texts as the teacher said them: what a black box gives, kept in UTF-8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.errors import SignalError
from stillroom.recording.codec import Kept
from stillroom.recording.ragged import lay, split
from stillroom.recording.rows import Facts, Key, Rows
from stillroom.types import Signal

NAME = "text"


@dataclass(frozen=True)
class Texts:
    """``signal.text``, byte for byte. Beside it other codecs may keep what else the teacher gives."""

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        if signal.text is None:
            raise SignalError(
                f"keep=Texts() keeps texts, but the teacher gives {list(signal.given)}. Choose a teacher that writes "
                "(an endpoint with reads: text, published texts, writer), or Everything()."
            )
        return Kept(lay(NAME, [np.frombuffer(text.encode("utf-8"), np.uint8) for text in signal.text]))

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return Signal(text=tuple(bytes(row).decode("utf-8") for row in split(rows, NAME)))

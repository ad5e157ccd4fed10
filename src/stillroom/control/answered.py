"""The teacher's answers of driven episodes, as a Model: what was asked while driving is not asked again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stillroom.control.episodes import Episodes
from stillroom.errors import DataError, RecordingError
from stillroom.types import Batch, Identity, Signal


class Answered:
    """Answers a batch of driven states by id; ``identity`` is the teacher's. Raises RecordingError for another id."""

    def __init__(self, episodes: Episodes, identity: Identity):
        if episodes.answers is None:
            raise DataError("the teacher was not asked in these episodes. Drive with teacher=...")
        self.identity = identity
        self._answers = torch.from_numpy(episodes.answers)
        self._rows: Mapping[str, int] = {name: row for row, name in enumerate(episodes.ids)}

    def __call__(self, batch: Batch) -> Signal:
        try:
            rows = [self._rows[name] for name in batch.ids]
        except KeyError as error:
            raise RecordingError(f"the teacher was never asked about {error.args[0]!r} while driving.") from None
        return Signal(values=self._answers[rows])

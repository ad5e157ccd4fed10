"""A teacher that reads its own rendering of a conversation and answers at the student's positions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import DataError, PairError
from stillroom.types import Batch, Identity, Model, Signal, identity_of

NEEDED = ("teacher_tokens", "teacher_positions", "teacher_index")


@dataclass(frozen=True, eq=False)
class InOwnRendering:
    """See ``in_own_rendering``. ``identity``: the teacher's."""

    teacher: Model
    identity: Identity

    @property
    def views(self) -> tuple[int, ...] | None:
        return getattr(self.teacher, "views", None)

    def check_data(self, examples: Any) -> None:
        """Raises PairError for rows that are not rendered apart, or were not recorded."""
        theirs = getattr(examples, "teacher", None)
        if theirs is None:
            raise PairError("these examples have one rendering. Make them with stillroom.data.render_apart.")
        if hasattr(self.teacher, "check_data"):
            self.teacher.check_data(theirs)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        missing = [name for name in NEEDED if not isinstance(batch.inputs.get(name), Tensor)]
        if missing:
            raise DataError(f"the batch has no {', '.join(missing)}. Make the rows with stillroom.data.render_apart.")
        tokens, positions, index = (batch.inputs[name] for name in NEEDED)
        said = self.teacher(Batch(batch.ids, {"tokens": tokens, "positions": positions}, views=batch.views))
        logits = said.need_logits("a teacher with a rendering of its own")
        # -1 stands where nothing counts: any answer will do there, and the first is at hand
        where = index.clamp(min=0)  # type: ignore[union-attr]

        def at_ours(tensor: Tensor) -> Tensor:
            places = where.to(tensor.device).reshape(*where.shape, *[1] * (tensor.dim() - 2))
            return tensor.gather(1, places.expand(*where.shape, *tensor.shape[2:]))

        return Signal(logits=logits.map(at_ours))


def in_own_rendering(teacher: Model) -> InOwnRendering:
    """The teacher (live, or its recording on ``Rendered.teacher``) for rows of data.render_apart."""
    return InOwnRendering(teacher, dataclasses.replace(identity_of(teacher), template=None))

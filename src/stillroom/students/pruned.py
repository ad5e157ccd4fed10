"""Students made from their teacher: fewer layers, narrower ones, fewer ids, chosen by what is measured on a sample.

Every result is an ordinary network of transformers, and its folder opens with transformers alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError
from stillroom.network import device_of
from stillroom.progress import console
from stillroom.students.causal import from_causal
from stillroom.students.networks import Student
from stillroom.students.pruning.activations import WidthScores, importance_of_width
from stillroom.students.pruning.depth import cut_depth
from stillroom.students.pruning.importance import LayerScores, importance_of_layers
from stillroom.students.pruning.rebuilding import Choice, batches_of
from stillroom.students.pruning.segmentation import cut_tokenizer, original_ids
from stillroom.students.pruning.vocabulary import (
    VocabularyCut,
    check_tokenizer,
    choose_vocabulary,
    cut_vocabulary,
    with_ids,
)
from stillroom.students.pruning.width import cut_width
from stillroom.types import Examples

__all__ = [
    "Choice",
    "LayerScores",
    "VocabularyCut",
    "WidthScores",
    "cut_depth",
    "cut_vocabulary",
    "cut_width",
    "importance_of_layers",
    "importance_of_width",
    "original_ids",
    "pruned",
]


def pruned(
    teacher_net: Any,
    tokenizer: Any,
    examples: Examples,
    *,
    layers: int | Sequence[int] | None = None,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    vocabulary: int | None = None,
    rounds: int = 1,
    rows: int | None = 8,
    batch_size: int = 4,
    name: str = "student",
    progress: bool = False,
) -> Student:
    """A student cut from its teacher; None leaves as it is.

    ``layers``: how many, or which ones. ``hidden`` channels, ``ffn`` neurons and query ``heads`` per layer.
    ``vocabulary``: at most so many ids.

    ``examples``: packed tokens of the teacher's tokenizer, from the domain. Ids are counted on all of them; all else is
    measured on ``rows`` of them, over the kept ids only. ``rounds``: see ``cut_depth``. The choices are kept in
    ``student.made_by``, and so in student.json; with ``progress`` they are printed.

    A student of a smaller vocabulary cannot learn from a recording in the large one: to distil, cut the teacher's own
    vocabulary first (``cut_vocabulary``), pack the texts with the new tokenizer, and leave ``vocabulary`` out here.
    Raises PairError for examples of another tokenizer, UsageError for a network that cannot be cut or a size that does
    not fit it.
    """
    check_tokenizer(examples, tokenizer)
    net, ids, choices = teacher_net, None, []
    sample: dict[str, Any] = {"examples": examples, "rows": rows, "batch_size": batch_size}
    if vocabulary is not None:  # chosen first, so that the layers are compared by what the student can say; cut last
        counts = _counted(examples, len(tokenizer), batch_size)
        choices.append(choose_vocabulary(net, tokenizer, counts, vocabulary, **sample))
        ids = torch.tensor(choices[0].kept, device=device_of(net))
    if layers is not None:
        measure = functools.partial(importance_of_layers, ids=ids, progress=progress, **sample)
        net, choice = cut_depth(net, layers, measure, rounds=rounds)
        choices.append(choice)
    if (hidden, ffn, heads) != (None, None, None):  # after the layers, on what is left of them
        net, narrower = cut_width(net, importance_of_width(net, **sample), hidden=hidden, ffn=ffn, heads=heads)
        choices += narrower
    if ids is not None:
        net, tokenizer = with_ids(net, choices[0].kept), cut_tokenizer(tokenizer, choices[0].kept)
    if not choices:
        raise UsageError("nothing to prune was named. Give layers, hidden, ffn, heads or vocabulary.")
    if progress:
        for choice in choices:
            console.print(str(choice), highlight=False)
    return dataclasses.replace(
        from_causal(net, tokenizer, name), made_by={"pruned": [choice.describe() for choice in choices]}
    )


def _counted(examples: Examples, size: int, batch_size: int) -> Tensor:
    """How often each id occurs in packed rows, int64 [V], padding left out."""
    counts = torch.zeros(size, dtype=torch.int64)
    for some in batches_of(range(len(examples)), batch_size):
        batch = examples.batch(some)
        tokens, documents = batch.inputs["tokens"], batch.extra.get("documents")
        counts += torch.bincount(tokens.flatten() if documents is None else tokens[documents >= 0], minlength=size)  # type: ignore[union-attr,index]
    return counts

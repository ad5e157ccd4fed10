"""A smaller vocabulary: the ids a domain uses and their tokenizer; hidden states and kept logits do not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.errors import PairError, UsageError
from stillroom.language import head_of, next_token, tokenizer_digest
from stillroom.network import device_of
from stillroom.students.pruning.rebuilding import (
    Choice,
    batches_of,
    layers_of,
    rebuilt,
    rows_of,
    same_answers,
    tokens_of,
)
from stillroom.students.pruning.segmentation import choose_ids, count_ids, cut_tokenizer
from stillroom.types import Examples

Used = Iterable[str] | Iterable[int] | Tensor  # texts, ids, or counts per id int64 [V]

POSITIONS = 128  # whose logits are there at once when the mass outside is measured


class VocabularyCut(NamedTuple):
    """A network and the tokenizer that belongs to it, and which ids were kept."""

    net: Any
    tokenizer: Any
    choice: Choice

    @property
    def record(self) -> dict[str, Any]:
        """The choice as plain JSON; the ids themselves are in the tokenizer (``original_ids``)."""
        return self.choice.describe()


def cut_vocabulary(
    net: Any,
    tokenizer: Any,
    used: Used,
    size: int | None = None,
    *,
    examples: Examples | None = None,
    rows: int | None = 8,
    batch_size: int = 4,
) -> VocabularyCut:
    """A network and a tokenizer of the same kind with only the ids that a domain uses.

    ``used``: the domain's texts (streamed; render chats with their template first), counts per id int64 [V], or ids.
    ``size``: at most so many ids, the most frequent ones; None keeps all that are used. Always kept: added tokens,
    single bytes (so any text can still be written), and the pieces that BPE forms on its way to a kept token, so a text
    whose tokens are all kept is segmented exactly as before. ``examples``: rows of the original tokenizer on which the
    probability that the network gives to other ids is measured; None: not measured.

    The new network's distribution is the old one's, conditioned on the kept ids. To distil in the small vocabulary, cut
    the teacher first; then teacher, data, recording and student all speak it::

        cut = cut_vocabulary(teacher.net, teacher.tokenizer, texts, size=8192)
        rows = pack(texts, cut.tokenizer)
        teacher = teachers.causal.from_causal(cut.net, cut.tokenizer)
        student = pruned(cut.net, cut.tokenizer, rows, layers=15)

    Raises UsageError for a network or tokenizer that cannot be cut and a size too small.
    """
    choice = choose_vocabulary(net, tokenizer, used, size, examples=examples, rows=rows, batch_size=batch_size)
    return VocabularyCut(with_ids(net, choice.kept), cut_tokenizer(tokenizer, choice.kept), choice)


def choose_vocabulary(
    net: Any,
    tokenizer: Any,
    used: Used,
    size: int | None = None,
    *,
    examples: Examples | None = None,
    rows: int | None = 8,
    batch_size: int = 4,
) -> Choice:
    """What ``cut_vocabulary`` would keep, and what it would lose. Nothing is cut."""
    layers_of(net)  # refuses what cannot be cut
    counts = _counts(tokenizer, used)
    kept = choose_ids(tokenizer, counts, size, token_ids(net))
    facts = {"domain_tokens_covered": float(counts[kept].sum() / counts.sum().clamp(min=1))}
    if examples is not None:
        facts |= mass_outside(net, tokenizer, kept, examples, rows=rows, batch_size=batch_size)
    before = head_of(net)[0].shape[0]
    return Choice("vocabulary", "the domain's use of each id", before, len(kept), tuple(kept), facts=facts)


@torch.no_grad()
def mass_outside(
    net: Any, tokenizer: Any, kept: Sequence[int], examples: Examples, *, rows: int | None = 8, batch_size: int = 4
) -> dict[str, Any]:
    """What a network gives to the other ids: mean probability, mean -log(1 - it) = KL(conditioned || whole) in nats.

    Over the positions with labels of ``rows`` rows of ``examples``, in chunks. Raises PairError for rows of another
    tokenizer.
    """
    check_tokenizer(examples, tokenizer)
    device = device_of(net)
    outside = torch.ones(head_of(net)[0].shape[0], dtype=torch.bool, device=device)
    outside[torch.tensor(kept, device=device)] = False
    mass, nats, positions = 0.0, 0.0, 0
    for some in batches_of(rows_of(examples, rows), batch_size):
        tokens, places, mask = tokens_of(examples.batch(some), device)
        logits = next_token(net, tokens, places)[mask]
        for start in range(0, len(logits.hidden), POSITIONS):
            log_probs = logits[start : start + POSITIONS].compute().double().log_softmax(-1)
            other = log_probs[:, outside].exp().sum(-1)  # summed itself: one minus the rest would round to nothing
            mass, nats = mass + float(other.sum()), nats - float(torch.log1p(-other).sum())
        positions += len(logits.hidden)
    if positions == 0:
        raise UsageError("the calibration rows have no position with a label. Give other rows, or more of them.")
    return {"mass_outside": mass / positions, "nats_outside": nats / positions, "positions": positions}


def with_ids(net: Any, kept: Sequence[int]) -> Any:
    """The network with these rows of its embedding and head, renumbered; ids in its configuration follow."""
    new = {old: number for number, old in enumerate(kept)}
    rows = torch.tensor(kept, device=device_of(net))
    head = net.get_output_embeddings()
    by_id = [net.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    tied = {tensor.data_ptr() for tensor in by_id if tensor is not None}
    state = {name: tensor[rows] if tensor.data_ptr() in tied else tensor for name, tensor in net.state_dict().items()}
    changes = {name: _renumbered(value, new) for name, value in _token_ids(net.config)}
    made = rebuilt(net, {"vocab_size": len(kept), **changes}, state)
    for name, value in _token_ids(made.generation_config):
        setattr(made.generation_config, name, _renumbered(value, new))
    some = torch.arange(8, device=rows.device) * len(kept) // 8
    same_answers(net, rows[some], made, some)
    return made


def token_ids(net: Any) -> set[int]:
    """The ids that a network's configurations name (begin, end, padding), where its head has them."""
    size = head_of(net)[0].shape[0]
    named = [value for config in (net.config, net.generation_config) for _, value in _token_ids(config)]
    flat = chain.from_iterable(value if isinstance(value, list) else [value] for value in named)
    return {number for number in flat if 0 <= number < size}


def check_tokenizer(examples: Examples, tokenizer: Any) -> None:
    """Raise PairError for packed tokens of another tokenizer."""
    known, digest = getattr(examples, "tokenizer", None), tokenizer_digest(tokenizer)
    if known is not None and known != digest:
        raise PairError(
            f"the examples were packed with tokenizer {known[:12]}, but this one is {digest[:12]}. Pack the texts "
            "again with the network's own tokenizer."
        )


def _counts(tokenizer: Any, used: Used) -> Tensor:
    """How often each id is used, int64 [V]; ids that are only named count once."""
    if isinstance(used, Tensor):
        if used.dim() != 1 or used.is_floating_point():
            raise UsageError(f"used={list(used.shape)} {used.dtype} cannot be used: give counts per id, int64 [V].")
        return used.cpu()
    if isinstance(used, str):
        raise UsageError("used is one text: give a list of texts (or a generator that reads them).")
    stream = iter(used)
    first = next(stream, None)
    if first is None:
        raise UsageError("there are no texts or ids to choose a vocabulary by.")
    if isinstance(first, str):
        return count_ids(tokenizer, chain([first], stream))  # type: ignore[list-item]
    ids = torch.tensor([first, *stream], dtype=torch.int64)
    return torch.bincount(ids, minlength=len(tokenizer)).clamp(max=1)


def _token_ids(config: Any) -> list[tuple[str, Any]]:
    """The settings of a configuration that are token ids: a number, or a list of them."""
    found = [(name, value) for name, value in config.to_dict().items() if name.endswith("_token_id")]
    return [(name, value) for name, value in found if isinstance(value, int) or (isinstance(value, list) and value)]


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new[number] for number in value if number in new]
    return new.get(value)

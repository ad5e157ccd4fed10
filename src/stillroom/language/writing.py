"""A causal language model writes: transformers' generation, with draws that belong to each text and not to its batch.

The order and number of texts that are written together changes none of them, and a text can be written again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stillroom.errors import UsageError, missing_extra
from stillroom.language.answers import unwrapped


@dataclass(frozen=True)
class Written:
    """What was written after one prompt: its tokens, the end mark included, and how likely each was when drawn."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # nats, of the distribution that was drawn from (all settings applied); NaN: unknown
    ended: bool  # by an end mark; False: cut at the number of tokens asked for


@torch.no_grad()
def write(
    net: Any,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    *,
    ends: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    heard: Callable[[Tensor], None] | None = None,
) -> list[Written]:
    """One text after each prompt, of at most ``draws.shape[1]`` tokens, up to the first of the ids ``ends``.

    ``draws`` [B, N] in [0, 1): token n of text b is the one at which the cumulative probability passes draws[b, n].
    ``top_p``: only the likeliest tokens whose mass reaches this share are drawn (Holtzman et al. 2019).
    ``heard(tokens [B])`` is told of every token as it is drawn, also of those after a text's end. The network runs in
    the mode that it is in; no setting of its own generation_config (penalties, temperature) is used.
    """
    try:
        from transformers import GenerationConfig
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    inner = unwrapped(net)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # peft puts its layers into this one
    if not hasattr(inner, "generate"):
        raise UsageError(f"{type(inner).__name__} cannot write: it is no causal language model of transformers.")
    device = inner.get_input_embeddings().weight.device
    tokens, mask = _left_padded(prompts, ends[0])
    draw = _Draw(draws.to(device), _warpers(temperature, top_p), heard)
    own = inner.generation_config  # generate() would take from it whatever ours does not say
    inner.generation_config = GenerationConfig(
        max_new_tokens=draws.shape[1], do_sample=False, use_cache=True, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    try:
        found = inner.generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            logits_processor=draw.as_list(),
            synced_gpus=isinstance(inner, FSDPModule),  # ranks that hold the weights in parts go on until all ended
        )
    finally:
        inner.generation_config = own
    ids, log_probs = found[:, tokens.shape[1] :].tolist(), torch.stack(draw.log_probs, 1).tolist()
    return [_until_end(row, values, set(ends)) for row, values in zip(ids, log_probs, strict=True)]


@torch.no_grad()
def greedy(net: Any, prompt: Tensor, most: int, ends: Collection[int] = ()) -> Iterator[int]:
    """The most probable next ids after a prompt [1, P], one by one, with the keys and values of earlier ones kept.

    Stops after ``most``, or with the first of ``ends``. Nothing of the model's generation settings is used.
    """
    read, cache = prompt, None
    for _ in range(most):
        said = net(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = int(said.logits[0, -1].argmax()), said.past_key_values
        yield token
        if token in ends:
            return
        read = torch.tensor([[token]], device=prompt.device)


def _until_end(ids: list[int], log_probs: list[float], ends: set[int]) -> Written:
    stop = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
    return Written(tuple(ids[:stop]), tuple(log_probs[:stop]), ids[stop - 1] in ends)


def _left_padded(prompts: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """The prompts [B, P] with their ends together, as generation continues all of them at one place; and their mask."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


def _warpers(temperature: float, top_p: float) -> list[Any]:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    found: list[Any] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
    return [*found, TopPLogitsWarper(top_p)] if top_p < 1 else found


class _Draw:
    """A logits processor that leaves one token possible, the one drawn, and keeps its log-probability.

    Generation that draws by itself takes one stream of random numbers for the whole batch.
    """

    def __init__(self, draws: Tensor, warpers: Sequence[Any], heard: Callable[[Tensor], None] | None = None) -> None:
        self.draws, self.warpers, self.heard = draws, warpers, heard
        self.log_probs: list[Tensor] = []

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        scores = scores.double()  # so that a sum over a whole vocabulary places a draw well
        for warp in self.warpers:
            scores = warp(tokens, scores)
        log_probs = scores.log_softmax(-1)
        mass = log_probs.exp().cumsum(-1)
        point = self.draws[:, len(self.log_probs), None].double() * mass[:, -1:]
        chosen = torch.searchsorted(mass, point, right=True).clamp(max=scores.shape[-1] - 1)
        self.log_probs.append(log_probs.gather(-1, chosen).squeeze(-1))
        if self.heard is not None:
            self.heard(chosen.squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)

    def as_list(self) -> Any:
        from transformers import LogitsProcessorList

        return LogitsProcessorList([self])

"""How a causal language model answers: its last hidden states and its head, so that no logits are computed here.

Works with any transformers causal LM whose logits are softcap(scale * head(hidden)); ``check_head`` finds out.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import SignalError, UsageError
from stillroom.types import Projected

Head = tuple[Tensor, Tensor | None, float | None, float]  # weight [V, D], bias [V], softcap, scale


def next_token(net: nn.Module, tokens: Tensor, positions: Tensor) -> Projected:
    """The logits of the token after each position, as Projected [B, T, D] x [V, D].

    ``tokens`` [B, T] int64; ``positions`` [B, T] int64 start at 0 with each document, and no position attends across
    such a start. Goes through the network's own forward, so wrappers that share gradients or weights see it.
    Raises UsageError for an id beyond the vocabulary.
    """
    inner = unwrapped(net)
    _check_ids(inner, tokens)
    caught: list[Tensor] = []
    caller = threading.get_ident()  # one network may answer several threads at a time: each keeps its own

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == caller:
            caught.append(_last(output))

    hook = inner.get_decoder().register_forward_hook(catch)
    none = torch.empty(0, dtype=torch.int64, device=tokens.device)  # of the logits that it would compute: none
    try:
        net(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=none)
    finally:
        hook.remove()
    weight, bias, softcap, scale = head_of(inner)
    return Projected(caught[-1], _whole(weight), None if bias is None else _whole(bias), softcap, scale)


def unwrapped(net: Any) -> Any:
    """The language model inside a wrapper for several ranks."""
    return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net


def head_of(net: Any) -> Head:
    """Weight, bias, softcap and scale of the network's head. Raises UsageError for a head that is not a matrix."""
    head = net.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UsageError(f"{type(net).__name__} has no output head of one matrix: it is no causal language model.")
    if hasattr(head, "lora_A"):
        raise UsageError(
            f"the head of {type(net).__name__} has a LoRA adapter of its own. Adapt the layers and leave the head "
            "frozen (target_modules without lm_head)."
        )
    config = net.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return head.weight, getattr(head, "bias", None), softcap, scale


@torch.no_grad()
def check_head(net: Any) -> None:
    """Raise SignalError unless hidden states and head give the logits that the network itself computes."""
    tokens = torch.arange(4)[None] % net.config.vocab_size
    positions = torch.arange(4)[None]
    own = net(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    ours = next_token(net, tokens, positions).compute().float()
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=1e-3, atol=1e-3):
        raise SignalError(
            f"the logits of {type(net).__name__} are not its last hidden state times its head, so they cannot be kept "
            "unprojected. Wrap the model in a function from a Batch to Signal(logits=Dense(...))."
        )


def _whole(weight: Any) -> Tensor:
    """The head where ranks share it out (FSDP2). Its gradient passes outside the forward that FSDP sees, so it must
    stay gathered from forward to backward: as ``fit`` has it, and FSDP2 itself for the outermost module.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    if torch.is_grad_enabled() and weight.requires_grad:
        raise UsageError(
            "the head's weight is shared out over ranks and was given up after forward, so it would get no gradient. "
            "Call set_reshard_after_forward(False, recurse=False) on the FSDP module that holds it."
        )
    return weight.full_tensor()


def _last(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _check_ids(net: Any, tokens: Tensor) -> None:
    size = net.get_input_embeddings().weight.shape[0]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise UsageError(
            f"token id {int(tokens.max() if tokens.max() >= size else tokens.min())} lies outside the model's "
            f"vocabulary of {size} ids. Tokenise with this model's own tokenizer."
        )

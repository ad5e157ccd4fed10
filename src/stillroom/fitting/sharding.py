"""A network that is shared out over ranks (FSDP2 through Accelerate): its whole state, and what ranks do together.

Started with ``accelerate launch --use_fsdp --fsdp_version 2``. Each rank holds a part of every weight as a DTensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.tensor import DTensor

from stillroom.errors import UsageError

_WHOLE = whole.StateDictOptions(full_state_dict=True)


def share_out(accelerator: Accelerator) -> None:
    """Let ``prepare`` share the network out, where the launcher asks for it and there are several ranks.

    Accelerate does so by itself for the first training on accelerators only: a second one, or one on the CPU, it would
    copy without a word. Weights travel in float32 and autocast lowers them, so that values are those of one process.
    Raises UsageError for the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError("FSDP version 1 flattens weights, and a head is needed whole. Launch with --fsdp_version 2.")
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def is_shared_out(accelerator: Accelerator) -> bool:
    """Whether what this accelerator prepares lies in parts on several ranks."""
    return accelerator.is_fsdp2


def check_shareable(objective: Any, learned: bool) -> None:
    """Raise UsageError for what a network that is shared out cannot be trained with."""
    if learned:
        raise UsageError(f"{objective} learns, and what it learns is not shared out. Launch without --use_fsdp.")


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """The whole state on the CPU, on every rank, gathered weight by weight. All ranks must ask together."""
    return {name: gathered(tensor).cpu() for name, tensor in net.state_dict().items()}


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor that may be shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed(accelerator: Accelerator, decision: bool) -> bool:
    """The first rank's decision, on every rank."""
    answer = [decision]
    broadcast_object_list(answer)
    return answer[0]


@dataclass(frozen=True, eq=False)
class SharedNet:
    """The network as a part of a checkpoint: whole, whatever the number of ranks."""

    net: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        return state_of(self.net)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        whole.set_model_state_dict(self.net, state, options=_WHOLE)


@dataclass(frozen=True, eq=False)
class SharedOptimiser:
    """Its optimiser, the same way; what it keeps of each weight goes by the weight's name."""

    net: nn.Module
    optimiser: torch.optim.Optimizer

    def state_dict(self) -> Mapping[str, Any]:
        return whole.get_optimizer_state_dict(self.net, self.optimiser, options=_WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        whole.set_optimizer_state_dict(self.net, self.optimiser, state, options=_WHOLE)

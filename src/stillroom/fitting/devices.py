"""What Accelerate, and the machine, give to a training: devices, precision, trackers, the optimiser and its draws."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import nn

from stillroom.digests import key_hash
from stillroom.errors import MissingExtraError, UsageError, missing_extra, nearest
from stillroom.fitting.sharding import share_out
from stillroom.plan import Plan


def accelerator_for(plan: Plan, trackers: Sequence[str], folder: Path | None) -> Accelerator:
    """The Accelerator of one training, its trackers started below ``folder``.

    Raises UsageError for a precision or tracker that cannot be used here, MissingExtraError for a tracker's library.
    """
    check_trackers(trackers, folder)
    AcceleratorState._reset_state()  # so that one process can fit with one precision after another
    precision = "no" if plan.precision == "fp32" else plan.precision
    try:
        made = Accelerator(mixed_precision=precision, log_with=list(trackers) or None, project_dir=folder)
    except ValueError as error:
        raise UsageError(f"plan.precision={plan.precision!r} cannot be used here: {error}") from None
    if precision != "no" and not made.native_amp:  # it would train in fp32, and the plan would say otherwise
        raise UsageError(f"plan.precision={plan.precision!r} is not possible on {made.device.type!r}. Choose 'bf16'.")
    share_out(made)
    # Both are read from the environment or left by an earlier Accelerator: backward would divide a second time.
    made.gradient_accumulation_steps = 1
    made.sync_gradients = True
    if trackers:
        config = {name: value for name, value in asdict(plan).items() if value is not None}
        made.init_trackers("trackers", config=config)
    return made


def check_trackers(trackers: Sequence[str], folder: Path | None) -> None:
    """Raise UsageError for an unknown tracker or no folder to write to, MissingExtraError for its library."""
    if trackers and folder is None:
        raise UsageError(f"trackers={list(trackers)} need a folder to write to. Pass folder=.")
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"there is no tracker {name!r}{nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in map(str, get_available_trackers()):
            if name == "tensorboard":
                raise missing_extra(name, "track")
            raise MissingExtraError(f"{name} is not installed. Install it, or choose 'tensorboard' (extra 'track').")


def optimiser_for(plan: Plan, parameters: list[nn.Parameter], shared: bool = False) -> torch.optim.Optimizer:
    """AdamW or SGD with the plan's settings, in one kernel for all parameters where there is one."""
    fused = plan.optimiser == "adamw" or not shared  # there is no such SGD for weights that are shared out
    rest: dict[str, Any] = {"lr": plan.learning_rate, "weight_decay": plan.weight_decay, "fused": fused}
    if plan.optimiser == "sgd":
        return torch.optim.SGD(parameters, momentum=plan.momentum, **rest)
    return torch.optim.AdamW(parameters, **rest)


def take_step(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the parameters by their gradients, and forget these."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad()


def seed_draws(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what a network may draw from. torch.manual_seed would cost milliseconds where CUDA is not in use."""
    number = key_hash(f"draws|{seed}|{step}", rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def recompute_activations(net: Any, on: bool) -> None:
    """Whether a transformers network computes its layers' activations again in backward instead of keeping them.

    Raises UsageError for a network whose layers do not know how.
    """
    names = [f"{kind}_checkpointing_{'enable' if on else 'disable'}" for kind in ("activation", "gradient")]
    switch = next((getattr(net, name) for name in names if hasattr(net, name)), None)  # before 5.20: 'gradient'
    try:
        if switch is None:
            raise ValueError("it is no transformers network")
        switch({"use_reentrant": False}) if on else switch()
    except ValueError as error:
        raise UsageError(f"plan.checkpointing=True is not possible for {type(net).__name__}: {error}.") from None
    net.disable_input_require_grads()  # only the reentrant kind needs it, and it would be left on the embeddings


def over_ranks(accelerator: Accelerator, local: Mapping[str, float]) -> dict[str, float]:
    """The sums over ranks of what each has found."""
    if accelerator.num_processes == 1:
        return dict(local)
    numbers = torch.tensor(list(local.values()), dtype=torch.float64, device=accelerator.device)
    summed: Any = accelerator.reduce(numbers, "sum")
    return dict(zip(local, summed.tolist(), strict=True))


def finish_trackers(accelerator: Accelerator, folder: Path | None) -> None:
    """Close what the trackers write. Not end_training(): it would end the ranks' process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()
    if accelerator.is_main_process and accelerator.trackers and folder is not None:
        nameless(folder)


def nameless(folder: Path) -> None:
    """Rename TensorBoard's event files: their names hold this machine's, which has no place in a run's folder."""
    events = sorted((folder / "trackers").rglob("*.tfevents.*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    fresh = [path for path in events if path.suffix != ".kept"]
    for number, path in enumerate(fresh, len(events) - len(fresh)):
        path.rename(path.with_name(f"events.out.tfevents.{number}.kept"))

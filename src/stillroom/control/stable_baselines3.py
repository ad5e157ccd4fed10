"""A teacher by reinforcement learning (extra ``policies``): PPO of Stable-Baselines3, trained where nobody has one.

What is kept of it is its network as safetensors, not the library's archive, which has a pickle inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from stillroom.control.gymnasium import make
from stillroom.errors import FolderError, missing_extra
from stillroom.files import read_json, write_bytes, write_json
from stillroom.network import Columns
from stillroom.progress import bar
from stillroom.teachers.networks import from_network
from stillroom.types import Model

OURS = ("environment", "steps", "hidden")  # what PPO's constructor does not take by these names


def ppo(
    environment: str,
    steps: int = 20_000,
    seed: int = 0,
    hidden: tuple[int, ...] = (64, 64),
    learning_rate: float = 3e-4,
    n_steps: int = 2048,
    batch_size: int = 64,
    n_epochs: int = 10,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    workspace: Path | None = None,
    progress: bool = True,
) -> Model:
    """PPO's policy for a gymnasium environment: the column ``state`` [B, S] to the means of its actions [B, A].

    Schulman et al. 2017, in one environment; settings have the library's names and defaults, also those that are not
    here. ``steps``: of the environment in all; ``n_steps``: between two updates. With a ``workspace`` the policy
    is kept there and opened the next time; FolderError for the policy of other settings.
    """
    about = {"environment": environment, "steps": steps, "seed": seed, "hidden": list(hidden)}
    about |= {"learning_rate": learning_rate, "n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
    about |= {"gamma": gamma, "gae_lambda": gae_lambda}
    weights = workspace / "policy.safetensors" if workspace else None
    if weights is not None and weights.is_file():
        found = read_json(weights.with_suffix(".json"))
        different = [name for name, value in about.items() if found.get(name) != value]
        if different:
            raise FolderError(f"{weights} was trained with another {', '.join(different)}. Delete {weights.parent}.")
        state = load_file(weights)
    else:
        state = _trained(about, progress)
        if weights is not None:
            write_json(weights.with_suffix(".json"), {**about, "stable_baselines3": _version()})
            write_bytes(weights, save(state))
    net = _network(state)
    known: dict[str, Any] = {
        "name": f"PPO {environment}",
        "licence": "own",
        "source": f"stable-baselines3 {_version()}, seed {seed}",
    }
    return from_network(net, Columns(("state",)), answers="values", **known)


def _version() -> str:
    try:
        return metadata.version("stable-baselines3")
    except metadata.PackageNotFoundError:
        return "unknown"


def _trained(about: Mapping[str, Any], progress: bool) -> dict[str, Any]:
    """The policy's layers 0, 1, ... (weight, bias), after so many steps in the environment."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback
    except ImportError as error:
        if error.name != "stable_baselines3":
            raise
        raise missing_extra("stable-baselines3", "policies") from None

    environment, steps = about["environment"], about["steps"]
    with bar(f"PPO {environment}", steps, shown=progress) as step:

        class Watch(BaseCallback):
            def _on_step(self) -> bool:
                step(1)
                return True

        with torch.random.fork_rng(devices=[]):
            made = _limited(environment)
            settings: dict[str, Any] = {name: value for name, value in about.items() if name not in OURS}
            model = PPO("MlpPolicy", made, policy_kwargs={"net_arch": about["hidden"]}, device="cpu", **settings)
            model.learn(steps, callback=Watch())
            made.close()
    return _layers(model.policy)


def _layers(policy: Any) -> dict[str, Any]:
    """The linear layers from the state to the means of the actions; tanh stands between them."""
    modules = (*policy.mlp_extractor.policy_net, policy.action_net)
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    return {
        f"{index}.{name}": value.detach().clone()
        for index, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
    }


def _limited(environment: str) -> Any:
    """With the library's own end of an episode: PPO bootstraps there."""
    import gymnasium

    make(environment).close()  # says what is wrong with the name
    return gymnasium.make(environment)


def _network(state: dict[str, Any]) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(len(state) // 2):
        outputs, inputs = state[f"{index}.weight"].shape
        linear = nn.Linear(inputs, outputs)
        linear.load_state_dict({name: state[f"{index}.{name}"] for name in ("weight", "bias")})
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)

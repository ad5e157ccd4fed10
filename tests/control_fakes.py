"""A tiny deterministic environment: a cart on a line that must stop at a goal, and the controller that knows how."""

import numpy as np
import torch

import stillroom as sr
from stillroom.control import Task


class Cart:
    """State [position, speed, goal]; action [1] is a push. Starts follow from the seed."""

    def reset(self, *, seed):
        draw = np.random.default_rng(seed)
        self.state = np.array([draw.uniform(-1, 0), 0.0, draw.uniform(0, 1)])
        return self.state.copy(), {}

    def step(self, action):
        place, speed, goal = self.state
        speed = 0.9 * speed + 0.1 * float(action[0])
        self.state = np.array([place + 0.2 * speed, speed, goal])
        distance = abs(self.state[0] - goal)
        return self.state.copy(), -distance, False, False, {"distance": distance, "speed": abs(speed)}


def observe(state):
    """No speed: a real cart has no sensor for it here; frames tell."""
    return state[[0, 2]]


def arrived(info):
    return info["distance"] < 0.1 and info["speed"] < 0.15


def cart(**changes):
    settings = {"name": "cart", "make": Cart, "observe": observe, "low": (-1.0,), "high": (1.0,), "horizon": 120}
    settings |= {"period": 0.02, "frames": 2, "succeeded": arrived, "disturbance": 0.3}
    return Task(**(settings | changes))


class Controller:
    """The teacher: sees the speed. Counts how often it was asked."""

    identity = sr.types.Identity("cart controller", kind="function", licence="MIT")

    def __init__(self, gain=4.0):
        self.gain, self.asked = gain, 0

    def __call__(self, batch):
        state = batch.inputs["state"]
        self.asked += len(batch)
        push = self.gain * (state[:, 2] - state[:, 0]) - 3 * state[:, 1]
        return sr.Signal(values=push.clamp(-1, 1)[:, None])


def pusher(value):
    """A policy that always says the same."""
    return lambda batch: sr.Signal(values=torch.full((len(batch), 1), float(value)))


def small_student(seed=0, inputs=4):
    return sr.Student.make(
        "stillroom.students.architectures:mlp",
        {"inputs": inputs, "outputs": 1, "hidden": [16]},
        answers="values",
        seed=seed,
        name="cart student",
    )

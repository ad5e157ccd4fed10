"""One way of computing the head step, in a process of its own: its time against the bare matmuls, or its peak memory.

    python benchmarks/peers/head_measure.py VARIANT (time | memory) [--rounds 7] [--dtype bfloat16]
        [--positions 2048] [--vocabulary 49152]

Prints JSON. Started by benchmarks/head_step.py, in this project's environment or in the peers'.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch
from head_variants import VARIANTS, VOCABULARY, WIDTH, Step, inputs, is_sparse

POSITIONS_TIMED, POSITIONS_IN_MEMORY, POSITIONS_CHECKED = 512, 2048, 64
REPEATS = 16  # steps that the mean of a sampled gradient is checked over


def run(step: Step, arguments: tuple) -> None:
    arguments[0].grad = arguments[1].grad = None
    step(*arguments).backward()


class Floor:
    """The same matmuls alone: logits, the teacher's logits where it is asked, both gradients; nothing in between.

    ``kept``: the outputs are written to the same memory every time, which no step can do that returns new gradients.
    """

    def __init__(self, arguments: tuple, teacher: bool) -> None:
        self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, _ = arguments
        self.gradient = torch.randn(POSITIONS_TIMED, VOCABULARY) / 1000
        self.teacher = teacher
        self.out = [torch.empty(POSITIONS_TIMED, VOCABULARY) for _ in range(2)]
        self.out += [torch.empty(POSITIONS_TIMED, WIDTH), torch.empty(VOCABULARY, WIDTH)]

    @torch.no_grad()
    def __call__(self, kept: bool) -> None:
        out = self.out if kept else [None] * 4
        results = [torch.mm(self.hidden, self.weight.t(), out=out[0])]  # held together, as a step holds them
        if self.teacher:
            results.append(torch.mm(self.teacher_hidden, self.teacher_weight.t(), out=out[1]))
        results.append(torch.mm(self.gradient, self.weight, out=out[2]))
        results.append(torch.mm(self.gradient.t(), self.hidden, out=out[3]))


def times_floor(step: Step, rounds: int, dtype: torch.dtype) -> dict:
    """CPU time of one thread; step and float32 floors take turns; the first round (compilation) is not counted."""
    arguments = inputs(POSITIONS_TIMED, dtype)
    floor = Floor(inputs(POSITIONS_TIMED), not is_sparse(step))
    sides: dict[str, Callable[[], None]] = {
        "step": lambda: run(step, arguments),
        "floor": lambda: floor(kept=False),
        "floor_kept": lambda: floor(kept=True),
    }
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn:
                spent[name].append(time.process_time() - start)
    ratios = sorted(a / b for a, b in zip(spent["step"], spent["floor"], strict=True))
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {
        "rounds": rounds,
        **{f"{name}_seconds": value for name, value in medians.items()},
        "times_floor": medians["step"] / medians["floor"],
        "times_floor_low_high": [ratios[0], ratios[-1]],
        "times_floor_kept": medians["step"] / medians["floor_kept"],
    }


def peak_mib(step: Step, positions: int, dtype: torch.dtype, vocabulary: int) -> float:
    """Peak resident memory during one step above what was resident before it (inputs, libraries, compiled code).

    Linux's own high-water mark (VmHWM), reset before the step: nothing is sampled, nothing is missed.
    """
    arguments = inputs(positions, dtype, vocabulary)
    count = min(POSITIONS_TIMED, positions)
    few = arguments[0][:count].detach().requires_grad_()
    kept = tuple(each[:count] for each in arguments[4])
    run(step, (few, arguments[1], arguments[2][:count], arguments[3], kept))  # compile, allocate workspaces
    arguments[1].grad = None
    if "stillroom" in step.__name__:
        from stillroom.divergences import matmuls

        matmuls._copies.clear()  # the kept copy of the head is counted, as if this were the first step
    gc.collect()  # what compiling left behind would otherwise be freed during the step, and hide some of its peak
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    run(step, arguments)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
    assert found is not None
    return int(found.group(1))


def errors_of(step: Step, dtype: torch.dtype) -> dict:
    """Relative errors of the gradients, against plain autograd of the same sum in float64; sampled: of their mean too.

    Torchtune's differs by a constant, whose gradient is 0.
    """
    arguments, exact = inputs(POSITIONS_CHECKED, dtype), inputs(POSITIONS_CHECKED, torch.float64)
    hidden, weight, teacher_hidden, teacher_weight, kept = exact
    log_q = (hidden @ weight.t()).log_softmax(-1)
    if is_sparse(step):
        tail = log_q.scatter(-1, kept[0], float("-inf")).logsumexp(-1)
        log_p = torch.cat([kept[1], kept[2][:, None]], -1)
        log_q = torch.cat([log_q.gather(-1, kept[0]), tail[:, None]], -1)
    else:
        log_p = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    found, total = {}, [0.0, 0.0]
    for repeat in range(1, 1 + (REPEATS if "sampled" in step.__name__ else 1)):
        run(step, arguments)
        total = [a + b.grad.double() for a, b in zip(total, arguments[:2], strict=True)]
        if repeat in (1, 4, 16):
            errors = [((a / repeat - b.grad).norm() / b.grad.norm()).item() for a, b in zip(total, exact, strict=False)]
            found[repeat] = dict(zip(("hidden", "weight"), errors, strict=True))
    one = {f"error_of_{name}_gradient": error for name, error in found[1].items()}
    return one if len(found) == 1 else one | {"error_of_mean_over": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--positions", type=int, default=POSITIONS_IN_MEMORY)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step, dtype = VARIANTS[asked.variant], getattr(torch, asked.dtype)
    found: dict[str, object] = {}
    if asked.what == "memory":
        found["peak_mib"] = peak_mib(step, asked.positions, dtype, asked.vocabulary)
    else:
        found |= times_floor(step, asked.rounds, dtype)
        if asked.variant != "trl_gkd_default":  # another divergence
            found |= errors_of(step, dtype)
    if "stillroom" in asked.variant:
        from stillroom.divergences import row_steps

        found["compiled"] = os.environ.get("STILLROOM_COMPILE", "1") != "0" and not row_steps._compile_failed
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""One way of computing the head step, in a process of its own: its time against the bare matmuls, and its peak memory.

    python benchmarks/peers/head_variants.py VARIANT (time | memory) [--rounds 7]

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
from torch import Tensor

WIDTH, VOCABULARY, KEPT = 576, 49_152, 64  # SmolLM2-135M's head; the recording keeps the top 64
POSITIONS_TIMED, POSITIONS_IN_MEMORY, POSITIONS_CHECKED = 512, 2048, 64
Step = Callable[[Tensor, Tensor, Tensor, Tensor, object], Tensor]  # student and teacher: hidden, weight; what is kept


def stillroom_dense(hidden, weight, teacher_hidden, teacher_weight, kept):
    from stillroom.divergences import forward_kl
    from stillroom.types import Projected

    return forward_kl(Projected(hidden, weight), Projected(teacher_hidden, teacher_weight)).mean()


def stillroom_sparse(hidden, weight, teacher_hidden, teacher_weight, kept):
    from stillroom.divergences import forward_kl
    from stillroom.types import Projected, Sparse

    return forward_kl(Projected(hidden, weight), Sparse(*kept, VOCABULARY)).mean()


def trl_gkd(hidden, weight, teacher_hidden, teacher_weight, kept, beta=0.0):
    """GKDTrainer's loss; beta 0 is forward KL, 0.5 its default."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
    labels = torch.zeros(1, len(hidden), dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss((hidden @ weight.t())[None], teacher[None], labels, beta=beta)


def trl_gkd_default(*arguments):
    return trl_gkd(*arguments, beta=0.5)


def trl_tiled(hidden, weight, teacher_hidden, teacher_weight, kept):
    """DistillationTrainer's loss from hidden states, forward KL: tiles of 4,096 positions x 32,768 ids."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hidden))
    return _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, 0.0)[0]


def liger_chunked(hidden, weight, teacher_hidden, teacher_weight, kept):
    """LigerFusedLinearJSDLoss at its defaults (compiled, chunks of 1,024) but for beta 0 and no hard labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(hidden), dtype=torch.long)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


STEPS = (stillroom_dense, stillroom_sparse, trl_gkd, trl_gkd_default, trl_tiled, liger_chunked)
VARIANTS = {step.__name__: step for step in STEPS}


def inputs(positions: int, dtype: torch.dtype = torch.float32) -> tuple:
    """A student, a sharper teacher (the top 64 hold most of the mass, as in text), and what a recording keeps of it."""
    random = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, WIDTH, generator=random) for n in (positions, VOCABULARY, positions, VOCABULARY)]
    hidden, weight, teacher_hidden, teacher_weight = draw
    weight, teacher_weight = weight / 24, teacher_weight / 8
    ids, log_probs, rest = [], [], []
    for part in teacher_hidden.split(128):
        full = (part @ teacher_weight.t()).log_softmax(-1)
        top = full.topk(KEPT)
        ids.append(top.indices), log_probs.append(top.values)
        rest.append(full.scatter(-1, top.indices, float("-inf")).logsumexp(-1))
    kept = torch.cat(ids), torch.cat(log_probs).to(dtype), torch.cat(rest).to(dtype)
    students = [each.to(dtype).requires_grad_() for each in (hidden, weight)]
    return (*students, teacher_hidden.to(dtype), teacher_weight.to(dtype), kept)


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


def times_floor(step: Step, teacher: bool, rounds: int) -> dict:
    """CPU time of one thread; step and floors take turns; the first round (compilation) is not counted."""
    arguments = inputs(POSITIONS_TIMED)
    floor = Floor(arguments, teacher)
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


def peak_mib(step: Step) -> float:
    """Peak resident memory during one step above what was resident before it (inputs, libraries, compiled code).

    Linux's own high-water mark (VmHWM), reset before the step: nothing is sampled, nothing is missed.
    """
    arguments = inputs(POSITIONS_IN_MEMORY)
    few = tuple(a[:POSITIONS_TIMED].detach().requires_grad_() for a in arguments[:1])
    kept = tuple(each[:POSITIONS_TIMED] for each in arguments[4])
    run(step, (*few, arguments[1], arguments[2][:POSITIONS_TIMED], arguments[3], kept))  # compile, allocate workspaces
    arguments[1].grad = None
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


def error_of(step: Step) -> float:
    """Relative error of the hidden gradient, against plain autograd of the same sum in float64."""
    arguments, exact = inputs(POSITIONS_CHECKED), inputs(POSITIONS_CHECKED, torch.float64)
    run(step, arguments)
    hidden, weight, teacher_hidden, teacher_weight, kept = exact
    log_q = (hidden @ weight.t()).log_softmax(-1)
    if step is stillroom_sparse:
        tail = log_q.scatter(-1, kept[0], float("-inf")).logsumexp(-1)
        log_p, log_q = (
            torch.cat([kept[1], kept[2][:, None]], -1),
            torch.cat([log_q.gather(-1, kept[0]), tail[:, None]], -1),
        )
    else:
        log_p = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    return ((arguments[0].grad.double() - hidden.grad).norm() / hidden.grad.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    step = VARIANTS[asked.variant]
    found: dict[str, object] = {}
    if asked.what == "memory":
        found["peak_mib"] = peak_mib(step)
    else:
        found |= times_floor(step, asked.variant != "stillroom_sparse", asked.rounds)
        if asked.variant != "trl_gkd_default":  # another divergence
            found["error_of_hidden_gradient"] = error_of(step)
    if "stillroom" in asked.variant:
        from stillroom import row_steps

        found["compiled"] = os.environ.get("STILLROOM_COMPILE", "1") != "0" and not row_steps._compile_failed
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

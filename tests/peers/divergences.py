"""Prints what other libraries' functions give for the numbers in a file, as JSON. Runs in their own environment.

.venv-peers/bin/python -W ignore tests/peers/divergences.py numbers.pt
"""

import json
import math
import sys

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torchdistill.losses.mid_level import ATLoss, KDLoss, RKDLoss, SPKDLoss
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss


def gkd(s, t, beta, temperature):
    labels = torch.zeros(1, len(s))  # without labels TRL divides by sequences, with them by positions
    return GKDTrainer.generalized_jsd_loss(s[None], t[None], labels, beta, temperature).item()


def trl_tiled(n, beta, temperature, softcap):
    hidden = n["hidden"].clone().requires_grad_()
    mask = torch.ones(1, len(hidden))
    loss, _, _ = _chunked_divergence_loss(
        hidden[None],
        n["teacher_hidden"][None],
        n["weight"],
        n["teacher_weight"],
        mask,
        beta,
        student_final_logit_softcapping=softcap,
        temperature=temperature,
    )
    loss.backward()
    return {"value": loss.item(), "gradient": hidden.grad.tolist()}


def liger(n, beta, temperature):
    hidden = n["hidden"].clone().requires_grad_()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False, chunk_size=2
    )(
        hidden,
        n["weight"],
        n["teacher_hidden"],
        n["teacher_weight"],
        torch.zeros(len(hidden), dtype=torch.long),
    )
    loss.backward()
    return {"value": loss.item(), "gradient": hidden.grad.tolist()}


def io(value):
    return {"m": {"output": value}}


def torchdistill(n):
    s, t, labels = n["logits"], n["teacher_logits"], n["labels"]
    kd = {"student_module_path": "m", "student_module_io": "output"}
    kd |= {"teacher_module_path": "m", "teacher_module_io": "output", "temperature": 4.0}
    pair = {"student": {"path": "m", "io": "output"}, "teacher": {"path": "m", "io": "output"}}
    relations = {"student_output_path": "m", "teacher_output_path": "m"}
    maps = io(n["maps"]), io(n["teacher_maps"])
    points = io(n["hidden"]), io(n["teacher_hidden"])
    return {
        "kd": KDLoss(**kd, alpha=0.0, beta=1.0)(io(s), io(t)).item(),
        "kd_with_labels": KDLoss(**kd, alpha=1e-300, beta=1.0)(io(s), io(t), labels).item(),
        "at": ATLoss({"one": pair}, mode="code")(*maps).item(),
        "rkd_distance": RKDLoss(**relations, dist_factor=1.0, angle_factor=0.0, reduction="mean")(*points).item(),
        "rkd_angle": RKDLoss(**relations, dist_factor=0.0, angle_factor=1.0, reduction="mean")(*points).item(),
        "sp": SPKDLoss(**relations, reduction="batchmean")(*points).item(),
    }


def main(path):
    n = torch.load(path, weights_only=True)
    s, t = n["logits"], n["teacher_logits"]
    found = {
        "gkd": {f"{b},{T}": gkd(s, t, b, T) for b in (0.0, 0.001, 0.1, 0.5, 1.0) for T in (1.0, 2.0)},
        "trl_tiled": {f"{b}": trl_tiled(n, b, 2.0, 3.0) for b in (0.0, 0.1, 1.0)},
        "liger": {f"{b}": liger(n, b, 2.0) for b in (0.0, 0.1, 1.0)},
        "torchdistill": torchdistill(n),
    }
    assert all(map(math.isfinite, found["gkd"].values()))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])

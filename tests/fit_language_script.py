"""Trains small language models below the folder that is named: on several ranks, or killed at a step.

fit_language_script.py FOLDER NAME,NAME  trains these entries of TRAININGS, with a checkpoint at every step
fit_language_script.py FOLDER NAME@STEP  the same, killed once it has logged this step
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState

import stillroom as sr
from language_fakes import packed, student, teacher
from stillroom.students import causal
from stillroom.students.networks import Student

BOTH = sr.Mix({sr.SoftTargets(temperature=1.0): 0.7, sr.HardLabels(): 0.3})
SETTLED = {"optimiser": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "clip_norm": None}
ADAM = {"optimiser": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5, "warmup": 0.1}


def trained(start: Student | None = None, examples=None, by=None, objective=BOTH, **settings) -> Student:
    """Some steps on rows of packed documents; what is no setting of the plan goes to fit."""
    names = sr.Plan.__dataclass_fields__
    rest = {name: settings.pop(name) for name in list(settings) if name not in names}
    plan = sr.Plan(**{"steps": 6, "batch_size": 4, **SETTLED, **settings})
    rows = packed() if examples is None else examples
    return sr.fit(start or student(), by or teacher(), rows, objective, plan=plan, progress=False, **rest)


TRAININGS = {
    "tied": lambda **rest: trained(accumulation=2, **rest),
    "untied": lambda **rest: trained(student(tied=False), average="example", **rest),
    "adam": lambda **rest: trained(**{**ADAM, "accumulation": 2, **rest}),
    "lora": lambda **rest: trained(causal.lora(student(), 4), **rest),
    "checkpointed": lambda **rest: trained(checkpointing=True, **rest),
    "half": lambda **rest: trained(precision="bf16", **{**ADAM, **rest}),
}


def killer(step: int):
    """Ends this process at a step as a machine that loses power would."""
    return lambda row: os.kill(os.getpid(), signal.SIGKILL) if row.step >= step else None


def main(folder: str, names: str) -> None:
    torch.set_num_threads(1)
    for name in names.split(","):
        name, _, step = name.partition("@")
        watchers = [killer(int(step))] if step else []
        TRAININGS[name](folder=Path(folder) / name, checkpoint_seconds=0, watchers=watchers)
    print(f"rank{PartialState().process_index}/{PartialState().num_processes}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Trains small language models below the folder that is named: on several ranks, or killed at a step.

fit_language_script.py FOLDER NAME,NAME  trains these entries of TRAININGS, with a checkpoint at every step
fit_language_script.py FOLDER NAME@STEP  the same, killed once it has logged this step
fit_language_script.py FOLDER by_hand    a user's own loop over a network that FSDP2 shares out
fit_language_script.py FOLDER large      a corpus of 240 MB; says by how many MB the process grew, and the corpus' size
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import stillroom as sr
from language_fakes import packed, student, teacher
from stillroom.errors import UsageError
from stillroom.language import next_token
from stillroom.objectives.features import MatchFeatures
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
    "learns": lambda **rest: trained(objective=MatchFeatures({"model.norm": "model.norm"}), **rest),
    "half": lambda **rest: trained(precision="bf16", **{**ADAM, **rest}),
}


def killer(step: int):
    """Ends this process at a step as a machine that loses power would."""
    return lambda row: os.kill(os.getpid(), signal.SIGKILL) if row.step >= step else None


def by_hand() -> None:
    """Gradients of a network that is shared out by hand are those of the whole one; without a head there are none."""
    rank, data = dist.get_rank(), packed()
    for tied in (True, False):
        ours, whole = student(tied=tied).net, student(tied=tied).net
        for layer in ours.get_decoder().layers:
            fully_shard(layer)
        fully_shard(ours, reshard_after_forward=True)
        with pytest.raises(UsageError, match="the head's weight is shared out over ranks and was given up"):
            backward(ours, data.batch([0, 1]), 1.0)
        ours.set_reshard_after_forward(False, recurse=False)
        backward(ours, data.batch([[0, 1], [2, 3]][rank]), 2.0)  # FSDP averages over ranks
        backward(whole, data.batch([0, 1, 2, 3]), 1.0)
        for part, full in zip(ours.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(part.grad.full_tensor(), full.grad, rtol=1e-4, atol=1e-6)


def backward(net, batch, factor: float) -> None:
    logits = next_token(net, batch.inputs["tokens"], batch.inputs["positions"])
    (factor * sr.divergences.cross_entropy(logits, batch.labels).sum()).backward()


def large(folder: Path) -> None:
    """The rows of a small corpus, many times."""
    small = packed(folder=folder / "small")
    times = 2**21 * 10 // small.tokens.size
    manifest = json.loads((folder / "small" / "manifest.json").read_text())
    manifest |= {"rows": len(small) * times}
    (folder / "large").mkdir()
    for name in ("tokens", "labels", "documents"):
        content = (folder / "small" / f"{name}.i32").read_bytes()
        with open(folder / "large" / f"{name}.i32", "wb") as file:
            file.writelines(content for _ in range(times))
    (folder / "large" / "manifest.json").write_text(json.dumps(manifest))
    rows = packed(folder=folder / "large")
    trained(examples=rows, steps=2)  # what is loaded and compiled once
    before = _own_memory()
    trained(examples=rows, steps=20)
    size = sum(path.stat().st_size for path in (folder / "large").glob("*.i32"))
    print(_own_memory() - before, size / 2**20)


def _own_memory() -> float:
    """MiB of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main(folder: str, names: str) -> None:
    torch.set_num_threads(1)
    for name in names.split(","):
        if name in ("by_hand", "large"):
            by_hand() if name == "by_hand" else large(Path(folder))
            continue
        name, _, step = name.partition("@")
        first: list[int] = []
        watchers = [lambda row, first=first: first.append(row.step)]
        if step:
            watchers.append(killer(int(step)))
        TRAININGS[name](folder=Path(folder) / name, checkpoint_seconds=0, watchers=watchers)
        print(f"{name}:from-{first[0]}\n", end="", flush=True)
    if names == "large":
        return
    kind = str(AcceleratorState().distributed_type).removeprefix("DistributedType.")
    print(f"rank{PartialState().process_index}/{PartialState().num_processes}:{kind}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

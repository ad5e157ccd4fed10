"""Trains below the folder that is named: on several ranks, or killed at drawn moments.

fit_script.py FOLDER NAME,NAME  trains these entries of TRAININGS, with a checkpoint at every step
fit_script.py FOLDER NUMBER     trains 'long' once whole, and so many times killed twice
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from fit_fakes import rows, sequences, student, teacher, trained
from stillroom.objectives import HardLabels, Mix, SoftTargets
from stillroom.objectives.features import MatchFeatures

BOTH = Mix({SoftTargets(): 0.7, HardLabels(): 0.3})
WITH_FEATURES = Mix({BOTH: 1.0, MatchFeatures({"0": "0"}): 0.5})


def settled(objective, examples, **settings):
    """For ranks: nothing is drawn, plain SGD."""
    return lambda **rest: trained(objective, examples, by=teacher(), **{**settings, **rest})


def long(**rest):
    """For kills: dropout, AdamW, a projector, accumulation, a ragged last batch."""
    settings = {"optimiser": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0, "warmup": 0.1}
    start = student(hidden=32, dropout=0.2)
    settings |= {"steps": 100, "accumulation": 2, **rest}
    return trained(WITH_FEATURES, sequences(labelled=0.5), by=teacher(), start=start, **settings)


TRAININGS = {
    "rows": settled(BOTH, rows(labelled=0.4)),
    "sequences": settled(BOTH, sequences(labelled=0.4), average="example", accumulation=2),
    "features": settled(WITH_FEATURES, sequences(labelled=0.4), optimiser="adamw", learning_rate=1e-2, clip_norm=0.5),
    "rows-again": settled(BOTH, rows(labelled=0.4), seed=3, accumulation=3),
    "few": settled(BOTH, rows(9), batch_size=8),  # the last batch has one example, for two ranks
    "half": lambda **rest: long(precision="bf16", steps=60, **rest),
    "unreached": settled(MatchFeatures({"0": "0"}), rows()),
    "long": long,
}


def kill_and_resume(folder: Path, kills: int) -> list[int]:
    """Train whole/; then 0/, 1/ ..., each killed at two drawn moments and gone on with to its end.

    Every training is a fork of this process, which has imported everything and trained nothing. Returns the step at
    which each was taken up again, 0 where no checkpoint was there.
    """

    def fork(name: str) -> int:
        if pid := os.fork():
            return pid
        torch.rand(len(name))  # what was drawn before must not matter
        long(folder=folder / name, checkpoint_seconds=0)
        os._exit(0)

    def wait(pid: int, checkpoint: Path, saved: int) -> None:
        """Until the checkpoint was replaced so many times, or the training ended."""
        last, until = _version(checkpoint), time.monotonic() + 60
        while saved and time.monotonic() < until and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
            found = _version(checkpoint)
            saved, last = saved - (found != last), found

    torch.optim.AdamW([torch.zeros(1)])  # imports what every fork would import again
    assert os.waitpid(fork("whole"), 0)[1] == 0
    draw, steps = random.Random(11), []
    for name in map(str, range(kills)):
        checkpoint = folder / name / "checkpoint.pt"
        for _ in range(2):
            pid = fork(name)
            wait(pid, checkpoint, draw.randrange(30))
            time.sleep(draw.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        steps.append(torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0)
        assert os.waitpid(fork(name), 0)[1] == 0
    return steps


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def main(folder: str, names: str) -> None:
    torch.set_num_threads(1)
    if names.isdigit():
        print(json.dumps(kill_and_resume(Path(folder), int(names))))
        return
    for name in names.split(","):
        TRAININGS[name](folder=Path(folder) / name, checkpoint_seconds=0)
    print(f"rank{PartialState().process_index}/{PartialState().num_processes}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

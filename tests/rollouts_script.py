"""Trains a student on its own texts below the folder that is named; on several ranks, the same as on one."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

import stillroom as sr
from language_fakes import student, teacher, tokenizer
from stillroom.data import pack
from stillroom.divergences import reverse_kl
from stillroom.rollouts import Rollouts

PROMPTS = ["the cat", "a dog ran after it and", "it", "the mat sat on the dog", "after", "on the mat", "and", "it is"]
SETTLED = {"optimiser": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": None}


def train(folder=None, **settings):
    prompts = pack(PROMPTS, tokenizer(), 32, together=False)
    return sr.fit(
        student(),
        teacher(),
        prompts,
        sr.SoftTargets(reverse_kl, temperature=1.0),
        plan=sr.Plan(steps=4, batch_size=4, seed=3, **SETTLED, **settings),
        rollouts=Rollouts(prompts, new_tokens=8, share=0.7),
        folder=folder,
        progress=False,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]) / "student")
    print(f"rank{PartialState().process_index}/{PartialState().num_processes}\n", end="", flush=True)

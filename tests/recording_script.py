"""Records into the folder that is named: to be killed at any moment and run again."""

import sys
from pathlib import Path

import torch
from torch import nn

from recording_fakes import Rows, flipped
from stillroom.network import Columns, answer
from stillroom.recording import Features, Likely, TopK, record


class Teacher:
    """A network that takes a few milliseconds for a batch."""

    def __init__(self, width: int):
        torch.manual_seed(0)
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 50)]
        self.net = nn.Sequential(*layers).eval()

    def __call__(self, batch):
        return answer(self.net, batch, Columns(), features=("3",))


KEEPS = {
    "fixed": (TopK(8), Features(("3",), "bfloat16")),
    "ragged": (Likely(0.02, at_most=20, coded=True), Features(("3",), "bfloat16")),
}


def main(folder: str, keep: str = "fixed") -> None:
    torch.set_num_threads(1)
    (Path(folder).parent / "started").write_text("")
    examples = Rows.make(1500, width=64, augment=flipped)
    record(Teacher(1024), examples, folder, KEEPS[keep], views=2, batch_size=20, shard_rows=100, progress=False)
    (Path(folder).parent / "done").write_text("")


if __name__ == "__main__":
    main(*sys.argv[1:])

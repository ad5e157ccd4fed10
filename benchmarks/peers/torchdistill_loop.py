"""torchdistill's own training loop as a process of its own environment, one segment of steps for each line of input.

Started by recorded_epoch.py with ``.venv-peers/bin/python``. In: {"teacher": "resnet20", "steps": 3}. Out: the CPU
seconds of this process and the images of these steps. The first line out says the versions.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import RandomSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import fashion

NAMES = {  # what torchdistill takes from torchvision when it is imported
    "torchvision": (),
    "torchvision.datasets": (),
    "torchvision.models": (),
    "torchvision.models.densenet": ("_DenseBlock", "_Transition"),
    "torchvision.models.resnet": ("BasicBlock", "conv1x1"),
}


def stand_in_for_torchvision() -> None:
    """Empty names, so that torchdistill can be imported where torchvision is missing; nothing measured uses them.

    Its wheels need the very build of torch that they were compiled for; a CPU build from elsewhere has none.
    """
    for name, wanted in NAMES.items():
        module = types.ModuleType(name)
        for attribute in wanted:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def config() -> dict:
    """Plain knowledge distillation in torchdistill's terms."""
    kd = {
        "student_module_path": ".", "student_module_io": "output",
        "teacher_module_path": ".", "teacher_module_io": "output",
        "temperature": fashion.TEMPERATURE, "alpha": fashion.LABELS_WEIGHT,
    }  # fmt: skip
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": fashion.BATCH, "num_workers": 0},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": fashion.LEARNING_RATE}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def loop(teacher: str, images: fashion.PilImages, layout: fashion.Layout) -> Iterator[int]:
    """Steps of its DistillationBox, without the logging of its example scripts."""
    from torchdistill.core.distillation import get_distillation_box

    box = get_distillation_box(
        fashion.teacher_net(teacher, layout), fashion.student_net(layout), {"train": images}, config(),
        torch.device("cpu"), None, False, 1,
    )  # fmt: skip
    for epoch in range(10**9):
        box.pre_epoch_process(epoch=epoch)
        for pixels, labels, extra in box.train_data_loader:
            box.post_forward_process(box.forward_process(pixels, labels, extra))
            yield len(labels)
        box.post_epoch_process()


def main() -> None:
    torch.set_num_threads(1)
    try:
        import torchvision  # noqa: F401

        torchvision_is = metadata.version("torchvision")
    except (ImportError, RuntimeError):
        stand_in_for_torchvision()
        torchvision_is = "missing: empty names for the import only"
    pixels, labels, _ = fashion.read_images(Path(sys.argv[1]))
    images = fashion.PilImages(pixels, labels)
    layout = cast(fashion.Layout, sys.argv[2])
    loops: dict[str, Iterator[int]] = {}
    said = {name: metadata.version(name) for name in ("torchdistill", "torch", "pillow")}
    print(json.dumps({**said, "torchvision": torchvision_is}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        steps = loops.setdefault(asked["teacher"], loop(asked["teacher"], images, layout))
        began = time.process_time()
        done = sum(next(steps) for _ in range(asked["steps"]))
        print(json.dumps({"seconds": time.process_time() - began, "images": done}), flush=True)


if __name__ == "__main__":
    main()

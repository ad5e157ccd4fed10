"""Distillation on one page, without fit(): a teacher, a recording of its answers, a student that matches them.

Handwritten digits from scikit-learn (1,797 images of 8 x 8, nothing is downloaded). The teacher learns from 1,000
labels; of these the student is given 60, and the teacher's answers about all of the images in the training part.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

from stillroom.data import Table
from stillroom.objectives import HardLabels, SoftTargets, masked_mean
from stillroom.recording import record
from stillroom.students.architectures import mlp
from stillroom.students.networks import Student
from stillroom.teachers.networks import from_network
from stillroom.types import Dense, Model, Signal

LABELLED, TRAINING = 60, 1000


def digits() -> tuple[Table, Table]:
    """The training part and the test part, pixels from 0 to 1."""
    pixels, numbers = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(numbers)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    table = Table({"x": images[order]}, tuple(f"digit-{i}" for i in order.tolist()), labels=labels[order])
    return table.select(range(TRAINING)), table.select(range(TRAINING, len(table)))


def train(net: nn.Module, teacher: Model | None, examples: Table, objective, steps: int, seed: int = 0) -> nn.Module:
    """The whole loop: answer, compare, average over what counts, step."""
    student, draw = Student(net), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    net.train()
    for _ in range(steps):
        batch = examples.batch(torch.randperm(len(examples), generator=draw)[:64].tolist())
        target = teacher(batch) if teacher is not None else Signal()
        counted = objective.counted(batch) if hasattr(objective, "counted") else {}
        terms = objective(student(batch), target, batch)
        loss = sum((masked_mean(values, counted.get(name)) for name, values in terms.items()), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def accuracy(net: nn.Module, examples: Table) -> float:
    batch = examples.batch(range(len(examples)))
    found = Student(net).predict(batch).need_logits()
    assert isinstance(found, Dense)
    return float((found.values.argmax(-1) == batch.labels).float().mean())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    training, test = digits()
    large = train(mlp(64, 10, hidden=(256, 256)), None, training, HardLabels(), steps=400)
    few = training.select(range(LABELLED))
    with tempfile.TemporaryDirectory() as folder:
        recording = record(from_network(large, name="large"), training.without_labels(), folder, progress=False)
        small = train(mlp(64, 10, hidden=(16,)), recording, training.without_labels(), SoftTargets(), steps=800)
    alone = train(mlp(64, 10, hidden=(16,)), None, few, HardLabels(), steps=800)
    return {"teacher": accuracy(large, test), "student": accuracy(small, test), "alone": accuracy(alone, test)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in main().items():
        print(f"{name:8} {share:.3f}")

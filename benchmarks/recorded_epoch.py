"""What an epoch costs from a recording, against a teacher that is asked at every step (the usual loop, torchdistill).

    python benchmarks/recorded_epoch.py [--rounds 5] [--layout channels_last | default] [--data FOLDER]

One student (105,866 parameters) on Fashion-MNIST, four teachers. Everything is CPU time of one thread; the sides take
turns by short segments of steps and medians are compared: read the ratios. benchmarks/README.md says how and why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Printed
from torch.utils.flop_counter import FlopCounterMode

import stillroom as sr
from peers import fashion
from peers.fashion import BATCH, LABELS_WEIGHT, LEARNING_RATE, TEACHERS, TEMPERATURE
from stillroom.data import views
from stillroom.environment import environment
from stillroom.recording import open_recording
from stillroom.teachers.networks import from_network

HERE = Path(__file__).parent
EPOCHS = 20
TARGET = 10.0  # times cheaper over all epochs, the recording pass included
AUGMENT = views.Chain((views.Shift(2), views.Flip()))
OBJECTIVE = sr.Mix({sr.SoftTargets(temperature=TEMPERATURE): 1 - LABELS_WEIGHT, sr.HardLabels(): LABELS_WEIGHT})
PLAN = sr.Plan(epochs=EPOCHS, batch_size=BATCH, learning_rate=LEARNING_RATE, schedule="constant", clip_norm=None)
STEPS = {"resnet20": 4, "resnet56": 3, "wrn_40_2": 2, "resnet18": 1}  # of a segment with a live teacher
ASKED_ROWS = {"resnet20": 1024, "resnet56": 640, "wrn_40_2": 384, "resnet18": 256}  # of a measured recording pass
VIEWED = "resnet56"  # the teacher of the lines about augmentation and about fit() with a live teacher


class Enough(Exception):
    """The measured steps are done."""


class Timed:
    """Examples that note the CPU time at every training batch, and end the training after ``steps`` of them."""

    def __init__(self, examples: sr.Table, steps: int):
        self.examples, self.steps, self.marks = examples, steps, list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.examples, name)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> sr.Batch:
        if len(indices) == BATCH:  # batches of another size are read to digest the data
            self.marks.append(time.process_time())
            if len(self.marks) > self.steps:
                raise Enough
        return self.examples.batch(indices, views)


class Counted:
    """A teacher that counts the examples that it is asked about."""

    def __init__(self, teacher: Any):
        self.teacher, self.identity, self.asked = teacher, teacher.identity, 0

    def __call__(self, batch: sr.Batch) -> sr.Signal:
        self.asked += len(batch)
        return self.teacher(batch)


def fit_segment(
    net: torch.nn.Module, teacher: Callable[[], Any], examples: sr.Table, steps: int, warm: int = 2
) -> dict[str, float]:
    """CPU seconds per image of ``steps`` steps of fit(), and those before its first step."""
    timed = Timed(examples, steps + warm)
    began = time.process_time()
    with contextlib.suppress(Enough):
        sr.fit(sr.Student(net), teacher(), timed, OBJECTIVE, plan=PLAN, progress=False)
    each = (timed.marks[-1] - timed.marks[warm]) / steps
    return {"per_image": each / BATCH, "start": max(0.0, timed.marks[warm] - began - warm * each)}


def loop_segment(loop: Iterator[int], steps: int) -> dict[str, float]:
    began = time.process_time()
    images = sum(next(loop) for _ in range(steps))
    return {"per_image": (time.process_time() - began) / images}


def record_segment(teacher: Any, examples: sr.Table, seeds: int | None) -> dict[str, float]:
    """CPU seconds for each example that was asked about, everything that record() does included."""
    counted = Counted(teacher)
    with tempfile.TemporaryDirectory() as folder:
        began, wall = time.process_time(), time.monotonic()
        sr.record(counted, examples, folder, sr.Everything(), views=seeds, batch_size=BATCH, progress=False)
        seconds, wall = time.process_time() - began, time.monotonic() - wall
    return {"per_image": seconds / counted.asked, "wall": wall / counted.asked}


class Peer:
    """torchdistill in a process of its own environment; it works only while this one waits for it."""

    def __init__(self, python: Path, data: Path, layout: str):
        command = [str(python), str(HERE / "peers" / "torchdistill_loop.py"), str(data), layout]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
        )
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("torchdistill did not start: see above, and benchmarks/README.md for its environment.")
        return json.loads(line)

    def segment(self, teacher: str, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"teacher": teacher, "steps": steps}) + "\n")
        self.process.stdin.flush()
        found = self._read()
        return {"per_image": found["seconds"] / found["images"]}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def flops(net: torch.nn.Module) -> int:
    """Of one image's forward pass: 2 for each multiply-add of convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops()


def stand_in_recordings(
    net: torch.nn.Module, examples: sr.Table, augmented: sr.Table, folder: Path
) -> tuple[Path, Path]:
    """Recordings of all rows to read from. Who answered does not matter to reading: the student itself, untrained."""
    quick = from_network(copy.deepcopy(net), name="stand-in")
    plain, viewed = folder / "plain", folder / "viewed"
    sr.record(quick, examples, plain, sr.Everything(), batch_size=512, progress=False)
    sr.record(quick, augmented, viewed, sr.Everything(), views=1, batch_size=512, progress=False)
    return plain, viewed


def measure(rounds: int, data: Path, python: Path | None, layout: fashion.Layout) -> dict[str, Any]:
    pixels, labels, name = fashion.read_images(data)
    images = fashion.PilImages(pixels, labels)
    tensors, classes = torch.from_numpy(pixels).float().div(255).unsqueeze(1), torch.from_numpy(labels).long()
    table = sr.Table({"x": tensors}, ids=tuple(f"train/{i}" for i in range(len(pixels))), labels=classes, name=name)
    augmented = table.with_augment(AUGMENT)
    student = fashion.student_net(layout)
    nets = {key: fashion.teacher_net(key, layout) for key in TEACHERS}
    teachers = {key: from_network(net, name=key) for key, net in nets.items()}
    peer = Peer(python, data, layout) if python else None

    with tempfile.TemporaryDirectory() as scratch:
        plain, viewed = stand_in_recordings(student, table, augmented, Path(scratch))
        floor = fashion.student_only(tensors, classes, layout)
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "student only": lambda: loop_segment(floor, 16),
            "fit, recorded": lambda: fit_segment(student, lambda: open_recording(plain), table, 24),
            "fit, recorded views": lambda: fit_segment(student, lambda: open_recording(viewed), augmented, 24),
            f"fit, live {VIEWED}": lambda: fit_segment(student, lambda: teachers[VIEWED], table, 3, warm=1),
            f"fit, live {VIEWED}, views": lambda: fit_segment(student, lambda: teachers[VIEWED], augmented, 3, warm=1),
            f"record {VIEWED}, views": lambda: record_segment(
                teachers[VIEWED], augmented.select(range(ASKED_ROWS[VIEWED] // 2)), 2
            ),
        }
        for key in TEACHERS:
            usual, steps = fashion.usual_loop(images, nets[key], layout), STEPS[key]
            some = table.select(range(ASKED_ROWS[key]))
            sides[f"usual loop, {key}"] = lambda loop=usual, steps=steps: loop_segment(loop, steps)
            if peer:
                sides[f"torchdistill, {key}"] = lambda key=key, steps=steps: peer.segment(key, steps)
            sides[f"record {key}"] = lambda key=key, some=some: record_segment(teachers[key], some, None)
        segments = take_turns(sides, rounds)
    if peer:
        peer.close()
    return {
        "configuration": {
            "images": name, "rows": len(table), "epochs": EPOCHS, "batch": BATCH, "rounds": rounds,
            "dtype": "float32", "layout": layout, "keep": "Everything", "plan": dataclasses.asdict(PLAN),
            "augmentation": repr(AUGMENT),
            "recorded_rows_measured": ASKED_ROWS, "live_steps_a_segment": STEPS, "teacher_weights": "untrained",
        },
        "environment": {**environment(), "peer": peer.versions if peer else None},
        "networks": {
            key: {"parameters": sum(p.numel() for p in net.parameters()), "forward_flops": flops(net)}
            for key, net in {"student": student, **nets}.items()
        },
        "segments": segments,
    }  # fmt: skip


def take_turns(sides: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Every side once a round, from another side on each time; what a side does first of all is not counted."""
    names = list(sides)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < 0 and name.startswith(("fit", "record")):
                continue  # they leave out their own first steps, or do so much that a first time is lost in it
            for quantity, value in sides[name]().items():
                if turn >= 0:
                    found[name].setdefault(quantity, []).append(value)
    return found


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, and from them the cost of epochs and of 20 of them."""
    each = {name: found["per_image"] for name, found in measured["segments"].items()}
    seconds = {name: statistics.median(values) for name, values in each.items()}
    start = statistics.median(measured["segments"]["fit, recorded"]["start"])
    rows = measured["configuration"]["rows"]
    recorded, least = seconds["fit, recorded"], seconds["student only"]
    teachers = {}
    for key in TEACHERS:
        passed = seconds[f"record {key}"]
        by_round = list(zip(each["fit, recorded"], each[f"record {key}"], strict=True))
        whole = rows * (EPOCHS * recorded + passed) + start
        line: dict[str, Any] = {
            "recording_pass_share": rows * passed / whole,
            "flops_to_student": measured["networks"][key]["forward_flops"]
            / measured["networks"]["student"]["forward_flops"],
        }
        for side in ("usual loop", "torchdistill"):
            live = seconds.get(f"{side}, {key}")
            if live is not None:
                total = EPOCHS * rows * live / whole
                lives = zip(each[f"{side}, {key}"], by_round, strict=True)
                spread = [EPOCHS * asked / (EPOCHS * ours + once) for asked, (ours, once) in lives]
                line[side] = {
                    "epoch": live / recorded,
                    "all_epochs": total,
                    "all_epochs_in_single_rounds": [min(spread), max(spread)],
                    "target_met": total >= TARGET,
                    "limit": EPOCHS * live / (EPOCHS * least + passed),
                }
        teachers[key] = line
    live, viewed = seconds[f"fit, live {VIEWED}, views"], seconds["fit, recorded views"]
    return {
        "cpu_milliseconds_per_image": {name: 1e3 * value for name, value in seconds.items()},
        "images_per_second_and_core": {name: 1 / value for name, value in seconds.items()},
        "fit_start_seconds": start,
        "fit_to_student_only": recorded / least,
        "teacher_for_10x": {  # the cheapest: 20 (teacher + student) = 10 (20 recorded + teacher)
            "milliseconds_per_image": 1e3 * (20 * recorded - 2 * least),
            "student_steps": (20 * recorded - 2 * least) / least,
        },
        "ratios": teachers,
        f"fit_live_to_recorded_{VIEWED}": {
            "epoch": seconds[f"fit, live {VIEWED}"] / recorded,
            "all_epochs": EPOCHS * rows * seconds[f"fit, live {VIEWED}"]
            / (rows * (EPOCHS * recorded + seconds[f"record {VIEWED}"]) + start),
        },
        f"views_{VIEWED}": {
            str(count): EPOCHS * live / (EPOCHS * viewed + count * seconds[f"record {VIEWED}, views"])
            for count in (1, 2, 4, 10, 20)
        },
    }  # fmt: skip


def show(measured: dict[str, Any], summary: dict[str, Any]) -> None:
    console = Console(width=110)
    about, where = measured["configuration"], measured["environment"]
    console.print(
        f"{about['images']}, batch {BATCH}, fp32, {about['layout']}, one thread of {where['processor']}, "
        f"torch {where['packages']['torch']}; CPU time, medians of {about['rounds']} segments"
    )
    table = Printed("side", "ms / image", "images / s", title="Cost of an image")
    for name, value in summary["cpu_milliseconds_per_image"].items():
        table.add_row(name, f"{value:.3f}", f"{1e3 / value:,.0f}")
    console.print(table)
    table = Printed(
        "teacher", "parameters", "FLOPs / student's", "against", "one epoch", f"{EPOCHS} epochs + recording", "limit",
        title="How many times cheaper fit() from a recording is",
    )  # fmt: skip
    for key, line in summary["ratios"].items():
        for side in ("usual loop", "torchdistill"):
            if side in line:
                size = f"{measured['networks'][key]['parameters']:,}"
                numbers = [f"{line[side][what]:.1f}x" for what in ("epoch", "all_epochs", "limit")]
                table.add_row(key, size, f"{line['flops_to_student']:.0f}", side, *numbers)
    console.print(table)
    console.print(
        f"limit: the student's own step in plain torch and the recording pass, nothing else. fit() costs "
        f"{summary['fit_to_student_only']:.2f}x that step, and {summary['fit_start_seconds']:.1f} s once."
    )
    enough = summary["teacher_for_10x"]
    console.print(
        f"10x over {EPOCHS} epochs needs a teacher of {enough['milliseconds_per_image']:.1f} ms an image or more: "
        f"{enough['student_steps']:.0f} times the student's own step."
    )
    views_of = "  ".join(f"{count}: {ratio:.1f}x" for count, ratio in summary[f"views_{VIEWED}"].items())
    console.print(f"{EPOCHS} epochs under augmentation against fit() with live {VIEWED}, by recorded views  {views_of}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", choices=list(fashion.FORMATS), default="channels_last", help="of all networks")
    parser.add_argument("--data", type=Path, default=fashion.DEBIAN, help="folder of Fashion-MNIST's idx .gz files")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers", help="torchdistill's environment")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recorded_epoch.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    python = given.peers / "bin" / "python"
    if not python.is_file():
        Console().print(f"{given.peers.name} is not there: torchdistill is left out. See benchmarks/README.md.")
    began = time.monotonic()
    measured = measure(given.rounds, given.data, python if python.is_file() else None, given.layout)
    summary = summarise(measured)
    show(measured, summary)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"summary": summary, **measured}, indent=1) + "\n")
    Console().print(f"written: {given.out.name}, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

"""How small may a neural policy be? Return kept in closed loop against parameters, cloning beside DAgger.

    python benchmarks/neural_policies.py [--robots ant hopper pendulum] [--starts 20] [--seed 0]

Teachers: the Ant and Hopper policies that PyBullet ships (2017), and PPO of Stable-Baselines3, trained here for MuJoCo
InvertedPendulum-v5 on its whole state; that student sees positions only, in three frames, and no velocity. Cloning
learns from the teacher's own driving; DAgger asks the teacher about states where the student drives, the teacher less
in each of three rounds, all rounds kept; both ask the teacher equally often, and their last training is equally long.
Every policy drives from the same unseen starts: mean return with its bootstrap interval, and the worst episode. The
largest error of an action is over the teacher's states, in units of its range. One training seed; a second tells how
much of a difference is luck. Robots join those of the same settings in benchmarks/results/neural_policies.json, and
docs/policies.svg shows them all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import stillroom as sr
from stillroom.control import Task, drive, gymnasium, pybullet, stable_baselines3
from stillroom.control.answered import Answered
from stillroom.environment import environment
from stillroom.files import read_json, write_json
from stillroom.gathering import FIRST_UNSEEN, Gathering, gather
from stillroom.measures import bootstrap
from stillroom.types import identity_of

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "neural_policies.json"
CURVE = HERE.parent / "docs" / "policies.svg"
QUESTIONS, ROUNDS, STEPS, BATCH = 6000, 3, 3000, 128


@dataclass(frozen=True)
class Robot:
    task: Callable[[], Task]
    teacher: Callable[[], Any]
    hidden: tuple[tuple[int, ...], ...]  # of the students
    scale: float = 1.0  # of what they see
    steps: int = STEPS


PPO = {"n_steps": 256, "gamma": 0.999, "learning_rate": 1e-3}  # those of examples/pendulum.yaml
ROBOTS = {
    "ant": Robot(lambda: pybullet.task("ant"), lambda: pybullet.teacher("ant"), ((33,), (8,), (64,))),
    "hopper": Robot(lambda: pybullet.task("hopper"), lambda: pybullet.teacher("hopper"), ((32,), (8,), (64,))),
    "pendulum": Robot(
        lambda: gymnasium.task("InvertedPendulum-v5", sees=[0, 1], frames=3),
        lambda: stable_baselines3.ppo("InvertedPendulum-v5", 60_000, **PPO, progress=False),
        ((16,), (8,), (4,), (2,)),
        scale=20,
        steps=6000,
    ),
}


def student_of(task: Task, inputs: int, hidden: Sequence[int], scale: float, seed: int) -> sr.Student:
    factory = "stillroom.students.architectures:mlp"
    arguments = {"inputs": inputs, "outputs": task.actions, "hidden": list(hidden), "scale": scale}
    return sr.Student.make(factory, arguments, answers="values", seed=seed, name=f"{task.name} student")


def distilled(task: Task, teacher: Any, way: str, start: sr.Student, steps: int, seed: int) -> sr.Student:
    """As a recipe does it: QUESTIONS asked in the rounds of ``way``, then ``steps`` optimiser steps on all of them."""
    objective = sr.MatchActions("huber", delta=0.5, clip=(task.low, task.high))
    plan = sr.Plan(steps=steps, batch_size=BATCH, learning_rate=3e-3, weight_decay=0.0, seed=seed)
    how = Gathering(way, questions=QUESTIONS, rounds=ROUNDS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        found = gather(start, teacher, [task], objective, how, plan=plan, folder=folder, progress=False)
    answers = Answered(found.episodes, identity_of(teacher))
    return sr.fit(found.student, answers, found.episodes.table(), objective, plan=found.plan, progress=False)


def closed_loop(policy: Any, task: Task, starts: Sequence[int]) -> dict[str, Any]:
    """Returns from unseen starts: their mean with its 95 % interval, the worst, and every one."""
    returns = drive(policy, task, starts).returns
    mean = bootstrap(torch.from_numpy(returns)[None, :, None], lambda rows: float(rows.mean()))
    assert mean is not None
    return {"mean": mean.as_json(), "worst": float(returns.min()), "returns": returns.round(1).tolist()}


def largest_error(policy: Any, teacher: Any, task: Task, shown: Any) -> float:
    """Over the teacher's own states, of executed actions, as a share of the range."""
    table = shown.table()
    batch = table.batch(range(len(table)))
    with torch.no_grad():
        sides = [task.bounded(model(batch).values.numpy()) for model in (policy, teacher)]
    return float((np.abs(sides[0] - sides[1]) / (2 * task.half_range)).max())


def parameters_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.net.parameters())


def measured(name: str, starts: Sequence[int], seed: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One robot: the teacher, and a student of each size by each way; what is known so far, after each."""
    robot = ROBOTS[name]
    task, teacher = robot.task(), robot.teacher()
    shown = drive(teacher, task, starts[:2], teacher=teacher)
    inputs = shown.observations.shape[1]
    theirs = closed_loop(teacher, task, starts)
    said = f"return {theirs['mean']['value']:.0f}, worst {theirs['worst']:.0f}"
    say(f"{name}: teacher, {parameters_of(teacher):,} parameters: {said}")
    rows: list[dict[str, Any]] = []
    for hidden in robot.hidden:
        untrained = student_of(task, inputs, hidden, robot.scale, seed)
        for way in ("cloning", "dagger"):
            began = time.process_time()
            student = distilled(task, teacher, way, untrained, robot.steps, seed)
            found = {"way": way, "hidden": list(hidden), "parameters": parameters_of(student)}
            found |= closed_loop(student, task, starts)
            found["largest_error"] = largest_error(student, teacher, task, shown)
            found["cpu_seconds"] = round(time.process_time() - began, 1)
            rows.append(found)
            kept = f"return {found['mean']['value']:.0f}, worst {found['worst']:.0f}"
            say(f"  {way:<8} {found['parameters']:>6,} parameters: {kept}")
            ordered = sorted(rows, key=lambda row: row["parameters"])
            about = {"parameters": parameters_of(teacher), "inputs": inputs, "steps": robot.steps}
            yield {**about, "teacher": theirs, "students": ordered}


def table_of(robots: dict[str, Any]) -> Table:
    table = Table(
        "robot", "policy", "parameters", "share", "mean return (95 %)", "worst", "kept", "largest error", box=None
    )
    for name, found in robots.items():
        theirs, whole = found["teacher"], found["parameters"]
        cells = [("teacher", whole, theirs, None)]
        cells += [(row["way"], row["parameters"], row, row["largest_error"]) for row in found["students"]]
        for policy, parameters, row, error in cells:
            mean, kept = row["mean"], row["mean"]["value"] / theirs["mean"]["value"]
            spread = f"{mean['value']:.0f} ({mean['low']:.0f} to {mean['high']:.0f})"
            last = "" if error is None else f"{error:.2f}"
            table.add_row(
                name,
                policy,
                f"{parameters:,}",
                f"{parameters / whole:.1%}",
                spread,
                f"{row['worst']:.0f}",
                f"{kept:.1%}",
                last,
            )
    return table


def draw(robots: dict[str, Any], path: Path) -> None:
    """Return kept, mean and worst episode, against parameters as a share of the teacher's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "neural-policies"
    figure, axes = pyplot.subplots(1, len(robots), figsize=(4.2 * len(robots), 3.4), sharey=True, squeeze=False)
    for panel, (name, found) in zip(axes[0], robots.items(), strict=True):
        whole = found["teacher"]["mean"]["value"]
        for way, colour in (("cloning", "#b5651d"), ("dagger", "#1d6fb5")):
            rows = [row for row in found["students"] if row["way"] == way]
            sizes = [100 * row["parameters"] / found["parameters"] for row in rows]
            panel.plot(
                sizes, [100 * row["mean"]["value"] / whole for row in rows], "o-", color=colour, label=f"{way}, mean"
            )
            panel.plot(sizes, [100 * row["worst"] / whole for row in rows], "v:", color=colour, label=f"{way}, worst")
        panel.axhline(100, color="#888888", linewidth=0.8)
        panel.axhline(100 * found["teacher"]["worst"] / whole, color="#888888", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        shares = sorted({100 * row["parameters"] / found["parameters"] for row in found["students"]})
        panel.set_xticks(shares, [f"{share:.1f}" for share in shares])
        panel.minorticks_off()
        panel.set_xlabel("parameters, % of the teacher's")
        panel.set_title(f"{name} ({found['parameters']:,} parameters)", fontsize=10)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("return kept, %")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _spent(began: float) -> dict[str, Any]:
    return {"cpu_seconds": round(time.process_time() - began, 1), "environment": environment()}


def measured_before(results: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The robots that are in the file already; none where they were measured with other settings."""
    known = read_json(results) if results.is_file() else {}
    return known["robots"] if all(known.get(name) == value for name, value in settings.items()) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", nargs="+", default=list(ROBOTS), choices=list(ROBOTS))
    parser.add_argument("--starts", type=int, default=20, help="unseen starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    starts = range(FIRST_UNSEEN, FIRST_UNSEEN + chosen.starts)
    settings = {"questions": QUESTIONS, "rounds": ROUNDS, "steps": STEPS, "starts": len(starts), "seed": chosen.seed}
    robots = measured_before(chosen.results, settings)
    for name in chosen.robots:
        began = time.process_time()
        for found in measured(name, starts, chosen.seed, console.print):
            robots[name] = {**found, **_spent(began)}
            write_json(chosen.results, {**settings, "robots": robots})
    robots = {name: robots[name] for name in ROBOTS if name in robots}
    draw(robots, CURVE)
    console.print(table_of(robots))


if __name__ == "__main__":
    main()

"""Four ways of gathering on Meta-World's Sawyer arm, at equal numbers of teacher's answers, with and without noise.

    python benchmarks/arm_policies.py                       every task, then one student for all five
    python benchmarks/arm_policies.py --tasks push-v3       one task (minutes)
    python benchmarks/arm_policies.py --table               the table of what was measured

Each cell: one student of 11,716 parameters (12,676 where it is told which of five tasks), one seed, scored on 50 unseen
starts undisturbed and again with noise of 0.3 of half the action's range. Results join results/arm_policies.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import stillroom as sr
from stillroom.control import drive, outcomes_of
from stillroom.control.answered import Answered
from stillroom.control.metaworld import SAWYER, experts, sawyer
from stillroom.control.outcomes import METRICS
from stillroom.gathering import FIRST_UNSEEN, Gathering, gather
from stillroom.measures import bootstrap
from stillroom.types import Batch, Signal, identity_of

WAYS = {
    "cloning": {"way": "cloning"},
    "DART": {"way": "dart", "noise": 0.3},
    "DAgger, mixed": {"way": "dagger"},
    "DAgger, student drives": {"way": "dagger", "first_share": 0.0},
    "student drives, last round only": {"way": "student_drives"},
}
ALL = "all five"
RESULTS = Path(__file__).parent / "results" / "arm_policies.json"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--tasks", nargs="+", default=[*SAWYER, ALL], choices=[*SAWYER, ALL])
    asked.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    asked.add_argument("--questions", type=int, default=2000, help="of the teacher, for each task")
    asked.add_argument("--steps", type=int, default=1500, help="of the last training")
    asked.add_argument("--starts", type=int, default=50, help="unseen ones, for each task")
    asked.add_argument("--horizon", type=int, default=150)
    asked.add_argument("--table", action="store_true", help="only print what was measured")
    given = asked.parse_args()
    torch.set_num_threads(1)
    for task in [] if given.table else given.tasks:
        measure(task, given)
    print(table(json.loads(RESULTS.read_text())))


def measure(name, given) -> None:
    """All ways on one task (or on all), written as they come."""
    names = list(SAWYER) if name == ALL else [name]
    tasks, teacher = sawyer(names, horizon=given.horizon), experts()
    starts = range(FIRST_UNSEEN, FIRST_UNSEEN + given.starts * len(tasks))
    shown = drive(teacher, tasks, starts, teacher=teacher)
    outcomes, _ = outcomes_of(teacher, tasks, starts, teacher, shown)
    keep(name, "teacher", cells(outcomes, names), given)
    for way in given.ways:
        began = time.process_time()
        found = trained(way, tasks, teacher, given)
        trained_in = time.process_time() - began
        outcomes, _ = outcomes_of(found, tasks, starts, teacher, shown)
        parameters = sum(p.numel() for p in found.net.parameters())
        spent = {"parameters": parameters, "cpu_seconds": round(trained_in, 1)}
        keep(name, way, cells(outcomes, names) | spent, given)


def trained(way, tasks, teacher, given):
    inputs = tasks[0].frames * len(tasks[0].observation(torch.zeros(39).double().numpy()))
    arguments = {"inputs": inputs, "outputs": 4, "hidden": [96, 96]}
    start = sr.Student.make("stillroom.students.architectures:mlp", arguments, answers="values", name=way)
    how = Gathering(questions=given.questions * len(tasks), **WAYS[way])
    plan = sr.Plan(steps=given.steps * (2 if len(tasks) > 1 else 1), batch_size=128, learning_rate=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        found = gather(start, teacher, tasks, sr.MatchValues(), how, plan=plan, folder=folder, progress=False)
    answers = Answered(found.episodes, identity_of(teacher))
    rows = found.episodes.table()
    return sr.fit(found.student, answers, rows, sr.MatchValues(), plan=found.plan, progress=False)


def cells(outcomes, names):
    """Every metric with its interval; of several tasks each one's success too."""
    batch = Batch(tuple(outcomes.rows), {})
    said = outcomes(batch)
    found = {}
    for metric in METRICS.values():
        if metric.name.startswith("success"):
            interval = outcomes.share(metric.name)
        else:
            interval = bootstrap([metric.statistics(said, Signal(), batch)], metric.finish)
        found[metric.name] = interval and {name: round(value, 6) for name, value in interval.as_json().items()}
    if len(names) > 1:
        found["by_task"] = {
            task: {
                "success": outcomes.mean("success", task),
                "success_disturbed": outcomes.mean("success_disturbed", task),
            }
            for task in names
        }
    return found


def keep(task, way, found, given) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = {name: getattr(given, name) for name in ("questions", "steps", "starts", "horizon")}
    known.setdefault(task, {})[way] = {**found, "settings": settings}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(task, "|", way, "|", found["success"]["value"], found["success_disturbed"]["value"], flush=True)


def table(known) -> str:
    """Success undisturbed and disturbed, in percent with 95 % intervals, and the ratio of errors."""
    ways = ["teacher", *WAYS]
    lines = ["| task | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for task, rows in known.items():
        for what, said in (("success", ""), ("success_disturbed", ", noise"), ("error_ratio", ", errors’ ratio")):
            shown = [shown_cell(rows.get(way, {}).get(what), what) for way in ways]
            lines.append(f"| {task}{said} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def shown_cell(cell, what) -> str:
    if not cell:
        return ""
    if what == "error_ratio":
        return f"{cell['value']:.1f}"
    return f"{100 * cell['value']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"


if __name__ == "__main__":
    main()

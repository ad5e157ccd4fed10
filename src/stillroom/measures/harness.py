"""Tasks of EleutherAI's lm-evaluation-harness. lm_eval is only here; its tasks, prompts and scores are its own.

Most of its tasks download their data from a hub; a task of your own is a YAML file beside its data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.errors import MissingFileError, UsageError, missing_extra, nearest
from stillroom.measures.bootstrap import Interval, bootstrap
from stillroom.measures.generations import causal_net
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Model

FORMAT = "stillroom-harness/1"


def run_tasks(
    models: Mapping[str, Model | Sequence[Model]],
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Each task's own scores for each row (its first seed), with 95 % intervals over questions where a score is a mean.

    ``include``: a folder of task files of your own, in place of the harness's. ``limit``: questions of a task;
    ``few_shot``: worked examples before each, None = as the task says; ``chat``: in the model's chat template.
    Returns {"version", "tasks": {task: questions}, "rows": {row: {"task score": {"value", "low", "high"}}}, ...}.

    Raises MissingExtraError without lm_eval, UsageError for an unknown task or a model that is no causal language
    model with a tokenizer, MissingFileError when a task's data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm_eval", "harness") from error
    wrapped: Any = HFLM  # its decorators hide its parameters
    known = TaskManager(include_path=include, include_defaults=include is None)
    for task in tasks:
        if task not in known.all_tasks:
            where = "lm-evaluation-harness" if include is None else str(include)
            raise UsageError(f"{where} has no task {task!r}{nearest(task, known.all_tasks)}")
    asked = {"tasks": list(tasks), "task_manager": known, "num_fewshot": few_shot, "limit": limit}
    asked |= {"apply_chat_template": chat, "bootstrap_iters": 0}
    asked |= dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    rows: dict[str, dict[str, Any]] = {}
    questions: dict[str, int] = {}
    for row, model in models.items():
        net, tokenizer = _language_model(row, model)
        with _as_it_was(net), torch.no_grad():
            lm = wrapped(pretrained=net, tokenizer=tokenizer, batch_size=batch_size)
            found = _evaluated(lm_eval.simple_evaluate, lm, asked)
        rows[row] = _cells(found, replicates, seed)
        questions = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    settings = {"limit": limit, "few_shot": few_shot, "chat": chat, "replicates": replicates, "seed": seed}
    version = lm_eval.__version__
    return {"format": FORMAT, "version": version, "tasks": questions, "rows": rows, "settings": settings}


def _evaluated(evaluate: Any, lm: Any, asked: Mapping[str, Any]) -> Any:
    try:
        return evaluate(model=lm, **asked)
    except (OSError, ConnectionError) as error:
        raise MissingFileError(
            f"the data of {', '.join(asked['tasks'])} cannot be had ({error}). lm-evaluation-harness downloads them: "
            "run where there is a network, or give a task of your own with its data (include=FOLDER)."
        ) from error


def _language_model(row: str, model: Any) -> tuple[Any, Any]:
    first = model[0] if isinstance(model, list | tuple) else model
    net, tokenizer = causal_net(first), getattr(first, "tokenizer", None)
    if net is None or tokenizer is None:
        raise UsageError(f"row {row!r} is no causal language model with its tokenizer: the harness cannot ask it.")
    return (net.get_base_model() if hasattr(net, "get_base_model") else net), tokenizer  # type: ignore[operator]


def _cells(found: Mapping[str, Any], replicates: int, seed: int) -> dict[str, Any]:
    """{"task score": cell}; a score that is no mean over questions has no interval (low = high = value)."""
    cells = {}
    for task, scores in found["results"].items():
        for key, value in scores.items():
            name, comma, way = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            title = f"{task} {name}" if way == "none" else f"{task} {name} ({way})"
            each = [s[name] for s in found["samples"].get(task, ()) if s.get("filter") == way and name in s]
            cells[title] = _interval(float(value), each, replicates, seed).as_json()
    return cells


def _interval(value: float, each: Sequence[Any], replicates: int, seed: int) -> Interval:
    if not each or not all(isinstance(score, int | float) for score in each):
        return Interval.exact(value)
    rows = torch.tensor([[float(score), 1.0] for score in each], dtype=torch.float64)
    found = bootstrap([rows], RatioOfSums(), replicates, seed)
    return found if found is not None and abs(found.value - value) < 1e-9 else Interval.exact(value)


@contextmanager
def _as_it_was(net: Any) -> Iterator[None]:
    """The harness seeds every generator and puts the network in evaluation mode: both are given back."""
    training, states = net.training, (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        net.train(training)
        random.setstate(states[0])
        np.random.set_state(states[1])

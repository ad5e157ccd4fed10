"""Shards written by the workers of a Ray cluster, through Ray Data. The only file that imports ray.

Each worker holds the teacher and the data once and writes whole shards to the recording's folder, which every worker
must see. What a killed worker had not finished, Ray hands to another: the bytes are those of the local engine.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stillroom import errors
from stillroom.errors import RecordingError, StillroomError, UsageError, missing_extra
from stillroom.progress import Step
from stillroom.recording.writing import Work

USERS = "stillroom_user_"  # how a user's own file is called among the modules: no worker can import it by name


def on_ray(work: Work, numbers: Sequence[int], step: Step) -> None:
    """Spread the shards of these ``numbers`` over Ray: over its CPUs, one worker each, or fewer where shards are fewer.

    Uses the cluster of ``RAY_ADDRESS``, or the one that is running, or starts one on this machine and ends it.
    Raises UsageError for a teacher or data that cannot travel to a worker, RecordingError for what workers meet.
    """
    if not numbers:
        return
    ray: Any = _library()
    with _cluster(ray):
        _quiet_data(ray)
        there = _put(ray, dataclasses.replace(work, folder=work.folder.resolve()))
        workers = max(1, min(len(numbers), int(ray.cluster_resources().get("CPU", 1))))
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        written = rows.map(
            _Writer,
            fn_constructor_args=(there, torch.get_num_threads(), sys.path),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        try:
            for row in written.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"], RecordingError)(row["said"])
                step(int(row["rows"]))
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise RecordingError(f"a worker failed: {last}. What was recorded before is whole.") from error
    if missing := [number for number in numbers if not work.path(number).is_file()]:
        raise RecordingError(
            f"the workers wrote {len(missing)} shards where this process cannot see them ({work.path(missing[0])}). "
            "Record into a folder that all machines of the cluster share."
        )


class _Writer:
    """A worker: has the work once, writes one shard for each row."""

    def __init__(self, there: Any, threads: int, places: Sequence[str]):
        import ray

        sys.path += [place for place in places if place not in sys.path]  # the user's own modules
        torch.set_num_threads(threads)  # another number of threads adds in another order
        self.work: Work = ray.get(there)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        try:
            self.work.write(number, _nothing)
        except StillroomError as error:  # Ray hands on the text of an exception, and not which it was
            return {"rows": 0, "error": type(error).__name__, "said": str(error)}
        return {"rows": self.work.rows(number), "error": "", "said": ""}


def _nothing(amount: int = 1, note: str = "") -> None:
    """A worker shows no bar: the process that waits for it does."""


def _put(ray: Any, work: Work) -> Any:
    """The work, in the memory that the workers share."""
    for name, module in list(sys.modules.items()):
        if name.startswith(USERS):
            ray.cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(work)
    except Exception as error:
        raise UsageError(
            f"the teacher or its data cannot travel to Ray's workers ({type(error).__name__}: {error}). "
            "Record with the local engine, or give a teacher that opens what it needs when it is first asked."
        ) from error


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A cluster that is connected already stays; one that is started here is ended here."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own new default, and no warning about it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_data(ray: Any) -> None:
    """One progress bar is enough: ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _library() -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "ray", "ray") from None
    return ray

"""record: ask the teacher once about every example and view, and keep its answers.

Killed at any instant and run again, it ends with the same bytes as an uninterrupted run: shards are fixed blocks of
keys, the batches within them too, and nothing that depends on time or place is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import file_digest, input_fingerprints
from stillroom.errors import DataError, FolderError, RecordingError, UsageError, nearest
from stillroom.files import claim_folder, read_json, write_json
from stillroom.progress import bar
from stillroom.recording.asking import Job, as_codecs, as_views, check_request
from stillroom.recording.codec import Codec, decode, prepare
from stillroom.recording.codecs import Everything
from stillroom.recording.fidelity import Fidelity
from stillroom.recording.on_ray import on_ray
from stillroom.recording.rows import Rows
from stillroom.recording.shards import build_index, gather, open_shard, write_index, write_once
from stillroom.recording.store import INDEX, MANIFEST, ONCE, SHARDS, Recording, index_source, load_once, shard_name
from stillroom.recording.writing import Asked, Work, batches, blocks, layout, one_by_one
from stillroom.types import Batch, Examples, Model, check_batch_of

try:
    import fcntl
except ImportError:  # not on Windows: two recordings into one folder are not noticed there
    fcntl = None

REASKED = 64  # examples that the fidelity is measured on, or fewer when they have
ENOUGH = 4096  # positions
SHARD_BYTES = 32 << 20  # a kill loses at most one shard's work
SHARD_ROWS = 4096
SHARD_POSITIONS = 16384  # of rows of tokens: a minute of asking on a processor
EVERYTHING = Everything()

Engine = Literal["local", "ray"]
ENGINES: dict[str, Asked] = {"local": one_by_one, "ray": on_ray}


def record(
    teacher: Model,
    examples: Examples,
    folder: str | Path,
    keep: Codec | Sequence[Codec] = EVERYTHING,
    *,
    views: int | Sequence[int] | None = None,
    batch_size: int = 64,
    shard_rows: int | None = None,
    engine: Engine = "local",
    progress: bool = True,
) -> Recording:
    """The Recording of the teacher's answers in ``folder``; one that is there already is finished or returned.

    ``keep`` is one codec or several. ``views`` = n records every example in the views of seeds 0 .. n - 1; a sequence
    names the seeds; None asks about the unaugmented examples. ``shard_rows`` answers go into each file: by default at
    most 4096 and about 32 MiB. ``engine``: "local" asks in this process; "ray" spreads the shards over the workers of
    a Ray cluster (extra ``ray``) that see ``folder``, with the same bytes.

    Raises FolderError when the folder holds another recording (nothing is touched) or is being written; SignalError
    for a teacher in training mode, or naming the example whose answer is NaN or infinite; UsageError for settings that
    do not fit the answers; PairError for a teacher whose class order is not the data's; RecordingError when a file
    cannot be written.
    """
    folder = Path(folder)
    codecs = as_codecs(keep)
    job = Job(teacher, examples, codecs, as_views(views), batch_size, check_batch_of(examples))
    check_request(job, shard_rows)
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}")
    header = job.header()
    claimed = header if shard_rows is None else header | {"shard_rows": shard_rows}
    with _alone(folder):
        claim_folder(folder, MANIFEST, claimed, "recording")
        manifest = _resumed(folder) or _started(job, folder, header, shard_rows)
        if manifest["complete"]:
            return Recording(folder)
        once = _restored(job, folder, manifest)
        _write_shards(job, folder, manifest, once, engine, progress)
        _finish(job, folder, manifest, once)
    return Recording(folder)


def _resumed(folder: Path) -> dict[str, Any] | None:
    """The manifest that is there; marked incomplete again when a shard was lost or cut."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    sizes = {name: entry["bytes"] for name, entry in manifest["shards"].items()}
    there = {name: path.stat().st_size for name in sizes if (path := folder / SHARDS / name).exists()}
    once = manifest.get("once")
    if sizes != there or (once is not None and not (folder / ONCE).is_file()):
        manifest |= {"complete": False, "shards": {}, "fidelity": None}
        _write_manifest(folder, manifest)
    return manifest


def _started(job: Job, folder: Path, header: dict[str, Any], shard_rows: int | None) -> dict[str, Any]:
    """A new manifest. The first batch is asked before anything is written: what cannot be kept is found out here."""
    batch = job.batch(0, min(job.batch_size, len(job)))
    answer = job.ask(batch)
    once = prepare(job.codecs, answer)
    kept = job.keep(batch, once, answer)
    if shard_rows is None:
        row_bytes = sum(tensor.nbytes for tensor in kept.rows.values()) // len(batch)
        positions = 1 if batch.mask is None else batch.mask[0].numel()
        fitting = min(SHARD_ROWS, SHARD_BYTES // max(1, row_bytes), SHARD_POSITIONS // max(1, positions))
        shard_rows = max(1, fitting // job.batch_size) * job.batch_size
    manifest = header | {
        "shard_rows": shard_rows,
        "signals": layout(kept),
        "facts": kept.facts,
        "once": _kept_once(folder, once),
        "complete": False,
        "shards": {},
        "fidelity": None,
    }
    _write_manifest(folder, manifest)
    return manifest


def _kept_once(folder: Path, once: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What the manifest says of the arrays that are kept once, after they were written."""
    if not once:
        return None
    write_once(folder / ONCE, once)
    return {"sha256": file_digest(folder / ONCE), "bytes": (folder / ONCE).stat().st_size}


def _restored(job: Job, folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The arrays that are kept once; a file that was lost or damaged is made anew from the first batch."""
    with suppress(RecordingError):
        return load_once(folder, manifest)
    answer = job.ask(job.batch(0, min(job.batch_size, len(job))))
    if _kept_once(folder, prepare(job.codecs, answer)) != manifest["once"]:
        raise RecordingError(
            f"{folder / ONCE} was lost, and the teacher's answer to the first batch is no longer the one that it was "
            "made from. Record into another folder."
        )
    return load_once(folder, manifest)


def _write_shards(job: Job, folder: Path, manifest: dict[str, Any], once: Rows, engine: Engine, progress: bool) -> None:
    for stale in (*folder.glob("*.tmp"), *(folder / SHARDS).glob("*.tmp")):
        stale.unlink()
    work = Work(job, folder, manifest, once)
    lacking = work.lacking()
    done = len(job) - sum(work.rows(number) for number in lacking)
    with bar(f"recording {manifest['teacher']['name']}", len(job), done, shown=progress) as step:
        ENGINES[engine](work, lacking, step)


def _finish(job: Job, folder: Path, manifest: dict[str, Any], once: Rows) -> None:
    """Digest the shards, derive the index, measure the fidelity; the complete manifest is the last thing written."""
    paths = [folder / SHARDS / shard_name(n) for n in range(len(blocks(len(job), manifest["shard_rows"])))]
    shards = [open_shard(path) for path in paths]
    manifest["shards"] = {
        path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size, "rows": len(shard)}
        for path, shard in zip(paths, shards, strict=True)
    }
    index = build_index(shards)
    manifest["fidelity"] = _fidelity(job, manifest, once, dict(enumerate(shards)))
    write_index(folder / INDEX, index, index_source(manifest))
    _write_manifest(folder, manifest | {"complete": True})


def _fidelity(job: Job, manifest: dict[str, Any], once: Rows, shards: dict[int, Any]) -> dict[str, Any]:
    """Ask again about a seeded sample, in the batches it was recorded in: so that equal can mean equal bits."""
    shard_rows = manifest["shard_rows"]
    asked = [b for block in blocks(len(job), shard_rows) for b in batches(*block, job.batch_size)]
    draw = np.random.default_rng(0)
    wanted = min(len(asked), max(4, -(-REASKED // job.batch_size)))
    some = [asked[number] for number in draw.choice(len(asked), wanted, replace=False)]
    pool = np.concatenate([np.arange(start, stop) for start, stop in some])
    keys = np.sort(draw.choice(pool, min(REASKED, len(pool)), replace=False))
    measured = Fidelity()
    for start, stop in some:
        rows = keys[(keys >= start) & (keys < stop)] - start
        if not len(rows) or measured.variation_positions >= ENOUGH:
            continue
        batch = job.batch(start, stop)
        where, within = np.divmod(start + rows, shard_rows)
        arrays = gather(shards, where, within, (*manifest["signals"], "inputs"))
        _check_replay(batch, arrays.pop("inputs").numpy().view(np.uint64), rows)
        chosen = torch.from_numpy(rows)
        live = job.ask(batch).map(lambda tensor, chosen=chosen: tensor[chosen.to(tensor.device)])
        mask = None if batch.mask is None else batch.mask[chosen.to(batch.mask.device)]
        part = Batch(tuple(batch.ids[row] for row in rows), {}, mask=mask)
        measured.add(live, decode(job.codecs, arrays, manifest["facts"], once), part)
        measured.examples += len(rows)
    return measured.summary(sum(entry["bytes"] for entry in manifest["shards"].values()), len(job))


def _check_replay(batch: Batch, recorded: np.ndarray, rows: np.ndarray) -> None:
    wrong = input_fingerprints(batch.inputs)[rows] != recorded
    if wrong.any():
        raise DataError(
            f"example {batch.ids[int(rows[wrong.argmax()])]!r} came with other inputs when it was asked for again: "
            "the data must give the same inputs for the same index and view seed. Draw augmentations from the seed."
        )


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    try:
        write_json(folder / MANIFEST, manifest)
    except OSError as error:
        (folder / (MANIFEST + ".tmp")).unlink(missing_ok=True)
        raise RecordingError(f"{folder / MANIFEST} could not be written ({error.strerror or error}).") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder while it is written. The lock is the folder's own, so no file is left and a kill frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY) if fcntl else -1
    try:
        if fcntl:
            _lock(place, folder)
        yield
    finally:
        if fcntl:
            os.close(place)


def _lock(place: int, folder: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderError(
            f"{folder} is being recorded by another process. Wait for it, or choose another folder."
        ) from None

"""One shard at a time: the teacher asked about its keys, the answers checked and written whole.

A shard depends on nothing but the work and its number, so shards may be written in any order, anywhere, or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stillroom.digests import input_fingerprints, json_digest
from stillroom.errors import ShapeError
from stillroom.progress import Step
from stillroom.recording.asking import Job
from stillroom.recording.codec import Kept
from stillroom.recording.ragged import OFFSETS, append
from stillroom.recording.rows import Rows
from stillroom.recording.shards import is_intact, pack_keys, write_shard
from stillroom.recording.store import SHARDS, shard_name


@dataclass(frozen=True, eq=False)
class Work:
    """A recording that is being written."""

    job: Job
    folder: Path
    manifest: Mapping[str, Any]
    once: Rows

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return blocks(len(self.job), self.manifest["shard_rows"])

    def rows(self, number: int) -> int:
        """How many answers the shard of this number holds."""
        start, stop = self.blocks[number]
        return stop - start

    def path(self, number: int) -> Path:
        return self.folder / SHARDS / shard_name(number)

    def lacking(self) -> list[int]:
        """The shards that are not there, whole and of this recording."""
        mark = claim(self.manifest)
        count = len(self.blocks)
        return [number for number in range(count) if not is_intact(self.path(number), mark, self.rows(number))]

    def write(self, number: int, step: Step) -> None:
        """Ask for one shard and write it."""
        arrays = shard_arrays(self.job, self.manifest, self.once, *self.blocks[number], step)
        write_shard(self.path(number), arrays, claim(self.manifest))


Asked = Callable[[Work, Sequence[int], Step], None]  # writes the shards of these numbers


def one_by_one(work: Work, numbers: Sequence[int], step: Step) -> None:
    """In this process, in order."""
    for number in numbers:
        work.write(number, step)


def shard_arrays(
    job: Job, manifest: Mapping[str, Any], once: Rows, start: int, stop: int, step: Step
) -> dict[str, Tensor]:
    """The keys and kept answers from key ``start`` to ``stop``, asked batch by batch."""
    ids: list[str] = []
    views: list[int] = []
    fingerprints: list[np.ndarray] = []
    pieces: dict[str, list[Tensor]] = {}
    for first, last in batches(start, stop, job.batch_size):
        batch = job.batch(first, last)
        kept = job.keep(batch, once)
        if (found := layout(kept)) != manifest["signals"] or kept.facts != manifest["facts"]:
            raise ShapeError(
                f"the answers from example {batch.ids[0]!r} on have another form: {found} {kept.facts}, but the "
                f"first had {manifest['signals']} {manifest['facts']}. All examples need one shape: pad or pack them."
            )
        ids.extend(batch.ids)
        views.extend(batch.views or ())
        fingerprints.append(input_fingerprints(batch.inputs))
        for name, rows in kept.rows.items():
            pieces.setdefault(name, []).append(rows)
        step(last - first)
    keys = pack_keys(ids, views or None, np.concatenate(fingerprints))
    return keys | append(pieces)


def blocks(total: int, rows: int) -> list[tuple[int, int]]:
    """The keys of each shard: from, to."""
    return [(start, min(start + rows, total)) for start in range(0, total, rows)]


def batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The keys that are asked about together: from, to."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def layout(kept: Kept) -> dict[str, Any]:
    """The kept arrays, of one answer; ``null`` is the shape of ragged ones."""
    return {
        name: {
            "dtype": str(rows.dtype).removeprefix("torch."),
            "shape": None if name + OFFSETS in kept.rows else list(rows.shape[1:]),
        }
        for name, rows in kept.rows.items()
        if not name.endswith(OFFSETS)
    }


def claim(manifest: Mapping[str, Any]) -> str:
    """The digest of everything that decides the shards' bytes."""
    return json_digest({k: v for k, v in manifest.items() if k not in ("complete", "shards", "fidelity")})

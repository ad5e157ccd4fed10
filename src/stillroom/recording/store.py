"""Recording: a folder of the teacher's answers, read by memory map. It answers batches as the teacher would.

Knows nothing of how the answers were asked for (record.py) nor of what is done with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stillroom import settings
from stillroom.digests import examples_digest, file_digest, input_fingerprints, json_digest, key_hash
from stillroom.errors import FolderError, MissingFileError, PairError, RecordingError
from stillroom.files import read_json
from stillroom.recording import shards as files
from stillroom.recording.codec import Codec, decode
from stillroom.recording.shards import KEY_ARRAYS, UNAUGMENTED, Index, Shard, damaged, gather, open_shard
from stillroom.types import Batch, Examples, Identity, Model, Signal, identity_of

FORMAT = "stillroom-recording/1"
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
SHARDS = "shards"
ONCE = "once.safetensors"


class Recording:
    """The recorded teacher: a Model whose answers come from ``folder``, on the CPU and without gradient.

    A call looks up (example id, view seed) and compares the batch's inputs with what the teacher was asked, so an
    answer to another augmentation, preprocessing or row is refused. An answer recorded without augmentation
    (``views`` is None) also serves a batch with view seeds whose inputs are unchanged by them.

    Raises RecordingError for an incomplete, truncated or damaged recording, naming the file.
    """

    answers_from_disk = True  # so that nobody takes the time of reading for the teacher's latency

    def __init__(self, folder: str | Path, base: Path | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.identity = identity_from(self.manifest["teacher"])
        self.classes = self.identity.classes
        self.views: tuple[int, ...] | None = None if self.manifest["views"] is None else tuple(self.manifest["views"])
        self.codecs: tuple[Codec, ...] = settings.rebuild(self.manifest["keep"], base)
        self._names = tuple(self.manifest["signals"])
        self._shards: dict[int, Shard] = {}
        entries = self.manifest["shards"]
        self._paths = [self.folder / SHARDS / shard_name(number) for number in range(len(entries))]
        for path in self._paths:
            _check_size(path, entries[path.name]["bytes"])
        if self.manifest.get("once") is not None:
            _check_size(self.folder / ONCE, self.manifest["once"]["bytes"])
        self._index = self._load_index()

    def __len__(self) -> int:
        """The number of answers: examples times views."""
        return len(self._index.keys)

    def __repr__(self) -> str:
        return f"Recording({str(self.folder)!r}: {len(self)} answers of {self.identity.name!r})"

    def __call__(self, batch: Batch) -> Signal:
        """The recorded answers. Raises RecordingError, naming the example, for one that is missing or stale."""
        arrays = self._read(batch, (*self._names, "inputs"))
        self._check_inputs(batch, arrays.pop("inputs").numpy().view(np.uint64))
        return decode(self.codecs, arrays, self.manifest["facts"], self._once)

    @cached_property
    def _once(self) -> dict[str, Tensor]:
        return load_once(self.folder, self.manifest)

    def check(
        self,
        teacher: Model | None = None,
        examples: Examples | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Raises PairError, showing both sides, when the recording is of another teacher, data or class order."""
        if teacher is not None:
            self._check_teacher(identity_of(teacher))
        if classes is not None and self.classes is not None and tuple(classes) != self.classes:
            raise PairError(
                f"{self.folder} has the classes in the order {list(self.classes)}, but {list(classes)} was given. "
                "Give the data or the student the recorded order."
            )
        if examples is not None:
            self.check_data(examples)

    def check_data(self, examples: Examples) -> None:
        """Raises PairError when these are not the recorded examples, nor some of them.

        A subset passes when every id is recorded (and, without augmentation, with the same inputs); the inputs of
        augmented views are compared at each call.
        """
        recorded, given = self.manifest["data"]["digest"], examples_digest(examples)
        if given == recorded:
            return
        view = UNAUGMENTED if self.views is None else self.views[0]
        for start in range(0, len(examples), 512):
            batch = examples.batch(range(start, min(start + 512, len(examples))), None)
            asked = dataclasses.replace(batch, views=None if self.views is None else (view,) * len(batch))
            try:
                fingerprints = self._read(asked, ("inputs",))["inputs"].numpy().view(np.uint64)
                if self.views is None:
                    self._check_inputs(asked, fingerprints)
            except RecordingError as error:
                raise PairError(
                    f"{self.folder} was recorded on other data: digest {recorded} ({self.manifest['data']['rows']} "
                    f"rows) there, {given} ({len(examples)} rows) now. {error}"
                ) from None

    def _check_teacher(self, given: Identity) -> None:
        recorded = self.identity
        both_known = recorded.digest is not None and given.digest is not None
        if (recorded.digest != given.digest) if both_known else (recorded.name != given.name):
            raise PairError(
                f"{self.folder} was recorded from another teacher: {recorded.name!r} with digest {recorded.digest} "
                f"there, {given.name!r} with digest {given.digest} now. Record again, or give the recorded teacher."
            )

    def _read(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        numbers, within = np.divmod(self._find(batch), self.manifest["shard_rows"])
        for number in np.unique(numbers) if len(batch) else (0,):  # an empty batch has the shapes of a full one
            self._open(int(number))
        self._check_ids(batch, numbers, within)
        return gather(self._shards, numbers, within, names)

    def _find(self, batch: Batch) -> np.ndarray:
        """The row of each example [B], counted through all shards."""
        views = (UNAUGMENTED,) * len(batch) if self.views is None or batch.views is None else batch.views
        asked = np.fromiter(map(key_hash, batch.ids, views), dtype=np.uint64, count=len(batch))
        places = np.searchsorted(self._index.keys, asked).clip(max=len(self._index.keys) - 1)
        missing = self._index.keys[places] != asked
        if missing.any():
            raise self._missing(batch, int(missing.argmax()))
        return self._index.rows[places]

    def _missing(self, batch: Batch, row: int) -> RecordingError:
        name = batch.ids[row]
        first = np.uint64(key_hash(name, UNAUGMENTED if self.views is None else self.views[0]))
        if first not in self._index.keys[np.searchsorted(self._index.keys, first) :][:1]:
            return RecordingError(
                f"example {name!r} is not in {self.folder} ({self.manifest['data']['rows']} examples of "
                f"{self.manifest['data']['name']!r}). Record these examples too."
            )
        asked = "without augmentation" if batch.views is None else f"in view {batch.views[row]}"
        return RecordingError(
            f"example {name!r} is not recorded {asked}; {self.folder} holds {self._views_text()}. "
            "Record the views that are trained on."
        )

    def _views_text(self) -> str:
        if self.views is None:
            return "unaugmented answers (views=None)"
        shown = ", ".join(map(str, self.views[:8])) + (", ..." if len(self.views) > 8 else "")
        return f"{len(self.views)} views ({shown})"

    def _check_ids(self, batch: Batch, numbers: np.ndarray, within: np.ndarray) -> None:
        # Two ids may share a hash, and an index may be damaged: the shard itself has the last word.
        for name, number, row in zip(batch.ids, numbers.tolist(), within.tolist(), strict=True):
            if self._shards[number].id_at(row) != name.encode():
                raise RecordingError(
                    f"{self.folder / INDEX} is wrong about example {name!r}. Delete it: it is rebuilt."
                )

    def _check_inputs(self, batch: Batch, recorded: np.ndarray) -> None:
        wrong = input_fingerprints(batch.inputs) != recorded
        if wrong.any():
            row = int(wrong.argmax())
            view = "without a view seed" if batch.views is None else f"in view {batch.views[row]}"
            raise RecordingError(
                f"example {batch.ids[row]!r} {view}: the input differs from the one the teacher was asked about: "
                f"augmentation, preprocessing or the row changed; record again. {self.folder} holds "
                f"{self._views_text()}."
            )

    def _open(self, number: int) -> None:
        """The shard, its bytes compared with the manifest when it is first touched."""
        if number not in self._shards:
            path = self._paths[number]
            if file_digest(path) != self.manifest["shards"][path.name]["sha256"]:
                raise damaged(path, "its sha256 differs from manifest.json")
            shard = open_shard(path)
            if lacking := [name for name in (*KEY_ARRAYS, *self._names) if name not in shard.arrays]:
                raise damaged(path, f"it lacks {lacking}")
            self._shards[number] = shard

    def _load_index(self) -> Index:
        derived_from = index_source(self.manifest)
        index = files.read_index(self.folder / INDEX, derived_from)
        if index is None:
            index = files.build_index([open_shard(path) for path in self._paths])
            with contextlib.suppress(RecordingError):  # a read-only folder: the index in memory serves as well
                files.write_index(self.folder / INDEX, index, derived_from)
        return index


def open_recording(folder: str | Path, base: Path | None = None) -> Recording:
    """The Recording in ``folder``; a codec in a user's own file is looked up from ``base``.

    Raises MissingFileError when there is none, RecordingError when it is incomplete or damaged.
    """
    return Recording(folder, base)


def load_once(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays that are kept once for the whole recording; none where no codec has any."""
    kept = manifest.get("once")
    return {} if kept is None else files.read_once(folder / ONCE, kept["sha256"])


def shard_name(number: int) -> str:
    """Where the shard of this number lies within the folder of shards."""
    return f"{number:05d}.safetensors"


def index_source(manifest: Mapping[str, Any]) -> str:
    """The digest of the shards that an index is derived from."""
    return json_digest(manifest["shards"])


def identity_from(described: Mapping[str, Any]) -> Identity:
    """The inverse of dataclasses.asdict for an Identity that went through JSON."""
    classes = described.get("classes")
    return Identity(
        **{
            **described,
            "classes": None if classes is None else tuple(classes),
            "parts": tuple(identity_from(part) for part in described.get("parts", ())),
        }
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(f"{folder} holds no recording (no {MANIFEST}). Make one with record.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise FolderError(f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT!r}.")
    if not manifest["complete"]:
        raise RecordingError(f"{folder} is incomplete: the recording was interrupted. Resume with record.")
    return manifest


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        open_shard(path)  # raises the error for a missing shard
        raise
    if size != expected:
        raise damaged(path, f"{size} bytes, the manifest says {expected}")

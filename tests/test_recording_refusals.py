"""What spoils a recording is named before or when it is met: bad answers, wrong use, damaged files."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
import torch

import stillroom.files
from recording_fakes import Net, Rows, Teacher, again, digest_files, linear, small_recording
from stillroom.errors import (
    DataError,
    MissingFileError,
    RecordingError,
    ShapeError,
    SignalError,
    UsageError,
)
from stillroom.recording import Everything, Features, Sampled, TopK, open_recording, record
from stillroom.types import Batch, Dense, Signal


@pytest.fixture
def asked(tmp_path):
    return small_recording(tmp_path / "recording")


# ---- answers that cannot be used


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("codec", [Everything(), TopK(2), Sampled(2)], ids=str)
def test_nan_and_infinite_logits_name_the_example(tmp_path, number, codec):
    examples = Rows.make(9)
    examples.x[6, 2] = number
    with pytest.raises(SignalError, match=r"logits\S* for example 'row-6' hold NaN or infinity"):
        record(Teacher(linear()), examples, tmp_path, codec, batch_size=4, progress=False)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_values_and_features_name_the_example(tmp_path, number):
    spoilt = torch.ones(9, 2)
    spoilt[6, 1] = number
    examples = dataclasses.replace(Rows.make(9), x=spoilt)
    with pytest.raises(SignalError, match="values for example 'row-6'"):
        record(Teacher(lambda x: Signal(values=x)), examples, tmp_path / "a", batch_size=4, progress=False)
    with pytest.raises(SignalError, match="features/h for example 'row-6'"):
        record(Teacher(lambda x: Signal(features={"h": x})), examples, tmp_path / "b", Features("h"), progress=False)


def test_minus_infinity_is_a_logit_but_a_row_of_it_is_not(tmp_path):
    examples = Rows.make(3)
    some = Teacher(lambda x: Signal(logits=Dense(x.masked_fill(torch.arange(6) > 2, -torch.inf))))
    record(some, examples, tmp_path / "some", progress=False)
    none = Teacher(lambda x: Signal(logits=Dense(x.masked_fill(x == examples.x[1], -torch.inf))))
    with pytest.raises(SignalError, match="'row-1'"):
        record(none, examples, tmp_path / "all", progress=False)


def test_more_entries_than_classes_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"TopK\(11\).*10 logits"):
        record(Teacher(linear()), Rows.make(3), tmp_path / "r", TopK(11), progress=False)
    assert not (tmp_path / "r" / "manifest.json").exists()


def test_a_teacher_in_training_mode_is_refused(tmp_path):
    teacher = Net()
    teacher.net.train()
    with pytest.raises(SignalError, match=r"training mode.*\.eval\(\)"):
        record(teacher, Rows.make(3), tmp_path, progress=False)


def test_answers_of_changing_shape_are_refused(tmp_path):
    teacher = Teacher(lambda x: Signal(values=x[:, : 3 if len(x) == 4 else 2]))
    with pytest.raises(ShapeError, match="'row-4' on have another form"):
        record(teacher, Rows.make(6), tmp_path, batch_size=4, progress=False)


def test_an_augmentation_that_is_not_drawn_from_the_seed_is_found_out(tmp_path):
    examples = Rows.make(6, augment=lambda x, view: x + torch.rand(()))
    with pytest.raises(DataError, match="other inputs when it was asked for again"):
        record(Teacher(linear()), examples, tmp_path, views=1, progress=False)


def test_ids_that_occur_twice_are_refused(tmp_path):
    examples = dataclasses.replace(Rows.make(3), ids=("a", "b", "a"))
    with pytest.raises(DataError, match="'a' occurs twice"):
        record(Teacher(linear()), examples, tmp_path, progress=False)


def test_ids_that_occur_twice_are_found_where_the_data_does_not_list_them(tmp_path):
    class Unlisted:
        __len__ = lambda self: 6  # noqa: E731

        def batch(self, indices, views=None):
            return Batch(tuple(f"id-{index % 5}" for index in indices), {"x": torch.ones(len(indices), 6)})

    with pytest.raises(DataError, match="'id-0'"):
        record(Teacher(linear()), Unlisted(), tmp_path, progress=False)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"shard_rows": 0}, {"keep": ()}, {"keep": "everything"}])
def test_wrong_use_is_refused(tmp_path, arguments):
    with pytest.raises(UsageError):
        record(Teacher(linear()), Rows.make(3), tmp_path, progress=False, **arguments)


def test_a_teacher_must_answer_with_a_signal(tmp_path):
    with pytest.raises(SignalError, match="returned Tensor"):
        record(lambda batch: batch.inputs["x"], Rows.make(3), tmp_path, progress=False)


# ---- damage


def shard(folder, number):
    return folder / "shards" / f"{number:05d}.safetensors"


def test_a_missing_or_truncated_shard_is_named_when_the_recording_is_opened(asked):
    _, teacher, examples, folder = asked
    whole = digest_files(folder)
    content = shard(folder, 1).read_bytes()
    shard(folder, 1).write_bytes(content[:-1])
    with pytest.raises(RecordingError, match=r"00001\.safetensors is damaged"):
        open_recording(folder)
    shard(folder, 1).unlink()
    with pytest.raises(RecordingError, match=r"00001\.safetensors is missing"):
        open_recording(folder)
    again(teacher, examples, folder)
    assert digest_files(folder) == whole


@pytest.mark.parametrize("place", [0, 3, 20, -1, -200])
def test_one_flipped_bit_names_its_shard_when_it_is_first_touched(asked, place):
    _, teacher, examples, folder = asked
    whole = digest_files(folder)
    content = bytearray(shard(folder, 1).read_bytes())
    content[place] ^= 1
    shard(folder, 1).write_bytes(content)
    recording = open_recording(folder)
    recording(examples.batch([0, 7, 16]))
    with pytest.raises(RecordingError, match=r"00001\.safetensors is damaged"):
        recording(examples.batch([0, 9]))
    shard(folder, 1).unlink()
    again(teacher, examples, folder)
    assert digest_files(folder) == whole


def test_the_index_is_rebuilt_when_missing_stale_or_unreadable(asked):
    _, _, examples, folder = asked
    whole = digest_files(folder)
    index = folder / "index.safetensors"
    for damage in (index.unlink, lambda: index.write_bytes(b"nonsense"), lambda: index.write_bytes(b"")):
        damage()
        open_recording(folder)(examples.batch([0, 19]))
        assert digest_files(folder) == whole


def test_an_index_that_points_elsewhere_is_not_believed(asked):
    recording, _, examples, _ = asked
    recording._index = dataclasses.replace(recording._index, rows=np.roll(recording._index.rows, 1))
    with pytest.raises(RecordingError, match="is wrong about example"):
        recording(examples.batch([0]))


def test_an_unfinished_recording_does_not_open(asked):
    _, _, _, folder = asked
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(RecordingError, match=r"incomplete.*Resume with record"):
        open_recording(folder)


def test_a_folder_without_a_recording_says_so(tmp_path):
    with pytest.raises(MissingFileError, match="holds no recording"):
        open_recording(tmp_path)


def test_a_full_disk_leaves_no_half_file_and_what_was_recorded_resumes(tmp_path, monkeypatch):
    teacher, examples = Teacher(linear()), Rows.make(20)
    again(teacher, examples, tmp_path / "whole")
    calls = []

    def full(file):
        calls.append(file)
        if len(calls) == 3:  # the manifest, the first shard, the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        os.stat(file)

    with monkeypatch.context() as patched:
        patched.setattr(stillroom.files.os, "fsync", full)
        with pytest.raises(RecordingError, match=r"00001\.safetensors could not be written \(No space left"):
            again(teacher, examples, tmp_path / "r")
    assert not list((tmp_path / "r").rglob("*.tmp"))
    assert [path.name for path in (tmp_path / "r" / "shards").iterdir()] == ["00000.safetensors"]
    again(teacher, examples, tmp_path / "r")
    assert digest_files(tmp_path / "r") == digest_files(tmp_path / "whole")

"""Folders are written whole or not at all; a digest depends on content and on nothing else."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.digests import file_digest, input_fingerprints, json_digest, key_hash, state_digest
from stillroom.errors import FolderError, MissingFileError
from stillroom.files import claim_folder, read_json, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A disk that fills up while a file is written costs nothing that was there."""
    path = tmp_path / "kept.json"
    write_json(path, {"a": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert read_json(path) == {"a": 1}


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path):
    write_json(tmp_path / "a.json", {"teacher": "x", "other": 1})
    before = (tmp_path / "a.json").read_bytes()
    claim_folder(tmp_path, "a.json", {"teacher": "x"}, "recording")
    with pytest.raises(FolderError, match='teacher: "x" there, "y" now'):
        claim_folder(tmp_path, "a.json", {"teacher": "y"}, "recording")
    assert (tmp_path / "a.json").read_bytes() == before


def test_unreadable_json_says_which_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(FolderError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(MissingFileError, match=r"b\.json"):
        read_json(tmp_path / "b.json")


def test_a_content_digest_survives_the_file_format(tmp_path):
    """The order of tensors and the metadata of a safetensors file change its bytes, not its content digest."""
    state = {"b": torch.arange(4.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "1.safetensors", metadata={"x": "1"})
    save_file(dict(reversed(state.items())), tmp_path / "2.safetensors", metadata={"y": "2"})
    assert file_digest(tmp_path / "1.safetensors") != file_digest(tmp_path / "2.safetensors")
    first, second = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    assert state_digest(first) == state_digest(second) == state_digest(state)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
        {"a": torch.zeros(4, dtype=torch.float64)},
        {"c": torch.zeros(4)},
        {"a": torch.tensor([0.0, 0, 0, -0.0])},
    ],
)
def test_a_content_digest_sees_name_shape_dtype_and_bits(other):
    assert state_digest({"a": torch.zeros(4)}) != state_digest(other)


def test_json_digest_is_canonical():
    """Key order does not matter, values do (RFC 8785)."""
    assert json_digest({"a": 1, "b": 2.0}) == json_digest(json.loads('{"b": 2, "a": 1}'))
    assert json_digest({"a": 1}) != json_digest({"a": 2})


def test_a_fingerprint_belongs_to_one_example_whatever_its_batch():
    x, words = torch.randn(5, 3), tuple("vwxyz")
    whole = input_fingerprints({"x": x, "t": words})
    parts = [input_fingerprints({"t": words[i : i + 1], "x": x[i : i + 1]}) for i in range(5)]
    assert np.array_equal(whole, np.concatenate(parts))
    changed = x.clone()
    changed[2, 1] += 1e-6
    assert (input_fingerprints({"x": changed, "t": words}) != whole).tolist() == [False, False, True, False, False]


def test_keys_of_views_differ():
    assert len({key_hash(name, view) for name in ("a", "b", "a|1") for view in range(50)}) == 150

"""Files and arrays as tables: what real files hold that tidy ones do not."""

import csv
import json

import numpy as np
import pytest
import torch

from stillroom.data import from_arrays, from_csv, from_jsonl, from_numpy
from stillroom.errors import DataError, UsageError


def test_long_fields_and_rows_of_types(tmp_path):
    """An article is longer than the 128 KiB that Python's csv allows; the limit is put back."""
    article = "word " * 40_000
    (tmp_path / "t.tab").write_text(f"category\ttext\ndiscrete\tstring\nclass\tmeta\na\t{article}\nb\tshort\n")
    limit = csv.field_size_limit()
    table = from_csv(tmp_path / "t.tab", text="text", label="category", delimiter="\t", skip_rows=2)
    assert (len(table), table.classes, table.columns["text"][0]) == (2, ("a", "b"), article)
    assert csv.field_size_limit() == limit


def test_a_line_separator_inside_a_text_is_not_a_new_row(tmp_path):
    text = "one\u2028two\x0bthree\x85"
    (tmp_path / "t.jsonl").write_text(json.dumps({"t": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert from_jsonl(tmp_path / "t.jsonl", text="t").columns["text"] == (text,)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a,é\n".encode("latin-1"), {"columns": ["a"]}, "not UTF-8"),
        (b'a,b\n1,"2\n', {"columns": ["a"]}, r"line 2: not CSV \(unexpected end of data"),
        (b"a,a\n1,2\n", {"columns": ["a"]}, "names 'a' twice"),
        (b"\xef\xbb\xbfa\n1\n", {"columns": ["b"]}, "there is no column 'b'; known: a"),
        (b"a\n1\n", {"columns": ["a"], "delimiter": ", "}, "one character"),
    ],
)
def test_files_that_are_not_quite_csv(tmp_path, content, arguments, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises((DataError, UsageError), match=message) as caught:
        from_csv(tmp_path / "t.csv", **arguments)
    assert "\n" not in str(caught.value)


def test_targets_that_are_partly_whole_are_still_targets(tmp_path):
    """2.5, 3 and 4.1 are numbers to predict, not three classes; 1, 2 and 3 are classes in the order of numbers."""
    (tmp_path / "t.csv").write_text("a,y,k\n1,2.5,10\n1,3,9\n1,4.1,10\n")
    table = from_csv(tmp_path / "t.csv", columns=["a"], label="y")
    assert table.labels.flatten().tolist() == pytest.approx([2.5, 3, 4.1])
    assert from_csv(tmp_path / "t.csv", columns=["a"], label="k").classes == ("9", "10")


def test_lists_of_different_lengths_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"v": [1, 2]}\n{"v": [1]}\n')
    with pytest.raises(DataError, match="not all of one length"):
        from_jsonl(tmp_path / "t.jsonl", columns=["v"])


def test_numpy_files(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 2), dtype=np.uint8))
    table = from_numpy(tmp_path / "x.npy", scale=0.5)
    assert torch.equal(table.columns["x"], torch.full((3, 2), 0.5))
    assert table.labels is None
    np.savez(tmp_path / "t.npz", x=np.ones((2, 2)), target=np.array([1, 0]), words=np.array(["a b", "c"]))
    table = from_numpy(tmp_path / "t.npz", inputs={"text": "words", "x": "x"}, label="target")
    assert table.columns["text"] == ("a b", "c")
    assert table.labels.tolist() == [1, 0]
    with pytest.raises(UsageError, match="did you mean 'target'"):
        from_numpy(tmp_path / "t.npz", label="targets")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04broken"])
def test_files_that_are_not_numpy(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz"):
        from_numpy(tmp_path / "x.npz")


def test_arrays_that_are_no_columns():
    with pytest.raises(DataError, match="object"):
        from_arrays(np.array([{}, {}], dtype=object))
    with pytest.raises(DataError, match="no rows"):
        from_arrays(np.empty((0, 2)))
    with pytest.raises(DataError, match="give class numbers"):
        from_arrays(np.ones((2, 2)), np.array(["a", "b"]))

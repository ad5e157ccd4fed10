"""Splits, budgets and leakage on real texts: what is tested was never seen, and stays so."""

import dataclasses

import pytest
import torch

from stillroom.data import Table, check_leakage, keep_split, label_budget, leakage, split
from stillroom.errors import DataError, UsageError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def table(count=300, classes=3, prefix="id"):
    return Table(
        {"x": torch.arange(float(count))[:, None]},
        tuple(f"{prefix}{i}" for i in range(count)),
        torch.arange(count) % classes,
        tuple(f"c{i}" for i in range(classes)),
    )


def test_parts_are_disjoint_complete_and_stratified():
    parts = split(table(), SHARES, seed=4)
    ids = [name for part in parts.values() for name in part.ids]
    assert sorted(ids) == sorted(table().ids)
    assert torch.bincount(parts["test"].labels).tolist() == [10, 10, 10]
    assert parts["test"].ids != split(table(), SHARES, seed=5)["test"].ids


def test_the_order_of_rows_does_not_matter():
    data = table()
    shuffled = data.select(torch.randperm(300).tolist())
    assert set(split(shuffled, SHARES)["test"].ids) == set(split(data, SHARES)["test"].ids)


def test_many_classes_of_few_rows_reach_every_part():
    """Rounding each class alone would leave the test part of 60 classes with 2 rows empty."""
    parts = split(table(120, 60), SHARES)
    assert 80 <= len(parts["train"]) <= 110
    assert len(parts["test"]) >= 4


def test_shares_that_do_not_fit():
    with pytest.raises(UsageError, match="sum to 1"):
        split(table(), {"train": 0.8, "test": 0.1})
    with pytest.raises(DataError, match="'test' of 3 rows is empty"):
        split(table(3, 1), {"train": 0.999, "test": 0.001})


def test_a_kept_split_outlives_new_rows_and_refuses_vanished_ones(tmp_path):
    path = tmp_path / "split.json"
    first = keep_split(path, table(), SHARES)
    again = keep_split(path, table(320), SHARES, seed=99)
    assert {name: part.ids for name, part in first.items()} == {name: part.ids for name, part in again.items()}
    with pytest.raises(DataError, match=r"20 rows of the split .* are gone"):
        keep_split(path, table(280), SHARES)
    with pytest.raises(DataError, match="keeps a split into test, train, validation, not test, train"):
        keep_split(path, table(), {"train": 0.5, "test": 0.5})


def test_budgets_are_nested_and_reach_each_class():
    data = table(400, 8)
    small, large = label_budget(data, 16, seed=1), label_budget(data, 60, seed=1)
    assert set(small.labelled().ids) < set(large.labelled().ids)
    assert len(large.labelled()) == 60
    assert int(torch.bincount(small.labelled().labels, minlength=8).min()) >= 1
    assert set(label_budget(data, 16, seed=2).labelled().ids) != set(small.labelled().ids)
    assert data.labels.min() == 0, "the table that was given keeps its labels"


@pytest.mark.parametrize(("count", "least", "message"), [(500, 1, "only 300"), (4, 2, "cannot give 2")])
def test_budgets_that_cannot_be(count, least, message):
    with pytest.raises(DataError, match=message):
        label_budget(table(), count, per_class_at_least=least)


def test_text_duplicates_are_found_beyond_case_and_spacing():
    first = Table({"text": ("Wheat  rose", "other", "more")}, ("a", "b", "c"))
    second = Table({"text": ("wheat rose ", "else")}, ("d", "e"))
    assert leakage(first, second) == [("a", "d")]
    same = dataclasses.replace(table(4), ids=("p", "q", "r", "s"))
    assert leakage(table(4), same) == [("id0", "p"), ("id1", "q"), ("id2", "r"), ("id3", "s")]


def test_leaking_rows_are_refused_dropped_or_reported():
    parts = {
        "train": Table({"text": ("x", "y", "z")}, ("a", "b", "c")),
        "test": Table({"text": ("Y",)}, ("t",)),
    }
    with pytest.raises(DataError, match="1 rows of 'train' stand in 'test' too, such as 'b' = 't'"):
        check_leakage(parts, "refuse")
    clean, pairs = check_leakage(parts, "drop")
    assert (clean["train"].ids, clean["test"].ids) == (("a", "c"), ("t",))
    assert pairs == {"train": [("t", "b")]}
    assert check_leakage(parts, "allow")[0]["train"].ids == ("a", "b", "c")
    with pytest.raises(UsageError, match="did you mean 'test'"):
        check_leakage(parts, kept="tests")

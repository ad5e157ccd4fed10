"""Table and views: validation, selection, and views that replay exactly."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.data import Chain, Draws, Flip, Noise, Shift, Table, WordDropout
from stillroom.digests import input_fingerprints
from stillroom.errors import DataError, StillroomError, UsageError
from stillroom.types import Examples

COUNT = 12
AUGMENT = Chain((WordDropout(0.4), Shift(2), Flip(), Noise(0.1)))


def table(**changes):
    generator = torch.Generator().manual_seed(3)
    values = {
        "columns": {
            "x": torch.randn(COUNT, 1, 6, 8, generator=generator),
            "text": tuple(" ".join(f"w{k}" for k in range(i + 1)) for i in range(COUNT)),
        },
        "ids": tuple(f"id{i}" for i in range(COUNT)),
        "labels": torch.arange(COUNT) % 3,
        "classes": ("a", "b", "c"),
        "augment": AUGMENT,
    }
    return Table(**{**values, **changes})


def test_a_table_is_examples():
    data = table()
    assert isinstance(data, Examples)
    batch = data.batch([3, 1])
    assert batch.ids == ("id3", "id1")
    assert batch.labels.tolist() == [0, 1]
    assert batch.views is None
    assert torch.equal(batch.inputs["x"][1], data.columns["x"][1])
    assert data.augmented
    assert not table(augment=None).augmented


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ("same",) * COUNT}, "'same' occurs 12 times"),
        ({"ids": ("one",)}, "12 rows, but there are 1 ids"),
        ({"labels": torch.tensor([0] * 11 + [3])}, "'id11' has label 3; labels are 0 to 2"),
        ({"labels": torch.tensor([-1] + [0] * 11)}, "'id0' has label -1"),
        ({"labels": torch.zeros(3)}, "3 labels for 12"),
        ({"labels": torch.ones(12, dtype=torch.bool)}, "bool"),
        ({"classes": ("a", "a", "b")}, "class 'a' occurs 2 times"),
        ({"mask": torch.ones(2, 3)}, "the mask has 2 rows"),
    ],
)
def test_what_cannot_be_a_table_is_refused_by_name(changes, message):
    with pytest.raises(DataError, match=message):
        table(**changes)


def test_labels_may_be_unknown_or_continuous():
    assert table(labels=torch.tensor([-100] * 11 + [2])).labelled().ids == ("id11",)
    values = torch.full((COUNT,), float("nan"), dtype=torch.float64)
    values[4] = 1.5
    data = table(labels=values, classes=None)
    assert data.labels.shape == (COUNT, 1)
    assert data.labels.dtype == torch.float32
    assert data.labelled().ids == ("id4",)
    assert bool(data.without_labels().labels.isnan().all())
    assert table().without_labels().labels.unique().tolist() == [-100]


def test_select_keeps_ids_and_columns_together():
    chosen = table(mask=torch.ones(COUNT, 2, dtype=torch.bool)).select([5, 2])
    assert (chosen.ids, chosen.columns["text"][1], chosen.labels.tolist()) == (("id5", "id2"), "w0 w1 w2", [2, 2])
    assert chosen.mask.shape == (2, 2)
    with pytest.raises(DataError, match="row 12 was asked of 12"):
        table().batch([12])
    with pytest.raises(DataError, match="did you mean 'text'"):
        table().column("txt")


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=8), view=st.integers(0, 2**62))
def test_a_view_replays_exactly_whatever_the_batch(rows, view):
    """Bit for bit, text and images, alone or among any others, and in any order."""
    data = table()
    together = data.batch(rows, [view] * len(rows))
    for position, row in enumerate(rows):
        alone = data.batch([row], [view])
        assert torch.equal(alone.inputs["x"][0], together.inputs["x"][position])
        assert alone.inputs["text"][0] == together.inputs["text"][position]


def test_a_view_replays_in_another_process():
    code = (
        "from stillroom.data import Draws; print(Draws.of(('a', 'b'), (1, 2))(3).tolist(), "
        "Draws.of(('b',), (2,)).stream(4)(2).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == f"{Draws.of(('a', 'b'), (1, 2))(3).tolist()} {Draws.of(('b',), (2,)).stream(4)(2).tolist()}"


def test_draws_are_frozen_values():
    """The values themselves: a change here makes every recorded view stale."""
    assert Draws.of(("a",), (0,))(2).tolist() == FROZEN


FROZEN = [[0.4422628879547119, 0.7546650767326355]]


def test_draws_are_uniform_and_differ_by_id_view_and_order():
    draws = Draws.of([f"e{i}" for i in range(2000)], [7] * 2000)
    first, second = draws(3), draws(3)
    assert first.dtype == torch.float32
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    assert abs(float(first.mean()) - 0.5) < 0.02
    assert abs(float(np.corrcoef(first[:, 0], second[:, 0])[0, 1])) < 0.07
    whole = Draws.of([f"e{i}" for i in range(2000)], [7] * 2000)(6)
    assert torch.equal(whole, torch.cat([first, second], 1))
    assert not torch.equal(Draws.of(("a",), (0,))(4), Draws.of(("a",), (1,))(4))


def test_unaugmented_rows_and_negative_seeds():
    data = table()
    assert torch.equal(data.batch([0]).inputs["x"], data.columns["x"][:1])
    with pytest.raises(UsageError, match="seed >= 0"):
        data.batch([0], [-1])
    plain = table(augment=None).batch([0], [5])
    assert plain.views == (5,)
    assert (input_fingerprints(plain.inputs) == input_fingerprints(data.batch([0]).inputs)).all()


def test_shift_moves_pixels_and_fills():
    image = torch.arange(1.0, 10).reshape(1, 3, 3)
    seen = set()
    for view in range(80):
        moved = Shift(1, fill=-1.0)({"x": image}, Draws.of(("a",), (view,)))["x"]
        assert moved.shape == image.shape
        seen.add(tuple(moved.flatten().tolist()))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)[0]
    assert seen == {tuple(padded[r : r + 3, c : c + 3].flatten().tolist()) for r in range(3) for c in range(3)}


def test_shift_keeps_channels_apart():
    images = torch.stack([torch.zeros(2, 5, 4), torch.ones(2, 5, 4)])
    images[:, 1] += 10
    moved = Shift(1)({"x": images}, Draws.of(("a", "b"), (1, 1)))["x"]
    assert set(moved[1, 1].unique().tolist()) <= {0.0, 11.0}
    assert moved[1, 1, 2, 2] == 11


def test_flip_noise_and_word_dropout():
    ids, views = [str(i) for i in range(400)], [1] * 400
    images = torch.arange(3.0).repeat(400, 1)
    flipped = Flip()({"x": images}, Draws.of(ids, views))["x"]
    assert 0.4 < float((flipped[:, 0] == 2).float().mean()) < 0.6
    noise = Noise(2.0)({"x": torch.zeros(400, 50)}, Draws.of(ids, views))["x"]
    assert abs(float(noise.std()) - 2) < 0.05
    assert abs(float(noise.mean())) < 0.05
    text = WordDropout(0.5)({"text": ("a b c d e f g h",) * 400}, Draws.of(ids, views))["text"]
    assert 3.7 < sum(len(t.split()) for t in text) / 400 < 4.3
    assert WordDropout(1.0)({"text": ("a b", "", "c")}, Draws.of("xyz", (1, 1, 1)))["text"][1:] == ("", "c")


@pytest.mark.parametrize(
    ("augment", "inputs"),
    [
        (Shift(), {"x": torch.zeros(2, 3)}),
        (Flip(), {"y": torch.zeros(2, 3)}),
        (Noise(), {"x": torch.zeros(2, 3, dtype=torch.int64)}),
        (WordDropout(), {"text": torch.zeros(2)}),
    ],
)
def test_an_augmentation_names_the_column_that_it_cannot_use(augment, inputs):
    with pytest.raises(StillroomError, match="column"):
        augment(inputs, Draws.of(("a", "b"), (1, 2)))

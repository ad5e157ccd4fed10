"""A recording answers as the teacher did, or refuses and says why: never a silently wrong target."""

import dataclasses

import pytest
import torch

from recording_fakes import SOMEONE, Net, Rows, Teacher, again, digest_files, flipped, linear, small_recording
from stillroom.errors import (
    FolderError,
    PairError,
    RecordingError,
    UsageError,
)
from stillroom.recording import Everything, TopK, open_recording, record
from stillroom.types import Dense, Identity, Model, Signal


@pytest.fixture
def asked(tmp_path):
    return small_recording(tmp_path / "recording")


# ---- it answers as the teacher did


def test_a_recording_is_a_model_and_equals_the_live_teacher_exactly(asked):
    recording, teacher, examples, _ = asked
    assert isinstance(recording, Model)
    batch = examples.batch([19, 3, 8, 0, 3])
    assert torch.equal(recording(batch).logits.values, teacher(batch).logits.values)
    assert len(recording) == 20
    assert recording.identity == SOMEONE
    assert recording.views is None
    assert recording.codecs == (Everything(),)


def test_an_empty_batch_has_the_shapes_of_a_full_one(asked):
    recording, _, examples, folder = asked
    assert recording(examples.batch([])).logits.values.shape == (0, 10)
    assert open_recording(folder)(examples.batch([])).logits.values.shape == (0, 10)


def test_a_shard_holds_whole_batches_and_about_32_mebibytes(tmp_path):
    wide = Teacher(lambda x: Signal(values=torch.zeros(len(x), 1 << 20)))
    recording = record(wide, Rows.make(7), tmp_path / "wide", batch_size=3, progress=False)
    assert recording.manifest["shard_rows"] == 6  # 8 rows of 4 MiB would fit
    assert len(list((tmp_path / "wide" / "shards").iterdir())) == 2


def test_a_networks_answers_and_features_are_recorded_bit_for_bit(tmp_path):
    teacher, examples = Net(), Rows.make(10)
    recording = record(teacher, examples, tmp_path, batch_size=5, progress=False)
    for start in (0, 5):
        batch = examples.batch(range(start, start + 5))
        live, kept = teacher(batch), recording(batch)
        assert torch.equal(live.logits.values, kept.logits.values)
        assert torch.equal(live.features["0"], kept.features["0"])
        assert not kept.logits.values.requires_grad
    found = recording.manifest["fidelity"]
    assert found["examples"] == 10
    exact = ("kl", "total_variation", "gradient_bias", "largest_difference")
    assert {found[name] for name in exact} == {0.0}


def test_ensemble_parts_come_back_by_name(tmp_path):
    one, two = linear(seed=1), linear(seed=2)
    both = Teacher(lambda x: Signal(logits=one(x).logits, parts={"org/one": one(x), "two": two(x)}))
    examples = Rows.make(9)
    kept = record(both, examples, tmp_path, progress=False)(examples.batch([4, 1]))
    assert list(kept.parts) == ["org/one", "two"]
    assert torch.equal(kept.parts["two"].logits.values, two(examples.x[[4, 1]]).logits.values)


def test_positions_and_values_have_their_shapes(tmp_path):
    sequence = Teacher(lambda x: Signal(logits=Dense(x[..., None] * torch.arange(7)), values=x[:, :2]))
    examples = Rows.make(9)
    kept = record(sequence, examples, tmp_path, (TopK(3)), progress=False)(examples.batch([4, 1]))
    assert kept.logits.ids.shape == (2, 6, 3)
    assert kept.values is None


def test_views_are_replayed_from_their_seeds(tmp_path):
    teacher, examples = Teacher(linear()), Rows.make(11, augment=flipped)
    recording = record(teacher, examples, tmp_path, views=3, batch_size=4, shard_rows=7, progress=False)
    assert recording.views == (0, 1, 2)
    assert len(recording) == 33
    batch = examples.batch([10, 2, 2, 5], [2, 0, 1, 2])
    assert torch.equal(recording(batch).logits.values, teacher(batch).logits.values)


def test_named_view_seeds_are_the_ones_recorded(tmp_path):
    examples = Rows.make(4, augment=flipped)
    recording = record(Teacher(linear()), examples, tmp_path, views=(5, 2), progress=False)
    assert recording.views == (5, 2)
    recording(examples.batch([0], [5]))
    with pytest.raises(RecordingError, match=r"'row-0' is not recorded in view 0.*2 views \(5, 2\)"):
        recording(examples.batch([0], [0]))


@pytest.mark.parametrize("views", [0, (), (1, 1), (-1,), 2**60 and (2**60,)])
def test_view_seeds_that_cannot_be_used_are_refused(tmp_path, views):
    with pytest.raises(UsageError, match="views="):
        record(Teacher(linear()), Rows.make(2), tmp_path, views=views, progress=False)


def test_a_recording_can_be_recorded_smaller(asked, tmp_path):
    recording, teacher, examples, _ = asked
    smaller = record(recording, examples, tmp_path / "small", TopK(3), progress=False)
    assert smaller.identity == teacher.identity
    direct = record(teacher, examples, tmp_path / "direct", TopK(3), progress=False)
    batch = examples.batch([0, 7])
    assert torch.equal(smaller(batch).logits.log_probs, direct(batch).logits.log_probs)


# ---- the defects of other caches, by name


def test_haitongli_answers_to_unaugmented_inputs_do_not_serve_augmented_ones(asked):
    """haitongli#23: logits of the plain images were the targets of randomly cropped ones."""
    recording, _, examples, _ = asked
    augmented = dataclasses.replace(examples, augment=flipped)
    with pytest.raises(RecordingError, match=r"'row-3' in view 1: the input differs .* record again.*views=None"):
        recording(augmented.batch([3], [1]))


def test_an_unaugmented_recording_serves_view_seeds_that_change_nothing(asked):
    recording, teacher, examples, _ = asked
    batch = examples.batch([3], [9])
    assert torch.equal(recording(batch).logits.values, teacher(batch).logits.values)


def test_torchdistill_an_index_alone_does_not_name_an_answer(asked):
    """Torchdistill caches by row number: reordered, edited or differently preprocessed rows got others' answers."""
    recording, teacher, examples, _ = asked
    reordered = examples.take([5, 4, 3, 2, 1, 0])
    batch = reordered.batch([0, 1, 2])
    assert torch.equal(recording(batch).logits.values, teacher(batch).logits.values)
    edited = dataclasses.replace(examples, x=examples.x.clone())
    edited.x[4, 0] += 1e-6
    with pytest.raises(RecordingError, match=r"'row-4' .*the input differs"):
        recording(edited.batch([3, 4]))
    with pytest.raises(RecordingError, match="the input differs"):
        recording(dataclasses.replace(examples, x=examples.x * 2).batch([0]))


def test_tinyvit_the_teacher_is_known_by_its_weights(asked):
    """TinyViT's caches hold no teacher fingerprint: another checkpoint's answers could not be told apart."""
    recording, teacher, examples, folder = asked
    retrained = Teacher(linear(seed=2), Identity("teacher", digest="b" * 64))
    with pytest.raises(PairError, match=r"a{64}.*b{64}"):
        recording.check(teacher=retrained)
    recording.check(teacher=teacher)
    before = digest_files(folder)
    with pytest.raises(FolderError, match=r"already holds another recording .*teacher"):
        again(retrained, examples, folder)
    assert digest_files(folder) == before


def test_tinyvit_the_tail_is_kept():
    """TinyViT stores K probabilities and no tail; here the tail's mass is an array of its own."""
    kept = TopK(2).encode(Signal(logits=Dense(torch.zeros(1, 8))), [("a", -1)])
    assert kept.rows["logits.rest"].exp().item() == pytest.approx(0.75)


def test_a_changed_augmentation_is_found_out(tmp_path):
    examples = Rows.make(6, augment=flipped)
    recording = record(Teacher(linear()), examples, tmp_path, views=2, progress=False)
    changed = dataclasses.replace(examples, augment=lambda x, view: x + view)
    with pytest.raises(RecordingError, match=r"'row-2' in view 1: the input differs"):
        recording(changed.batch([2], [1]))


# ---- what does not belong together


def test_other_data_is_refused_with_both_digests_and_a_subset_passes(asked):
    recording, _, examples, _ = asked
    recording.check(examples=examples)
    recording.check_data(examples.take([4, 17, 0]))
    edited = dataclasses.replace(examples.take(range(9)), x=examples.x[:9] + 1)
    with pytest.raises(PairError, match=r"digest [0-9a-f]{64} \(20 rows\) there, [0-9a-f]{64} \(9 rows\) now.*'row-0'"):
        recording.check_data(edited)
    with pytest.raises(PairError, match="'row-20' is not in"):
        recording.check_data(Rows.make(21))


def test_a_subset_of_augmented_data_passes(tmp_path):
    examples = Rows.make(6, augment=flipped)
    recording = record(Teacher(linear()), examples, tmp_path, views=(3, 4), progress=False)
    recording.check_data(examples.take([5, 1]))


def test_another_class_order_is_refused_and_both_are_shown(tmp_path):
    teacher = Teacher(linear(classes=2), Identity("teacher", digest="a" * 64, classes=("cat", "dog")))
    recording = record(teacher, Rows.make(5, classes=("cat", "dog")), tmp_path / "right", progress=False)
    assert recording.classes == ("cat", "dog")
    assert open_recording(tmp_path / "right").identity == teacher.identity
    recording.check(classes=("cat", "dog"))
    with pytest.raises(PairError, match=r"\['cat', 'dog'\].*\['dog', 'cat'\]"):
        recording.check(classes=["dog", "cat"])
    with pytest.raises(PairError, match=r"\['cat', 'dog'\].*\['dog', 'cat'\]"):
        record(teacher, Rows.make(5, classes=("dog", "cat")), tmp_path / "wrong", progress=False)


def test_missing_examples_and_views_are_named(asked, tmp_path):
    recording, _, examples, _ = asked
    with pytest.raises(RecordingError, match=r"'row-21' is not in .*20 examples of 'rows'"):
        recording(Rows.make(22).batch([0, 21]))
    viewed = record(Teacher(linear()), examples, tmp_path / "views", views=2, progress=False)
    with pytest.raises(RecordingError, match=r"'row-1' is not recorded in view 2; .* 2 views \(0, 1\)"):
        viewed(examples.batch([1], [2]))
    with pytest.raises(RecordingError, match="'row-1' is not recorded without augmentation"):
        viewed(examples.batch([1]))


@pytest.mark.parametrize(
    "change",
    [{"keep": TopK(2)}, {"views": 2}, {"batch_size": 4}, {"shard_rows": 9}, {"examples": Rows.make(21)}],
    ids=lambda change: next(iter(change)),
)
def test_a_folder_of_another_recording_is_refused_and_untouched(asked, change):
    _, teacher, examples, folder = asked
    before = digest_files(folder)
    settings = {"examples": examples, "batch_size": 5, "shard_rows": 8, "progress": False, **change}
    with pytest.raises(FolderError, match="already holds another recording"):
        record(teacher, folder=folder, **settings)
    assert digest_files(folder) == before

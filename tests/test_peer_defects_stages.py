"""Defects found in other systems' data, recordings, training and evaluation, each as a test that would have failed."""

import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from fit_fakes import apart, rows, seeded, sequences, student, teacher, trained
from recording_fakes import Rows, Teacher
from stillroom import run
from stillroom.data import Flip, Table
from stillroom.digests import input_fingerprints, key_hash
from stillroom.divergences import forward_kl
from stillroom.divergences.buckets import ExtraIds
from stillroom.errors import RecordingError
from stillroom.evaluation import evaluate
from stillroom.network import Columns
from stillroom.objectives import HardLabels, Mix, SoftTargets
from stillroom.plan import Plan
from stillroom.recipes import quantising
from stillroom.recording import Everything, TopK, record
from stillroom.teachers.networks import from_network
from stillroom.types import Batch, Dense, Signal


@pytest.mark.parametrize("accumulation", [1, 3])
def test_easydistill_recorded_answers_follow_their_examples(accumulation, tmp_path):
    """EasyDistill reads stored answers in file order: with a shuffle, accumulation or ranks they are another row's."""
    guide, examples = teacher(), rows()
    recording = record(guide, examples, tmp_path, batch_size=3, shard_rows=7, progress=False)
    live = trained(SoftTargets(), examples, by=guide, steps=6)
    assert apart(live, trained(SoftTargets(), examples, by=recording, steps=6, accumulation=accumulation)) < 1e-5
    slid = Table(examples.columns, (*examples.ids[1:], examples.ids[0]))

    def of_the_row_before(batch):
        return recording(slid.batch([slid.ids.index(name) for name in batch.ids]))

    with pytest.raises(RecordingError, match="the input differs"):
        trained(SoftTargets(), examples, by=of_the_row_before, steps=1)


def test_megatron_recorded_answers_serve_any_batch_size(tmp_path):
    """Megatron-LM keys its cache by iteration: seed, micro-batch and layout have to be those of the capture."""
    guide, examples = teacher(), rows()
    recording = record(guide, examples, tmp_path, batch_size=4, progress=False)
    for settings in ({"batch_size": 5}, {"seed": 3}, {"batch_size": 22, "accumulation": 4}):
        live = trained(SoftTargets(), examples, by=guide, **settings)
        assert apart(live, trained(SoftTargets(), examples, by=recording, **settings)) < 1e-5


def test_maxtext_keys_are_the_same_in_every_process():
    """MaxText's integrity field is Python's salted hash: another number in every process, so it is never compared."""
    assert [key_hash("row-0", -1), key_hash("row-0", 7)] == [7305330771203343679, 3141968886019923533]
    (found,) = input_fingerprints({"x": torch.tensor([[1.0, 2.0]]), "text": ("a",)}).tolist()
    assert found == 9152634078936170461


def test_torchdistill_a_kept_answer_costs_little_more_than_its_numbers(tmp_path):
    """torchdistill writes one .pt of 1,893 bytes for 10 classes; EasyDistill and axolotl take 24 bytes an entry."""
    count, classes = 2000, 100
    guide = Teacher(lambda x: Signal(logits=Dense(x.repeat(1, 50))))
    for keep, numbers in ((Everything("float16"), 2 * classes), (TopK(8, "float16"), 8 * 6 + 4)):
        folder = tmp_path / type(keep).__name__
        record(guide, Rows.make(count, width=2), folder, keep, progress=False)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size / count < numbers + 64


def test_yolonas_features_are_those_of_the_mirrored_view(tmp_path):
    """modern-yolonas#50: cached maps of features are not mirrored with the image: cosine 0.87 instead of 1."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 4)))
    guide = from_network(net, features=("0",))
    images = torch.randn(12, 1, 4, 4)
    examples = Table({"x": images}, tuple(f"i{n}" for n in range(12))).with_augment(Flip(1.0))
    recording = record(guide, examples, tmp_path, views=1, progress=False)
    kept = recording(examples.batch([3, 8], [0, 0])).features["0"]
    mirrored = guide(Batch(("a", "b"), {"x": images[[3, 8]].flip(-1)})).features["0"]
    torch.testing.assert_close(kept, mirrored)
    plain = guide(Batch(("a", "b"), {"x": images[[3, 8]]})).features["0"]
    assert not torch.allclose(kept, plain, atol=0.1)


def test_mmrazor_teacher_and_student_read_their_own_inputs(tmp_path):
    """mmrazor#67, sentence-transformers#1801: both sides had to take the same tensor, size and normalisation."""
    small = rows()
    large = torch.cat([small.columns["x"], torch.randn(22, 3)], 1) * 255
    examples = Table({"x": small.columns["x"], "large": large}, small.ids)
    guide = from_network(seeded(lambda: nn.Linear(8, 4), 3), Columns(("large",)))
    live = trained(SoftTargets(), examples, by=guide)
    recording = record(guide, examples, tmp_path, progress=False)
    assert apart(live, student()) > 1e-2
    assert apart(live, trained(SoftTargets(), examples, by=recording)) < 1e-4


@pytest.mark.parametrize("make", [rows, sequences])
def test_axolotl_training_and_evaluation_measure_alike(make):
    """axolotl#3270, #3271: the loss in evaluation was about 1,000 times that in training."""
    guide, examples, start, watched = teacher(), make(), student(), []
    objective = Mix({SoftTargets(temperature=1.0): 1.0, HardLabels(): 1.0})
    trained(objective, examples, by=guide, start=start, steps=1, batch_size=22, watchers=[watched.append])
    report = evaluate({"student": start}, guide, examples, ["kl", "nll"], costs=False, progress=False, replicates=10,
                      batch_size=5)  # fmt: skip
    cells = report.rows["student"]
    assert cells["kl"]["value"] == pytest.approx(watched[0].terms["soft_targets"], rel=1e-5)
    assert cells["nll"]["value"] == pytest.approx(watched[0].terms["hard_labels"], rel=1e-5)


def test_distillkit_every_named_choice_is_accepted():
    """DistillKit's README names missing_probability_handling: uniform, which its code refuses."""
    for choice in typing.get_args(ExtraIds):
        assert forward_kl(torch.zeros(2, 4), torch.zeros(2, 3), extra_ids=choice).isfinite().all()
    chosen = 0
    for name, hint in typing.get_type_hints(Plan).items():
        for choice in typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ():
            assert getattr(Plan(**{name: choice}), name) == choice
            chosen += 1
    assert chosen >= 8


def test_lskd_the_control_has_the_same_budget(tmp_path, monkeypatch):
    """LSKD's tables mix 240 and 480 epochs, one view and two; a7b23#1: a larger rate alone gave distillation's gain."""
    recipe = Path(__file__).parent.parent / "examples" / "digits.yaml"
    asked = []
    monkeypatch.setattr(run, "open_recording", lambda *_: None)
    monkeypatch.setattr(
        quantising, "fit", lambda student, teacher, examples, objective, **rest: asked.append((student, rest))
    )
    run.open_run(recipe, tmp_path / "run", ("seeds=[3]",), progress=False, claim=False).fit()
    (taught, ours), (alone, theirs) = asked
    assert ours["plan"] == theirs["plan"]
    assert ours["plan"].steps == theirs["plan"].steps > 24  # of the large pool, though the control sees 100 rows
    assert taught.identity == alone.identity

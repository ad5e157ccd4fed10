"""fit: the same result however the batch is split, what is refused, what is written, what is left alone."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from fit_fakes import CLASSES, Double, apart, rows, same, seeded, sequences, state, student, teacher, trained
from stillroom.data import Noise, Table
from stillroom.digests import state_digest
from stillroom.errors import (
    DataError,
    FolderError,
    MissingExtraError,
    PairError,
    SignalError,
    UsageError,
)
from stillroom.fitting import fit
from stillroom.fitting.devices import accelerator_for
from stillroom.objectives import HardLabels, MatchValues, Mix, SoftTargets, masked_mean
from stillroom.objectives.features import MatchRelations
from stillroom.plan import Plan, micro_batches, resolved, totals_of, weights_of
from stillroom.recording import record
from stillroom.students.architectures import bag_of_words
from stillroom.students.networks import Student, load_student
from stillroom.students.words import Words
from stillroom.types import Dense, Signal

BOTH = Mix({SoftTargets(): 0.7, HardLabels(): 0.3})

# the same result however the batch is split


@pytest.mark.parametrize("average", ["position", "example"])
@pytest.mark.parametrize("make", [rows, sequences])
@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_splitting_a_batch_changes_nothing(make, average, accumulation):
    """A ragged last batch (22 = 8 + 8 + 6), a third labelled, masks of differing lengths, terms of differing counts."""
    examples = make(labelled=0.35)
    whole = trained(BOTH, examples, by=teacher(), average=average)
    split = trained(BOTH, examples, by=teacher(), average=average, accumulation=accumulation)
    assert apart(whole, split) < 1e-6
    assert apart(whole, student()) > 1e-2


@pytest.mark.parametrize("average", ["position", "example"])
@pytest.mark.parametrize("accumulation", [3, 8])
def test_splitting_changes_nothing_to_twelve_digits_in_float64(average, accumulation):
    start = Student(seeded(lambda: student().net.double()), adapter=Double())
    guide = teacher(adapter=Double())
    guide.net.double()
    settings = {"by": guide, "start": start, "average": average, "steps": 20}
    whole = trained(BOTH, sequences(labelled=0.35), **settings)
    assert apart(whole, trained(BOTH, sequences(labelled=0.35), accumulation=accumulation, **settings)) < 1e-12


def test_splitting_changes_nothing_for_adamw_with_clipping():
    settings = {"optimiser": "adamw", "learning_rate": 1e-2, "clip_norm": 0.1, "weight_decay": 0.1}
    whole = trained(BOTH, sequences(labelled=0.5), by=teacher(), **settings)
    assert apart(whole, trained(BOTH, sequences(labelled=0.5), by=teacher(), accumulation=3, **settings)) < 1e-5


def test_a_step_is_the_gradient_of_the_masked_mean():
    """One step of plain SGD, written out."""
    examples, guide, start = sequences(8), teacher(), student()
    found = trained(SoftTargets(), examples, by=guide, start=start, steps=1, schedule="constant", momentum=0.0)
    by_hand = start.copy()
    batch = examples.batch(range(8))
    loss = masked_mean(SoftTargets()(by_hand(batch), guide(batch), batch)["soft_targets"], batch.mask)
    loss.backward()
    for name, parameter in by_hand.net.named_parameters():
        torch.testing.assert_close(state(found)[name], (parameter - 0.1 * parameter.grad).detach(), rtol=0, atol=1e-6)


def test_gradients_do_not_linger_from_an_earlier_accelerator(monkeypatch):
    """Accelerate's environment and shared state must not divide the loss again, nor hold a step back."""
    plain = trained(SoftTargets(), rows(), by=teacher())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator_for(Plan(), (), None).sync_gradients = False
    assert same(plain, trained(SoftTargets(), rows(), by=teacher()))


# repetition


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    start = student(dropout=0.3)
    first = trained(BOTH, rows(), by=teacher(), start=start)
    torch.rand(3)
    assert same(first, trained(BOTH, rows(), by=teacher(), start=start))
    assert apart(first, trained(BOTH, rows(), by=teacher(), start=start, seed=1)) > 1e-4


def test_the_order_of_examples_is_shuffled_anew_in_every_epoch_for_every_seed():
    """DistillKit: `seed: 0` disabled the shuffle."""
    examples = rows()
    orders = set()
    for seed in (0, 1):
        plan = Plan(batch_size=8, seed=seed)
        for epoch in range(3):
            batches = [micro_batches(plan, examples, 3 * epoch + step)[0][0] for step in range(3)]
            order = [name for batch in batches for name in batch.ids]
            assert sorted(order) == sorted(examples.ids)
            assert order != list(examples.ids)
            orders.add(tuple(order))
    assert len(orders) == 6


def test_ranks_and_micro_batches_share_out_one_batch():
    plan, examples = Plan(batch_size=8, accumulation=3), rows()
    for step in range(3):
        whole = micro_batches(Plan(batch_size=8), examples, step)[0][0].ids
        shared = [batch.ids for rank in (0, 1) for batch, _ in micro_batches(plan, examples, step, None, rank, 2)]
        assert sorted(name for ids in shared for name in ids) == sorted(whole)
    lonely = micro_batches(Plan(batch_size=1), examples, 0, None, 1, 2)
    assert [weight for _, weight in lonely] == [0.0]


# what is left alone


def test_the_student_that_is_passed_keeps_its_weights_and_the_teacher_is_not_changed():
    start, guide = student(), teacher()
    before, known = start.identity, guide.identity
    found = trained(SoftTargets(), rows(), by=guide, start=start)
    assert start.identity == before
    assert found.identity != before
    assert not found.net.training
    assert not guide.net.training
    assert all(parameter.grad is None for parameter in guide.net.parameters())
    assert state_digest(guide.net.state_dict()) == known.digest


def test_a_student_that_teaches_is_put_in_evaluation_mode():
    """general-peers 11: teachers left in training mode answer with dropout (vrvlive/knowlege-distillation#2)."""
    guide = student(seed=7, hidden=16, dropout=0.5)
    guide.net.train()
    by_noise = trained(SoftTargets(), rows(), by=guide)
    assert not guide.net.training
    assert same(by_noise, trained(SoftTargets(), rows(), by=guide))


def test_the_network_that_comes_back_is_an_ordinary_one():
    """Accelerate wraps forward for mixed precision; what is exported must not be wrapped."""
    found = trained(SoftTargets(), rows(), by=teacher(), precision="bf16")
    assert "forward" not in vars(found.net)
    assert type(found.net) is nn.Sequential
    assert found.predict(rows().batch([0, 1])).logits.values.dtype == torch.float32


def test_batch_statistics_are_trained_and_then_fixed():
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)))
    found = trained(SoftTargets(), rows(), by=teacher(), start=Student(net))
    assert int(found.net[1].num_batches_tracked) == 7
    assert not found.net[1].training
    one = found.predict(rows().batch([0])).logits.values
    torch.testing.assert_close(one, found.predict(rows().batch([0, 1])).logits.values[:1])


def test_frozen_parameters_stay_and_a_frozen_student_is_refused():
    start = student()
    start.net[0].requires_grad_(False)
    found = trained(SoftTargets(), rows(), by=teacher(), start=start)
    assert torch.equal(found.net[0].weight, start.net[0].weight)
    assert not torch.equal(found.net[3].weight, start.net[3].weight)
    start.net.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        trained(SoftTargets(), rows(), by=teacher(), start=start)


def test_several_precisions_in_one_process():
    plain = trained(SoftTargets(), rows(), by=teacher())
    rough = trained(SoftTargets(), rows(), by=teacher(), precision="bf16")
    assert 0 < apart(plain, rough) < 0.05
    assert same(plain, trained(SoftTargets(), rows(), by=teacher()))
    with pytest.raises(UsageError, match="'fp16' is not possible on 'cpu'"):
        trained(SoftTargets(), rows(), by=teacher(), precision="fp16")
    assert same(plain, trained(SoftTargets(), rows(), by=teacher()))


# the plan


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"schedule": "constant", "warmup": 0.5}, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "linear", "warmup": 0.5}, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_learning_rates_by_hand(settings, rates):
    plan = Plan(learning_rate=2.0, **settings)
    assert [plan.learning_rate_at(step, 4) / 2 for step in range(4)] == pytest.approx(rates)


def test_steps_and_epochs():
    assert Plan(epochs=2, batch_size=8).total_steps(22) == 6
    assert Plan(epochs=0.5, batch_size=8).total_steps(22) == 2
    assert Plan(epochs=0.01, batch_size=8).total_steps(22) == 1
    assert Plan(epochs=9, steps=4).total_steps(22) == 4
    assert Plan(batch_size=64).steps_per_epoch(22) == 1
    assert [Plan(batch_size=8).examples_before(step, 22) for step in range(5)] == [0, 8, 16, 22, 30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"steps": 0}, "steps must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"accumulation": 65}, "accumulation=65 is more than batch_size=64"),
        ({"schedule": "cosinus"}, "'cosinus'; did you mean 'cosine'?"),
        ({"optimiser": "adam"}, "'adam'; did you mean 'adamw'?"),
        ({"average": "token"}, "known: position, example"),
        ({"warmup": 3}, "share of the steps"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_plans_that_cannot_be_used(settings, message):
    with pytest.raises(UsageError) as caught:
        Plan(**settings)
    assert message in str(caught.value)


# what is refused


def test_nothing_that_counts_is_an_error():
    examples = sequences()
    nowhere = Table(examples.columns, examples.ids, labels=examples.labels, mask=torch.zeros_like(examples.mask))
    with pytest.raises(DataError, match="no position counts"):
        trained(SoftTargets(), nowhere, by=teacher())


def test_no_label_at_all_is_found_before_training():
    watched = []
    for objective in (HardLabels(), BOTH):
        with pytest.raises(DataError, match="none of the 22 examples has one"):
            trained(objective, rows().without_labels(), by=teacher(), watchers=[watched.append])
    assert watched == []
    trained(SoftTargets(), rows().without_labels(), by=teacher())  # labels are not needed


def test_labels_that_the_mask_hides_are_found_after_an_epoch():
    examples = sequences()
    hidden = examples.labels.masked_fill(examples.mask, -100)
    with pytest.raises(DataError, match="'hard_labels' counted nothing in a whole epoch"):
        trained(BOTH, Table(examples.columns, examples.ids, labels=hidden, mask=examples.mask), by=teacher())


class Explode(nn.Module):
    """A network whose answer becomes NaN at its fifth training step."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(5, CLASSES), 0

    def forward(self, x):
        self.calls += self.training
        return self.layer(x) * (float("nan") if self.calls == 5 else 1.0)


def test_a_loss_that_is_not_finite_names_the_step_before_anything_is_spoilt(tmp_path):
    watched = []
    with pytest.raises(SignalError, match=r"loss became nan at step 4 .*Lower plan.learning_rate"):
        trained(
            SoftTargets(), rows(), by=teacher(), start=Student(seeded(Explode)), folder=tmp_path / "s", steps=2000,
            checkpoint_seconds=0, watchers=[watched.append],
        )  # fmt: skip
    assert [row.step for row in watched] == [0]  # found between two logged steps, too
    content = torch.load(tmp_path / "s" / "checkpoint.pt", weights_only=True)
    assert content["step"] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in content["state"]["net"].values())


def test_a_gradient_that_is_not_finite_is_found_too():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x):
            return self.weight.sqrt().expand(len(x), CLASSES)

    with pytest.raises(SignalError, match="gradient became (nan|inf) at step 0"):
        trained(SoftTargets(), rows(), by=teacher(), start=Student(Root()))


def test_another_class_order_is_refused():
    """general-peers 10: a teacher of another class order is silently wrong (mmrazor#456)."""
    ours, theirs = tuple("abcd"), tuple("abdc")
    with pytest.raises(PairError, match=r"student has the classes \['a', 'b', 'c', 'd'\], the teacher \['a', 'b', 'd'"):
        trained(SoftTargets(), rows(), by=teacher(classes=theirs), start=student(classes=ours))
    examples = Table(rows().columns, rows().ids, labels=rows().labels, classes=theirs)
    with pytest.raises(PairError, match="the examples"):
        trained(HardLabels(), examples, start=student(classes=ours))
    trained(SoftTargets(), rows(), by=teacher(classes=ours), start=student(classes=ours))


def test_objectives_that_couple_examples_are_refused_under_accumulation():
    with pytest.raises(UsageError, match="depends on which examples share a batch"):
        trained(Mix({SoftTargets(): 1.0, MatchRelations(): 1.0}), rows(), by=teacher(), accumulation=2)


def test_no_examples_and_no_terms():
    with pytest.raises(DataError, match="no examples"):
        trained(SoftTargets(), rows().select([]), by=teacher())
    with pytest.raises(UsageError, match="returned no terms"):
        trained(lambda ours, theirs, batch: {}, rows(), by=teacher())


# alone, values, functions


def test_a_student_trains_alone():
    watched = []
    trained(HardLabels(), rows(), watchers=[watched.append], steps=300)
    assert watched[-1].loss < 0.5 * watched[0].loss
    assert set(watched[0].terms) == {"hard_labels"}


def test_values_are_distilled():
    watched = []
    guide = teacher(answers="values")
    trained(MatchValues(), rows(), by=guide, start=student(answers="values"), steps=60, watchers=[watched.append])
    assert watched[-1].loss < 0.5 * watched[0].loss


def test_functions_teach_and_functions_are_objectives():
    def constant(batch):
        return Signal(logits=Dense(torch.tensor([5.0, 0.0, 0.0, 0.0]).expand(len(batch), CLASSES)))

    def squares(ours, theirs, batch):
        return {"squares": (ours.logits.values - theirs.logits.values).square()}

    found = trained(squares, rows(), by=constant, steps=300)
    torch.testing.assert_close(found.predict(rows().batch([0])).logits.values, constant(["one"]).logits.values,
                               atol=0.5, rtol=0)  # fmt: skip


# recordings and views


def test_a_recording_teaches_like_its_teacher(tmp_path):
    guide, examples = teacher(), rows()
    recording = record(guide, examples, tmp_path / "r", progress=False)
    assert apart(trained(BOTH, examples, by=guide), trained(BOTH, examples, by=recording)) < 1e-5
    part = examples.select(range(0, 22, 2))
    assert apart(trained(BOTH, part, by=guide), trained(BOTH, part, by=recording)) < 1e-5
    with pytest.raises(PairError, match="recorded on other data"):
        trained(BOTH, rows(seed=1), by=recording)


def test_recorded_views_are_used_in_turn(tmp_path):
    examples = rows().with_augment(Noise(0.5))
    guide = teacher()
    recording = record(guide, examples, tmp_path / "r", views=(5, 9), progress=False)
    asked = []

    class Listening:
        views, manifest = recording.views, recording.manifest

        def check_data(self, examples):
            recording.check_data(examples)

        def __call__(self, batch):
            asked.append(set(batch.views))
            return recording(batch)

    trained(SoftTargets(), examples, by=Listening(), steps=9)
    assert asked == [{5}] * 3 + [{9}] * 3 + [{5}] * 3
    with pytest.raises(PairError, match="plan.views=3, but the recording holds 2 views"):
        trained(SoftTargets(), examples, by=recording, views=3)
    with pytest.raises(PairError, match="plan.views=0, but the recording holds 2 views"):
        trained(SoftTargets(), examples, by=recording, views=0)
    plain = record(guide, examples, tmp_path / "plain", progress=False)
    with pytest.raises(PairError, match="holds unaugmented answers only"):
        trained(SoftTargets(), examples, by=plain, views=2)
    assert resolved(Plan(), None, plain, examples, None).views == 0
    assert resolved(Plan(), None, recording, examples, None).views == 2


def test_live_teachers_see_fresh_views_or_a_number_of_them_in_turn():
    examples = rows().with_augment(Noise(0.5))
    for views, wanted in ((None, [0, 1, 2]), (2, [0, 1, 0]), (0, [None] * 3)):
        plan = resolved(Plan(batch_size=22, views=views), None, teacher(), examples, None)
        seen = [micro_batches(plan, examples, step)[0][0].views for step in range(3)]
        assert [given and set(given) for given in seen] == [given if given is None else {given} for given in wanted]
    assert micro_batches(Plan(), rows(), 0)[0][0].views is None


def test_student_and_teacher_see_the_same_view(tmp_path):
    """haitongli#23: logits cached before augmentation. Live and recorded views give the same student."""
    examples = rows().with_augment(Noise(0.5))
    recording = record(teacher(), examples, tmp_path / "r", views=2, progress=False)
    live = trained(SoftTargets(), examples, by=teacher(), views=2)
    assert apart(live, trained(SoftTargets(), examples, by=recording)) < 1e-5


# folders


def test_a_folder_says_what_trained_the_student(tmp_path):
    folder = tmp_path / "student"
    watched = []
    found = trained(BOTH, rows(), by=teacher(), folder=folder, steps=450, watchers=[watched.append])
    said = json.loads((folder / "student.json").read_text())
    assert said["complete"] is True
    assert said["steps"] == 450
    assert said["seconds"] > 0
    assert said["plan"]["batch_size"] == 8
    assert said["objective"]["use"] == "stillroom.objectives:Mix"
    assert said["teacher"]["digest"] == teacher().identity.digest
    assert said["data"]["rows"] == 22
    assert said["environment"]["packages"]["torch"]
    assert str(tmp_path) not in (folder / "student.json").read_text()
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [*range(0, 449, 3), 449]
    assert set(history[0]) == {"step", "epoch", "loss", "terms", "learning_rate", "examples"}
    assert history[0]["loss"] == pytest.approx(sum(history[0]["terms"].values()))
    assert history[3]["epoch"] == pytest.approx(3.0)
    assert [row.loss for row in watched] == [row["loss"] for row in history]
    assert sorted(path.name for path in folder.iterdir()) == ["history.jsonl", "model.safetensors", "student.json"]
    assert same(load_student(folder), found)


@pytest.mark.parametrize("steps", [1, 199, 200, 201, 399, 1000])
def test_histories_are_short_and_end_with_the_last_step(steps):
    watched = []
    trained(HardLabels(), rows(4), steps=steps, watchers=[watched.append])
    assert len(watched) <= 201
    assert watched[0].step == 0
    assert watched[-1].step == steps - 1


def test_a_finished_folder_is_opened_not_trained_again(tmp_path):
    found = trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s")
    watched = []
    again = trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", watchers=[watched.append])
    assert same(found, again)
    assert watched == []
    assert not again.net.training


def test_a_folder_of_another_training_is_refused_and_left_as_it_is(tmp_path):
    folder = tmp_path / "s"
    trained(BOTH, rows(), by=teacher(), folder=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {
        "plan.seed: 0 there, 1 now": lambda: trained(BOTH, rows(), by=teacher(), folder=folder, seed=1),
        "teacher.digest": lambda: trained(BOTH, rows(), by=teacher(seed=8), folder=folder),
        "data.digest": lambda: trained(BOTH, rows(seed=1), by=teacher(), folder=folder),
        "data.labels_digest": lambda: trained(BOTH, rows(labelled=0.5), by=teacher(), folder=folder),
        "objective": lambda: trained(SoftTargets(), rows(), by=teacher(), folder=folder),
        "initial_digest": lambda: trained(BOTH, rows(), by=teacher(), start=student(1), folder=folder),
    }
    for said, train in others.items():
        with pytest.raises(FolderError) as caught:
            train()
        assert said in str(caught.value)
        assert "Nothing was changed" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_weights_of_a_finished_folder_are_found(tmp_path):
    trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s")
    path = tmp_path / "s" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FolderError, match=r"model.safetensors is not what was trained"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s")
    path.write_bytes(b"nothing")
    with pytest.raises(FolderError, match=r"model.safetensors is damaged"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s")


# trackers


def test_tensorboard_works_out_of_the_box(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(tensorboard|torch\.utils)\b")
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", trackers=("tensorboard",))
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "t", trackers=("tensorboard",))
    for name in ("s", "t"):
        assert list((tmp_path / name / "trackers").glob("events.out.tfevents.*"))
    assert same(load_student(tmp_path / "s"), load_student(tmp_path / "t"))


def test_trackers_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="need a folder"):
        trained(BOTH, rows(), by=teacher(), trackers=("tensorboard",))
    with pytest.raises(UsageError, match=r"no tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", trackers=("tensorbord",))
    monkeypatch.setattr("stillroom.fitting.devices.get_available_trackers", list)
    with pytest.raises(MissingExtraError, match=r"stillroom\[track\]"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", trackers=("tensorboard",))
    with pytest.raises(MissingExtraError, match="wandb is not installed"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", trackers=("wandb",))


# small things


def test_the_default_plan_trains():
    found = fit(student(), teacher(), rows(), SoftTargets(), progress=False)
    assert apart(found, student()) > 0


def test_totals_do_not_depend_on_the_split():
    examples = sequences()
    whole = totals_of([weights_of(examples.batch(range(22)), HardLabels(), "example")])
    parts = totals_of([weights_of(examples.batch([i]), HardLabels(), "example") for i in range(22)])
    assert whole == pytest.approx(parts, abs=1e-12)


def test_texts_are_taken_apart_once(monkeypatch):
    texts = tuple(f"word{i % 7} and word{i % 3}" for i in range(20))
    words = Words.fit(texts)
    asked = []
    numbers = Words.numbers
    monkeypatch.setattr(Words, "numbers", lambda self, text: asked.append(text) or numbers(self, text))
    examples = Table({"text": texts}, tuple(map(str, range(20))), labels=torch.arange(20) % 4)
    start = Student.make(bag_of_words, {"vocabulary": words.size, "classes": 4}, adapter=words)
    found = trained(HardLabels(), examples, start=start, steps=10)
    assert len(asked) == len(set(texts))
    assert found.adapter is words  # what is served does its own work


def test_remembered_numbers_are_the_same():
    texts = ("the cat sat", "", "the dog", "the cat sat")
    words = Words.fit(texts)
    remembering = words.remembering()
    for _ in range(2):
        assert torch.equal(remembering({"text": texts})[0], words({"text": texts})[0])
        assert torch.equal(remembering({"text": texts[1:2]})[0], words({"text": texts[1:2]})[0])
    assert not [name for name in vars(words) if name not in ("vocabulary", "length", "column", "_numbers")]

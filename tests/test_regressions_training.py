"""Defects of other systems that could occur here, each with its source. The first line of each test says which."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fit_fakes import CLASSES, apart, rows, same, seeded, sequences, state, student, teacher, trained
from stillroom.objectives import HardLabels, Mix, SoftTargets, masked_mean
from stillroom.objectives.features import MatchFeatures
from stillroom.plan import Plan
from stillroom.students.networks import Student
from stillroom.teachers.networks import from_network
from stillroom.types import Dense, Signal

EXAMPLE = Path(__file__).parent.parent / "examples" / "by_hand.py"


def one_step(objective, examples, by=None, start=None, **settings):
    """The weights' change of one step of plain SGD at rate 0.1: -0.1 times the gradient."""
    settings = {"steps": 1, "batch_size": 4, "momentum": 0.0, "schedule": "constant", **settings}
    start = start or student()
    found = trained(objective, examples, by=by, start=start, **settings)
    return {name: tensor - state(start)[name] for name, tensor in state(found).items()}


def test_micro_batches_of_unequal_length_weigh_by_their_positions():
    """DistillKit: each micro-batch is averaged by itself, so short sequences weigh more (llm-peers 2)."""
    examples, guide = sequences(4), teacher()
    batch = examples.batch(range(4))
    by_hand = student()
    masked_mean(SoftTargets()(by_hand(batch), guide(batch), batch)["soft_targets"], batch.mask).backward()
    change = one_step(SoftTargets(), examples, guide, accumulation=4)
    for name, parameter in by_hand.net.named_parameters():
        torch.testing.assert_close(change[name], -0.1 * parameter.grad, rtol=0, atol=1e-6)


def test_labels_are_counted_over_the_whole_step():
    """ModelOpt KDTrainer ignores num_items_in_batch (llm-peers 2): the label term depends on the split."""
    examples = sequences(4, labelled=0.2, seed=2)
    assert len(set((examples.labels != -100).sum(1).tolist())) > 1
    objective = Mix({SoftTargets(): 0.5, HardLabels(): 0.5})
    whole = one_step(objective, examples, teacher())
    split = one_step(objective, examples, teacher(), accumulation=4)
    for name, change in whole.items():
        torch.testing.assert_close(split[name], change, rtol=0, atol=1e-7)


def test_the_loss_is_divided_once():
    """EasyDistill: divided by the accumulation and again by the trainer, so the gradient shrinks with it."""
    whole, split = (one_step(SoftTargets(), rows(4), teacher(), accumulation=n)["0.weight"] for n in (1, 4))
    assert float(split.norm() / whole.norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_weight_means_the_same_whatever_share_is_labelled():
    """general-peers 13 (torchdistill#215): the label term fades as fewer examples are labelled."""
    every = rows(4)
    once = every.labels.clone()
    once[1:] = -100
    few = one_step(HardLabels(), dataclasses.replace(every, labels=once))
    alone = one_step(HardLabels(), every.select([0]))
    for name, change in alone.items():
        torch.testing.assert_close(few[name], change, rtol=0, atol=1e-7)


def test_the_student_is_not_detached():
    """Syencil/mobile-yolov5-pruning-distillation#83: a detached student trains on nothing, and nobody notices."""
    for objective in (SoftTargets(), MatchFeatures({"0": "0"}), HardLabels()):
        change = one_step(objective, rows(4), teacher())
        assert float(change["0.weight"].abs().max()) > 1e-5


def test_distillation_is_not_a_no_op():
    """labmlai#66 and atropos#456, verl#6293: teacher logits on both sides, or none: another teacher changes nothing."""
    first, second = (trained(SoftTargets(), rows(), by=teacher(seed)) for seed in (7, 8))
    assert apart(first, second) > 1e-2
    watched = []
    trained(SoftTargets(), rows(), by=teacher(), steps=300, watchers=[watched.append])
    assert watched[-1].loss < 0.1 * watched[0].loss


def test_a_student_equal_to_its_teacher_stays_as_it_is():
    """Liger pads with zeros: identical models give a divergence of 0.003 to 13 instead of 0."""
    watched = []
    net = student().net
    found = trained(
        SoftTargets(), rows(), by=from_network(student().net), start=Student(net), watchers=[watched.append]
    )
    assert watched[0].loss == pytest.approx(0.0, abs=1e-6)
    assert apart(found, Student(net)) < 1e-5


def test_the_teacher_answers_without_dropout_and_its_statistics_stay():
    """vrvlive/knowlege-distillation#2, clovaai/overhaul-distillation#37: a teacher in training mode."""

    def make():
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    guide = from_network(seeded(make))
    before = {name: tensor.clone() for name, tensor in guide.net.state_dict().items()}
    guide.net.train()
    first = trained(SoftTargets(), rows(), by=guide)
    guide.net.eval()
    assert same(first, trained(SoftTargets(), rows(), by=guide))
    assert all(torch.equal(before[name], tensor) for name, tensor in guide.net.state_dict().items())


def test_a_teacher_that_shares_the_students_network_does_not_follow_it():
    """Self-distillation: the start is the teacher; training a copy leaves it where it was."""
    start = student()
    watched = []
    trained(HardLabels(), rows(), by=start, start=start, watchers=[watched.append])
    assert same(start, student())


def test_no_gradient_reaches_the_teacher():
    """general-peers 11: a teacher function that forgets no_grad is not trained, and keeps no graph."""
    guide = seeded(lambda: nn.Linear(5, CLASSES), 3)
    trained(SoftTargets(), rows(), by=lambda batch: Signal(logits=Dense(guide(batch.inputs["x"]))))
    assert guide.weight.grad is None


def test_seed_zero_shuffles():
    """DistillKit: `seed: 0` disables shuffling, since zero is taken for none."""
    weights = [trained(HardLabels(), rows(), seed=seed, steps=1) for seed in (0, 1)]
    in_order = trained(HardLabels(), rows().select(range(8)), seed=0, steps=1)
    assert apart(*weights) > 1e-4
    assert apart(weights[0], in_order) > 1e-4


def test_steps_are_optimiser_steps():
    """Trainers that count micro-batches end the schedule early, or train a fraction of the plan."""
    for accumulation in (1, 4):
        watched = []
        plan = {"steps": 6, "batch_size": 8, "accumulation": accumulation, "schedule": "linear"}
        found = trained(HardLabels(), rows(), watchers=[watched.append], optimiser="adamw",
                        **{**plan, "learning_rate": 0.1})  # fmt: skip
        assert [row.step for row in watched] == list(range(6))
        assert watched[-1].learning_rate == pytest.approx(0.1 / 6)
        assert apart(found, student()) > 0.1


def test_no_gradient_is_left_over_at_the_end_of_an_epoch():
    """rsl_rl: gradients of the last micro-batches are dropped when they do not fill an accumulation."""
    examples = rows(9)  # 8 and 1, in 4 micro-batches
    whole = trained(HardLabels(), examples, steps=4)
    assert apart(whole, trained(HardLabels(), examples, steps=4, accumulation=4)) < 1e-6
    assert apart(whole, trained(HardLabels(), examples, steps=3)) > 1e-4


def test_every_example_of_an_epoch_is_used_once():
    """Trainers that drop the last batch, or pad it with repeats (torchtune, DistributedSampler)."""
    seen = []

    def listening(batch):
        seen.extend(batch.ids)
        return Signal(logits=Dense(torch.zeros(len(batch), CLASSES)))

    trained(SoftTargets(), rows(), by=listening, steps=Plan(batch_size=8).steps_per_epoch(22), accumulation=3)
    assert sorted(seen) == sorted(rows().ids)


def test_the_last_step_is_returned_and_not_the_best(tmp_path):
    """general-peers 2 (LSKD#23, mdistiller#36): the best epoch on the test set is reported."""
    stopped = trained(HardLabels(), rows(), steps=5, schedule="constant", learning_rate=3.0)
    assert same(
        stopped, trained(HardLabels(), rows(), steps=5, schedule="constant", learning_rate=3.0, folder=tmp_path)
    )


def test_the_loop_by_hand_distils():
    """examples/by_hand.py: the student is close to its teacher, and better than the same network alone."""
    pytest.importorskip("sklearn")
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: float(share) for name, share in map(str.split, done.stdout.splitlines())}
    assert found["teacher"] > 0.95
    assert found["student"] > found["alone"] + 0.05
    assert found["student"] > found["teacher"] - 0.03
    assert len(EXAMPLE.read_text().splitlines()) < 80

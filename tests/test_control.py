"""Driving in closed loop: the same by seed, who drives, what is asked, what goes wrong; outcomes, episodes."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import stillroom as sr
from control_fakes import Cart, Controller, cart, pusher
from stillroom import control
from stillroom.control import Episodes, drive, joined, outcomes_of, read_episodes, rounds_of, write_episodes
from stillroom.control.outcomes import RatioOfMeans, metrics_for, share_interval, starts_table
from stillroom.errors import DataError, FolderError, MissingFileError, PairError, ShapeError, SignalError, UsageError


def same(a: Episodes, b: Episodes) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Episodes)]
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def test_an_episode_depends_on_its_start_and_seed_only():
    """Driven alone or after others, an episode is the same, noise included; another seed draws other noise."""
    teacher = Controller()
    alone = drive(teacher, cart(), [7], teacher=teacher, noise=0.5, seed=3)
    after = drive(teacher, cart(), [1, 7], teacher=teacher, noise=0.5, seed=3)
    assert np.array_equal(alone.states, after.per_episode(after.states)[1])
    other = drive(teacher, cart(), [7], teacher=teacher, noise=0.5, seed=4)
    assert not np.array_equal(alone.states[:5], other.states[:5])


def test_the_student_sees_frames_and_no_speed():
    """x is the last two observations, oldest first, the first one repeated; the teacher sees the speed."""
    teacher = Controller()
    found = drive(teacher, cart(), [0], teacher=teacher)
    seen = found.states[:, [0, 2]]
    assert np.array_equal(found.observations[0], np.concatenate([seen[0], seen[0]]))
    assert np.array_equal(found.observations[5], np.concatenate([seen[4], seen[5]]))
    assert found.success.all()
    assert found.lengths[0] < 120  # it ends at success


def test_the_teacher_is_asked_once_for_each_step():
    teacher = Controller()
    found = drive(teacher, cart(), range(3), teacher=teacher)
    assert teacher.asked == found.steps == len(found.ids) == len(set(found.ids))
    student = drive(pusher(0.1), cart(), range(3), teacher=teacher)
    assert teacher.asked == found.steps + student.steps
    assert np.array_equal(found.errors(), np.zeros(found.steps))  # the driver's own actions were the answers
    assert student.errors()[0] == pytest.approx((0.1 - student.answers[0, 0]) ** 2)


def test_noise_reaches_what_is_done_and_not_what_is_answered():
    """DART: the state moves by the noise; action and answer stay clean; the bounds hold for what is done."""
    teacher = Controller()
    clean, noisy = (drive(teacher, cart(), [2], teacher=teacher, noise=noise) for noise in (0.0, 1.0))
    assert np.array_equal(clean.answers[0], noisy.answers[0])
    assert not np.array_equal(clean.states[:20], noisy.states[:20])
    assert np.array_equal(noisy.answers, noisy.actions)
    assert np.abs(np.diff(noisy.states[:, 1], prepend=0)).max() <= 0.2  # 0.1 * (1 + 1): nothing beyond the bounds


def test_the_teachers_share_of_the_steps():
    """Share 1 is the teacher's driving, 0 the policy's, and between them both drive."""
    teacher, policy = Controller(), pusher(-1.0)
    whole = drive(policy, cart(), [0], teacher=teacher, teacher_share=1.0)
    assert same(whole, drive(teacher, cart(), [0], teacher=teacher))
    none = drive(policy, cart(), [0], teacher=teacher, teacher_share=0.0)
    assert (none.actions == -1).all()
    half = drive(policy, cart(horizon=100, succeeded=None), [0], teacher=teacher, teacher_share=0.5)
    assert 30 < (half.actions == -1).sum() < 70


def test_a_limit_cuts_the_last_episode():
    teacher = Controller()
    found = drive(teacher, cart(), range(100), teacher=teacher, limit=101)
    assert found.steps == teacher.asked == 101


def test_several_tasks_take_turns():
    tasks = (cart(name="a"), cart(name="b"))
    found = drive(Controller(), tasks, range(4))
    assert found.tasks == ("a", "b", "a", "b")
    assert found.answers is None
    with pytest.raises(DataError, match="teacher was not asked"):
        found.errors()


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (lambda b: sr.Signal(values=torch.full((1, 1), math.nan)), SignalError, "nan.*cart/4/0: not finite"),
        (pusher(math.inf), SignalError, "not finite"),
        (pusher(500), SignalError, "more than 100 times outside.*diverged"),
        (lambda b: sr.Signal(values=torch.zeros(1, 3)), ShapeError, "answers 3 numbers, but an action of 'cart' has 1"),
        (lambda b: sr.Signal(values=torch.nn.Linear(9, 1)(b.inputs["x"])), ShapeError, r"cannot answer.*'x': \[4\]"),
    ],
)
def test_wrong_actions_are_named_with_their_step(answer, error, says):
    with pytest.raises(error, match=says):
        drive(answer, cart(), [4])


def test_a_task_and_its_environment_must_agree():
    class Wide(Cart):
        action_space = type("Box", (), {"shape": (4,)})()

    with pytest.raises(PairError, match=r"1 numbers of an action, but its environment takes \[4\]"):
        drive(pusher(0), cart(make=Wide), [0])
    with pytest.raises(UsageError, match="leave no room"):
        cart(low=(1.0,), high=(1.0,))
    with pytest.raises(UsageError, match="horizon=0"):
        cart(horizon=0)
    with pytest.raises(ShapeError, match="vector of finite numbers"):
        drive(pusher(0), cart(observe=lambda state: state * math.nan), [0])
    with pytest.raises(UsageError, match="needs a teacher"):
        drive(pusher(0), cart(), [0], teacher_share=0.5)
    with pytest.raises(DataError, match="nothing to drive"):
        drive(pusher(0), cart(), [])


def test_episodes_are_kept_and_read_as_they_were(tmp_path):
    found = drive(Controller(), cart(), range(3), teacher=Controller())
    write_episodes(found, tmp_path / "e.safetensors")
    assert same(found, read_episodes(tmp_path / "e.safetensors"))
    without = drive(Controller(), cart(), range(3))
    write_episodes(without, tmp_path / "f.safetensors")
    assert read_episodes(tmp_path / "f.safetensors").answers is None
    with pytest.raises(MissingFileError):
        read_episodes(tmp_path / "none")
    (tmp_path / "e.safetensors").write_bytes((tmp_path / "e.safetensors").read_bytes()[:-9])
    with pytest.raises(FolderError, match=r"e.safetensors cannot be read.*drive again"):
        read_episodes(tmp_path / "e.safetensors")


def test_episodes_as_examples():
    """Joined episodes are a Table whose rows answer by id; labelled, the teacher's answers are the labels."""
    teacher = Controller()
    parts = [drive(teacher, cart(), [start], teacher=teacher) for start in (0, 1)]
    both = joined(parts)
    assert same(both, drive(teacher, cart(), [0, 1], teacher=teacher))
    table = both.table("cart", labelled=True)
    assert torch.equal(table.labels, torch.from_numpy(both.answers))
    assert table.batch([3]).ids == ("cart/0/3",)
    assert np.allclose(teacher(table.batch(range(len(table)))).values.numpy(), both.answers)


def test_rounds_of_every_way_ask_equally_often():
    for way in control.WAYS:
        rounds = rounds_of(way, 1003, rounds=4)
        assert sum(round.questions for round in rounds) == 1003
    assert [r.teacher_share for r in rounds_of("dagger", 100, rounds=5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [r.teacher_share for r in rounds_of("dagger", 100, rounds=3, first_share=0.0)] == [0, 0, 0]
    (dart,) = rounds_of("dart", 100, noise=0.3)
    assert (dart.teacher_share, dart.noise) == (1.0, 0.3)
    assert not any(r.keeps_earlier or r.teacher_share for r in rounds_of("student_drives", 100))
    with pytest.raises(UsageError, match="did you mean 'dagger'"):
        rounds_of("dager", 100)
    with pytest.raises(UsageError, match="at least one"):
        rounds_of("dagger", 3, rounds=5)
    with pytest.raises(UsageError, match="both from 0 to 1"):
        rounds_of("dagger", 100, first_share=0.2, last_share=0.5)


def outcomes(policy, task, starts=range(100, 112)):
    teacher = Controller()
    shown = drive(teacher, task, starts, teacher=teacher)
    return outcomes_of(policy, (task,), starts, teacher, shown)[0]


def test_outcomes_worked_by_hand():
    """A policy that always says 0.5: its errors at the teacher's and its own states are those of drive."""
    task, teacher, starts = cart(), Controller(), range(100, 112)
    shown = drive(teacher, task, starts, teacher=teacher)
    own = drive(pusher(0.5), task, starts, teacher=teacher)
    found = outcomes(pusher(0.5), task)
    assert found.mean("success") == own.success.mean()
    assert found.mean("return") == pytest.approx(own.returns.mean())
    assert found.mean("teacher_error") * 12 == pytest.approx(np.square(0.5 - shown.answers).sum())
    assert found.mean("own_error") * 12 == pytest.approx(np.square(0.5 - own.answers).sum())
    assert found.mean("own_count") * 12 == own.steps


def test_a_scoreboard_of_closed_loops():
    """Outcomes are evaluated like answers: success and its interval, the worst episode, the ratio of the two errors."""
    task = cart(ends_at_success=False)
    rows = {"teacher": outcomes(Controller(), task), "student": outcomes(Controller(gain=1.0), task)}
    starts, chosen = starts_table(rows["teacher"]), metrics_for((task,))
    report = sr.evaluate(rows, rows["teacher"], starts, chosen, costs=False, replicates=50, progress=False)
    assert report.metric == "success"
    assert report.examples == 12
    ours, theirs = report.rows["student"], report.rows["teacher"]
    assert theirs["success"]["value"] == 1.0
    assert ours["worst_return"]["value"] < ours["mean_return"]["value"] < theirs["mean_return"]["value"]
    ratio = ours["error_own_states"]["value"] / ours["error_teacher_states"]["value"]
    assert ours["error_ratio"]["value"] == pytest.approx(ratio)
    assert theirs.get("error_ratio") is None
    assert {"success_disturbed", "return_disturbed"} <= set(ours)


def test_metrics_follow_from_what_the_task_says():
    names = [m.name for m in metrics_for((cart(disturbance=0.0),))]
    assert names == ["success", "episode_steps", "error_teacher_states", "error_own_states", "error_ratio"]
    names = [m.name for m in metrics_for((cart(succeeded=None),))]
    assert names[:3] == ["mean_return", "worst_return", "return_disturbed"]


def test_an_interval_of_shares_by_hand():
    """Wilson: 50 of 50 is no less than 50 / (50 + 1.96^2); 5 of 10 is symmetric around a half."""
    sure = share_interval(50, 50)
    assert (sure.value, sure.high) == (1.0, 1.0)
    assert sure.low == pytest.approx(50 / (50 + 1.959964**2))
    half = share_interval(5, 10)
    assert half.low == pytest.approx(0.2366, abs=1e-4)
    assert half.low + half.high == pytest.approx(1)
    assert share_interval(0, 20).low == 0


def test_the_ratio_is_of_means():
    """(2 + 4) / (1 + 2) over (1 + 1) / (1 + 1) = 2 / 1."""
    assert RatioOfMeans()(torch.tensor([[2.0, 1, 1, 1], [4.0, 2, 1, 1]])) == 2.0

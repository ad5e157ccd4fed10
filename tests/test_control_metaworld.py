"""Meta-World's Sawyer arm: starts follow from the seed, the student's sensors are blind to what a real arm lacks."""

import numpy as np
import pytest
import torch

import stillroom as sr
from stillroom.control import drive
from stillroom.errors import DataError, UsageError

pytest.importorskip("metaworld", reason="needs the extra 'control'")

from stillroom.control.metaworld import SAWYER, Sensors, experts, sawyer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:gymnasium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_an_expert_reaches_from_seeded_starts():
    """Two starts differ, one start is the same after another; the expert succeeds from both."""
    (task,), teacher = sawyer("reach-v3"), experts()
    both = drive(teacher, task, [11, 12], teacher=teacher)
    assert both.success.all()
    assert both.observations.shape[1] == 2 * 10
    first, second = both.per_episode(both.states)
    assert not np.array_equal(first[0], second[0])
    assert np.array_equal(drive(teacher, task, [12], teacher=teacher).states, second)


def test_the_sensors_do_not_see_what_a_real_arm_lacks():
    """Orientations [7:11], a second object [11:18], the last frame [18:36], and a goal that nobody tells."""
    state = np.linspace(0.1, 0.9, 39)
    for told, hidden in ((True, slice(7, 36)), (False, slice(7, 39))):
        other = state.copy()
        other[hidden] += 0.5
        assert np.array_equal(Sensors(told)(state), Sensors(told)(other))
    assert not np.array_equal(Sensors(True)(state), Sensors(True)(np.roll(state, 1)))
    state[4] = 0.2
    moved = state + np.eye(39)[4] * 0.0009  # within the camera's grid of 2 mm
    assert np.array_equal(Sensors(True)(state), Sensors(True)(moved))
    assert not np.array_equal(Sensors(True, grid=0)(state), Sensors(True, grid=0)(moved))


def test_one_student_of_several_tasks_is_told_which():
    tasks = sawyer(list(SAWYER))
    assert len({task.name for task in tasks}) == 5
    state = np.zeros(39)
    assert [int(task.observe(state)[-5:].argmax()) for task in tasks] == [0, 1, 2, 3, 4]
    assert {task.observe(state).shape for task in tasks} == {(15,)}


def test_names_and_states_are_checked():
    with pytest.raises(UsageError, match="did you mean 'push-v3'"):
        sawyer("pushh-v3")
    with pytest.raises(DataError, match=r"'state' \[B, 39\]"):
        experts()(sr.Batch(("a",), {"state": torch.zeros(1, 4), "task": ("reach-v3",)}))
    assert "metaworld 3" in experts().identity.source

"""Neural teachers: read and never run, the same from the same start, and gymnasium's environments as tasks."""

import sys

import numpy as np
import pytest
import torch

from stillroom.control import drive, gymnasium, pybullet, stable_baselines3
from stillroom.errors import DataError, FolderError, UsageError
from stillroom.provenance.terms.table import load_table
from stillroom.types import Batch

pytest.importorskip("pybullet_data", reason="needs the extra policies")
PENDULUM = "InvertedPendulum-v5"


def state(size, count=5):
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    return values, Batch(tuple(map(str, range(count))), {"state": values})


@pytest.mark.parametrize(("robot", "sizes", "parameters"), [("ant", (28, 8), 12488), ("hopper", (15, 3), 10499)])
def test_a_shipped_policy_is_its_numbers(robot, sizes, parameters):
    """The formula in PyBullet's example, relu(relu(x a + b) c + d) e + f, from the numbers in its source."""
    teacher = pybullet.teacher(robot)
    assert sum(p.numel() for p in teacher.net.parameters()) == parameters
    values, batch = state(sizes[0])
    numbers = pybullet._arrays(pybullet._package() / "examples" / pybullet.ROBOTS[robot].policy)
    x = values.numpy()
    for layer in pybullet.LAYERS:
        x = x @ numbers[f"weights_{layer}_w"] + numbers[f"weights_{layer}_b"]
        x = np.maximum(x, 0) if layer != "final" else x
    assert x.shape == (5, sizes[1])
    np.testing.assert_allclose(teacher(batch).values.numpy(), x, rtol=1e-4, atol=1e-4)
    assert teacher.identity.licence == "Zlib"
    assert "enjoy_TF" in teacher.identity.source


def test_a_policys_file_is_read_and_not_run(tmp_path):
    """Whatever else it says is not executed; numbers that are none, or are missing, are refused."""
    mark = tmp_path / "run"
    path = tmp_path / "enjoy.py"
    path.write_text(f"open({str(mark)!r}, 'w')\nimport nothing_here\nweights_dense1_w = np.array([[1.0, 2.0]])\n")
    with pytest.raises(DataError, match="has no weights_dense1_b, weights_dense2_w"):
        pybullet._arrays(path)
    path.write_text(f"weights_dense1_w = np.array(open({str(mark)!r}, 'w'))\n")
    with pytest.raises(ValueError, match="malformed"):
        pybullet._arrays(path)
    assert not mark.exists()


@pytest.mark.parametrize("robot", sorted(pybullet.ROBOTS))
def test_a_shipped_policys_terms_are_known(robot):
    """The licence of the policy and of its robot has a row in the terms table, so a recipe passes the gate as it is."""
    policy, known = pybullet.teacher(robot), load_table()
    for licence in (policy.identity.licence, pybullet.task(robot).licence):
        (row,) = known.find(licence)
        assert (row.id, row.output_use) == ("Zlib", "permitted")


def test_a_walk_follows_from_its_start_alone(capfd):
    """The same whatever was walked before, another from another start; no old package stays, nothing is printed."""
    task, teacher = pybullet.task("ant", horizon=40), pybullet.teacher("ant")
    first = drive(teacher, task, [3, 4])
    again = drive(teacher, task, [4, 3])
    assert first.returns.tolist() == again.returns.tolist()[::-1]
    assert first.returns[0] != first.returns[1]
    assert first.returns.min() > 20  # a fall within 40 steps, or standing still, has less
    np.testing.assert_array_equal(first.per_episode(first.states)[0], again.per_episode(again.states)[1])
    assert not {"gym", "pkg_resources"} & set(sys.modules)
    assert capfd.readouterr().out == ""


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="no robot 'hoper'.*hopper"):
        pybullet.task("hoper")
    with pytest.raises(UsageError, match="no environment 'Nothing-v9'"):
        gymnasium.task("Nothing-v9")


def test_a_student_sees_what_it_is_given():
    """Positions without velocities, three frames of them; bounds and period are the environment's."""
    task = gymnasium.task(PENDULUM, sees=[0, 1], frames=3, horizon=5)
    assert (task.low, task.high, task.period) == ((-3.0,), (3.0,), 0.04)
    found = drive(lambda batch: _answer(batch), task, [1])
    assert found.observations.shape == (5, 6)
    np.testing.assert_allclose(found.observations[2, 4:], found.states[2, :2])
    np.testing.assert_allclose(found.observations[2, :2], found.states[0, :2])


def _answer(batch):
    from stillroom.types import Signal

    return Signal(values=torch.zeros(len(batch), 1))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [(PENDULUM, {"sees": [0, 4]}, "are 0 to 3"), (PENDULUM, {"sees": []}, "are 0 to 3"), ("CartPole-v1", {}, "bounds")],
)
def test_environments_that_are_no_task_are_refused(name, settings, says):
    with pytest.raises(UsageError, match=says):
        gymnasium.task(name, **settings)


def test_ppos_network_is_its_policy():
    """What is kept answers as the library's own deterministic policy, before limits."""
    from stable_baselines3 import PPO

    made = gymnasium.make(PENDULUM)
    model = PPO("MlpPolicy", made, device="cpu", seed=3, policy_kwargs={"net_arch": [16, 8]})
    net = stable_baselines3._network(stable_baselines3._layers(model.policy))
    values, _ = state(4)
    with torch.no_grad():
        expected = model.policy.get_distribution(values).mode()
        torch.testing.assert_close(net(values), expected)
    made.close()


@pytest.mark.slow
def test_ppo_is_trained_once_and_kept_without_a_pickle(tmp_path):
    """A teacher that learns keeps a pendulum up longer than one that does nothing, and is opened again as it was."""
    teacher = stable_baselines3.ppo(PENDULUM, 6000, learning_rate=1e-3, workspace=tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]
    again = stable_baselines3.ppo(PENDULUM, 6000, learning_rate=1e-3, workspace=tmp_path, progress=False)
    _, batch = state(4)
    assert torch.equal(teacher(batch).values, again(batch).values)
    with pytest.raises(FolderError, match="another steps"):
        stable_baselines3.ppo(PENDULUM, 7000, learning_rate=1e-3, workspace=tmp_path, progress=False)
    with pytest.raises(FolderError, match="another gamma, gae_lambda"):
        stable_baselines3.ppo(
            PENDULUM, 6000, learning_rate=1e-3, gamma=0.9, gae_lambda=1.0, workspace=tmp_path, progress=False
        )
    task = gymnasium.task(PENDULUM, horizon=300)
    up, idle = (drive(policy, task, range(3)).returns.mean() for policy in (teacher, _answer))
    assert up > 2 * idle

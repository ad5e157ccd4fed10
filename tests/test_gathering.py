"""Gathering: equal questions by every way, what the student learns from, resuming, and students that run away."""

import shutil

import numpy as np
import pytest
import torch

import stillroom as sr
from control_fakes import Controller, cart, small_student
from stillroom import gathering
from stillroom.control import WAYS, drive, outcomes_of
from stillroom.control.answered import Answered
from stillroom.errors import FolderError, RecordingError, SignalError, UsageError
from stillroom.gathering import Gathering, gather
from stillroom.types import identity_of

PLAN = sr.Plan(steps=60, batch_size=32, learning_rate=1e-2)


def gathered(folder, teacher=None, plan=PLAN, student=None, **changes):
    how = Gathering(**({"questions": 200, "rounds": 3} | changes))
    teacher, student = teacher or Controller(), student or small_student()
    return gather(student, teacher, (cart(),), sr.MatchValues(), how, plan=plan, folder=folder, progress=False)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_asks_equally_often(way, tmp_path):
    """The teacher itself counts 200 questions; what is learned from is all of them, or the last round."""
    teacher = Controller()
    found = gathered(tmp_path, teacher, way=way)
    assert teacher.asked == found.asked == 200
    assert found.episodes.steps == (200 if way != "student_drives" else 66)
    assert len(set(found.episodes.ids)) == found.episodes.steps
    assert max(found.episodes.starts) < gathering.FIRST_UNSEEN
    assert found.plan.steps == (20 if way == "student_drives" else 60)
    assert np.array_equal(gathering.opened(tmp_path).answers, found.episodes.answers)


def test_who_drives(tmp_path):
    """Cloning: the teacher alone. DART: the teacher in noise. DAgger: less and less the teacher."""
    cloning = gathered(tmp_path / "c", way="cloning").episodes
    assert np.array_equal(cloning.actions, cloning.answers)
    dart = gathered(tmp_path / "n", way="dart").episodes
    assert np.array_equal(dart.actions, dart.answers)
    assert not np.array_equal(dart.states, cloning.states)
    gathered(tmp_path / "d", way="dagger")
    shares = []
    for number in range(3):
        one = gathering.read_episodes(tmp_path / "d" / f"round-{number}.safetensors")
        shares.append(float((one.actions == one.answers).all(-1).mean()))
    assert shares[0] == 1
    assert 0.3 < shares[1] < 0.75
    assert shares[2] < 0.2


def test_the_recording_of_a_gathering_asks_nobody_again(tmp_path):
    """record() over the driven states is answered from what was said while driving, in the teacher's name."""
    teacher = Controller()
    found = gathered(tmp_path, teacher)
    answers = Answered(found.episodes, identity_of(teacher))
    recording = sr.record(answers, found.episodes.table(), tmp_path / "recording", progress=False)
    assert teacher.asked == 200
    assert recording.manifest["teacher"]["name"] == "cart controller"
    asked = recording(found.episodes.table().batch(range(200)))
    assert np.array_equal(asked.values.numpy(), found.episodes.answers)
    with pytest.raises(RecordingError, match="never asked about 'elsewhere'"):
        answers(sr.Batch(("elsewhere",), {}))


def test_a_gathering_goes_on_where_it_stopped(tmp_path):
    """Rounds that were lost are driven again and end with the same bytes; finished ones ask nobody."""
    gathered(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for lost in ("round-1.safetensors", "round-2.safetensors", "gathering.json"):
        (tmp_path / "b" / lost).unlink()
    shutil.rmtree(tmp_path / "b" / "round-1")
    teacher = Controller()
    gathered(tmp_path / "b", teacher)
    assert teacher.asked == 133
    for number in range(3):
        name = f"round-{number}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(FolderError, match=r"another gathering.*gathering.way"):
        gathered(tmp_path / "a", way="cloning")


def test_a_student_that_learned_arrives(tmp_path):
    """The whole: gathered, trained, and driven from unseen starts; the untrained one does not arrive."""
    teacher, starts = Controller(), range(gathering.FIRST_UNSEEN, gathering.FIRST_UNSEEN + 10)
    found = gathered(tmp_path, teacher, plan=sr.Plan(steps=400, batch_size=64, learning_rate=1e-2), questions=600)
    answers = Answered(found.episodes, identity_of(teacher))
    table = found.episodes.table()
    student = sr.fit(found.student, answers, table, sr.MatchValues(), plan=found.plan, progress=False)
    shown = drive(teacher, cart(), starts, teacher=teacher)
    success = {
        name: outcomes_of(policy, (cart(),), starts, teacher, shown)[0].mean("success")
        for name, policy in {"trained": student, "untrained": small_student()}.items()
    }
    assert success["trained"] >= 0.9
    assert success["untrained"] <= 0.5


def test_a_loss_that_grows_is_stopped_with_its_state(tmp_path):
    """Plain gradient descent far too fast: an error that names the round, and the state lies in its folder."""
    with pytest.raises(SignalError, match="round-0: the loss is .* diverges.*learning_rate|loss became"):
        gathered(tmp_path, plan=sr.Plan(steps=200, optimiser="sgd", learning_rate=200.0, clip_norm=None))
    assert (tmp_path / "round-0" / "checkpoint.pt").is_file()
    assert (tmp_path / "round-0" / "history.jsonl").read_text().count("\n") >= 2
    assert (tmp_path / "round-0.safetensors").is_file()


def test_a_student_whose_actions_run_away_is_stopped(tmp_path):
    """Its rounds so far are kept, the error says where."""
    student = small_student()
    with torch.no_grad():
        student.net.output.bias.fill_(1e6)
    with pytest.raises(SignalError, match=r"cart/\d+/0.*has diverged"):
        gathered(tmp_path, student=student, way="student_drives")


def test_settings_are_checked():
    with pytest.raises(UsageError, match="too many"):
        Gathering(questions=2_000_000)
    with pytest.raises(UsageError, match="no way of gathering 'clone'"):
        Gathering(way="clone")

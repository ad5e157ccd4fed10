"""Killed at any moment, a training goes on and ends with the bytes of an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fit_fakes import rows, teacher, trained
from fit_script import BOTH, TRAININGS
from stillroom.errors import FolderError
from stillroom.fitting.devices import accelerator_for

SCRIPT = Path(__file__).parent / "fit_script.py"


def outcome(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "history.jsonl")}


def kill_and_resume(folder, kills):
    """The steps at which killed trainings were taken up again; all of them end alike, and as in this process."""
    command = [sys.executable, str(SCRIPT), str(folder), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.rand(3)
    TRAININGS["long"](folder=folder / "here")
    wanted = outcome(folder / "whole")
    for name in ("here", *map(str, range(kills))):
        assert outcome(folder / name) == wanted, name
        assert not (folder / name / "checkpoint.pt").exists()
    return json.loads(done.stdout)


def test_kills_at_drawn_moments_change_nothing(tmp_path):
    """Nor does another process, nor what was drawn before: with dropout, AdamW, a projector and accumulation."""
    assert any(kill_and_resume(tmp_path, kills=4))


@pytest.mark.slow
def test_many_kills_change_nothing(tmp_path):
    steps = kill_and_resume(tmp_path, kills=20)
    assert len({step for step in steps if step}) > 10


def stopped_at(step):
    def watch(row):
        if row.step >= step:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("name", ["long", "half", "rows"])
@pytest.mark.parametrize("step", [1, 17])
def test_an_interrupted_training_goes_on(tmp_path, name, step):
    """llm-peers 20: resuming repeats or loses state (easydistill#18, trl#6987, ModelOpt#320)."""
    train = TRAININGS[name]
    step = min(step, 3) if name == "rows" else step
    whole = tmp_path / "whole"
    watched = []
    train(folder=whole)
    with pytest.raises(KeyboardInterrupt):
        train(folder=tmp_path / "cut", checkpoint_seconds=0, watchers=[stopped_at(step)])
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    train(folder=tmp_path / "cut", watchers=[watched.append])
    assert watched[0].step >= step
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_the_scaler_of_fp16_is_kept(tmp_path, monkeypatch):
    """Its scale decides which steps overflow. (There is no fp16 on a CPU: the scaler is put in by hand.)"""
    scalers = []

    def scaled(*args):
        made = accelerator_for(*args)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        scalers.append(made.scaler)
        return made

    monkeypatch.setattr("stillroom.fitting.loop.accelerator_for", scaled)
    settings = {"folder": tmp_path / "s", "by": teacher(), "steps": 12, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        trained(BOTH, rows(), watchers=[stopped_at(8)], **settings)
    trained(BOTH, rows(), **settings)
    assert scalers[0].get_scale() == 64.0 * 2**4
    assert scalers[1].get_scale() == 64.0 * 2**6


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "cut", "flip"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    folder = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        trained(BOTH, rows(), by=teacher(), folder=folder, checkpoint_seconds=0, watchers=[stopped_at(3)])
    path = folder / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"X" + content[1:] if damage == "flip"
                     else damage)  # fmt: skip
    with pytest.raises(FolderError, match=r"checkpoint.pt cannot be read .* Delete it to train from the start"):
        trained(BOTH, rows(), by=teacher(), folder=folder)
    path.unlink()
    trained(BOTH, rows(), by=teacher(), folder=folder)


def test_a_checkpoint_never_runs_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        trained(BOTH, rows(), by=teacher(), folder=folder, checkpoint_seconds=0, watchers=[stopped_at(3)])
    torch.save({"step": Code()}, folder / "checkpoint.pt")
    with pytest.raises(FolderError, match="cannot be read"):
        trained(BOTH, rows(), by=teacher(), folder=folder)
    assert not (tmp_path / "ran").exists()


def test_an_unfinished_folder_of_another_training_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", checkpoint_seconds=0, watchers=[stopped_at(3)])
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(FolderError, match=r"plan.learning_rate: 0.1 there, 0.2 now"):
        trained(BOTH, rows(), by=teacher(), folder=tmp_path / "s", learning_rate=0.2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before

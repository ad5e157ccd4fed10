"""Two ranks of `accelerate launch` on the CPU end with the weights of one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fit_language_script import TRAININGS as language
from fit_ranks import on_two_ranks
from fit_script import TRAININGS

SCRIPT = Path(__file__).parent / "fit_script.py"
LANGUAGE = Path(__file__).parent / "fit_language_script.py"


def test_two_ranks_equal_one(tmp_path):
    """Five trainings in one launch: partly labelled, in micro-batches, with a projector, with a rank left idle."""
    names = ["rows", "sequences", "features", "few", "rows-again"]
    found = on_two_ranks(SCRIPT, tmp_path, ",".join(names))
    assert found.returncode == 0, found.stderr[-3000:]
    assert sorted(found.stdout.split()) == ["rank0/2", "rank1/2"]
    for name in names:
        one = TRAININGS[name]().net.state_dict()
        two = load_file(tmp_path / name / "model.safetensors")
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, name


@pytest.mark.slow
def test_parameters_that_the_objective_does_not_reach_are_named(tmp_path):
    """Ranks would wait for their gradients: DDP's own message names neither cause nor cure."""
    found = on_two_ranks(SCRIPT, tmp_path, "unreached")
    assert found.returncode != 0
    assert "does not reach every trainable parameter" in found.stderr


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_language_students_on_two_ranks_equal_one(tmp_path):
    """The head's weight is used outside the forward that DDP sees: its gradient is shared all the same.

    Tied and free heads, LoRA, both averages, micro-batches, activations computed again.
    """
    names = ["tied", "untied", "adam", "lora", "checkpointed"]
    found = on_two_ranks(LANGUAGE, tmp_path, ",".join(names))
    assert found.returncode == 0, found.stderr[-3000:]
    for name in names:
        language[name](folder=tmp_path / "one" / name)
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / name)
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, name

"""Two ranks of `accelerate launch` on the CPU end with the weights of one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fit_language_script import TRAININGS as language
from fit_ranks import COPIED, SHARED, on_two_ranks
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


def check_language(folder, names):
    for name in names:
        language[name](folder=folder / "one" / name)
        one, two = weights(folder / "one" / name), weights(folder / name)
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, name


@pytest.mark.slow
def test_language_students_on_two_ranks_equal_one(tmp_path):
    """The head's weight is used outside the forward that DDP sees: its gradient is shared all the same.

    Tied and free heads, LoRA, both averages, micro-batches. trl#4719, ms-swift#10165:
    the loss was averaged for each rank by itself.
    """
    names = ["tied", "untied", "lora"]
    found = on_two_ranks(LANGUAGE, tmp_path, ",".join(names))
    assert found.returncode == 0, found.stderr[-3000:]
    assert "rank1/2:MULTI_CPU" in found.stdout.split()
    check_language(tmp_path, names)


@pytest.mark.slow
def test_a_student_shared_out_by_fsdp2_equals_one_process(tmp_path):
    """Weights, gradients and AdamW's state lie in parts on two ranks; the folder holds the whole."""
    names = ["tied", "adam"]
    found = on_two_ranks(LANGUAGE, tmp_path, ",".join([*names, "by_hand"]), SHARED)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "rank1/2:FSDP" in found.stdout.split()
    check_language(tmp_path, names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [COPIED, SHARED], ids=["copied", "shared"])
def test_every_kind_of_student_on_two_ranks_equals_one(tmp_path, kind):
    names = ["untied", "lora", "checkpointed", "adam"]
    found = on_two_ranks(LANGUAGE, tmp_path, ",".join(names), kind)
    assert found.returncode == 0, found.stderr[-3000:]
    check_language(tmp_path, names)


@pytest.mark.slow
def test_a_student_shared_out_goes_on_after_a_kill(tmp_path):
    """The checkpoint holds the whole state of all parts."""
    assert on_two_ranks(LANGUAGE, tmp_path, "adam@4", SHARED).returncode != 0
    assert (tmp_path / "adam" / "checkpoint.pt").is_file()
    found = on_two_ranks(LANGUAGE, tmp_path, "adam", SHARED)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "adam:from-4" in found.stdout.split()
    check_language(tmp_path, ["adam"])


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused(tmp_path):
    found = on_two_ranks(LANGUAGE, tmp_path, "learns", SHARED)
    assert found.returncode != 0
    assert "what it learns is not shared out. Launch without --use_fsdp" in found.stderr

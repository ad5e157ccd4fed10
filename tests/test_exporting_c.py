"""C: the source answers like its student, refuses what it should, links beside another, and never allocates."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import stillroom as sr
from stillroom.errors import DataError, FolderError, UsageError
from stillroom.exporting import Tolerance
from stillroom.exporting.c.compiled import entry, open_c
from stillroom.exporting.c.source import symbol
from stillroom.exporting.onnx import int8
from stillroom.measures.artefacts import chosen_int8
from stillroom.students.architectures import mlp

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
LOOSE = Tolerance(difference=None, agreement=None, error=0.2, quality=None)


def examples(shape=(6,), count=48, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(1)
    x = torch.randint(0, 4, (count, *shape), generator=drawn) if not dtype.is_floating_point else None
    x = torch.randn(count, *shape, generator=drawn) if x is None else x
    return sr.Table({"x": x}, ids=tuple(map(str, range(count))))


def policy(name="Ant, small", outputs=3):
    factory = "stillroom.students.architectures:mlp"
    return sr.Student.make(factory, {"inputs": 6, "outputs": outputs, "hidden": [8]}, answers="values", name=name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One float32 artefact for all tests that only read it."""
    folder = tmp_path_factory.mktemp("exports")
    return sr.export(policy(), examples(), folder, target="c", progress=False)


def exercise(artifact, kind, value, at=2, flags=("-std=c99", "-O2")):
    """The return code for the middle of the ranges with one number changed, and the answer (42 where untouched)."""
    run, inputs, outputs = entry(artifact.path, kind, flags)
    observation, answer = np.zeros(inputs, np.float32), np.full(outputs, 42, np.float32)
    observation[at] = value
    return run(observation, answer), answer


def test_the_source_answers_like_the_student(exported):
    """On the whole set, opened again from its folder; nothing changeable, and a stack of known size."""
    verify = exported.verify
    assert verify["passed"]
    assert verify["largest_difference"] < 1e-5
    assert verify["symbol"] == "ant_small"
    compiled = verify["compiled"]
    assert compiled["changeable_bytes"] == 0
    assert 4 * (6 * 8 + 8 + 8 * 3 + 3) < compiled["read_only_bytes"] < 8000
    assert 0 < compiled["stack_bytes"] < 4096
    again = sr.load(exported.folder)
    batch = examples().batch(range(5))
    torch.testing.assert_close(again(batch).values, policy()(batch).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("net", ["static", "dynamic"])
def test_int8_in_both_ways(net, tmp_path, monkeypatch):
    """Static (a convolution, whatever it keeps) and dynamic (a perceptron): both become C and pass."""
    monkeypatch.setattr(int8, "STATIC_PREFERRED_WITHIN", 1.0)
    torch.manual_seed(0)
    if net == "static":
        made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        student, data = sr.Student(made, answers="values"), examples((1, 8, 8))
    else:
        student, data = policy(), examples()
    artifact = sr.export(student, data, tmp_path, target="c", precision="int8", tolerance=LOOSE, progress=False)
    assert artifact.verify["passed"]
    assert artifact.verify["quantisation"]["method"] == net
    assert 0 < artifact.verify["largest_difference"] < 0.5
    assert "int8_t" in artifact.path.read_text()


def test_a_student_trained_in_int8_ships_its_own_integers(tmp_path):
    """Nothing is calibrated: the source answers as the rounded student does, to the last bits of a float."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    data = examples((1, 8, 8))
    rounded = sr.quantised(sr.Student(made, answers="values"), "int8", data)
    artifact = sr.export(rounded, data, tmp_path, target="c", precision="int8", progress=False)
    assert artifact.verify["passed"]
    assert chosen_int8(artifact.verify) == "trained (the student's own integers and scales)"
    assert artifact.verify["largest_difference"] < 1e-4
    assert "int8_t" in artifact.path.read_text()


@pytest.mark.parametrize("kind", ["run", "run_clamped", "run_within"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("flags", [("-O2",), ("-Ofast",)], ids=["O2", "Ofast"])
def test_what_is_not_finite_is_refused_and_the_output_untouched(exported, kind, bad, at, flags):
    """emx-onnx-cgen's ReLU is ``a > 0 ? a : 0``, which makes an answer of NaN: the guard must come first."""
    code, answer = exercise(exported, kind, bad, at, flags)
    assert code == 1
    assert answer.tolist() == [42.0] * 3
    assert float(np.float32(1e-39) * np.float32(0.5)) > 0.0  # this process still has its subnormal numbers


def test_out_of_range_is_answered_clamped_or_refused_by_entry(exported):
    """Ranges are those of the calibration inputs; on the limit is inside, one float beyond is not."""
    rows = examples().batch(range(48)).inputs["x"].numpy()
    low, high = rows[:, 2].min(), rows[:, 2].max()
    beyond = np.nextafter(high, np.float32(np.inf))
    assert exercise(exported, "run", 1e6)[0] == 0
    assert exercise(exported, "run_within", high)[0] == 0
    assert exercise(exported, "run_within", low)[0] == 0
    code, answer = exercise(exported, "run_within", beyond)
    assert (code, answer.tolist()) == (2, [42.0] * 3)
    assert exercise(exported, "run_within", np.nextafter(low, np.float32(-np.inf)))[0] == 2
    for far, end in ((1e6, high), (-1e6, low)):
        code, clamped = exercise(exported, "run_clamped", far)
        assert code == 0
        assert clamped.tolist() == exercise(exported, "run", end)[1].tolist()


def test_an_answer_that_overflows_is_refused(exported):
    made = mlp(6, 3, [8])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1e20)
    student = sr.Student(made, answers="values", name="loud")
    small = sr.Table({"x": 1e-30 * torch.arange(24.0).reshape(4, 6)}, ids=tuple("abcd"))
    artifact = sr.export(student, small, exported.folder.parent / "loud", target="c", progress=False)
    assert exercise(artifact, "run", 1e-30)[0] == 0
    code, answer = exercise(artifact, "run", 1.0)
    assert code == 3
    assert answer.tolist() == [42.0] * 3


def test_the_artefact_says_which_row_was_refused(exported):
    rows = torch.zeros(3, 6)
    rows[1, 4] = torch.nan
    with pytest.raises(DataError, match="refused row 1: it holds NaN"):
        exported.predict({"x": rows})
    with pytest.raises(UsageError, match="one input of 6 floats"):
        exported.predict({"x": torch.zeros(3, 5)})


def test_two_students_link_into_one_program(exported, tmp_path):
    """The generator's weights are global symbols of the graph's names: two of its files would not link."""
    other = sr.export(policy("hopper", 2), examples(), tmp_path, target="c", progress=False)
    main = tmp_path / "main.c"
    main.write_text(
        '#include "ant_small.h"\n#include "hopper.h"\n'
        "int main(void) { float in[6] = {0}, a[3], b[2]; return ant_small_run(in, a) + hopper_run(in, b); }\n"
    )
    folders = [f"-I{exported.folder}", f"-I{other.folder}"]
    program = tmp_path / "both"
    command = ["gcc", "-Wall", "-Werror", *folders, main, exported.path, other.path, "-lm", "-o", program]
    subprocess.run([str(part) for part in command], check=True)
    subprocess.run([program], check=True)
    shown = subprocess.run(["nm", "-g", "--defined-only", program], capture_output=True, text=True, check=True).stdout
    ours = {line.split()[-1] for line in shown.splitlines() if "weight" in line or "network" in line}
    assert ours == set()


def harness(artifact, place):
    """The shipped harness, compiled with every warning an error."""
    program = place / "harness"
    source = artifact.folder / "ant_small_main.c"
    command = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-I", artifact.folder, source]
    subprocess.run([str(p) for p in (*command, artifact.path, "-lm", "-o", program)], check=True)
    return program


def test_the_harness_answers_and_refuses(exported, tmp_path):
    done = subprocess.run([harness(exported, tmp_path), "100"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"100 answers, mean -?\d\.\d+(e-\d+)?\n", done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nothing_is_allocated_after_the_start(precision, tmp_path):
    """As many allocations for a thousand answers as for one (the C library's buffer of printf), and no error."""
    artifact = sr.export(
        policy(), examples(), tmp_path, target="c", precision=precision, tolerance=LOOSE, progress=False
    )
    program, counts = harness(artifact, tmp_path), []
    for calls in ("1", "1000"):
        command = ["valgrind", "--error-exitcode=9", "--leak-check=full", program, calls]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        counts.append(re.search(r"total heap usage: ([\d,]+) allocs", said)[1])
    assert counts[0] == counts[1] == "1"


@pytest.mark.parametrize(
    ("make", "data", "says"),
    [
        (
            lambda: sr.Student(nn.Embedding(4, 3), answers="values"),
            examples((2,), dtype=torch.int64),
            "int64.*Use onnx",
        ),
        (
            lambda: sr.Student(nn.Bilinear(6, 6, 2), adapter=sr.Columns(("x", "x")), answers="values"),
            examples(),
            "takes 2 inputs.*Use onnx",
        ),
        (lambda: sr.Student(nn.Linear(6, 2), answers="values"), examples((3, 6)), "rank 3. Use onnx"),
    ],
    ids=["ids", "two inputs", "sequences"],
)
def test_what_c_cannot_take_is_refused_with_the_alternative(make, data, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        sr.export(make(), data, tmp_path, target="c", progress=False)


def test_names_become_symbols_that_are_not_exports_own_files():
    assert symbol("Ant, 10 %") == "ant_10"
    assert symbol("2nd") == "net_2nd"
    assert symbol("model") == "net_model"
    assert symbol("Größe") == "gr_e"
    assert symbol("") == "student"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.c").write_text("int main(void) { return 0; }\n")
    with pytest.raises(FolderError, match="not C that stillroom wrote"):
        open_c(tmp_path / "model.c")

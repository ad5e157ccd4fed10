"""One verb, one table: every combination asked for, refused before any work or made though others fail."""

import functools
import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from torch import nn

from stillroom.cli import main
from stillroom.errors import ParityError, UsageError
from stillroom.exporting import TARGETS, Target, Tolerance, Written, combinations, export, export_several
from stillroom.exporting.dimensions import by_dimension
from stillroom.exporting.onnx.graph import open_model
from stillroom.students.networks import Student
from test_cli import EXAMPLES, SMALL, done
from test_exporting import VERSIONS, Tensors, case, mlp

quick = functools.partial(export, progress=False, measure_memory=False)


def test_combinations_are_what_targets_offer_among_what_is_asked():
    """Without precisions each target's first; with them every one that a target has."""
    assert combinations(["onnx", "gguf"]) == [("onnx", "fp32"), ("gguf", TARGETS["gguf"].precisions[0])]
    assert combinations(["onnx", "gguf"], ["fp32", "int8", "q8_0"]) == [
        ("onnx", "fp32"),
        ("onnx", "int8"),
        ("gguf", "q8_0"),
    ]
    with pytest.raises(UsageError, match=r"'int7'.* onnx: fp32, int8"):
        combinations(["onnx"], ["fp32", "int7"])
    with pytest.raises(UsageError, match="gguf has none of the precisions fp32; it has f32"):
        combinations(["onnx", "gguf"], ["fp32"])
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        combinations(["onxx"])


def test_what_cannot_be_had_is_said_for_all_before_any_work(tmp_path):
    """A perceptron has nothing that int4 rounds and is no language model: both named, nothing written."""
    student, examples = case("mlp")
    wanted = [("onnx", "fp32"), ("onnx", "int4"), ("huggingface", "fp32")]
    with pytest.raises(UsageError, match=r"onnx int4: .*Use int8\. huggingface fp32: .*Nothing was written"):
        export_several(student, examples, tmp_path, wanted, progress=False)
    assert list(tmp_path.iterdir()) == []
    made = export_several(
        student, examples, tmp_path, wanted, skip_unsupported=True, progress=False, measure_memory=False
    )
    assert [artifact.precision for artifact in made.artifacts] == ["fp32"]
    assert set(made.skipped) == {"onnx int4", "huggingface fp32"}
    assert not made.failures


def test_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    """A file that is not the student, and a library that breaks: both named, the third is made."""
    student, examples = case("mlp")

    def broken(*_):
        raise RuntimeError("the library\nfell over")

    def other(student, tensors, calibration, path, precision):
        good = TARGETS["onnx"].write(student, tensors, calibration, path, "fp32")
        model = onnx.load(good.path)
        weight = [item for item in model.graph.initializer if len(item.dims) == 2][-1]
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        onnx.save(model, good.path)
        return good

    monkeypatch.setitem(TARGETS, "broken", Target(broken, ("fp32",)))
    monkeypatch.setitem(TARGETS, "other", Target(other, ("fp32",)))
    wanted = [("broken", "fp32"), ("other", "fp32"), ("onnx", "fp32")]
    made = export_several(student, examples, tmp_path, wanted, progress=False, measure_memory=False)
    assert [artifact.target for artifact in made.artifacts] == ["onnx"]
    assert made.failures["broken fp32"] == "RuntimeError: the library fell over"
    assert "row-" in made.failures["other fp32"]
    assert json.loads((tmp_path / "other-fp32" / "verify.json").read_text())["passed"] is False


def test_an_exporter_says_its_versions(tmp_path, monkeypatch):
    def silent(*arguments):
        written = TARGETS["onnx"].write(*arguments)
        return Written(written.path, written.open)

    monkeypatch.setitem(TARGETS, "silent", Target(silent, ("fp32",)))
    with pytest.raises(UsageError, match="versions"):
        quick(*case("mlp"), tmp_path, "silent")


@pytest.mark.slow
def test_memory_is_of_one_answer_in_a_process_of_its_own(tmp_path):
    """A network with 40 MB of weights takes at least these, and not the hundreds of MB that PyTorch itself is."""
    net = nn.Sequential(nn.Linear(16, 100_000), nn.ReLU(), nn.Linear(100_000, 84))
    made = export(Student(net.eval()), Tensors(torch.randn(3, 16)), tmp_path, progress=False)
    memory = made.verify["memory"]
    assert memory["how"].startswith("most resident")
    assert 40e6 < memory["peak_bytes"] < 200e6


@pytest.mark.slow
def test_memory_that_cannot_be_measured_is_null_with_its_reason(tmp_path, monkeypatch):
    def hidden(student, tensors, calibration, path, precision):
        written = TARGETS["onnx"].write(student, tensors, calibration, path, precision)
        return Written(written.path, lambda path: open_model(path), VERSIONS)

    monkeypatch.setitem(TARGETS, "hidden", Target(hidden, ("fp32",)))
    memory = export(*case("mlp"), tmp_path, "hidden", progress=False).verify["memory"]
    assert memory["peak_bytes"] is None
    assert "lambda" in memory["how"]


@pytest.mark.parametrize("precision", ["int8", "int8_static"])
def test_int8_weights_use_seven_bits(precision, tmp_path):
    """On AVX2 without VNNI two products of 8 full bits do not fit their sum of 16; one file runs everywhere."""
    made = quick(*case("cnn"), tmp_path, precision=precision)
    model = onnx.load(made.path)
    weights = [numpy_helper.to_array(item) for item in model.graph.initializer]
    rounded = [array for array in weights if array.dtype == "int8" and array.ndim > 1]
    assert rounded
    assert all(abs(array.astype(int)).max() <= 64 for array in rounded)


@pytest.mark.slow
def test_the_ways_of_int8_can_be_asked_for(tmp_path):
    student, examples = case("attends")
    for precision, method in (("int8_static", "static"), ("int8_dynamic", "dynamic"), ("int4", "weights")):
        loose = Tolerance(None, 0.5, None, None)
        made = quick(student, examples, tmp_path, precision=precision, tolerance=loose)
        assert made.verify["quantisation"]["method"] == method
    assert quick(student, examples, tmp_path, precision="fp16").bytes < 0.75 * quick(student, examples, tmp_path).bytes


def test_the_largest_error_of_a_dimension_by_hand():
    """Rows (0, 0), (2, 10) answered (0.3, 0), (2, 9.5): 0.3 of 2 is 15 %, 0.5 of 10 is 5 %."""
    ours = torch.tensor([[0.0, 0.0], [2.0, 10.0]]).double()
    theirs = torch.tensor([[0.3, 0.0], [2.0, 9.5]]).double()
    whole = by_dimension(ours, theirs, ["a", "b"], None)
    rows = by_dimension(ours[1:], theirs[1:], ["b"], by_dimension(ours[:1], theirs[:1], ["a"], None))
    for found in (whole, rows):
        torch.testing.assert_close(found.relative, torch.tensor([0.15, 0.05]).double())
        assert found.describe()["dimension"] == 0
        assert found.describe()["example"] == "a"
        assert not found.beyond(0.16)
        assert re.search(r"dimension 0 .* off by 0\.3 at a .* 15% of the range 0 to 2", found.beyond(0.1)[0])


def test_a_dimension_that_hardly_moves_is_not_divided_by_nothing():
    """Of ranges 2 and 0, an error of 0.001 in the constant one counts as 5 % of a hundredth of 2; none counts 0."""
    ours = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).double()
    theirs = ours + torch.tensor([0.0, 0.001]).double()
    torch.testing.assert_close(by_dimension(ours, theirs, "ab", None).relative, torch.tensor([0.0, 0.05]).double())
    assert by_dimension(ours * 0, ours * 0, "ab", None).relative.tolist() == [0.0, 0.0]
    assert by_dimension(ours[:0], ours[:0], "", None) is None


@functools.cache
def policy():
    """(student, examples): a real tanh policy, 17 observations to 6 actions, fitted to a wider one on 600 states.

    A few states lie far out, as a robot's do when it is pushed.
    """
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 6), nn.Tanh())
    x = torch.randn(600, 17) * (0.7 * torch.randn(600, 1)).exp()
    with torch.no_grad():
        actions = expert(x)
    net = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6), nn.Tanh())
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        (net(x) - actions).square().mean().backward()
        optimiser.step()
    return Student(net.eval(), answers="values"), Tensors(x, actions)


def test_a_mean_hides_what_the_largest_error_shows(tmp_path):
    """deploy trap 11: static int8 of a policy keeps its mean squared error, and one action is far off its range."""
    student, examples = policy()
    before = Tolerance(None, 0.97, error=0.1, quality=0.02)  # int8's, but for the largest error
    verify = quick(student, examples, tmp_path, precision="int8_static", tolerance=before).verify
    worst = verify["largest_value"]
    assert worst["relative"] > 0.15
    assert worst["error"] == worst["errors"][worst["dimension"]]
    with pytest.raises(ParityError, match=rf"dimension {worst['dimension']} .* at {worst['example']} .*allowed 10%"):
        quick(student, examples, tmp_path, precision="int8_static")
    assert quick(student, examples, tmp_path).verify["largest_value"]["relative"] < 1e-4


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """A finished run of the digits, and its folder as the current one."""
    for name in ("digits.py", "digits.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    done("run", "digits.yaml", *SMALL, "--quiet", "--set", "export=[{target: onnx}]")
    torch.set_num_threads(threads)
    return tmp_path / "runs" / "digits"


@pytest.mark.slow
def test_export_of_a_finished_run_is_sealed_anew(finished, capsys):
    """Table, report, passport and manifest have the new artefact; what cannot be had ends it with nothing changed."""
    before = (finished / "manifest.json").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["export", str(finished), "--to", "onnx,huggingface", "--quiet"])
    assert caught.value.code == 2
    assert "huggingface fp32: huggingface takes a language model" in capsys.readouterr().err
    assert (finished / "manifest.json").read_bytes() == before
    done("export", str(finished), "--to", "onnx", "--precision", "fp32,int8", "--quiet")
    said = capsys.readouterr().out
    assert re.search(r"onnx +int8 +[\d.]+ kB .* %  +accuracy 0\.\d+ \(0\.\d+–0\.\d+\) .*[µm]s .*[kM]B", said), said
    assert "onnx int8 is " in said
    assert "onnxruntime 1." in said
    done("verify", str(finished))
    passport = json.loads((finished / "passport.json").read_text())
    (rounded,) = [entry for entry in passport["exports"] if entry["precision"] == "int8"]
    verify = json.loads((finished / "exports/onnx-int8/verify.json").read_text())
    assert rounded["memory_bytes"] == verify["memory"]["peak_bytes"]
    assert rounded["versions"] == verify["versions"]
    assert rounded["quantisation"] == verify["quantisation"]["method"]
    assert verify["quantisation"]["why"] in (finished / "report/report.html").read_text()
    assert "int8" not in yaml.safe_load((finished / "recipe.yaml").read_text())["export"][0].values()


@pytest.mark.slow
def test_one_artefact_that_fails_ends_with_exit_code_1_and_a_sealed_run(finished, capsys, monkeypatch):
    """The others are made, the failed one is listed as such, and the folder verifies."""

    def wrong(student, tensors, calibration, path, precision):
        net = mlp(10).eval()
        first = Student(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), net))
        return TARGETS["onnx"].write(first, tensors, calibration, path, "fp32")

    monkeypatch.setitem(TARGETS, "wrong", Target(wrong, ("fp32",)))
    with pytest.raises(SystemExit) as caught:
        main(["export", str(finished), "--to", "wrong,onnx", "--quiet"])
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED: wrong fp32" in said
    assert "onnx" in said.splitlines()[1]
    done("verify", str(finished))
    assert "FAILED" in (finished / "report/report.html").read_text()

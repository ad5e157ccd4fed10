"""What runs in an environment of its own answers by messages, has our torch, and never takes us with it."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.errors import UsageError
from stillroom.exporting.apart import Apart, Runtime, environment, names, process
from stillroom.exporting.apart.__main__ import main
from stillroom.exporting.apart.process import ApartError

SCRIPT = Path(__file__).with_name("apart_script.py")


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """One environment, 'small', of torch and a wheel that lies here, so that pip needs no network."""
    info = "tinything-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tinything-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinything.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / "small.txt").write_text("# 1 MB\ntinything==1.0\n")
    monkeypatch.setattr(process, "PINS", tmp_path / "pins")
    for name, value in (
        ("STILLROOM_APART", tmp_path / "made"), ("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", tmp_path),
        ("PIP_CONFIG_FILE", "/dev/null"),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return tmp_path / "pins" / "small.txt"


@pytest.fixture
def here(monkeypatch):
    """The script runs in this environment instead of one of its own."""
    monkeypatch.setattr(process, "environment", lambda name: Path(sys.executable))


def test_torch_is_lent_and_nothing_else_of_ours_is_there(pins, tmp_path, capsys):
    """The same torch on both sides. The first use says how large it is, the second nothing; torch gone, made anew."""
    python = environment("small")
    assert "made once, for 1 packages (1 MB)" in capsys.readouterr().err.replace("\n", " ")
    place = python.parent.parent
    (site,) = place.glob("lib/python*/site-packages")
    assert (site / "torch").resolve() == Path(torch.__file__).parent.resolve()
    assert not (site / "numpy").exists()
    assert environment("small") == python
    assert capsys.readouterr().err == ""
    (site / "torch").unlink()
    (site / "torch").symlink_to(tmp_path / "gone")
    environment("small")
    assert (site / "torch" / "__init__.py").exists()


def test_what_cannot_be_made_says_the_command(pins, capsys):
    pins.write_text("tinything==9.9\n")
    with pytest.raises(UsageError, match=r"could not be made: .*python -m stillroom.exporting.apart small"):
        environment("small")
    assert main(["smallest"]) == 2
    assert "did you mean 'small'" in capsys.readouterr().err


def test_every_pin_is_exact():
    """What ships: each line one version, so that an environment made next year is the one that was tested."""
    for name in names():
        first, *lines = (process.PINS / f"{name}.txt").read_text().splitlines()
        assert first.startswith("# ")
        assert lines == sorted(lines, key=str.lower)
        assert all(line.count("==") == 1 and not line.startswith("torch==") for line in lines)


def test_messages_carry_json_and_arrays(here):
    """And whatever the library prints to stdout does not come between them."""
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "b": np.array([True]),
        "c": np.zeros((0, 2), np.float32),
    }
    with Apart("small", SCRIPT) as apart:
        said, back = apart.call("double", {"text": "ü", "list": [1, None]}, arrays)
        assert said["seen"] == {"text": "ü", "list": [1, None]}
        assert back["a"].tolist() == [[0, 6], [2, 8], [4, 10]]
        assert back["c"].shape == (0, 2)
        assert "a library that prints" in apart.last_words()


def test_an_error_inside_is_an_error_here_and_the_process_goes_on(here):
    with Apart("small", SCRIPT) as apart:
        with pytest.raises(ApartError, match="ValueError: no such operator: aten.gru"):
            apart.call("fails", {})
        assert apart.call("double", {})[0]["seen"] == {}


def test_a_crash_inside_is_an_error_here(here):
    with Apart("small", SCRIPT) as apart:
        with pytest.raises(ApartError, match=r"'small' ended \(7\): a last word"):
            apart.call("dies", {})
        with pytest.raises(ApartError, match=r"ended \(7\)"):
            apart.call("double", {})


def test_the_process_ends_with_its_object(here):
    apart = Apart("small", SCRIPT)
    running = apart._process
    assert running.poll() is None
    del apart
    assert running.poll() == 0


def test_a_runtime_answers_one_example_after_the_other(here):
    run = Runtime("small", SCRIPT, {"bias": 1.0})
    x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    assert run((x,)).tolist() == [[4.0], [13.0]]
    assert len(run.seconds((x,), 7)) == 7
    assert run.memory((x,))["peak_bytes"] >= 0


def test_a_runtime_refuses_other_shapes_and_counts(here):
    run = Runtime("small", SCRIPT, {"bias": 1.0})
    with pytest.raises(UsageError, match=r"takes x of shape \[1, 3\] and no other; this is \[2, 4\].*use onnx"):
        run((torch.zeros(2, 4),))
    with pytest.raises(UsageError, match="takes 1 inputs, but the adapter gives 2"):
        run((torch.zeros(1, 3), torch.zeros(1, 3)))

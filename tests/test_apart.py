"""An environment apart: made once from pins, with nothing of ours in it; scripts take files and leave files."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from stillroom import apart
from stillroom.errors import CheckError, MissingFileError, UsageError


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """Two tiny wheels in a folder of the test: pip installs them without any network."""
    monkeypatch.setenv("STILLROOM_APART", str(tmp_path / "apart"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for version in ("1.0", "2.0"):
        info = f"tinything-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"tinything-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tinything.py", f"version = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tinything\nVersion: {version}\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    path = tmp_path / "tiny.txt"
    path.write_text("tinything==1.0  # one\n\n")
    return path


def test_an_environment_is_made_once_and_runs_a_script(pins, tmp_path, capfd):
    """The script sees the pinned package, neither torch nor stillroom, and files are all that passes."""
    python = apart.python_apart(pins, progress=False)
    script = tmp_path / "say.py"
    script.write_text(
        "import importlib.util as u, json, sys, tinything\n"
        "print('starts')\n"
        "found = [n for n in ('torch', 'stillroom') if u.find_spec(n)]\n"
        "text = open(sys.argv[1]).read()\n"
        "json.dump([tinything.version, found, text], open(sys.argv[2], 'w'))\n"
    )
    (tmp_path / "in.txt").write_text("asked")
    heard = []
    apart.run_apart(python, script, [tmp_path / "in.txt", tmp_path / "out.json"], line=heard.append)
    assert json.loads((tmp_path / "out.json").read_text()) == ["1.0", [], "asked"]
    assert heard == ["starts"]
    made = (python.parents[1] / "ready.json").stat().st_mtime_ns
    assert apart.python_apart(pins, progress=False) == python
    assert (python.parents[1] / "ready.json").stat().st_mtime_ns == made
    pins.write_text("tinything==2.0\n")
    assert apart.folder_of(pins) != python.parents[1]
    # interrupted before the end: made again
    (python.parents[1] / "ready.json").unlink()
    (python.parents[1] / "left-over").touch()
    pins.write_text("tinything==1.0\n")
    apart.python_apart(pins, progress=False)
    assert not (python.parents[1] / "left-over").exists()


def test_what_cannot_be_made_says_what_pip_said(pins):
    pins.write_text("tinything==9.9\n")
    with pytest.raises(UsageError, match=r"tiny\.txt could not be made.*tinything==9\.9"):
        apart.python_apart(pins, progress=False)
    assert not (apart.folder_of(pins) / "ready.json").exists()


@pytest.mark.parametrize("line", ["tinything>=1.0", "tinything", "git+https://x/y", "tinything==1.0; x", "-e .", ""])
def test_only_pins_are_taken(tmp_path, line):
    path = tmp_path / "loose.txt"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match="no pin|names no packages"):
        apart.pinned(path)


def test_a_script_that_fails_is_heard(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit('the molecule of row 3 is none')\n")
    with pytest.raises(CheckError, match=r"fails\.py, run apart, failed \(exit code 1\): the molecule of row 3"):
        apart.run_apart(Path(sys.executable), script)
    with pytest.raises(MissingFileError, match="no script"):
        apart.run_apart(Path(sys.executable), tmp_path / "none.py")


def test_a_script_is_asked_again_and_again(tmp_path):
    """One process answers all; when it ends, its last words are heard, and the next question starts another."""
    script = tmp_path / "answers.py"
    script.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked is None:\n"
        "        sys.exit('no molecule')\n"
        "    print('noise', file=sys.stderr)\n"
        "    print(json.dumps([os.getpid(), asked * 2]), flush=True)\n"
    )
    asked = apart.Asked(Path(sys.executable), script)
    first, again = asked.ask(4), asked.ask("ab")
    assert (first[1], again[1]) == (8, "abab")
    assert first[0] == again[0] != os.getpid()
    with pytest.raises(CheckError, match=r"answers\.py, run apart, did not answer: .*no molecule"):
        asked.ask(None)
    assert asked.ask(1)[0] != first[0]
    asked.close()
    with pytest.raises(MissingFileError, match="no script"):
        apart.Asked(Path(sys.executable), tmp_path / "none.py").ask(1)

"""'Distil a neural policy': the commands of the page, with fewer questions and steps."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("pybullet_data", reason="needs the extra 'policies'")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "policies.md").read_text()
LESS = {
    "data.driving.questions": 200,
    "data.driving.rounds": 2,
    "data.driving.steps": 20,
    "data.driving.unseen": 2,
    "fit.steps": 40,
}


def commands():
    return [shlex.split(line, comments=True) for line in re.findall(r"^    (stillroom .*)$", PAGE, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    from stillroom.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert [words[1] for words in commands()] == ["run", "replay"]
    for _, verb, *words in commands():
        less = [part for name, value in LESS.items() for part in ("--set", f"{name}={value}")]
        with pytest.raises(SystemExit) as ended:
            main([verb, *words, *(["--quiet", *less] if verb == "run" else ["--count", "300"])])
        assert ended.value.code == 0
    said = capsys.readouterr().out
    for answered_by in ("c fp32", "onnx fp32", "student", "teacher"):
        assert answered_by in said, said
    assert "16.5 ms" in said

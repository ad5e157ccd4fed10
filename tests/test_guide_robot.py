"""'Put it on a robot': the commands and the code of the page, as they stand there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="needs the extra 'control'")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robot.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_every_way_of_the_page_is_one():
    from stillroom.control import WAYS

    assert re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE) == ["way", *WAYS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium", "ignore::DeprecationWarning")
def test_the_page_leads_to_a_running_artefact(tmp_path, monkeypatch, capsys):
    """The commands of the page, then its code: the artefact drives, with stillroom and without."""
    from stillroom.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    ours = [words[1:] for words in commands if words[0] == "stillroom"]
    assert [words[0] for words in ours] == ["run"]
    for words in ours:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--quiet"])
        assert ended.value.code == 0
    page = (tmp_path / "runs" / "first_try" / "report" / "report.html").read_text()
    assert "In closed loop" in page
    assert "data:image/png;base64," in page
    capsys.readouterr()
    exec(compile("\n".join(blocks("python")), "robot.md", "exec"), {"__name__": "robot"})
    said = capsys.readouterr().out
    assert re.search(r"\d+% of 3 new starts", said)
    assert "done" in said

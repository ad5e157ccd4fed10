"""What the documents show is run: every Python block of a page, in order, in an empty folder."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_pages_run(name, tmp_path, monkeypatch):
    """README's names (teacher, small_net, train, pool, labelled, test) are those of examples/digits.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    page = ROOT / name
    source = "\n".join(blocks(page))
    # a real file, so that functions defined in a page can be named and found again
    module = tmp_path / "page.py"
    module.write_text((SETUP if name == "README.md" else "") + source)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("page", None)
    torch.manual_seed(0)
    __import__("page")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"recording/manifest.json", "student/model.safetensors"} <= left
    assert name != "README.md" or "exports/onnx-int8/verify.json" in left


SETUP = """
import digits, stillroom as sr
from stillroom.data.splits import label_budget
from stillroom.students.architectures import mlp
train, test = label_budget(digits.digits("train"), 100, seed=0), digits.digits("test")
teacher = digits.teacher(train, steps=150)
"""


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_tests_exist():
    """docs/peers.md names a test for every defect; its tables are made of nothing else."""
    page = (ROOT / "docs" / "peers.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) >= len([line for line in page.splitlines() if line.startswith("| ")]) - page.count("| defect |")
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"\ndef {name}(" in path.read_text(), f"docs/peers.md: {file}::{name}"

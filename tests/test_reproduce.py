"""stillroom reproduce: real reruns in fresh processes, the same and forced apart, each with its own reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stillroom import provenance
from stillroom.digests import file_digest
from stillroom.errors import CheckError, UsageError
from stillroom.provenance import claims
from stillroom.provenance.reproduce import check_level, compare

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = {
    "name": "again",
    "seeds": [0, 1],
    "threads": 1,
    "data": {
        "train": {"use": "digits.py:digits", "split": "train"},
        "test": {"use": "digits.py:digits", "split": "test"},
        "labels": {"count": 100, "seed": 0},
    },
    "teacher": {"use": "digits.py:teacher", "steps": 20},
    "student": {"use": "mlp", "inputs": 64, "hidden": [8]},
    "alone": None,
    "fit": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2},
    "evaluate": {"replicates": 50, "metrics": ["accuracy"]},
}


def process(here: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess:
    """The command line in a fresh process; ``before`` is what is changed in it first."""
    code = f"import sys; {before}\nfrom stillroom.cli import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=here, capture_output=True, text=True)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("reproduce")
    shutil.copy(EXAMPLES / "digits.py", place)
    (place / "again.yaml").write_text(yaml.safe_dump(RECIPE))
    done = process(place, "run", "again.yaml", "--quiet")
    assert done.returncode == 0, done.stderr
    return place


def test_two_fresh_processes_reach_the_same_weights(here):
    done = process(here, "reproduce", "runs/again", "--quiet", "--at-least", "R3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "R3: the same weights, bit for bit" in done.stdout
    assert "different" not in done.stdout
    run = json.loads((here / "runs/again/passport.json").read_text())["run"]
    assert len(set(run["loss_sha256"])) == len(set(run["order_sha256"])) == 2  # one of each seed
    assert provenance.verify(here / "runs/again-again") == []


ORDER = "import stillroom.plan as p; import torch; p._order = lambda seed, epoch, rows: torch.arange(rows)"
PACKAGE = (
    "import stillroom.environment as e; import stillroom.students.architectures as a; old = e._version;"
    "e._version = lambda name: '2.0' if name == 'numpy' else old(name);"
    "import torch; first = torch.manual_seed; torch.manual_seed = lambda seed: first(seed + 1)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "before", "reason"),
    [
        (("--set", "seeds=[2, 1]"), "", "recipe key 'seeds' ([0, 1] and [2, 1])"),
        (("--set", "threads=2"), "", "thread count (1 and 2)"),
        ((), ORDER, "data order (["),
        ((), PACKAGE, "package numpy ("),
    ],
    ids=["seed", "threads", "order", "package"],
)
def test_what_differs_is_named(here, changed, before, reason, request):
    other = f"runs/{request.node.callspec.id}"
    done = process(here, "run", "again.yaml", "--folder", other, "--quiet", *changed, before=before)
    assert done.returncode == 0, done.stderr
    result = compare(here / "runs/again", here / other)
    assert any(found.startswith(reason) for found in result.reasons), str(result)
    if request.node.callspec.id == "threads":  # another count may happen to agree, but is another recipe
        assert result.level == "none"
        return
    assert result.level in ("R1", "R0", "none")
    assert result.partings
    assert "losses differ from the first step on; at step 0 " in str(result) or "losses differ after step" in str(
        result
    )
    said = process(here, "reproduce", "runs/again", "--against", other, "--at-least", "R2")
    assert said.returncode == 1
    assert reason.split(" (")[0] in said.stdout.replace("\n", " ")


@pytest.mark.slow
def test_a_reproduction_is_claimed_under_ones_key(here, tmp_path):
    shutil.copytree(here / "runs/again", tmp_path / "run")
    assert process(tmp_path, "keygen", "mine.pem").returncode == 0
    done = process(tmp_path, "reproduce", "run", "--against", str(here / "runs/again"), "--key", "mine.pem")
    assert done.returncode == 0, done.stderr
    (claim,) = claims.read(tmp_path / "run")
    assert claim.kind == "reproduction"
    assert claim.body["level"] == "R3"
    assert claim.body["original"] == file_digest(tmp_path / "run/passport.json")
    assert provenance.verify(tmp_path / "run") == []


def test_a_run_that_was_changed_is_not_reproduced(here, tmp_path):
    shutil.copytree(here / "runs/again", tmp_path / "run")
    with (tmp_path / "run/student/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckError, match=r"is not as it was sealed.*student/model.safetensors"):
        provenance.reproduce.reproduce(tmp_path / "run", tmp_path / "again", here)


@pytest.mark.slow
def test_a_rerun_that_fails_says_why(here, tmp_path):
    """The recipe's own file is not where it was looked for."""
    done = process(tmp_path, "reproduce", str(here / "runs/again"), "--quiet", "--folder", "again")
    assert done.returncode == 1
    assert "ended with exit code 2: error: digits.py does not exist" in done.stderr


def test_the_run_itself_is_no_rerun(here):
    done = process(here, "reproduce", "runs/again", "--folder", "runs/again")
    assert done.returncode == 2
    assert "is the run itself" in done.stderr


def test_an_unknown_level():
    with pytest.raises(UsageError, match="level 'R9' is unknown: choose R3, R2, R1, R0"):
        check_level("R9")

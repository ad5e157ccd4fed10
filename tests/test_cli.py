"""The command line on real input: one run from recipe to verified folder, and one clear line for whatever is wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from stillroom.cli import app, main

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ("--set", "seeds=[0]", "--set", "fit.epochs=2", "--set", "teacher.steps=20", "--set", "evaluate.replicates=50")
COMMANDS = ["run", "doctor", "gate", "record", "fit", "evaluate", "export", "report", "verify", "reproduce", "schema",
            "keygen", "sign"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """A recipe may set torch's threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder with the digits recipe."""
    shutil.copy(EXAMPLES / "digits.py", tmp_path)
    shutil.copy(EXAMPLES / "digits.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stillroom(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "stillroom.cli", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(capsys, *arguments: str) -> str:
    """The one line that a command refuses with; exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")  # after it nothing, before it only progress bars
    return said.splitlines()[-1]


def done(*arguments: str) -> None:
    """A command that succeeds, in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 0


def edited(here: Path, **changes) -> str:
    """The digits recipe with some keys replaced."""
    content = yaml.safe_load((here / "digits.yaml").read_text())
    (here / "edited.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return "edited.yaml"


def test_a_run_from_recipe_to_verified_folder(here):
    """All stages, then every stage's command again on what lies there, then a flipped byte that verify names."""
    code, out, err = stillroom("run", "digits.yaml", *SMALL)
    assert code == 0, err
    assert "student is better than" in out or "not shown" in out or "WORSE" in out
    assert "stillroom verify runs/digits" in out
    run = here / "runs" / "digits"
    for name in ("recipe.yaml", "recording", "student", "alone", "report/report.html", "exports/onnx-int8/verify.json",
                 "passport.json", "README.md", "manifest.json"):  # fmt: skip
        assert (run / name).exists(), name
    assert stillroom("verify", "runs/digits")[0] == 0
    weights = run / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, _ = stillroom("verify", "runs/digits")
    assert code == 1
    assert "student/model.safetensors" in out


@pytest.mark.slow  # a dozen commands, each a fresh process
@pytest.mark.timeout(1500)
def test_the_examples_of_the_help_work(here):
    """Each command's example, as its help prints it: the stages alone, then all, which finds them done."""
    (here / "examples").mkdir()
    for name in ("digits.py", "digits.yaml"):
        (here / name).rename(here / "examples" / name)
    weights = here / "runs" / "digits" / "student" / "model.safetensors"
    trained = None
    stages = ["gate", "record", "fit", "evaluate", "export", "run", "doctor", "report", "keygen", "sign", "verify"]
    for command in (*stages, "schema"):
        example = help_example(command)
        assert example[0] == command
        code, _, err = stillroom(*example, *(SMALL if "examples/digits.yaml" in example else ()))
        assert code == 0, f"{example}: {err}"
        if weights.exists():
            trained = trained or weights.read_bytes()
            assert weights.read_bytes() == trained
    assert trained is not None
    assert stillroom("run", "runs/digits", "--quiet")[0] == 0


def test_doctor_checks_and_writes_nothing(here):
    code, out, err = stillroom("doctor", "digits.yaml", "--set", "teacher.steps=60")
    assert code == 0, err
    assert "gradient reaches the student only" in out
    assert "estimate:" in out
    assert not (here / "runs").exists()


def test_doctor_fails_on_a_teacher_that_guesses(here):
    """A teacher whose weights were not loaded is found out before it teaches: exit code 1 and what to do."""
    (here / "blind.py").write_text(
        "import stillroom as sr\nfrom stillroom.students.architectures import small_cnn\n"
        "def teacher(examples):\n    net = small_cnn(1, 10, size=8)\n"
        "    return sr.from_network(net, classes=examples.classes)\n"
    )
    code, out, _ = stillroom("doctor", edited(here, teacher={"use": "blind.py:teacher"}))
    assert code == 1
    assert "FAIL" in out
    assert "weights are loaded" in re.sub(r"\s+", " ", out)


def help_example(command: str) -> list[str]:
    """The example that a command's help ends with."""
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).output
    example = re.search(r"Example:\s+stillroom ([^\n>]+?)\s*(?:>|\n)", text)
    assert example is not None, text
    return example.group(1).split()


def test_every_command_has_an_example():
    """So that the test above runs all of them; some have tests of their own (test_serving, test_cascade, ...)."""
    commands = [command.callback.__name__ for command in app.registered_commands]
    assert sorted(commands) == sorted([*COMMANDS, "serve", "cascade", "replay"])


def test_bad_recipes_are_one_line(here, capsys):
    assert "did you mean 'teacher'" in refused(capsys, "run", edited(here, techer={}))
    assert "absent.yaml does not exist" in refused(capsys, "run", "absent.yaml")
    line = refused(capsys, "run", edited(here, objective={"use": "soft_targts"}))
    assert "unknown objective 'soft_targts'; did you mean 'soft_targets'" in line
    assert "did you mean 'learning_rate'" in refused(capsys, "run", edited(here, fit={"learning_rat": 1e-3}))
    assert "takes no 'widht'" in refused(capsys, "run", edited(here, student={"use": "mlp", "widht": 3}))
    assert "absent.py does not exist" in refused(capsys, "run", edited(here, teacher={"use": "absent.py:teacher"}))
    assert not (here / "runs" / "digits" / "recording").exists()


def test_a_function_is_an_objective_and_several_teachers_are_one(here):
    """A recipe names an objective function of the user's own and an ensemble of teachers by name."""
    (here / "mine.py").write_text(
        "import stillroom as sr\n"
        "def sure(student, teacher, batch):\n"
        "    (values,) = sr.SoftTargets()(student, teacher, batch).values()\n"
        "    return {'sure': values * (teacher.logits.values.softmax(-1).amax(-1) > 0.5)}\n"
        "def teacher(examples, width):\n"
        "    net = sr.Student.make('stillroom.students.architectures:small_cnn',\n"
        "        {'channels': 1, 'classes': 10, 'width': width, 'size': 8})\n"
        "    plan = sr.Plan(steps=30, learning_rate=3e-3)\n"
        "    made = sr.fit(net, None, examples.labelled(), sr.HardLabels(), plan=plan, progress=False)\n"
        "    return sr.from_network(made.net, classes=examples.classes, name=f'width {width}')\n"
    )
    members = {"a": {"use": "mine.py:teacher", "width": 8}, "b": {"use": "mine.py:teacher", "width": 12}}
    recipe = edited(
        here,
        teacher={"use": "ensemble", "members": members, "weights": {"a": 1, "b": 2}},
        objective={"use": "mine.py:sure"},
        evaluate={"replicates": 20, "metrics": ["accuracy", "agreement"]},
        baseline=None,
        seeds=[0],
        export=[],
    )
    done("run", recipe, "--quiet", "--set", "fit.epochs=2")
    passport = json.loads((here / "runs" / "digits" / "passport.json").read_text())
    assert "width 8" in json.dumps(passport["teachers"])
    assert "width 12" in json.dumps(passport["teachers"])


def test_more_kept_entries_than_classes(here, capsys):
    line = refused(capsys, "record", edited(here, record={"keep": [{"use": "top_k", "k": 11}], "views": 1}))
    assert "11" in line
    assert "10" in line


def test_a_nan_in_the_teachers_answers_names_the_example(here, capsys):
    (here / "odd.py").write_text(
        "import torch, stillroom as sr\n"
        "def teacher(examples):\n"
        "    def answer(batch):\n"
        "        logits = torch.zeros(len(batch), 10)\n"
        "        logits[[i for i, name in enumerate(batch.ids) if name == 'digit-0007']] = float('nan')\n"
        "        return sr.Signal(logits=sr.Dense(logits))\n"
        "    return answer\n"
    )
    assert "digit-0007" in refused(capsys, "record", edited(here, teacher={"use": "odd.py:teacher"}))


def test_another_recipe_in_the_folder_is_refused(here, capsys):
    done("record", "digits.yaml", *SMALL, "--quiet")
    before = sorted((p, p.stat().st_mtime_ns) for p in (here / "runs").rglob("*") if p.is_file())
    line = refused(capsys, "record", "digits.yaml", *SMALL, "--set", "data.labels.count=90")
    assert "another recipe (different: data)" in line
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (here / "runs").rglob("*") if p.is_file())


def test_quiet_goes_for_the_teachers_training_too(here, capsys):
    done("record", "digits.yaml", *SMALL, "--quiet")
    assert "fit" not in capsys.readouterr().err
    assert "progress" not in (here / "runs" / "digits" / "recipe.yaml").read_text()


def test_a_truncated_shard_names_itself(here, capsys):
    done("record", "digits.yaml", *SMALL, "--quiet")
    shard = next((here / "runs" / "digits" / "recording" / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused(capsys, "fit", "digits.yaml", *SMALL)


def test_labels_outside_the_classes_name_the_example(here, capsys):
    (here / "wrong.py").write_text(
        "import dataclasses, torch, digits\n"
        "def data(split):\n"
        "    import stillroom as sr\n"
        "    t = digits.digits(split)\n"
        "    labels = t.labels.clone(); labels[3] = 12\n"
        "    return sr.Table(t.columns, t.ids, labels, t.classes)\n"
    )
    sys.path.insert(0, str(here))
    try:
        data = {"train": {"use": "wrong.py:data", "split": "train"}, "test": {"use": "wrong.py:data", "split": "test"}}
        line = refused(capsys, "run", edited(here, data=data, record={}))
    finally:
        sys.path.remove(str(here))
    assert "digit-0003" in line
    assert "12" in line


def test_verify_needs_a_sealed_run(here, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "nowhere"])
    assert caught.value.code in (1, 2)
    assert "nowhere" in "".join(capsys.readouterr())


def test_brackets_in_a_name_are_text(capsys):
    """A folder called [/b] is no markup: rich would raise, or leave the name out."""
    from stillroom.narration import say

    say("runs/[bold]digits[/b]")
    assert capsys.readouterr().out == "runs/[bold]digits[/b]\n"

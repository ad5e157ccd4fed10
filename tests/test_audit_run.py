"""Audits of a real run, from recipe to result: its student, its control, its draws, and a student of its student."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from stillroom import provenance
from stillroom.audits.questions import declared_questions, fresh_questions, log_probs_of
from stillroom.audits.teacher import Settings, audit_teachers
from stillroom.audits.transcript import Settings as Transcript
from stillroom.audits.transcript import audit_transcript
from stillroom.cli import main
from stillroom.data import Table
from stillroom.errors import FolderError, PairError, SignalError, UsageError
from stillroom.provenance import claims
from stillroom.provenance.audit import COMPARATIVE
from stillroom.types import Dense, Signal

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "seeds": [0],
    "data.labels.count": 300,
    "teacher.steps": 40,
    "fit.epochs": 6,
    "evaluate.replicates": 10,
    "export": [],
    "record.views": 1,
    "baseline": None,
}
QUICK = Settings(decoys=19, rows=300, positives=3)


def done(*arguments, code=0):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == code


def run(folder, **changes):
    """The digits recipe, small, in ``folder``."""
    given = [f"{name}={json.dumps(value)}" for name, value in {**SMALL, **changes}.items()]
    sets = [part for one in given for part in ("--set", one)]
    done("run", "digits.yaml", "--folder", folder, "--quiet", *sets)
    return Path(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder with the digits run, made once; tests work in it."""
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("audit")
    for name in ("digits.py", "digits.yaml"):
        shutil.copy(EXAMPLES / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("runs/digits")
        yield folder
    torch.set_num_threads(before)


def test_a_run_is_audited_end_to_end(place, capsys):
    """Its student is found; a student of another teacher of the recipe is not, among the same decoys.

    (That other teacher is one of the decoys, so it ranks above the candidate whatever chance does.)
    """
    code = ["--decoys", 19, "--rows", 300, "--positives", 3, "--quiet"]
    done("audit", "teacher", "runs/digits", *code)
    said = capsys.readouterr().out
    assert said.startswith("evidence that digits/student learned from digits teacher: p = 0.0500 (exact, 19 decoys")
    trained = sorted((place / "audits/digits/0/answers").iterdir())
    before = [(path, path.stat().st_mtime_ns) for path in trained]
    assert len(trained) == 19

    seed = json.loads((place / "audits/digits/0/commitment.json").read_text())["seeds"][4]
    run("runs/another", **{"teacher.seed": seed})
    capsys.readouterr()
    done("audit", "teacher", "runs/digits", "--student", "runs/another/student", *code)
    assert capsys.readouterr().out.startswith("no evidence at power ")
    assert [(path, path.stat().st_mtime_ns) for path in trained] == before
    result = json.loads((place / "audits/digits/result-another-student.json").read_text())["results"][0]
    assert result["p"] >= 2 / 20
    assert result["power"]["positives"] == 3
    assert result["power"]["value"] >= 2 / 3
    assert provenance.verify("runs/digits") == []


def test_the_commitment_says_everything_before_the_student_is_asked(place):
    """Inputs, statistic, seeds and recipe lie there although the student could not be opened."""
    shutil.copytree("runs/digits", "runs/damaged")
    weights = Path("runs/damaged/student/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FolderError, match=r"model\.safetensors cannot be read"):
        audit_teachers(["runs/damaged"], "audits/damaged", settings=QUICK, progress=False)
    committed = json.loads(Path("audits/damaged/0/commitment.json").read_text())
    assert committed["inputs"].keys() == {"declared", "fresh", "scored"}
    assert committed["inputs"]["declared"]["rows"] == 300
    assert len(committed["seeds"]) == len(set(committed["seeds"])) == 19
    assert committed["statistic"].startswith("COMB")


def test_another_audit_in_the_folder_is_refused(place):
    audit_teachers(["runs/digits"], "audits/digits", settings=QUICK, progress=False)
    with pytest.raises(FolderError, match="already holds another audit .*mode"):
        audit_teachers(["runs/digits"], "audits/digits", settings=Settings("hard", 19, 300), progress=False)


def test_one_seed_for_student_and_teacher_is_said(place):
    """The order of data follows from the seed: two trainings under one are alike without any learning."""
    shutil.copytree("runs/digits/alone", "same-seed")
    config = json.loads(Path("same-seed/student.json").read_text())
    config["plan"]["seed"] = 100
    Path("same-seed/student.json").write_text(json.dumps(config))
    settings = Settings(decoys=0)
    (found,) = audit_teachers(["runs/digits"], "audits/seed", "same-seed", settings, progress=False)
    assert found.caution.startswith("student and teacher were both trained under seed 100, and the same order of data")
    (other,) = audit_teachers(["runs/digits"], "audits/seed", settings=settings, progress=False)
    assert other.caution is None


def test_the_result_is_a_signed_claim(place, capsys):
    done("keygen", "auditor")
    key = next(path for path in Path().iterdir() if path.name.startswith("auditor") and "pub" not in path.name)
    arguments = ["--decoys", 19, "--rows", 300, "--quiet", "--key", key]
    done("audit", "teacher", "runs/digits", *arguments)
    assert "claim 1 audit" in capsys.readouterr().out
    (claim,) = claims.read("runs/digits")
    assert claim.body["p"] == 0.05
    assert claim.body["inputs"]["commitment"]["sha256"]
    for name in ("claims.jsonl", "claims.head.json"):
        Path("runs/digits", name).unlink()


def test_a_student_of_a_student_has_decoys_too(place):
    """A teacher that is a run's student: decoys are that run's recipe under other seeds."""
    run("runs/second", teacher={"use": "run", "run": "runs/digits"})
    (found,) = audit_teachers(["runs/second"], "audits/second", settings=QUICK, progress=False)
    assert found.rejected
    assert found.decoys == 19


def test_hard_mode_makes_positives_of_labels(place):
    """The control against the teacher by labels alone: its power is measured on students of a decoy's labels."""
    settings = Settings("hard", 19, 300, positives=2)
    (found,) = audit_teachers(
        ["runs/digits"], "audits/hard", student="runs/digits/alone", settings=settings, progress=False
    )
    assert found.likeness.keys() == {"agreement, declared"}
    assert found.rejected or found.power.of == 2


def test_a_teacher_that_is_only_loaded_has_no_p(place, capsys):
    """No parameter ``seed``, no decoys, no p-value; the same where none are asked for."""
    source = Path("digits.py").read_text().replace("teacher(", "made(")
    Path("loaded.py").write_text(
        source
        + "\n\ndef teacher(examples: sr.Table, steps: int = 600) -> sr.Model:\n    return made(examples, None, steps)\n"
    )
    run("runs/loaded", **{"teacher": {"use": "loaded.py:teacher", "steps": 40}})
    capsys.readouterr()
    done("audit", "teacher", "runs/loaded", "--rows", 100, "--quiet")
    said = capsys.readouterr().out
    assert said.strip().endswith(f"evidence: {COMPARATIVE}")
    assert "p =" not in said
    (found,) = audit_teachers(["runs/digits"], "audits/none", settings=Settings(decoys=0), progress=False)
    assert found.p is None


def test_a_teacher_that_is_not_the_recorded_one_is_refused(place):
    """A run whose teacher comes out otherwise here cannot be audited with it."""
    shutil.copytree("runs/digits", "runs/other")
    shutil.rmtree("runs/other/teacher")
    recipe = yaml.safe_load(Path("runs/other/recipe.yaml").read_text())
    recipe["teacher"]["seed"] = 5
    Path("runs/other/recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PairError, match="was recorded from another teacher"):
        audit_teachers(["runs/other"], "audits/other", settings=QUICK, progress=False)


def test_draws_are_found_and_fresh_ones_are_not(place, capsys):
    """A student of recorded draws against 99 fresh transcripts; the control, which saw none, with its power."""
    sampled = {"record.keep": [{"use": "sampled", "n": 1}], "objective.temperature": 1, "fit.epochs": 20}
    run("runs/drawn", **sampled)
    capsys.readouterr()
    done("audit", "transcript", "runs/drawn", "--quiet")
    said = capsys.readouterr().out
    assert said.startswith("evidence that drawn/student learned from the draws recorded in drawn: p = 0.0100")
    settings = Transcript(fresh=19, positives=2)
    found = audit_transcript("runs/drawn", "audits/d", "runs/drawn/alone", settings, progress=False)
    assert found.rejected or found.power.of == 2
    assert Path("audits/d/result-drawn-alone.json").is_file()


def test_deterministic_answers_are_refused(place):
    with pytest.raises(PairError, match="the recording of digits holds answers that were not drawn at random"):
        audit_transcript("runs/digits", "audits/t", progress=False)


def test_settings_that_could_show_nothing_are_refused_at_once(place):
    with pytest.raises(UsageError, match="9 decoys can never reach 0.05 over 1 candidate.*Make at least 19"):
        audit_teachers(["runs/digits"], "audits/x", settings=Settings(decoys=9), progress=False)
    with pytest.raises(UsageError, match="19 decoys can never reach 0.05 over 2 candidate.*Make at least 39"):
        audit_teachers(["runs/digits"] * 2, "audits/x", settings=QUICK, progress=False)
    with pytest.raises(UsageError, match="9 fresh transcripts give p >= 0.1000.*Draw at least 19"):
        Transcript(fresh=9)
    with pytest.raises(UsageError, match="positives is 0; it is at least 1"):
        Settings(positives=0)
    with pytest.raises(UsageError, match="mode 'sharp' is unknown"):
        Settings("sharp")
    with pytest.raises(FolderError, match="nowhere is no student's folder"):
        audit_teachers(["runs/digits"], "audits/x", "nowhere", QUICK, progress=False)


def test_power_plans(capsys):
    done("audit", "power", "--effect", 6, "--candidates", 2)
    assert capsys.readouterr().out.startswith("39 decoys (p can reach 0.0250; 0.05 over 2 candidate(s) needs 0.0250)")


def test_every_audit_command_teaches_with_an_example(capsys):
    for command in ("teacher", "transcript", "power"):
        done("audit", command, "--help")
        assert f"Example:  stillroom audit {command}" in capsys.readouterr().out.replace("\n", " ")


# Questions


def table(count=40):
    numbers = torch.arange(count * 3.0).reshape(count, 3)
    texts = tuple(f"word{i} second{i} third{i} fourth{i}" for i in range(count))
    return Table(
        {"x": numbers, "token": torch.arange(count)[:, None], "text": texts}, ids=tuple(map(str, range(count)))
    )


def test_questions_are_fixed_by_their_seed():
    one, again, other = (fresh_questions(table(), 20, seed) for seed in (0, 0, 1))
    assert torch.equal(one.column("x"), again.column("x"))
    assert one.column("text") == again.column("text")
    assert not torch.equal(one.column("x"), other.column("x"))
    assert declared_questions(table(), 25, 3).ids == declared_questions(table(), 25, 3).ids
    assert len(declared_questions(table(), 1000, 0)) == 40


def test_fresh_inputs_are_made_of_two_examples():
    """Numbers lie between those of two rows, whole numbers are one of them, words come from both; none is a row."""
    made, rows = fresh_questions(table(), 30, 0), table().column("x")
    assert not any(bool((rows == one).all(1).any()) for one in made.column("x"))
    assert set(made.column("token").flatten().tolist()) <= set(range(40))
    known = {word for text in table().column("text") for word in text.split()}
    assert all(set(text.split()) <= known and len(text.split()) == 4 for text in made.column("text"))


def test_too_little_data_is_refused():
    with pytest.raises(UsageError, match="declares 5 transfer inputs; a statistic needs at least 20"):
        declared_questions(table(5), 10, 0)
    with pytest.raises(UsageError, match="made of two examples each; there are 1"):
        fresh_questions(table(1), 10, 0)


def test_answers_must_be_one_distribution_per_input():
    with pytest.raises(SignalError, match=r"gives Dense of positions \[40, 2\].*benchmarks/audit_language.py"):
        log_probs_of(lambda batch: Signal(logits=Dense(torch.zeros(len(batch), 2, 3))), table())

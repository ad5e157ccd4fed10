"""The passport says what the stages' files say, openly and in one form; the card is rendered from it."""

import getpass
import json

import pytest
import rfc8785
import yaml

from provenance_run import RECIPE, copied, sealed_run  # noqa: F401
from stillroom import provenance
from stillroom.digests import file_digest
from stillroom.errors import CheckError, FolderError, MissingFileError
from stillroom.files import read_json, write_json
from stillroom.provenance.card import render
from stillroom.provenance.schema import FILE, generated, validator


def passport_of(run):
    return json.loads((run / "passport.json").read_bytes())


def rebuilt(run, path, change):
    """The passport after one stage's file was changed."""
    content = read_json(run / path)
    change(content)
    write_json(run / path, content)
    provenance.write(run)
    return passport_of(run)


def test_a_sealed_run_is_as_it_was(sealed_run):  # noqa: F811
    assert provenance.verify(sealed_run) == []
    assert provenance.validate(passport_of(sealed_run)) == []


def test_it_says_who_taught_what_was_kept_and_what_came_out(sealed_run):  # noqa: F811
    """Teacher, recording, data, seeds, environment, evaluation and exports: each from its stage's file."""
    found = passport_of(sealed_run)
    (teacher,) = found["teachers"]
    manifest = read_json(sealed_run / "recording/manifest.json")
    assert teacher["name"] == "tiny teacher"
    assert teacher["licence"] == "Apache-2.0"
    assert teacher["digest"] == manifest["teacher"]["digest"]
    assert teacher["recording"] == file_digest(sealed_run / "recording/manifest.json")
    assert teacher["requests"] == 48
    assert teacher["signals"][0].startswith("TopK(")
    assert found["student"]["content_digest"] == read_json(sealed_run / "student/student.json")["content_digest"]
    assert {a["path"]: a["sha256"] for a in found["student"]["artifacts"]}["student/model.safetensors"] == file_digest(
        sealed_run / "student/model.safetensors"
    )
    assert [(seed["path"], seed["seed"]) for seed in found["seeds"]] == [
        ("alone", 0), ("seeds/1/student", 1), ("student", 0),
    ]  # fmt: skip
    assert [seed["teacher"] for seed in found["seeds"]] == [None, "tiny teacher", "tiny teacher"]
    assert found["environment"]["packages"]["torch"]
    assert found["evaluation"]["rows"]["student"]["accuracy"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert [(e["target"], e["passed"]) for e in found["exports"]] == [("onnx", True)]
    assert found["recipe_sha256"] == file_digest(sealed_run / "recipe.yaml")
    assert found["recipe"]["name"] == "tiny"


def test_the_same_files_make_the_same_bytes(sealed_run, tmp_path):  # noqa: F811
    """Canonical JSON (RFC 8785); building again, elsewhere, changes nothing, 'created' included."""
    run = copied(sealed_run, tmp_path)
    before = (run / "passport.json").read_bytes()
    assert rfc8785.dumps(json.loads(before)) == before
    provenance.write(run)
    assert (run / "passport.json").read_bytes() == before
    assert provenance.verify(run) == []


def test_unknown_is_said_openly(sealed_run):  # noqa: F811
    """A licence that nobody gave is 'unknown' in the passport and a sentence in the card."""
    found = passport_of(sealed_run)
    assert {data["licence"] for data in found["data"]} == {"unknown"}
    assert found["student"]["licence"] == "unknown"
    card = (sealed_run / "README.md").read_text()
    assert "The licence of the training data is unknown." in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"


@pytest.mark.parametrize("gone", ["recording", "report", "exports", "recipe.yaml", "seeds", "alone"])
def test_a_stage_that_did_not_run_leaves_a_gap_not_a_crash(gone, sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path, without=gone)
    provenance.write(run)
    assert provenance.verify(run) == []
    found = passport_of(run)
    if gone == "recording":
        assert found["teachers"][0]["name"] == "tiny teacher"
        assert found["teachers"][0]["requests"] is None
    if gone == "report":
        assert found["evaluation"] is None
        assert "The student has not been evaluated." in (run / "README.md").read_text()
    if gone == "recipe.yaml":
        assert found["recipe"] is None


def test_without_a_student_there_is_no_passport(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path, without="student")
    with pytest.raises(MissingFileError, match="student"):
        provenance.write(run)
    with pytest.raises(MissingFileError, match="does not exist"):
        provenance.verify(tmp_path / "nowhere")


def test_another_recording_is_not_taken_for_the_one_learned_from(sealed_run, tmp_path):  # noqa: F811
    """student.json holds the digest of its recording: a recording made since is not claimed."""
    found = rebuilt(
        copied(sealed_run, tmp_path), "recording/manifest.json", lambda m: m["teacher"].update(name="somebody else")
    )
    assert found["teachers"][0]["name"] == "tiny teacher"
    assert found["teachers"][0]["recording"] is None


def test_a_failed_export_is_listed_as_failed(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    found = rebuilt(run, "exports/onnx-fp32/verify.json", lambda v: v.update(passed=False))
    assert found["exports"][0]["passed"] is False
    assert "| NO |" in (run / "README.md").read_text()


def test_nothing_says_where_or_who(sealed_run):  # noqa: F811
    """Absolute paths are cut to their last part, and no user is named."""
    for name in ("passport.json", "README.md", "manifest.json"):
        text = (sealed_run / name).read_text()
        assert str(sealed_run.parent) not in text
        assert "/home/" not in text
        assert "somebody" not in text
        assert f"/{getpass.getuser()}/" not in text
        assert "rows.csv" in text or name != "passport.json"
    assert "https://example.org/a/b" in (sealed_run / "passport.json").read_text(), "an address is not a path"
    assert RECIPE["relative"] == passport_of(sealed_run)["recipe"]["relative"]


def test_the_shipped_schema_is_in_step():
    from importlib import resources

    assert json.loads((resources.files("stillroom.provenance") / FILE).read_text()) == generated()
    validator().check_schema(generated())


def objects_of(value, path=()):
    """(path, object) of every object that the schema describes: free-form parts and maps by name are left out."""
    if isinstance(value, dict):
        free = path in {("recipe",), ("method", "objective"), ("method", "plan")}
        named = path[-1:] in {("packages",), ("versions",), ("variables",), ("rows",)} or path[-2:-1] == ("rows",)
        if free:
            return
        if not named:
            yield path, value
        for key, item in value.items():
            yield from objects_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects_of(item, (*path, index))


def test_no_field_may_be_added_or_left_out(sealed_run):  # noqa: F811
    """Every object of the passport refuses an unknown field, and the loss of any of its own."""
    found = passport_of(sealed_run)
    places = list(objects_of(found))
    assert len(places) > 25
    for path, part in places:
        part["unheard_of"] = 1
        assert provenance.validate(found), path
        del part["unheard_of"]
        for key in list(part):
            kept = part.pop(key)
            assert provenance.validate(found), (*path, key)
            part[key] = kept
    assert provenance.validate(found) == []
    assert provenance.validate([]) == provenance.validate([]) != []


def test_what_a_passport_cannot_hold_is_said(sealed_run, tmp_path):  # noqa: F811
    """A stage's file with a wrong type: an error that names the field, and a broken file: one that names the file."""
    run = copied(sealed_run, tmp_path)
    with pytest.raises(CheckError, match=r"student\.parameters"):
        rebuilt(run, "student/student.json", lambda s: s.update(parameters="many"))
    with pytest.raises(CheckError):
        rebuilt(run, "report/report.json", lambda r: r.update(rows=[1]))
    (run / "report/report.json").write_text("[1")
    with pytest.raises(FolderError, match=r"report\.json"):
        provenance.write(run)
    (run / "report/report.json").write_text("[1]")
    with pytest.raises(FolderError, match=r"report\.json"):
        provenance.write(run)
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(FolderError):
        provenance.write(run)


def test_base_model_only_where_weights_were_inherited(sealed_run):  # noqa: F811
    """A student that began at random is nobody's fine-tune; the teacher is in the tags."""

    def header(passport):
        return yaml.safe_load(render(passport).split("---")[1])

    found = passport_of(sealed_run)
    assert found["student"]["init"] == "random"
    assert "base_model" not in header(found)
    assert "knowledge-distillation" in header(found)["tags"]
    assert "distilled-from:org/tiny-teacher" in header(found)["tags"]
    found["student"] |= {"init": "teacher-weights", "init_from": "org/tiny-teacher"}
    assert header(found)["base_model"] == "org/tiny-teacher"
    assert "base_model_relation" not in header(found)


def test_names_cannot_break_the_card(sealed_run):  # noqa: F811
    """A name with Markdown, HTML, newlines or a YAML document end stays one line of text."""
    found = passport_of(sealed_run)
    found["teachers"][0]["name"] = found["name"] = "a|b\n---\n# c <script> `x` [l](http://e)\u202e"
    text = render(found)
    header, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(header)["library_name"] == "pytorch"
    assert "\n# c" not in body
    assert "<script>" not in body.replace(r"\<script\>", "")
    assert "\u202e" not in body


def test_the_card_must_have_a_valid_passport(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    write_json(run / "passport.json", {"schema": "stillroom-passport/9"})
    with pytest.raises(CheckError, match="schema"):
        provenance.write_card(run)

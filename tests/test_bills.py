"""Passports in other formats, each validated offline by that standard's own library; and shown, checked, compared."""

import copy
import io
import json

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from spdx_python_model import v3_0_1 as spdx
from typer.testing import CliRunner

from provenance_run import sealed_run  # noqa: F401
from stillroom.cli import app
from stillroom.errors import CheckError, FolderError, MissingExtraError, MissingFileError, UsageError
from stillroom.files import read_json
from stillroom.provenance import validate
from stillroom.provenance.bill import cyclonedx, eu_summary, hf_card, spdx3
from stillroom.provenance.reading import differences, exported, open_passport, told

A, B = "a" * 64, "b" * 64


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def real(sealed_run):  # noqa: F811
    """The passport of a real run."""
    return read_json(sealed_run / "passport.json")


def nothing_known(passport):
    """The same run, of which nobody says anything."""
    found = copy.deepcopy(passport)
    found["student"] |= {
        "init": "unknown",
        "factory": None,
        "classes": None,
        "parameters": None,
        "content_digest": None,
    }
    found["teachers"][0] |= {"name": "unknown", "kind": "unknown", "licence": "unknown", "route": "unknown"}
    found["teachers"][0] |= {"source": "unknown", "digest": None, "signals": None, "recording": None, "requests": None}
    found["teachers"][0]["access"] |= {"route": "unknown", "requests": None}
    found["data"] = [{**part, "name": "unknown", "digest": None, "rows": None} for part in found["data"]]
    return found | {"recipe": None, "recipe_sha256": None, "evaluation": None, "exports": [], "seeds": []}


def alone(passport):
    """A student that was trained without a teacher."""
    return {**passport, "teachers": []}


def ensemble(passport):
    """Members with members of their own, licences of three kinds, and a name that is no name for a file."""
    found = copy.deepcopy(passport)
    first = found["teachers"][0]
    member = {name: value for name, value in first.items() if name not in ("signals", "recording", "requests")}
    terms = {**member["terms"], "id": "gemma", "output_use": "conditional", "text_sha256": A, "decided_by": "table"}
    found["student"]["licence"] = "Apache-2.0 OR MIT"
    first["parts"] = [
        {**member, "name": 'Gemma "3" <b>&\n[x](y)', "licence": "Gemma Terms of Use", "terms": terms},
        {**member, "name": "inner", "licence": "unknown", "parts": [{**member, "name": "innermost", "licence": "MIT"}]},
    ]
    return found


def several(passport):
    """Several teachers, parents, data that a model wrote, inherited weights, duties and a waiver."""
    found = copy.deepcopy(passport)
    first = found["teachers"][0]
    more = {"name": "second", "source": "hf:org/second", "licence": "LicenseRef-own", "recording": B, "requests": 7}
    third = {"name": "third", "recording": None, "requests": None, "signals": None, "revision": "v1.2"}
    found["teachers"] += [{**copy.deepcopy(first), **more}, {**copy.deepcopy(first), **third}]
    found["parents"] = [{"name": "tiny teacher", "passport_sha256": A, "path": f"parents/{A}.json"}]
    found["student"] |= {"init": "pretrained", "init_from": "org/base", "licence": "Apache-2.0"}
    found["data"][0] |= {"generated_by": "org/writer", "generated_from": "2026-01-01", "generated_to": "2026-02-01"}
    found["policy"] = {
        "decision": "conditions",
        "reasons": [
            {"about": "teacher", "terms": "gemma", "condition": "notice", "says": "carry the notice",
             "outcome": "conditions"}
        ],
        "obligations": [
            {"id": "notice", "value": "Gemma is ...", "from_teacher": "tiny teacher", "terms": "gemma", "done": False}
        ],
        "waivers": [
            {"sha256": B, "who": "Ada", "why": "asked", "until": "2027-01-01", "covers": ["teacher"], "signer": B}
        ],
        "table_version": "1",
    }  # fmt: skip
    return found


KINDS = [copy.deepcopy, nothing_known, alone, ensemble, several]


@pytest.fixture(params=KINDS, ids=["real", "nothing known", "alone", "ensemble", "several"])
def passport(request, real):
    found = request.param(real)
    assert validate(found) == []
    return found


# CycloneDX


@pytest.mark.parametrize("version", ["1.6", "1.7"])
def test_cyclonedx_is_valid_by_the_strict_schema(version, passport):
    """The library's own strict validator, offline; the same passport gives the same bill; every ref leads somewhere."""
    bill = cyclonedx.bill(passport, version)
    assert JsonStrictValidator(SchemaVersion.from_version(version)).validate_str(json.dumps(bill)) is None
    assert bill == cyclonedx.bill(copy.deepcopy(passport), version)
    assert bill["specVersion"] == version
    refs = {component["bom-ref"] for component in bill["components"]}
    assert len(refs) == len(bill["components"])
    named = {one["ref"] for one in bill["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]}
    assert named <= refs
    assert set(bill["dependencies"][0]["dependsOn"]) == refs


def test_cyclonedx_says_what_the_passport_says(real):
    bill = cyclonedx.bill(several(real))
    student = bill["metadata"]["component"]
    assert [one["name"] for one in student["pedigree"]["ancestors"]] == ["tiny teacher", "second", "third"]
    assert "it learned from the outputs of second, not from its weights" in student["pedigree"]["notes"]
    assert student["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert student["externalReferences"][0]["hashes"] == [{"alg": "SHA-256", "content": A}]
    assert {file["name"] for file in student["components"]} >= {"student/model.safetensors"}
    components = {component["name"]: component for component in bill["components"]}
    assert components["second"]["licenses"] == [{"license": {"name": "LicenseRef-own"}}]
    assert components["answers of second"]["hashes"] == [{"alg": "SHA-256", "content": B}]
    said = {one["name"]: one["value"] for one in components["tiny teacher"]["properties"]}
    assert said["stillroom:terms.output_use"] == "unknown"
    assert said["stillroom:access.account"] == "none or unknown"
    data = {one["name"]: one["value"] for one in components["examples"]["properties"]}
    assert data["stillroom:generated_by"] == "org/writer"
    about = {one["name"]: one["value"] for one in bill["metadata"]["properties"]}
    assert about["stillroom:policy.obligation.0"] == "notice (from tiny teacher): open"
    assert "licenses" not in cyclonedx.bill(nothing_known(real))["metadata"]["component"]


def test_a_licence_is_an_id_an_expression_or_a_name(real):
    bill = cyclonedx.bill(ensemble(real))
    assert bill["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]
    named = {component["name"]: component.get("licenses") for component in bill["components"]}
    assert named["innermost"] == [{"license": {"id": "MIT"}}]
    assert named["inner"] is None
    assert {"name": "Gemma Terms of Use"} in [one["license"] for found in named.values() for one in found or ()]
    expressions = {one.get("simplelicensing_licenseExpression") for one in graph(spdx3.bill(ensemble(real)))}
    assert {"Apache-2.0 OR MIT", "MIT", "LicenseRef-Gemma-Terms-of-Use"} <= expressions


def test_cyclonedx_1_5_is_not_written(real):
    with pytest.raises(UsageError, match="CycloneDX '1.5' is not written"):
        cyclonedx.bill(real, "1.5")


# SPDX


def graph(bill):
    return bill["@graph"]


def test_spdx_is_read_again_as_the_same_document(passport):
    """By the model's own library; written again from what was read, it says the same."""
    bill = spdx3.bill(passport)
    read = spdx.SHACLObjectSet()
    spdx.JSONLDDeserializer().read(io.BytesIO(json.dumps(bill).encode()), read)
    assert read.missing_ids <= {spdx3.NO_ASSERTION}
    again = spdx.JSONLDSerializer().serialize_data(read, force_at_graph=True)
    assert sorted(map(str, graph(again))) == sorted(map(str, graph(bill)))
    assert bill == spdx3.bill(copy.deepcopy(passport))


def test_spdx_packages_have_one_declared_and_one_concluded_licence(passport):
    bill = spdx3.bill(passport)
    packages = {one["spdxId"] for one in graph(bill) if one["type"] in ("ai_AIPackage", "dataset_DatasetPackage")}
    for kind in ("hasDeclaredLicense", "hasConcludedLicense"):
        whose = [one["from"] for one in graph(bill) if one.get("relationshipType") == kind]
        assert sorted(whose) == sorted(packages)
        assert all(len(one["to"]) == 1 for one in graph(bill) if one.get("relationshipType") == kind)


def test_spdx_says_what_the_passport_says(real):
    bill = spdx3.bill(several(real))
    by_id = {one.get("spdxId"): one for one in graph(bill)}
    relations = [one for one in graph(bill) if one["type"] == "Relationship"]

    def related(how):
        pairs = [(one["from"], to) for one in relations if one["relationshipType"] == how for to in one["to"]]
        return {(by_id[one]["name"], by_id[other]["name"]) for one, other in pairs}

    assert related("descendantOf") == {("tiny", "tiny teacher"), ("tiny", "second"), ("tiny", "third")}
    assert related("generates") == {("tiny teacher", "answers of tiny teacher"), ("second", "answers of second")}
    trained = {("tiny", name) for name in ("examples", "answers of tiny teacher", "answers of second")}
    assert related("trainedOn") == trained
    assert related("testedOn") == {("tiny", "unknown")}
    assert related("hasEvidence") == {("tiny", f"parents/{A}.json")}
    comments = [one["comment"] for one in relations if one["relationshipType"] == "descendantOf"]
    assert all("began with weights of org/base and was distilled" in comment for comment in comments)
    named = [
        one["simplelicensing_licenseExpression"] for one in graph(bill) if "simplelicensing_licenseExpression" in one
    ]
    assert sorted(named) == ["Apache-2.0", "Apache-2.0", "Apache-2.0", "LicenseRef-own"]
    odd = spdx3.bill(ensemble(real))
    assert any(one.get("simplelicensing_licenseExpression") == "LicenseRef-Gemma-Terms-of-Use" for one in graph(odd))


# The hub's card


def test_the_hub_s_library_reads_the_card(passport):
    card = ModelCard(hf_card.card(passport))
    assert card.data.to_dict()["tags"][:2] == ["knowledge-distillation", "stillroom"]
    assert card.text.lstrip().startswith(f"# {passport['name']}")


def test_base_model_is_named_only_where_weights_were_inherited(real):
    """A student that began at random is nobody's fine-tune; its teachers are tags."""
    header = hf_card.header(real)
    assert "base_model" not in header
    assert "distilled-from:org/tiny-teacher" in header["tags"]
    assert header["license"] == "unknown"
    inherited = hf_card.header(several(real))
    assert inherited["base_model"] == "org/base"
    assert "distilled-from:org/second" in inherited["tags"]
    local = several(real)
    local["student"]["init_from"] = "folder weights"
    assert "base_model" not in hf_card.header(local)
    named = ensemble(real)
    named["student"]["licence"] = "Gemma Terms of Use"
    assert {"license": "other", "license_name": "gemma-terms-of-use"}.items() <= hf_card.header(named).items()
    assert yaml.safe_load(hf_card.card(named).split("---\n")[1]) == hf_card.header(named)
    assert hf_card.header(alone(real))["tags"] == ["knowledge-distillation", "stillroom"]


# The EU's summary


def test_the_summary_fills_two_sections_and_marks_the_rest(passport):
    found = eu_summary.summary(passport)["sections"]
    filled = {
        name: {field for field, value in fields.items() if value != eu_summary.OPEN} for name, fields in found.items()
    }
    assert {name for name, fields in filled.items() if fields} <= {"1.2 Model identification", "2.5 Synthetic data"}
    assert list(found) == sorted(found)
    text = eu_summary.markdown(passport)
    for section in found:
        assert f"## {section}\n" in text
    assert "<b>" not in text


def test_the_summary_never_infers(real):
    said = eu_summary.summary(several(real))["sections"]
    assert said["1.2 Model identification"]["model dependencies"] == ["org/base"]
    names = [one["name"] for one in said["2.5 Synthetic data"]["models whose outputs were learned from"]]
    assert names == ["tiny teacher", "second", "third", "org/writer"]
    unknown = eu_summary.summary(nothing_known(real))["sections"]
    assert unknown["1.2 Model identification"]["model dependencies"] == ["to be provided"]
    (model,) = unknown["2.5 Synthetic data"]["models whose outputs were learned from"]
    assert model["terms on outputs"] == "unknown (unknown)"
    none = eu_summary.summary(alone(real))["sections"]["2.5 Synthetic data"]
    assert none["models whose outputs were learned from"] == ["none that the passport names"]


# Command line


@pytest.mark.parametrize("to", ["cyclonedx", "spdx3", "hf-card", "eu-summary"])
def test_every_format_is_exported_from_the_command_line(to, sealed_run, real, tmp_path):  # noqa: F811
    done = cli("passport", "export", sealed_run, "--to", to)
    assert done.exit_code == 0, done.output
    assert done.output == exported(real, to)
    assert cli("passport", "export", sealed_run / "passport.json", "--to", to, "--out", tmp_path / "x").exit_code == 0
    assert (tmp_path / "x").read_text() == done.output


def test_what_is_not_exported_is_refused(real):
    assert json.loads(exported(real, "cyclonedx", "1.6"))["specVersion"] == "1.6"
    assert json.loads(exported(real, "eu-summary", as_json=True))["format"] == "stillroom-eu-summary/1"
    with pytest.raises(UsageError, match="'cyclone' is no format that passports are exported to; did you mean 'cyclon"):
        exported(real, "cyclone")
    with pytest.raises(UsageError, match="a version is chosen of cyclonedx only; spdx3 has one"):
        exported(real, "spdx3", "3.0")
    with pytest.raises(UsageError, match="--json is for eu-summary"):
        exported(real, "spdx3", as_json=True)


@pytest.mark.parametrize(("module", "to"), [("cyclonedx.spdx", "cyclonedx"), ("spdx_python_model", "spdx3")])
def test_without_the_extra_its_name_is_said(module, to, real, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'stillroom\[bom\]'"):
        exported(real, to)


def test_show_tells_what_is_known_and_what_is_not(sealed_run, real):  # noqa: F811
    done = cli("passport", "show", sealed_run)
    assert done.exit_code == 0
    for line in (
        "student: student, 92 parameters, licence unknown, weights before training: random",
        "teacher: tiny teacher (network), org/tiny-teacher, licence Apache-2.0",
        "  reached by local-weights, account unknown, 48 answers",
        "  terms unknown: outputs unknown, decided by nobody",
        "training data: examples, 48 rows, licence unknown",
        "decision before the teacher was asked: not-asked",
        "unknown: The licence of the student is unknown: nobody has chosen one.",
    ):
        assert f"{line}\n" in done.output, line
    lines = told(several(real))
    assert f"parent: tiny teacher, passport {A}" in lines
    assert "  OPEN: notice Gemma is ... (gemma)" in lines
    assert "  waived by Ada until 2027-01-01: asked" in lines
    assert all(line.isprintable() for line in told(ensemble(real)))


def test_validate_names_every_problem(sealed_run, real, tmp_path):  # noqa: F811
    assert cli("passport", "validate", sealed_run).output == f"{sealed_run}: a valid passport.\n"
    bad = tmp_path / "bad.json"
    del real["policy"]
    bad.write_text(json.dumps({**real, "blessed": True}))
    done = cli("passport", "validate", bad)
    assert done.exit_code == 1
    assert "'blessed' was unexpected" in done.output
    assert "'policy' is a required property" in done.output
    with pytest.raises(CheckError, match="does not fit its schema: .* See: stillroom passport validate"):
        open_passport(bad)
    bad.write_text("[" * 100_000)
    for read in (open_passport, lambda path: cli("passport", "validate", path, standalone_mode=False)):
        if read is open_passport:
            with pytest.raises(FolderError, match="nested too deeply|not readable as JSON"):
                read(bad)
    with pytest.raises(MissingFileError, match="does not exist"):
        open_passport(tmp_path / "nowhere.json")


def test_diff_names_each_difference(sealed_run, real, tmp_path):  # noqa: F811
    assert cli("passport", "diff", sealed_run, sealed_run).output == "The two say the same.\n"
    other = copy.deepcopy(real)
    other["teachers"][0]["licence"] = "MIT"
    other["data"].pop()
    other["environment"]["packages"]["new"] = "1.0"
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = cli("passport", "diff", sealed_run, tmp_path / "other.json")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert 'teachers.0.licence: "Apache-2.0" -> "MIT"' in lines
    assert "environment.packages.new: only in the second" in lines
    assert len([line for line in lines if line.startswith("data: ")]) == 1
    assert len(lines) == 3
    assert list(differences(other, real))[1] == "environment.packages.new: only in the first"


def test_every_command_has_an_example():
    for group, names in {"passport": ("show", "validate", "diff", "export"), "claims": ("list", "add")}.items():
        for name in names:
            said = cli(group, name, "--help").output
            assert f"Example:  stillroom {group} {name} runs/digits" in said, said

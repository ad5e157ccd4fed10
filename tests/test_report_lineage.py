"""The picture of where a student comes from, and what the gate decided, as the page shows them."""

import copy
import json
import re

import pytest

from provenance_run import copied, sealed_run  # noqa: F401
from stillroom.report import write_report
from stillroom.report.lineage import gate_of, lineage_figure

EVIL = '<script>alert(1)</script>" onload="alert(2)'


@pytest.fixture
def passport(sealed_run):  # noqa: F811
    return json.loads((sealed_run / "passport.json").read_text())


def boxes(svg: str) -> list[tuple[str, str]]:
    return re.findall(r'<g class="box (\w+)"><title>([^<:]*)', svg)


def test_a_student_its_teacher_and_its_data(passport):
    svg = lineage_figure(passport, {})
    assert ("student", passport["name"]) in boxes(svg)
    assert ("teacher", passport["teachers"][0]["name"]) in boxes(svg)
    assert [kind for kind, _ in boxes(svg)].count("data") >= 1
    arrows = svg.count('class="edge"') / 2
    assert arrows == len(boxes(svg)) - 1  # a tree: each box but the student has one


def test_a_teacher_that_was_a_student_shows_what_it_came_from(passport):
    child = copy.deepcopy(passport)
    child["name"] = "grandchild"
    child["teachers"][0] |= {"name": "child", "digest": passport["student"]["content_digest"]}
    names = [name for _, name in boxes(lineage_figure(child, {"a" * 64: passport}))]
    assert names[0] != names[-1]
    assert {"grandchild", "child", passport["teachers"][0]["name"]} <= set(names)
    assert "child" in [name for _, name in boxes(lineage_figure(child, {}))]  # the passport is missing: drawn without


def test_a_passport_that_names_itself_ends(passport):
    loop = copy.deepcopy(passport)
    loop["teachers"][0]["digest"] = loop["student"]["content_digest"]
    assert len(boxes(lineage_figure(loop, {"a" * 64: loop}))) < 10


def test_members_of_an_ensemble_are_drawn(passport):
    member = {**passport["teachers"][0], "name": "first member", "parts": []}
    passport["teachers"][0]["parts"] = [member, {**member, "name": "second member"}]
    found = boxes(lineage_figure(passport, {}))
    assert ("member", "first member") in found
    assert ("member", "second member") in found


def test_no_word_of_a_passport_becomes_markup(passport):
    passport["name"] = passport["teachers"][0]["name"] = passport["data"][0]["name"] = EVIL
    svg = lineage_figure(passport, {})
    assert "<script" not in svg
    assert 'onload="' not in svg


def test_the_page_says_what_the_gate_decided(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    said = json.loads((run / "passport.json").read_text())
    reason = {
        "about": "teacher",
        "terms": "unknown",
        "condition": None,
        "says": f"Nobody said {EVIL}",
        "outcome": "human",
    }
    duty = {"id": "name-prefix", "value": "Llama", "from_teacher": "t", "terms": "llama-3.1", "done": False}
    waiver = {"sha256": "0" * 64, "who": "A. Person", "why": "asked the licensor", "until": "2030-01-01", "covers": []}
    waiver["signer"] = "1" * 64
    said["policy"] |= {"decision": "human", "reasons": [reason], "obligations": [duty], "waivers": [waiver]}
    (run / "passport.json").write_text(json.dumps(said))
    html = write_report(run).read_text()
    gate = html[html.index('id="gate"') : html.index('id="provenance"')]
    for words in (
        "A person must decide.",
        "Nobody said",
        "MISSING: name-prefix",
        "Waived by A. Person until 2030-01-01",
    ):
        assert words in gate, words
    assert 'data-decision="human"' in gate
    assert "<script>alert" not in html
    assert 'class="lineage"' in html


def test_an_older_passport_has_no_gate():
    assert gate_of({}) is None

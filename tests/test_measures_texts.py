"""Answers in words against a person's and the teacher's, worked by hand."""

import json

import pytest
import torch

from stillroom.data import Table
from stillroom.errors import DataError
from stillroom.evaluation import evaluate
from stillroom.measures.texts import COLUMNS, beside, lines_of, metrics_for, plain, scored, token_f1

SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["company", "year"],
}


def numbers(answer, teacher="", human=None, schema=None):
    row = scored({"a": answer}, {"a": teacher}, {"a": human}, schema).rows["a"]
    return dict(zip(COLUMNS, row, strict=True))


def test_plain_leaves_case_marks_and_blanks_out():
    assert plain("  The  Bank, of JAPAN! ") == "the bank of japan"
    assert plain("...") == ""


@pytest.mark.parametrize(
    ("answer", "wanted", "f1"),
    [
        ("bank of japan", "the bank of japan", 2 * 3 / 7),
        ("a a b", "a b b", 2 * 2 / 6),  # multisets: one a and one b in common
        ("oil", "gold", 0.0),
        ("Oil.", "oil", 1.0),
        ("", "", 1.0),
        ("", "oil", 0.0),
    ],
)
def test_token_f1_by_hand(answer, wanted, f1):
    assert token_f1(answer, wanted) == pytest.approx(f1)
    assert token_f1(wanted, answer) == pytest.approx(f1)


def test_texts_are_compared_with_a_person_and_with_the_teacher():
    found = numbers("Earnings.", "other", "earnings")
    assert (found["exact"], found["known"], found["same"], found["usable"]) == (1, 1, 0, 1)
    nobody = numbers("Earnings.", "earnings", None)
    assert (nobody["exact"], nobody["f1"], nobody["known"], nobody["same"]) == (0, 0, 0, 1)
    assert numbers(" .", "x")["usable"] == 0


def test_json_is_compared_as_values_field_by_field():
    human = json.dumps({"company": "USAir", "year": 1987})
    right = numbers('{"year": 1987, "company": "usair "}', human, human, SCHEMA)
    assert (right["fields"], right["asked"], right["usable"]) == (2, 2, 1)
    assert right["exact"] == 0  # 'usair ' is alike as a field, and not the same value
    assert numbers(human, human, human, SCHEMA)["exact"] == 1
    assert (
        numbers('{"year":1987,"company":"USAir"}', human, human, SCHEMA)["same"] == 1
    )  # order and blanks do not count
    half = numbers('{"company": "USAir", "year": 1986}', human, human, SCHEMA)
    assert (half["fields"], half["asked"], half["exact"]) == (1, 2, 0)
    for broken in ("USAir, 1987", '{"company": "USAir"}', '{"company": "USAir", "year": "1987"}'):
        found = numbers(broken, human, human, SCHEMA)
        assert (found["usable"], found["fields"], found["asked"]) == (0, 0, 2), broken


def test_a_persons_answer_that_is_no_json_is_named():
    with pytest.raises(DataError, match="a person's answer to 'a' is 'USAir', which is no JSON"):
        numbers("{}", "{}", "USAir", SCHEMA)


def test_the_scoreboard_counts_only_what_a_person_answered():
    """Two of four questions have a person's answer; agreement is over all four, never of the teacher with itself."""
    ids = tuple("abcd")
    human = {"a": "x", "b": "y", "c": None, "d": None}
    teacher = dict.fromkeys(ids, "x")
    student = {"a": "x", "b": "x", "c": "x", "d": "z"}
    table = Table({"question": ids}, ids, labels=torch.ones(4, 1))
    first = scored(teacher, teacher, human)
    models = {"teacher": first, "student": scored(student, teacher, human)}
    report = evaluate(models, first, table, metrics_for(True, None), costs=False, replicates=20, progress=False)
    assert report.rows["student"]["exact"]["value"] == 0.5
    assert report.rows["student"]["agreement"]["value"] == 0.75
    assert report.rows["teacher"]["exact"]["value"] == 0.5
    assert "agreement" not in report.rows["teacher"] or report.rows["teacher"]["agreement"] is None
    assert [metric.name for metric in metrics_for(False, SCHEMA)] == ["agreement", "usable"]


def test_what_differs_stands_first_and_every_answer_is_a_line():
    texts = {"teacher": {"a": "x", "b": "ü"}, "student": {"a": "x", "b": "z"}}
    shown = beside(texts, {"a": "A?", "b": "B?"}, {"a": None, "b": "ü"})
    assert [one["id"] for one in shown] == ["b", "a"]
    assert shown[0]["rows"]["student"]["text"] == "z"
    lines = [json.loads(line) for line in lines_of(texts, {"a": None, "b": "ü"}).decode().splitlines()]
    assert lines[1] == {"id": "b", "person": "ü", "teacher": "ü", "student": "z"}

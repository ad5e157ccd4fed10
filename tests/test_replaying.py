"""Replay: every artefact is asked as a control loop asks, what it took is counted, and the loop is the same."""

import json

import numpy as np
import pytest
import torch

import stillroom as sr
from control_fakes import Controller, cart, small_student
from stillroom.control import drive
from stillroom.errors import DataError, UsageError
from stillroom.replaying import Replayed, _summary, artefacts, closed_loops, models, passed, replay
from stillroom.report.latencies import shown


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A student of the cart, trained on its teacher's driving, as ONNX and as C."""
    teacher, task = Controller(), cart()
    table = drive(teacher, task, range(8), teacher=teacher).table()
    plan = sr.Plan(steps=200, learning_rate=1e-2)
    student = sr.fit(small_student(), teacher, table, sr.MatchActions(clip=(-1, 1)), plan=plan, progress=False)
    folder = tmp_path_factory.mktemp("exports")
    kinds = {target: sr.export(student, table, folder, target=target, progress=False) for target in ("onnx", "c")}
    return student, teacher, task, table, kinds


@pytest.mark.parametrize("target", ["onnx", "c"])
def test_what_ships_drives_like_the_student(shipped, target):
    """The artefact closes the loop from unseen starts: the same success, return and length as the PyTorch student."""
    student, _, task, _, kinds = shipped
    ours, theirs = (drive(policy, task, range(100, 105)) for policy in (student, kinds[target]))
    assert theirs.success.tolist() == ours.success.tolist()
    assert theirs.lengths == ours.lengths
    np.testing.assert_allclose(theirs.returns, ours.returns, rtol=1e-4)
    assert ours.success.any()


def test_closed_loops_are_told_beside_the_student(shipped):
    student, _, task, table, kinds = shipped
    found = closed_loops({"c fp32": kinds["c"], "student": student}, [task], range(100, 104), progress=False)
    assert found["c fp32"]["starts"] == 4
    assert found["c fp32"]["success"] == found["student"]["success"] > 0
    assert found["c fp32"]["mean_return"] == pytest.approx(found["student"]["mean_return"], rel=1e-4)
    assert found["c fp32"]["worst_return"] <= found["c fp32"]["mean_return"]
    said = replay(artefacts({"c fp32": kinds["c"]}), table, count=100, progress=False)
    page = shown({**said, "closed_loop": found})
    assert page["rows"][0]["loop"].endswith(f"success {found['student']['success']:.0%}")


def test_only_what_passed_is_replayed(tmp_path):
    """An artefact that was refused, or that nothing here can run, does not stop the others from being asked."""
    said = {
        "c-fp32": {"passed": True},
        "c-int8": {"passed": False},
        "coreml-fp32": {"passed": None, "unproven": "no Mac"},
        "onnx-fp32": {"passed": True},
    }
    for name, verify in said.items():
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "verify.json").write_text(json.dumps(verify))
    assert [place.name for place in passed(tmp_path)] == ["c-fp32", "onnx-fp32"]


def test_every_one_is_asked_as_often_as_is_said(shipped, tmp_path):
    student, teacher, _, table, kinds = shipped
    asked = [*artefacts({"onnx fp32": kinds["onnx"], "c fp32": kinds["c"]}), *models({"student": student})]
    before = teacher.asked
    said = replay([*asked, *models({"teacher": teacher})], table, tmp_path, count=600, period=10.0, progress=False)
    assert said == json.loads((tmp_path / "replay.json").read_text())
    assert {name: row["calls"] for name, row in said["rows"].items()} == {
        "onnx fp32": 600,
        "c fp32": 600,
        "student": 100,
        "teacher": 100,
    }
    assert teacher.asked - before == 200  # 100 that do not count, 100 that do
    for row in said["rows"].values():
        assert sum(row["histogram"]["counts"]) == row["calls"]
        assert len(row["histogram"]["edges"]) == len(row["histogram"]["counts"]) + 1
        assert list(row["seconds"].values()) == sorted(row["seconds"].values())
        assert row["longer_than_period"] == 0


def test_percentiles_and_the_period_by_hand():
    """Of 1000 answers, 990 take 10 microseconds, nine 1 ms and one 20 ms; the controller acts every 5 ms."""
    taken = np.array([10_000] * 990 + [1_000_000] * 9 + [20_000_000])
    said = _summary(taken, period=0.005)
    assert said["seconds"]["p50"] == said["seconds"]["p90"] == 1e-5
    assert said["seconds"]["p99"] == pytest.approx(1.99e-5)  # between the 990th and the 991st
    assert said["seconds"]["largest"] == 0.02
    assert said["longer_than_period"] == 1
    edges, counts = said["histogram"]["edges"], said["histogram"]["counts"]
    filled = {round(edges[i], 8): count for i, count in enumerate(counts) if count}
    assert list(filled.values()) == [990, 9, 1]
    assert edges[0] <= 1e-5 < edges[1]
    assert edges[-1] >= 0.02
    assert "longer_than_period" not in _summary(taken, None)


def test_observations_are_asked_in_turn_and_prepared_before_the_clock():
    seen, prepared = [], []
    table = sr.Table({"x": torch.arange(3.0)[:, None]}, ids=tuple("abc"))

    def prepare(batch):
        prepared.append(batch.ids[0])
        return batch.ids[0]

    replay([Replayed("one", prepare, seen.append)], table, count=7, progress=False)
    assert prepared == ["a", "b", "c"]
    assert seen[-7:] == ["a", "b", "c", "a", "b", "c", "a"]


def test_what_cannot_be_replayed_is_refused(shipped):
    _, teacher, _, table, _ = shipped
    with pytest.raises(DataError, match="nothing to replay"):
        replay([], table)
    for count, period in ((0, None), (5, 0.0), (5, -1.0)):
        with pytest.raises(UsageError, match="above 0"):
            replay(models({"teacher": teacher}), table, count=count, period=period)


def test_the_page_shows_the_period_and_every_row(shipped):
    student, _, _, table, kinds = shipped
    asked = [*artefacts({"c fp32": kinds["c"]}), *models({"student": student})]
    said = shown(replay(asked, table, count=300, period=0.02, progress=False))
    assert [row["name"] for row in said["rows"]] == ["c fp32", "student"]
    assert said["period"] == "20 ms"
    assert "period 20 ms" in said["figure"]
    assert "c fp32: half within" in said["figure"]
    assert shown(None) is None

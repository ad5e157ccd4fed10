"""The audit's calibration: null students and positives on text tasks that no choice saw. Some 6 CPU minutes."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit():
    """benchmarks/audit.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        sys.modules.pop("audit", None)
        import audit

        yield audit


@pytest.fixture(scope="module")
def calibrated(audit):
    """Rows and summary of the sealed tasks, 25 sets each, one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tasks = [audit.texts(name) for name in audit.SEALED]
    rows = audit.run(tasks, range(25))
    yield tasks, rows, audit.summary(rows)
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_false_positives_are_within_the_level(audit, calibrated):
    """At most .05 and two standard errors, pooled and for each kind of null student, in both modes."""
    _, _, found = calibrated
    for mode in audit.MODES:
        pooled = found["nulls"][mode]
        assert pooled["students"] >= 400
        for kind, rates in {"all": found["nulls"], **{kind: found["kinds"][kind] for kind in audit.NULLS}}.items():
            limit = 0.05 + 2 * (0.05 * 0.95 / rates[mode]["students"]) ** 0.5
            assert rates[mode]["rate"] <= limit, (kind, mode, rates[mode])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_randomised_p_values_are_uniform(audit, calibrated):
    """One per independent teacher set and kind of null; eight tests, each at .01."""
    _, _, found = calibrated
    for kind in audit.NULLS:
        for mode in audit.MODES:
            uniform = found["kinds"][kind][mode]["uniform"]
            assert uniform["sets"] >= 40
            assert uniform["p"] > 0.01, (kind, mode, uniform)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_positives_are_found_and_the_naive_test_is_shown_beside_them(calibrated):
    """Power >= .95 soft at T = 2, >= .90 hard with declared inputs; the z-test over prompts rejects too many nulls."""
    _, _, found = calibrated
    soft, hard = found["kinds"]["soft, T = 2"]["soft"], found["kinds"]["hard, declared inputs"]["hard"]
    assert min(soft["students"], hard["students"]) >= 200
    assert soft["rate"] >= 0.95
    assert hard["rate"] >= 0.90
    assert found["nulls"]["naive z, soft (invalid)"]["rate"] > 0.10
    for share in ("50 %", "25 %"):  # reported, without a bound
        assert found["kinds"][f"soft, {share} of the rows"]["soft"]["students"] > 100


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_misuse_is_refused(calibrated):
    """Another recipe, declared or not, and a teacher better or worse than its decoys: refused every time."""
    _, _, found = calibrated
    assert len(found["misuse"]) == 5
    for case, modes in found["misuse"].items():
        if case != "best of 40 seeds, hidden":  # told apart only where its rank stands out
            assert {rates["refused"] for rates in modes.values()} == {1.0}, case


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_same_bits_again(audit, calibrated):
    """A set that is run again, alone, gives the same p-values to the last bit."""
    tasks, rows, _ = calibrated
    again = audit.run(tasks[:1], [3])
    first = [row for row in rows if row["task"] == tasks[0].name and row["set"] == 3]
    assert audit.digest_of(again) == audit.digest_of(first)
    assert again == first


def test_many_networks_at_once_are_independent_trainings():
    """A network's weights depend on its own seed, rows and targets only, not on what else is trained with it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from audit_students import Recipe, train
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    x, rows = torch.randn(40, 5), torch.stack([torch.randperm(40)[:30] for _ in range(3)])
    targets = torch.rand(3, 30, 4).softmax(-1)
    recipe = Recipe(hidden=6, epochs=3, batch_size=10)
    three = train(x, rows, targets, recipe, [1, 2, 3])
    for index in range(3):
        one = train(x, rows[index : index + 1], targets[index : index + 1], recipe, [index + 1])
        assert torch.allclose(one(x)[0], three(x)[index], atol=1e-5)
    assert not torch.allclose(three(x)[0], three(x)[1], atol=0.1)

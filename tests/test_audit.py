"""The rank tests on arrays: ranks worked by hand, exactness by enumeration, symmetry, and the misuses refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import PairError, UsageError
from stillroom.provenance.audit import (
    COMPARATIVE,
    DECLARED,
    FRESH,
    Columns,
    Power,
    check_columns,
    exact_p,
    holm,
    measured,
    over_candidates,
    randomised_p,
    teacher_test,
    transcript_test,
)
from stillroom.provenance.audit.decoys import accuracy_refusal
from stillroom.provenance.audit.statistics import agreement, combined, effect, residual

numbers = st.lists(st.integers(0, 5), min_size=2, max_size=12)


def log_softmax(values):
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def made(decoys=19, rows=60, classes=4, seed=0, taught=0, strength=1.0):
    """Columns of a shared signal and their own noise; a student that shares the noise of column ``taught``."""
    generator = np.random.default_rng(seed)
    answers, student = {}, {}
    for name in (DECLARED, FRESH):
        task = 2 * generator.normal(size=(rows, classes))
        own = generator.normal(size=(decoys + 1, rows, classes))
        answers[name] = log_softmax(task + own)
        copied = 0 if taught is None else strength * own[taught]
        student[name] = log_softmax(task + copied + generator.normal(size=(rows, classes)))
    right = generator.binomial(500, 0.9, size=decoys + 1)
    right[0] = np.sort(right[1:])[decoys // 2]  # an ordinary teacher
    columns = Columns("teacher A", answers, ("r",) * (decoys + 1), tuple(range(decoys + 1)), right, 500)
    return student, columns


# Ranks


def test_p_by_hand():
    """Two of four decoys reach 3, so three of five columns do: 3/5. The best possible p of four is 1/5."""
    assert exact_p(3.0, np.array([1.0, 3.0, 4.0, 2.0])) == 3 / 5
    assert exact_p(9.0, np.array([1.0, 3.0, 4.0, 2.0])) == 1 / 5
    assert exact_p(0.0, np.array([1.0, 3.0, 4.0, 2.0])) == 1.0


def test_p_needs_others_and_finite_numbers():
    with pytest.raises(UsageError, match="at least one other value to compare with; without decoys there is no p"):
        exact_p(1.0, np.array([]))
    for value, others in ((np.nan, [1.0]), (1.0, [np.inf, 0.0])):
        with pytest.raises(UsageError, match="NaN or infinite, so it has no rank"):
            exact_p(value, np.array(others))


@given(numbers)
def test_p_is_exact_over_all_orders(values):
    """If every column is as likely the teacher, P(p <= a) <= a for every a: enumerated, ties and all."""
    found = sorted(exact_p(values[i], np.delete(values, i)) for i in range(len(values)))
    for place, p in enumerate(found, 1):
        assert sum(other <= p for other in found) / len(found) <= p + 1e-12
        assert p >= place / len(found) - 1e-12
    if len(set(values)) == len(values):
        assert found == pytest.approx(np.arange(1, len(values) + 1) / len(values))


@given(numbers, st.integers(0, 2**32))
def test_the_randomised_p_lies_in_its_step(values, seed):
    """Between the share strictly above and the exact p, and the same again for the same seed."""
    value, others = values[0], np.array(values[1:])
    p = randomised_p(value, others, seed)
    assert (others > value).sum() / len(values) <= p <= exact_p(value, others)
    assert p == randomised_p(value, others, seed)


def test_the_randomised_p_is_uniform_with_ties():
    """Over every column as the teacher and many seeds its mean is 1/2 and its quarters are a quarter each."""
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 2.0])
    found = [randomised_p(values[i], np.delete(values, i), 6 * seed + i) for seed in range(2000) for i in range(6)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)
    assert np.histogram(found, 4, (0, 1))[0] / len(found) == pytest.approx(np.full(4, 0.25), abs=0.02)


def test_holm_by_hand():
    """.01, .04, .03 -> .03, .06, .06: times 3, 2, 1 from the smallest, never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8))
def test_holm_is_between_p_and_bonferroni(values):
    for p, adjusted in zip(values, holm(values)):
        assert p <= adjusted <= min(1, len(values) * p) + 1e-12


# Statistics


def test_residual_by_hand():
    """Centred columns (1, -1) and (-1, 1), mean 0, sd 1: a student of (2, -2) has cosines 1 and -1."""
    columns = np.array([[[-1.0, -3.0]], [[-3.0, -1.0]]])
    assert residual(np.array([[-1.0, -5.0]]), columns).value() == pytest.approx([1.0, -1.0])


def test_what_all_columns_share_does_not_count():
    """A student equal to the mean column is like none of them."""
    columns = log_softmax(np.random.default_rng(0).normal(size=(5, 30, 3)))
    centred = columns - columns.mean(-1, keepdims=True)
    assert residual(centred.mean(0), columns).value() == pytest.approx(np.zeros(5), abs=1e-12)


def test_agreement_by_hand():
    found = agreement(np.array([0, 1, 2, 2]), np.array([[0, 1, 2, 0], [0, 0, 0, 0]]))
    assert found.value() == pytest.approx([0.75, 0.25])
    assert found.value(np.array([[4.0, 0, 0, 0], [0, 0, 2, 2]])) == pytest.approx(np.array([[1, 1], [0.5, 0]]))


def test_weights_of_one_change_nothing():
    student, columns = made()
    for statistic in (residual, agreement):
        rows = statistic(student[DECLARED], columns.answers[DECLARED])
        assert rows.value(np.ones((1, 60)))[0] == pytest.approx(rows.value())


def test_combined_by_hand():
    """(0, 1) and (1, 0) standardise to (-1, 1) and (1, -1); the larger is 1 twice. A constant statistic gives 0."""
    assert combined(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx([1.0, 1.0])
    assert combined(np.array([[7.0, 7.0, 7.0]])) == pytest.approx([0.0, 0.0, 0.0])
    assert effect(np.array([5.0, 1.0, 2.0, 3.0])) == pytest.approx(3.0)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["soft", "hard"]))
def test_statistics_are_symmetric_in_the_columns(order, mode):
    """Columns in another order give the same statistics in that order: what makes the rank exact."""
    from stillroom.provenance.audit.statistics import statistics_of

    student, columns = made(decoys=5, rows=20)
    moved = {name: values[list(order)] for name, values in columns.answers.items()}
    plain, turned = (
        combined(np.stack([rows.value() for rows in statistics_of(student, answers, mode)]))
        for answers in (columns.answers, moved)
    )
    assert turned == pytest.approx(plain[list(order)], abs=1e-11)


def test_a_decoy_equal_to_the_teacher_ties_with_it():
    """Equal columns tie bit by bit wherever they stand, so the tie counts against the teacher."""
    student, columns = made(decoys=19)
    for name, values in columns.answers.items():
        columns.answers[name][7] = values[0]
    for mode in ("soft", "hard"):
        assert teacher_test(student, columns, mode).p == 2 / 20


def test_every_column_as_the_teacher_rejects_no_more_than_its_share():
    """One student, each of 20 columns in turn as the candidate: at most k of 20 have p <= k/20, ties aside just k."""
    student, columns = made(taught=None)
    columns = dataclasses.replace(columns, right=np.full(20, 450))
    found = [teacher_test(student, columns.led_by(i), replicates=2).p for i in range(20)]
    assert min(found) == 1 / 20
    assert all(sum(p <= k / 20 for p in found) <= k for k in range(1, 21))


# The teacher test


def test_a_student_of_the_teacher_is_found_and_says_so():
    student, columns = made(decoys=39)
    found = teacher_test(
        student, columns, name="student S", randomise=3, inputs={DECLARED: {"sha256": "ab", "rows": 60}}
    )
    assert found.p == 1 / 40
    assert found.rejected
    assert found.randomised < 1 / 40
    value, low, high = found.effect
    assert 0 < low < value < high
    assert found.text.startswith(
        "evidence that student S learned from teacher A: p = 0.0250 (exact, 39 decoys, floor 0.0250), effect"
    )
    body = json.loads(json.dumps(found.as_json()))
    assert body["rejected"] is True
    assert body["statistic"].startswith("COMB")
    assert body["effect"].keys() == {"value", "low", "high"}
    assert body["inputs"] == {"declared": {"sha256": "ab", "rows": 60}}


def test_what_else_could_explain_it_is_said():
    found = dataclasses.replace(teacher_test(*made()), caution="both were trained under seed 3")
    assert found.text.endswith("decoy standard deviations; caution: both were trained under seed 3")


def test_a_student_of_a_decoy_is_no_evidence_and_needs_its_power():
    """The result can only be said beside the power that positives had; what it never says is checked too."""
    student, columns = made(taught=5)
    found = teacher_test(student, columns)
    assert found.p > 0.05
    with pytest.raises(UsageError, match="rejects nothing, and that says something only beside the power"):
        _ = found.text
    said = found.with_power(measured([0.05, 0.05, 0.05, 0.6], 0.05))
    assert said.text.startswith("no evidence at power 0.75 [0.30, 0.95] that the student learned from teacher A: p = ")
    assert "not distilled" not in json.dumps(said.as_json())
    assert said.as_json()["power"] == {
        "value": 0.75, "low": pytest.approx(0.3006, abs=1e-4), "high": pytest.approx(0.9544, abs=1e-4), "positives": 4
    }  # fmt: skip


def test_hard_mode_takes_class_numbers_and_looks_at_declared_inputs_only():
    student, columns = made(strength=3.0)
    labels = {name: values.argmax(-1) for name, values in student.items()}
    numbered = dataclasses.replace(columns, answers={name: v.argmax(-1) for name, v in columns.answers.items()})
    assert teacher_test(labels, numbered, "hard").p == 1 / 20
    without = {DECLARED: labels[DECLARED]}
    only = dataclasses.replace(numbered, answers={DECLARED: numbered.answers[DECLARED]})
    assert teacher_test(without, only, "hard").p == 1 / 20
    with pytest.raises(UsageError, match="with class numbers alone choose mode 'hard'"):
        teacher_test(labels, numbered, "soft")
    with pytest.raises(UsageError, match="mode 'soft' needs answers on 'fresh' inputs; given: declared"):
        teacher_test(student, dataclasses.replace(columns, answers={DECLARED: columns.answers[DECLARED]}), "soft")


def test_no_decoys_no_p():
    student, columns = made()
    alone = Columns("the endpoint's", {n: v[:1] for n, v in columns.answers.items()}, ("r",), (0,))
    found = teacher_test(student, alone, name="S")
    assert found.p is None
    assert found.adjusted is None
    assert not found.rejected
    assert found.text.endswith(f"evidence: {COMPARATIVE}")
    assert "p =" not in found.text
    assert found.as_json()["evidence"] == "comparative, no controlled error rate"
    assert found.as_json()["p"] is None


def test_candidates_are_corrected_together():
    """Two teachers at m = 39: .025 becomes .05, and too few decoys for the number of candidates are refused."""
    student, columns = made(decoys=39)
    first, second = teacher_test(student, columns), teacher_test(made(decoys=39, seed=1, taught=3)[0], columns)
    both = over_candidates([first, second])
    assert both[0].adjusted == pytest.approx(0.05)
    assert both[0].rejected
    assert "0.0500 by Holm over 2 candidates" in both[0].text
    with pytest.raises(UsageError, match="can never reach 0.05 over 2 candidate.*Make at least 39"):
        over_candidates([teacher_test(*made(decoys=19)), first])
    without = over_candidates([dataclasses.replace(first, p=None, adjusted=None), second])
    assert without[0].adjusted is None
    assert without[1].adjusted == second.p


def test_the_same_bits_again():
    student, columns = made()
    first, second = (teacher_test(student, columns, randomise=1) for _ in range(2))
    assert first == second


# Misuse


def test_decoys_of_another_recipe_are_refused():
    student, columns = made()
    mixed = dataclasses.replace(columns, recipes=("r",) * 19 + ("another recipe",))
    with pytest.raises(PairError, match="decoy of seed 19 was made by another recipe .another reci. than the teacher"):
        teacher_test(student, mixed)


def test_a_seed_counts_once():
    _, columns = made()
    with pytest.raises(PairError, match="seed 4 stands twice among teacher and decoys"):
        check_columns(dataclasses.replace(columns, seeds=(4, *range(1, 20))))


@pytest.mark.parametrize(("accuracy", "word"), [(499, "better"), (300, "worse")])
def test_a_teacher_better_or_worse_than_its_decoys_is_refused(accuracy, word):
    student, columns = made(decoys=39)
    columns.right[0] = accuracy
    with pytest.raises(PairError, match=rf"{word} than its decoys .two-sided rank p = 0.050.* are no decoys of it"):
        teacher_test(student, columns)


def test_a_rank_is_extreme_from_39_decoys_on():
    """Best by one of 40 is 2/40 = .05 and refused; best by one of 20 is .10 and not, but far above them is."""
    steps = np.arange(400, 440)
    assert "better" in accuracy_refusal(np.roll(steps, 1), 500)
    assert accuracy_refusal(np.roll(steps[:20], 1), 500) is None
    assert "better" in accuracy_refusal(np.array([495, *range(400, 419)]), 500)
    assert accuracy_refusal(np.array([439, *range(401, 440)]), 500) is None  # a decoy is as good


def test_a_surer_teacher_of_equal_accuracy_is_refused():
    """A larger network may be as often right and surer: its answers, not its accuracy, give it away."""
    student, columns = made()
    for values in columns.answers.values():
        values[0] = log_softmax(4 * values[0])
    with pytest.raises(PairError, match="the teacher's mean entropy on declared inputs is .* from their mean"):
        teacher_test(student, columns)


def test_accuracies_are_asked_for():
    student, columns = made()
    with pytest.raises(UsageError, match="give how many labelled inputs each column answers correctly"):
        teacher_test(student, dataclasses.replace(columns, right=np.empty(0)))


def test_wrong_shapes_levels_and_modes_are_refused():
    student, columns = made(decoys=18)
    with pytest.raises(UsageError, match=r"18 decoys give p >= 0.0526.*never reach 0.05 over 1 candidate.*at least 19"):
        teacher_test(student, columns)
    student, columns = made()
    with pytest.raises(UsageError, match="mode 'sharp' is unknown; choose soft or hard"):
        teacher_test(student, columns, "sharp")
    with pytest.raises(UsageError, match="the student answered 9 declared inputs, the teachers 60"):
        teacher_test({**student, DECLARED: student[DECLARED][:9]}, columns)
    cut = {**columns.answers, FRESH: columns.answers[FRESH][:4]}
    with pytest.raises(UsageError, match="fresh: 4 columns of answers for 20 recipes"):
        check_columns(dataclasses.replace(columns, answers=cut))


# The transcript test


def test_a_transcript_by_hand():
    """Two of 19 fresh transcripts are at least as likely: p = 3/20; none is: p = 1/20 and a rejection."""
    fresh = np.arange(19.0)
    assert transcript_test(16.5, fresh).p == 3 / 20
    found = transcript_test(30.0, fresh, name="S", transcript="T", randomise=0)
    assert found.p == 1 / 20
    assert found.rejected
    assert found.distance == pytest.approx(21 / fresh.std(ddof=1))
    assert found.text.startswith(
        "evidence that S learned from T: p = 0.0500 (exact, 19 fresh transcripts, floor 0.0500)"
    )
    assert json.loads(json.dumps(found.as_json()))["randomised"] < 1 / 20


def test_a_transcript_that_stands_among_the_others_needs_its_power():
    found = transcript_test(9.5, np.arange(19.0))
    with pytest.raises(UsageError, match="only beside the power of the test"):
        _ = found.text
    assert found.with_power(Power(9, 10, 0.05)).text.startswith("no evidence at power 0.90 [0.60, 0.98] that")


def test_deterministic_answers_have_no_rank():
    with pytest.raises(PairError, match="not drawn at random.*Use a committed random half-split"):
        transcript_test(1.0, np.ones(19))


def test_too_few_fresh_transcripts():
    with pytest.raises(UsageError, match=r"9 fresh transcripts give p >= 0.1000.*Draw at least 19"):
        transcript_test(1.0, np.arange(9.0))


def test_the_transcript_test_is_exact_over_all_orders():
    """Every permutation of 20 distinct likelihoods is as likely under H0: 1 in 20 rejects."""
    values = np.random.default_rng(0).normal(size=20)
    found = [transcript_test(values[i], np.delete(values, i)).rejected for i in range(20)]
    assert sum(found) == 1


def test_enumerating_small_permutations_of_columns():
    """Four columns with hand-made statistics: over all 24 orders p = 1/4 exactly a quarter of the time."""
    values = [0.3, 0.1, 0.9, 0.4]
    found = [exact_p(order[0], np.array(order[1:])) for order in itertools.permutations(values)]
    assert [found.count(k / 4) for k in (1, 2, 3, 4)] == [6, 6, 6, 6]

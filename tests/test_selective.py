"""The threshold of a cascade: its arithmetic by hand, and its guarantee in simulations where the truth is known."""

import math

import pytest
import torch
from scipy.stats import beta, binom

from stillroom.errors import DataError, UsageError
from stillroom.measures.selective import GRID, Kept, at_most, choose_threshold, keep_above


def test_the_binomial_tail_by_hand_and_against_scipy():
    """P(Bin(3, 1/2) <= 1) = 4/8; and at sizes where probabilities underflow."""
    assert at_most(1, 3, 0.5) == pytest.approx(0.5, abs=1e-15)
    assert at_most(0, 10, 0.1) == pytest.approx(0.9**10, rel=1e-13)
    assert at_most(3, 3, 0.7) == 1.0
    for wrong, of, chance in ((40, 1000, 0.05), (3, 20000, 0.001), (900, 1000, 0.95), (10, 5000, 0.05)):
        assert at_most(wrong, of, chance) == pytest.approx(binom.cdf(wrong, of, chance), rel=1e-8)


def test_the_upper_bound_is_clopper_and_pearson_s():
    """No error among 59 answers: 5 % at 95 % certainty, the known rule; in general the beta quantile."""
    assert Kept(0.5, 100, 59, 0).upper(0.05) == pytest.approx(1 - 0.05 ** (1 / 59), rel=1e-9)
    assert Kept(0.5, 100, 80, 7).upper(0.1) == pytest.approx(beta.ppf(0.9, 8, 73), rel=1e-9)
    assert Kept(0.5, 100, 5, 5).upper(0.05) == 1.0
    assert Kept(0.5, 100, 0, 0).upper(0.05) == 1.0


def test_the_grid_is_fixed_strict_to_loose_and_ends_with_everything():
    assert list(GRID) == sorted(GRID, reverse=True)
    assert GRID[-1] == 0.0
    assert GRID[0] == pytest.approx(1 / (1 + math.exp(-9)))
    confidence, wrong = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([True, True, False])
    assert keep_above(confidence, wrong, 0.6) == Kept(0.6, 3, 2, 1)


def sure(count, draw):
    """Confidences between 1/2 and 1, most of them high."""
    return 1 - torch.rand(count, generator=draw).pow(2) / 2


# true error at a confidence: honest; overconfident, and worst where it is surest; the same everywhere, just too high
ERRORS = {
    "calibrated": lambda c: 1 - c,
    "surest is worst": lambda c: torch.where(c > 0.98, 0.08, 0.02 + 0 * c),
    "just above the risk": lambda c: 0.0502 + 0 * c,
    "overconfident": lambda c: ((1 - c) * 3).clamp(max=0.9),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_the_guarantee_holds_where_the_truth_is_known(kind):
    """1,000 samples of 600: the true error among kept answers exceeds the risk in at most 5 % of them (and chance)."""
    risk, delta, trials = 0.05, 0.05, 1000
    draw = torch.Generator().manual_seed(7)
    many = sure(400_000, draw)
    truth = {t: float(ERRORS[kind](many[many >= t]).mean()) if bool((many >= t).any()) else 0.0 for t in GRID}
    broken = naive = 0
    for _ in range(trials):
        confidence = sure(600, draw)
        wrong = torch.rand(600, generator=draw) < ERRORS[kind](confidence)
        found = choose_threshold(confidence, wrong, risk, delta)
        broken += found is not None and truth[found.threshold] > risk
        kept = [k for t in GRID if (k := keep_above(confidence, wrong, t)).kept and k.wrong <= risk * k.kept]
        naive += bool(kept) and truth[min(k.threshold for k in kept)] > risk
    assert broken <= trials * delta + 3 * math.sqrt(trials * delta * (1 - delta))
    if kind == "just above the risk":
        assert naive > 0.4 * trials  # what an empirical error at most the risk would have promised


def test_with_rows_enough_most_of_what_is_safe_is_kept():
    """4,000 rows of an honest student: at least 80 % of the answers that the loosest true threshold would keep."""
    draw = torch.Generator().manual_seed(8)
    many = sure(400_000, draw)
    best = max(float((many >= t).float().mean()) for t in GRID if float((1 - many[many >= t]).mean()) <= 0.05)
    confidence = sure(4000, draw)
    found = choose_threshold(confidence, torch.rand(4000, generator=draw) < 1 - confidence, 0.05)
    assert found.share > 0.8 * best


def test_nothing_is_promised_that_the_sample_does_not_carry():
    """Twenty rows without an error carry no 5 %; a hundred and fifty do, and then everything is kept."""
    assert choose_threshold(torch.full((20,), 0.99), torch.zeros(20, dtype=torch.bool), 0.05) is None
    found = choose_threshold(torch.full((150,), 0.99), torch.zeros(150, dtype=torch.bool), 0.05)
    assert found == Kept(0.0, 150, 150, 0)
    assert choose_threshold(torch.full((150,), 0.99), torch.ones(150, dtype=torch.bool), 0.05) is None


def test_what_cannot_be_used_is_said():
    some, none = torch.tensor([0.5]), torch.tensor([False])
    for risk, delta in ((0.0, 0.05), (1.0, 0.05), (0.05, 0.0)):
        with pytest.raises(UsageError, match="give a number between 0 and 1"):
            choose_threshold(some, none, risk, delta)
    with pytest.raises(DataError, match="confidences between 0 and 1"):
        choose_threshold(torch.tensor([math.nan]), none, 0.05)
    with pytest.raises(DataError, match="one for each example"):
        choose_threshold(some, torch.tensor([False, True]), 0.05)

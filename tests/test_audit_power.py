"""Plans for audits: floors, Holm's share, the power of a rank by integral, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import UsageError
from stillroom.provenance.audit import design, exact_p, fewest, floor_of, measured, rank_power, wilson


def test_floors_and_fewest_decoys():
    """m = 19, 39, 99 reach .05, .025, .01; two candidates at .05 need 39."""
    assert [floor_of(m) for m in (19, 39, 99)] == pytest.approx([0.05, 0.025, 0.01])
    assert [fewest(0.05), fewest(0.05, 2), fewest(0.01), fewest(0.05, 3)] == [19, 39, 99, 59]


@given(st.floats(0.001, 0.9), st.integers(1, 10))
def test_the_fewest_decoys_are_enough_and_one_fewer_are_not(alpha, candidates):
    m = fewest(alpha, candidates)
    assert floor_of(m) <= alpha / candidates + 1e-12
    assert m == 1 or floor_of(m - 1) > alpha / candidates - 1e-12


def test_without_an_effect_the_power_is_the_level():
    """Exchangeable: P(p <= .05) is floor(.05 (m + 1)) / (m + 1) = .05 at m = 19 and 39, and 0 below the floor."""
    assert rank_power(0.0, 19, 0.05) == pytest.approx(0.05, abs=1e-3)
    assert rank_power(0.0, 39, 0.05) == pytest.approx(0.05, abs=1e-3)
    assert rank_power(9.0, 18, 0.05) == 0.0
    assert rank_power(9.0, 19, 0.05) == pytest.approx(1.0, abs=1e-3)


def test_the_power_is_what_a_simulation_finds():
    generator = np.random.default_rng(0)
    found = [exact_p(2.5 + generator.normal(), generator.normal(size=39)) <= 0.05 for _ in range(4000)]
    assert rank_power(2.5, 39, 0.05) == pytest.approx(np.mean(found), abs=0.02)


@given(st.floats(0, 5), st.floats(0.1, 2))
def test_a_larger_effect_has_more_power(effect, more):
    assert rank_power(effect + more, 39, 0.05) >= rank_power(effect, 39, 0.05) - 1e-9


def test_a_design_reaches_its_power():
    """A strong effect needs the fewest decoys and no more inputs; a weaker one needs more of either."""
    strong = design(6.0, measured_on=1000)
    assert (strong.decoys, strong.rows) == (19, 1000)
    assert strong.power >= 0.95
    assert strong.text.startswith("19 decoys (p can reach 0.0500; 0.05 over 1 candidate(s) needs 0.0500) and 1000")
    weak = design(2.5, measured_on=1000)
    assert weak.power >= 0.95
    assert weak.rows > 1000
    assert design(6.0, candidates=3).decoys >= 59


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effect": 0.01}, "an effect of 0.01 is too small: 8 times as many inputs and 99 decoys would not reach"),
        ({"effect": -1}, "effect -1 on 1000 inputs: both must be above 0"),
        ({"effect": 3, "alpha": 5}, "alpha is 5; it is a share between 0 and 1"),
        ({"effect": 3, "power": 1.0}, "power is 1.0; it is a share"),
        ({"effect": 3, "candidates": 0}, "candidates is 0; at least one teacher is tested"),
    ],
)
def test_impossible_designs_say_why(settings, message):
    with pytest.raises(UsageError, match=message):
        design(**settings)


def test_measured_power_has_wilsons_interval():
    """19 of 20: Wilson's 95 % interval is .764 to .991 (Newcombe 1998, by hand)."""
    power = measured([0.05] * 19 + [0.3], 0.05)
    assert power.value == 0.95
    assert power.interval == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert str(power) == "0.95 [0.76, 0.99]"
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_power_needs_a_positive():
    with pytest.raises(UsageError, match="at least one self-made positive; there are none"):
        measured([], 0.05)
    with pytest.raises(UsageError, match="3 of 2 is no share"):
        wilson(3, 2)

"""Features, maps and relations: values by hand, zero on equal inputs, invariances, gradients."""

from math import sqrt

import pytest
import torch
from torch.autograd import gradcheck

from stillroom import likeness
from stillroom.errors import ShapeError, UsageError

PLAIN = [likeness.mean_squared, likeness.normalised_mean_squared, likeness.huber, likeness.cosine]
COUPLED = [likeness.relational_distance, likeness.relational_angle, likeness.similarity_preserving]
SCALE_BLIND = [likeness.normalised_mean_squared, likeness.cosine, likeness.attention_transfer, *COUPLED]
EVERY = [*PLAIN, likeness.attention_transfer, *COUPLED]
every = pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)


def pair(measure, dtype=torch.float64):
    shape = (5, 3, 2, 2) if measure is likeness.attention_transfer else (5, 6)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("measure", "student", "teacher", "expected"),
    [
        (likeness.mean_squared, [1.0, 2.0], [0.0, 4.0], (1 + 4) / 2),
        (likeness.huber, [1.0, 2.0], [0.5, 4.0], (0.125 + 1.5) / 2),  # 0.5^2 / 2; 1 (2 - 1/2)
        (likeness.cosine, [3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        (likeness.normalised_mean_squared, [3.0, 4.0], [8.0, 6.0], (0.2**2 + 0.2**2) / 2),
        (likeness.cosine, [1.0, 0.0], [-2.0, 0.0], 2.0),
    ],
)
def test_position_by_position(measure, student, teacher, expected):
    assert measure(tensor(student), tensor(teacher)).tolist() == [pytest.approx(expected, abs=1e-15)]


def test_attention_transfer_by_hand():
    """Maps (3, 4) and (4, 3) over 1 x 2 places: squares 9:16 and 16:9, norms sqrt(337), so 2 (7 / sqrt(337))^2 / 2."""
    s, t = tensor(3.0, 4.0).reshape(1, 1, 1, 2), tensor(4.0, 3.0).reshape(1, 1, 1, 2)
    assert likeness.attention_transfer(s, t).item() == pytest.approx(49 / 337)
    two_channels = t.expand(1, 2, 1, 2)
    assert likeness.attention_transfer(s, two_channels).item() == pytest.approx(49 / 337)


def test_relational_distance_by_hand():
    """Points 0, 1, 3: distances 1, 3, 2, mean 2; points 0, 2, 4: 2, 4, 2, mean 8/3."""
    value = likeness.relational_distance(tensor([0.0], [1.0], [3.0]), tensor([0.0], [2.0], [4.0]))
    d01, d02, d12 = 1 / 2 - 3 / 4, 3 / 2 - 3 / 2, 1 - 3 / 4
    expected = [(d01**2 + d02**2) / 6, (d01**2 + d12**2) / 6, (d02**2 + d12**2) / 6]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_relational_angle_by_hand():
    """A right angle at 0 with sides 1 and 1, against the sides of an equilateral triangle: cosines 0 and 1/2."""
    s = tensor([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    t = tensor([0.0, 0.0], [1.0, 0.0], [0.5, sqrt(3) / 2])
    # at i, the pair (j, k) counts twice; the sides with themselves are 1 on both sides
    expected = [2 * 0.5**2 / 2 / 9, *[2 * (sqrt(0.5) - 0.5) ** 2 / 2 / 9] * 2]
    torch.testing.assert_close(likeness.relational_angle(s, t), torch.tensor(expected, dtype=torch.float64))


def test_similarity_preserving_by_hand():
    """S = ((1, 0), (1, 1)): rows (1, 1) / sqrt 2 and (1, 2) / sqrt 5; T = identity: rows (1, 0) and (0, 1)."""
    value = likeness.similarity_preserving(tensor([1.0, 0.0], [1.0, 1.0]), torch.eye(2, dtype=torch.float64))
    first = (1 / sqrt(2) - 1) ** 2 + 1 / 2
    second = 1 / 5 + (2 / sqrt(5) - 1) ** 2
    torch.testing.assert_close(value, torch.tensor([first / 2, second / 2], dtype=torch.float64))


@every
def test_zero_on_equal_inputs_and_never_negative(measure):
    s, t = pair(measure)
    assert measure(t, t).abs().max() < 1e-15
    assert (measure(s, t) >= 0).all()
    assert measure(s, t).shape == (5,)


@pytest.mark.parametrize("measure", SCALE_BLIND, ids=lambda f: f.__name__)
def test_blind_to_the_scale_of_each_side(measure):
    s, t = pair(measure)
    torch.testing.assert_close(measure(1e3 * s, 1e-3 * t), measure(s, t))


@pytest.mark.parametrize("measure", COUPLED[:2], ids=lambda f: f.__name__)
def test_distances_and_angles_are_blind_to_motions(measure):
    """A shift and a rotation of the student's space change no relation."""
    s, t = pair(measure)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    torch.testing.assert_close(measure(s @ turn + 7.0, t), measure(s, t))


@pytest.mark.parametrize("measure", COUPLED, ids=lambda f: f.__name__)
def test_relations_follow_the_examples(measure):
    """Reordering the batch reorders the values; widths may differ; features of any shape are flattened."""
    s, t = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(measure(s[order], t[order]), measure(s, t)[order])
    torch.testing.assert_close(measure(s, t), measure(s, t.flatten(1)))


@every
def test_gradient_is_that_of_the_value(measure):
    """Gradcheck in float64; the teacher gets none."""
    s, t = (x.requires_grad_() for x in pair(measure))
    assert gradcheck(lambda s: measure(s, t.detach()), (s,))
    measure(s, t).sum().backward()
    assert t.grad is None


@every
def test_low_precision_in_float32_out(measure):
    s, t = pair(measure, torch.bfloat16)
    value = measure(s, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), measure(s.double(), t.double()), rtol=1e-4, atol=1e-6)


@every
def test_finite_where_examples_coincide(measure):
    """Zero vectors and identical examples give finite values and gradients."""
    s, t = pair(measure)
    s[0], s[1], s[2] = 0.0, 0.0, s[3]
    s.requires_grad_()
    value = measure(s, t)
    value.sum().backward()
    assert value.isfinite().all()
    assert s.grad.isfinite().all()
    assert measure(torch.zeros_like(s), t).isfinite().all()


def test_cosine_keeps_its_digits():
    """1 - cos of vectors 1e-4 apart is 5e-9 in float32, where 1 minus the cosine would be 0."""
    s, t = torch.tensor([1.0, 1e-4]), torch.tensor([1.0, 0.0])
    assert likeness.cosine(s, t).item() == pytest.approx(5e-9, rel=1e-3)


def test_huber_is_quadratic_then_linear():
    s = tensor(0.0, 2.0, 10.0).unsqueeze(-1)
    assert likeness.huber(s, torch.zeros_like(s), delta=2.0).tolist() == [0.0, 2.0, 18.0]
    with pytest.raises(UsageError, match="delta=0"):
        likeness.huber(s, s, delta=0)


@every
def test_shapes_that_do_not_fit_show_both(measure):
    s, t = pair(measure)
    with pytest.raises(ShapeError) as caught:
        measure(s, t[:4])
    assert str(list(s.shape)) in str(caught.value)
    assert str(list(t[:4].shape)) in str(caught.value)

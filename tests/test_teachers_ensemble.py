"""An ensemble's numbers and identity, beyond what a user's own run shows."""

import dataclasses
import math

import pytest
import torch

from stillroom.errors import PairError, ShapeError, SignalError, UsageError
from stillroom.teachers import ensemble
from stillroom.types import Batch, Dense, Identity, Signal, Sparse

BATCH = Batch(("a",), {"x": torch.ones(1, 1)})


@dataclasses.dataclass(frozen=True)
class Says:
    """A model that always gives this signal."""

    signal: Signal
    identity: Identity = dataclasses.field(default_factory=lambda: Identity("says", digest="d", classes=("a", "b")))

    def __call__(self, batch):
        return self.signal


def logits(*values, **about):
    return Says(Signal(logits=Dense(torch.tensor([values]))), Identity("says", **{"digest": "d", **about}))


def test_a_mixture_and_a_product_by_hand():
    one, other = logits(math.log(0.9), math.log(0.1)), logits(math.log(0.5), math.log(0.5))
    mixture = ensemble({"one": one, "other": other}, weights={"one": 3, "other": 1})(BATCH)
    torch.testing.assert_close(mixture.logits.values.exp(), torch.tensor([[0.8, 0.2]]))
    assert set(mixture.parts) == {"one", "other"}
    product = ensemble(one, other, mean="logits")(BATCH).logits.values.softmax(-1)
    torch.testing.assert_close(product, torch.tensor([[3 / 4, 1 / 4]]))  # sqrt(.45) : sqrt(.05)


def test_certain_members_stay_finite_where_one_is_not():
    """-inf is probability 0: the mixture halves the other's probability; extreme logits do not overflow."""
    found = ensemble(logits(0.0, -math.inf), logits(1e4, 1e4))(BATCH).logits.values
    torch.testing.assert_close(found.exp(), torch.tensor([[0.75, 0.25]]))


def test_values_are_averaged():
    a, b = (Says(Signal(values=torch.tensor([[v, 2 * v]]))) for v in (1.0, 3.0))
    torch.testing.assert_close(ensemble(a, b)(BATCH).values, torch.tensor([[2.0, 4.0]]))


def test_who_it_is_follows_from_members_weights_and_mean():
    a, b = logits(0.0, 1.0, digest="a"), logits(0.0, 1.0, digest="b", licence="MIT", route="own-account")
    digests = {
        ensemble({"a": a, "b": b}).identity.digest,
        ensemble({"a": a, "b": b}, weights={"a": 2, "b": 1}).identity.digest,
        ensemble({"a": a, "b": b}, mean="logits").identity.digest,
        ensemble({"a": b, "b": a}).identity.digest,
    }
    assert len(digests) == 4
    assert None not in digests
    identity = ensemble({"a": a, "b": b}).identity
    assert [part.digest for part in identity.parts] == ["a", "b"]
    assert (identity.licence, identity.route) == ("MIT AND unknown", "unknown")
    assert ensemble(a, a).identity.route == "local-weights"
    assert ensemble(a, lambda batch: a(batch)).identity.digest is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ensemble(logits(0.0)), UsageError, "two members"),
        (lambda: ensemble(logits(0.0), logits(0.0), mean="median"), UsageError, "median"),
        (lambda: ensemble(logits(0.0), logits(0.0), weights={"a": 1}), UsageError, r"\['a'\]"),
        (
            lambda: ensemble(logits(0.0, 0.0, classes=("a", "b")), logits(0.0, 0.0, classes=("b", "a"))),
            PairError,
            r"\('a', 'b'\).*\('b', 'a'\)",
        ),
        (lambda: ensemble(logits(0.0), logits(0.0, 0.0))(BATCH), ShapeError, r"\[\[1, 1\], \[1, 2\]\]"),
        (lambda: ensemble(logits(0.0), Says(Signal(values=torch.ones(1, 1))))(BATCH), SignalError, "different things"),
        (
            lambda: ensemble(
                logits(0.0), Says(Signal(logits=Sparse(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), 1)))
            )(BATCH),
            (SignalError, PairError),
            "Sparse|differently",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()

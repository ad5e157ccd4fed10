"""What is kept is what was said, up to the rounding that was asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recording_fakes import Rows, Teacher, linear
from stillroom.divergences import forward_kl
from stillroom.errors import SignalError, UsageError
from stillroom.recording import Everything, Features, Sampled, TopK, record
from stillroom.recording.codec import decode, encode
from stillroom.types import Dense, Projected, Signal, Sparse


def keys(count, view=-1):
    return [(f"row-{number}", view) for number in range(count)]


def there_and_back(codecs, signal, count):
    kept = encode(codecs, signal, keys(count))
    assert all(len(rows) == count for rows in kept.rows.values())
    return decode(codecs, kept.rows, kept.facts)


@st.composite
def logit_tables(draw):
    """[B, V] or [B, T, V] of any size of numbers, some -inf, never a whole row of them."""
    shape = draw(
        st.tuples(st.integers(1, 4), st.integers(2, 9)) | st.tuples(*[st.integers(1, 4)] * 2, st.integers(2, 9))
    )
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.01, 1.0, 30.0, 1000.0]))
    impossible = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    impossible[..., 0] = False
    return values.masked_fill(impossible, -torch.inf)


@given(logit_tables())
@settings(deadline=None, max_examples=60)
def test_everything_returns_the_logits_bit_for_bit(values):
    signal = there_and_back((Everything(),), Signal(logits=Dense(values)), len(values))
    assert torch.equal(signal.logits.values, values)


@given(logit_tables(), st.data())
@settings(deadline=None, max_examples=60)
def test_top_k_keeps_the_largest_and_all_of_the_mass(values, data):
    k = data.draw(st.integers(1, values.shape[-1]))
    kept = there_and_back((TopK(k),), Signal(logits=Dense(values)), len(values)).logits
    exact = values.double().log_softmax(-1)
    assert torch.allclose(
        kept.log_probs.double(), exact.sort(-1, descending=True).values[..., :k], atol=1e-4, rtol=1e-6
    )
    assert torch.allclose(kept.log_probs.double(), exact.gather(-1, kept.ids), atol=1e-4, rtol=1e-6)
    total = torch.logaddexp(kept.log_probs.double().logsumexp(-1), kept.rest.double())
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-5)
    assert kept.vocabulary == values.shape[-1]
    assert (kept.rest == -torch.inf).all() or k < values.shape[-1]


def test_top_k_with_k_equal_to_v_is_the_dense_log_softmax():
    values = torch.randn(5, 3, 11)
    kept = there_and_back((TopK(11),), Signal(logits=Dense(values)), 5).logits
    dense = torch.empty(5, 3, 11).scatter(-1, kept.ids, kept.log_probs)
    assert torch.equal(dense, values.log_softmax(-1))
    assert (kept.rest == -torch.inf).all()


def test_the_tail_is_summed_for_itself_and_not_as_one_minus_the_kept():
    """A tail of 1e-12 would vanish in float32 as 1 - sum(kept)."""
    values = torch.tensor([[0.0, math.log(1e-12), -torch.inf]])
    kept = there_and_back((TopK(1),), Signal(logits=Dense(values)), 1).logits
    assert kept.rest.item() == pytest.approx(math.log(1e-12), rel=1e-6)


@pytest.mark.parametrize("codec", [TopK(9), TopK(9, "float16")])
def test_k_larger_than_the_vocabulary_is_wrong_use_and_shows_both_numbers(codec):
    with pytest.raises(UsageError, match=r"TopK\(9\).*8 logits") as caught:
        codec.encode(Signal(logits=Dense(torch.zeros(2, 8))), keys(2))
    assert caught.value.exit_code == 2


def test_top_k_of_a_sparse_teacher_moves_what_is_cut_into_the_tail():
    dense = torch.randn(4, 20)
    eight = there_and_back((TopK(8),), Signal(logits=Dense(dense)), 4)
    three = there_and_back((TopK(3),), eight, 4).logits
    straight = there_and_back((TopK(3),), Signal(logits=Dense(dense)), 4).logits
    assert torch.equal(three.ids, straight.ids)
    assert torch.allclose(three.rest, straight.rest, atol=1e-6)
    with pytest.raises(UsageError, match="8 entries"):
        there_and_back((TopK(9),), eight, 4)


def test_projected_logits_are_computed_for_every_codec():
    projected = Projected(torch.randn(3, 4, 5), torch.randn(12, 5), softcap=10.0)
    dense = Signal(logits=Dense(projected.compute()))
    for codec in (Everything(), TopK(4), Sampled(3)):
        ours = there_and_back((codec,), Signal(logits=projected), 3).logits
        theirs = there_and_back((codec,), dense, 3).logits
        for name in ("values",) if isinstance(ours, Dense) else ("ids", "log_probs", "rest"):
            assert torch.allclose(getattr(ours, name).float(), getattr(theirs, name).float(), atol=1e-5)


def test_every_kind_of_signal_survives_everything():
    """Values, features (whole numbers too), sparse logits, and parts whose names hold slashes."""
    sparse = Sparse(torch.tensor([[4, 1]] * 2), torch.log(torch.tensor([[0.5, 0.25]] * 2)), torch.tensor([-1.4] * 2), 9)
    signal = Signal(
        values=torch.randn(2, 3),
        features={"layers.1/out": torch.randn(2, 4, 5), "tokens": torch.tensor([[1, 2], [3, 4]])},
        parts={
            "lab/model-a": Signal(logits=sparse),
            "b": Signal(values=torch.ones(2, 1), features={"h": torch.ones(2)}),
        },
    )
    back = there_and_back((Everything(),), signal, 2)
    assert back.given == signal.given
    assert torch.equal(back.values, signal.values)
    for name, tensor in signal.features.items():
        assert torch.equal(back.features[name], tensor)
        assert back.features[name].dtype == tensor.dtype
    part = back.parts["lab/model-a"].logits
    assert (part.vocabulary, part.sampled) == (9, False)
    assert torch.equal(part.ids, sparse.ids)
    assert torch.equal(part.log_probs, sparse.log_probs)
    assert torch.equal(part.rest, sparse.rest)
    assert torch.equal(back.parts["b"].features["h"], torch.ones(2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_everything_rounds_to_the_smaller_type_and_answers_in_float32(dtype):
    values = torch.randn(3, 7)
    back = there_and_back((Everything(dtype),), Signal(logits=Dense(values)), 3).logits.values
    assert back.dtype == torch.float32
    assert torch.equal(back, values.to(getattr(torch, dtype)).float())


def test_a_number_beyond_float16_names_the_example_instead_of_becoming_infinite():
    values = torch.tensor([[1.0], [7e4]])
    with pytest.raises(SignalError, match=r"'row-1'.*7e\+04.*float16"):
        there_and_back((Everything("float16"),), Signal(values=values), 2)


def test_a_mask_value_far_below_float16_stays_probability_zero():
    values = torch.tensor([[0.0, 1.0, torch.finfo(torch.float32).min]])
    back = there_and_back((Everything("float16"),), Signal(logits=Dense(values)), 1).logits.values
    assert torch.equal(back.softmax(-1)[:, 2], torch.zeros(1))


def test_top_k_and_features_are_kept_side_by_side():
    signal = Signal(
        logits=Dense(torch.randn(3, 9)), values=torch.ones(3, 1), features={"a": torch.randn(3, 2), "b": torch.ones(3)}
    )
    back = there_and_back((TopK(2), Features(("a",), "bfloat16")), signal, 3)
    assert back.given == ("logits", "features['a']")
    assert torch.equal(back.features["a"], signal.features["a"].bfloat16().float())


def test_two_codecs_for_the_same_thing_are_refused():
    signal = Signal(logits=Dense(torch.randn(3, 9)))
    with pytest.raises(UsageError, match="two of them keep \\['logits'\\]"):
        encode((Everything(), TopK(2)), signal, keys(3))


def test_a_feature_that_is_not_given_is_named_with_its_nearest():
    with pytest.raises(SignalError, match="did you mean 'layer1'"):
        encode((Features(("layer2",)),), Signal(features={"layer1": torch.ones(1)}), keys(1))


def test_a_teacher_without_anything_to_keep_is_told_so():
    with pytest.raises(SignalError, match="the teacher gives \\['text'\\]"):
        encode((Everything(),), Signal(text=("yes",)), keys(1))


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: Sampled(0), lambda: TopK(True), lambda: Sampled(2, seed=-1)])
def test_counts_and_seeds_out_of_range_are_refused(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("make", [lambda: Everything("float8"), lambda: TopK(2, "bfloat16"), lambda: Features(())])
def test_unknown_types_and_empty_names_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_draws_do_not_depend_on_the_batch_but_on_seed_id_and_view():
    values = torch.randn(6, 3, 40)
    whole = encode((Sampled(5),), Signal(logits=Dense(values)), keys(6)).rows
    for row in range(6):
        alone = encode((Sampled(5),), Signal(logits=Dense(values[row : row + 1])), keys(6)[row : row + 1]).rows
        assert torch.equal(alone["logits.ids"][0], whole["logits.ids"][row])
    for other in (encode((Sampled(5, seed=1),), Signal(logits=Dense(values)), keys(6)),
                  encode((Sampled(5),), Signal(logits=Dense(values)), keys(6, view=0))):  # fmt: skip
        assert not torch.equal(other.rows["logits.ids"], whole["logits.ids"])


def test_the_frequency_of_draws_is_the_teachers_probability():
    """Every id's frequency over 40,000 draws lies within 4.5 standard errors sqrt(p (1 - p) / n) of p.

    40 ids at 4.5 deviations: a right sampler fails with probability 3e-4, and the seeds are fixed.
    """
    logits = torch.randn(40) * 1.5
    logits[7] = -torch.inf
    count, n = 400, 100
    kept = there_and_back((Sampled(n),), Signal(logits=Dense(logits.expand(count, 40))), count).logits
    assert kept.sampled
    p = logits.double().softmax(-1)
    frequency = torch.bincount(kept.ids.flatten(), minlength=40).double() / (count * n)
    error = (p * (1 - p) / (count * n)).sqrt()
    assert ((frequency - p).abs() <= 4.5 * error).all()
    assert frequency[7] == 0
    assert torch.allclose(kept.log_probs, logits.log_softmax(-1)[kept.ids])


def test_forward_kl_of_draws_is_unbiased():
    """The mean over 2,000 examples lies within 4 standard errors of the exact KL."""
    teacher, student = torch.randn(30), torch.randn(30)
    count = 2000
    kept = there_and_back((Sampled(8),), Signal(logits=Dense(teacher.expand(count, 30))), count).logits
    found = forward_kl(student.expand(count, 30), kept).double()
    exact = forward_kl(student, teacher).double()
    assert (found.mean() - exact).abs() <= 4 * found.std() / count**0.5


def test_draws_and_top_k_refuse_each_others_answers():
    draws = there_and_back((Sampled(4),), Signal(logits=Dense(torch.randn(2, 9))), 2)
    with pytest.raises(SignalError, match="no largest entries"):
        there_and_back((TopK(2),), draws, 2)
    with pytest.raises(SignalError, match="draws from all logits"):
        there_and_back((Sampled(2),), draws, 2)


def test_a_vocabulary_of_262144_is_kept_whole(tmp_path):
    """Caches of 16- or 17-bit ids end at 65,536 or 131,072; the largest vocabularies do not."""
    size = 262_144
    top = torch.tensor([size - 1, 131_072, 65_536, 0])

    def answer(x):
        return Signal(logits=Dense(torch.zeros(len(x), size).index_fill(-1, top, 20.0) - torch.arange(size) / size))

    examples = Rows.make(3)
    for codec in (TopK(4), Sampled(6), Everything("bfloat16")):
        folder = tmp_path / type(codec).__name__
        kept = record(Teacher(answer), examples, folder, codec, progress=False)(examples.batch([2, 0])).logits
        assert kept.vocabulary == size
        if isinstance(codec, TopK):
            assert kept.ids[0].tolist() == sorted(top.tolist())
        if isinstance(codec, Sampled):
            assert kept.ids.max() >= 65_536


def test_recorded_codecs_answer_as_encoded(tmp_path):
    """Through the files: every codec gives from disk what it gave in memory, whatever the batch."""
    examples = Rows.make(23)
    teacher = Teacher(linear(classes=12))
    for number, codec in enumerate((Everything(), Everything("float16"), TopK(5), TopK(12, "float16"), Sampled(7))):
        recording = record(teacher, examples, tmp_path / str(number), codec, batch_size=4, shard_rows=9, progress=False)
        order = [22, 0, 9, 8, 17, 3]
        batch = examples.batch(order)
        ours = recording(batch).logits
        kept = codec.encode(teacher(batch), [(name, -1) for name in batch.ids])
        theirs = codec.decode(kept.rows, kept.facts).logits
        for name in ("values",) if isinstance(ours, Dense) else ("ids", "log_probs", "rest"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), codec

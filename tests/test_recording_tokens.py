"""Recordings of language models: packed levels, hidden states with the head kept once."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recording_fakes import Rows, Teacher, again, digest_files
from stillroom.divergences import forward_kl
from stillroom.errors import RecordingError, SignalError, UsageError
from stillroom.recording import Hidden, TopK, open_recording, record
from stillroom.recording.codec import decode, encode, prepare
from stillroom.recording.packing import pack, pack_sorted, unpack, unpack_sorted, width_of
from stillroom.recording.ragged import OFFSETS
from stillroom.types import Dense, Projected, Signal

VOCABULARY, WIDTH, POSITIONS = 300, 16, 12


def head(bias=True, seed=3, **rest):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw)
    return {"weight": weight, "bias": torch.randn(VOCABULARY, generator=draw) if bias else None, **rest}


def causal(**rest):
    """A teacher of rows [B, 6] with Projected logits at POSITIONS positions."""
    mix = torch.randn(POSITIONS, WIDTH, 6, generator=torch.Generator().manual_seed(5))
    about = head(**rest)
    # summed by hand, so that a row's answer does not depend on its batch
    return Teacher(lambda x: Signal(logits=Projected((x[:, None, None, :] * mix).sum(-1), **about)))


def keys(count):
    return [(f"row-{number}", -1) for number in range(count)]


def there_and_back(codec, signal, count):
    once = prepare((codec,), signal)
    kept = encode((codec,), signal, keys(count), once)
    assert all(
        len(rows) - name.endswith(OFFSETS) == count
        for name, rows in kept.rows.items()
        if name + OFFSETS not in kept.rows
    )
    return decode((codec,), kept.rows, json.loads(json.dumps(kept.facts)), once)


@given(st.integers(1, 32), st.integers(0, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_numbers_of_every_width_come_back(width, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, count)
    packed = pack(values, width)
    assert len(packed) == -(-count * width // 8)
    assert np.array_equal(unpack(packed, count, width), values)


def test_bits_lie_from_the_lowest_on():
    """By hand: 1, 2, 5 in 3 bits are 100 010 101 from the lowest bit, so 0b01010001 and 0b1."""
    assert pack(np.array([1, 2, 5]), 3).tolist() == [0b01010001, 0b1]
    assert pack(np.array([0x1234]), 16).tolist() == [0x34, 0x12]


@given(st.integers(1, 90), st.lists(st.integers(0, 89)))
@settings(deadline=None)
def test_sorted_numbers_come_back_from_their_bitmap(below, numbers):
    values = np.sort(np.array([number % below for number in numbers], dtype=np.int64))
    packed = pack_sorted(values, below)
    assert len(packed) == -(-(len(values) + below) // 8)
    assert np.array_equal(unpack_sorted(packed, len(values)), values)


def test_width_is_the_logarithm_of_the_vocabulary():
    assert [width_of(v) for v in (1, 2, 3, 256, 257, 49_152, 65_536, 65_537, 262_144, 2**31)] == [
        *(1, 1, 2, 8, 9, 16, 16, 17, 18, 31)
    ]


@pytest.mark.parametrize("vocabulary", [2**16 + 9, 2**17 + 3, 262_144])
def test_ids_beyond_16_and_17_bits_are_kept(vocabulary):
    """Formats of others stop at 2**16 or 2**17 ids."""
    values = torch.zeros(2, 3, vocabulary)
    top = torch.tensor([vocabulary - 1, 2**16, 7, 0])
    values[..., top] = torch.tensor([9.0, 8.0, 7.0, 6.0]) + 8
    found = there_and_back(TopK(4, bits=6), Signal(logits=Dense(values)), 2).logits
    assert found.ids.tolist() == [[top.tolist()] * 3] * 2
    assert found.vocabulary == vocabulary


@given(st.integers(2, 60), st.integers(4, 8), st.sampled_from([0.1, 2.0, 30.0]), st.integers(0, 2**32 - 1), st.data())
@settings(deadline=None, max_examples=60)
def test_packed_top_k_keeps_the_ids_and_the_levels(vocabulary, bits, spread, seed, data):
    """Every kept probability lies within half a level of its fourth root, up to the common scale; the sum is 1."""
    k = data.draw(st.integers(1, vocabulary))
    values = spread * torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed))
    exact = values.double().log_softmax(-1)
    found = there_and_back(TopK(k, bits=bits), Signal(logits=Dense(values)), 2).logits
    assert found.ids.shape == (2, 5, k)
    assert torch.equal(found.ids.sort(-1).values, exact.topk(k).indices.sort(-1).values)
    total = torch.logaddexp(found.log_probs.logsumexp(-1), found.rest)
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-5)
    assert (found.rest == -torch.inf).all() or k < vocabulary
    roots = (exact.gather(-1, found.ids) / 4).exp()
    middles = 1 - (((1 - roots) * 2**bits).floor().clamp(max=2**bits - 1) + 0.5) / 2**bits
    expected = (4 * middles.log()).log_softmax(-1)
    assert torch.allclose(found.log_probs.double().log_softmax(-1), expected, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_hidden_states_come_back_within_half_a_step(bits):
    hidden = torch.randn(3, 7, 10) * torch.logspace(-3, 3, 10)
    signal = Signal(logits=Projected(hidden, torch.randn(20, 10), softcap=30.0, scale=0.5))
    found = there_and_back(Hidden(bits), signal, 3).logits
    spans = (hidden.amax(1) - hidden.amin(1)).unsqueeze(1)
    error = (found.hidden - hidden).abs() / spans.clamp_min(1e-9)
    assert error.max() < (1e-3 if bits == 16 else 0.51 / (2**bits - 1) + 1e-3)
    assert (found.softcap, found.scale) == (30.0, 0.5)
    assert torch.equal(found.weight, signal.logits.weight)
    assert found.bias is None


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4)])
def test_hidden_states_of_any_shape_of_positions(shape):
    hidden = torch.randn(5, *shape)
    found = there_and_back(Hidden(8), Signal(logits=Projected(hidden, torch.randn(9, 4))), 5).logits
    assert torch.allclose(found.hidden, hidden, atol=0.05)


def test_the_head_is_kept_once_and_the_answers_are_the_teachers(tmp_path):
    teacher, examples = causal(softcap=20.0), Rows.make(20)
    found = again(teacher, examples, tmp_path, Hidden(8))
    batch = examples.batch([3, 17, 4])
    ours, theirs = found(batch).logits, teacher(batch).logits
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert float(forward_kl(ours, theirs).max()) < 1e-2
    assert found.manifest["fidelity"]["kl"] < 1e-3
    assert (tmp_path / "once.safetensors").stat().st_size == found.manifest["once"]["bytes"]
    shards = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert shards < 20 * (POSITIONS * WIDTH + 4 * WIDTH + 60) + 3 * 1200


def test_another_batch_size_gives_the_same_answers(tmp_path):
    """No scale depends on what else was asked, nor in which order."""
    for codec in (Hidden(6), TopK(9, bits=5)):
        place = tmp_path / type(codec).__name__
        one = record(causal(), Rows.make(20), place / "a", codec, batch_size=7, progress=False)
        other = record(causal(), Rows.make(20), place / "b", codec, batch_size=20, progress=False)
        batch = Rows.make(20).batch([19, 0, 7])
        for row in range(3):
            single = other(Rows.make(20).batch([[19, 0, 7][row]])).logits
            name = "hidden" if isinstance(codec, Hidden) else "log_probs"
            assert torch.equal(getattr(one(batch).logits, name)[row], getattr(single, name)[0])


def test_a_lost_or_damaged_head_is_found_and_written_anew(tmp_path):
    examples = Rows.make(20)
    again(causal(), examples, tmp_path, Hidden(8))
    whole = digest_files(tmp_path)
    path = tmp_path / "once.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"once\.safetensors is damaged"):
        open_recording(tmp_path)(examples.batch([0]))
    path.unlink()
    with pytest.raises(RecordingError, match=r"once\.safetensors is missing"):
        open_recording(tmp_path)
    again(causal(), examples, tmp_path, Hidden(8))
    assert digest_files(tmp_path) == whole


def test_hidden_needs_projected_logits():
    with pytest.raises(SignalError, match=r"Hidden\(bits=8\).*gives Dense logits"):
        there_and_back(Hidden(), Signal(logits=Dense(torch.zeros(2, 3, 5))), 2)


@pytest.mark.parametrize("codec", [Hidden(8), TopK(4, bits=6)])
def test_nan_is_refused_before_it_is_packed(tmp_path, codec):
    broken = causal()
    teacher = Teacher(lambda x: broken.answer(torch.where(x[:, :1] == x[:, :1].amax(), torch.nan, x)))
    with pytest.raises(SignalError, match=r"for example 'row-\d' hold NaN"):
        again(teacher, Rows.make(9), tmp_path, codec)


@pytest.mark.parametrize("make", [lambda: Hidden(5), lambda: TopK(4, bits=3), lambda: TopK(4, bits=9)])
def test_bits_that_there_are_not_are_refused(make):
    with pytest.raises(UsageError, match="bits must be"):
        make()


def test_an_empty_batch_has_the_shapes_of_a_full_one(tmp_path):
    for codec in (Hidden(6), TopK(9, bits=5)):
        found = again(causal(), Rows.make(6), tmp_path / type(codec).__name__, codec)
        assert found(Rows.make(6).batch([])).logits.shape == (0, POSITIONS)


def test_packed_top_k_is_close_to_the_teacher(tmp_path):
    teacher, examples = causal(), Rows.make(20)
    plain = again(teacher, examples, tmp_path / "plain", TopK(32)).manifest["fidelity"]
    packed = again(teacher, examples, tmp_path / "packed", TopK(32, bits=8)).manifest["fidelity"]
    assert packed["total_variation"] < plain["total_variation"] + 0.01

"""Positions that keep as much as they need: Likely, packed and entropy-coded, and draws kept once each."""

import errno
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recording_fakes import Rows, Teacher, again, digest_files
from stillroom.divergences import forward_kl
from stillroom.errors import MissingExtraError, RecordingError, SignalError, UsageError
from stillroom.recording import Likely, Sampled, TopK, coding, open_recording, record
from stillroom.recording.levels import Entries, to_entries
from stillroom.recording.ragged import append, lay, split
from stillroom.types import Dense, Signal, Sparse
from test_recording_tokens import causal, there_and_back

SORTS = [Likely(0.01, at_most=40), Likely(0.01, at_most=40, coded=True), Sampled(7, bits=0), Sampled(7, bits=6)]
RAGGED = pytest.mark.parametrize("codec", SORTS, ids=["packed", "coded", "draws", "draws with levels"])


class Interrupted(Exception):
    pass


def logits(vocabulary, *shape, spread=2.0, seed=0):
    return spread * torch.randn(*shape, vocabulary, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.lists(st.integers(0, 255))))
def test_rows_of_any_lengths_come_back(rows):
    arrays = lay("a", [np.array(row, np.uint8) for row in rows])
    assert [row.tolist() for row in split(arrays, "a")] == rows
    halves = [lay("a", [np.array(row, np.uint8) for row in part]) for part in (rows[:2], rows[2:])]
    joined = append({name: [half[name] for half in halves] for name in arrays})
    assert all(torch.equal(joined[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("coded", [False, True])
@given(
    vocabulary=st.integers(3, 80),
    bits=st.integers(4, 8),
    least=st.sampled_from([0.0, 0.003, 0.02, 0.9]),
    spread=st.sampled_from([0.0, 1.0, 4.0, 40.0]),
    positions=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_likely_keeps_what_is_likely_and_all_of_the_mass(coded, vocabulary, bits, least, spread, positions, seed, data):
    at_most = data.draw(st.integers(1, vocabulary - 1))
    values = logits(vocabulary, 2, positions, spread=spread, seed=seed)
    found = there_and_back(Likely(least, at_most, bits, coded), Signal(logits=Dense(values)), 2).logits
    exact = values.log_softmax(-1)
    top = exact.topk(at_most).values
    wanted = (top >= np.log(max(least, 1e-300))).sum(-1).clamp_min(1)
    here = found.log_probs > -torch.inf
    assert torch.equal(here.sum(-1), wanted)
    smallest = exact.gather(-1, found.ids).masked_fill(~here, torch.inf).amin(-1)
    assert torch.equal(smallest, top.gather(-1, wanted.unsqueeze(-1) - 1).squeeze(-1))
    total = torch.logaddexp(found.log_probs.logsumexp(-1), found.rest)
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-5)
    assert found.ids.shape[-1] < vocabulary
    kept = torch.zeros(2, positions, vocabulary).scatter_add(-1, found.ids, here.float())
    assert kept.max() == 1
    assert torch.equal(found.ids[~here], found.ids[..., :1].expand_as(found.ids)[~here])


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_the_coder_returns_entries_it_was_not_made_for(seed, positions, most):
    """Levels, counts, ids and odds that the tables never saw; sets larger than one run; positions without order."""
    draw = np.random.default_rng(seed)

    def entries(count):
        counts = draw.integers(1, most + 1, count)
        ids = np.concatenate([draw.choice(100, size, replace=False) for size in counts])
        levels = draw.integers(0, draw.integers(1, 65), len(ids))
        order = np.lexsort((ids, levels, np.repeat(np.arange(count), counts)))
        return Entries(counts, levels[order], ids[order], draw.integers(0, 256, count).astype(np.uint8))

    tables = coding.make_tables([entries(3)], 6, 100)
    row = entries(positions)
    packed = coding.write(row, 6, tables)
    found = coding.read(packed, positions, 6, {name: table.float() for name, table in tables.items()})
    for name in ("counts", "levels", "ids", "odds"):
        assert np.array_equal(getattr(found, name), getattr(row, name)), name


def test_a_set_is_written_in_the_bits_of_a_set():
    """256 positions of 8 of 64 equally likely ids on one level: log2 C(64, 8) = 32 bits, as a list 48."""
    ids = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(n))[:8] for n in range(256)])
    rows = to_entries(ids, torch.full((256, 8), -2.2), torch.full((256,), -2.0), 6)
    size = len(coding.write(rows, 6, coding.make_tables([rows], 6, 64)))
    assert 32.0 * 256 / 8 < size < 35.5 * 256 / 8


@pytest.mark.parametrize("coded", [False, True])
def test_a_vocabulary_of_262_144(coded):
    values = logits(262_144, 1, 3, spread=3.0)
    found = there_and_back(Likely(0.001, coded=coded), Signal(logits=Dense(values)), 1).logits
    best = values.log_softmax(-1).max(-1)
    assert found.log_probs.amax(-1).sub(best.values).abs().max() < 0.2
    assert bool((found.ids == best.indices[..., None]).any(-1).all())


@RAGGED
def test_recorded_and_read_in_any_order_and_batch(tmp_path, codec):
    examples = Rows.make(20)
    one = again(causal(), examples, tmp_path / "one", codec)
    assert one.manifest["signals"].popitem()[1] == {"dtype": "uint8", "shape": None}
    order = [19, 0, 7, 8, 3, 12]
    together = one(examples.batch(order)).logits
    for row, number in enumerate(order):
        alone = one(examples.batch([number])).logits
        width = min(together.ids.shape[-1], alone.ids.shape[-1])
        assert torch.equal(together.ids[row, :, :width], alone.ids[0, :, :width])
        assert torch.equal(together.log_probs[row, :, :width], alone.log_probs[0, :, :width])
        assert torch.equal(together.rest[row], alone.rest[0])
    assert one(examples.batch([])).logits.shape == (0, 12)


@RAGGED
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6])
def test_stopped_at_any_call_it_resumes_to_the_same_bytes(tmp_path, codec, calls):
    teacher, count = causal(), [0]

    def limited(x):
        count[0] += 1
        if count[0] > calls:
            raise Interrupted
        return teacher.answer(x)

    again(teacher, Rows.make(20), tmp_path / "whole", codec)
    with pytest.raises(Interrupted):
        again(Teacher(limited), Rows.make(20), tmp_path / "cut", codec)
    again(teacher, Rows.make(20), tmp_path / "cut", codec)
    assert digest_files(tmp_path / "cut") == digest_files(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The third shard finds no room: what was there stays whole, and recording goes on when there is room."""
    import stillroom.recording.shards as shards

    codec, real, written = SORTS[1], shards.write_bytes, []

    def full(path, content):
        if path.name == "00002.safetensors":
            path.with_name(path.name + ".tmp").write_bytes(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        real(path, content)

    again(causal(), Rows.make(20), tmp_path / "whole", codec)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_bytes", full)
        with pytest.raises(RecordingError, match=r"00002\.safetensors could not be written \(No space left"):
            again(causal(), Rows.make(20), tmp_path / "cut", codec)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    kept = (tmp_path / "cut" / "shards" / "00001.safetensors").stat().st_mtime_ns
    again(causal(), Rows.make(20), tmp_path / "cut", codec)
    assert (tmp_path / "cut" / "shards" / "00001.safetensors").stat().st_mtime_ns == kept
    assert digest_files(tmp_path / "cut") == digest_files(tmp_path / "whole")


def test_without_constriction_the_extra_is_named(tmp_path, monkeypatch):
    found = again(causal(), Rows.make(6), tmp_path, SORTS[1])
    batch = Rows.make(6).batch([0])
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(MissingExtraError, match=r"stillroom\[compact\]"):
        Likely(coded=True)
    with pytest.raises(MissingExtraError, match=r"reading this recording.*stillroom\[compact\]"):
        found(batch)
    assert Likely().coded is False


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Likely(1.0), "least is a probability"),
        (lambda: Likely(at_most=0), "at_most must be"),
        (lambda: Likely(bits=2), "bits must be"),
        (lambda: Sampled(3, bits=3), "bits must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()


def test_a_sparse_teacher_has_nothing_to_choose_from():
    teacher = Sparse(torch.tensor([[1, 2]]), torch.log(torch.tensor([[0.5, 0.3]])), torch.log(torch.tensor([0.2])), 9)
    with pytest.raises(SignalError, match="gives Sparse ones. Keep TopK"):
        there_and_back(Likely(), Signal(logits=teacher), 1)


@RAGGED
def test_nan_of_a_half_precision_teacher_is_named(tmp_path, codec):
    healthy = causal()

    def overflowing(x):
        answer = healthy.answer(x).logits.compute().half()
        answer += torch.where(x[:, :1, None] == x[:, 0].amax(), torch.inf, 0.0).half()
        return Signal(logits=Dense(answer))

    with pytest.raises(SignalError, match=r"for example 'row-\d+' hold NaN"):
        again(Teacher(overflowing), Rows.make(9), tmp_path, codec)


def test_packed_draws_are_the_draws():
    values = logits(50, 4, 6)
    plain = there_and_back(Sampled(9, seed=3), Signal(logits=Dense(values)), 4).logits
    packed = there_and_back(Sampled(9, seed=3, bits=6), Signal(logits=Dense(values)), 4).logits
    ids = there_and_back(Sampled(9, seed=3, bits=0), Signal(logits=Dense(values)), 4).logits
    order = plain.ids.sort(-1)
    for found in (packed, ids):
        assert found.sampled
        assert torch.equal(found.ids, order.values)
    assert (packed.log_probs - plain.log_probs.gather(-1, order.indices)).abs().max() < 0.4
    drawn = (order.values[..., None] == order.values[..., None, :]).sum(-1)
    assert torch.allclose(ids.log_probs, (drawn / 9).log())


def test_draws_without_log_probabilities_have_the_same_gradient():
    values, student = logits(50, 4, 6), torch.randn(4, 6, 50, requires_grad=True)
    gradients = []
    for bits in (None, 0, 5):
        teacher = there_and_back(Sampled(9, bits=bits), Signal(logits=Dense(values)), 4).logits
        gradients.append(torch.autograd.grad(forward_kl(student, teacher).sum(), student)[0])
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-6)


def test_a_recording_is_read_from_its_description_alone(tmp_path):
    """docs/formats.md, with nothing but numpy and safetensors."""
    from safetensors.numpy import load_file

    recording = again(causal(), Rows.make(6), tmp_path, Likely(0.01, at_most=40, bits=5))
    about = json.loads((tmp_path / "manifest.json").read_text())["facts"]["logits"]
    shard = load_file(tmp_path / "shards" / "00000.safetensors")
    (positions,), width, levels = about["positions"], int(np.ceil(np.log2(about["vocabulary"]))), 2**5
    start, stop = shard["logits.packed.offsets"][2:4]
    row = shard["logits.packed"][start:stop]
    entries, row = int.from_bytes(row[:4].tobytes(), "little"), row[4:]
    bitmap = -(-(positions * levels + entries) // 8)
    ones = np.flatnonzero(np.unpackbits(row[:bitmap], bitorder="little")) - np.arange(entries)
    bits = np.unpackbits(row[bitmap:-positions], bitorder="little")[: entries * width].reshape(entries, width)
    ids = bits.astype(np.int64) @ (1 << np.arange(width))
    odds = (row[-positions:].astype(float) - 128) * 12 / 127
    found = recording(Rows.make(6).batch([2])).logits
    for position in range(positions):
        here = ones // levels == position
        p = (1 - (ones[here] % levels + 0.5) / levels) ** 4
        p *= 1 / (1 + np.exp(odds[position])) / p.sum()
        assert found.ids[0, position, : here.sum()].tolist() == ids[here].tolist()
        assert np.allclose(found.log_probs[0, position, : here.sum()].exp().numpy(), p, rtol=1e-5)
        assert np.isclose(found.rest[0, position].exp().item(), 1 - p.sum(), rtol=1e-4)


# Defects of another library's formats, as they were found (research notes): none may happen here.


@pytest.mark.parametrize("codec", [TopK(50, bits=4), TopK(128, bits=6), Likely(0.001, bits=4), SORTS[1]])
def test_the_kept_mass_never_exceeds_one(codec):
    """A fitted curve gave the kept entries of half of all positions a mass above 1."""
    for spread in (0.1, 1.0, 3.0, 10.0, 100.0):
        found = there_and_back(codec, Signal(logits=Dense(logits(300, 2, 16, spread=spread))), 2).logits
        assert (found.log_probs.exp().sum(-1) <= 1 + 1e-6).all()
        total = found.log_probs.exp().sum(-1) + found.rest.exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_fewer_likely_ids_than_asked_leave_no_nan():
    """Fewer than k finite log-probabilities made the whole tail NaN."""
    values = torch.full((1, 2, 200), -torch.inf)
    values[..., :3] = torch.tensor([2.0, 1.0, 0.0])
    for codec in (TopK(64, bits=6), Likely(0.001, coded=True), Likely(0.0, at_most=64), TopK(64)):
        found = there_and_back(codec, Signal(logits=Dense(values)), 1).logits
        assert not found.log_probs.isnan().any()
        assert not found.rest.isnan().any()
        assert float(forward_kl(values.clamp_min(-50), found).max()) < 0.01


def test_no_fit_is_needed_for_a_long_tail():
    """Least squares of powers of 0 .. 111 in float32 were off by 3 nats on average, and by 20 at most."""
    values = -1.1 * torch.arange(1, 49_153).float().log().expand(1, 2, -1)
    found = there_and_back(TopK(128, bits=6), Signal(logits=Dense(values)), 1).logits
    assert (found.log_probs - values.log_softmax(-1).gather(-1, found.ids)).abs().max() < 0.4


def test_a_recording_says_its_own_format(tmp_path):
    """The settings of another library had to be repeated by hand to read what they had written."""
    record(causal(), Rows.make(6), tmp_path, SORTS[1], progress=False)
    assert open_recording(tmp_path).codecs == (SORTS[1],)

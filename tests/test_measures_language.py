"""Numbers of language models: worked by hand, over the tokens that count, alike however rows are formed."""

import math

import pytest
import torch

from stillroom.data import pack
from stillroom.errors import DataError, ShapeError, UsageError
from stillroom.language import boundaries
from stillroom.measures import (
    METRICS,
    bits_per_byte_of_texts,
    bootstrap,
    default_metrics,
    language_metrics,
    nats_and_bytes_of_texts,
    reading,
)
from stillroom.students import causal
from stillroom.teachers.causal import from_causal
from stillroom.types import Batch, Dense, Projected, Signal, Sparse

TEXTS = ["the cat sat on the mat", "a dog ran after it, and then it slept", "Grüße aus München", "it is"]
OWN = ("bits_per_byte", "perplexity", "accuracy", "calibration_error")
AGAINST = ("agreement", "top5_agreement", "kl")


def value(name, student, teacher, *batches):
    """The metric over some batches, whose answers are given as functions of the batch."""
    metric = METRICS[name]
    rows = torch.cat([metric.statistics(student(b), teacher(b), b) for b in batches])
    found = bootstrap([rows], metric.finish, replicates=5)
    return None if found is None else found.value


def uniform(vocabulary):
    return lambda batch: Signal(logits=Dense(torch.zeros(*batch.labels.shape, vocabulary)))


def fixed(values):
    return lambda _batch: Signal(logits=Dense(values))


def tokens_of(labels, sizes=None, mask=None):
    """A batch of labels [B, T], and the bytes of each."""
    labels = torch.tensor(labels)
    extra = {} if sizes is None else {"bytes": torch.tensor(sizes)}
    ids = tuple(f"d{n}" for n in range(len(labels)))
    return Batch(ids, {"tokens": torch.zeros_like(labels)}, labels, mask, extra=extra)


@pytest.fixture(scope="module")
def teacher(small_tokenizer):
    return from_causal(causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=1).net, small_tokenizer)


@pytest.fixture(scope="module")
def student(small_tokenizer):
    return causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def test_a_uniform_model_has_log2_of_its_vocabulary_per_token(small_tokenizer):
    """log2(V) bits for each token, the end mark included, over the bytes of the text."""
    rows = pack(TEXTS, small_tokenizer, 64, together=False)
    batch = rows.batch(range(4))
    bits = math.log2(512) * rows.counted_tokens
    size = sum(len(text.encode()) for text in TEXTS)
    assert rows.counted_tokens == sum(len(small_tokenizer(text).input_ids) + 1 for text in TEXTS)
    assert value("bits_per_byte", uniform(512), uniform(512), batch) == pytest.approx(bits / size)
    assert value("perplexity", uniform(512), uniform(512), batch) == pytest.approx(512)
    assert value("kl", uniform(512), uniform(512), batch) == 0


def test_each_number_by_hand():
    """Two documents of two tokens; one token of the second is masked out."""
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]])
    theirs = torch.tensor([[[0.2, 0.4, 0.4], [0.2, 0.2, 0.6]], [[0.1, 0.7, 0.2], [0.0, 0.0, 1.0]]])
    theirs[0, 0, 2] -= 0.01  # no ties
    theirs[0, 0, 1] += 0.01
    batch = tokens_of([[0, 2], [2, -100]], [[3, 1], [0, 7]], torch.tensor([[True, True], [True, False]]))
    models = fixed(probs.log()), fixed(theirs.log())
    nats = -math.log(0.5) - math.log(0.8) - math.log(0.25)
    expected = {
        "bits_per_byte": nats / math.log(2) / 4,
        "perplexity": math.exp(nats / 3),
        "accuracy": 2 / 3,
        "calibration_error": (abs(0.8 - 1) + abs(0.5 + 0.5 - 1)) / 3,  # both 0.5 are in one bin, one is right
        "agreement": 2 / 3,
        "top5_agreement": 1.0,  # five of three
        "kl": float((theirs[:, 0] * (theirs[:, 0] / probs[:, 0]).log()).sum() / 3)
        + float((theirs[0, 1] * (theirs[0, 1] / probs[0, 1]).log()).sum() / 3),
    }
    for name, wanted in expected.items():
        assert value(name, *models, batch) == pytest.approx(wanted, abs=1e-6), name


def test_the_teachers_choice_is_among_five_or_not():
    """Logits in falling order: the teacher's choice is at place 0, 4 and 5 of the student's."""
    ours = torch.arange(8.0, 0, -1).expand(1, 3, 8)
    theirs = torch.zeros(1, 3, 8)
    theirs[0, range(3), [0, 4, 5]] = 9.0
    batch = tokens_of([[0, 0, 0]], [[1, 1, 1]])
    assert value("top5_agreement", fixed(ours), fixed(theirs), batch) == pytest.approx(2 / 3)
    assert value("agreement", fixed(ours), fixed(theirs), batch) == pytest.approx(1 / 3)


def test_tokens_with_bytes_get_the_language_metrics(teacher, small_tokenizer):
    batch = pack(TEXTS, small_tokenizer, 64).batch([0])
    assert default_metrics(teacher(batch), batch) == language_metrics()
    assert [m.name for m in language_metrics()] == [*OWN[:3], *AGAINST, OWN[3]]


@pytest.mark.parametrize("name", [*OWN, *AGAINST])
def test_masked_is_as_if_removed(name):
    """axolotl#3270, axolotl#3271: an evaluation loss that is off by a factor, because padding was counted."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (2, 5), generator=generator)
    short = tokens_of(labels[:, :3].tolist(), torch.ones(2, 3, dtype=torch.long).tolist())
    wanted = value(name, fixed(ours[:, :3]), fixed(theirs[:, :3]), short)
    assert wanted is not None
    sizes = torch.full((2, 5), 1).tolist()
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    ours[:, 3:], theirs[:, 3:] = float("nan"), float("nan")  # not even looked at
    assert value(name, fixed(ours), fixed(theirs), tokens_of(labels.tolist(), sizes, mask)) == pytest.approx(wanted)
    labels[:, 3:] = -100
    assert value(name, fixed(ours), fixed(theirs), tokens_of(labels.tolist(), sizes)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", [*OWN, *AGAINST])
def test_rows_and_batches_do_not_change_a_number(name, student, teacher, small_tokenizer):
    """ms-swift#9476: a metric that depends on how documents were batched. Packed, alone, one by one: the same."""
    apart = pack(TEXTS, small_tokenizer, 48, together=False)
    together = pack(TEXTS, small_tokenizer, 48)
    assert len(together) < len(apart)
    whole = value(name, student, teacher, apart.batch(range(4)))
    assert value(name, student, teacher, *(apart.batch([n]) for n in range(4))) == pytest.approx(whole, rel=1e-4)
    packed = together.batch(range(len(together)))
    assert value(name, student, teacher, packed) == pytest.approx(whole, rel=1e-4)


def test_kl_is_in_nats_per_token():
    """trl#4105: batchmean divided by tokens and vocabulary. KL does not shrink with either."""
    for length, vocabulary in ((1, 4), (7, 4), (7, 400)):
        theirs = torch.full((1, length, vocabulary), -30.0)
        theirs[..., 0] = 30.0
        batch = tokens_of([[0] * length], [[1] * length])
        found = value("kl", uniform(vocabulary), fixed(theirs), batch)
        assert found == pytest.approx(math.log(vocabulary), rel=1e-5)


def test_the_teacher_agrees_with_itself(teacher, small_tokenizer):
    batch = pack(TEXTS, small_tokenizer, 64, together=False).batch(range(4))
    assert value("kl", teacher, teacher, batch) == pytest.approx(0, abs=1e-6)
    assert value("agreement", teacher, teacher, batch) == 1
    assert value("top5_agreement", teacher, teacher, batch) == 1


def test_logits_by_chunks_are_logits_at_once(student, teacher, small_tokenizer, monkeypatch):
    """Projected logits, three positions at a time, give the numbers of Dense ones; and one pass serves all metrics."""
    batch = pack(TEXTS, small_tokenizer, 64, together=False).batch(range(4))
    whole = {name: value(name, dense(student), dense(teacher), batch) for name in (*OWN, *AGAINST)}
    passes = []
    real = reading._by_chunks
    monkeypatch.setattr(reading, "_CHUNK", 3 * len(small_tokenizer))
    monkeypatch.setattr(reading, "_by_chunks", lambda *given: passes.append(given[0].shape) or real(*given))
    ours, theirs = student(batch), teacher(batch)
    for name, wanted in whole.items():
        assert value(name, lambda _: ours, lambda _: theirs, batch) == pytest.approx(wanted, abs=1e-5), name
    assert passes == [(int(batch.mask.sum()),)] * 2  # each model once, where a position counts


def dense(model):
    return lambda batch: Signal(logits=Dense(model(batch).logits.compute()))


def test_a_padded_vocabulary_changes_little(teacher, small_tokenizer):
    """Ids that only the student has: the numbers are those of the student whose extra ids have no mass."""
    batch = pack(TEXTS, small_tokenizer, 64, together=False).batch(range(4))
    said = teacher(batch).logits
    row = torch.zeros(7, said.weight.shape[1])
    padded = Signal(logits=Projected(said.hidden, torch.cat([said.weight, row]), torch.zeros(len(said.weight) + 7)))
    padded.logits.bias[-7:] = -40.0
    for name in OWN:
        wanted = value(name, teacher, teacher, batch)
        assert value(name, lambda _: padded, teacher, batch) == pytest.approx(wanted, abs=1e-4)
    assert value("kl", lambda _: padded, teacher, batch) == pytest.approx(0, abs=1e-4)
    assert value("agreement", lambda _: padded, teacher, batch) == 1


def test_a_recorded_teacher_of_few_entries_agrees_as_the_live_one(student, teacher, small_tokenizer):
    batch = pack(TEXTS, small_tokenizer, 64, together=False).batch(range(4))
    probs = teacher(batch).logits.compute().softmax(-1)
    best, ids = probs.topk(8, -1)
    kept = Signal(logits=Sparse(ids, best.log(), (1 - best.sum(-1)).log(), probs.shape[-1]))
    for name in ("agreement", "top5_agreement"):
        assert value(name, student, lambda _: kept, batch) == value(name, student, teacher, batch)
    assert value("kl", student, lambda _: kept, batch) <= value("kl", student, teacher, batch)  # a coarser partition


def test_what_cannot_be_measured_is_said(student, teacher, small_tokenizer):
    batch = tokens_of([[0, 1]])
    with pytest.raises(DataError, match=r"no extra\['bytes'\]"):
        value("bits_per_byte", uniform(4), uniform(4), batch)
    with pytest.raises(ShapeError, match=r"bytes have shape \[1, 1\], but labels \[1, 2\]"):
        value("bits_per_byte", uniform(4), uniform(4), tokens_of([[0, 1]], [[1]]))
    with pytest.raises(DataError, match="label 9 is outside the 4 ids of the model"):
        value("perplexity", uniform(4), uniform(4), tokens_of([[0, 9]], [[1, 1]]))
    with pytest.raises(ShapeError, match=r"the model answers at positions \[1, 2\], the teacher at \[1, 3\]"):
        value("kl", uniform(4), fixed(torch.zeros(1, 3, 4)), batch)
    with pytest.raises(DataError, match="text 1 is empty"):
        bits_per_byte_of_texts(student.net, small_tokenizer, ["the cat", ""])
    with pytest.raises(DataError, match="there are no texts"):
        bits_per_byte_of_texts(student.net, small_tokenizer, [])
    with pytest.raises(UsageError, match="length=1 cannot be used"):
        bits_per_byte_of_texts(student.net, small_tokenizer, ["the cat"], length=1)


def test_bits_per_byte_of_texts_is_that_of_packed_rows(student, small_tokenizer):
    """Windows of several texts in one row, a long text in several: the numbers of pack, text by text."""
    texts = [*TEXTS, "the cat sat on the mat " * 6]
    rows = pack(texts, small_tokenizer, 16, together=False)
    batch = rows.batch(range(len(rows)))
    found = METRICS["bits_per_byte"].statistics(student(batch), student(batch), batch)
    ours = nats_and_bytes_of_texts(student.net, small_tokenizer, texts, length=16)
    assert ours[:, 1].tolist() == [len(text.encode()) for text in texts]
    torch.testing.assert_close(ours.sum(0), found.sum(0), rtol=1e-5, atol=1e-5)
    alone = torch.cat([nats_and_bytes_of_texts(student.net, small_tokenizer, [text], length=16) for text in texts])
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    whole = bits_per_byte_of_texts(student.net, small_tokenizer, texts, length=16)
    assert whole.value == pytest.approx(float(ours[:, 0].sum() / ours[:, 1].sum() / math.log(2)))
    assert whole.low < whole.value < whole.high


def test_every_tokenizer_is_counted_over_the_same_bytes(student, small_tokenizer):
    """A model that is uniform over its V ids needs log2(V) bits per token, whatever its tokens are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>")
    for tokenizer in (plain, small_tokenizer):
        net = causal.fresh(tokenizer, hidden=16, layers=1, heads=2, tied=False).net
        net.get_output_embeddings().weight.zero_()
        text = "Grüße, the cat"
        count = len(tokenizer(text, add_special_tokens=False).input_ids) + 1
        found = bits_per_byte_of_texts(net, tokenizer, [text]).value
        assert found == pytest.approx(count * math.log2(len(tokenizer)) / 16)
    assert boundaries(plain)[1] == 256


def test_the_real_teacher_reads_english(smollm2):
    """SmolLM2: about a bit per byte of plain prose, and far more for noise."""
    prose = "The capital of France is Paris. It lies on the river Seine, and about two million people live in it."
    noise = "xq9 zzv? 7hKp wm#dl rrTq0 vnbx"
    ours = nats_and_bytes_of_texts(smollm2.net, smollm2.tokenizer, [prose, noise])
    bits = ours[:, 0] / ours[:, 1] / math.log(2)
    assert bits[0] < 1.1
    assert bits[1] > 4

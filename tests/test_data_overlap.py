"""Documents on both sides are found by runs of words or tokens, and shown; nothing else is accused."""

import tracemalloc

import pytest

from stillroom.data import overlap as module
from stillroom.data import pack
from stillroom.data.overlap import Shared, overlap
from stillroom.errors import DataError, PairError, UsageError

WORDS = [f"w{n}" for n in range(400)]
COPIED = " ".join(WORDS[:13])


def text(start, count):
    return " ".join(WORDS[start : start + count])


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    """Three evaluation documents: one shares 13 words, one 12, one none."""
    evaluation = [
        ("copied", f"a b c {COPIED} d e f"),
        ("nearly", f"a b c {text(100, 12)} d e f"),
        ("own", text(200, 30)),
    ]
    training = [("first", text(300, 50)), ("second", f"x {COPIED} y"), ("third", f"x {text(100, 12)} y {COPIED}")]
    found = overlap(training, evaluation)
    assert (found.n, found.unit, found.documents, found.found, found.training) == (13, "words", 3, 1, 3)
    assert found.share == pytest.approx(1 / 3)
    assert found.examples == (Shared("copied", "second", COPIED),)
    assert found.as_json()["examples"] == [{"evaluation": "copied", "training": "second", "text": COPIED}]
    assert overlap(training, evaluation, n=12).found == 2


def test_case_punctuation_and_line_ends_do_not_hide_a_copy():
    shouted = COPIED.upper().replace(" ", ",\n-- ")
    assert overlap([f"({shouted})!"], [f"so: {COPIED}."]).found == 1


def test_a_short_document_counts_when_all_of_it_is_there():
    """Brown et al. 2020, appendix C; below 8 words nothing is judged, since a few words stand everywhere."""
    evaluation = [("nine", text(0, 9)), ("other nine", text(50, 9)), ("three", text(0, 3))]
    found = overlap([text(0, 30), text(50, 8)], evaluation)
    assert (found.documents, found.found, found.too_short) == (2, 1, 1)
    assert found.examples[0].evaluation == "nine"


def test_a_run_in_several_documents_accuses_each():
    found = overlap([COPIED], [f"a {COPIED}", f"b {COPIED} {COPIED}", text(100, 20)])
    assert (found.found, found.documents) == (2, 3)
    assert [e.evaluation for e in found.examples] == ["00000000", "00000001"]


def test_equal_hashes_of_other_words_accuse_nobody(monkeypatch):
    """Were every run to hash alike, words would still be compared."""
    import numpy as np

    monkeypatch.setattr(module, "_hashes", lambda sequence, n: np.zeros(len(sequence) - n + 1, dtype=np.uint64))
    assert overlap([text(100, 40)], [text(0, 40)]).found == 0
    assert overlap([text(0, 40)], [text(0, 40)]).found == 1


def test_examples_are_few():
    texts = [text(n * 15, 15) for n in range(20)]
    found = overlap(texts, texts)
    assert found.found == 20
    assert len(found.examples) == module.SHOWN


def test_training_texts_only_pass_by():
    """A stream that is never all there: memory does not grow with it."""
    evaluation = [text(0, 40)]
    overlap([], evaluation)

    tracemalloc.start()
    found = overlap((f"{text(n % 300, 60)} {n}" for n in range(6000)), evaluation, n=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.training == 6000
    assert peak < 400_000 < 6000 * 60 * 4  # the texts


def test_packed_documents_are_compared_by_tokens(small_tokenizer):
    """In packed rows, alone in rows, split over rows: the same documents are found; shown as text."""
    copied = "the cat sat on the mat and the dog ran after it and then all of them slept"
    training = pack(["it is a dog that sat there all the day long", f"and so {copied} it slept"], small_tokenizer, 96)
    evaluation = [("copied", f"one day {copied}"), ("own", "nobody here but us, and a very long tale of a king")]
    for length in (96, 16):
        rows = pack(evaluation, small_tokenizer, length, together=False)
        found = overlap(training, rows, tokenizer=small_tokenizer)
        assert found.documents == 2  # whole, though 16 tokens hold a part of each
        assert (found.unit, found.n, found.found) == ("tokens", 18, 1)
        (shown,) = found.examples
        assert (shown.evaluation, shown.training) == ("copied", "document 1")
        assert shown.text.strip() in f"one day {copied}"
        assert len(shown.text) > 20
    assert overlap(training, rows).examples[0].text.split()[0].isdigit()  # without a tokenizer, ids


def test_what_cannot_be_compared_is_refused(small_tokenizer):
    rows = pack(["the cat sat on the mat"], small_tokenizer, 32)
    other = pack(["the cat sat on the mat"], small_tokenizer, 32)
    object.__setattr__(other, "tokenizer", "another")
    with pytest.raises(PairError, match="evaluation tokens of another: their ids do not compare"):
        overlap(rows, other)
    with pytest.raises(UsageError, match="one side is texts, the other tokens"):
        overlap(["the cat"], rows)
    with pytest.raises(UsageError, match="n=3 cannot be used: runs of fewer than 8 words"):
        overlap(["the cat"], ["the cat"], n=3)
    with pytest.raises(DataError, match="there are no evaluation documents"):
        overlap(["the cat"], [])

"""Two tokenizations of one text cut at common byte boundaries, and one vocabulary in terms of another."""

import itertools
import random

import pytest
import torch

from stillroom.errors import PairError, UsageError
from stillroom.language import boundaries
from stillroom.language.alignment import align, coverage_of, pieces_of, spellings
from stillroom.language.vocabularies import VocabularyMap, map_between

TEXTS = [
    "the cat sat on the mat",
    " leading, and  several   spaces\t\n\n and trailing ",
    "naïve café — 東京 🧿👩‍🔬 Grüße",
    "x=1;\r\nunbelievable antidisestablishmentarianism 3.14159",
]


@pytest.fixture(scope="module")
def mapped(small_tokenizer, smollm2):
    """From SmolLM2's vocabulary to the small one."""
    return map_between(smollm2.tokenizer, small_tokenizer)


def pieces(tokenizer, text):
    return pieces_of(tokenizer(text, add_special_tokens=False).input_ids, text, spellings(tokenizer))


def sentencepiece(prefix):
    """A small vocabulary in SentencePiece's manner: ▁ for spaces, single bytes as <0xNN>, perhaps a dummy prefix."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *letters, "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_spans_by_hand():
    spans = align([b"un", b"believ", b"able", b" x"], [b"unbel", b"iev", b"able", b" ", b"x"])
    assert spans == [(0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 5)]
    found = coverage_of(spans, [b"unbel", b"iev", b"able", b" ", b"x"])
    assert (found.positions, found.aligned, found.one_to_one) == (5, 3 / 5, 1 / 5)
    assert found.bytes_one_to_one == 4 / 14


def test_marks_pair_with_marks_and_alone_join_what_follows():
    assert align([b"a", b""], [b"a", b""]) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert align([b"", b"a"], [b"a"]) == [(0, 2, 0, 1)]
    with pytest.raises(PairError, match="after the last byte of the text the teacher has 1 marks more"):
        align([b"a", b""], [b"a"])


@pytest.mark.parametrize("text", TEXTS)
def test_every_token_is_in_one_span_of_the_same_bytes(text, small_tokenizer, smollm2):
    """trl#4392, trl#4393 (fixed by #5885): groups lost tokens, or joined different texts; ours tile both sides."""
    theirs, ours = pieces(smollm2.tokenizer, text), pieces(small_tokenizer, text)
    spans = align(theirs, ours)
    assert [n for t0, t1, _, _ in spans for n in range(t0, t1)] == list(range(len(theirs)))
    assert [n for _, _, s0, s1 in spans for n in range(s0, s1)] == list(range(len(ours)))
    for t0, t1, s0, s1 in spans:
        assert b"".join(theirs[t0:t1]) == b"".join(ours[s0:s1])


def test_random_cuts_of_one_text_give_the_finest_spans():
    draw = random.Random(0)
    for _ in range(200):
        text = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 40)))
        cuts = [sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(9))}) for _ in range(2)]
        theirs, ours = ([text[a:b] for a, b in itertools.pairwise(cut)] for cut in cuts)
        ends = [sum(map(len, theirs[:t1])) for _, t1, _, _ in align(theirs, ours)]
        assert ends == sorted(set(cuts[0][1:]) & set(cuts[1][1:]))


def test_characters_split_over_tokens_are_aligned_by_bytes(small_tokenizer, smollm2):
    """GOLD decodes piece by piece, and a part of a character decodes to a replacement mark; bytes have no such case."""
    theirs, ours = pieces(smollm2.tokenizer, "東京"), pieces(small_tokenizer, "東京")
    assert len(ours) == 6  # one token a byte
    assert align(theirs, ours)[-1][1::2] == (len(theirs), 6)


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_fallback_and_a_dummy_prefix(prefix, smollm2):
    tokenizer = sentencepiece(prefix)
    text = "the thé"
    found = pieces(tokenizer, text)
    assert found == [b"the", b" ", b"th", b"\xc3", b"\xa9"]
    assert len(align(found, pieces(smollm2.tokenizer, text))) >= 2


def test_different_texts_are_refused_at_the_byte():
    with pytest.raises(PairError, match=r"at byte 4 the teacher has b'dog', the student b'cat' \(7 bytes against 7\)"):
        align([b"the ", b"dog"], [b"the", b" ", b"cat"])
    with pytest.raises(PairError, match=r"at byte 3 the teacher has b' cat', the student b'' \(7 bytes against 3\)"):
        align([b"the", b" cat"], [b"the"])


def test_streams_one_token_off_are_refused(small_tokenizer, smollm2):
    theirs, ours = pieces(smollm2.tokenizer, TEXTS[0]), pieces(small_tokenizer, TEXTS[0])
    with pytest.raises(PairError, match="do not spell the same text"):
        align(theirs[1:], ours)
    with pytest.raises(PairError, match="do not spell the same text"):
        align(theirs, ours[:-1])


def test_a_mark_inside_the_text_is_refused(small_tokenizer):
    text = "the <|im_end|> sat"
    with pytest.raises(PairError, match=r"the student writes b' sat' at byte 4, where the text has b'<\|im_end\|> s'"):
        pieces_of(small_tokenizer(text).input_ids, text, spellings(small_tokenizer), "student")


def test_a_tokenizer_that_changes_the_text_is_refused():
    from tokenizers import normalizers

    tokenizer = sentencepiece(False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(PairError, match="at byte 0, where the text has b'The': it changes the text"):
        pieces(tokenizer, "The")


def test_equal_bytes_are_matched_and_mass_is_conserved(mapped, small_tokenizer, smollm2):
    theirs = smollm2.tokenizer.get_vocab()
    for token in ("a", "Ġthe", "Ġcat"):
        assert mapped.ids[theirs[token]].tolist() == [small_tokenizer.get_vocab()[token]]
        assert mapped.exact[theirs[token]]
    torch.testing.assert_close(mapped.shares.sum(-1), torch.ones(len(theirs)))
    mass = torch.rand(5, len(theirs), dtype=torch.float64).softmax(-1)
    carried = mapped.carry(mass)
    assert carried.shape == (5, len(small_tokenizer))
    torch.testing.assert_close(carried.sum(-1), torch.ones(5, dtype=torch.float64))


def test_other_tokens_go_to_the_first_of_the_students_own(mapped, small_tokenizer, smollm2):
    number = smollm2.tokenizer.get_vocab()["Ġunder"]
    own = small_tokenizer(" under", add_special_tokens=False).input_ids
    assert len(own) > 1
    assert not mapped.exact[number]
    assert mapped.ids[number].tolist() == own[:1]


def test_a_decay_shares_mass_over_the_students_tokens(small_tokenizer, smollm2):
    """X-Token (arXiv 2605.21699): shares 1, d, d^2, ... over the tokens of a piece, scaled to 1."""
    mapped = map_between(smollm2.tokenizer, small_tokenizer, decay=0.1)
    number = smollm2.tokenizer.get_vocab()["Ġunder"]
    own = small_tokenizer(" under", add_special_tokens=False).input_ids
    wanted = torch.tensor([0.1**k for k in range(4)]) / 1.111
    assert mapped.ids[number].tolist() == own[:4]
    torch.testing.assert_close(mapped.shares[number], wanted)


def test_marks_go_to_marks(mapped, small_tokenizer, smollm2):
    begin, end = boundaries(small_tokenizer)
    theirs = smollm2.tokenizer.get_vocab()
    assert mapped.ids[theirs["<|im_start|>"]].tolist() == [small_tokenizer.get_vocab()["<|im_start|>"]]
    assert mapped.ids[theirs["<reponame>"]].tolist() == [end]
    assert mapped.ids[boundaries(smollm2.tokenizer)[1]].tolist() == [end]
    assert begin == end or mapped.exact[boundaries(smollm2.tokenizer)[0]]


def test_parts_of_characters_are_carried(mapped, smollm2):
    theirs = spellings(smollm2.tokenizer)
    broken = [n for n, piece in enumerate(theirs) if len(piece) > 1 and piece.decode(errors="replace")[-1] == "�"]
    assert len(broken) > 50
    ours = spellings(sentencepiece(False))
    into = map_between(smollm2.tokenizer, sentencepiece(False))
    for number in broken:
        assert theirs[number].startswith(ours[int(into.ids[number, 0])])


def test_kept_entries_are_carried_as_the_whole(mapped):
    """Sparse answers are carried without the teacher's vocabulary being spread out; the kept mass is conserved."""
    mass = torch.rand(3, len(mapped.ids), dtype=torch.float64).softmax(-1)
    kept, ids = mass.topk(20, -1)
    alone = torch.zeros_like(mass).scatter(-1, ids, kept)
    torch.testing.assert_close(mapped.carry_kept(ids, kept), mapped.carry(alone))


def test_no_teacher_id_is_cut_off(mapped):
    """KDFlow's min-vocab truncation and ms-swift's _align_vocab: ids beyond the shorter vocabulary lost their mass."""
    last = torch.zeros(1, len(mapped.ids))
    last[0, -1] = 1.0  # an id far beyond the student's vocabulary
    assert mapped.carry(last).sum() == 1
    with pytest.raises(PairError, match=r"answers with 49162 ids, but the map .* has 49152 rows"):
        mapped.carry(torch.ones(1, len(mapped.ids) + 10))


def test_a_padded_head_is_mapped_when_asked_for(small_tokenizer, smollm2):
    mapped = map_between(smollm2.tokenizer, small_tokenizer, teacher_size=49200)
    assert mapped.ids.shape == (49200, 1)
    assert mapped.ids[-1].tolist() == [boundaries(small_tokenizer)[1]]


def test_equal_size_is_not_the_same_tokenizer(small_tokenizer):
    """trl#4562, DistillKit#29, #7, #12: ids compared as if two tokenizers of one size agreed."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(small_tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    mapped = map_between(other, small_tokenizer)
    ours = small_tokenizer.get_vocab()
    assert mapped.teacher != mapped.student
    assert [int(mapped.ids[ours[letter], 0]) for letter in "abc"] == [ours[letter] for letter in "bac"]


def test_a_student_that_lacks_bytes_is_refused(smollm2):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2}, [], unk_token="<s>"))
    student = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    with pytest.raises(PairError, match=r"cannot begin 9\d\.\d% of the teacher's tokens .* Keep the 256 single bytes"):
        map_between(smollm2.tokenizer, student)


def test_settings_out_of_range_are_refused(small_tokenizer):
    with pytest.raises(UsageError, match="decay=1.5 cannot be used"):
        map_between(small_tokenizer, small_tokenizer, decay=1.5)
    one = torch.ones(1, 1)
    with pytest.raises(UsageError, match="the shares of teacher id 0 sum to 0.5000"):
        VocabularyMap(one.long(), one / 2, one[0].bool(), one[0].bool(), 3, "a", "b")

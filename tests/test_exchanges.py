"""A question and its answer as tokens, a model that writes answers, and texts that are kept."""

import json

import pytest
import torch

import stillroom as sr
from language_fakes import teacher
from stillroom.data import Table
from stillroom.errors import DataError, SignalError, UsageError
from stillroom.language.chat import Chat
from stillroom.language.exchanges import Exchange, answered, ends_of
from stillroom.language.prompts import Prompt
from stillroom.recording import Texts, open_recording
from stillroom.students import causal
from stillroom.teachers.writer import writer
from stillroom.types import Signal

TABLE = Table({"text": ("the cat", "a dog sat"), "colour": ("red", "blue")}, ("a", "b"))
BATCH = TABLE.batch([0, 1])
PLAIN, CHAT = Exchange(Prompt("{{ text }} is")), Exchange(Prompt("{{ text }}?", "Answer."), Chat())


@pytest.mark.parametrize("exchange", [PLAIN, CHAT], ids=["plain", "chat"])
def test_learning_begins_where_writing_begins(exchange, small_tokenizer):
    question = exchange.question(small_tokenizer, BATCH, 1)
    ids, learned = exchange.whole(small_tokenizer, BATCH, 1, " on the mat ")
    assert ids[: len(question)] == question
    assert learned == [False] * len(question) + [True] * (len(ids) - len(question))
    said = small_tokenizer.decode(ids[len(question) : -1])
    assert said.strip() == "on the mat"
    assert ids[-1] in ends_of(small_tokenizer)
    assert not set(ids[len(question) : -1]) & set(ends_of(small_tokenizer))


def test_the_prompt_stands_before_the_answer(small_tokenizer):
    ids, _ = PLAIN.whole(small_tokenizer, BATCH, 0, "red")
    assert small_tokenizer.decode(ids, skip_special_tokens=True) == "the cat is red"
    chat, _ = CHAT.whole(small_tokenizer, BATCH, 0, "red")
    assert small_tokenizer.decode(chat).endswith("<|im_start|>assistant\nred<|im_end|>")
    assert "system\nAnswer." in small_tokenizer.decode(chat)


def test_empty_answers_and_templates_that_rewrite_are_refused(small_tokenizer):
    with pytest.raises(DataError, match="answer to example 'b' is empty"):
        PLAIN.whole(small_tokenizer, BATCH, 1, " \n")
    rewriting = (
        "{% if not add_generation_prompt %}whole {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="writes a question otherwise once it is answered"):
        Exchange(Prompt("{{ text }}"), Chat(template=rewriting)).whole(small_tokenizer, BATCH, 0, "red")


def test_a_network_writes_the_likeliest_answer(small_tokenizer):
    """As transformers' own greedy generation does, without its end mark."""
    net = teacher().net
    question = PLAIN.question(small_tokenizer, BATCH, 0)
    own = net.generate(
        torch.tensor([question]), max_new_tokens=6, do_sample=False, eos_token_id=list(ends_of(small_tokenizer)),
        pad_token_id=0, attention_mask=torch.ones(1, len(question), dtype=torch.int64),
    )[0, len(question) :].tolist()  # fmt: skip
    wanted = small_tokenizer.decode([t for t in own if t not in ends_of(small_tokenizer)], skip_special_tokens=True)
    assert answered(net, small_tokenizer, question, 6) == wanted.strip()


@pytest.fixture
def model(tmp_path, small_tokenizer):
    causal.fresh(small_tokenizer, hidden=32, layers=1, heads=2, seed=3).net.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_writer_answers_in_words_and_says_who_it_is(model):
    made = writer(model, "{{ text }} is", chat=False, new_tokens=5)
    first, second = made(BATCH).text
    assert made(TABLE.batch([1])).text == (second,)
    assert made.identity.name == "model"
    assert made.identity.digest
    other = writer(model, "{{ text }} was", chat=False, new_tokens=5)
    assert other.identity.digest == made.identity.digest
    assert other.identity.template != made.identity.template  # another question is another teacher
    cut = writer(model, "{{ text }} is", chat=False, new_tokens=5, stop=first[1])
    assert cut(BATCH).text[0] == first.split(first[1])[0].strip()
    with pytest.raises(UsageError, match="needs chat: true"):
        writer(model, "x", system="y", chat=False)


def test_texts_are_kept_byte_for_byte(tmp_path):
    """Empty ones, other scripts and marks of every length; in any order and part."""
    texts = ("", "über 5 €", "日本語\n", json.dumps({"a": 1}), "x" * 70_000)
    table = Table({"n": torch.arange(5.0)}, tuple("abcde"))
    place = {name: number for number, name in enumerate(table.ids)}

    def said(batch):
        return Signal(text=tuple(texts[place[name]] for name in batch.ids))

    made = sr.record(said, table, tmp_path, keep=[Texts()], batch_size=2, progress=False)
    again = open_recording(tmp_path)
    assert again(table.batch([4, 0, 2])).text == (texts[4], texts[0], texts[2])
    assert made(table.batch(range(5))).text == texts


def test_who_writes_nothing_cannot_be_kept(tmp_path):
    table = Table({"n": torch.arange(2.0)}, ("a", "b"))
    with pytest.raises(SignalError, match=r"keep=Texts\(\) keeps texts, but the teacher gives \['values'\]"):
        sr.record(lambda batch: Signal(values=torch.zeros(2, 1)), table, tmp_path, keep=[Texts()], progress=False)

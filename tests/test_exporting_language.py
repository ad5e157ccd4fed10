"""A shipped language model is its student: in transformers, llama.cpp and ONNX Runtime, network and tokenizer."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import yaml

import stillroom as sr
from stillroom.data import pack
from stillroom.errors import DataError, FolderError, MissingExtraError, ParityError, UsageError
from stillroom.exporting import TARGETS, Target, Written, load_artifact
from stillroom.exporting.gguf import tokens as gguf_tokens
from stillroom.exporting.gguf import writing as gguf
from stillroom.exporting.gguf.llamacpp import LlamaCpp
from stillroom.exporting.shipped import NextToken
from stillroom.language import write_folder
from stillroom.run import open_run
from stillroom.students import causal
from stillroom.students.networks import Student

export = functools.partial(sr.export, measure_memory=False)
VERSIONS = {"versions": {"torch": "1"}}
SENTENCES = ("the cat sat on the mat", "the dog ran after it and the cat ran", "on the mat the dog sat and sat")
TEXTS = [
    *(" and ".join(SENTENCES[n:] + SENTENCES[:n]) + f", {n * 37} times. Grüße, 1234!" for n in range(3)),
    *SENTENCES,
    "it is",
] * 2
EACH = [
    ("huggingface", "fp32"),
    ("huggingface", "bf16"),
    ("gguf", "f32"),
    ("gguf", "f16"),
    ("gguf", "q8_0"),
    ("gguf", "q4_0"),
    ("onnx", "fp32"),
    pytest.param("onnx", "int8", marks=pytest.mark.slow),
]


def sharp(student, texts, tokenizer, steps=120):
    """The same student fitted to a few texts: its attention looks somewhere, its next tokens are apart.

    At random weights nothing would depend on the order of q and k.
    """
    rows = pack(texts, tokenizer, 64)
    batch = rows.batch(range(len(rows)))
    optimiser = torch.optim.AdamW(student.net.parameters(), lr=5e-3)
    for _ in range(steps):
        logits = student(batch).need_logits().compute()
        loss = torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    student.net.eval()
    return student


@pytest.fixture(scope="module")
def student(small_tokenizer):
    torch.manual_seed(0)
    made = causal.fresh(small_tokenizer, hidden=64, layers=2, heads=4, kv_heads=2, context=128)
    return sharp(made, TEXTS, small_tokenizer)


@pytest.fixture(scope="module")
def rows(small_tokenizer):
    """Packed: several documents to a row."""
    found = pack(TEXTS, small_tokenizer, 64)
    assert found.facts["documents"] > len(found)
    return found


@pytest.fixture(scope="module")
def shipped(student, rows, tmp_path_factory):
    """The artefact of a target and precision, made once for all tests that only read it."""

    @functools.cache
    def make(target, precision):
        return export(student, rows, tmp_path_factory.mktemp(target), target, precision, progress=False)

    return make


def log_probs(model, batch):
    logits = model.predict(batch).need_logits()
    values = logits.compute() if hasattr(logits, "compute") else logits.values
    return values.detach().double().log_softmax(-1)


@pytest.mark.parametrize(("target", "precision"), EACH)
def test_a_shipped_language_model_is_its_student(target, precision, shipped, student, rows):
    """Written, verified on real rows, opened again from its folder, and asked about packed rows: it answers alike."""
    made = shipped(target, precision)
    verify = json.loads((made.folder / "verify.json").read_text())
    assert verify["passed"] is True
    assert verify["positions"] == (rows.counted_tokens if target != "gguf" else 48 // len(rows) * len(rows))
    exact = precision in ("fp32", "f32")
    assert verify["largest_difference"] < (1e-3 if exact else 1.0)
    assert verify["agreement"] > (0.999 if exact else 0.95)
    assert verify["kl"] < (1e-8 if exact else 0.01)
    assert verify["tokenizer"]["different"] == 0
    assert verify["tokenizer"]["texts"] > len(rows) + 7
    quality = verify["quality"]
    assert quality["metric"] == "bits_per_byte"
    assert abs(quality["value"] / quality["student"]["value"] - 1) < (1e-4 if exact else 0.05)
    assert verify["latency"]["tokens_per_second"] > 0
    loaded = sr.load(made.folder)
    assert loaded.verify == verify
    batch = rows.batch([0])
    ours, theirs = log_probs(student, batch), log_probs(loaded, batch)
    assert theirs.shape == ours.shape
    places = batch.extra["documents"] >= 0
    assert (ours - theirs).abs()[places].max() < (2e-3 if exact else 2.0)


def test_bits_per_byte_are_those_of_the_labels(shipped, student, rows):
    """nats of the labels / (ln 2 x their bytes), over all rows, worked out here by hand."""
    nats = sizes = 0.0
    for row in range(len(rows)):
        batch = rows.batch([row])
        found = log_probs(student, batch)[batch.mask].gather(-1, batch.labels[batch.mask][:, None])
        nats, sizes = nats - float(found.sum()), sizes + int(batch.extra["bytes"].sum())
    verify = shipped("onnx", "fp32").verify
    assert verify["quality"]["student"]["value"] == pytest.approx(nats / sizes / 0.69314718, rel=1e-6)
    expected = float(torch.tensor(nats / rows.counted_tokens).exp())
    assert verify["perplexity"]["student"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", ["onnx", "huggingface"])
def test_packed_rows_do_not_attend_across_documents(target, shipped, student, small_tokenizer):
    """A document answers in a packed row as it does alone, at any batch size and length."""
    artifact = shipped(target, "fp32")
    together, apart = pack(TEXTS[3:6], small_tokenizer, 90), pack(TEXTS[3:6], small_tokenizer, 90, together=False)
    assert [len(together), len(apart)] == [1, 3]
    packed, alone = log_probs(artifact, together.batch([0])), log_probs(artifact, apart.batch(range(3)))
    where = together.batch([0]).extra["documents"][0]
    for number in range(3):
        size = int((where == number).sum())
        torch.testing.assert_close(packed[0, where == number], alone[number, :size], rtol=1e-4, atol=1e-4)


def test_the_explicit_mask_is_that_of_transformers(student, rows):
    """deploy trap: transformers finds packed rows by operations that targets do not know."""
    batch = rows.batch(range(2))
    with torch.no_grad():
        ours = NextToken(student.net)(batch.inputs["tokens"], batch.inputs["positions"])
        own = student.net(input_ids=batch.inputs["tokens"], position_ids=batch.inputs["positions"], use_cache=False)
    torch.testing.assert_close(ours, own.logits, rtol=1e-4, atol=1e-5)


def test_eight_bits_in_onnx_round_the_weights_alone():
    """Outliers among activations: rounded together with their row, everything else in it is lost."""
    from stillroom.exporting.onnx import int8 as onnx_int8
    from stillroom.exporting.onnx import runtime as onnx_runtime

    onnx = onnx_runtime.library("onnx")
    table = torch.randn(64, 48).numpy()
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "table"], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", "length", 64])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", "length", 48])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    content = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    x = torch.randn(1, 5, 64)
    x[0, 0] *= 1000
    rounded, said = onnx_int8.quantise(content, ("x",), [(x,)], "next_token")
    assert said["method"] == "weights"
    exact = x @ torch.from_numpy(table)
    error = (onnx_runtime.run_of(rounded)((x,)) - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error.max() < 0.02
    dynamic, _ = onnx_int8.quantise(content, ("x",), [(x,)], "values")
    lost = (onnx_runtime.run_of(dynamic)((x,)) - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert lost[0, 1:].max() > 0.5


def test_sliding_windows_are_masked(small_tokenizer, rows):
    """Gemma 3: layers of two kinds, one of which looks at few positions only; softcaps and scaled embeddings."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=len(small_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=64, sliding_window=4, final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=2, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    net = Gemma3ForCausalLM(config).eval()
    batch = rows.batch(range(2))
    with torch.no_grad():
        ours = NextToken(net)(batch.inputs["tokens"], batch.inputs["positions"])
        own = net(input_ids=batch.inputs["tokens"], position_ids=batch.inputs["positions"], use_cache=False).logits
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_pruned_shapes_in_gguf(tied, small_tokenizer, rows, tmp_path):
    """A head that is not tied; heads that do not fill hidden; more rows than the tokenizer has ids; RoPE scaled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer) + 7, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=24,
        num_key_value_heads=1, intermediate_size=80, tie_word_embeddings=tied, max_position_embeddings=256,
        rope_parameters=scaling if tied else None, pad_token_id=2, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    made = sharp(causal.from_causal(LlamaForCausalLM(config), small_tokenizer), TEXTS, small_tokenizer, steps=60)
    exact = export(made, rows, tmp_path, "gguf", "f32", progress=False)
    assert exact.verify["largest_difference"] < 1e-3
    rounded = export(made, rows, tmp_path, "gguf", "q8_0", progress=False)
    assert rounded.bytes < exact.bytes / 2
    # 80 and 48 columns are no multiple of 32
    assert rounded.verify["kept_float32"] == ["blk.0.ffn_down.weight", "blk.0.attn_output.weight"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_in_gguf(family, small_tokenizer, rows, tmp_path):
    """Qwen 2 (biases on q, k and v) and Qwen 3 (norms on q and k): halves are turned, so nothing is interleaved."""
    import transformers

    name = family.capitalize()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(small_tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=True, max_position_embeddings=128,
        pad_token_id=2, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}ForCausalLM")(config)
    made = sharp(causal.from_causal(net, small_tokenizer), TEXTS, small_tokenizer, steps=60)
    if family == "qwen2":
        torch.nn.init.normal_(net.model.layers[0].self_attn.q_proj.bias)
    found = export(made, rows, tmp_path, "gguf", "f32", progress=False)
    assert found.verify["architecture"] == family
    assert found.verify["largest_difference"] < 1e-3


def test_an_adapted_student_ships_merged(student, rows, tmp_path):
    """LoRA adapters are inside what is shipped; the student keeps them apart."""
    adapted = causal.lora(student, rank=4)
    for name, parameter in adapted.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = export(adapted, rows, tmp_path, "gguf", "f32", progress=False)
    assert found.verify["largest_difference"] < 1e-3
    assert hasattr(adapted.net, "merge_and_unload")


def test_the_folder_loads_with_transformers_alone(shipped, student):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shipped("huggingface", "fp32").folder / "model"
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == student.tokenizer.chat_template
    tokens = tokenizer("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(net(tokens).logits, student.net(tokens).logits)


def test_the_gguf_file_writes_text_in_llama_cpp(shipped, student):
    """What a user sees: the same greedy continuation as transformers gives."""
    prompt = student.tokenizer("the cat sat on").input_ids
    ours = student.net.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=2)
    runtime = shipped("gguf", "f32").run
    written = list(prompt)
    for _ in range(6):
        written.append(int(runtime.after(written).argmax()))
    assert written == ours[0].tolist()
    assert runtime.token_ids("the cat sat on<|im_end|>") == [*prompt, 2]


def wrong_order(rows, heads):
    """q and k as transformers has them: the defect that no shape shows."""
    return rows


@pytest.mark.parametrize("precision", ["f32", "q8_0"])
def test_a_conversion_that_turns_the_wrong_rows_is_refused(precision, student, rows, tmp_path, monkeypatch):
    """deploy trap 4: a writer that does not interleave q and k gives a file of the right shapes that talks nonsense."""
    monkeypatch.setattr(gguf, "neighbours", wrong_order)
    with pytest.raises(ParityError, match=r"worst positions: row 0000000\d at \d+: student '.*', artefact '") as caught:
        export(student, rows, tmp_path, "gguf", precision, progress=False)
    assert "KL(student || artefact)" in str(caught.value)
    place = tmp_path / f"gguf-{precision}"
    assert sorted(path.name for path in place.iterdir()) == ["failed.gguf", "verify.json"]
    assert json.loads((place / "verify.json").read_text())["passed"] is False
    with pytest.raises(ParityError, match="did not pass its verification"):
        load_artifact(place)


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer with tokens of several digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(["2024 and 1234 " * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def test_a_tokenizer_that_cuts_elsewhere_is_refused(numbers, tmp_path, monkeypatch):
    """deploy trap 4, a wrong tokenizer.ggml.pre: the network is exact, and every number in a text becomes other ids."""
    monkeypatch.setattr(gguf_tokens, "cut_of", lambda parts: "smollm")
    made = causal.fresh(numbers, hidden=32, layers=1, heads=2)
    with pytest.raises(ParityError, match=r"its tokenizer gives \d+ of \d+ texts other ids: '.*' becomes \["):
        export(made, pack(["in 2024 and 1234"], numbers, 16), tmp_path, "gguf", "f32", progress=False)
    assert json.loads((tmp_path / "gguf-f32" / "verify.json").read_text())["largest_difference"] < 1e-3


def test_numbers_that_are_not_finite_are_refused(student, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "neighbours", lambda weights, heads: weights * float("nan"))
    with pytest.raises(ParityError, match="numbers that are not finite"):
        export(student, rows, tmp_path, "gguf", "f32", progress=False)
    assert json.loads((tmp_path / "gguf-f32" / "verify.json").read_text())["kl"] is None


def test_a_graph_that_looks_across_documents_is_refused(student, rows, tmp_path, monkeypatch):
    """deploy trap 2: a graph that was traced without positions answers the first document of a row only."""

    def careless(student, tensors, calibration, path, precision):
        path.parent.mkdir(parents=True)
        path.with_suffix(".bin").write_bytes(b"graph")
        return Written(path.with_suffix(".bin"), lambda _: lambda pair: student.net(pair[0]).logits, VERSIONS)

    monkeypatch.setitem(TARGETS, "careless", Target(careless, ("fp32",)))
    with pytest.raises(ParityError, match="largest difference of a log-probability is .* next tokens are others"):
        export(student, rows, tmp_path, "careless", progress=False)


def test_rows_without_a_position_that_counts(student, rows, tmp_path):
    """Nothing compared is nothing verified."""
    none = dataclasses.replace(rows, labels=np.full_like(rows.labels, -100))
    with pytest.raises(DataError, match="no position of the examples counts"):
        export(student, none, tmp_path, "huggingface", progress=False)


def test_a_damaged_folder_is_not_opened(shipped, student, rows, tmp_path):
    """Every file of the artefact is the one that passed, the tokenizer too."""
    found = export(student, rows, tmp_path, "huggingface", progress=False)
    path = found.folder / "model" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(FolderError, match="tokenizer.json is not the file that was verified"):
        sr.load(found.folder)


def test_exported_again_nothing_of_the_earlier_export_stays(student, rows, tmp_path):
    stale = tmp_path / "huggingface-fp32" / "model" / "model-00001-of-00002.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    found = export(student, rows, tmp_path, "huggingface", progress=False)
    assert not stale.exists()
    assert found.path == tmp_path / "huggingface-fp32" / "model"


def test_the_same_student_gives_the_same_gguf(student, rows, tmp_path):
    first, second = (export(student, rows, tmp_path / n, "gguf", "q8_0", progress=False).path for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_a_prompt_longer_than_llama_cpp_was_opened_for(shipped):
    with pytest.raises(UsageError, match="llama.cpp refuses 5000 tokens: .*context size"):
        shipped("gguf", "f32").run.after([5] * 5000)


@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [
        ("gguf", "fp32", "gguf has no precision 'fp32'; did you mean 'f32'"),
        ("gguf", "q4_k", "gguf has no precision 'q4_k'"),
        ("huggingface", "q8_0", "huggingface has no precision 'q8_0'; known: fp32, bf16"),
        ("hugingface", "fp32", "no export target 'hugingface'; did you mean 'huggingface'"),
    ],
)
def test_unknown_names_are_refused(target, precision, said, student, rows, tmp_path):
    with pytest.raises(UsageError, match=said):
        export(student, rows, tmp_path, target, precision, progress=False)


@pytest.mark.parametrize("target", ["gguf", "huggingface"])
def test_a_classifier_is_no_language_model(target, tmp_path):
    net = Student(torch.nn.Linear(4, 3), name="small")
    table = sr.Table({"x": torch.randn(8, 4)}, ids=tuple("abcdefgh"))
    with pytest.raises(UsageError, match=rf"{target} .*language model with its tokenizer; 'small' answers logits"):
        export(net, table, tmp_path, target, TARGETS[target].precisions[0], progress=False)


def test_an_unknown_family_is_named(student, rows, tmp_path, monkeypatch):
    monkeypatch.delitem(gguf.FAMILIES, "llama")
    with pytest.raises(UsageError, match="does not know the family 'llama'; known: qwen2, qwen3. Use onnx"):
        export(student, rows, tmp_path, "gguf", "f32", progress=False)


def test_an_unknown_rope_is_named(small_tokenizer, rows, tmp_path):
    made = causal.fresh(small_tokenizer, hidden=32, layers=1, heads=2)
    made.net.config.rope_parameters = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    with pytest.raises(UsageError, match="does not know the RoPE scaling 'yarn'; known: default, linear, llama3"):
        export(made, rows, tmp_path, "gguf", "f32", progress=False)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}, '"add_prefix_space": true'),
        ({"type": "Digits", "individual_digits": False}, "Digits"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for(parts, said):
    with pytest.raises(UsageError, match="no name for how this tokenizer cuts texts") as caught:
        gguf_tokens.cut_of({"pre_tokenizer": parts, "normalizer": None})
    assert said in str(caught.value)
    assert "known: gpt-2, smollm, llama-bpe, qwen2" in str(caught.value)


def test_cuts_by_name(small_tokenizer):
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    both = {"type": "Sequence", "pretokenizers": [digits, level]}
    assert gguf_tokens.cut_of(json.loads(small_tokenizer.backend_tokenizer.to_str())) == "gpt-2"
    assert gguf_tokens.cut_of({"pre_tokenizer": both, "normalizer": None}) == "smollm"


@pytest.mark.parametrize(("library", "extra"), [("gguf", "gguf"), ("xllamacpp", "llama")])
def test_missing_libraries_name_their_extra(library, extra, student, rows, tmp_path, monkeypatch):
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"stillroom\[{extra}\]"):
        export(student, rows, tmp_path, "gguf", "f32", progress=False)
    assert not (tmp_path / "gguf-f32").exists()


def test_a_metric_is_not_taken(student, rows, tmp_path):
    from stillroom.measures import METRICS

    with pytest.raises(UsageError, match="measured in bits per byte"):
        export(student, rows, tmp_path, "gguf", "f32", metric=METRICS["accuracy"], progress=False)


def test_what_is_no_gguf_is_said(tmp_path):
    path = Path(tmp_path / "broken.gguf")
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ParityError, match=r"llama.cpp does not open broken.gguf"):
        LlamaCpp(path)


@pytest.mark.parametrize("wanted", [{"target": "gguf"}, {"target": "huggingface", "precision": "q8_0"}])
def test_a_recipe_names_a_precision_of_its_target(wanted, recipe):
    with pytest.raises(UsageError, match=f"{wanted['target']} has no precision"):
        open_run(recipe(export=[wanted]), progress=False)


def test_a_recipe_ships_gguf_and_the_folder(recipe):
    """From the command's own path to a sealed run: the passport names what was shipped."""
    run = open_run(recipe(export=[{"target": "gguf", "precision": "q8_0"}, {"target": "huggingface"}]), progress=False)
    run.record()
    run.fit()
    assert [made.target for made in run.export().artifacts] == ["gguf", "huggingface"]
    run.seal()
    assert sr.provenance.verify(run.folder) == []
    passport = json.loads((run.folder / "passport.json").read_text())
    shipped = {entry["path"] for entry in passport["exports"]}
    assert shipped == {"exports/gguf-q8_0/model.gguf", "exports/huggingface-fp32/model/model.safetensors"}


@pytest.fixture
def recipe(small_tokenizer, tmp_path, monkeypatch):
    """A small run of texts, with a teacher in a folder."""
    monkeypatch.chdir(tmp_path)
    teacher = causal.fresh(small_tokenizer, hidden=32, layers=1, heads=2, seed=3)
    write_folder(teacher.net, small_tokenizer, tmp_path / "teacher")
    texts = [json.dumps({"id": str(n), "text": f"the cat number {n} sat on the mat"}) for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))

    def write(**changes):
        content = {
            "name": "tiny",
            "seeds": [0],
            "data": {
                "source": {"use": "jsonl", "path": "texts.jsonl", "text": "text"},
                "split": {"train": 0.7, "test": 0.3},
            },
            "tokens": {"length": 32},
            "teacher": {"use": "causal_lm", "model": "teacher"},
            "terms": {"teacher": {"licence": "own"}},
            "student": {"use": "fresh", "hidden": 32, "layers": 1, "heads": 2},
            "record": {"keep": [{"use": "top_k", "k": 16}]},
            "alone": None,
            "fit": {"epochs": 1, "batch_size": 8},
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.slow
def test_the_real_model_in_eight_bits(smollm2, tmp_path):
    """SmolLM2: a quarter of the bytes, the same words; both tokenizers agree on real texts, which never change."""
    licence = (Path(__file__).parent.parent / "LICENSE").read_text()
    texts = [licence[:6000], topics["assignment"][:6000], topics["import"][:6000]]
    rows = pack(
        [text[start : start + 1000] for text in texts for start in range(0, 6000, 1000)], smollm2.tokenizer, 128
    )
    made = causal.from_causal(smollm2.net, smollm2.tokenizer)
    found = export(made, rows, tmp_path, "gguf", "q8_0", progress=False)
    assert found.bytes < 0.27 * 4 * sum(p.numel() for p in made.net.parameters())
    assert found.verify["kl"] < 0.02
    assert found.verify["tokenizer"]["different"] == 0
    quality = found.verify["quality"]
    assert abs(quality["value"] / quality["student"]["value"] - 1) < 0.01

"""Published log-probabilities of tokens: each layout gives what the live teacher says, at the right position."""

import json
import math

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

import stillroom as sr
from language_fakes import student, teacher, tokenizer
from stillroom.errors import DataError, PairError, UsageError
from stillroom.language import boundaries
from stillroom.teachers.published import published_tokens
from stillroom.teachers.published.distillkit import Compression, unpacked

K = 12
CARD = "---\nlicense: apache-2.0\n---\n"


@pytest.fixture(scope="module")
def captured():
    """Nine texts that the live teacher drew, as ids, and its K likeliest after every token but the last."""
    own, live = tokenizer(), teacher()
    head = live.net.get_output_embeddings()
    order = torch.randperm(len(head.weight), generator=torch.Generator().manual_seed(1))
    # a random network with one matrix at both ends names the token that it reads; this one names another
    head.weight = torch.nn.Parameter(head.weight.detach()[order].clone(), requires_grad=False)
    draw = torch.Generator().manual_seed(2)
    documents, said = [], []
    for size in range(6, 33, 3):
        ids = [boundaries(own)[0]]
        with torch.no_grad():
            while len(ids) < size:
                shares = live.net(torch.tensor([ids])).logits[0, -1].softmax(-1)
                ids.append(int(torch.multinomial(shares, 1, generator=draw)))
            top = live.net(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).topk(K)
        documents.append(ids)
        said.append((top.indices.numpy(), top.values.numpy()))
    return own, live, documents, said


def jsonl(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(CARD)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def top_k(documents, said):
    return [{"input_ids": d, "token_ids": i.tolist(), "top_values": v.tolist()} for d, (i, v) in zip(documents, said)]


def axolotl(documents, said):
    """One row for each token, the last a filler of large negative numbers."""
    return [
        {
            "input_ids": d,
            "target_token_ids": [*i.tolist(), [0] * K],
            "target_logprobs": [*v.tolist(), [-1e9] * K],
        }
        for d, (i, v) in zip(documents, said)
    ]


def vllm(documents, said, scored=None):
    """Of the last ``scored`` tokens what each was drawn from, as entries by name."""
    rows = []
    for d, (i, v) in zip(documents, said):
        entries = [
            [{"token": f"token_id:{t}", "logprob": p} for t, p in zip(*pair)] for pair in zip(i.tolist(), v.tolist())
        ]
        rows.append({"input_ids": d, "logprobs": entries[-scored:] if scored else entries})
    return rows


def bits(numbers, size):
    """Packed by hand: highest bit first, filled with zeros to whole bytes."""
    stream = "".join(format(int(n), f"0{size}b") for n in numbers)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[at : at + 8], 2) for at in range(0, len(stream), 8)]


def distillkit(folder, documents, said, exact=K):
    """A capture: ``exact`` float32 values, then residuals of 8 bits under one float32 scale; ids of 9 bits."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(CARD)
    config = {"d": 329, "k": K, "exact_k": exact, "exact_dtype": "float32", "delta_encoding": False}
    config["residual_bins"] = []
    if exact < K:
        config["residual_bins"] = [{"scale_dtype": "float32", "element_bits": 8, "num_elements": K - exact}]
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for d, (i, v) in zip(documents, said):
        positions = []
        for values in v.astype(np.float32):
            packed = values[:exact].tobytes()
            if exact < K:
                scale = np.float32(np.abs(values[exact:]).max() / 128)
                codes = np.clip(np.round(values[exact:] / scale), -128, 127) + 128
                packed += scale.tobytes() + bytes(bits(codes, 8))
            positions.append(list(packed))
        rows.append({"input_ids": d, "compressed_logprobs": positions, "bytepacked_indices": [bits(p, 9) for p in i]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data_0.parquet")
    return folder


LAYOUTS = {
    "top_k": lambda folder, d, s: jsonl(folder, top_k(d, s)),
    "axolotl": lambda folder, d, s: jsonl(folder, axolotl(d, s)),
    "vllm": lambda folder, d, s: jsonl(folder, vllm(d, s)),
    "distillkit": distillkit,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_the_live_teacher_says_at_its_own_position(layout, captured, tmp_path):
    """Packed several to a row, each counted position holds the live teacher's K likeliest and the rest of its mass."""
    own, live, documents, said = captured
    made = published_tokens(LAYOUTS[layout](tmp_path / "set", documents, said), tokenizer=own)
    rows = sr.pack(made.documents, own, 64)
    batch = rows.batch(range(len(rows)))
    answer, truth = made(batch).logits, live(batch).logits
    expected = truth.compute().double().log_softmax(-1)
    kept = batch.mask
    torch.testing.assert_close(
        answer.log_probs[kept].double(), expected.gather(-1, answer.ids)[kept], atol=2e-4, rtol=0
    )
    assert (answer.ids[kept].sort(-1).values == expected.topk(K).indices[kept].sort(-1).values).all()
    tail = 1 - expected.topk(K).values.exp().sum(-1)
    torch.testing.assert_close(answer.rest[kept].exp().double(), tail[kept], atol=1e-4, rtol=0)
    assert (made.identity.licence, made.identity.route) == ("apache-2.0", "published-outputs")
    # the teacher against itself, in buckets, is 0; and a gradient arrives
    loss = sr.SoftTargets(temperature=1.0)(sr.Signal(logits=truth), made(batch), batch)["soft_targets"]
    assert float(loss[kept].abs().max()) < 1e-3


def test_one_position_off_is_refused(captured, tmp_path):
    """Rows that name the token they stand under: said, with both shares, and how to read them."""
    own, _, documents, said = captured
    published_tokens(jsonl(tmp_path / "right", top_k(documents, said)), tokenizer=own)
    wrong = [
        {**row, "token_ids": [[0] * K, *row["token_ids"]], "top_values": [[-9.0] * K, *row["top_values"]]}
        for row in top_k(documents, said)
    ]
    with pytest.raises(PairError, match=r"name the token itself at \d+% of the positions.*shifted by one"):
        published_tokens(jsonl(tmp_path / "wrong", wrong), tokenizer=own)


def test_a_prompt_that_was_not_scored_is_not_learned(captured, tmp_path):
    """Only the last five tokens have entries: those five are counted, and only they."""
    own, _, documents, said = captured
    made = published_tokens(jsonl(tmp_path / "set", vllm(documents, said, scored=5)), tokenizer=own)
    rows = sr.pack(made.documents, own, 64)
    assert rows.counted_tokens == sum(min(5, len(d) - 1) for d in documents)
    batch = rows.batch(range(len(rows)))
    assert bool(made(batch).logits.log_probs[batch.mask].isfinite().any(-1).all())


def test_a_student_learns_from_a_capture(captured, tmp_path):
    """Recorded like any teacher, and trained on: the divergence from the live teacher falls."""
    own, live, documents, said = captured
    made = published_tokens(distillkit(tmp_path / "set", documents, said), tokenizer=own, by="a large model")
    assert made.identity.name == "a large model, as published in set"
    rows = sr.pack(made.documents, own, 64)
    recording = sr.record(made, rows, tmp_path / "recording", sr.TopK(K), batch_size=2, progress=False)
    start = student()
    plan = sr.Plan(steps=60, batch_size=4, learning_rate=5e-3)
    after = sr.fit(start.copy(), recording, rows, sr.SoftTargets(temperature=1.0), plan=plan, progress=False)
    batch = rows.batch(range(len(rows)))

    def far(one):
        loss = sr.SoftTargets(temperature=1.0)(one.predict(batch), live(batch), batch)["soft_targets"]
        return float(loss[batch.mask].mean())

    assert far(after) < 0.6 * far(start)


def test_residuals_are_read_to_their_precision(captured, tmp_path):
    """Four exact values, the rest in 8 bits: within half a step; a curve and differences by hand."""
    own, _, documents, said = captured
    made = published_tokens(distillkit(tmp_path / "set", documents, said, exact=4), tokenizer=own)
    for document, (_, values) in zip(documents, said):
        row = made.rows[tuple(document[:-1])]
        step = np.abs(values[:, 4:]).max(1, keepdims=True) / 128
        scaled = row.log_probs - row.log_probs[:, :1] + values[:, :1]  # undo the scaling of a mass above 1
        assert (np.abs(scaled[:, 4:] - values[:, 4:]) <= step * 1.01).all()
    # exact -1; curve -0.5 - 0.25 t at t = 0, 1, 2; residuals in 2 bits of scale 0.5: codes 2, 3, 1 are 0, 0.5, -0.5
    config = Compression(d=16, k=4, exact_k=1, polynomial_terms=[0, 1], delta_encoding=True, residual_bins=[
        {"scale_dtype": "float32", "element_bits": 2, "num_elements": 3}])  # fmt: skip
    packed = b"".join(np.float32(x).tobytes() for x in (-1.0, -0.5, -0.25, 0.5)) + bytes(bits([2, 3, 1], 2))
    ids, log_probs = unpacked(
        {"compressed_logprobs": [list(packed)], "bytepacked_indices": [bits([3, 0, 15, 7], 4)]}, config
    )
    assert ids.tolist() == [[3, 0, 15, 7]]
    # differences -0.5, -0.25, -1.5 added up from -1
    assert log_probs.tolist() == [[-1.0, -1.5, -1.75, -3.25]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": [[1]]}, "no 'top_values' or 'token_ids' of one length"),
        ({"top_values": [[math.nan] * K] * 3, "token_ids": [[1] * K] * 3, "input_ids": [1, 2, 3, 4]}, "not finite"),
        ({"top_values": [[-0.1] * K] * 3, "token_ids": [[1] * K] * 3, "input_ids": [1, 2, 3, 4]}, "a mass above 1"),
        ({"top_values": [[-9.0]] * 2, "token_ids": [[1]] * 2, "input_ids": [1, 2, 3, 4]}, "2 positions for 4 tokens"),
        ({"input_ids": None}, "no 'input_ids'"),
        ({"input_ids": [5]}, "fewer than 2 tokens"),
    ],
)
def test_a_bad_row_is_set_aside(captured, tmp_path, change, reason):
    own, _, documents, said = captured
    rows = top_k(documents, said)
    made = published_tokens(jsonl(tmp_path / "set", [*rows, {**rows[0], **change}]), tokenizer=own)
    assert made.aside == [("rows.jsonl, line 10", reason)]
    assert made.told() == "9 published texts can be used, 1 are set aside"


def test_what_belongs_to_another_tokenizer_or_has_no_answers_is_refused(captured, tmp_path):
    own, _, documents, said = captured
    folder = jsonl(tmp_path / "set", top_k(documents, said))
    with pytest.raises(PairError, match=r"names id \d+, but the tokenizer has 100"):
        published_tokens(folder, tokenizer=own, vocabulary=100)
    made = published_tokens(folder, tokenizer=own)
    other = sr.pack(["the house slept after the bird"], own, 64)
    with pytest.raises(DataError, match="holds a text without published answers"):
        made(other.batch([0]))
    with pytest.raises(UsageError, match="no layout is known by the columns prompt"):
        published_tokens(jsonl(tmp_path / "texts", [{"prompt": "x"}]), tokenizer=own)
    (distillkit(tmp_path / "capture", documents, said) / "compression_config.yaml").unlink()
    with pytest.raises(DataError, match=r"compression_config.yaml is missing"):
        published_tokens(tmp_path / "capture", tokenizer=own)

"""The scoreboard of language models: from packed texts to a page, with what they write and what they saw before."""

import json
from types import SimpleNamespace

import pytest
import torch

from stillroom.data import pack
from stillroom.errors import PairError
from stillroom.evaluation import evaluate, load_report
from stillroom.measures import diagnose
from stillroom.measures.generations import PROMPT, causal_net, greedy, side_by_side
from stillroom.measures.language_cost import Alive, flops_per_token, generation_speed, memory, prefill_speed
from stillroom.measures.wording import cheaper, headline, helped, number, overlapping
from stillroom.report import write_report
from stillroom.students import causal
from stillroom.teachers.causal import from_causal
from stillroom.types import Signal, Sparse
from test_evaluation import SCHEMA
from test_report import EVIL, Page, same_numbers

jsonschema = pytest.importorskip("jsonschema")
COPIED = "the cat sat on the mat and the dog ran after it and then all of them slept"
TEXTS = [
    ("copied", f"one day {COPIED}"),
    ("umlauts", f"Grüße aus München {EVIL}"),
    ("short", "it is"),
    ("two", "a dog ran"),
]


@pytest.fixture(scope="module")
def texts(small_tokenizer):
    return pack(TEXTS, small_tokenizer, 96, together=False)


@pytest.fixture(scope="module")
def training(small_tokenizer):
    return pack([f"so {COPIED} again", "a king and a queen of long ago"], small_tokenizer, 96)


def make(tokenizer, seed, **sizes):
    return causal.fresh(tokenizer, **{"hidden": 32, "layers": 2, "heads": 2, "seed": seed, **sizes})


@pytest.fixture(scope="module")
def models(small_tokenizer):
    teacher = from_causal(make(small_tokenizer, 1).net, small_tokenizer)
    students = [make(small_tokenizer, seed, layers=1) for seed in (2, 3)]
    return {
        "teacher": teacher,
        "student": students,
        "alone": make(small_tokenizer, 4, layers=1),
        "untrained": students[1],
    }


@pytest.fixture(scope="module")
def folder(models, texts, training, tmp_path_factory):
    """A run whose language models were measured once, with everything."""
    place = tmp_path_factory.mktemp("run")
    evaluate(models, models["teacher"], texts, None, place / "report", training=training, replicates=50, progress=False)
    return place


def test_a_report_of_texts_has_its_own_numbers_and_costs(folder, texts):
    report = load_report(folder)
    jsonschema.validate(report.as_json(), SCHEMA)
    assert report.metric == "bits_per_byte"
    assert list(report.rows) == ["alone", "student", "teacher", "untrained"]
    teacher, student = report.rows["teacher"], report.rows["student"]
    assert teacher["kl"] is None
    assert set(student) - set(teacher) == set()
    for cost in ("parameters", "bytes", "flops_per_token", "prefill", "generation", "memory"):
        assert student[cost]["value"] > 0
        assert report.metrics[cost]["higher_is_better"] == (cost in ("prefill", "generation"))
    assert "latency" not in report.metrics
    assert teacher["flops_per_token"]["value"] > student["flops_per_token"]["value"]
    assert student["memory"]["value"] > student["bytes"]["value"]
    assert report.examples == 4
    assert sum(b["count"] for b in report.reliability["teacher"]) == texts.counted_tokens
    assert [(c["metric"], c["worse"]) for c in report.comparisons] == [
        ("bits_per_byte", "alone"),
        ("bits_per_byte", "untrained"),
        ("kl", "alone"),
        ("kl", "untrained"),
    ]


def test_the_batch_is_bounded_by_tokens_and_changes_nothing(models, texts):
    first = evaluate(models, models["teacher"], texts, replicates=10, costs=False, progress=False)
    other = evaluate(models, models["teacher"], texts, replicates=10, costs=False, progress=False, batch_size=1)
    assert first.settings["batch_size"] == 8192 // 96
    assert first.generations == []
    for row, cells in first.rows.items():
        for name, cell in cells.items():
            assert (cell is None) == (other.rows[row][name] is None)
            assert cell is None or cell["value"] == pytest.approx(other.rows[row][name]["value"], rel=1e-4, abs=1e-6)


def test_intervals_are_over_documents_and_not_over_their_pieces(models, small_tokenizer):
    """Documents cut into pieces are resampled whole: the numbers and intervals of rows that hold them whole."""
    # without a layer there is no attention, so a piece is answered as it is within the whole
    blind = from_causal(causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2, seed=5).net, small_tokenizer)
    blind.net.model.layers = torch.nn.ModuleList()
    texts = [
        " ".join(["the cat sat on", "a dog ran after", "all of them slept"][: 1 + n % 3] * (2 + n)) for n in range(9)
    ]
    found = []
    for length in (16, 160):
        rows = pack(texts, small_tokenizer, length, together=False)
        report = evaluate({"student": blind}, blind, rows, metrics=["bits_per_byte"], costs=False, progress=False)
        assert report.examples == 9
        found.append(report.rows["student"]["bits_per_byte"])
    assert len(pack(texts, small_tokenizer, 16, together=False)) > 20
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0]["low"] < found[0]["value"] < found[0]["high"]


def test_every_row_goes_on_from_the_same_beginnings(folder, models, small_tokenizer):
    """Greedy, as transformers' generate without sampling; prompt and text together are the document."""
    found = load_report(folder).generations
    assert [g["id"] for g in found] == [name for name, _ in TEXTS]
    for generation, (_, text) in zip(found, TEXTS, strict=True):
        assert set(generation["rows"]) == {"teacher", "student", "alone", "untrained"}
        assert text.startswith(generation["prompt"] + generation["text"][:20])
        assert len(generation["text"]) > 0
    ids = [0, *small_tokenizer(TEXTS[0][1]).input_ids]
    prompt = torch.tensor([ids[: min(PROMPT, len(ids) // 2)]])
    net = models["alone"].net
    own = net.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :].tolist()
    assert list(greedy(net, prompt, 12, {2})) == own
    assert list(greedy(net, prompt, 12, {own[3]})) == own[: own.index(own[3]) + 1]


def test_the_prompt_of_a_conversation_is_all_before_the_answer(models, small_tokenizer):
    from stillroom.language.chat import Chat

    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}]
    rows = pack([("chat", chat)], small_tokenizer, 64, chat=Chat())
    (found,) = side_by_side({"alone": (models["alone"],)}, rows, small_tokenizer)
    assert found["prompt"].endswith("the cat?\nassistant\n")
    assert found["text"].startswith("sat on the mat")


def test_what_is_in_training_too_is_said(folder):
    report = load_report(folder)
    assert (report.overlap["found"], report.overlap["documents"], report.overlap["n"]) == (1, 2, 18)
    assert report.overlap["examples"][0]["evaluation"] == "copied"
    assert "1 of the 2 test texts (50.0 %) share 18 tokens in a row with a training text" in " ".join(
        str(report).split()
    )
    none = {**report.overlap, "found": 0, "too_short": 0}
    assert overlapping(none) == "None of the 2 test texts shares 18 tokens in a row with a training text."


def test_texts_differ_at_the_token_where_they_are_furthest(folder, models, texts, small_tokenizer):
    """What comes before it, the token that follows in the text, and what each row says there."""
    shown = load_report(folder).disagreements
    assert len(shown) == 4
    asked = [models["student"][0].predict, models["teacher"]]
    for found in shown:
        row = texts.ids.index(found["id"])
        batch = texts.batch([row])
        ours, theirs = (model(batch).logits.compute()[0].detach().softmax(-1) for model in asked)
        gap = (ours - theirs).abs().sum(-1).masked_fill(~batch.mask[0], -1)
        place = int(gap.argmax())
        before = small_tokenizer.decode(batch.inputs["tokens"][0, : place + 1].tolist(), skip_special_tokens=True)
        assert found["input"]["text"] == before
        assert json.loads(found["label"]) == small_tokenizer.decode([int(batch.labels[0, place])])
        assert json.loads(found["answers"]["teacher"]) == small_tokenizer.decode([int(theirs[place].argmax())])
        assert found["confidences"]["student"] == pytest.approx(float(ours[place].max()), abs=1e-3)


def test_the_page_shows_numbers_writing_and_overlap_and_runs_nothing(folder):
    html = write_report(folder).read_text()
    page = Page(html)
    same_numbers(page.cells, load_report(folder))
    text = "".join(page.text)
    for part in ("What they write", "Did it see the test before?", "of the tokens", "Quality against speed"):
        assert part in text, part
    assert [found["data-generation"] for _, found in page.tags if "data-generation" in found][:4] == [
        "teacher",
        "student",
        "alone",
        "untrained",
    ]
    assert EVIL[:60] in "".join(g["prompt"] + g["text"] for g in load_report(folder).generations)
    assert EVIL[:8] in text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [found for _, found in page.tags if any(name.startswith("on") for name in found)]


def test_the_table_of_texts_fits_a_terminal(folder):
    text = str(load_report(folder))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "bits per" in text
    assert "writes," in text


def test_a_model_of_another_tokenizer_is_refused(models, texts):
    """Equal ids that mean other texts."""
    other = models["alone"].copy()
    tokenizer = SimpleNamespace(**vars(other.identity))
    wrong = lambda batch: models["alone"](batch)  # noqa: E731
    wrong.identity = other.identity.__class__(**{**vars(tokenizer), "tokenizer": "f" * 64})
    with pytest.raises(PairError, match=r"row 'alone' reads tokens of tokenizer ffffffffffff, the examples are of"):
        evaluate({**models, "alone": wrong}, models["teacher"], texts, costs=False, progress=False)


def test_a_recorded_teacher_is_measured_without_costs_or_writing(models, texts):
    """Sampled answers: what cannot be known of them is left out, the rest is there."""

    def recorded(batch):
        logits = models["teacher"](batch).logits.compute().log_softmax(-1)
        ids = torch.multinomial(logits.exp().flatten(0, 1), 8, replacement=True).reshape(*logits.shape[:2], 8)
        return Signal(logits=Sparse(ids, logits.gather(-1, ids), torch.zeros(logits.shape[:2]), logits.shape[-1], True))

    report = evaluate({"student": models["alone"]}, recorded, texts, replicates=10, progress=False)
    assert report.rows["teacher"]["bits_per_byte"] is None
    assert report.rows["teacher"]["generation"] is None
    assert report.rows["student"]["kl"]["value"] > 0
    assert set(report.generations[0]["rows"]) == {"student"}
    assert causal_net(recorded) is None


# Costs


def test_operations_are_counted_with_head_and_attention(small_tokenizer):
    """2 x the numbers of every matrix, and 4 x T x width for attention over T tokens."""
    net = make(small_tokenizer, 0, layers=1).net
    matrices = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = net.get_output_embeddings().weight.numel()
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        assert flops_per_token(net, tokens) == 2 * (matrices + head) + 4 * 16 * 32


def test_tensors_alive_are_counted_by_hand():
    """a is gone before c is made: two of 4,000 bytes at once; views and the network's own weights are no more."""
    net = torch.nn.Linear(10, 10)
    with torch.no_grad(), Alive(net) as alive:
        a = torch.zeros(1000)
        b = a + 1
        a = None
        c = b * 2
        view = c.view(10, 100)[2:]
        net.weight.t()
        assert alive.now == 8000
    assert alive.peak == 8000
    assert len(view) == 8


def test_memory_is_repeatable_and_grows_with_the_prompt(small_tokenizer):
    net = make(small_tokenizer, 0).net
    sizes = [memory(net, torch.zeros(1, n, dtype=torch.long)) for n in (16, 16, 64)]
    assert sizes[0] == sizes[1] < sizes[2]


def test_speeds_take_seconds_and_have_intervals(small_tokenizer):
    net = make(small_tokenizer, 0).net
    tokens = torch.zeros(1, 32, dtype=torch.long)
    with torch.no_grad():
        for found in (prefill_speed(net, tokens), generation_speed(net, tokens)):
            assert 0 < found.low <= found.value <= found.high
        assert prefill_speed(net, tokens).value > generation_speed(net, tokens).value  # 32 tokens at once


# Words


def cell(value):
    return {"value": value, "low": value, "high": value}


def pair(metric, difference, low, high):
    return {
        "better": "student",
        "worse": "alone",
        "metric": metric,
        "seeds": 1,
        "difference": difference,
        "low": low,
        "high": high,
    }


def test_faster_writing_is_faster():
    rows = {
        "teacher": {"generation": cell(10.0), "memory": cell(4e6)},
        "student": {"generation": cell(25.0), "memory": cell(1e6)},
    }
    assert cheaper(rows, "student", "generation") == "2.5× faster"
    assert cheaper(rows, "student", "memory") == "4.0× less"
    assert number(17.34, "generation") == "17.3"
    assert number(12345.6, "prefill") == "12,346"
    rows["teacher"]["bits_per_byte"], rows["student"]["bits_per_byte"] = cell(1.0), cell(1.25)
    said = headline(rows, "bits_per_byte", False)
    assert said.startswith("The student reaches bits per byte 1.250, the teacher 1.000, and is 2.5× faster at writing.")


def test_closer_to_the_teacher_but_no_better_at_the_text_is_said_so():
    """Perplexity ties with cross-entropy while fidelity improves: neither a success nor nothing."""
    tied = [pair("bits_per_byte", 0.001, -0.01, 0.012), pair("kl", 0.2, 0.15, 0.25)]
    said = helped(tied)
    assert said.startswith("No help from the teacher is shown")
    assert said.endswith("It does follow the teacher more closely (KL lower by 0.200 nats, 95 % 0.150 to 0.250).")
    assert "closely" not in helped([pair("bits_per_byte", 0.1, 0.05, 0.2), tied[1]])
    assert "closely" not in helped([tied[0], pair("kl", 0.0, -0.1, 0.1)])
    rows = {
        "teacher": {"bits_per_byte": cell(1.0)},
        "student": {"bits_per_byte": cell(1.3), "kl": cell(0.4), "agreement": cell(0.7)},
        "alone": {"bits_per_byte": cell(1.301), "kl": cell(0.6), "agreement": cell(0.6)},
    }
    about = {"bits_per_byte": {"higher_is_better": False}, "kl": {"higher_is_better": False}}
    reasons = " ".join(
        diagnose(rows, tied, about, metric="bits_per_byte", examples=30, teacher_entropy=3.0, classes=500)
    )
    assert "more closely than the student trained alone (KL 0.400 against 0.600 nats), but predicts the text" in reasons
    assert "only on 0.700 of the tokens" in reasons
    assert "With 30 test texts this comparison" in reasons
    assert diagnose(rows, [pair("bits_per_byte", 0.1, 0.05, 0.2)], about, metric="bits_per_byte", examples=30) == []

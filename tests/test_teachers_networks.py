"""Networks as teachers: mode, gradient, identity, weights that fit; and where ready models are found."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stillroom.digests import state_digest
from stillroom.errors import MissingFileError, UsageError
from stillroom.network import Columns
from stillroom.places import locate
from stillroom.students.architectures import mlp
from stillroom.students.networks import Student, save_student
from stillroom.students.teaching import from_run
from stillroom.teachers.heads import STRENGTHS, choose_strength, fit_head
from stillroom.teachers.networks import from_factory, from_network
from stillroom.types import Batch, Model


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def batch(count=6):
    return Batch(tuple(map(str, range(count))), {"x": torch.randn(count, 3)})


def test_answers_in_evaluation_mode_whatever_mode_the_network_is_in():
    """A shared or switched network still trains afterwards; dropout and statistics never reach the answers."""
    module = net()
    teacher = from_network(module, classes=("a", "b"), name="t", licence="MIT", source="here")
    asked = batch()
    expected = teacher(asked).logits.values
    module.train()
    before = module[1].running_mean.clone()
    assert torch.equal(teacher(asked).logits.values, expected)
    assert module.training
    assert module[2].training
    assert torch.equal(module[1].running_mean, before)


def test_gives_no_gradient():
    teacher = from_network(net())
    asked = batch()
    asked.inputs["x"].requires_grad_()
    assert not teacher(asked).logits.values.requires_grad


def test_says_who_it_is():
    module = net()
    teacher = from_network(module, classes=("a", "b"), name="t", licence="MIT", source="here", route="own-account")
    assert isinstance(teacher, Model)
    assert teacher.identity.digest == state_digest(module.state_dict())
    assert (teacher.identity.licence, teacher.identity.route) == ("MIT", "own-account")
    assert teacher.identity.classes == ("a", "b")
    with pytest.raises(UsageError, match="'license'"):
        from_network(module, license="MIT")


def test_values_features_and_columns():
    teacher = from_network(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), Columns(("z",)), answers="values")
    signal = teacher.with_features(("0",)).with_features(("0", "1"))(Batch(("a",), {"z": torch.ones(1, 3)}))
    assert signal.logits is None
    assert signal.values.shape == (1, 1)
    assert set(signal.features) == {"0", "1"}


FACTORY = "from torch import nn\ndef make(width=2):\n    return nn.Linear(3, width)\ndef wrong():\n    return 3\n"


def test_a_factory_in_a_file_with_weights(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    known = nn.Linear(3, 2)
    save_file(known.state_dict(), tmp_path / "w.safetensors")
    torch.save(known.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": known.state_dict(), "epoch": 3}, tmp_path / "lightning.ckpt")
    for name in ("w.safetensors", "w.pt", "lightning.ckpt"):
        teacher = from_network("mine.py:make", weights=name, folder=tmp_path, arguments={"width": 2})
        assert teacher.identity.digest == state_digest(known.state_dict())
    with pytest.raises(UsageError, match="returned int"):
        from_network("mine.py:wrong", folder=tmp_path)
    with pytest.raises(UsageError, match="factory"):
        from_network(known, arguments={"width": 2})


def test_weights_that_do_not_fit_are_refused_whole(tmp_path):
    """A teacher that loads half of its weights answers, and is wrong without a word (mmrazor#456)."""
    save_file({"weight": torch.ones(2, 4), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    module = nn.Linear(3, 2)
    before = state_digest(module.state_dict())
    with pytest.raises(UsageError, match=r"missing bias; unknown extra; weight is \[2, 4\], not \[2, 3\]"):
        from_network(module, weights=tmp_path / "w.safetensors")
    assert state_digest(module.state_dict()) == before
    with pytest.raises(MissingFileError, match=r"none\.pt"):
        from_network(module, weights=tmp_path / "none.pt")


def test_pickled_objects_are_never_loaded(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "whole.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("whole.pt", "junk.pt", "list.pt"):
        with pytest.raises(UsageError, match=name):
            from_network(nn.Linear(3, 2), weights=tmp_path / name)


def test_places(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: []\n---\n# x\n")
    found = locate(folder)
    assert (found.source, found.licence, found.local) == ("folder my-model", "apache-2.0", True)
    assert locate("hf:org/name").local is False
    inside = locate("package:numpy/linalg")
    assert inside.source.startswith("package numpy 2")
    for wrong, message in (
        ("nowhere", "package:NAME"),
        ("package:numpy/nowhere", "no folder 'nowhere'"),
    ):
        with pytest.raises(MissingFileError, match=message):
            locate(wrong)
    for wrong, message in (("hf:a b", "no hub name"), ("package:not_there_at_all/x", "not installed")):
        with pytest.raises(UsageError, match=message):
            locate(wrong)


def test_head_is_the_logistic_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    embeddings = nn.functional.normalize(torch.randn(120, 6), dim=1)
    labels = (embeddings[:, 0] * 3 + torch.randn(120)).round().long().clamp(-1, 1) + 1
    head = fit_head(embeddings, labels, 3)
    strength = choose_strength(embeddings.double(), labels, 3)
    other = linear_model.LogisticRegression(C=strength, max_iter=10_000, tol=1e-10).fit(embeddings.numpy(), labels)
    expected = torch.from_numpy(other.predict_log_proba(embeddings.numpy())).float()
    torch.testing.assert_close(head(embeddings).log_softmax(-1).detach(), expected, rtol=1e-3, atol=1e-3)


def test_head_strength_is_low_for_noise_and_high_for_a_clean_rule():
    embeddings = nn.functional.normalize(torch.randn(200, 20), dim=1)
    assert choose_strength(embeddings.double(), torch.randint(0, 3, (200,)), 3) == STRENGTHS[0]
    assert choose_strength(embeddings.double(), (embeddings[:, 0] > 0).long(), 2) >= STRENGTHS[2]


def test_head_with_few_rows_or_a_class_without_rows():
    head = fit_head(torch.eye(4), torch.tensor([0, 0, 2, 2]), 3)
    assert head(torch.eye(4)).argmax(1).tolist() == [0, 0, 2, 2]
    assert bool(head.weight.isfinite().all())


def test_a_factory_in_the_words_of_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "w.safetensors")
    teacher = from_factory(
        "mine.py:make", weights="w.safetensors", columns=("z",), classes=("a", "b"), folder=tmp_path, licence="MIT"
    )
    assert teacher(Batch(("a",), {"z": torch.ones(1, 3)})).logits.vocabulary == 2
    assert (teacher.identity.classes, teacher.identity.licence) == (("a", "b"), "MIT")
    assert from_factory("mine.py:make", weights="own", answers="values", classes=("a",), folder=tmp_path).answers
    with pytest.raises(UsageError, match="weights='own'"):
        from_factory("mine.py:make", folder=tmp_path)


def test_an_earlier_student_teaches(tmp_path):
    """Middle-sized networks between a large teacher and a small student are runs of their own."""
    student = Student.make(mlp, {"inputs": 3, "outputs": 2, "dropout": 0.5}, classes=("a", "b"))
    save_student(student, tmp_path / "middle" / "student")
    for name in ("middle", "middle/student"):
        teacher = from_run(name, folder=tmp_path, licence="MIT")
        teacher.student.net.train()
        asked = batch()
        assert torch.equal(teacher(asked).logits.values, student.predict(asked).logits.values)
        assert not teacher(asked).logits.values.requires_grad
    assert teacher.identity.digest == student.identity.digest
    assert teacher.identity.classes == ("a", "b")
    assert set(teacher.with_features(("hidden1",))(batch()).features) == {"hidden1"}
    with pytest.raises(MissingFileError, match="holds no student"):
        from_run("none", folder=tmp_path)

"""The page that ships answers like the student: every example goes through a browser."""

import functools
import json
import shutil

import pytest
import torch

from stillroom.errors import FolderError, MissingExtraError, ParityError, UsageError
from stillroom.exporting import export
from stillroom.exporting.web import browser, fetched
from stillroom.students.networks import Student
from test_exporting import case

CHROMIUM = next((name for name in browser.BROWSERS if shutil.which(name)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found")
needs_package = pytest.mark.skipif(not fetched.is_there(), reason="no npm, and onnxruntime-web is not in the cache")
quick = functools.partial(export, target="web", progress=False)


@pytest.mark.slow
@needs_browser
@needs_package
def test_the_page_answers_like_the_student(tmp_path):
    """All 160 examples, in batches and one by one; the folder needs nothing but a web server."""
    student, examples = case("mlp")
    made = quick(student, examples, tmp_path)
    assert made.verify["passed"]
    assert made.verify["agreement"] == 1
    assert made.verify["memory"]["peak_bytes"] > 1e6
    assert made.verify["versions"]["onnxruntime-web"] == fetched.VERSION
    names = {path.name for path in made.path.iterdir()}
    assert names == {"index.html", "answer.mjs", "about.json", "model.onnx", *fetched.FILES}
    ours = student.predict(examples.batch(range(5))).logits.values
    torch.testing.assert_close(made(examples.batch(range(5))).logits.values, ours, atol=1e-4, rtol=1e-4)


@needs_browser
def test_a_page_that_does_not_run_is_an_error_with_the_browsers_words(tmp_path):
    (tmp_path / browser.ABOUT).write_text(json.dumps({"inputs": []}))
    (tmp_path / "answer.mjs").write_text("throw new Error('no runtime here');")
    with pytest.raises(ParityError, match="no runtime here"):
        browser.open_page(tmp_path)


def test_a_package_that_was_changed_is_not_used(tmp_path, monkeypatch):
    """The archive is checked by the sha512 that npm publishes."""
    monkeypatch.setenv(fetched.PLACE, str(tmp_path))
    (tmp_path / f"{fetched.PACKAGE}-{fetched.VERSION}.tgz").write_bytes(b"something else")
    with pytest.raises(FolderError, match="is not the onnxruntime-web"):
        fetched.runtime()
    assert fetched.integrity(b"") == (
        "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg=="
    )


def test_without_npm_and_package_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(fetched.PLACE, str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="put the file at"):
        fetched.runtime()


@needs_browser
@needs_package
def test_a_language_model_is_not_a_page(tmp_path):
    student, examples = case("mlp")
    with pytest.raises(UsageError, match=r"Use gguf"):
        quick(Student(student.net, answers="next_token"), examples, tmp_path)

"""The page says what the files say, whatever they say, and needs nothing but itself."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from stillroom.errors import FolderError, MissingFileError
from stillroom.evaluation import evaluate, load_report
from stillroom.report import write_report
from stillroom.types import Batch, Dense, Signal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>" onload="alert(3)'


class Texts:
    """Examples of a text and a picture; the second class has an evil name."""

    classes = ("plain", EVIL, "third")

    def __init__(self, count=60):
        torch.manual_seed(0)
        self.scores = torch.randn(count, 3)
        self.pictures = torch.rand(count, 1, 8, 8)
        self.labels = (self.scores + torch.randn(count, 3)).argmax(-1)

    def __len__(self):
        return len(self.scores)

    def batch(self, indices, views=None):
        index = torch.tensor(list(indices), dtype=torch.long)
        texts = tuple(f"{EVIL} number {i}" for i in index.tolist())
        inputs = {"text": texts, "picture": self.pictures[index], "scores": self.scores[index]}
        return Batch(tuple(f"{EVIL}-{i}" for i in index.tolist()), inputs, self.labels[index])


def model(strength, noise=0.0):
    def answer(batch):
        values = batch.inputs["scores"]
        return Signal(logits=Dense(strength * values + noise * values.roll(1, -1)))

    return answer


@pytest.fixture
def run(tmp_path):
    """A run folder with every stage's file."""
    folder = tmp_path / EVIL.replace("/", "_")
    models = {"student": [model(1.0, 0.5), model(1.0, 0.4)], "alone": model(0.3, 0.6), "untrained": model(0.0, 1.0)}
    evaluate(models, model(2.0), Texts(), folder=folder / "report", replicates=100, progress=False)
    for place in ("student", "alone", "seeds/1/student"):
        (folder / place).mkdir(parents=True)
        steps = [{"step": i, "epoch": i / 4, "loss": 2 / (i + 1), "terms": {}, "examples": i} for i in range(700)]
        (folder / place / "history.jsonl").write_text("\n".join(json.dumps(step) for step in steps) + "\n")
    verify = {
        "format": "stillroom-verify/1",
        "target": "onnx",
        "precision": "int8",
        "file": EVIL,
        "bytes": 12345,
        "agreement": 0.9931,
        "largest_difference": None,
        "quality": {"metric": "accuracy", "value": 0.81, "low": 0.8, "high": 0.82},
        "latency": {"batch": 1, "median_seconds": 1.5e-4, "low": 1e-4, "high": 2e-4},
        "passed": False,
    }
    write(folder / "exports/onnx-int8/verify.json", verify)
    teacher = {"name": EVIL, "licence": "Apache-2.0", "digest": "ab" * 32, "source": "a package 1.0"}
    data = {"name": "sentences", "rows": 1234, "digest": "cd" * 32, "licence": "CC-BY-4.0", "source": "unknown"}
    write(folder / "recording/manifest.json", {"teacher": teacher, "data": data, "fidelity": {"kl": 1e-7}})
    write(folder / "student/student.json", {"content_digest": "ef" * 32})
    write(folder / "passport.json", {})
    return folder


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, cells of the scoreboard, text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells, self.row, self.text = [], {}, None, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if "data-row" in found:
            self.row = found["data-row"]
        if "data-metric" in found:
            self.cells[self.row, found["data-metric"]] = found["data-value"]

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder):
    return Page(write_report(folder).read_text())


def same_numbers(cells, report):
    wanted = {(row, name): cell for row, values in report.rows.items() for name, cell in values.items()}
    assert set(cells) == set(wanted)
    for key, cell in wanted.items():
        assert cells[key] == "" if cell is None else float(cells[key]) == cell["value"]


def test_the_scoreboard_holds_the_numbers_of_the_report(run):
    """Every cell of report.json is in the table, exactly; the headline says whether the teacher helped."""
    page = page_of(run)
    same_numbers(page.cells, load_report(run))
    headline = next(found for _, found in page.tags if found.get("id") == "headline")
    assert headline["data-verdict"] in ("better", "worse", "unclear")
    assert [found["data-row"] for _, found in page.tags if "data-row" in found] == [
        "teacher",
        "student",
        "alone",
        "untrained",
    ]


def test_every_stage_is_on_the_page(run):
    page = page_of(run)
    text = " ".join(page.text)
    for word in (
        "int8",
        "99.31 %",
        "150 µs",
        "FAILED",
        "12.3 kB",
        "1,234 examples",
        "“Alone” is the same student",
        "CC-BY-4.0",
        "ab" * 32,
        "passport",
    ):
        assert word in text, word
    labels = [found["aria-label"] for tag, found in page.tags if tag == "svg"]
    assert len(labels) == 4  # comparisons, latency (plain functions have no parameters), reliability, training
    assert any("Training loss" in label for label in labels)


def test_nothing_from_a_file_becomes_markup(run):
    """Texts, ids, class names, file names and the run's own name are shown as they are, and never run."""
    html = write_report(run).read_text()
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link")]
    assert not [found for _, found in page.tags if any(name.startswith("on") for name in found)]
    assert "<script" not in html
    assert EVIL in "".join(page.text)
    content = json.loads((run / "report/report.json").read_text())
    content["disagreements"][0]["input"]["picture"] = {"image": 'x" onerror="alert(1)'}
    content["disagreements"][1]["input"]["picture"] = {"image": "https://example.org/a.png"}
    write(run / "report/report.json", content)
    pictures = [found["src"] for tag, found in page_of(run).tags if tag == "img"]
    assert len(pictures) == len(content["disagreements"]) - 2
    assert all(source.startswith("data:image/png;base64,") for source in pictures)


def test_the_page_is_one_small_file_without_a_network(run):
    """No address but those of XML's name spaces, unique ids, described pictures, and well below 1.5 MB."""
    path = write_report(run)
    html = path.read_text()
    assert path.stat().st_size < 1_500_000
    addresses = {found for found in re.findall(r"https?://[^\s\"'<>)]+", html) if "w3.org" not in found}
    assert not addresses
    page = Page(html)
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert all(found.get("alt") for tag, found in page.tags if tag == "img")
    assert all(found.get("aria-label") for tag, found in page.tags if tag == "svg")
    assert not re.search(r"#0a0b|#01020", html)  # every stand-in colour has become one of the page's own


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.parametrize(
    "missing", ["report", "student", "alone", "seeds", "exports", "recording", "passport.json", "everything"]
)
def test_every_file_is_optional(run, missing):
    """A page is made of what is there."""
    for path in list(run.iterdir()):
        if missing in ("everything", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert ("Nothing has been measured yet." in " ".join(page.text)) == (missing in ("report", "everything"))


def test_a_report_without_a_control_says_so(tmp_path):
    """No row 'alone': whether the teacher helped is not known, and the page does not claim it."""
    evaluate({"student": model(1.0)}, model(2.0), Texts(), folder=tmp_path / "report", replicates=20, progress=False)
    text = " ".join(page_of(tmp_path).text)
    assert "is not known: there is no row 'alone'" in text
    assert "“Alone” is" not in text


def test_no_help_is_said_plainly_with_its_reasons(tmp_path):
    same = model(1.0, 0.4)
    models = {"student": same, "alone": same}
    evaluate(models, model(2.0), Texts(), folder=tmp_path / "report", replicates=50, costs=False, progress=False)
    text = " ".join(page_of(tmp_path).text)
    assert "No help from the teacher is shown" in text
    assert "What may be the reason" in text


def test_regression_has_a_page(tmp_path):
    """Numbers instead of classes: no reliability, answers as numbers."""
    x = torch.randn(40, 2)

    class Numbers:
        def __len__(self):
            return 40

        def batch(self, indices, views=None):
            index = torch.tensor(list(indices))
            return Batch(tuple(map(str, index.tolist())), {"x": x[index]}, x[index].sum(-1) + 0.1)

    def line(scale):
        return lambda batch: Signal(values=scale * batch.inputs["x"].sum(-1))

    models = {"student": line(0.9), "alone": line(0.8)}
    report = evaluate(models, line(1.0), Numbers(), folder=tmp_path / "report", replicates=50, progress=False)
    page = page_of(tmp_path)
    same_numbers(page.cells, report)
    assert "Is it as sure as it is right?" not in " ".join(page.text)


def test_damaged_or_missing_folders_are_named(run, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    (run / "student/history.jsonl").write_text('{"step": 1, "loss": 1}\n{"step"')
    with pytest.raises(FolderError, match="line 2"):
        write_report(run)


def in_browser(path, profile, *flags):
    """Chromium's output and its console lines for a page."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    more = ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, *more, "--enable-logging=stderr", "--v=0", *flags]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found")
def test_a_browser_reads_the_same_numbers_and_reports_no_error(run, tmp_path):
    """In headless Chromium: the numbers in the DOM are those of report.json, and the console stays empty."""
    dom, console = in_browser(write_report(run), tmp_path / "profile", "--dump-dom")
    assert console == []
    page = Page(dom)
    same_numbers(page.cells, load_report(run))
    assert "alert" not in "".join(str(found) for tag, found in page.tags if tag == "script")

"""The scoreboard is the same for the same models, honest when nothing was gained, and clear about what is wrong."""

import json
import math

import jsonschema
import pytest
import torch
from torch import nn

from stillroom.errors import DataError, FolderError, MissingFileError, SignalError, UsageError
from stillroom.evaluation import Report, evaluate, load_report
from stillroom.measures import METRICS
from stillroom.students.networks import Student
from stillroom.types import Batch, Dense, Identity, Metric, Signal

CLASSES = ("cat", "dog", "eel")
CELL = {
    "type": ["object", "null"],
    "required": ["value", "low", "high"],
    "additionalProperties": False,
    "properties": {key: {"type": "number"} for key in ("value", "low", "high")},
}
SCHEMA = {
    "type": "object",
    "required": ["format", "metric", "examples", "rows", "comparisons", "metrics", "reliability", "disagreements"],
    "properties": {
        "format": {"const": "stillroom-report/1"},
        "metric": {"type": "string"},
        "examples": {"type": "integer"},
        "rows": {"additionalProperties": {"type": "object", "additionalProperties": CELL}},
        "comparisons": {
            "items": {"required": ["better", "worse", "metric", "difference", "low", "high", "seeds"], "type": "object"}
        },
        "metrics": {"additionalProperties": {"required": ["higher_is_better", "unit", "about"]}},
        "reliability": {
            "additionalProperties": {"items": {"required": ["low", "high", "confidence", "accuracy", "count"]}}
        },
        "disagreements": {"items": {"required": ["id", "input", "label", "answers", "divergence"]}},
        "diagnosis": {"items": {"type": "string"}},
    },
}


class Rows:
    """Examples of one tensor column."""

    def __init__(self, x, labels, classes=CLASSES):
        self.x, self.labels, self.classes = x, labels, classes

    def __len__(self):
        return len(self.x)

    def batch(self, indices, views=None):
        index = torch.tensor(list(indices), dtype=torch.long)
        labels = None if self.labels is None else self.labels[index]
        return Batch(tuple(f"e{i}" for i in index.tolist()), {"x": self.x[index]}, labels)


def examples_of(count=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return Rows(x, (x[:, :3] + 0.3 * torch.randn(count, 3, generator=generator)).argmax(-1))


def linear(strength, seed=0):
    """A network that reads the first three inputs, well or badly: logits = strength x + noise."""
    torch.manual_seed(seed)
    net = nn.Linear(6, 3)
    with torch.no_grad():
        net.weight.mul_(0.5)
        net.weight[:, :3] += strength * torch.eye(3)
    return Student(net)


@pytest.fixture
def models():
    return {
        "teacher": linear(4.0),
        "student": [linear(2.0, seed) for seed in (1, 2)],
        "alone": [linear(0.7, seed) for seed in (3, 4)],
        "untrained": linear(0.0, 5),
    }


def run(models, examples, **settings):
    return evaluate(models, models["teacher"], examples, **{"replicates": 100, "progress": False, **settings})


def test_a_report_has_every_row_and_says_what_helped(models, tmp_path):
    """The file keeps its schema; rows, seeds, comparisons and costs are there; it opens again as it was."""
    report = run(models, examples_of(), folder=tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(content, SCHEMA)
    assert set(content["rows"]) == {"teacher", "student", "alone", "untrained"}
    assert content["rows"]["teacher"]["agreement"] is None
    assert content["rows"]["student"]["parameters"] == {"value": 21, "low": 21, "high": 21}
    assert content["rows"]["student"]["flops"]["value"] == 2 * 6 * 3
    assert content["rows"]["student"]["latency"]["value"] > 0
    assert content["metric"] == report.metric == "accuracy"
    assert [(c["better"], c["worse"], c["seeds"]) for c in content["comparisons"]] == [
        ("student", "alone", 2),
        ("student", "untrained", 1),
    ]
    assert all(c["low"] <= c["difference"] <= c["high"] for c in content["comparisons"])
    assert content["comparisons"][1]["low"] > 0
    assert load_report(tmp_path).as_json() == content
    assert load_report(tmp_path).folder == tmp_path


def test_only_latencies_differ_between_runs(models, tmp_path):
    """Without latencies the file is the same, byte for byte; so are the numbers for another batch size."""
    for name in ("one", "two"):
        run(models, examples_of(), folder=tmp_path / name, costs=False)
    assert (tmp_path / "one/report.json").read_bytes() == (tmp_path / "two/report.json").read_bytes()
    other = run(models, examples_of(), costs=False, batch_size=7)
    first = load_report(tmp_path / "one")
    for row, cells in first.rows.items():
        for name, cell in cells.items():
            assert (cell is None) == (other.rows[row][name] is None)
            assert cell is None or cell["value"] == pytest.approx(other.rows[row][name]["value"], abs=1e-6)


def test_seeds_are_pooled(models):
    """A row of two models has the mean of their accuracies."""
    examples = examples_of()
    whole = run(models, examples, costs=False)
    single = [run({**models, "student": seed}, examples, costs=False) for seed in models["student"]]
    mean = sum(r.rows["student"]["accuracy"]["value"] for r in single) / 2
    assert whole.rows["student"]["accuracy"]["value"] == pytest.approx(mean)
    assert whole.seeds == {"teacher": 1, "student": 2, "alone": 2, "untrained": 1}


def test_the_same_model_twice_differs_by_nothing_and_is_diagnosed(models):
    """When distillation changed nothing, the difference is exactly 0 and the report says why it may be."""
    alone = models["alone"]
    report = run({**models, "student": alone}, examples_of(), costs=False)
    comparison = report.comparisons[0]
    assert (comparison["difference"], comparison["low"], comparison["high"]) == (0.0, 0.0, 0.0)
    assert report.diagnosis
    assert "not shown to be better" in report.diagnosis[0]
    assert "no help from the teacher is shown" in str(report).lower()


def test_lower_is_better_is_turned_round(models):
    """A positive difference means that the student is better, whatever the direction of the metric."""
    report = run(models, examples_of(), metric="nll", costs=False)
    against = {c["worse"]: c for c in report.comparisons}["untrained"]
    gap = report.rows["untrained"]["nll"]["value"] - report.rows["student"]["nll"]["value"]
    assert against["difference"] == pytest.approx(gap)
    assert against["difference"] > 0


def test_unlabelled_examples_are_left_out(models):
    """Rows of -100 change no number but those of no example: the report is that of the labelled part."""
    examples = examples_of()
    labelled = run(models, Rows(examples.x[:80], examples.labels[:80]), costs=False)
    labels = examples.labels.clone()
    labels[80:] = -100
    partly = run(models, Rows(examples.x, labels), costs=False)
    assert partly.examples == 80
    for row, cells in labelled.rows.items():
        for name, cell in cells.items():
            assert cell is None or partly.rows[row][name] == pytest.approx(cell)


def test_the_teacher_is_asked_once_for_each_batch():
    """A teacher that is a row of its own, or the same object in several rows, answers a batch only once."""
    examples, asked = examples_of(40), []
    net = linear(4.0)

    def teacher(batch):
        asked.append(len(batch))
        return net(batch)

    evaluate(
        {"teacher": teacher, "student": linear(2.0)}, teacher, examples, replicates=10, costs=False, progress=False
    )
    assert sum(asked) == 40 + 1 + 20  # the examples, one to see what it answers, and the twenty that are shown


def test_networks_keep_their_mode_and_get_no_gradient(models):
    models["student"][0].net.train()
    models["alone"][0].net.eval()
    run(models, examples_of(), costs=True)
    assert models["student"][0].net.training
    assert not models["alone"][0].net.training
    assert models["student"][0].net.weight.grad is None


def test_scores_that_are_no_probabilities_have_no_calibration(models):
    """A classical model is judged by its classes only."""

    class Machine:
        scores_are_probabilities = False
        identity = Identity("machine", kind="function")
        parameters_count, bytes = 9, 36

        def __call__(self, batch):
            return Signal(logits=Dense(batch.inputs["x"][:, :3]))

    report = run({**models, "baseline": Machine()}, examples_of())
    row = report.rows["baseline"]
    assert [name for name in row if row[name] is None] == [
        "nll",
        "calibration_error",
        "kl",
        "total_variation",
        "flops",
    ]
    assert row["accuracy"]["value"] > 0.7
    assert row["parameters"]["value"] == 9
    assert "baseline" not in report.reliability
    assert all(d["confidences"]["baseline"] is None for d in report.disagreements)
    assert {c["worse"] for c in report.comparisons} == {"alone", "untrained", "baseline"}


def test_regression_is_measured_by_its_own_numbers(tmp_path):
    """Values and float labels: R2 first, distances to the teacher, answers as numbers."""
    x = torch.randn(60, 2)
    rows = Rows(x, x.sum(-1, keepdim=True) + 0.1 * torch.randn(60, 1), classes=None)

    def model(scale):
        return lambda batch: Signal(values=scale * batch.inputs["x"].sum(-1, keepdim=True))

    report = evaluate(
        {"student": model(0.9), "alone": model(0.5)}, model(1.0), rows, folder=tmp_path, replicates=100, progress=False
    )
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text()), SCHEMA)
    assert report.metric == "r2"
    assert report.rows["teacher"]["r2"]["value"] > report.rows["student"]["r2"]["value"] > 0.9
    distance = float(0.1 * x.sum(-1).abs().mean())
    assert report.rows["student"]["teacher_distance"]["value"] == pytest.approx(distance, rel=1e-5)
    assert report.comparisons[0]["low"] > 0
    assert report.rows["student"]["parameters"] is None
    assert float(report.disagreements[0]["answers"]["student"]) == pytest.approx(
        0.9 / 0.5 * float(report.disagreements[0]["answers"]["alone"]), rel=1e-2
    )


def test_positions_of_sequences_are_measured(tmp_path):
    """Labels [B, T]: perplexity first; nothing that needs one label per example."""
    tokens = torch.randint(5, (12, 7))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    torch.manual_seed(0)
    nets = [nn.Embedding(5, 5) for _ in range(3)]
    teacher, student, alone = (Student(net) for net in nets)
    report = evaluate(
        {"student": student, "alone": alone},
        teacher,
        Rows(tokens, labels),
        folder=tmp_path,
        replicates=50,
        progress=False,
    )
    assert report.metric == "perplexity"
    assert "macro_f1" not in report.metrics
    logits = nets[1].weight[tokens[:, :-1]]
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, :-1].flatten()).item()
    assert report.rows["student"]["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_disagreements_are_the_furthest_first_with_names(models):
    """Ordered by divergence, answers and labels in the classes' names, at most twenty."""
    report = run(models, examples_of(), costs=False)
    gaps = [found["divergence"] for found in report.disagreements]
    assert len(gaps) == 20
    assert gaps == sorted(gaps, reverse=True)
    first = report.disagreements[0]
    assert first["label"] in CLASSES
    assert set(first["answers"]) == set(report.rows)
    assert set(first["answers"].values()) <= set(CLASSES)
    assert len(first["input"]["x"]) == 6


def test_reliability_adds_up(models):
    """Every labelled example of every seed is in one bin, and the bins give back the calibration error."""
    report = run(models, examples_of(), costs=False)
    bins = [b for b in report.reliability["student"] if b["count"]]
    assert sum(b["count"] for b in bins) == 240
    error = sum(b["count"] / 240 * abs(b["confidence"] - b["accuracy"]) for b in bins)
    assert report.rows["student"]["calibration_error"]["value"] == pytest.approx(error, abs=1e-5)


def test_a_metric_of_ones_own_is_bootstrapped_and_compared(models):
    """Any per-example statistics with any finish; its first docstring line is what the report says of it."""

    def second_guess(student, teacher, batch):
        """How often the label is among the two most probable."""
        best = student.need_logits().values.topk(2).indices
        return (best == batch.labels.unsqueeze(-1)).any(-1, keepdim=True).double()

    own = Metric("top_2", second_guess, lambda rows: float(rows.mean()))
    report = run(models, examples_of(), metrics=[own, "accuracy"], costs=False)
    assert report.metric == "top_2"
    assert report.rows["student"]["top_2"]["value"] >= report.rows["student"]["accuracy"]["value"]
    assert report.metrics["top_2"]["about"] == "How often the label is among the two most probable."
    assert report.comparisons[0]["metric"] == "top_2"


def test_without_labels_only_fidelity_is_measured(models):
    """Unlabelled test data still says how far the student is from the teacher."""
    report = run(models, Rows(examples_of().x, None), costs=False)
    assert report.metric == "agreement"
    assert report.rows["student"]["kl"]["value"] > 0
    assert report.rows["teacher"] == {"agreement": None, "kl": None, "total_variation": None}


def test_the_table_fits_a_terminal(models):
    """No line is longer than 120 characters, and the findings are in it."""
    text = str(run({**models, "baseline": linear(1.0, 9)}, examples_of()))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    for word in ("teacher", "student", "alone", "untrained", "baseline", "2 seeds", "accuracy ↑", "95 %"):
        assert word in text


def test_labels_outside_the_classes_are_named(models):
    examples = examples_of()
    examples.labels[3] = 3
    with pytest.raises(DataError, match=r"'e3' has label 3, but the teacher has classes 0 to 2"):
        run(models, examples)
    examples.labels[3] = -1
    with pytest.raises(DataError, match="'e3' has label -1"):
        run(models, examples)


def test_examples_without_any_label_are_refused(models):
    with pytest.raises(DataError, match="none of the 5 examples has a label"):
        run(models, Rows(torch.randn(5, 6), torch.full((5,), -100)))
    with pytest.raises(DataError, match="no examples"):
        run(models, Rows(torch.randn(0, 6), torch.zeros(0, dtype=torch.long)))


def test_without_labels_the_compared_examples_are_counted(models):
    compared = {"metrics": ["kl", "agreement"], "costs": False}
    report = run(models, Rows(examples_of(40).x, None), **compared)
    assert report.examples == 40
    assert "40 examples" in str(report)
    with pytest.raises(DataError, match="none of the 40 examples counts: every label is -100"):
        run(models, Rows(examples_of(40).x, torch.full((40,), -100)), **compared)


@pytest.mark.parametrize("row", ["teacher", "student"])
def test_nan_answers_are_refused_by_name(models, row):
    def broken(batch):
        values = torch.zeros(len(batch), 3)
        values[[name == "e7" for name in batch.ids]] = float("nan")
        return Signal(logits=Dense(values))

    with pytest.raises(SignalError, match=rf"{row} answers NaN or infinity for example 'e7'"):
        run({**models, row: broken}, examples_of())


def test_wrong_names_are_answered_with_the_nearest(models):
    examples = examples_of()
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        run(models, examples, metrics=["acuracy"])
    with pytest.raises(UsageError, match="'rmse' is not measured"):
        run(models, examples, metric="rmse")
    with pytest.raises(UsageError, match="metrics is empty"):
        run(models, examples, metrics=[])
    with pytest.raises(UsageError, match="'student' has no models"):
        run({**models, "student": []}, examples)
    with pytest.raises(UsageError, match="holds str"):
        run({**models, "student": "student"}, examples)
    with pytest.raises(SignalError, match="needs 'values'"):
        run(models, examples, metrics=[METRICS["mae"]])


def test_folders_that_hold_no_report_are_refused(tmp_path):
    with pytest.raises(MissingFileError):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format": "other/1"}')
    with pytest.raises(FolderError, match="other/1"):
        load_report(tmp_path)


def test_a_report_of_a_run_opens_from_the_run_folder(models, tmp_path):
    report = run(models, examples_of(), folder=tmp_path / "report", costs=False)
    found = load_report(tmp_path)
    assert isinstance(found, Report)
    assert found.as_json() == json.loads(json.dumps(report.as_json()))

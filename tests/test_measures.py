"""Every number is worked by hand once; intervals cover what they should; nothing unlabelled counts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from stillroom.divergences import forward_kl, total_variation
from stillroom.errors import DataError, ShapeError
from stillroom.measures import (
    METRICS,
    Interval,
    bootstrap,
    classification_metrics,
    default_metrics,
    diagnose,
    entropy_of,
    flops_per_example,
    label_log_probs,
    latency,
    networks_of,
    paired_bootstrap,
    parameter_count,
    regression_metrics,
    sequence_metrics,
    top_of,
    weight_bytes,
)
from stillroom.measures.cost import answering
from stillroom.measures.showing import shown_inputs
from stillroom.measures.wording import helped, kept, number, scaled, seconds, spread, times
from stillroom.students.networks import Student
from stillroom.types import Batch, Dense, Metric, Projected, Signal, Sparse

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.25, 0.35, 0.4]])
TEACHER = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
LABELS = torch.tensor([0, 1, 1, 2])  # the model is right on all but the third


def batch_of(labels, mask=None, count=None):
    count = len(labels) if count is None else count
    ids = tuple(f"e{i}" for i in range(count))
    return Batch(ids, {"x": torch.zeros(count, 1)}, labels, mask)


def logits(probs):
    return Signal(logits=Dense(probs.log()))


def value(name, student, teacher, batch):
    metric = METRICS[name]
    found = bootstrap([metric.statistics(student, teacher, batch)], metric.finish, replicates=10)
    return None if found is None else found.value


def sparse(probs, k):
    best, ids = probs.topk(k, -1)
    rest = (1 - best.sum(-1)).clamp_min(0).log()
    return Signal(logits=Sparse(ids, best.log(), rest, probs.shape[-1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 3 / 4),
        # class 0: tp 1, fp 1 (third), fn 0 -> 2/3; class 1: tp 1, fp 0, fn 1 -> 2/3; class 2: 1
        ("macro_f1", (2 / 3 + 2 / 3 + 1) / 3),
        ("nll", -(math.log(0.7) + math.log(0.6) + math.log(0.3) + math.log(0.4)) / 4),
        ("perplexity", (0.7 * 0.6 * 0.3 * 0.4) ** -0.25),
        # four bins of one example each: |0.7 - 1|, |0.6 - 1|, |0.5 - 0|, |0.4 - 1|
        ("calibration_error", (0.3 + 0.4 + 0.5 + 0.6) / 4),
        ("agreement", 3 / 4),
        ("total_variation", (0.1 + 0.1 + 0.5 + 0.2) / 4),
    ],
)
def test_classification_by_hand(name, expected):
    """Each metric of one class per example equals the number worked out on paper."""
    assert value(name, logits(PROBS), logits(TEACHER), batch_of(LABELS)) == pytest.approx(expected, abs=1e-6)


def test_divergence_from_the_teacher_is_kl_of_teacher_and_model():
    """The metric kl is KL(teacher || model), in nats."""
    expected = float((TEACHER * (TEACHER / PROBS).log()).sum(-1).mean())
    assert value("kl", logits(PROBS), logits(TEACHER), batch_of(LABELS)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r2", 1 - 2.25 / 5.0),  # labels 1..4: variance sum 5; errors 0, 0.5, -1, 1
        ("mae", 2.5 / 4),
        ("rmse", math.sqrt(2.25 / 4)),
        ("largest_error", 1.0),
        ("teacher_distance", (1 + 0.5 + 1 + 0) / 4),
    ],
)
def test_regression_by_hand(name, expected):
    """Each metric of numbers equals the number worked out on paper, for labels [B] and values [B, 1]."""
    student = Signal(values=torch.tensor([[1.0], [2.5], [2.0], [5.0]]))
    teacher = Signal(values=torch.tensor([[2.0], [2.0], [3.0], [5.0]]))
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert value(name, student, teacher, batch_of(labels)) == pytest.approx(expected)


@pytest.mark.parametrize("name", [m.name for m in classification_metrics()])
def test_unlabelled_and_masked_examples_do_not_count(name):
    """A label of -100 or a mask of False is as if the example were not there."""
    wanted = value(name, logits(PROBS[:3]), logits(TEACHER[:3]), batch_of(LABELS[:3]))
    unlabelled = torch.tensor([0, 1, 1, -100])
    assert value(name, logits(PROBS), logits(TEACHER), batch_of(unlabelled)) == pytest.approx(wanted)
    mask = torch.tensor([True, True, True, False])
    assert value(name, logits(PROBS), logits(TEACHER), batch_of(LABELS, mask)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", [m.name for m in regression_metrics()])
def test_nan_labels_do_not_count(name):
    """A label of NaN is as if the example were not there."""
    student, teacher = Signal(values=torch.rand(5, 2)), Signal(values=torch.rand(5, 2))
    labels = torch.rand(5, 2)
    first = lambda s: Signal(values=s.values[:4])  # noqa: E731
    wanted = value(name, first(student), first(teacher), batch_of(labels[:4]))
    labels[4] = float("nan")
    assert value(name, student, teacher, batch_of(labels)) == pytest.approx(wanted)


def test_positions_are_averaged_over_all_labelled_positions():
    """For labels [B, T], a number is over positions, not over the means of examples."""
    probs = PROBS.reshape(2, 2, 3)
    labels = torch.tensor([[0, 1], [1, -100]])
    wanted = value("nll", logits(PROBS[:3]), logits(TEACHER[:3]), batch_of(LABELS[:3]))
    assert value("nll", logits(probs), logits(probs), batch_of(labels)) == pytest.approx(wanted)
    with pytest.raises(ShapeError, match="one label per example"):
        value("macro_f1", logits(probs), logits(probs), batch_of(labels))


def test_projected_logits_give_the_same_numbers_as_dense():
    """Logits that are never materialised are measured alike."""
    hidden, weight = torch.randn(4, 5), torch.randn(3, 5)
    projected = Signal(logits=Projected(hidden, weight))
    dense = Signal(logits=Dense(hidden @ weight.T))
    for metric in classification_metrics():
        ours, theirs = (value(metric.name, s, logits(TEACHER), batch_of(LABELS)) for s in (projected, dense))
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_recorded_teacher_with_every_entry_kept_is_the_teacher():
    """Sparse with K = V gives the numbers of Dense, in its own row and against it."""
    recorded = sparse(TEACHER, 3)
    for metric in classification_metrics():
        one = value(metric.name, logits(PROBS), recorded, batch_of(LABELS))
        assert one == pytest.approx(value(metric.name, logits(PROBS), logits(TEACHER), batch_of(LABELS)), abs=1e-5)
    for name in ("accuracy", "macro_f1", "nll", "calibration_error"):
        one = value(name, recorded, recorded, batch_of(LABELS))
        assert one == pytest.approx(value(name, logits(TEACHER), logits(TEACHER), batch_of(LABELS)), abs=1e-5)


def test_sparse_tails_are_spread_and_their_divergence_is_unknown():
    """A label in the tail gets an equal share of it; a divergence of a model that is Sparse itself has no value."""
    recorded = sparse(torch.tensor([[0.6, 0.3, 0.06, 0.04]]), 2)
    assert label_log_probs(recorded.logits, torch.tensor([3])).exp().item() == pytest.approx(0.05)
    assert label_log_probs(recorded.logits, torch.tensor([1])).exp().item() == pytest.approx(0.3)
    batch = batch_of(torch.tensor([0]))
    assert value("kl", recorded, recorded, batch) is None


def test_draws_give_kl_and_the_top_class_but_not_what_was_not_drawn():
    """Of sampled answers, forward KL is known; total variation, nll and entropy are not."""
    ids = torch.tensor([[0, 0, 1]])
    drawn = Sparse(ids, torch.tensor([[0.8, 0.8, 0.1]]).log(), torch.full((1,), -math.inf), 3, sampled=True)
    batch = batch_of(torch.tensor([0]))
    assert value("total_variation", logits(PROBS[:1]), Signal(logits=drawn), batch) is None
    assert value("nll", Signal(logits=drawn), Signal(logits=drawn), batch) is None
    assert value("kl", logits(PROBS[:1]), Signal(logits=drawn), batch) is not None
    assert value("agreement", logits(PROBS[:1]), Signal(logits=drawn), batch) == 1.0
    assert entropy_of(drawn).isnan().all()


def test_reading_of_logits():
    """The top class, its probability and the entropy in nats."""
    ids, confidence = top_of(Dense(PROBS.log()))
    assert ids.tolist() == [0, 1, 0, 2]
    assert confidence.tolist() == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert entropy_of(Dense(torch.zeros(1, 8))).item() == pytest.approx(math.log(8))
    certain = torch.tensor([[0.0, -math.inf]])
    assert entropy_of(Dense(certain)).item() == 0.0


def test_macro_f1_and_calibration_agree_with_scikit_learn_and_numpy():
    """On many random examples, against implementations that share no code with ours."""
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    probs, labels = torch.randn(500, 7).softmax(-1), torch.randint(7, (500,))
    ours = value("macro_f1", logits(probs), logits(probs), batch_of(labels))
    assert ours == pytest.approx(f1_score(labels, probs.argmax(-1), average="macro"), abs=1e-6)
    confidence, right = probs.max(-1).values.numpy(), (probs.argmax(-1) == labels).numpy()
    place = np.minimum((confidence * 15).astype(int), 14)
    gaps = [(place == b).mean() * abs(confidence[place == b].mean() - right[place == b].mean()) for b in set(place)]
    found = value("calibration_error", logits(probs), logits(probs), batch_of(labels))
    assert found == pytest.approx(sum(gaps), abs=1e-5)


def test_default_metrics_follow_labels_and_teacher():
    """One class, one class per position, numbers; without labels, only what compares with the teacher."""
    names = lambda found: [m.name for m in found]  # noqa: E731
    assert default_metrics(logits(TEACHER), batch_of(LABELS)) == classification_metrics()
    several = torch.zeros(2, 3, dtype=torch.long)
    assert default_metrics(Signal(logits=Dense(torch.zeros(2, 3, 4))), batch_of(several)) == sequence_metrics()
    numbers = Signal(values=torch.zeros(4, 1))
    assert default_metrics(numbers, batch_of(torch.zeros(4))) == regression_metrics()
    assert names(default_metrics(logits(TEACHER), batch_of(None, count=4))) == ["agreement", "kl", "total_variation"]
    assert "teacher_distance" not in names(default_metrics(logits(TEACHER), batch_of(torch.zeros(4))))


def test_a_metric_without_labels_names_the_example():
    with pytest.raises(DataError, match="'e0' has no label"):
        value("accuracy", logits(PROBS), logits(TEACHER), batch_of(None, count=4))


# Bootstrap


def mean(statistics):
    return float(statistics[:, 0].mean())


def test_intervals_cover_a_known_mean():
    """About 95 % of the intervals of normal samples hold the true mean; the width is 2 x 1.96 / sqrt(N)."""
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for trial in range(200):
        sample = rng.normal(3.0, 1.0, size=(1, 100, 1))
        pair = np.concatenate([sample, np.ones_like(sample)], -1)
        found = bootstrap(pair, METRICS["accuracy"].finish, replicates=400, seed=trial)
        held += found.low <= 3.0 <= found.high
        widths.append(found.high - found.low)
    assert 180 <= held <= 198
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 10, rel=0.06)


def test_the_fast_path_and_the_loop_agree():
    """A finish of sums and the same finish as a plain function give the same interval, with several seeds."""
    statistics = np.stack([np.random.default_rng(s).random((50, 2)) + 0.5 for s in range(3)])
    fast = METRICS["rmse"].finish
    slow = lambda rows: float((rows[:, 0].sum() / rows[:, 1].sum()).sqrt())  # noqa: E731
    one, two = bootstrap(statistics, fast, 200), bootstrap(statistics, slow, 200)
    assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high))


def test_pairs_are_tighter_than_their_parts():
    """What both sides share cancels: the paired interval is far narrower than that of unrelated samples."""
    rng = np.random.default_rng(1)
    first = rng.normal(size=(1, 300, 1))
    second = first - 0.1 + 0.05 * rng.normal(size=(1, 300, 1))
    paired = paired_bootstrap(first, second, mean)
    shuffled = paired_bootstrap(first, second[:, rng.permutation(300)], mean)
    assert paired.value == pytest.approx(0.1, abs=0.01)
    assert paired.value == pytest.approx(shuffled.value)
    assert (paired.high - paired.low) * 10 < shuffled.high - shuffled.low
    assert paired.low > 0 > shuffled.low


def test_identical_sides_differ_by_exactly_nothing():
    rows = np.random.default_rng(2).random((3, 40, 2)) + 0.1
    for finish in (METRICS["mae"].finish, mean):
        assert paired_bootstrap(rows, rows.copy(), finish, 50) == Interval(0.0, 0.0, 0.0)


def test_seeds_that_vary_widen_the_interval():
    """Seeds are resampled too: a spread between seeds that examples do not have is seen."""
    rows = np.zeros((3, 200, 1)) + np.array([0.7, 0.8, 0.9])[:, None, None]
    found = bootstrap(rows, mean)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(0.9)
    assert bootstrap(rows[:1], mean) == Interval(*[pytest.approx(0.7)] * 3)
    against = paired_bootstrap(rows, rows[:1], mean)
    assert against.value == pytest.approx(0.1)


def test_a_bootstrap_is_repeatable_and_leaves_out_nan_rows():
    rows = np.random.default_rng(3).random((2, 30, 1))
    assert bootstrap(rows, mean, 100, seed=5) == bootstrap(rows, mean, 100, seed=5)
    assert bootstrap(rows, mean, 100, seed=5) != bootstrap(rows, mean, 100, seed=6)
    holed = np.concatenate([rows, np.full((2, 4, 1), np.nan)], axis=1)
    assert bootstrap(holed, mean, 100) == bootstrap(rows, mean, 100)
    assert bootstrap(np.full((1, 4, 1), np.nan), mean) is None
    assert paired_bootstrap(np.full((1, 4, 1), np.nan), np.zeros((1, 4, 1)), mean) is None
    assert bootstrap(np.full((1, 4, 1), np.inf), mean) is None
    with pytest.raises(ShapeError, match="statistics have shapes"):
        paired_bootstrap(rows, rows[:, :10], mean)


# Cost


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 3, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(self.table(x).mean(1)))


def test_costs_are_counted():
    """Parameters and bytes by hand; FLOPs are two per multiplication, and look-ups count nothing."""
    student = Student(Dropping())
    singles = [Batch(("a",), {"x": torch.tensor([[1, 2, 3]])})]
    assert parameter_count(student) == 10 * 4 + 4 * 3
    assert weight_bytes(student) == 4 * (10 * 4 + 4 * 3)
    assert flops_per_example(student, singles) == 2 * 4 * 3
    taken = latency(student, singles, runs=30)
    assert 0 < taken.low <= taken.value <= taken.high < 1


def test_shared_weights_count_once_and_models_without_a_network_say_their_own():
    """Members of an ensemble are found in its fields; a classical model states its size; a function has no cost."""
    net = nn.Linear(2, 2)
    tied = nn.Sequential(net, net)
    assert parameter_count(Student(tied)) == 6
    assert weight_bytes(Student(tied)) == 24
    assert [id(found) for found in networks_of((Student(net), Student(net)))] == [id(net)]

    def plain(batch):
        return logits(PROBS)

    assert parameter_count(plain) is None
    assert flops_per_example(plain, [batch_of(LABELS)]) is None
    plain.parameters_count, plain.bytes = 12, 48
    assert (parameter_count(plain), weight_bytes(plain)) == (12, 48)
    plain.answers_from_disk = True
    assert latency(plain, [batch_of(LABELS)]) is None


def test_networks_get_their_mode_back():
    """Evaluation mode inside; outside, every module is as it was, one by one."""
    net = Dropping().train()
    net.out.eval()
    with answering([Student(net)]):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
    assert net.training
    assert net.drop.training
    assert not net.out.training


# Words


def test_numbers_are_written_for_people():
    assert [scaled(v, ("", "k", "M")) for v in (910, 1000, 38_410, 999_600, 1.23e9)] == [
        "910",
        "1 k",
        "38.4 k",
        "1 M",
        "1230 M",
    ]
    assert [seconds(v) for v in (3.7e-5, 0.0012, 2.5)] == ["37 µs", "1.2 ms", "2.5 s"]
    assert [times(v) for v in (1.02, 9.1, 42.3, 1234.0)] == ["1.0×", "9.1×", "42×", "1,234×"]
    assert [number(v) for v in (0.5, 0.0, 123.4, 12345.0, 1e-5)] == ["0.500", "0.000", "123.4", "12,345", "1.00e-05"]
    assert spread({"value": 0.002, "low": 0.0009, "high": 0.003}, "latency") == "0.9–3"
    assert spread({"value": 5, "low": 5, "high": 5}, "bytes") == ""


def test_the_headline_does_not_flatter():
    """A share is only said of a student below its teacher; costs that are alike are not called smaller."""

    def said(student, teacher, higher=True, **costs):
        rows = {"student": {"accuracy": cell(student)}, "teacher": {"accuracy": cell(teacher)}}
        for cost, (ours, theirs) in costs.items():
            rows["student"][cost], rows["teacher"][cost] = cell(ours), cell(theirs)
        return kept(rows, "accuracy", higher)

    assert said(0.9, 1.0) == "The student keeps 90.0 % of the teacher’s accuracy (0.900 of 1.000)."
    assert said(0.9, 0.8) == "The student is above its teacher in accuracy (0.900, 0.800)."
    assert said(-0.1, 0.5) == "The student reaches accuracy -0.100, the teacher 0.500."
    assert said(0.9, 0.8, higher=False) == "The student reaches accuracy 0.900, the teacher 0.800."
    assert said(0.9, 1.0, bytes=(10, 500), latency=(2.0, 1.0)).endswith(", and is 50× smaller and 2.0× slower.")
    assert "smaller" not in said(0.9, 1.0, bytes=(100, 102))
    alone = {"better": "student", "worse": "alone", "metric": "accuracy", "seeds": 1}
    words = [helped([{**alone, "difference": d, "low": d - 1, "high": d + 1}]) for d in (2.0, 0.0, -2.0)]
    assert [text.split(":")[0] for text in words] == [
        "The teacher helped",
        "No help from the teacher is shown",
        "The teacher did harm",
    ]
    assert "not known" in helped([])


def test_inputs_are_shown_as_text_pictures_or_numbers():
    """Long text is cut; a tensor with the shape of a picture becomes a small PNG; anything else its first numbers."""
    inputs = {
        "text": ("x" * 500,),
        "image": torch.rand(1, 3, 200, 100),
        "row": torch.arange(12.0).reshape(1, 12) / 7,
        "tokens": torch.arange(20).reshape(1, 4, 5),
    }
    found = shown_inputs(Batch(("a",), inputs), 0)
    assert len(found["text"]) == 300
    assert found["image"]["image"].startswith("data:image/png;base64,")
    assert found["row"] == [0.0, 0.1429, 0.2857, 0.4286, 0.5714, 0.7143, 0.8571, 1.0]
    assert found["tokens"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found == shown_inputs(Batch(("a",), inputs), 0)


def cell(number):
    return {"value": number, "low": number, "high": number}


def diagnosis_of(difference, low, high, seeds=1, entropy=1.0, **cells):
    rows = {name: {key: cell(v) for key, v in found.items()} for name, found in cells.items()}
    pair = {"better": "student", "worse": "alone", "metric": "accuracy", "seeds": seeds}
    found = [{**pair, "difference": difference, "low": low, "high": high}]
    about = {"accuracy": {"higher_is_better": True}}
    return " ".join(diagnose(rows, found, about, metric="accuracy", examples=100, teacher_entropy=entropy, classes=10))


def test_diagnosis_names_what_was_seen():
    """A reason for each kind of failure, and none when the student is better."""
    good = {"teacher": {"accuracy": 0.9}, "alone": {"accuracy": 0.8}, "student": {"accuracy": 0.85}}
    assert diagnosis_of(0.05, 0.01, 0.09, **good) == ""
    assert "several seeds" in diagnosis_of(0.01, -0.02, 0.04, **good)
    weak = {**good, "teacher": {"accuracy": 0.7}}
    assert "no better than the student trained alone" in diagnosis_of(0.05, 0.01, 0.09, **weak)
    assert "nearly certain" in diagnosis_of(0.0, -0.1, 0.1, entropy=0.001, **good)
    assert "nearly undecided" in diagnosis_of(0.0, -0.1, 0.1, entropy=2.29, **good)
    sizes = {
        "teacher": {"accuracy": 0.9, "parameters": 1e6},
        "alone": {"accuracy": 0.8, "agreement": 0.8},
        "student": {"accuracy": 0.8, "agreement": 0.75, "parameters": 1e3},
    }
    said = diagnosis_of(0.0, -0.1, 0.1, **sizes)
    assert "hardly reached it" in said
    assert "1,000× fewer parameters" in said
    sizes["student"]["agreement"] = 0.99
    assert "already follows the teacher" in diagnosis_of(0.0, -0.1, 0.1, **sizes)
    sizes["student"]["agreement"] = 0.85
    assert "follows the teacher only on 0.850" in diagnosis_of(0.0, -0.1, 0.1, **sizes)


def test_metrics_are_named_as_they_are_stored():
    assert all(name == metric.name and isinstance(metric, Metric) for name, metric in METRICS.items())
    assert METRICS["kl"].statistics.divergence is forward_kl
    assert METRICS["total_variation"].statistics.divergence is total_variation

"""What a recording says of itself: its fidelity, its bytes, and how fast it is read."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from recording_fakes import Rows, Teacher, again, digest_files, linear, small_recording
from stillroom.digests import key_hash
from stillroom.recording import Everything, Likely, Sampled, TopK, record
from stillroom.types import Dense, Signal


@pytest.fixture
def asked(tmp_path):
    return small_recording(tmp_path / "recording")


def test_fidelity_of_top_k_spreads_the_tail_evenly(tmp_path):
    """By hand: p = (0.5, 0.3, 0.15, 0.05); kept 0.5 and 0.3, the tail 0.2 becomes 0.1 + 0.1."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    teacher = Teacher(lambda x: Signal(logits=Dense(p.log().expand(len(x), 4))))
    found = record(teacher, Rows.make(5), tmp_path, TopK(2), progress=False).manifest["fidelity"]
    kl = 0.15 * np.log(1.5) + 0.05 * np.log(0.5)
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert found["total_variation"] == pytest.approx(0.05, rel=1e-5)
    assert found["largest_difference"] is None
    assert found["examples"] == 5


def test_gradient_bias_compares_what_a_student_is_pulled_towards(tmp_path):
    """By hand: the student is q = sqrt(p) / sum; the tail 0.2 is pulled towards in the student's own shape."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    q = np.sqrt(p) / np.sqrt(p).sum()
    towards = np.array([0.5, 0.3, 0.2 * q[2] / (q[2] + q[3]), 0.2 * q[3] / (q[2] + q[3])])
    logits = torch.tensor(p).log().float()
    teacher = Teacher(lambda x: Signal(logits=Dense(logits.expand(len(x), 4))))
    found = record(teacher, Rows.make(5), tmp_path / "a", TopK(2), progress=False).manifest["fidelity"]
    expected = np.linalg.norm(towards - p) / np.linalg.norm(q - p)
    assert found["gradient_bias"] == pytest.approx(expected, rel=1e-5)
    whole = record(teacher, Rows.make(5), tmp_path / "b", Everything(), progress=False).manifest["fidelity"]
    assert whole["gradient_bias"] == pytest.approx(0, abs=1e-6)


def test_bytes_are_measured_on_disk(tmp_path):
    found = record(Teacher(linear()), Rows.make(20), tmp_path, TopK(3), batch_size=5, shard_rows=10, progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert found.manifest["fidelity"]["bytes_per_position"] == size / 20


def test_fidelity_of_padded_entries(tmp_path):
    """One position keeps one entry and the other two: the numbers are those of each alone."""
    p = torch.tensor([[0.9, 0.06, 0.03, 0.01], [0.5, 0.3, 0.15, 0.05]])
    teacher = Teacher(lambda x: Signal(logits=Dense(p.log().expand(len(x), 2, 4))))
    found = record(teacher, Rows.make(5), tmp_path, Likely(0.2, bits=8), progress=False).manifest["fidelity"]
    first = 0.5 * (abs(0.06 - 0.1 / 3) + abs(0.03 - 0.1 / 3) + abs(0.01 - 0.1 / 3))
    assert found["total_variation"] == pytest.approx((first + 0.05) / 2, abs=0.004)
    assert found["kl"] == pytest.approx(
        0.5 * (0.06 * np.log(1.8) + 0.03 * np.log(0.9) + 0.01 * np.log(0.3) + 0.15 * np.log(1.5) + 0.05 * np.log(0.5)),
        abs=0.002,
    )


def test_fidelity_counts_the_positions_that_the_mask_counts(tmp_path):
    """Half of the positions are uncounted; only there does the tail of the top-k differ."""
    even, sharp = torch.zeros(4), torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    teacher = Teacher(lambda x: Signal(logits=Dense(torch.stack([sharp, even - torch.arange(4)]).expand(len(x), 2, 4))))

    class Masked(Rows):
        def batch(self, indices, views=None):
            batch = super().batch(indices, views)
            return dataclasses.replace(batch, mask=torch.tensor([True, False]).expand(len(batch), 2))

    masked = record(teacher, Masked.make(5), tmp_path / "masked", TopK(1), progress=False).manifest["fidelity"]
    assert masked["kl"] == pytest.approx(0, abs=1e-7)
    whole = record(teacher, Rows.make(5), tmp_path / "whole", TopK(1), progress=False).manifest["fidelity"]
    assert whole["kl"] > 0.01


def test_fidelity_of_draws_is_their_total_variation_without_a_kl(tmp_path):
    teacher = Teacher(lambda x: Signal(logits=Dense(torch.zeros(len(x), 2))))
    found = record(teacher, Rows.make(64), tmp_path, Sampled(1), progress=False).manifest["fidelity"]
    assert found["kl"] is None
    assert found["total_variation"] == pytest.approx(0.5)


def test_fidelity_of_rounded_values_is_their_largest_difference(tmp_path):
    teacher = Teacher(lambda x: Signal(values=torch.full((len(x), 2), 1.0 + 2**-10)))
    found = record(teacher, Rows.make(3), tmp_path, Everything("bfloat16"), progress=False).manifest["fidelity"]
    assert found.pop("largest_difference") == 2**-10
    assert found.pop("examples") == 3
    assert set(found.values()) == {None}


def test_the_same_request_writes_the_same_bytes_and_a_finished_one_asks_nothing(asked, tmp_path):
    _, teacher, examples, folder = asked
    again(teacher, examples, tmp_path / "second")
    assert digest_files(folder) == digest_files(tmp_path / "second")

    def silent(x):
        raise AssertionError("asked again")

    again(Teacher(silent, teacher.identity), examples, folder)


def test_reading_speed(tmp_path, capsys):
    """Prints rows per second; no bar, for machines differ."""
    count, size = 20_000, 256
    examples = Rows.make(count, width=16)
    weight = torch.randn(10, 16)
    teacher = Teacher(lambda x: Signal(logits=Dense(x @ weight.T)))
    recording = record(teacher, examples, tmp_path, TopK(4), progress=False)
    order = torch.randperm(count).tolist()
    batches = [examples.batch(order[start : start + size]) for start in range(0, count, size)]
    for batch in batches:
        recording(batch)

    def rate(run):
        start = time.perf_counter()
        for batch in batches:
            run(batch)
        return count / (time.perf_counter() - start)

    whole = rate(recording)
    found = [recording._find(batch) for batch in batches]
    from stillroom.recording.shards import gather

    start = time.perf_counter()
    for rows in found:
        numbers, within = np.divmod(rows, recording.manifest["shard_rows"])
        gather(recording._shards, numbers, within, recording._names)
    raw = count / (time.perf_counter() - start)
    hashed = rate(lambda batch: [key_hash(name, -1) for name in batch.ids])
    with capsys.disabled():
        print(f"\nrecording: {whole:,.0f} rows/s checked, {raw:,.0f} rows/s gathered, {hashed:,.0f} keys/s hashed")

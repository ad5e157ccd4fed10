"""What a recording says of itself: its fidelity, its bytes, and how fast it is read."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from recording_fakes import Rows, Teacher, again, digest_files, small_recording
from stillroom.digests import key_hash
from stillroom.recording import Everything, Sampled, TopK, record
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
    assert found == {"examples": 3, "kl": None, "total_variation": None, "largest_difference": 2**-10}


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

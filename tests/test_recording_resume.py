"""Killed at any instant, a recording resumes and ends with the bytes of an uninterrupted one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recording_fakes import Rows, Teacher, digest_files, linear
from recording_script import main as record_all
from stillroom.errors import FolderError
from stillroom.recording import TopK, record
from stillroom.recording.record import _alone
from stillroom.types import Identity

SCRIPT = Path(__file__).parent / "recording_script.py"


class Recorder:
    """A process that records into a folder of ``place``, from the moment when its imports are done."""

    def __init__(self, place, keep="fixed"):
        self.folder = place / "recording"
        self.done = place / "done"
        place.mkdir()
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), str(self.folder), keep])
        self.until(lambda: (place / "started").exists())

    def until(self, reached):
        while not reached() and self.process.poll() is None:
            time.sleep(0.002)

    def shards(self):
        return len(list((self.folder / "shards").glob("*.safetensors")))

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def kill_and_resume(tmp_path, kills, keep):
    """Kill ``kills`` recordings, every other one at a drawn share of an uninterrupted one's time and the rest a few
    milliseconds after a drawn number of shards; each then resumes to the end. How many were killed where, and the
    numbers of those that ended with other bytes than an uninterrupted one.
    """
    whole = Recorder(tmp_path / "whole", keep)
    began = time.monotonic()
    assert whole.process.wait() == 0
    seconds, shards = time.monotonic() - began, whole.shards()
    draw = random.Random(20)
    different = []
    found = {"before the first shard": 0, "among the shards": 0, "after the last": 0, "complete": 0}
    for number in range(kills):
        recorder = Recorder(tmp_path / str(number), keep)
        if number % 2:
            time.sleep(draw.uniform(0.0, 1.0) * seconds)
        else:
            enough = draw.randrange(1, shards // 2)
            recorder.until(lambda recorder=recorder, enough=enough: recorder.shards() >= enough)
            time.sleep(draw.uniform(0.0, 0.04))
        recorder.kill()
        there = recorder.shards()
        place = "among the shards" if 0 < there < shards else "after the last" if there else "before the first shard"
        found["complete" if recorder.done.exists() else place] += 1
        record_all(str(recorder.folder), keep)
        if digest_files(recorder.folder) != digest_files(whole.folder):
            different.append(number)
    print(f"{kills} kills, {shards} shards in {seconds:.1f} s: {found}")
    return found, different


@pytest.mark.parametrize("keep", ["fixed", pytest.param("ragged", marks=pytest.mark.slow)])
def test_sigkill_at_four_moments_leaves_the_same_bytes(tmp_path, keep):
    found, different = kill_and_resume(tmp_path, 4, keep)
    assert different == []
    assert found["among the shards"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["fixed", "ragged"])
def test_sigkill_at_twenty_moments_leaves_the_same_bytes(tmp_path, keep):
    found, different = kill_and_resume(tmp_path, 20, keep)
    assert different == []
    assert found["among the shards"] > 0


class Interrupted(Exception):
    pass


def run(folder, teacher=None):
    """30 examples, 6 batches of 5, in shards of 10."""
    examples = Rows.make(30)
    return record(teacher or Teacher(linear()), examples, folder, TopK(3), batch_size=5, shard_rows=10, progress=False)


def stopping_after(calls):
    """A teacher that answers ``calls`` batches and then fails; and how often it was asked."""
    count = [0]
    answer = linear()

    def limited(x):
        count[0] += 1
        if count[0] > calls:
            raise Interrupted
        return answer(x)

    return Teacher(limited), count


@pytest.mark.parametrize("calls", range(12))
def test_stopped_at_any_call_of_the_teacher_it_resumes_to_the_same_bytes(tmp_path, calls):
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):  # 1 to try, 6 to record, 4 or more to measure
        run(tmp_path / "r", stopping_after(min(calls, 10))[0])
    run(tmp_path / "r")
    assert digest_files(tmp_path / "r") == digest_files(tmp_path / "whole")


def test_shards_that_are_there_are_not_asked_again(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stopping_after(6)[0])  # the first batch as a trial, then five of six
    teacher, count = stopping_after(100)
    run(tmp_path, teacher)
    assert count[0] == 2 + 6  # the third shard's two batches, and all six for the fidelity


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "foreign", "swapped", "nonsense"])
def test_a_damaged_shard_of_an_unfinished_recording_is_recorded_anew(tmp_path, damage):
    run(tmp_path / "whole")
    run(tmp_path / "other", Teacher(linear(seed=9), Identity("other", digest="b" * 64)))
    with pytest.raises(Interrupted):
        run(tmp_path / "r", stopping_after(6)[0])
    path = tmp_path / "r" / "shards" / "00001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-3])
    elif damage == "flipped":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes((tmp_path / "other" / "shards" / path.name).read_bytes())
    elif damage == "swapped":
        path.write_bytes(path.with_name("00000.safetensors").read_bytes())
    else:
        path.write_bytes(b"\xff" * 200)
    run(tmp_path / "r")
    assert digest_files(tmp_path / "r") == digest_files(tmp_path / "whole")


def test_files_of_a_killed_write_are_cleared_away(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "r", stopping_after(4)[0])
    for name in ("manifest.json.tmp", "index.safetensors.tmp", "shards/00001.safetensors.tmp"):
        (tmp_path / "r" / name).write_bytes(b"half")
    run(tmp_path / "r")
    assert digest_files(tmp_path / "r") == digest_files(tmp_path / "whole")


def test_two_processes_do_not_record_into_one_folder(tmp_path):
    with _alone(tmp_path), pytest.raises(FolderError, match="being recorded by another process"):
        run(tmp_path)
    run(tmp_path)


def test_the_bytes_do_not_depend_on_global_random_state(tmp_path):
    run(tmp_path / "a")
    torch.manual_seed(77)
    torch.rand(5)
    run(tmp_path / "b")
    assert digest_files(tmp_path / "a") == digest_files(tmp_path / "b")

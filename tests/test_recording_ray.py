"""Ray's workers write the bytes of the local engine, and a killed worker loses nothing. A real Ray of two CPUs."""

import gc
import os
import signal
import subprocess
import warnings
from dataclasses import dataclass

import pytest
import torch

from recording_fakes import Rows, Teacher, digest_files, linear
from recording_script import Teacher as Slow
from stillroom.errors import UsageError
from stillroom.recording import Features, TopK, record

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::Warning"),
]  # Ray's own, in a process that it starts threads in


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # of a busy machine
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    started = [found for found in gc.get_objects() if isinstance(found, subprocess.Popen)]
    ray.shutdown()
    for process in started:  # Ray ends its processes and does not wait for them
        process.wait(timeout=60)


@dataclass(frozen=True, eq=False)
class DiesOnce:
    """The first worker that comes to one example kills itself, as the kernel kills what takes too much memory."""

    inner: Slow
    mark: str
    row: str

    def __call__(self, batch):
        if self.row in batch.ids:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(batch)


def test_the_bytes_are_those_of_the_local_engine(cluster, tmp_path):
    """Logits and features of a network, in two views: other processes, other order, the same files."""
    torch.set_num_threads(1)
    examples, keep = Rows.make(240, width=64), (TopK(8), Features(("3",), "bfloat16"))
    how = {"keep": keep, "batch_size": 20, "shard_rows": 40, "progress": False}
    record(Slow(64), examples, tmp_path / "local", **how)
    record(Slow(64), examples, tmp_path / "ray", engine="ray", **how)
    assert digest_files(tmp_path / "ray") == digest_files(tmp_path / "local")
    assert len(digest_files(tmp_path / "ray")) == 6 + 2


def test_a_killed_worker_loses_nothing(cluster, tmp_path):
    """A worker is killed in the middle of a shard: another asks for that shard again, and the bytes are the same."""
    torch.set_num_threads(1)
    examples = Rows.make(200, width=64)
    how = {"keep": TopK(4), "batch_size": 10, "shard_rows": 20, "progress": False}
    mark = tmp_path / "killed"
    teacher = DiesOnce(Slow(64), str(mark), "row-117")
    record(teacher, examples, tmp_path / "ray", engine="ray", **how)
    assert mark.exists()
    record(teacher, examples, tmp_path / "local", **how)
    assert digest_files(tmp_path / "ray") == digest_files(tmp_path / "local")


def test_only_what_is_missing_is_asked_for(cluster, tmp_path):
    """A recording begun here and cut is finished on Ray: whole shards stay as they are, to their times."""
    examples, teacher = Rows.make(60), Teacher(linear())
    how = {"batch_size": 5, "shard_rows": 10, "progress": False}
    record(teacher, examples, tmp_path / "one", **how)
    before = digest_files(tmp_path / "one")
    lost = tmp_path / "one" / "shards" / "00003.safetensors"
    lost.unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one" / "shards").iterdir()}
    record(teacher, examples, tmp_path / "one", engine="ray", **how)
    assert digest_files(tmp_path / "one") == before
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in lost.parent.iterdir()}.items()


def test_a_workers_error_is_ours(cluster, tmp_path):
    """The example that a worker cannot use is named as the local engine names it."""
    examples = Rows.make(40)
    examples.x[33] = torch.nan
    with pytest.raises(UsageError, match="there is no engine 'rai'; did you mean 'ray'"):
        record(Teacher(linear()), examples, tmp_path / "no", engine="rai", progress=False)
    from stillroom.errors import SignalError

    with pytest.raises(SignalError, match="row-33"):
        record(Teacher(linear()), examples, tmp_path / "nan", engine="ray", batch_size=5, shard_rows=10, progress=False)


def test_what_cannot_travel_is_refused(cluster, tmp_path):
    """A teacher that holds an open file is no teacher for another process."""
    with (tmp_path / "open").open("w") as held:
        teacher = Teacher(linear())
        object.__setattr__(teacher, "held", held)
        with pytest.raises(UsageError, match="cannot travel to Ray's workers"):
            record(teacher, Rows.make(20), tmp_path / "no", engine="ray", batch_size=5, progress=False)

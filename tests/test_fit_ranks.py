"""Two ranks of `accelerate launch` on the CPU end with the weights of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fit_script import TRAININGS

SCRIPT = Path(__file__).parent / "fit_script.py"


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def on_two_ranks(folder, names):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())]
    # --cpu would start one process only; several on the CPU are several 'GPUs' that are told to use it, and gloo
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, str(SCRIPT), str(folder), names], env=environment, capture_output=True, text=True, timeout=250
    )


def test_two_ranks_equal_one(tmp_path):
    """Five trainings in one launch: partly labelled, in micro-batches, with a projector, with a rank left idle."""
    names = ["rows", "sequences", "features", "few", "rows-again"]
    found = on_two_ranks(tmp_path, ",".join(names))
    assert found.returncode == 0, found.stderr[-3000:]
    assert sorted(found.stdout.split()) == ["rank0/2", "rank1/2"]
    for name in names:
        one = TRAININGS[name]().net.state_dict()
        two = load_file(tmp_path / name / "model.safetensors")
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, name


@pytest.mark.slow
def test_parameters_that_the_objective_does_not_reach_are_named(tmp_path):
    """Ranks would wait for their gradients: DDP's own message names neither cause nor cure."""
    found = on_two_ranks(tmp_path, "unreached")
    assert found.returncode != 0
    assert "does not reach every trainable parameter" in found.stderr

"""Starts a script of trainings on two ranks of `accelerate launch`, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

COPIED = ("--multi_gpu",)  # DDP
SHARED = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def on_two_ranks(
    script: Path, folder: Path, names: str, kind: tuple[str, ...] = COPIED
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", "2"]
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
    command += [str(script), str(folder), names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)

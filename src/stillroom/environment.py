"""Where something ran: what can change its numbers, and nothing that names a person or a machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

PACKAGES = (
    "stillroom", "torch", "numpy", "safetensors", "accelerate", "transformers", "tokenizers",
    "scikit-learn", "onnx", "onnxscript", "onnxruntime",
)  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY")


def environment() -> dict[str, Any]:
    """Python, packages, processor, threads and the variables that choose numeric kernels."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "platform": f"{platform.system()}-{platform.machine()}",
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "lock_sha256": _lock(),
        **_commit(),
    }


def _lock() -> str:
    """sha256 over every installed package and its version, one ``name==version`` a line, sorted."""
    found = {f"{entry.metadata['Name']}=={entry.version}".lower() for entry in metadata.distributions()}
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _commit() -> dict[str, str | None]:
    """The commit of the current folder, and the sha256 of what differs from it (None: nothing, or no repository)."""
    head = _git("rev-parse", "HEAD")
    changes = _git("diff", "HEAD") if head else b""
    return {
        "git": head.decode().strip() if head else None,
        "dirty_sha256": hashlib.sha256(changes).hexdigest() if changes else None,
    }


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"

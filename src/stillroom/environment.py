"""Where something ran: what can change its numbers, and nothing that names a person or a machine."""

from __future__ import annotations

import os
import platform
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
    }


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

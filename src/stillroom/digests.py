"""The one place for hashes: what a file, a state, a batch of inputs or a configuration is, in sha256 hex."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
import torch
from torch import Tensor

from stillroom.types import UNLABELLED, Column, Examples

PIECE = 1 << 20


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, as ``sha256sum`` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON (RFC 8785) of ``value``."""
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of a state's content: sorted name, dtype, shape, bytes.

    The digest of the *content*: the order of tensors and metadata in a safetensors file does not change it.
    """
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(f"{name}|{_tensor_head(state[name])}|".encode())
        total.update(_tensor_bytes(state[name]))
    return total.hexdigest()


def input_fingerprints(inputs: Mapping[str, Column]) -> np.ndarray:
    """One uint64 per example over all its columns: what a recorded answer was an answer *to*.

    The first 8 bytes of blake2b over sorted (name, dtype, shape, bytes) of the example. A recording stores it beside
    each answer, so an answer for another augmentation, preprocessing or edited row is found out.
    """
    names = sorted(inputs)
    count = len(inputs[names[0]]) if names else 0
    rows: list[list[bytes]] = []
    for name in names:
        column = inputs[name]
        if isinstance(column, Tensor):
            flat = column.detach().cpu().contiguous()
            head = f"{name}|{flat.dtype}|{list(flat.shape[1:])}|".encode()
            whole = _tensor_bytes(flat)
            size = len(whole) // max(count, 1)
            rows.append([head + whole[i * size : (i + 1) * size] for i in range(count)])
        else:
            rows.append([f"{name}|text|".encode() + str(text).encode() for text in column])
    found = np.empty(count, dtype=np.uint64)
    for index in range(count):
        hasher = hashlib.blake2b(digest_size=8)
        for column_rows in rows:
            hasher.update(column_rows[index])
        found[index] = int.from_bytes(hasher.digest(), "little")
    return found


def examples_digest(examples: Examples, batch_size: int = 512) -> str:
    """The ``digest`` of ``data_description``: the data, without its labels."""
    return str(data_description(examples, batch_size)["digest"])


def data_description(examples: Examples, batch_size: int = 512) -> dict[str, Any]:
    """What is known of the data: name, digest, rows, licence, source, labelled rows and the labels' digest.

    ``digest`` is sha256 over (id, fingerprint of the unaugmented inputs) in order, without the labels;
    ``labels_digest`` is sha256 over (id, label), null when nothing is labelled. 'unknown' is said openly.
    Examples that were read whole when they were written (packed tokens in a folder) carry these as ``described``.
    """
    return {
        "name": getattr(examples, "name", "unnamed"),
        "rows": len(examples),
        "licence": getattr(examples, "licence", "unknown"),
        "source": getattr(examples, "source", "unknown"),
        **(getattr(examples, "described", None) or _digests_of(examples, batch_size)),
    }


def _digests_of(examples: Examples, batch_size: int) -> dict[str, Any]:
    """``digest``, ``labelled`` and ``labels_digest``, from every row."""
    inputs, labels, labelled = hashlib.sha256(), hashlib.sha256(), 0
    for start in range(0, len(examples), batch_size):
        batch = examples.batch(range(start, min(start + batch_size, len(examples))), None)
        for name, fingerprint in zip(batch.ids, input_fingerprints(batch.inputs), strict=True):
            inputs.update(f"{name}|{int(fingerprint):016x}\n".encode())
        if batch.labels is not None:
            unknown = batch.labels.isnan() if batch.labels.is_floating_point() else batch.labels == UNLABELLED
            labelled += int((~unknown).reshape(len(batch), -1).any(1).sum())
            for name, label in zip(batch.ids, batch.labels, strict=True):
                labels.update(f"{name}|".encode() + _tensor_bytes(label))
    return {
        "digest": inputs.hexdigest(),
        "labelled": labelled,
        "labels_digest": labels.hexdigest() if labelled else None,
    }


def key_hash(name: str, view: int) -> int:
    """64 bits of blake2b over (example id, view seed): the key of a recorded answer and the seed of a view's draws."""
    return int.from_bytes(hashlib.blake2b(f"{name}|{view}".encode(), digest_size=8).digest(), "little")


def _tensor_head(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}"


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous()
    return flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""

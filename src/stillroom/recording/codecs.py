"""What of the teacher's answer is kept, and how it becomes arrays with one row for each example.

Letters: B examples, T positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import key_hash
from stillroom.errors import SignalError, UsageError, nearest
from stillroom.recording.codec import Kept, check_bits, check_count, check_dtype
from stillroom.recording.draws import pack_draws, unpack_draws
from stillroom.recording.levels import pack_entries, to_entries, unpack_entries
from stillroom.recording.ragged import lay, split
from stillroom.recording.rows import (
    FLOATS,
    Facts,
    Key,
    Rows,
    check_numbers,
    decode_all,
    decode_logits,
    log_softmax,
    over_positions,
    round_to,
    sparse_of,
    widened,
)
from stillroom.types import Projected, Signal, Sparse

FloatName = Literal["float32", "float16", "bfloat16"]

LARGEST_SEED = 2**53  # what every JSON reader keeps exactly


@dataclass(frozen=True)
class Everything:
    """Logits, values, features and parts as the teacher gave them, rounded to ``dtype`` when it is smaller.

    Projected logits are computed; Sparse logits stay Sparse; text is not kept. Decoded floats are float32.
    """

    dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        check_dtype(self, self.dtype, FLOATS)

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        kept = Kept({})
        self._encode(signal, keys, "", kept)
        if not kept.rows:
            raise SignalError(
                f"keep=Everything() keeps logits, values, features and parts, but the teacher gives "
                f"{list(signal.given)}. Choose a teacher that gives one of them."
            )
        return kept

    def _encode(self, signal: Signal, keys: Sequence[Key], prefix: str, kept: Kept) -> None:
        if isinstance(signal.logits, Sparse):
            for name in ("ids", "log_probs", "rest"):
                kept.rows[f"{prefix}logits.{name}"] = getattr(signal.logits, name).cpu()
            kept.rows[f"{prefix}logits.ids"] = signal.logits.ids.cpu().to(torch.int32)
            kept.facts[f"{prefix}logits"] = {"vocabulary": signal.logits.vocabulary, "sampled": signal.logits.sampled}
        elif signal.logits is not None:
            values = signal.logits.compute() if isinstance(signal.logits, Projected) else signal.logits.values
            kept.rows[f"{prefix}logits.values"] = round_to(values, self.dtype, f"{prefix}logits", keys)
        if signal.values is not None:
            kept.rows[f"{prefix}values"] = round_to(signal.values, self.dtype, f"{prefix}values", keys)
        for name, tensor in signal.features.items():
            kept.rows[f"{prefix}features/{name}"] = round_to(tensor, self.dtype, f"features[{name!r}]", keys)
        for name, part in signal.parts.items():
            self._encode(part, keys, f"{prefix}parts/{quote(name, safe='')}/", kept)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return decode_all(rows, facts)


@dataclass(frozen=True)
class TopK:
    """The ``k`` largest log-probabilities at temperature 1 and the log of the tail's mass, in nats.

    k(4 + 4) + 4 bytes per position in float32, k(4 + 2) + 4 in float16 (the tail's mass stays float32).

    With ``bits`` (4 to 8) the probabilities have 2**bits levels and everything is packed (levels.py):
    (k (w + 1) + 2**bits) / 8 + 1 bytes per position, w = ceil(log2 V): 145 at k = 64, bits = 6, V = 49,152. ``dtype``
    is unused then. Entries come back by level, then by id.
    """

    k: int
    dtype: Literal["float32", "float16"] = "float32"
    bits: int | None = None

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)
        check_dtype(self, self.dtype, ("float32", "float16"))
        check_bits(self, self.bits)

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        logits = signal.need_logits(f"keep={self}")
        width = logits.ids.shape[-1] if isinstance(logits, Sparse) else logits.vocabulary
        if self.k > width:
            what = "entries" if isinstance(logits, Sparse) else "logits"
            raise UsageError(
                f"keep=TopK({self.k}) asks for {self.k} entries, but the teacher gives {width} {what}. "
                f"Use TopK({width}) or fewer, or Everything()."
            )
        if isinstance(logits, Sparse):
            ids, log_probs, rest = self._cut(logits)
        else:
            ids, log_probs, rest = over_positions(logits, self._choose)
        if self.bits is not None:
            return self._pack(ids, log_probs, rest, logits.vocabulary, keys)
        rows = {
            "logits.ids": ids.cpu().to(torch.int32),
            "logits.log_probs": log_probs.cpu().to(FLOATS[self.dtype]),  # below float16's range is probability 0
            "logits.rest": rest.cpu().float(),
        }
        return Kept(rows, {"logits": {"vocabulary": logits.vocabulary, "sampled": False}})

    def _choose(self, values: Tensor, _first: int) -> tuple[Tensor, Tensor, Tensor]:
        everything = log_softmax(values)
        log_probs, ids = everything.topk(self.k, dim=-1)
        # The others are summed for themselves: 1 - sum(kept) would lose every digit of a small tail.
        return ids, log_probs, everything.scatter(-1, ids, -torch.inf).logsumexp(-1)

    def _cut(self, logits: Sparse) -> tuple[Tensor, Tensor, Tensor]:
        if logits.sampled:
            raise SignalError(f"keep={self}: the teacher gives random draws, which have no largest entries.")
        log_probs, order = logits.log_probs.float().topk(self.k, dim=-1)
        others = logits.log_probs.float().scatter(-1, order, -torch.inf).logsumexp(-1)
        return logits.ids.gather(-1, order), log_probs, torch.logaddexp(others, logits.rest.float())

    def _pack(self, ids: Tensor, log_probs: Tensor, rest: Tensor, vocabulary: int, keys: Sequence[Key]) -> Kept:
        assert self.bits is not None
        log_probs = check_numbers(log_probs.cpu(), "log-probabilities", keys, impossible=True)
        packed = []
        for row in range(len(ids)):
            flat = ids[row].cpu().reshape(-1, self.k), log_probs[row].reshape(-1, self.k), rest[row].cpu().reshape(-1)
            packed.append(pack_entries(to_entries(*flat, self.bits), self.bits, vocabulary))
        facts = {"vocabulary": vocabulary, "positions": list(ids.shape[1:-1])}
        return Kept({"logits.packed": torch.from_numpy(np.stack(packed))}, {"logits": facts})

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        if self.bits is None:
            return Signal(logits=decode_logits(rows, facts))
        shape, vocabulary = facts["logits"]["positions"], facts["logits"]["vocabulary"]
        positions = int(np.prod(shape, dtype=np.int64))
        total = positions * self.k
        found = [unpack_entries(row, positions, total, self.bits, vocabulary) for row in rows["logits.packed"].numpy()]
        return Signal(logits=sparse_of(found, self.bits, self.k, shape, vocabulary))


@dataclass(frozen=True)
class Sampled:
    """``n`` independent draws from the teacher's softmax, with the teacher's own log-probability of each, in nats.

    Unbiased for forward KL and cross-entropy at temperature 1 (Anshumann et al. 2025, arXiv 2503.16870). The draws
    of an example depend on (seed, example id, view) only, not on its batch. 8n bytes per position.

    With ``bits`` each drawn id is kept once, with a bit for each draw (draws.py): 12 draws of a language model take
    about 14 bytes. 4 to 8 bits keep the level of each log-probability (levels.py); 0 bits keep none, and give back
    the log of how often the id was drawn. The gradient of forward KL is the same for any ``bits``.
    """

    n: int
    seed: int = 0
    bits: int | None = None

    def __post_init__(self) -> None:
        check_count(self, "n", self.n)
        check_bits(self, self.bits or None)
        if not 0 <= self.seed < LARGEST_SEED:
            raise UsageError(f"{self}: the seed must be from 0 to 2**53 - 1.")

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        logits = signal.need_logits(f"keep={self}")
        if isinstance(logits, Sparse):
            raise SignalError(
                f"keep={self} draws from all logits, but the teacher gives {logits.ids.shape[-1]} of "
                f"{logits.vocabulary} entries. Keep TopK or Everything."
            )
        draws = torch.from_numpy(self._uniforms(keys, logits.shape[1:].numel()))

        def choose(values: Tensor, first: int) -> tuple[Tensor, Tensor]:
            below = values.double().softmax(-1).cumsum(-1)
            aim = draws[first : first + len(values)].to(values.device) * below[:, -1:]
            # The first id whose cumulative mass exceeds the aim: an id of probability 0 is never it.
            ids = torch.searchsorted(below, aim, right=True).clamp(max=values.shape[-1] - 1)
            return ids, log_softmax(values).gather(-1, ids)

        ids, log_probs = over_positions(logits, choose)
        if self.bits is not None:
            return self._pack(ids.cpu(), log_probs.cpu(), logits.vocabulary, keys)
        rows = {"logits.ids": ids.cpu().to(torch.int32), "logits.log_probs": log_probs.cpu().float()}
        return Kept(rows, {"logits": {"vocabulary": logits.vocabulary, "sampled": True}})

    def _pack(self, ids: Tensor, log_probs: Tensor, vocabulary: int, keys: Sequence[Key]) -> Kept:
        check_numbers(log_probs, "log-probabilities", keys)
        pairs = zip(ids.reshape(len(ids), -1, self.n), log_probs.reshape(len(ids), -1, self.n), strict=True)
        packed = [pack_draws(*pair, self.bits or 0, vocabulary) for pair in pairs]
        facts = {"vocabulary": vocabulary, "positions": list(ids.shape[1:-1])}
        return Kept(lay("logits.draws", packed), {"logits": facts})

    def _uniforms(self, keys: Sequence[Key], positions: int) -> np.ndarray:
        """[B * T, n] float64 in [0, 1): a generator of its own for each example."""
        drawn = np.empty((len(keys), positions, self.n))
        for row, (name, view) in enumerate(keys):
            generator = np.random.Generator(np.random.Philox(key=(self.seed << 64) | key_hash(name, view)))
            drawn[row] = generator.random((positions, self.n))
        return drawn.reshape(-1, self.n)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        if self.bits is None:
            return Signal(logits=decode_logits(rows, facts))
        shape, vocabulary = facts["logits"]["positions"], facts["logits"]["vocabulary"]
        places = int(np.prod(shape, dtype=np.int64)), self.n, self.bits, vocabulary
        found = [unpack_draws(row, *places) for row in split(rows, "logits.draws")]
        whole = (len(found), *shape, self.n)
        ids, log_probs = torch.empty(whole, dtype=torch.int64), torch.empty(whole)
        for row, (drawn, said) in enumerate(found):
            ids[row], log_probs[row] = drawn.view(whole[1:]), said.view(whole[1:])
        return Signal(logits=Sparse(ids, log_probs, torch.full(whole[:-1], -torch.inf), vocabulary, sampled=True))


@dataclass(frozen=True)
class Features:
    """The named features of the teacher; beside a codec for its logits: ``keep=(TopK(8), Features(("layer1",)))``."""

    names: tuple[str, ...]
    dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        if not names:
            raise UsageError("keep=Features(()) names no feature.")
        check_dtype(self, self.dtype, FLOATS)

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        rows = {}
        for name in self.names:
            if name not in signal.features:
                raise SignalError(
                    f"keep={self}: the teacher gives {list(signal.given)}, and no feature {name!r}"
                    f"{nearest(name, signal.features)} Ask the teacher for it with features=({name!r},)."
                )
            rows[f"features/{name}"] = round_to(signal.features[name], self.dtype, f"features[{name!r}]", keys)
        return Kept(rows)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return Signal(features={name: widened(rows[f"features/{name}"]) for name in self.names})

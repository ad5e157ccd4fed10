"""Rows of token log-probabilities in the layouts that others publish, each position under the token that it follows.

Whatever a layout's own convention is, here entry j holds the distribution of token j + 1: n tokens have n - 1 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from stillroom.errors import DataError, PairError, UsageError
from stillroom.teachers.published.distillkit import CONFIG, Compression, read_compression, unpacked
from stillroom.teachers.published.mapping import BadRowError
from stillroom.teachers.published.place import Source

Layout = Literal["distillkit", "top_k", "axolotl", "vllm"]
OVER = 0.05  # of mass above 1: lossy codes overshoot, and are scaled; more is no distribution
CLEARLY = 0.2  # of positions: a shift by one finds the following token less often by far more than this


@dataclass(frozen=True)
class TokenRow:
    """A text's tokens [n], and of each but the last K entries of what follows it: ids and log-probs [n - 1, K].

    Positions that were not answered have log-probs -inf throughout.
    """

    tokens: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray

    def found(self, ahead: int) -> float:
        """The share of answered positions j whose entries name token j + ``ahead``."""
        kept = np.isfinite(self.log_probs)
        named = (self.ids == self.tokens[ahead : ahead + len(self.ids), None]) & kept
        answered = kept.any(1)
        return float(named.any(1)[answered].mean()) if answered.any() else 0.0


Reader = Callable[[Mapping[str, Any]], TokenRow]


def reader_of(source: Source, layout: Layout | None, columns: Mapping[str, str]) -> Reader:
    """The reader of a layout, by its columns where none is named. Raises UsageError for a layout that is not known."""
    first = next((line.row for line in source.lines() if line.row is not None), {})
    layout = layout or _layout(first)
    if layout == "distillkit":
        place = source.folder and source.folder / CONFIG
        if place is None or not place.is_file():
            raise DataError(f"{source.name}: {CONFIG} is missing beside the rows; without it they cannot be read.")
        return partial(_distillkit, config=read_compression(place))
    tokens = columns.get("tokens", "input_ids")
    names = {"top_k": ("token_ids", "top_values"), "axolotl": ("target_token_ids", "target_logprobs")}
    if layout in names:
        ids, values = names[layout]
        ids, values = columns.get("ids", ids), columns.get("log_probs", values)
        # DistillKit leaves out the first token; axolotl pads the last row, which would describe a token beyond the text
        return partial(_listed, tokens=tokens, ids=ids, values=values, own=False)
    if layout == "vllm":
        return partial(_named, tokens=tokens, entries=columns.get("log_probs", "logprobs"))
    raise UsageError(f"published tokens: unknown layout {layout!r}; choose distillkit, top_k, axolotl or vllm.")


def _layout(row: Mapping[str, Any]) -> Layout:
    marks: dict[str, Layout] = {
        "compressed_logprobs": "distillkit",
        "top_values": "top_k",
        "target_logprobs": "axolotl",
        "logprobs": "vllm",
    }
    for name, layout in marks.items():
        if name in row:
            return layout
    raise UsageError(
        f"published tokens: no layout is known by the columns {', '.join(row)}. Name it (layout), and its columns "
        "(columns: {tokens, ids, log_probs})."
    )


def _distillkit(row: Mapping[str, Any], config: Compression) -> TokenRow:
    tokens = _tokens(row, "input_ids")
    try:
        ids, log_probs = unpacked(dict(row), config)
    except (KeyError, ValueError, IndexError) as error:
        raise BadRowError(f"not DistillKit's bytes ({error})") from None
    return _aligned(tokens, ids, log_probs, own=False)


def _listed(row: Mapping[str, Any], tokens: str, ids: str, values: str, own: bool) -> TokenRow:
    found, named = row.get(values), row.get(ids)
    if not found or not named or len(found) != len(named):
        raise BadRowError(f"no {values!r} or {ids!r} of one length")
    pairs = [list(zip(n or (), v or (), strict=False)) for n, v in zip(named, found, strict=True)]
    if any(len(n or ()) != len(v or ()) for n, v in zip(named, found, strict=True)):
        raise BadRowError("ids and log-probabilities of different length")
    return _aligned(_tokens(row, tokens), *_padded(pairs), own=own)


def _named(row: Mapping[str, Any], tokens: str, entries: str) -> TokenRow:
    """vLLM's entries {"token": "token_id:17", "logprob": -0.1}: of each token what it was drawn from."""
    found = row.get(entries)
    if not found:
        raise BadRowError(f"no {entries!r}")
    try:
        pairs = [
            [(int(str(e["token"]).rpartition(":")[2]), float(e["logprob"])) for e in position or ()]
            for position in found
        ]
    except (KeyError, TypeError, ValueError):
        raise BadRowError("an entry without token_id:N and logprob") from None
    return _aligned(_tokens(row, tokens), *_padded(pairs), own=True)


def _tokens(row: Mapping[str, Any], name: str) -> np.ndarray:
    if not row.get(name):
        raise BadRowError(f"no {name!r}")
    return np.asarray(row[name], dtype=np.int64)


def _padded(pairs: list[list[tuple[Any, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [N, K], K the most entries of a position; what is missing has log-prob -inf."""
    width = max((len(position) for position in pairs), default=0)
    if width == 0:
        raise BadRowError("no entries")
    ids = np.zeros((len(pairs), width), dtype=np.int64)
    log_probs = np.full((len(pairs), width), -np.inf)
    for n, position in enumerate(pairs):
        for k, (token, value) in enumerate(position):
            ids[n, k], log_probs[n, k] = int(token), float(value)
    return ids, log_probs


def _aligned(tokens: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, own: bool) -> TokenRow:
    """Under the convention of this file. ``own``: position i of the *last* rows says what token i was drawn from."""
    count = len(tokens) - 1
    if count < 1:
        raise BadRowError("fewer than 2 tokens")
    if own:
        if len(ids) > len(tokens):
            raise BadRowError(f"{len(ids)} positions for {len(tokens)} tokens")
        ids, log_probs = ids[-count:], log_probs[-count:]
        lacking = count - len(ids)  # a prompt that was not scored
        ids = np.concatenate([np.zeros((lacking, ids.shape[1]), np.int64), ids])
        log_probs = np.concatenate([np.full((lacking, log_probs.shape[1]), -np.inf), log_probs])
    elif not count <= len(ids) <= len(tokens):
        raise BadRowError(f"{len(ids)} positions for {len(tokens)} tokens")
    else:
        ids, log_probs = ids[:count], log_probs[:count]
    return TokenRow(tokens, ids, _checked(log_probs))


def _checked(log_probs: np.ndarray) -> np.ndarray:
    # axolotl and its kin fill with large negative numbers
    log_probs = np.where(log_probs < -1e4, -np.inf, log_probs)
    if np.isnan(log_probs).any() or (log_probs == np.inf).any():
        raise BadRowError("not finite")
    mass = np.exp(log_probs).sum(1)
    if (mass > 1 + OVER).any():
        raise BadRowError("a mass above 1")
    return np.where(mass[:, None] > 1, log_probs - np.log(np.maximum(mass, 1))[:, None], log_probs)


def check_shift(rows: list[TokenRow], name: str) -> None:
    """Refuse rows that are one position off: they name the token that they stand under, not the one that follows.

    Raises PairError with both shares.
    """
    some = rows[:256]
    after, under = (float(np.mean([row.found(ahead) for row in some])) for ahead in (1, 0))
    if under > after + CLEARLY:
        raise PairError(
            f"{name}: the entries name the token itself at {under:.0%} of the positions, the one that follows at "
            f"{after:.0%}: they are shifted by one. Choose layout: "
            "vllm where position i says what token i was drawn from."
        )

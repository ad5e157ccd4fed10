"""A GGUF file in llama.cpp, in this process (the ``xllamacpp`` wheel): next tokens, token ids of texts, speed.

The only file that imports xllamacpp.
"""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from stillroom.errors import ParityError, UsageError, missing_extra
from stillroom.exporting.artifact import Tensors

CONTEXT = 4096  # tokens, the answer with them
LEAST = -104.0  # nats: below, a probability is 0 in float32


class LlamaCpp:
    """The opened file. llama.cpp's server tells one next token at a time, so a whole row costs one call per position.

    ``longest``: so many tokens can be asked about at once. It listens on a free port of 127.0.0.1 for as long as this
    object lives.
    """

    longest = CONTEXT - 1

    def __init__(self, path: Path, threads: int = 1) -> None:
        runtime = library()
        settings = runtime.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = CONTEXT, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup = settings.fit_params = settings.ui = False
        settings.n_threads_http, settings.verbosity = 1, -1
        settings.n_gpu_layers = 0  # the same answers and comparable times on every machine
        # llama.cpp's defaults, flash attention and keys and values in f16, alter log-probabilities by up to 0.02 nats:
        # the file is measured without them.
        settings.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        try:
            self._server = runtime.Server(settings)
        except RuntimeError as error:
            raise ParityError(f"llama.cpp does not open {path.name}: {error}.") from None
        # A token that ends within a character makes the server hold its probabilities back: it is told to write this.
        self._writes = self.token_ids("a")[0]
        self._vocabulary = len(self._next([0], 1 << 30))

    def __call__(self, tensors: Tensors) -> Tensor:
        """Log-probabilities [B, T, V] for tokens and positions [B, T]; a document starts where the position is 0."""
        tokens, positions = tensors
        rows = [
            torch.stack([self.after(row[place - at[place] : place + 1].tolist()) for place in range(len(row))])
            for row, at in zip(tokens, positions, strict=True)
        ]
        return torch.stack(rows)

    def after(self, prefix: Sequence[int]) -> Tensor:
        """The log-probabilities [V] of the token that follows these ids."""
        said = self._next(prefix, self._vocabulary)
        found = torch.full((self._vocabulary,), math.nan)
        ids = torch.tensor([entry["id"] for entry in said])
        values = [math.nan if entry["logprob"] is None else entry["logprob"] for entry in said]
        found[ids] = torch.tensor(values).clamp(min=LEAST)
        return found

    def decode_seconds(self, prefix: Sequence[int], tokens: int) -> float:
        """Seconds per token of writing ``tokens`` greedily after ``prefix``, by llama.cpp's own clock."""
        asked = {"prompt": list(prefix), "max_tokens": tokens, "ignore_eos": True}
        timings = self._completion(asked)["timings"]
        return timings["predicted_ms"] / 1000 / max(timings["predicted_n"] - 1, 1)

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text, marks read as such, by the tokenizer inside the file."""
        place = urlsplit(self._server.listening_address)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
        asked = json.dumps({"content": text, "add_special": False, "parse_special": True})
        try:
            connection.request("POST", "/tokenize", asked, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())["tokens"]
        finally:
            connection.close()

    def _next(self, prefix: Sequence[int], count: int) -> list[dict[str, Any]]:
        """The ``count`` likeliest next tokens; what is told of them is from before the bias."""
        asked = {"prompt": list(prefix), "max_tokens": 1, "logprobs": count, "logit_bias": [[self._writes, 1e6]]}
        return self._completion(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    def _completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        # the other samplers (top-k, top-p) would only cost time
        said = self._server.handle_completions({"temperature": 0.0, "samplers": ["temperature"], **asked})
        if "error" in said:
            raise UsageError(f"llama.cpp refuses {len(asked['prompt'])} tokens: {said['error']['message']}.")
        return said


def open_model(path: Path) -> LlamaCpp:
    """The file in llama.cpp, one thread, on the CPU."""
    return LlamaCpp(path)


def library() -> Any:
    """The xllamacpp module. Raises MissingExtraError without it."""
    try:
        import xllamacpp
    except ImportError as error:
        raise missing_extra("xllamacpp", "llama") from error
    return xllamacpp

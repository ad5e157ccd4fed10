"""The tokenizer beside a file that holds none: tokenizer.json of the ``tokenizers`` library, and the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.errors import missing_extra
from stillroom.exporting.artifact import Run, Tensors
from stillroom.files import write_bytes

TOKENS, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def write_tokens(tokenizer: Any, folder: Path) -> tuple[Path, ...]:
    """Write tokenizer.json and, where there is one, chat_template.jinja. Returns their paths."""
    files = {TOKENS: tokenizer.backend_tokenizer.to_str(pretty=True)}
    if getattr(tokenizer, "chat_template", None):
        files[TEMPLATE] = tokenizer.chat_template
    for name, content in files.items():
        write_bytes(folder / name, content.encode())
    return tuple(folder / name for name in files)


class WithTokens:
    """A network in its runtime, and the tokenizer that lies beside its file."""

    def __init__(self, run: Run, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise missing_extra("tokenizers", "text") from error
        self._run = run
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENS))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, tensors: Tensors) -> Tensor:
        """Logits [B, T, V] for tokens and positions [B, T]; a document starts where the position is 0."""
        return self._run(tensors)

    def token_ids(self, text: str) -> Sequence[int]:
        """The ids of a text, marks read as such."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

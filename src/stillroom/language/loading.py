"""A causal language model and its tokenizer from a hub, a folder, a package or a GGUF file. transformers is only here.

No code of a model's repository is run (trust_remote_code=False), and a folder is read without asking any hub.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.digests import file_digest
from stillroom.errors import MissingFileError, missing_extra
from stillroom.language.answers import check_head
from stillroom.places import Place, locate


@dataclass(frozen=True, eq=False)
class Loaded:
    """A language model in evaluation mode, float32 on the CPU unless asked otherwise, and where it came from."""

    net: nn.Module
    tokenizer: Any
    place: Place


def load_causal(model: str | Path, gguf: str | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """``model``: 'hf:org/name', a folder, 'package:NAME/sub', or a path that ends in .gguf; ``gguf``: a file therein.

    A GGUF file is dequantised once and kept as an ordinary folder below STILLROOM_CACHE (default ~/.cache/stillroom).
    Raises MissingFileError when it cannot be had, MissingExtraError without the extra it needs, SignalError for a
    model whose logits are not hidden states times a head.
    """
    text = str(model)
    if text.endswith(".gguf") and gguf is None:
        parent, _, gguf = text.rpartition("/")
        text = parent or "."
    place = locate(text)
    name = place.name
    if gguf is not None:
        place = Place(name, Path(gguf).stem, f"{place.source}, {gguf}", place.licence, place.local)
        name = _dequantised(place, gguf)
    net = _pretrained("AutoModelForCausalLM", place, name, dtype=dtype)
    tokenizer = _pretrained("AutoTokenizer", place, name)
    check_head(net.eval())
    return Loaded(net, tokenizer, place)


def _dequantised(place: Place, file: str) -> str:
    """The folder that holds a GGUF file's model in transformers' own layout."""
    if not place.local:
        return _convert(place, file, _cache() / f"{place.name}-{file}".replace("/", "--"))
    path = Path(place.name) / file
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist. Name a GGUF file inside {place.source}.")
    return _convert(place, file, _cache() / file_digest(path))


def _convert(place: Place, file: str, folder: Path) -> str:
    if (folder / "config.json").is_file():
        return str(folder)
    net = _pretrained("AutoModelForCausalLM", place, place.name, gguf_file=file, dtype=torch.float32)
    tokenizer = _pretrained("AutoTokenizer", place, place.name, gguf_file=file)
    config = net.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(net)(config)  # the loaded one calls itself quantised and refuses to be saved
    plain.load_state_dict(net.state_dict())
    making = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    making.mkdir(parents=True, exist_ok=True)
    with _quiet():
        plain.save_pretrained(making)
    tokenizer.save_pretrained(making)
    try:
        making.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(making)
    return str(folder)


def _cache() -> Path:
    return Path(os.environ.get("STILLROOM_CACHE", Path.home() / ".cache" / "stillroom")) / "dequantised"


def _pretrained(kind: str, place: Place, name: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    local = place.local or Path(name).is_dir()
    try:
        with _quiet():
            return getattr(transformers, kind).from_pretrained(
                name, trust_remote_code=False, local_files_only=local, **options
            )
    except ImportError as error:
        raise missing_extra("gguf", "gguf") from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingFileError(
            f"{place.source} cannot be loaded as a causal language model ({reason}) Check that it holds config.json, "
            "weights and tokenizer files; without a connection to a hub, give a folder, a package or a GGUF file."
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar per tensor or file: it says nothing to a person who asked for a model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_causal(net: Any) -> bool:
    """Whether a network is kept in transformers' own layout: a causal language model, adapted by peft or not."""
    return hasattr(net, "save_pretrained") and hasattr(net, "get_decoder")


def write_folder(net: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, configuration and tokenizer as transformers keeps them; LoRA adapters merged, and beside in adapter/."""
    plain = net
    if hasattr(net, "merge_and_unload"):
        net.save_pretrained(folder / "adapter")
        plain = copy.deepcopy(net).merge_and_unload()
    with _quiet():
        plain.save_pretrained(folder, max_shard_size="1TB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

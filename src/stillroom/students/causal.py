"""Students that are causal language models of transformers: fresh ones, LoRA adapters, and their ordinary folders.

A folder of such a student loads with transformers alone; student.json beside it says what trained it.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.errors import UsageError, missing_extra
from stillroom.language import head_of, load_causal
from stillroom.network import Columns
from stillroom.students.networks import Student

COLUMNS = Columns(("tokens", "positions"))


def from_causal(net: nn.Module, tokenizer: Any, name: str = "student") -> Student:
    """A student from a transformers causal language model in memory and its tokenizer."""
    return Student(net, adapter=COLUMNS, answers="next_token", name=name, tokenizer=tokenizer)


def from_pretrained(model: str | Path, gguf: str | None = None, name: str = "student") -> Student:
    """A student from a hub, folder, package or GGUF file, as ``teachers.causal.causal_lm`` takes them."""
    loaded = load_causal(model, gguf)
    loaded.net.requires_grad_(True)
    return from_causal(loaded.net, loaded.tokenizer, name)


def fresh(
    tokenizer: Any,
    *,
    hidden: int = 192,
    layers: int = 6,
    heads: int = 6,
    kv_heads: int | None = None,
    ffn: int | None = None,
    context: int = 2048,
    tied: bool = True,
    seed: int = 0,
    name: str = "student",
) -> Student:
    """A small Llama of random weights for a tokenizer. ``ffn``: 8/3 of hidden by default, in steps of 64."""
    if hidden % heads or (kv_heads and heads % kv_heads):
        raise UsageError(f"hidden={hidden} must be a multiple of heads={heads}, and heads of kv_heads={kv_heads}.")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=ffn or -(-hidden * 8 // 3 // 64) * 64,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(config)
    return from_causal(net, tokenizer, name)


def lora(student: Student, rank: int = 16, alpha: float | None = None, seed: int = 0, **settings: Any) -> Student:
    """The same student with LoRA adapters (peft) in its layers; everything else, the head included, is frozen.

    ``alpha``: 2 x rank by default. ``settings`` go to peft.LoraConfig (target_modules, lora_dropout, ...).
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_extra("peft", "lora") from error
    chosen = {"target_modules": "all-linear", **settings}
    config = LoraConfig(r=rank, lora_alpha=int(alpha or 2 * rank), task_type="CAUSAL_LM", **chosen)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it will drop
        torch.manual_seed(seed)
        net: Any = get_peft_model(copy.deepcopy(student.net), config)  # type: ignore[arg-type]
    head_of(net)  # refuses an adapter on the head
    return dataclasses.replace(student, net=net)


def adapted(
    model: str,
    gguf: str | None = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    seed: int = 0,
    name: str = "student",
) -> Student:
    """``lora`` in a recipe's words: adapters on the model at 'hf:org/name', a folder, a package or a GGUF file."""
    return lora(from_pretrained(model, gguf, name), rank, alpha, seed)

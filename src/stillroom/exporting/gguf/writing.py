"""GGUF, the file that llama.cpp runs: f32, f16, or blocks of 32 numbers with one scale, of 8 bits (q8_0) or 4 (q4_0).

The writing of the container and the rounding are the ``gguf`` package's; here is what a family of networks is called
there. The only file, with ``tokens``, that imports gguf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import UsageError, missing_extra
from stillroom.exporting.artifact import Tensors, Written, versions_of
from stillroom.exporting.gguf import llamacpp
from stillroom.exporting.gguf.tokens import add_tokenizer
from stillroom.language import is_causal
from stillroom.students.networks import Student

PRECISIONS = ("f32", "f16", "q8_0", "q4_0")
# model_type of transformers -> llama.cpp's architecture. Those of the second line turn pairs of neighbours in RoPE, so
# the rows of q and k are put in that order; the others turn halves, as transformers does.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NEIGHBOURS = ("llama",)
BLOCK = 32  # q8_0 and q4_0 round so many numbers of a row together
ENDS = ("token_embd.weight", "output.weight")  # of q4_0 in 8 bits, as llama.cpp keeps them wider too


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "f32"
) -> Written:
    """Write path.gguf: the network, its tokenizer and its chat template in one file.

    Matrices become ``precision``; norms and biases, and matrices whose rows are no multiple of 32 numbers, stay
    float32; of q4_0 the embedding and the head are q8_0. There is no imatrix: the ``gguf`` package has no rounding
    that weighs numbers by importance, and llama.cpp's tool that makes one is not in it or in xllamacpp.

    Raises UsageError for an unknown precision, a student that is no language model, a family, RoPE or tokenizer that
    is not known here; MissingExtraError before anything is written.
    """
    net: Any = student.net
    if not is_causal(net) or student.tokenizer is None:
        raise UsageError(f"gguf holds a language model with its tokenizer; {student.name!r} answers {student.answers}.")
    gguf = _library()
    llamacpp.library()
    family = net.config.model_type
    if family not in FAMILIES:
        raise UsageError(f"gguf export does not know the family {family!r}; known: {', '.join(FAMILIES)}. Use onnx.")
    path = path.with_suffix(".gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, FAMILIES[family])
    try:
        _add_settings(writer, net, student.name, precision)
        add_tokenizer(writer, student.tokenizer, net.get_input_embeddings().weight.shape[0])
        whole = _add_tensors(writer, gguf, net, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    inputs = [{"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in ("tokens", "positions")]
    versions = versions_of("gguf", "xllamacpp")
    notes = {"architecture": FAMILIES[family], "kept_float32": whole, "inputs": inputs, "output": "next_token"}
    return Written(path, llamacpp.open_model, {**notes, "versions": versions})


def _add_settings(writer: Any, net: Any, name: str, precision: str) -> None:
    """What llama.cpp must know of the network's shape. The size of a head is said: pruned ones need not fill hidden."""
    import gguf

    config = net.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(net.get_input_embeddings().weight.shape[0])
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if precision == "f32" else "MOSTLY_") + precision.upper()])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tensors(writer: Any, gguf: Any, net: Any, precision: str) -> list[str]:
    """Every weight under llama.cpp's name. Returns the matrices that could not be rounded."""
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[net.config.model_type]]
    names = gguf.get_tensor_name_map(architecture, net.config.num_hidden_layers)
    whole: list[str] = []
    for name, tensor in _weights(net):
        known = "rope_freqs.weight" if name == "rope_freqs" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UsageError(f"gguf has no place for the weight {name!r} of {type(net).__name__}. Use onnx.")
        data = np.ascontiguousarray(tensor.numpy())
        kind = _kind(gguf, known, data, precision)
        if kind == gguf.GGMLQuantizationType.F32:
            if data.ndim == 2 and precision != "f32":
                whole.append(known)
            writer.add_tensor(known, data)
        elif kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(known, data.astype(np.float16))
        else:
            writer.add_tensor(known, gguf.quants.quantize(data, kind), raw_dtype=kind)
    return whole


def _kind(gguf: Any, name: str, data: np.ndarray, precision: str) -> Any:
    """How a weight is kept: matrices in ``precision`` where they can be, all else in float32."""
    kinds = gguf.GGMLQuantizationType
    largest = np.finfo(np.float16).max  # f16, and the scale of a block
    if data.ndim != 2 or precision == "f32" or np.abs(data).max() > largest:
        return kinds.F32
    if precision == "f16":
        return kinds.F16
    if data.shape[1] % BLOCK:
        return kinds.F32
    return kinds.Q8_0 if precision == "q8_0" or name in ENDS else kinds.Q4_0


def _weights(net: Any) -> Iterator[tuple[str, Tensor]]:
    """The state, float32, in the order of its names; a tied head is left out, since llama.cpp takes the embedding."""
    config = net.config
    tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
    for name, tensor in sorted(net.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        tensor = tensor.detach().cpu().float()
        if config.model_type in NEIGHBOURS and ".q_proj." in name:
            tensor = neighbours(tensor, config.num_attention_heads)
        elif config.model_type in NEIGHBOURS and ".k_proj." in name:
            tensor = neighbours(tensor, config.num_key_value_heads)
        yield name, tensor
    factors = _rope_factors(net)
    if factors is not None:
        yield "rope_freqs", factors


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """The rows [heads x size, ...] of q or k with the two halves of each head interleaved.

    transformers turns row i with row i + size/2, llama.cpp row 2i with row 2i + 1.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape).contiguous()


def _rope_factors(net: Any) -> Tensor | None:
    """What each frequency of RoPE is divided by [size / 2]; None for plain RoPE.

    Covers every scaling that is fixed once (linear, llama3); raises UsageError for one that is not.
    """
    rotary, rope = net.get_decoder().rotary_emb, net.config.rope_parameters
    used = rotary.inv_freq.detach().float().cpu()
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rotary.attention_scaling != 1.0:
        raise UsageError(f"gguf export does not know the RoPE scaling {kind!r}; known: default, linear, llama3.")
    size = torch.arange(0, 2 * len(used), 2, dtype=torch.float32) / (2 * len(used))
    factors = 1.0 / (rope["rope_theta"] ** size) / used
    return None if kind == "default" else factors


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise missing_extra("gguf", "gguf") from error
    return gguf

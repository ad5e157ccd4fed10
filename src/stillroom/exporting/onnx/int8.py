"""A float32 ONNX model in fewer bits: int8 (static, dynamic, or of the weights alone, as suits the network), int4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stillroom.exporting.artifact import Run, Tensors
from stillroom.exporting.onnx.runtime import library, plain, run_of, without_traces
from stillroom.network import Answers

# What becomes int8: the operators that hold weights, and pooling, which would otherwise leave int8 between two of them.
# Normalisation, reductions and masks stay in float32: they are small, and a count rounded to 8 bits is wrong.
QUANTISED = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "MaxPool"]
ATTENTION = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "Attention", "Softmax"}
BLOCK = 32
# Weights use 7 of their 8 bits: a processor with AVX2 and no VNNI adds two products in 16 bits, where full ones do not
# fit. A small convolutional network that keeps all its answers with 7 bits keeps 75 % with 8 there, and all elsewhere.
SEVEN_BITS = True
STATIC_PREFERRED_WITHIN = 0.02  # a dynamic convolution (ConvInteger) runs about four times slower than a static one


def quantise(
    content: bytes, names: Sequence[str], calibration: Iterable[Tensors], answers: Answers, wanted: str | None = None
) -> tuple[bytes, dict[str, Any]]:
    """The int8 model, and which way was chosen, why, and what each candidate kept on the calibration inputs.

    ``wanted``: 'static' or 'dynamic'. Without it, language models: their weights alone, in blocks of 32 as q8_0 has
    them, since activations rounded together lose what an outlier leaves (8 layers of SmolLM2: KL 0.24 nats, not
    0.0005). Other transformers: dynamic (their activations have outliers that a fixed range cuts). Convolutions:
    static, unless it keeps clearly less. Everything else: whichever keeps more, then whichever is smaller.
    """
    batches = list(calibration)
    operators = {node.op_type for node in library("onnx").load_from_string(content).graph.node}
    attends, convolves = bool(operators & ATTENTION), bool(operators & {"Conv", "ConvTranspose"})
    if answers == "next_token" and wanted is None:
        return weights_alone(content, batches, answers, bits=8)
    why = "asked for" if wanted else "transformer" if attends else "convolution" if convolves else "measured"
    methods = (wanted,) if wanted else ("dynamic",) if attends else ("static", "dynamic")
    with tempfile.TemporaryDirectory() as place:
        prepared = _prepare(content, Path(place))
        reference = run_of(content)
        made: dict[str, bytes] = {}
        measured: dict[str, dict[str, float]] = {}
        for method in methods:
            made[method] = _quantised(prepared, Path(place) / f"{method}.onnx", method, names, batches)
            kept = _kept(reference, run_of(made[method]), batches, answers)
            measured[method] = {"kept": kept, "bytes": len(made[method])}
    method = max(measured, key=lambda name: (measured[name]["kept"], -measured[name]["bytes"]))
    if why == "convolution" and measured["static"]["kept"] >= measured[method]["kept"] - STATIC_PREFERRED_WITHIN:
        method = "static"
    return made[method], {"method": method, "why": why, "candidates": measured, "calibration_rows": _rows(batches)}


def weights_alone(
    content: bytes, batches: Sequence[Tensors], answers: Answers, bits: int
) -> tuple[bytes, dict[str, Any]]:
    """Matrices in blocks of 32 numbers of 8 or 4 bits with a scale, activations in float32.

    A table of embeddings, and a head tied to it, stay.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = library("onnx").load_from_string(content)
    how = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits, op_types_to_quantize=("MatMul",))
    rounding: Any = MatMulNBitsQuantizer(model, algo_config=how)
    rounding.process()
    rounded = without_traces(rounding.model.model).SerializeToString(deterministic=True)
    kept = {"kept": _kept(run_of(content), run_of(rounded), batches, answers), "bytes": len(rounded)}
    why = "language model" if bits == 8 else f"{bits} bits a weight"
    said = {"method": "weights", "why": why, "candidates": {"weights": kept}, "calibration_rows": _rows(batches)}
    return rounded, said


def nothing_to_round(content: bytes, precision: str) -> str | None:
    """Why a graph cannot be had in this precision, with the alternative; None where it can."""
    graph = library("onnx").load_from_string(content).graph
    operators = {node.op_type for node in graph.node}
    if precision.startswith("int8") and not operators & set(QUANTISED):
        return f"there is nothing to make int8: the network has no {', '.join(QUANTISED[:-1])}. Use fp32"
    fixed = {item.name for item in graph.initializer if len(item.dims) == 2}
    if precision == "int4" and not any(node.op_type == "MatMul" and node.input[1] in fixed for node in graph.node):
        return (
            "int4 rounds products of sequences with fixed matrices (MatMul), as language models have them, and the "
            "graph has none. Use int8"
        )
    return None


def _rows(batches: Sequence[Tensors]) -> int:
    return sum(len(batch[0]) for batch in batches)


def _prepare(content: bytes, place: Path) -> Path:
    """The model after ONNX Runtime's own preparation: shapes inferred, constants folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = place / "fp32.onnx", place / "prepared.onnx"
    source.write_bytes(content)
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:  # symbolic shape inference gives up on some graphs with bare exceptions; it is optional
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def _quantised(prepared: Path, path: Path, method: str, names: Sequence[str], batches: Sequence[Tensors]) -> bytes:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(batches)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            batch = next(self.rows, None)
            return None if batch is None else {n: plain(t).numpy() for n, t in zip(names, batch, strict=True)}

    if method == "dynamic":
        quantize_dynamic(str(prepared), str(path), weight_type=QuantType.QInt8, reduce_range=SEVEN_BITS)
    else:
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            reduce_range=SEVEN_BITS,
        )
    model = library("onnx").load(path)
    return without_traces(model).SerializeToString(deterministic=True)


def _kept(reference: Run, candidate: Run, batches: Sequence[Tensors], answers: Answers) -> float:
    """Top-1 agreement of logits, or 1 - relative root mean square error of values, on the calibration inputs."""
    same, places, error, total = 0, 0, 0.0, 0.0
    for batch in batches:
        ours, theirs = reference(batch), candidate(batch)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        places += ours[..., 0].numel()
        error += float((ours - theirs).square().sum())
        total += float(ours.square().sum())
    return 1 - (error / max(total, 1e-30)) ** 0.5 if answers == "values" else same / max(places, 1)

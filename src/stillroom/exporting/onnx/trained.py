"""A student that was trained rounded, as the ONNX graph of its own integers and scales: nothing is calibrated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillroom.exporting.onnx.runtime import library
from stillroom.students.rounding import rounded_layers

INT4_OPSET = 21  # the first with int4 and blocks
MARK = "int4_"  # buffers that hold integers of 4 bits


def with_integers(net: nn.Module) -> nn.Module:
    """The network, in place, its rounded layers replaced by ones that hold integers and spell out how they are used."""
    for name, layer in rounded_layers(net).items():
        made = _Int8(layer) if layer.rounded.rounding.precision == "int8" else _Int4(layer)
        if not name:
            return made
        net.set_submodule(name, made)
    return net


class _Int8(nn.Module):
    """Input and weight through int8, the bias through int32: what runtimes fuse into integer kernels."""

    def __init__(self, layer: Any):
        super().__init__()
        integers, scales = layer.rounded.integers(layer)
        self.run = _runner(layer)
        self.register_buffer("weight", integers.to(torch.int8))
        self.register_buffer("weight_scale", scales.flatten())
        self.register_buffer("weight_zero", torch.zeros(len(scales), dtype=torch.int8))
        self.register_buffer("input_scale", layer.rounded.scale.clone())
        self.register_buffer("input_zero", layer.rounded.zero.to(torch.int8))
        bias = layer.rounded.bias(layer)
        self.register_buffer("bias", None if bias is None else bias[0])
        self.register_buffer("bias_scale", None if bias is None else bias[1])

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = _back(_to_int8(inputs, self.input_scale, self.input_zero), self.input_scale, self.input_zero)
        weight = _back(self.weight, self.weight_scale, self.weight_zero, axis=0)
        bias = None if self.bias is None else _back(self.bias, self.bias_scale, None, axis=0)
        return self.run(inputs, weight, bias)


class _Int4(nn.Module):
    """The weight alone, in groups: a linear layer's lies [inputs, outputs], as block-wise kernels take it."""

    def __init__(self, layer: Any):
        super().__init__()
        integers, scales = layer.rounded.integers(layer)
        how: Any = layer.rounded.rounding
        self.run = _runner(layer)
        self.grouped = isinstance(layer, nn.Linear) and scales.shape[1] > 1
        self.block = int(how.group)
        self.bias = layer.bias
        self.register_buffer(MARK + "weight", (integers.T.contiguous() if self.grouped else integers).to(torch.int8))
        self.register_buffer("scale", scales.T.contiguous() if self.grouped else scales.flatten())

    def forward(self, inputs: Tensor) -> Tensor:
        integers: Any = self.get_buffer(MARK + "weight")
        if not self.grouped:
            return self.run(inputs, _back(integers, self.scale, None, axis=0), self.bias)
        weight = _back(integers, self.scale, None, axis=0, block_size=self.block)
        output = inputs @ weight
        return output if self.bias is None else output + self.bias


def _runner(layer: Any) -> Any:
    """The plain function of the layer: (input, weight, bias) to output."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    return layer._conv_forward


def _to_int8(inputs: Tensor, scale: Any, zero: Any) -> Tensor:
    return torch.onnx.ops.symbolic("QuantizeLinear", (inputs, scale, zero), dtype=torch.int8, shape=inputs.shape)


def _back(integers: Any, scale: Any, zero: Any, **attributes: Any) -> Tensor:
    inputs = (integers, scale) if zero is None else (integers, scale, zero)
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=integers.shape)


def own_zeros(model: Any) -> Any:
    """The model with a zero point for each weight: the exporter lets equal ones be shared, and ONNX Runtime, which
    renames them for its unsigned kernels, then finds the second name taken and refuses the file.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in held:
            continue
        zero = node.input[2]
        if zero in taken:
            copy = model.graph.initializer.add()
            copy.CopyFrom(held[zero])
            copy.name = node.input[2] = f"{node.input[0]}_own_zero"
        taken.add(zero)
    return model


def pack_int4(model: Any) -> Any:
    """The model with its integers of 4 bits stored as such, two to a byte."""
    onnx = library("onnx")
    for tensor in model.graph.initializer:
        if MARK in tensor.name:
            integers = onnx.numpy_helper.to_array(tensor).flatten().tolist()
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT4, tensor.dims, integers))
    for value in model.graph.value_info:
        if MARK in value.name and value.type.tensor_type.elem_type == onnx.TensorProto.INT8:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT4
    return model

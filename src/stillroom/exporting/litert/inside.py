"""What runs in the environment ``litert``: the conversion, LiteRT, TFLite Micro. Knows no stillroom."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
LIBRARIES = ("torch", "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "tflite-micro")
ARENA = 1 << 20  # bytes that TFLite Micro starts with; doubled until the model fits
LARGEST_ARENA = 1 << 28


def convert(settings: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """``program`` (a .pt2 that torch.export wrote) as the .tflite file ``path``, in ``precision``.

    ``arrays``: the calibration inputs 0, 1, ... [N, ...], one column for each of the network's inputs.
    """
    import torch

    litert_torch = importlib.import_module("litert_torch")
    torch.set_num_threads(1)
    module = torch.export.load(settings["program"]).module()
    columns = [arrays[str(index)] for index in range(len(arrays))]
    one = tuple(torch.from_numpy(column[:1].copy()) for column in columns)
    path = Path(settings["path"])
    with torch.no_grad():
        litert_torch.convert(module, one).export(str(path))
    if settings["precision"] != "fp32":
        content = _rounded(path, settings["precision"], columns)
        path.write_bytes(content)
    return {"versions": {name: metadata.version(name) for name in LIBRARIES}}, {}


def _rounded(path: Path, precision: str, columns: list[np.ndarray]) -> bytes:
    """int8: weights and activations, with ranges from the columns. int8_dynamic: weights alone in the file."""
    quantizer = importlib.import_module("ai_edge_quantizer.quantizer")
    recipe = importlib.import_module("ai_edge_quantizer.recipe")
    if precision == "int8_dynamic":
        return bytes(quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32()).quantize().quantized_model)
    calibrator = importlib.import_module("ai_edge_quantizer.calibrator")
    manager = importlib.import_module("ai_edge_quantizer.recipe_manager").RecipeManager()
    update = importlib.import_module("ai_edge_quantizer.utils.qsv_utils").min_max_update
    how = recipe.static_wi8_ai8()
    manager.load_quantization_recipe(how)
    # The library's own way is a moving average of the least and the largest number (0.95 of what was): it forgets rows
    # and cuts what is rare. Here they are the least and the largest of all rows.
    calibration = calibrator.Calibrator(str(path), num_threads=1, qsv_update_func=update)
    signature, names = _signature(calibration._tfl_interpreter)
    rows = [
        {name: column[row : row + 1] for name, column in zip(names, columns, strict=True)}
        for row in range(len(columns[0]))
    ]
    calibration.calibrate({signature: rows}, manager)
    return bytes(quantizer.Quantizer(str(path), how).quantize(calibration.get_model_qsvs()).quantized_model)


def _signature(interpreter: Any) -> tuple[str, list[str]]:
    """The signature's name, and its inputs in the order of the network's: args_0, args_1, ..."""
    ((name, found),) = interpreter.get_signature_list().items()
    return name, sorted(found["inputs"], key=lambda text: int(text.rpartition("_")[2]))


def open_model(settings: dict[str, Any]) -> tuple[Callable[[list[np.ndarray]], np.ndarray], dict[str, Any]]:
    """The file ``path`` in LiteRT, or in TFLite Micro where ``micro`` is true; and what is said of it."""
    return _open_micro(settings["path"]) if settings["micro"] else _open_lite(settings["path"])


def _open_lite(path: str) -> tuple[Callable[[list[np.ndarray]], np.ndarray], dict[str, Any]]:
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    signature, names = _signature(interpreter)
    found = interpreter.get_signature_runner(signature).get_input_details()
    details = [found[name] for name in names]
    (output,) = interpreter.get_output_details()

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        for detail, array in zip(details, arrays, strict=True):
            interpreter.set_tensor(detail["index"], _to_file(array, detail))
        interpreter.invoke()
        return _from_file(interpreter.get_tensor(output["index"]), output)

    return run, {"inputs": [_described(name, detail) for name, detail in zip(names, details, strict=True)]}


def _open_micro(path: str) -> tuple[Callable[[list[np.ndarray]], np.ndarray], dict[str, Any]]:
    """TFLite Micro, in the smallest arena (a power of two) that holds the model. It knows inputs by their place."""
    runtime = importlib.import_module("tflite_micro.python.tflite_micro.runtime")
    lite = importlib.import_module("ai_edge_litert.interpreter").Interpreter(path)
    _, names = _signature(lite)
    order = [entry["index"] for entry in lite.get_input_details()]
    by_name = lite.get_signature_runner().get_input_details()
    places = [order.index(by_name[name]["index"]) for name in names]
    interpreter = runtime.Interpreter.from_file(path, arena_size=_arena(runtime, path))
    details = [interpreter.get_input_details(place) for place in places]
    output = interpreter.get_output_details(0)

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        for place, detail, array in zip(places, details, arrays, strict=True):
            interpreter.set_input(_to_file(array, detail), place)
        interpreter.invoke()
        return _from_file(interpreter.get_output(0), output)

    return run, {"inputs": [_described(name, detail) for name, detail in zip(names, details, strict=True)]}


def _arena(runtime: Any, path: str) -> int:
    size = ARENA
    while True:
        try:
            runtime.Interpreter.from_file(path, arena_size=size)
        except RuntimeError:
            if size >= LARGEST_ARENA:
                raise
            size *= 2
        else:
            return size


def _scale(detail: dict[str, Any]) -> tuple[float, int] | None:
    """(scale, zero point) of a tensor that is int8 in the file, else None."""
    found = detail["quantization_parameters"]
    return (float(found["scales"][0]), int(found["zero_points"][0])) if len(found["scales"]) else None


def _to_file(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """What the file takes: int8 inputs are round(x / scale) + zero point, cut to [-128, 127]."""
    scale = _scale(detail)
    if scale is None:
        return np.ascontiguousarray(array.astype(detail["dtype"]))
    return np.clip(np.rint(array / scale[0]) + scale[1], -128, 127).astype(np.int8)


def _from_file(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """What the network answers: (q - zero point) scale, float32. A copy: the interpreter uses its memory again."""
    scale = _scale(detail)
    return np.array(array, dtype=np.float32) if scale is None else (array.astype(np.float32) - scale[1]) * scale[0]


def _described(name: str, detail: dict[str, Any]) -> dict[str, Any]:
    """An input as artifact.json has it, and its scale where the caller must round."""
    scale = _scale(detail)
    dtype = "float32" if scale else np.dtype(detail["dtype"]).name
    rounded = {"int8": {"scale": scale[0], "zero_point": scale[1]}} if scale else {}
    return {"name": name, "dtype": dtype, "shape": [int(size) for size in detail["shape"]], **rounded}

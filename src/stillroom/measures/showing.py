"""An example's inputs as a person can look at them: text, a small picture, or the first numbers. Plain JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from stillroom.types import Batch, Column

TEXT = 300  # characters
NUMBERS = 8
COLUMNS = 12
SIDE = 64  # pixels: larger pictures are averaged down
SMALLEST = 4  # pixels a side, below which a tensor is shown as numbers


def shown_inputs(batch: Batch, row: int) -> dict[str, Any]:
    """{column: text, {"image": data URI}, or a list of numbers} of one example."""
    return {name: _shown(batch.inputs[name], row) for name in list(batch.inputs)[:COLUMNS]}


def _shown(column: Column, row: int) -> Any:
    if not isinstance(column, Tensor):
        text = str(column[row])
        return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
    value = column[row].detach().cpu()
    picture = _as_picture(value)
    if picture is not None:
        return {"image": _png(picture)}
    flat = value.reshape(-1)[:NUMBERS]
    if value.is_floating_point():
        return [float(f"{x:.4g}") if x == x and abs(x) != float("inf") else None for x in flat.tolist()]
    return flat.tolist()


def _as_picture(value: Tensor) -> Tensor | None:
    """[C, H, W] float with C = 1 or 3, or None when the tensor does not have the shape of a picture."""
    if value.ndim == 2 and value.is_floating_point() | (value.dtype == torch.uint8):
        value = value.unsqueeze(0)
    if value.ndim != 3 or value.shape[0] not in (1, 3) or min(value.shape[1:]) < SMALLEST:
        return None
    value = value.float().nan_to_num()
    if max(value.shape[1:]) > SIDE:
        scale = SIDE / max(value.shape[1:])
        size = [max(1, round(side * scale)) for side in value.shape[1:]]
        value = torch.nn.functional.interpolate(value.unsqueeze(0), size=size, mode="area")[0]
    return value


def _png(picture: Tensor) -> str:
    """A data URI. Each picture is stretched to its own darkest and lightest: the normalisation is not known here."""
    from matplotlib.image import imsave  # slow to import, and needed for pictures only

    low, high = picture.min(), picture.max()
    pixels = ((picture - low) / (high - low).clamp_min(1e-12)).expand(3, -1, -1).permute(1, 2, 0)
    file = io.BytesIO()
    imsave(file, (pixels * 255).round().to(torch.uint8).numpy(), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

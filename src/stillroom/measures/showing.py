"""An example's inputs as a person can look at them: text, a small picture, or the first numbers. Plain JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.divergences import total_variation
from stillroom.measures.classification import compared
from stillroom.measures.reading import read
from stillroom.types import Batch, Column, Signal, Sparse

TEXT = 300  # characters
NUMBERS = 8
COLUMNS = 12
SIDE = 64  # pixels: larger pictures are averaged down
SMALLEST = 4  # pixels a side, below which a tensor is shown as numbers


def shown_inputs(batch: Batch, row: int) -> dict[str, Any]:
    """{column: text, {"image": data URI}, or a list of numbers} of one example."""
    return {name: _shown(batch.inputs[name], row) for name in list(batch.inputs)[:COLUMNS]}


def furthest_tokens(
    batch: Batch, said: Mapping[str, Signal], student: Signal, teacher: Signal, tokenizer: Any
) -> tuple[Batch, dict[str, Signal], list[dict[str, Any]]]:
    """Each text at the one token where the student is furthest from the teacher.

    The labels there [B], what each row says there, and the text before it, the shown part of it.
    """
    ours, theirs, counted = compared(student, teacher, batch, "a comparison of texts")
    gap = torch.full(ours.shape, -1.0, device=counted.device)
    if isinstance(ours, Sparse) or (isinstance(theirs, Sparse) and theirs.sampled):  # all that is known of these
        gap[counted] = (read(ours, batch).top != read(theirs, batch).top).float()
    else:
        gap[counted] = total_variation(ours[counted], theirs[counted]).float()
    places, rows = gap.argmax(-1).cpu(), torch.arange(len(batch))
    labels = None if batch.labels is None else batch.labels[rows, places]
    there = {
        name: Signal(logits=None if signal.logits is None else signal.logits[rows, places])
        for name, signal in said.items()
    }
    return Batch(batch.ids, {}, labels), there, [_before(batch, r, int(places[r]), tokenizer) for r in range(len(rows))]


def _before(batch: Batch, row: int, place: int, tokenizer: Any) -> dict[str, str]:
    """The text of the same document up to and with this place, its end."""
    documents, tokens = batch.extra["documents"][row], batch.inputs["tokens"][row]
    same = documents[: place + 1] == documents[place]
    text = tokenizer.decode(tokens[: place + 1][same].tolist(), skip_special_tokens=True)  # type: ignore[union-attr]
    return {"text": text if len(text) <= TEXT else "…" + text[1 - TEXT :]}


def token_text(tokenizer: Any, index: int) -> str:
    """One token as text, in quotes: spaces and line ends can be seen."""
    return json.dumps(tokenizer.decode([index]), ensure_ascii=False)


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

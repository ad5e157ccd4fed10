"""The head step: from hidden states to a loss and its gradients, against the bare matmuls and against other libraries.

    python benchmarks/head_step.py [--rounds 7] [--peers .venv-peers] [--only NAME ...]

SmolLM2's head (width 576, 49,152 ids), one thread. Time: 512 positions, CPU time, each variant in a process of its own
where it takes turns with the bare float32 matmuls (4 with a live teacher's head, 3 from a recorded top 64); the ratio
of medians counts. Beside it, the ratio to matmuls that write into memory which they keep: no fresh pages, which a step
that returns new gradients cannot do without. Memory: the process's own high-water mark above what was resident before
the step. A variant at "@bfloat16" has bfloat16 hidden states and heads; the others are float32.
Writes benchmarks/results/head_step.json after every figure; with --only it keeps the others that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stillroom.environment import environment

HERE = Path(__file__).parent
OURS = ("stillroom_dense", "stillroom_dense_bf16", "stillroom_dense_sampled", "stillroom_sparse")
OURS += ("stillroom_sparse_bf16", "stillroom_sparse_sampled", "stillroom_sparse_sampled_bf16", "distillkit_formula")
OURS += ("stillroom_sparse@bfloat16", "stillroom_sparse_sampled@bfloat16", "distillkit_formula@bfloat16")
THEIRS = ("trl_gkd", "trl_gkd_default", "trl_tiled", "liger_chunked", "torchtune_forward_kl", "torchtune_chunked")
SMALL, LARGE = (2048, 49_152), (256, 151_936)  # positions x ids whose memory is measured
SIZES = {
    "stillroom_dense": [(512, 49_152), (1024, 49_152), SMALL],
    "stillroom_sparse": [SMALL, LARGE],
    "stillroom_sparse_bf16": [SMALL, LARGE],
    "stillroom_sparse_sampled": [SMALL, LARGE],
    "distillkit_formula": [SMALL, LARGE],
    "stillroom_sparse@bfloat16": [LARGE],
    "distillkit_formula@bfloat16": [LARGE],
    "stillroom_sparse_sampled@bfloat16": [LARGE],
}
TARGETS = {
    "stillroom_dense times floor, at most": 1.05,
    "memory of trl_gkd over dense, at least": 10.0,
    "distillkit_formula over stillroom_sparse_sampled, time, at least": 3.0,
    "error of the exact gradients, at most": 1e-4,
}


def spend(python: Path | str, variant: str, rounds: int, **settings: str) -> dict:
    return child(python, variant, "time", ["--rounds", str(rounds)], settings)


def peak(python: Path | str, variant: str, positions: int, vocabulary: int, **settings: str) -> float:
    """MiB. Large blocks are given back at once: a peak is what was in use. That costs time, so not when timing."""
    sizes = ["--positions", str(positions), "--vocabulary", str(vocabulary)]
    settings |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return child(python, variant, "memory", sizes, settings)["peak_mib"]


def child(python: Path | str, variant: str, what: str, options: list[str], settings: dict[str, str]) -> dict:
    name, _, dtype = variant.partition("@")
    script = str(HERE / "peers/head_measure.py")
    done = subprocess.run(
        [str(python), "-W", "ignore", script, name, what, "--dtype", dtype or "float32", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **settings},
    )
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions(python: Path | str) -> dict[str, str]:
    """The peers' versions, asked in their environment."""
    ask = "import json; from importlib.metadata import version as v; "
    ask += "print(json.dumps({n: v(n) for n in ('torch', 'trl', 'transformers', 'liger-kernel', 'torchtune')}))"
    return json.loads(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers")
    parser.add_argument("--out", type=Path, default=HERE / "results/head_step.json")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *THEIRS), default=(*OURS, *THEIRS))
    asked = parser.parse_args()
    console = Console()
    peers = asked.peers / "bin/python"
    names = [name for name in asked.only if name in OURS or peers.exists()]
    if len(names) < len(asked.only):
        console.print(f"Without {asked.peers} the other libraries are left out: see benchmarks/README.md.")
    report = {"variants": {}, "peak_mib": {}}
    if len(asked.only) < len(OURS) + len(THEIRS) and asked.out.exists():
        report |= {key: json.loads(asked.out.read_text())[key] for key in report}
    report = {"what": (__doc__ or "").splitlines()[0], "ratios": {}, "targets": TARGETS, **report}
    report["environment"] = environment() | {"threads": 1}
    report["peers"] = versions(peers) if peers.exists() else {}
    for name in names:
        python = sys.executable if name in OURS else peers
        report["variants"][name] = spend(python, name, asked.rounds)
        for positions, vocabulary in SIZES.get(name, [SMALL]):
            report["peak_mib"][f"{name}, {positions} x {vocabulary}"] = peak(python, name, positions, vocabulary)
            write(asked.out, report)
    show(console, report)


def write(path: Path, report: dict) -> None:
    report["ratios"] = ratios(report["variants"], report["peak_mib"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def ratios(found: dict, memory: dict) -> dict[str, float]:
    """What the targets are about, as far as it was measured."""
    times = {name: each["times_floor"] for name, each in found.items()}
    pairs = {"memory at 2048 over 512 positions": ("stillroom_dense, 2048 x 49152", "stillroom_dense, 512 x 49152")}
    for name in THEIRS:
        pairs[f"memory of {name} over dense"] = f"{name}, 2048 x 49152", "stillroom_dense, 2048 x 49152"
    for dtype in ("", "@bfloat16"):
        kit, sparse = f"distillkit_formula{dtype}", f"stillroom_sparse{dtype}"
        pairs[f"memory of {kit} over sparse, 151936 ids"] = f"{kit}, 256 x 151936", f"{sparse}, 256 x 151936"
    result = {f"{name} times floor": value for name, value in times.items() if name in OURS}
    for name in (n for n in times if n.startswith("stillroom_sparse")):
        kit = "distillkit_formula" + name[len(name.partition("@")[0]) :]
        if kit in times:
            result[f"{kit} over {name}, time"] = times[kit] / times[name]
    return result | {name: memory[a] / memory[b] for name, (a, b) in pairs.items() if a in memory and b in memory}


def show(console: Console, report: dict) -> None:
    table = Table("variant", "x bare matmuls", "lowest, highest", "x, outputs kept", "error of dH", "of 16 steps' mean")
    for name, each in report["variants"].items():
        low, high = each["times_floor_low_high"]
        error, mean = each.get("error_of_hidden_gradient"), each.get("error_of_mean_over")
        table.add_row(
            name,
            f"{each['times_floor']:.2f}",
            f"{low:.2f}, {high:.2f}",
            f"{each['times_floor_kept']:.2f}",
            "" if error is None else f"{error:.1e}",
            "" if mean is None else f"{mean['16']['hidden']:.1e}",
        )
    console.print(table)
    sizes = Table("variant, positions x ids", "peak MiB")
    for name, mib in report["peak_mib"].items():
        sizes.add_row(name, f"{mib:,.0f}")
    console.print(sizes, report["ratios"])


if __name__ == "__main__":
    main()

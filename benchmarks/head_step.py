"""The head step: from hidden states to a loss and its gradients, against the bare matmuls and against other libraries.

    python benchmarks/head_step.py [--rounds 7] [--peers .venv-peers]

SmolLM2's head (width 576, 49,152 ids), float32, one thread. Time: 512 positions, CPU time, each variant in a process of
its own where it takes turns with the bare matmuls (4 with a live teacher's head, 3 from a recorded top 64); the ratio
of medians counts. Beside it, the ratio to matmuls that write into memory which they keep: no fresh pages, which a step
that returns new gradients cannot do without. Memory: 2,048 positions, the process's own high-water mark above what was
resident before the step.
Writes benchmarks/results/head_step.json.
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
OURS = ("stillroom_dense", "stillroom_sparse")
THEIRS = ("trl_gkd", "trl_gkd_default", "trl_tiled", "liger_chunked")
TARGETS = {"times_floor_at_most": 1.10, "memory_of_trl_gkd_over_dense_at_least": 10.0}


def measure(python: Path | str, variant: str, rounds: int, **settings: str) -> dict:
    """One variant, its time and its memory each in a process of its own.

    For memory, large blocks are given back at once: a peak is what was in use. That costs time, so not when timing.
    """
    return {
        **child(python, variant, "time", rounds, settings),
        **child(python, variant, "memory", rounds, settings | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}),
    }


def child(python: Path | str, variant: str, what: str, rounds: int, settings: dict[str, str]) -> dict:
    script = str(HERE / "peers/head_variants.py")
    done = subprocess.run(
        [str(python), "-W", "ignore", script, variant, what, "--rounds", str(rounds)],
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
    ask += "print(json.dumps({n: v(n) for n in ('torch', 'trl', 'transformers', 'liger-kernel')}))"
    return json.loads(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers")
    parser.add_argument("--out", type=Path, default=HERE / "results/head_step.json")
    asked = parser.parse_args()
    console = Console()
    found = {}
    for variant in OURS:
        found[variant] = measure(sys.executable, variant, asked.rounds)
        console.print(variant, found[variant])
    found["stillroom_dense_eager"] = measure(sys.executable, "stillroom_dense", asked.rounds, STILLROOM_COMPILE="0")
    peers = asked.peers / "bin/python"
    if peers.exists():
        for variant in THEIRS:
            found[variant] = measure(peers, variant, asked.rounds)
            console.print(variant, found[variant])
    write(asked, found, versions(peers) if peers.exists() else {})
    show(console, found)


def write(asked: argparse.Namespace, found: dict, peers: dict[str, str]) -> None:
    dense = found["stillroom_dense"]
    ratios = {
        "dense_times_floor": dense["times_floor"],
        "sparse_times_floor": found["stillroom_sparse"]["times_floor"],
        **{
            f"memory_of_{name}_over_dense": found[name]["peak_mib"] / dense["peak_mib"]
            for name in THEIRS
            if name in found
        },
    }
    report = {
        "what": __doc__.splitlines()[0],
        "ratios": ratios,
        "targets": TARGETS,
        "variants": found,
        "environment": environment() | {"threads": 1},
        "peers": peers,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=2) + "\n")


def show(console: Console, found: dict) -> None:
    table = Table("variant", "x bare matmuls", "lowest, highest", "x, outputs kept", "peak MiB", "error of dH")
    for name, each in found.items():
        low, high = each["times_floor_low_high"]
        error = each.get("error_of_hidden_gradient")
        table.add_row(
            name,
            f"{each['times_floor']:.2f}",
            f"{low:.2f}, {high:.2f}",
            f"{each['times_floor_kept']:.2f}",
            f"{each['peak_mib']:,.0f}",
            "" if error is None else f"{error:.0e}",
        )
    console.print(table)


if __name__ == "__main__":
    main()

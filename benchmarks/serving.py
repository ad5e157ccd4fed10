"""What a request costs: the served student against the bare network, on loopback, asked by wrk.

Two ratios: answers a second, and answers for a second of the server's own processor time, which depends less on others
(`python benchmarks/serving.py` prints a table and writes results/serving.json).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import torch

import stillroom as sr
from stillroom.students.networks import save_student

SECONDS = 8
BATCHES = (1, 64)
CONNECTIONS = (1, 64, 256)
KINDS = {
    "perceptron, 64 numbers": ("stillroom.students.architectures:mlp", {"inputs": 64, "outputs": 10, "hidden": [32]}),
    "perceptron of 20 M parameters": (
        "stillroom.students.architectures:mlp",
        {"inputs": 64, "outputs": 10, "hidden": [4096, 4096]},
    ),
}


def bare(student: sr.Student, batch: int) -> float:
    """Answers a second of processor time: predict in a loop, one thread."""
    rows = {"x": torch.rand(batch, 64)}
    for _ in range(3):
        student.predict(rows)
    done, begun, wall = 0, time.process_time(), time.monotonic()
    while time.monotonic() - wall < SECONDS / 2:
        student.predict(rows)
        done += batch
    return done / (time.process_time() - begun)


def served(folder: Path, connections: int) -> dict[str, float]:
    """Answers a second, and for a second of the server's processor time, under wrk."""
    command = [sys.executable, "-m", "stillroom.cli", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert found is not None
    address, server = found.group(), psutil.Process(process.pid)
    try:
        script = folder / "post.lua"
        numbers = ",".join(f"{n / 64:.4f}" for n in range(64))
        script.write_text(
            'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\n'
            f'wrk.body = \'{{"inputs": {{"x": [{numbers}]}}}}\'\n'
        )
        ask(address, script, connections, 2)
        used = sum(server.cpu_times()[:2])
        answered, seconds = ask(address, script, connections, SECONDS)
        used = sum(server.cpu_times()[:2]) - used
        sizes = httpx.get(f"{address}/metrics").text
        batches = float(re.findall(r"stillroom_batch_size_count ([\d.e+]+)", sizes)[0])
        questions = float(re.findall(r"stillroom_batch_size_sum ([\d.e+]+)", sizes)[0])
    finally:
        process.terminate()
        process.wait(60)
    return {"a second": answered / seconds, "a processor second": answered / used, "batch": questions / batches}


def ask(address: str, script: Path, connections: int, seconds: int) -> tuple[int, float]:
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "-s",
        str(script),
        f"{address}/predict",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said, said
    assert "Socket errors" not in said, said
    found = re.search(r"(\d+) requests in ([\d.]+)s", said)
    assert found is not None
    return int(found.group(1)), float(found.group(2))


def main() -> None:
    if shutil.which("wrk") is None:
        sys.exit("needs Debian's wrk: apt-get install wrk")
    torch.set_num_threads(1)
    results = []
    for kind, (factory, arguments) in KINDS.items():
        student = sr.Student.make(factory, arguments, classes=tuple("0123456789"))
        rates = {batch: bare(student, batch) for batch in BATCHES}
        with tempfile.TemporaryDirectory() as place:
            save_student(student, Path(place) / "student")
            for connections in CONNECTIONS:
                row = {"kind": kind, "connections": connections, **served(Path(place), connections)}
                row |= {f"bare, batch {batch}": rate for batch, rate in rates.items()}
                row["ratio to batch 64"] = row["a processor second"] / rates[64]
                row["ratio to batch 1"] = row["a processor second"] / rates[1]
                results.append(row)
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    Path(__file__).with_name("results").mkdir(exist_ok=True)
    Path(__file__).with_name("results").joinpath("serving.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

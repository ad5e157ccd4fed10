"""The server as a process, under load from real clients: no error, memory flat, and a clean end. Slow."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest

import stillroom as sr
from language_fakes import student as language_student
from stillroom.students.networks import save_student

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WRK = shutil.which("wrk")
STILLROOM = [sys.executable, "-m", "stillroom.cli"]
GROWTH = 12 << 20  # bytes: what allocators keep back and forth; a leak of 100 bytes a request would show


@contextmanager
def served(*arguments, cwd=None):
    """`stillroom serve` on a free port: its process and address. Ended by SIGTERM, with code 0."""
    process = subprocess.Popen(
        [*STILLROOM, "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # a cascade says first what was chosen
        said = next(found for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
        yield process, said.group()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    made = sr.Student.make(
        "stillroom.students.architectures:mlp",
        {"inputs": 64, "outputs": 10, "hidden": [32]},
        classes=tuple("0123456789"),
    )
    save_student(made, folder / "student")
    return folder


def wrk(address, folder, seconds, connections):
    """Requests answered, and what wrk says went wrong."""
    numbers = ",".join(f"{n / 64:.4f}" for n in range(64))
    script = folder / "post.lua"
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\n'
        f'wrk.body = \'{{"inputs": {{"x": [{numbers}]}}}}\'\n'
    )
    command = [WRK, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script, f"{address}/predict"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wrong = [line.strip() for line in said.splitlines() if "Non-2xx" in line or "Socket errors" in line]
    return int(re.search(r"(\d+) requests in", said).group(1)), wrong


def asked(address, folder, wanted):
    """Rounds of 256 connections until so many requests were answered, every one of them without an error."""
    answered = 0
    while answered < wanted:  # counted, not timed: where others use the machine too, rounds are smaller
        more, wrong = wrk(address, folder, 4, 256)
        assert not wrong
        answered += more


@pytest.mark.skipif(WRK is None, reason="needs Debian's wrk")
def test_saturated_by_wrk_there_is_no_error_and_memory_is_flat(run, tmp_path):
    """256 connections that never wait, in rounds: every answer 200, the last hold no more than the first."""
    with served(run) as (process, address):
        memory = psutil.Process(process.pid)
        asked(address, tmp_path, 3000)
        warm = memory.memory_info().rss
        asked(address, tmp_path, 4000)
        assert memory.memory_info().rss - warm < GROWTH
        assert httpx.get(f"{address}/health", timeout=30).status_code == 200


def test_beyond_the_open_requests_wrk_is_told_and_the_rest_are_answered(run, tmp_path):
    """More connections than --open: the refused get 503, nobody an error of the socket."""
    if WRK is None:
        pytest.skip("needs Debian's wrk")
    with served(run, "--open", 8) as (_, address):
        _, wrong = wrk(address, tmp_path, 3, 64)
        assert all("Socket" not in line for line in wrong)
        page = httpx.get(f"{address}/metrics", timeout=30).text
    counts = dict(re.findall(r'stillroom_requests_total\{path="/predict",status="(\d+)"\} ([\d.e+]+)', page))
    assert set(counts) <= {"200", "503"}
    assert float(counts["200"]) > 0


def test_sigterm_answers_what_is_in_flight_and_ends_with_0(run):
    """Ten questions wait for their batch when SIGTERM comes: all are answered; the process ends with code 0."""
    found = []

    def ask(address):
        said = httpx.post(f"{address}/predict", json={"inputs": {"x": [0.0] * 64}}, timeout=60)
        found.append(said.status_code)

    with served(run, "--wait", 2000) as (process, address):
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if "stillroom_open_requests 11.0" in httpx.get(f"{address}/metrics", timeout=30).text:
                break
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
    assert found == [200] * 10


def test_openai_s_client_at_saturation(tmp_path):
    """32 callers of chat and text, streamed and whole, for eight rounds: no error, memory flat."""
    save_student(language_student(), tmp_path / "run" / "student")
    with served(tmp_path / "run") as (process, address):
        memory = psutil.Process(process.pid)

        async def one(client, number):
            if number % 2:
                messages = [{"role": "user", "content": f"the {number}"}]
                said = await client.chat.completions.create(model="run", messages=messages, max_tokens=8)
                return said.choices[0].finish_reason
            stream = await client.completions.create(model="run", prompt="the cat", max_tokens=8, stream=True)
            return [event.choices[0].finish_reason async for event in stream][-1]

        async def rounds(count):
            async with openai.AsyncOpenAI(
                base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120
            ) as client:
                for _ in range(count):
                    found = await asyncio.gather(*(one(client, number) for number in range(32)))
                    assert set(found) <= {"stop", "length"}

        asyncio.run(rounds(3))
        warm = memory.memory_info().rss
        asyncio.run(rounds(8))
        assert memory.memory_info().rss - warm < 3 * GROWTH  # caches of keys and values of different lengths


def commands(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_page_s_commands_run_as_they_are_written(tmp_path):
    """docs/serving.md: run, serve, curl, cascade; the port is a free one, the run a shorter one."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (tmp_path / "examples").mkdir()
    for name in ("digits.py", "digits.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples" / name)
    indented = [line.strip() for line in page.splitlines() if line.startswith("    stillroom ")]
    assert [line.split()[1] for line in indented] == ["run", "serve", "cascade", "serve"]
    short = ["--set", "seeds=[0]", "--quiet"]
    subprocess.run([*STILLROOM, *indented[0].split()[1:], *short], cwd=tmp_path, check=True)
    with served(*indented[1].split()[2:], cwd=tmp_path) as (_, address):
        (shell,) = commands(page, "sh")
        script = shell.replace("http://127.0.0.1:8000", address)
        said = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert '"status":"ok"' in said.stdout
        assert '"label"' in said.stdout
        assert 'stillroom_answers_total{by="student"} 1.0' in said.stdout
    told = subprocess.run(
        [*STILLROOM, *indented[2].split()[1:], "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "certainty" in told.stdout
    with served(*indented[3].split()[2:], cwd=tmp_path) as (_, address):
        question = (tmp_path / "question.json").read_text()
        kind = {"content-type": "application/json"}
        said = httpx.post(f"{address}/predict", content=question, headers=kind, timeout=60)
        assert said.status_code == 200
        assert "threshold" in httpx.get(f"{address}/health").json()

"""A hostile world between client and server: every valid answer arrives, the recording is the one without faults."""

import asyncio
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stillroom as sr
from endpoint_world import HOSTILE, Proxy, asker, colours, llama_server
from stillroom.errors import EndpointError
from stillroom.teachers.endpoint.pace import Limits, Pace, as_seconds, backoff

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server():
    with llama_server() as url:
        yield url


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_fifth_of_all_requests_goes_wrong(server, tmp_path):
    """Refusals, silence, half an answer, drips, wrong content, others' answers, twice, late: 20 % in all."""
    rows = colours(60)
    sr.record(asker(server, tmp_path / "quiet"), rows, tmp_path / "quiet/recording", progress=False)
    kinds = itertools.cycle(HOSTILE)  # each kind of fault at least once

    def fault(number, body):
        return next(kinds) if number % 5 == 0 else None

    with Proxy(server, fault) as proxy:
        teacher = asker(proxy.url, tmp_path / "loud", limits={"seconds": 8, "in_flight": 6})
        assert teacher.ask_ahead(rows) == {}
        assert len(proxy.injected) == len(HOSTILE)
        asked = len(proxy.questions)
        sr.record(teacher, rows, tmp_path / "loud/recording", progress=False)
        assert len(proxy.questions) == asked
        assert sum(proxy.injected.values()) >= 0.19 * asked
    assert shards(tmp_path / "loud/recording") == shards(tmp_path / "quiet/recording")


def test_a_server_that_stays_silent_is_given_up_with_one_line(server, tmp_path):
    with (
        Proxy(server, lambda number, body: "503") as proxy,
        pytest.raises(EndpointError, match=r"did not answer in 3 attempts; the last time: 503: overloaded") as failure,
    ):
        asker(proxy.url, tmp_path, limits={"tries": 3, "in_flight": 1}).ask_ahead(colours(5))
    assert "\n" not in str(failure.value)
    assert len(proxy.questions) == 3


def test_retry_after_is_heeded_by_all(server, tmp_path):
    """Nothing is sent while the server wants to hear nothing."""
    questions = itertools.count()
    with Proxy(server, lambda number, body: "429 long" if next(questions) == 3 else None) as proxy:
        asker(proxy.url, tmp_path, limits={"in_flight": 1}).ask_ahead(colours(6))
        times = [when for *_, when in proxy.questions]
    assert proxy.injected == {"429 long": 1}
    assert max(after - before for before, after in itertools.pairwise(times)) >= 0.5


def test_rates_of_the_recipe_hold_at_the_server(server, tmp_path):
    """600 requests a minute are never less than 0.1 s apart, however many may be under way."""
    with Proxy(server) as proxy:
        asker(proxy.url, tmp_path, limits={"in_flight": 8, "requests_per_minute": 600}).ask_ahead(colours(8))
        times = sorted(when for *_, when in proxy.asked)
    assert len(times) == 16
    assert proxy.most <= 8
    assert times[-1] - times[0] >= 15 * 0.1 * 0.9


def test_the_servers_own_limits_are_heeded(server, tmp_path):
    """x-ratelimit-remaining-requests: 0 pauses until x-ratelimit-reset-requests."""
    told = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
    with Proxy(server, headers=told) as proxy:
        asker(proxy.url, tmp_path, limits={"in_flight": 1}).ask_ahead(colours(4))
        times = [when for *_, when in proxy.questions]
    assert min(after - before for before, after in itertools.pairwise(times)) >= 0.25


def test_concurrency_adapts():
    """Wider by 1 / window with every answer, half after a crowded one, once for all that were under way then."""

    async def story():
        pace = Pace(Limits(in_flight=8))
        assert pace.window == 4
        began = [await pace.enter(1) for _ in range(4)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pace.enter(1)
        for start in began:
            pace.leave(start, answered=True)
        assert 4.8 < pace.window < 5
        began = [await pace.enter(1) for _ in range(4)]
        wide = pace.window
        for start in began:
            pace.leave(start, answered=False, crowded=True)
        assert pace.window == wide / 2
        assert pace.halved == 1
        for _ in range(200):
            pace.leave(await pace.enter(1), answered=True)
        assert pace.window == 8
        for _ in range(10):
            pace.leave(await pace.enter(1), answered=False, crowded=True)
        assert pace.window == 1

    asyncio.run(story())


def test_durations_and_backoff():
    known = {"1s": 1, "6m0s": 360, "20ms": 0.02, "2.5": 2.5, "1h2m": 3720, "soon": None, "": None}
    assert {text: as_seconds(text) for text in known} == known
    assert [backoff(n, 1.0, 1.0) for n in (1, 2, 3)] == [1, 2, 4]
    assert backoff(3, 0.5, 0.0) == 1.0
    assert backoff(30, 1.0, 1.0) == 120


@pytest.fixture
def small_server(small_tokenizer, tmp_path):
    """llama.cpp with a network of two layers: thousands of answers in a minute."""
    from stillroom.exporting.gguf import writing
    from stillroom.students import causal

    net = causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=3).net.eval()
    made = writing.write(causal.from_causal(net, small_tokenizer), (), (), tmp_path / "small")
    with llama_server(made.path) as url:
        yield url


def asking(url, folder, count, top=100):
    """A process that asks about ``count`` rows and records them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import torch, stillroom as sr; from endpoint_world import asker, colours\n"
        "folder, rows = Path(sys.argv[3]), colours(int(sys.argv[4]))\n"
        "teacher = asker(sys.argv[2], folder, limits={'in_flight': 4}, top=int(sys.argv[5]))\n"
        "print('begins', flush=True); teacher.ask_ahead(rows)\n"
        "sr.record(teacher, rows, folder / 'recording', progress=False)\n"
    )
    command = [sys.executable, "-c", code, str(TESTS), url, str(folder), str(count), str(top)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def journalled(folder):
    """The prompts that the journal has an answer to."""
    with sqlite3.connect(folder / "journal.sqlite") as db:
        asked = [json.loads(row) for (row,) in db.execute("SELECT request FROM answers WHERE answer IS NOT NULL")]
    return {said["prompt"]["prompt"] for said in asked if said["route"] == "completions"}


def test_ctrl_c_keeps_what_is_under_way(server, tmp_path):
    """One interrupt: nothing new is asked, what is at the server is waited for and kept."""
    with Proxy(server) as proxy:
        process = asking(proxy.url, tmp_path, 200)
        process.stdout.readline()
        while len(proxy.answered) < 8 + 4:
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        asked = len(proxy.questions)
        assert len([path for path, _ in proxy.answered if path != "/tokenize"]) == asked
    assert len(journalled(tmp_path)) == asked
    assert asked < 200


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_twenty_kills_in_one_run_of_two_thousand(small_server, tmp_path):
    """SIGKILL at 20 random moments: no journalled answer is asked again, at most those in flight are, and the recording
    is, byte by byte, that of a run that nobody killed.
    """
    count, kills, draw = 2000, 20, random.Random(0)
    there = []  # questions so far, and what was in the journal, at each kill
    with Proxy(small_server) as proxy:
        moments = sorted(draw.sample(range(20, count - 20), kills))
        for moment in moments:
            process = asking(proxy.url, tmp_path / "killed", count, top=329)
            while len(proxy.answered) < moment and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, process.stderr.read()
            process.kill()
            process.communicate()
            there.append((len(proxy.questions), journalled(tmp_path / "killed")))
        last = asking(proxy.url, tmp_path / "killed", count, top=329)
        assert last.communicate()[1] == ""
        assert last.returncode == 0
        asked = [body["prompt"] for _, body, _, _ in proxy.questions]
    for so_far, prompts in there:
        assert prompts.isdisjoint(asked[so_far:])
    repeated = len(asked) - count
    assert 0 <= repeated <= kills * 4  # limits.in_flight
    print(f"{kills} kills, {repeated} of {count} requests asked twice")
    whole = asking(small_server, tmp_path / "whole", count, top=329)
    assert whole.communicate()[1] == ""
    assert shards(tmp_path / "killed/recording") == shards(tmp_path / "whole/recording")

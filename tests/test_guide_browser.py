"""docs/browser.md, its commands as they are written there: from a recipe to a page that answers."""

import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from stillroom.exporting.web import browser, fetched

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^```sh\n(.*?)\n```", (ROOT / "docs" / "browser.md").read_text(), re.MULTILINE | re.DOTALL)
HERE = any(shutil.which(name) for name in browser.BROWSERS) and fetched.is_there()


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="no chromium, or no npm and nothing fetched")
def test_the_commands_of_the_page(tmp_path):
    """Run, export, serve; then a browser opens the page, which says what the digit is."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    *before, serve = COMMANDS
    for command in before:
        words = [sys.executable, "-m", "stillroom.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    words = [sys.executable, "-u", *shlex.split(serve)[1:-1], "0"]  # any free port
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://[\d.:]+", server.stdout.readline()).group()
            with urllib.request.urlopen(address, timeout=30) as served:
                assert b"It answers in this page" in served.read()
            profile = f"--user-data-dir={tmp_path / 'profile'}"
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
            page = subprocess.run([browser.browser(), *flags, profile, address], capture_output=True, text=True)
            assert re.search(r"It is \d \(\d+\.\d %\), in", page.stdout), page.stdout[-2000:]
        finally:
            server.terminate()

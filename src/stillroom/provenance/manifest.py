"""manifest.json: the sha256 and size of every other file of a run, and what has become of them since.

Temporary files (*.tmp) are left out, and what is written later: signature/ and the claims. Symbolic links are never
followed, and no path is ever opened because a manifest names it: only what lies in the folder is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.digests import file_digest
from stillroom.errors import FolderError, MissingFileError
from stillroom.files import write_bytes

MANIFEST = "manifest.json"
FORMAT = "stillroom-manifest/1"
TEMPORARY = ".tmp"
LARGEST = 64 << 20  # bytes of a file that says something; a larger one is not one of ours
# What lies outside of the seal, because it says something of the sealed run.
SIGNATURE = "signature"
MODEL_SIG = f"{SIGNATURE}/model.sig"
STATEMENT = f"{SIGNATURE}/provenance.intoto.dsse.json"
SIGNER = f"{SIGNATURE}/signer.pem"
CLAIMS = "claims.jsonl"
CLAIMS_HEAD = "claims.head.json"
What = Literal["changed", "added", "removed", "renamed", "untrusted"]


@dataclass(frozen=True)
class Mismatch:
    """One file that is not as it was sealed. ``str()`` is one line."""

    path: str
    what: What
    detail: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.what}. {shown(self.detail, 400)}"


def shown(text: str, most: int = 200) -> str:
    """Text from a file that nobody vouches for, as one printable line."""
    clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return clean if len(text) <= most else clean + "..."


def walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below ``folder`` that is not a directory, with its path inside. What cannot be listed has none."""
    waiting = [("", str(folder))]
    while waiting:
        inside, place = waiting.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda found: found.name)
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append((f"{inside}{entry.name}/", entry.path))
            else:
                yield inside + entry.name, entry


def files_of(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The plain files that count, and what cannot count with the reason: links, devices, names that are not UTF-8."""
    plain: dict[str, Path] = {}
    odd: dict[str, str] = {}
    for path, entry in walk(folder):
        if entry.is_symlink():
            odd[path] = "a symbolic link; only plain files can be sealed"
        elif not entry.is_file(follow_symlinks=False):
            odd[path] = "not a plain file"
        elif not _is_utf8(path):
            odd[path] = "a name that is not UTF-8"
        elif not path.endswith(TEMPORARY) and path != MANIFEST and not is_outside(path):
            plain[path] = Path(entry.path)
    return plain, odd


def is_outside(path: str) -> bool:
    """True for what is added to a sealed run afterwards, and vouches for itself: its signature and its claims."""
    return path in (CLAIMS, CLAIMS_HEAD) or path.startswith(f"{SIGNATURE}/")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_manifest(run_folder: str | Path) -> Path:
    """Write manifest.json with every file as it is now; the last thing that is done to a run.

    Raises MissingFileError when the folder does not exist, FolderError when it holds links or other odd things.
    """
    folder = existing(run_folder)
    plain, odd = files_of(folder)
    if odd:
        path, why = next(iter(odd.items()))
        more = f" ({len(odd) - 1} more)" if len(odd) > 1 else ""
        raise FolderError(f"{folder}: {shown(path)} is {why}{more}. Put the file itself there, or take it away.")
    files = {path: {"sha256": file_digest(place), "bytes": place.stat().st_size} for path, place in plain.items()}
    write_bytes(folder / MANIFEST, form_of({"format": FORMAT, "files": files}))
    return folder / MANIFEST


def form_of(manifest: Any) -> bytes:
    """The one form in which a manifest is written: sorted keys, two spaces, so that any byte changed is seen."""
    return (json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def digest_of(path: Path) -> str | None:
    """sha256 of a file; None where it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


def content_of(path: Path) -> bytes | None:
    """A plain file's bytes; None when there is none. What is too large to be ours reads as empty, so it cannot hold."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except OSError:
        return b""


def existing(run_folder: str | Path) -> Path:
    """The folder, or MissingFileError."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} does not exist. Give the folder of a run.")
    return folder


def compare(manifest: Any, digests: Mapping[str, str | None], sizes: Mapping[str, int]) -> list[Mismatch]:
    """What differs between a parsed manifest (of any shape) and the files: sha256 by path, None where unreadable."""
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        return [
            Mismatch(MANIFEST, "changed", f"it is not a manifest of format {FORMAT}; no file can be checked by it.")
        ]
    found = []
    if set(manifest) != {"format", "files"}:
        found.append(Mismatch(MANIFEST, "changed", "it holds more than 'format' and 'files'."))
    listed: dict[str, Any] = manifest["files"]
    for path in sorted(set(listed) & set(digests)):
        found.extend(_changed(path, listed[path], digests[path], sizes[path]))
    added = {path: digests[path] for path in sorted(set(digests) - set(listed))}
    for path in sorted(set(listed) - set(digests)):
        entry = listed[path]
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        where = next((new for new, its in added.items() if its is not None and its == digest), None)
        if where is None:
            found.append(Mismatch(path, "removed", "It was there when the run was sealed."))
        else:
            del added[where]
            found.append(Mismatch(path, "renamed", f"It is {shown(where)} now."))
    found.extend(Mismatch(path, "added", "It was not there when the run was sealed.") for path in added)
    return found


def _changed(path: str, entry: Any, digest: str | None, size: int) -> list[Mismatch]:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
        return [Mismatch(path, "changed", "Its entry in the manifest is not a sha256 and a size.")]
    if digest is None:
        return [Mismatch(path, "changed", "It cannot be read.")]
    if entry["sha256"] == digest and entry["bytes"] == size and type(entry["bytes"]) is int:
        return []
    if entry["bytes"] != size:
        return [Mismatch(path, "changed", f"It has {size} bytes; the manifest says {shown(repr(entry['bytes']), 40)}.")]
    return [Mismatch(path, "changed", f"Its sha256 is {digest}; the manifest says {shown(str(entry['sha256']), 80)}.")]

"""claims.jsonl: what was found out about a sealed run later: audits, reproductions, revocations. Only ever added to.

Each line is a signed envelope (DSSE) over canonical JSON (RFC 8785). A claim holds its number, the sha256 of the line
before it, the sha256 of the passport that it is about, and the public key of its signer. So a line that was altered,
moved, left out of the middle, or taken from another run's claims is found out, whoever's keys one has.

A chain alone does not show that its end was cut off. Three things do, as far as they reach:

* ``claims.head.json``, which every ``append`` writes anew, signed: how many claims there are, the last one's sha256;
* the signed statement of the run, which says how many claims there were when it was signed;
* the sha256 of the last claim that *you* know of (``head``), kept where nobody else can write.

What cannot be caught without the third: both files put back, together, as they once were; and the removal of both,
when the run was signed before the first claim. They lie outside of the manifest and of the signature because others
write them, later. Anybody can append a claim under a key of their own: give the keys of those whom you believe.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stillroom.digests import file_digest
from stillroom.errors import CheckError, MissingExtraError, MissingFileError, UsageError, nearest
from stillroom.files import write_bytes
from stillroom.provenance.envelope import NotSignedError, opened, payload_of, seal
from stillroom.provenance.keys import Signer, parsed, private_key, signer_of
from stillroom.provenance.manifest import CLAIMS, CLAIMS_HEAD, Mismatch, content_of, existing
from stillroom.provenance.passport import PASSPORT

FORMAT = "stillroom-claim/1"
HEAD_FORMAT = "stillroom-claims-head/1"
CLAIM_TYPE = "application/vnd.stillroom.claim+json"
HEAD_TYPE = "application/vnd.stillroom.claims-head+json"
KINDS = ("audit", "reproduction", "revocation", "note")
FIELDS = {"format", "number", "prev_sha256", "passport_sha256", "kind", "created", "signer", "body"}
WHEN = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@dataclass(frozen=True)
class Claim:
    """One line. ``number`` counts from 1; ``sha256`` is the line's, as the next one names it; ``signer`` is a key."""

    number: int
    kind: str
    created: str
    body: Any
    signer: Signer
    prev_sha256: str | None
    passport_sha256: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.created} by key {self.signer.id[:16]} (sha256 {self.sha256})"


def append(run_folder: str | Path, kind: str, body: Mapping[str, Any], key: str | Path) -> Claim:
    """Add a signed claim about the run as it is now, and the head that says so. Returns it; keep its sha256.

    ``kind``: audit, reproduction, revocation or note. ``key``: a private key's file. Raises UsageError for another kind
    or a body that is no JSON object, MissingFileError without a passport, CheckError when the claims there do not hold.
    """
    folder = existing(run_folder)
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no kind of claim{nearest(kind, KINDS)}")
    if not isinstance(body, Mapping):
        raise UsageError(f"what a claim says is a JSON object, not {type(body).__name__}.")
    if not (folder / PASSPORT).is_file():
        raise MissingFileError(f"{folder} has no {PASSPORT}: there is nothing to make a claim about.")
    before = check(folder)
    if before:
        raise CheckError(f"{folder}: nothing is added to claims that do not hold. {before[0]}")
    private, passport = private_key(key), file_digest(folder / PASSPORT)
    signer, lines = signer_of(private.public_key()), _lines(folder)
    claim = {
        "format": FORMAT,
        "number": len(lines) + 1,
        "prev_sha256": _sha(lines[-1]) if lines else None,
        "passport_sha256": passport,
        "kind": kind,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "signer": signer.pem.decode(),
        "body": dict(body),
    }
    try:
        line = seal(claim, CLAIM_TYPE, private)
    except (ValueError, TypeError) as error:
        raise UsageError(f"what a claim says must be plain JSON: {error}.") from None
    with open(folder / CLAIMS, "ab") as file:  # appended, not rewritten: two who write at once break the chain openly
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    head = {"format": HEAD_FORMAT, "count": claim["number"], "head_sha256": _sha(line), "passport_sha256": passport}
    write_bytes(folder / CLAIMS_HEAD, seal({**head, "signer": claim["signer"]}, HEAD_TYPE, private))
    return _read(line)


def read(run_folder: str | Path) -> list[Claim]:
    """The claims of a run, in order; [] when there are none. Raises CheckError when they do not hold by themselves."""
    folder = existing(run_folder)
    found = check(folder)
    if found:
        raise CheckError(f"{folder}: {found[0]}")
    return [_read(line) for line in _lines(folder)]


def head_of(run_folder: str | Path) -> dict[str, Any] | None:
    """How many claims there are and the last one's sha256; None without claims. Raises what ``read`` raises."""
    found = read(run_folder)
    return {"count": len(found), "head_sha256": found[-1].sha256} if found else None


def check(
    run_folder: str | Path,
    keys: Sequence[Signer] | None = None,
    *,
    signed: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> list[Mismatch]:
    """What is wrong with the claims of a run; empty when nothing is, or when it has none and none is known of.

    ``keys``: those whom you believe; a claim by anybody else is untrusted. None: every claim by the key that it names.
    ``signed``: {"count", "head_sha256"} in the run's signed statement. ``head``: the sha256 of a claim you know of.
    """
    folder = existing(run_folder)
    content = content_of(folder / CLAIMS)
    if content is None:
        return _nothing(folder, signed, head)
    lines = content.split(b"\n")
    if lines.pop() != b"" or not lines:
        return [Mismatch(CLAIMS, "changed", "Its last line is cut." if content else "It is empty.")]
    found = list(_line_by_line(folder, lines, keys))
    known = {_sha(line): number for number, line in enumerate(lines, 1)}
    found.extend(_against_head(folder, lines, known))
    if signed is not None and known.get(str(signed.get("head_sha256"))) != signed.get("count"):
        found.append(
            Mismatch(CLAIMS, "changed", f"It lacks claim {signed.get('count')}, known when the run was signed.")
        )
    if head is not None and head not in known:
        found.append(Mismatch(CLAIMS, "changed", f"It lacks the claim with sha256 {head}: it was cut or replaced."))
    return found


def _nothing(folder: Path, signed: Mapping[str, Any] | None, head: str | None) -> list[Mismatch]:
    """Without claims.jsonl: who says that there should be one?"""
    if signed is not None or head is not None:
        return [Mismatch(CLAIMS, "removed", "There were claims when the run was signed, or that you know of.")]
    if (folder / CLAIMS_HEAD).exists():
        return [Mismatch(CLAIMS, "removed", f"{CLAIMS_HEAD} says that there were claims.")]
    return []


def _line_by_line(folder: Path, lines: Sequence[bytes], keys: Sequence[Signer] | None) -> Iterator[Mismatch]:
    """Each line by itself and after the one before it; a break is named once, where it is."""
    passport = file_digest(folder / PASSPORT) if (folder / PASSPORT).is_file() else None
    before: str | None = None
    for number, line in enumerate(lines, 1):
        try:
            claim = _read(line)
            if claim.prev_sha256 != before or claim.number != number:
                yield Mismatch(
                    CLAIMS, "changed", f"Line {number} does not follow the one before it: moved, cut or put in."
                )
            elif claim.passport_sha256 != passport:
                yield Mismatch(CLAIMS, "changed", f"Line {number} is about another passport ({claim.passport_sha256}).")
            elif keys is not None and claim.signer not in keys:
                who = f"key {claim.signer.id[:16]}, which was not given"
                yield Mismatch(
                    CLAIMS, "untrusted", f"Line {number} is signed by {who}. Give it (--claims-key) if you believe it."
                )
        except NotSignedError as error:
            yield Mismatch(CLAIMS, "changed", f"Line {number}: {error}.")
        before = _sha(line)


def _against_head(folder: Path, lines: Sequence[bytes], known: Mapping[str, int]) -> Iterator[Mismatch]:
    """Whether the claims reach as far as the signed head says. More lines than that are well: it is written after."""
    content = content_of(folder / CLAIMS_HEAD)
    if content is None:
        yield Mismatch(CLAIMS_HEAD, "removed", "Where there are claims, it says how many.")
        return
    try:
        said = payload_of(content, HEAD_TYPE)
        count, last, signer = said["count"], said["head_sha256"], _signer(said)
        opened(content, HEAD_TYPE, signer)
        if type(count) is not int or count < 1 or said["format"] != HEAD_FORMAT:
            raise NotSignedError("it says no number of claims")
        if count > len(lines):
            yield Mismatch(CLAIMS, "changed", f"It holds {len(lines)} claims, and there were {count}: it was cut.")
        elif known.get(last) != count or _read(lines[count - 1]).signer != signer:
            yield Mismatch(CLAIMS_HEAD, "changed", f"Claim {count} is not the one that it names.")
    except NotSignedError as error:
        yield Mismatch(CLAIMS_HEAD, "changed", f"{str(error)[0].upper()}{str(error)[1:]}.")
    except (LookupError, TypeError) as error:
        yield Mismatch(CLAIMS_HEAD, "changed", f"It is no head of claims ({type(error).__name__}).")


def _read(line: bytes) -> Claim:
    """A line, its signature checked by the key that it names. Raises NotSignedError."""
    said = payload_of(line, CLAIM_TYPE)
    signer = _signer(said)
    opened(line, CLAIM_TYPE, signer)
    texts = [said.get(name) for name in ("kind", "created", "passport_sha256")]
    if set(said) != FIELDS or said["format"] != FORMAT or not all(isinstance(text, str) for text in texts):
        raise NotSignedError(f"it is no claim of format {FORMAT}")
    if said["kind"] not in KINDS or type(said["number"]) is not int or not re.fullmatch(WHEN, said["created"]):
        raise NotSignedError(f"it is no claim of format {FORMAT}")
    named = {name: said[name] for name in ("number", "kind", "created", "body", "prev_sha256", "passport_sha256")}
    return Claim(signer=signer, sha256=_sha(line), **named)


def _signer(said: Any) -> Signer:
    try:
        content = said["signer"].encode()
        found = parsed(content)
    except MissingExtraError:
        raise
    except Exception as error:  # whatever stands there instead of a key
        raise NotSignedError(f"it names no key ({type(error).__name__})") from None
    if found.pem != content:
        raise NotSignedError("it names its key in another form than keys are written")
    return found


def _lines(folder: Path) -> list[bytes]:
    return (content_of(folder / CLAIMS) or b"").split(b"\n")[:-1]


def _sha(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()

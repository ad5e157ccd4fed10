"""Waivers: signed, dated statements by which somebody answers for what the gate does not allow by itself.

A waiver is a DSSE envelope, signed with the keys of `stillroom keygen` that sign runs too: one kind of key for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from stillroom.digests import file_digest
from stillroom.errors import MissingFileError, UsageError
from stillroom.files import write_bytes
from stillroom.provenance.envelope import NotSignedError, opened, payload_of, seal
from stillroom.provenance.keys import Signer, parsed, private_key, public_key

PAYLOAD = "application/vnd.stillroom.waiver+json"
FORMAT = "stillroom-waiver/1"
FIELDS = {"format": str, "who": str, "why": str, "from": str, "until": str, "covers": list}
LONGEST = 366  # days: whoever answers for it looks at it again every year


@dataclass(frozen=True)
class Waiver:
    """A waiver that was checked: signed by a trusted key, and valid today."""

    path: Path
    sha256: str
    who: str
    why: str
    until: str
    covers: tuple[str, ...]
    signer: Signer  # whose signature holds; the run keeps the key, so that a stranger can check it again


def write_waiver(path: Path, key: Path, who: str, why: str, until: str, covers: Sequence[str], today: date) -> None:
    """Write a signed waiver. ``key``: a private key (PEM). ``covers``: reasons as `stillroom gate` prints them.

    Raises UsageError for a key that is none, an empty statement, a day that is past or more than a year away.
    """
    content: dict[str, Any] = {"format": FORMAT, "who": who.strip(), "why": why.strip(), "from": today.isoformat()}
    content |= {"until": until, "covers": sorted(set(covers))}
    if not content["who"] or not content["why"] or not content["covers"]:
        raise UsageError("a waiver says who, why, and what it covers (as `stillroom gate` prints it).")
    days = (_day(until, "until") - today).days
    if not 0 <= days <= LONGEST:
        raise UsageError(f"until {until} is {days} days from today: choose a day within {LONGEST} days.")
    write_bytes(path, seal(content, PAYLOAD, private_key(key)))


def read_waiver(path: Path, signers: Sequence[Path], today: date) -> Waiver:
    """A waiver that holds today. ``signers``: the public keys (PEM) of those who may waive, as the recipe names them.

    Raises UsageError, naming the file, for one that is altered, expired, not yet valid, or signed by anybody else.
    """
    if not path.is_file():
        raise MissingFileError(f"the waiver {path} does not exist. Write one with: stillroom terms waive")
    raw = path.read_bytes()
    content, signer = _signed(path, raw, signers)
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]
    if wrong or set(content) - set(FIELDS) or content["format"] != FORMAT:
        raise UsageError(f"{path} is signed, but is no waiver ({FORMAT}): {', '.join(wrong) or 'other fields'}.")
    begins, ends = _day(content["from"], f"{path}: from"), _day(content["until"], f"{path}: until")
    if today > ends:
        raise UsageError(f"{path}: the waiver of {content['who']} expired on {content['until']}.")
    if today < begins:
        raise UsageError(f"{path}: the waiver of {content['who']} holds from {content['from']} on only.")
    if (ends - begins).days > LONGEST:
        raise UsageError(f"{path}: the waiver of {content['who']} holds for more than {LONGEST} days.")
    covers = tuple(str(cover) for cover in content["covers"])
    return Waiver(path, file_digest(path), content["who"], content["why"], content["until"], covers, signer)


def holds(raw: bytes, pem: bytes, said: Mapping[str, Any]) -> str:
    """What is wrong with a waiver that a run kept, with its signer's key and what the passport says of it; else ''.

    Whether it had expired is not looked at: it held on the day when the teacher was asked.
    """
    try:
        content = opened(raw, PAYLOAD, parsed(pem))
    except NotSignedError as error:
        return f"The waiver does not hold: {error}."
    except ValueError:
        return "The key of whoever signed the waiver is no public key (PEM)."
    wrong = [name for name in ("who", "why", "until", "covers") if content.get(name) != said[name]]
    return f"The passport says otherwise of: {', '.join(wrong)}." if wrong else ""


def _signed(path: Path, raw: bytes, signers: Sequence[Path]) -> tuple[dict[str, Any], Signer]:
    """What it says and who signed it, one of the signers."""
    if not signers:
        raise UsageError(f"{path}: terms.signers names nobody who may waive. Name their public keys (PEM).")
    why = []
    for signer in signers:
        key = public_key(signer)
        try:
            value = opened(raw, PAYLOAD, key)
        except NotSignedError as error:
            why.append(f"{signer.name}: {error}")
        else:
            return (value if isinstance(value, dict) else {}), key
    try:
        payload_of(raw, PAYLOAD)
    except NotSignedError as error:
        raise UsageError(f"{path} is no waiver, or was altered: {error}. It was not used.") from None
    raise UsageError(f"{path}: altered, or signed by somebody whom terms.signers does not name ({'; '.join(why)}).")


def _day(text: str, what: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{what}: {text!r} is no day; write 2026-12-31.") from None

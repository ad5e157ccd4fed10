"""What verify() asks of a signed run: is it signed by whom you believe, and are these the files that were signed?

Nothing that a file holds can stop it. A run without signature/ is unsigned, which is no mismatch unless a key is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from stillroom.errors import MissingExtraError, UsageError
from stillroom.provenance import attestation, claims, keys, model_signature
from stillroom.provenance.envelope import NotSignedError, opened
from stillroom.provenance.keys import Signer
from stillroom.provenance.manifest import (
    MANIFEST,
    MODEL_SIG,
    SIGNATURE,
    SIGNER,
    STATEMENT,
    TEMPORARY,
    Mismatch,
    content_of,
    digest_of,
    shown,
    walk,
)
from stillroom.provenance.passport import PASSPORT
from stillroom.provenance.schema import validate

WHOLE = (MODEL_SIG, SIGNER, STATEMENT)


@dataclass(frozen=True)
class Trust:
    """Whom you believe. ``key``: a public key's file; ``certificate``: a file of root certificates; not both.

    ``claim_keys``: those whose claims you believe, besides the signer. ``claims_head``: the sha256 of the last claim
    that you know of. ``at``: when certificates must be valid; None is now.
    """

    key: str | Path | None = None
    certificate: str | Path | None = None
    claim_keys: tuple[str | Path, ...] = ()
    claims_head: str | None = None
    at: datetime | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.certificate is not None:
            raise UsageError("give a key or a root certificate, not both: a run is signed by one of them.")


def signer_name(run_folder: str | Path) -> str | None:
    """Who says to have signed a run, in words; None when it is unsigned. Nothing is checked by this."""
    content = content_of(Path(run_folder) / SIGNER)
    if content is None:
        return None
    try:
        if b"BEGIN CERTIFICATE" in content:
            return f"the certificate {keys.parsed_certificates(content)[0].subject.rfc4514_string()}"
        return f"the key {keys.parsed(content).id[:16]}"
    except MissingExtraError:
        raise
    except Exception:
        return "nobody that can be read"


def check(folder: Path, digests: Mapping[str, str | None], trust: Trust) -> list[Mismatch]:
    """The signature and the claims of a run. ``digests``: sha256 of each sealed file by path, None where unreadable.

    Raises UsageError or MissingFileError for keys that cannot be read, MissingExtraError without the extra ``sign``.
    """
    files = {f"{SIGNATURE}/{path}": Path(entry.path) for path, entry in walk(folder / SIGNATURE)}
    signer: Signer | None = None
    signed: Any = None
    if files:
        found = [Mismatch(path, "added", "It is no part of a signature.") for path in files if path not in WHOLE]
        missing = [path for path in WHOLE if content_of(folder / path) is None]
        found += [Mismatch(path, "removed", "A signed run has one.") for path in missing]
        if not missing:
            signer, signed, more = _signature(folder, digests, trust)
            found += more
    elif trust.key is not None or trust.certificate is not None:
        found = [Mismatch(MODEL_SIG, "removed", "You gave whom to believe, and this run is not signed.")]
    else:
        found = []
    believed = _believed(trust, signer)
    before = attestation.claims_when_signed(signed)
    return found + claims.check(folder, believed, signed=before, head=trust.claims_head)


def _signature(
    folder: Path, digests: Mapping[str, str | None], trust: Trust
) -> tuple[Signer | None, Any, list[Mismatch]]:
    """The three files of a signature: who signed, the signed digests, the signed statement."""
    signer, found = _who(folder, trust)
    if signer is None:
        return None, None, found
    problem, vouched = None, False
    if trust.certificate is not None or b"BEGIN CERTIFICATE" not in (content_of(folder / SIGNER) or b""):
        key = Path(trust.key) if trust.key is not None else folder / SIGNER
        roots = Path(trust.certificate) if trust.certificate is not None else None
        problem = model_signature.problem(folder, key, roots)
    if problem is not None:
        found.append(Mismatch(MODEL_SIG, "untrusted", f"Its signature does not hold: {problem}."))
    else:
        now = {**digests, **{path: digest_of(folder / path) for path in _unsealed(folder)}}
        different = model_signature.differences(content_of(folder / MODEL_SIG) or b"", now)
        vouched = not different
        found += different
    try:
        said = opened(content_of(folder / STATEMENT) or b"", attestation.PAYLOAD_TYPE, signer)
    except NotSignedError as error:
        problem = f"{str(error)[0].upper()}{str(error)[1:]}."
        return signer, None, [*found, Mismatch(STATEMENT, "untrusted", problem)]
    named = {mismatch.path for mismatch in found}
    return signer, said, found + [m for m in _statement(folder, said, vouched) if m.path not in named]


def _who(folder: Path, trust: Trust) -> tuple[Signer | None, list[Mismatch]]:
    """Whose signature it must be, and why the one in signer.pem is not to be believed."""
    content = content_of(folder / SIGNER) or b""
    found: list[Mismatch] = []
    wanted = keys.public_key(trust.key) if trust.key is not None else None
    roots = keys.certificates(trust.certificate) if trust.certificate is not None else None
    try:
        if b"BEGIN CERTIFICATE" in content:
            chain = keys.parsed_certificates(content)
            signer, form = keys.leaf_of(chain), keys.pem_of(chain)
            why = keys.distrusted(chain, roots, trust.at) if roots is not None else None
            if why is not None:
                found.append(Mismatch(SIGNER, "untrusted", f"The certificate does not vouch for it: {shown(why)}."))
            if wanted is not None:
                problem = "The run is signed with a certificate. Give its root, with --certificate, instead of a key."
                found.append(Mismatch(SIGNER, "untrusted", problem))
        else:
            signer = keys.parsed(content)
            form = signer.pem
            if roots is not None:
                problem = f"The run is signed with the bare key {signer.id[:16]}. Give it, with --key."
                found.append(Mismatch(SIGNER, "untrusted", problem))
    except MissingExtraError:
        raise
    except Exception as error:
        return wanted, [Mismatch(SIGNER, "changed", f"It is neither a public key nor certificates ({_line(error)}).")]
    if form != content:
        found.append(Mismatch(SIGNER, "changed", "It is not in the form in which keys and certificates are written."))
    if wanted is not None and wanted != signer:
        problem = f"It is signed with the key {signer.id[:16]}, and you believe the key {wanted.id[:16]}."
        found.append(Mismatch(SIGNER, "untrusted", problem))
    return wanted or signer, found


def _statement(folder: Path, said: Any, vouched: bool) -> list[Mismatch]:
    """Whether the signed statement is the one of this passport, manifest and model.sig.

    ``vouched``: model.sig holds for all files; where it and the statement differ, the statement is another run's.
    """
    now = {path: digest_of(folder / path) for path in attestation.BYPRODUCTS}
    try:
        passport = json.loads((folder / PASSPORT).read_bytes())
        if validate(passport):
            raise ValueError("not valid by its schema")
        found = attestation.disagreements(said, passport, now)
    except MissingExtraError:
        raise
    except Exception as error:
        problem = f"The signed statement cannot be compared with it ({_line(error)})."
        return [Mismatch(PASSPORT, "changed", problem)]
    if vouched and any(mismatch.path == PASSPORT for mismatch in found):
        return [Mismatch(STATEMENT, "changed", "It is about another passport than the one that model.sig vouches for.")]
    return found


def _unsealed(folder: Path) -> list[str]:
    """What the manifest leaves out and a signature does not: the manifest, and temporary files."""
    outside = f"{SIGNATURE}/"
    found = [p for p, e in walk(folder) if p.endswith(TEMPORARY) and not p.startswith(outside) and e.is_file()]
    return [*found, *([MANIFEST] if (folder / MANIFEST).is_file() else [])]


def _believed(trust: Trust, signer: Signer | None) -> list[Signer] | None:
    """Whose claims count; None where nobody was named, so that every claim is checked by the key in it."""
    if trust.key is None and trust.certificate is None and not trust.claim_keys:
        return None
    return [*([signer] if signer is not None else []), *(keys.public_key(path) for path in trust.claim_keys)]


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 120) or type(error).__name__

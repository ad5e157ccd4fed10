"""sign(): a key or certificate vouches for a sealed run: its files (model.sig) and what it was made from (a statement).

Both are signed with the same elliptic-curve key. Nothing is fetched and nothing is sent.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from stillroom.digests import file_digest
from stillroom.errors import CheckError, FolderError, UsageError
from stillroom.files import read_json, write_bytes
from stillroom.provenance import attestation, claims, keys, model_signature
from stillroom.provenance.check import sealed
from stillroom.provenance.envelope import seal
from stillroom.provenance.keys import Signer
from stillroom.provenance.manifest import (
    MANIFEST,
    MODEL_SIG,
    SIGNATURE,
    SIGNER,
    STATEMENT,
    TEMPORARY,
    existing,
    walk,
)
from stillroom.provenance.passport import PASSPORT


def sign(run_folder: str | Path, key: str | Path, certificate: str | Path | None = None) -> Signer:
    """Sign a sealed run: RUN/signature/ with model.sig, the statement, and who signed. Replaces an older signature.

    ``key``: a private key's file. ``certificate``: a file with the key's own certificate first, then those up to the
    root. Signs only what verifies: raises CheckError for a run that is not as it was sealed, or claims that do not
    hold; FolderError while temporary files lie there; UsageError for a key and certificate that do not fit.
    """
    folder, private = existing(run_folder), keys.private_key(key)
    signer = keys.signer_of(private.public_key())
    written = signer.pem
    if certificate is not None:
        chain = keys.certificates(certificate)
        written = keys.pem_of(chain)
        if keys.leaf_of(chain) != signer:
            raise UsageError(
                f"the first certificate of {certificate} is not that of the key {key}. Give the two of a pair."
            )
    left = next((path for path, _ in walk(folder) if path.endswith(TEMPORARY)), None)
    if left is not None:
        raise FolderError(f"{folder / left} was left by something interrupted. Finish that, or delete it, then sign.")
    found = sealed(folder)[0] + claims.check(folder)
    if found:
        raise CheckError(
            f"{folder} is not as it was sealed, and is not signed. {found[0]} See: stillroom verify {folder}"
        )
    _write(folder, Path(key), written, certificate)
    passport = read_json(folder / PASSPORT)
    digests = {path: file_digest(folder / path) for path in (PASSPORT, MANIFEST, MODEL_SIG)}
    statement = attestation.statement(passport, digests, claims.head_of(folder))
    attestation.check_form(statement)
    write_bytes(folder / STATEMENT, seal(statement, attestation.PAYLOAD_TYPE, private))
    return signer


def _write(folder: Path, key: Path, written: bytes, certificate: str | Path | None) -> None:
    """signer.pem and model.sig, in a fresh signature/."""
    if (folder / SIGNATURE).is_dir():
        shutil.rmtree(folder / SIGNATURE)
    write_bytes(folder / SIGNER, written)
    try:
        model_signature.write(folder, key, folder / SIGNER if certificate is not None else None)
    except ValueError as error:
        raise UsageError(f"the run cannot be signed with {key}: {' '.join(str(error).split())[:200]}.") from None

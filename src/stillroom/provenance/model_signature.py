"""model.sig: the digests of a run's files, signed in the OpenSSF model-signing format. Needs the extra ``sign``."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.errors import missing_extra
from stillroom.provenance.manifest import CLAIMS, CLAIMS_HEAD, MODEL_SIG, SIGNATURE, Mismatch, shown

PREDICATE = "https://model_signing/signature/v1.0"


def write(folder: Path, key: Path, certificates: Path | None) -> None:
    """Sign all files of ``folder`` but those that lie outside of the seal, into signature/model.sig.

    ``certificates``: a PEM file, the signer's own first. Raises what the library raises for a pair that does not fit.
    """
    signing = _library().signing.Config().set_hashing_config(_files())
    if certificates is None:
        signing.use_elliptic_key_signer(private_key=key)
    else:  # the whole file as the chain: its first entry is the signer's own, which harms nobody there
        signing.use_certificate_signer(
            private_key=key, signing_certificate=certificates, certificate_chain=[certificates]
        )
    signing.sign(folder, folder / MODEL_SIG)


def problem(folder: Path, key: Path | None, roots: Path | None) -> str | None:
    """Why model.sig is not a signature by ``key``, or by a certificate that ``roots`` vouch for; None when it is one.

    Only who signed is answered here; ``differences`` says whether the files are those that were signed.
    """
    verifying = _library().verifying.Config().set_hashing_config(_files())
    try:
        if roots is not None:
            verifying.use_certificate_verifier(certificate_chain=[roots])
        else:
            verifying.use_elliptic_key_verifier(public_key=key)
        # the library prints what it thinks of old signatures, and warns by a call that warns of itself
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            verifying.verify(folder, folder / MODEL_SIG)
    except Exception as error:  # hostile bytes raise whatever they like: JSON, pydantic, OpenSSL, KeyError ...
        said = str(error)
        if isinstance(error, ValueError) and said.startswith("Signature mismatch:"):
            return None  # the signature holds, for other files
        return shown(" ".join(said.split()).rstrip(".") or type(error).__name__, 200)
    return None


def differences(content: bytes, digests: Mapping[str, str | None]) -> list[Mismatch]:
    """The files that are not those that were signed: ``digests`` are the files', by path, None where unreadable.

    Stricter than the library, which leaves out what the signature itself says should be left out.
    """
    try:
        signed = dict(_signed(content))
    except Exception as error:
        return [Mismatch(MODEL_SIG, "changed", f"It holds no digests of files ({type(error).__name__}).")]
    found = [Mismatch(path, "added", "It is not signed.") for path in sorted(set(digests) - set(signed))]
    for path, digest in sorted(signed.items()):
        if path not in digests:
            found.append(Mismatch(path, "removed", "It is signed."))
        elif digests[path] != digest:
            found.append(Mismatch(path, "changed", f"Its sha256 is {digests[path]}; the signature says {digest}."))
    return found


def _signed(content: bytes) -> Iterator[tuple[str, str]]:
    statement: Any = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"], validate=True))
    if statement["predicateType"] != PREDICATE:
        raise ValueError(statement["predicateType"])
    for resource in statement["predicate"]["resources"]:
        if resource["algorithm"] != "sha256":
            raise ValueError(resource["algorithm"])
        yield str(resource["name"]), str(resource["digest"])


def _files() -> Any:
    """All files of a run: .gitignore and its kind too, which the library would leave out by default.

    signature/ is left out by name, or signing again would sign the old signature.
    """
    outside = [Path(name) for name in (SIGNATURE, CLAIMS, CLAIMS_HEAD)]
    return _library().hashing.Config().set_ignored_paths(paths=outside, ignore_git_paths=False)


def _library() -> Any:
    try:
        import model_signing
    except ImportError:
        raise missing_extra("model-signing", "sign") from None
    return model_signing

"""A signed envelope (DSSE v1, secure-systems-lab/dsse): JSON, its type and one signature over both. Extra ``sign``."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import rfc8785

from stillroom.errors import missing_extra
from stillroom.provenance.keys import Signer, loaded, signer_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


class NotSignedError(ValueError):
    """An envelope that does not hold; the message says why. Internal: a check turns it into a mismatch."""


def seal(value: Any, payload_type: str, key: EllipticCurvePrivateKey) -> bytes:
    """The envelope of ``value`` as canonical JSON (RFC 8785), itself canonical; one line, without its end."""
    dsse, signer = _library()
    public = signer_of(key.public_key())
    envelope = dsse.Envelope(rfc8785.dumps(value), payload_type, {})
    envelope.sign(signer.CryptoSigner(key, signer.SSlibKey.from_crypto(loaded(public), keyid=public.id)))
    return rfc8785.dumps(envelope.to_dict())


def payload_of(content: bytes, payload_type: str) -> Any:
    """What an envelope says, its signature *not* checked yet. Raises NotSignedError, and nothing else.

    Only the form that ``seal`` writes is read, so that a byte changed anywhere is seen.
    """
    try:
        envelope = json.loads(content)
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        again = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": signature["keyid"], "sig": _again(signature["sig"])}],
        }
        value = json.loads(payload)
        if rfc8785.dumps(again) == content and rfc8785.dumps(value) == payload:
            return value
    except Exception as error:  # hostile bytes: deep nesting, lone surrogates, other types, huge numbers
        raise NotSignedError(f"it is no signed envelope ({type(error).__name__})") from None
    raise NotSignedError("it is not in the form in which envelopes are written")


def opened(content: bytes, payload_type: str, signer: Signer) -> Any:
    """What an envelope says, signed by ``signer``. Raises NotSignedError, and nothing else."""
    dsse, library = _library()
    value = payload_of(content, payload_type)
    said = json.loads(content)
    if said["signatures"][0]["keyid"] != signer.id:
        raise NotSignedError(f"it is signed by another key than {signer.id[:16]}")
    try:
        key = library.SSlibKey.from_crypto(loaded(signer), keyid=signer.id)
        dsse.Envelope.from_dict(said).verify([key], 1)  # from_dict changes what it is given
    except Exception as error:
        raise NotSignedError(f"its signature does not hold ({type(error).__name__})") from None
    return value


def _again(text: str) -> str:
    return base64.b64encode(base64.b64decode(text, validate=True)).decode()


def _library() -> tuple[Any, Any]:
    try:
        from securesystemslib import dsse, signer
    except ImportError:
        raise missing_extra("securesystemslib", "sign") from None
    return dsse, signer

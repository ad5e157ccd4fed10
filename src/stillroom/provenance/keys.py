"""Keys and certificates of those who sign: made, read, and known by one id. Needs the extra ``sign``.

Elliptic curves only (P-256, P-384, P-521): the OpenSSF model-signing format knows no other keys.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.errors import FolderError, MissingFileError, UsageError, missing_extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.x509 import Certificate

CURVES = ("secp256r1", "secp384r1", "secp521r1")
MAKE_ONE = "Make a pair with: stillroom keygen key.pem"


@dataclass(frozen=True)
class Signer:
    """A public key that signatures are checked by, as PEM. ``id``: sha256 of that PEM, the hint in model.sig."""

    pem: bytes

    @property
    def id(self) -> str:
        return hashlib.sha256(self.pem).hexdigest()


def generate(path: str | Path) -> tuple[Path, Path]:
    """Write a new private key (P-256, mode 0600) and beside it, as NAME.pub.pem, its public half.

    Returns both paths. Raises FolderError when one of them exists: a key that is overwritten is lost.
    """
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private_path = Path(path)
    public_path = private_path.with_name(f"{private_path.stem}.pub.pem")
    for place in (private_path, public_path):
        if place.exists():
            raise FolderError(f"{place} exists already. Keys are never overwritten: choose another name.")
    private = ec.generate_private_key(ec.SECP256R1())
    content = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private_path.parent.mkdir(parents=True, exist_ok=True)
    # opened for its owner alone from the start: nobody reads it between writing and chmod
    with os.fdopen(os.open(private_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    public_path.write_bytes(signer_of(private.public_key()).pem)
    return private_path, public_path


def private_key(path: str | Path) -> EllipticCurvePrivateKey:
    """The private key of a PEM file. Raises UsageError when it is something else, or is encrypted."""
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _content(path)
    if b"PRIVATE KEY-----" not in content:
        raise UsageError(f"{path} holds no private key (PEM), and signing needs one. {MAKE_ONE}")
    try:
        found = load_pem_private_key(content, None)
    except TypeError:
        raise UsageError(
            f"{path} is encrypted, which is not supported. Decrypt it with: openssl ec -in {path} -out key.pem"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not readable as a private key ({_line(error)}). {MAKE_ONE}") from None
    return _on_a_curve(found, path)


def public_key(path: str | Path) -> Signer:
    """The public key of a PEM file. Raises UsageError when it is something else."""
    content = _content(path)
    if b"PRIVATE KEY-----" in content:
        raise UsageError(f"{path} is a private key: keep it to yourself, and verify with its public half.")
    try:
        return parsed(content)
    except ValueError as error:
        raise UsageError(f"{path} is not readable as a public key ({_line(error)}). {MAKE_ONE}") from None


def parsed(content: bytes) -> Signer:
    """The public key in ``content``, in the one form in which keys are written. Raises ValueError."""
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(content)
    except UnsupportedAlgorithm as error:  # no ValueError, though it is one: a key of a kind that nobody knows
        raise ValueError(str(error)) from None
    return signer_of(_on_a_curve(found, "it"))


def signer_of(key: EllipticCurvePublicKey) -> Signer:
    """A public key as those who check signatures hold it."""
    _library()
    from cryptography.hazmat.primitives import serialization

    return Signer(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def loaded(signer: Signer) -> EllipticCurvePublicKey:
    """The key object of a signer. Raises ValueError when its PEM is no public key."""
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _on_a_curve(load_pem_public_key(signer.pem), "it")


def certificates(path: str | Path) -> list[Certificate]:
    """The certificates of a PEM file, in its order. Raises UsageError when there is none."""
    try:
        return parsed_certificates(_content(path))
    except ValueError as error:
        raise UsageError(f"{path} is not readable as certificates in PEM ({_line(error)}).") from None


def parsed_certificates(content: bytes) -> list[Certificate]:
    """The certificates in ``content``, in order. Raises ValueError."""
    _library()
    from cryptography.x509 import load_pem_x509_certificates

    return load_pem_x509_certificates(content)


def pem_of(chain: Sequence[Certificate]) -> bytes:
    """Certificates in the one form in which they are written."""
    from cryptography.hazmat.primitives import serialization

    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)


def leaf_of(chain: Sequence[Certificate]) -> Signer:
    """Whose key the first certificate of a chain speaks for. Raises ValueError for a key of another kind."""
    return signer_of(_on_a_curve(chain[0].public_key(), "the certificate"))


def distrusted(chain: Sequence[Certificate], roots: Sequence[Certificate], at: datetime | None = None) -> str | None:
    """Why ``roots`` do not vouch for a chain (leaf first) at a time (default: now); None when they do.

    Every certificate on the path must be valid *then*. (model-signing itself looks at the time when the leaf began to
    be valid, so that an expired one passes; a signature carries no time that anybody vouches for.)
    """
    from OpenSSL import crypto

    when = at or datetime.now(UTC)
    if not roots:
        return "no root certificate was given"
    store = crypto.X509Store()
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    store.set_time(when)
    first, *others = [crypto.X509.from_cryptography(certificate) for certificate in chain]
    try:
        crypto.X509StoreContext(store, first, others).verify_certificate()
    except crypto.X509StoreContextError as error:
        blamed = error.certificate.to_cryptography()
        lasts = f"{blamed.not_valid_before_utc:%Y-%m-%d} to {blamed.not_valid_after_utc:%Y-%m-%d}"
        return f"{_line(error)}: {blamed.subject.rfc4514_string()}, valid {lasts}"
    return None


def _on_a_curve(key: Any, where: str | Path) -> Any:
    name = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if name not in CURVES:
        raise UsageError(f"{where} holds a key of kind {name}; the format needs one of {', '.join(CURVES)}. {MAKE_ONE}")
    return key


def _content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        raise MissingFileError(f"{path} cannot be read. Give a file in PEM. {MAKE_ONE}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise missing_extra("cryptography", "sign") from None

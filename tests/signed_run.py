"""Keys, certificates and a signed run with terms and claims in it, for the tests of signatures."""

import hashlib
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from provenance_run import made, sealed_run  # noqa: F401
from stillroom import provenance
from stillroom.provenance import claims, keys
from stillroom.provenance.signing import sign

TERMS = b"Terms of the tiny teacher: its outputs may train other models.\n"
TERMS_FILE = f"terms/{hashlib.sha256(TERMS).hexdigest()}.txt"
ONCE = {}  # made once for all modules that import the fixtures


def certified(name, key, issuer_name, issuer_key, days, *, authority=False, signs=True, begins=-10):
    """A certificate that lasts from ``begins`` to ``days`` from now."""
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer_name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=signs, key_cert_sign=authority, crl_sign=authority, key_encipherment=True, **usage
            ),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )


def pem(*certificates):
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def private_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _identities(place):
    """Pairs 'mine' and 'other'; under one root and one authority, a chain that lasts and chains that do not hold."""
    found = {}
    for name in ("mine", "other"):
        found[name], found[f"{name}_pub"] = keys.generate(place / f"{name}.pem")
    root_key, middle_key, leaf_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
    root = certified("root", root_key, "root", root_key, 3650, authority=True)
    middle = certified("middle", middle_key, "root", root_key, 1000, authority=True)
    stranger = certified("root", leaf_key, "root", leaf_key, 3650, authority=True)
    leaves = {
        "chain": certified("Ada", leaf_key, "middle", middle_key, 100),
        "expired": certified("Ada", leaf_key, "middle", middle_key, -1),
        "early": certified("Ada", leaf_key, "middle", middle_key, 100, begins=5),
        "powerless": certified("Ada", leaf_key, "middle", middle_key, 100, signs=False),
    }
    contents = {name: pem(leaf, middle) for name, leaf in leaves.items()}
    contents |= {"root": pem(root), "stranger": pem(stranger), "leaf_key": private_pem(leaf_key)}
    for name, content in contents.items():
        found[name] = place / f"{name}.pem"
        found[name].write_bytes(content)
    return SimpleNamespace(**found)


@pytest.fixture(scope="session")
def who(tmp_path_factory):
    """Paths of keys and certificates."""
    if "who" not in ONCE:
        ONCE["who"] = _identities(tmp_path_factory.mktemp("keys"))
    return ONCE["who"]


def signed(run, who):
    """Put terms into a sealed run, seal it again, sign it, add three claims."""
    (run / "terms").mkdir(exist_ok=True)
    (run / TERMS_FILE).write_bytes(TERMS)
    provenance.write_manifest(run)
    sign(run, who.mine)
    claims.append(run, "audit", {"p": 0.025, "power": 0.98}, who.mine)
    claims.append(run, "reproduction", {"level": "R3"}, who.mine)
    claims.append(run, "note", {"text": "seen"}, who.mine)
    return run


@pytest.fixture(scope="session")
def signed_run(sealed_run, who, tmp_path_factory):  # noqa: F811
    """A signed run. Copy it before you damage it."""
    if "signed" not in ONCE:
        ONCE["signed"] = signed(shutil.copytree(sealed_run, tmp_path_factory.mktemp("signed") / "tiny"), who)
    return ONCE["signed"]


@pytest.fixture(scope="session")
def another_run(who, tmp_path_factory):
    """Another run of the same recipe with another seed, signed by the same key."""
    if "another" not in ONCE:
        ONCE["another"] = signed(made(tmp_path_factory.mktemp("another") / "tiny", seed=1), who)
    return ONCE["another"]

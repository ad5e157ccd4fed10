"""Signing a run: keys, certificates, the signed statement; what is refused, and what others' libraries say of it."""

import base64
import json
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import rfc8785
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from model_signing import hashing, verifying
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
from typer.testing import CliRunner

from provenance_run import copied, sealed_run  # noqa: F401
from signed_run import private_pem, signed_run, who  # noqa: F401
from stillroom import provenance
from stillroom.cli import app
from stillroom.errors import CheckError, FolderError, MissingExtraError, MissingFileError, UsageError
from stillroom.files import read_json
from stillroom.provenance import attestation, keys
from stillroom.provenance.envelope import NotSignedError, opened, seal
from stillroom.provenance.signed import Trust, signer_name
from stillroom.provenance.signing import sign

STATEMENT = "signature/provenance.intoto.dsse.json"


def said_by(run):
    """What the signed statement says, its signature not looked at."""
    return json.loads(base64.b64decode(read_json(run / STATEMENT)["payload"]))


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Keys


def test_keygen_makes_a_pair_that_only_its_owner_reads(tmp_path):
    done = cli("keygen", tmp_path / "new" / "key.pem")
    assert done.exit_code == 0, done.output
    private, public = tmp_path / "new" / "key.pem", tmp_path / "new" / "key.pub.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert keys.signer_of(keys.private_key(private).public_key()) == keys.public_key(public)
    with pytest.raises(FolderError, match="key.pem exists already. Keys are never overwritten"):
        keys.generate(private)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_keys_of_openssl_are_keys(curve, sealed_run, tmp_path):  # noqa: F811
    """SEC 1 as `openssl ecparam` writes it, on every curve that the format knows."""
    key, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    subprocess.run(["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    run = copied(sealed_run, tmp_path)
    sign(run, key)
    assert provenance.verify(run, Trust(key=public)) == []


def _written(path, content):
    path.write_bytes(content)
    return path


def test_what_is_no_private_key_is_refused(tmp_path, who):  # noqa: F811
    ed = ed25519.Ed25519PrivateKey.generate()
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    broken = who.mine.read_bytes().replace(b"M", b"N")
    with pytest.raises(UsageError, match="holds no private key .* Make a pair with: stillroom keygen key.pem"):
        keys.private_key(who.mine_pub)
    with pytest.raises(UsageError, match="holds a key of kind .*; the format needs one of secp256r1, secp384r1"):
        keys.private_key(_written(tmp_path / "ed.pem", private_pem(ed)))
    with pytest.raises(UsageError, match="is encrypted, which is not supported. Decrypt it with: openssl ec -in"):
        keys.private_key(_written(tmp_path / "locked.pem", locked))
    with pytest.raises(UsageError, match="is not readable as a private key"):
        keys.private_key(_written(tmp_path / "broken.pem", broken))
    with pytest.raises(MissingFileError, match="nowhere.pem cannot be read. Give a file in PEM."):
        keys.private_key(tmp_path / "nowhere.pem")


def test_what_is_no_public_key_or_certificate_is_refused(tmp_path, who):  # noqa: F811
    with pytest.raises(UsageError, match="is a private key: keep it to yourself"):
        keys.public_key(who.mine)
    with pytest.raises(UsageError, match="is not readable as a public key"):
        keys.public_key(_written(tmp_path / "text.pem", b"no key"))
    with pytest.raises(UsageError, match="is not readable as certificates in PEM"):
        keys.certificates(who.mine_pub)
    with pytest.raises(UsageError, match="a key or a root certificate, not both"):
        Trust(key=who.mine_pub, certificate=who.root)


# Signing with a key


def test_a_run_is_signed_and_verified_from_the_command_line(sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    done = cli("verify", run)
    assert done.exit_code == 0
    assert "It is unsigned: who changed files and manifest together would not be found out." in done.output
    done = cli("sign", run, "--key", who.mine)
    assert done.exit_code == 0, done.output
    assert "signed with the key " in done.output
    assert sorted(p.name for p in (run / "signature").iterdir()) == [
        "model.sig", "provenance.intoto.dsse.json", "signer.pem"
    ]  # fmt: skip
    done = cli("verify", run)
    assert done.exit_code == 0
    assert "It says that it is signed by the key " in done.output
    assert "give --key or --certificate" in done.output
    done = cli("verify", run, "--key", who.mine_pub)
    assert done.exit_code == 0
    assert "It is signed by the key " in done.output
    assert who.mine.read_text() not in "".join(p.read_text() for p in (run / "signature").iterdir())


def test_the_folder_may_be_moved_and_renamed(signed_run, who, tmp_path):  # noqa: F811
    run = shutil.copytree(signed_run, tmp_path / "elsewhere" / "another name")
    assert provenance.verify(run, Trust(key=who.mine_pub)) == []


def test_the_format_s_own_library_verifies_model_sig(signed_run, who):  # noqa: F811
    """What was left out stands in the signature, so that its command line needs no hint; .gitignore is not left out."""
    outside = ["signature", "claims.jsonl", "claims.head.json"]
    config = hashing.Config().set_ignored_paths(paths=outside, ignore_git_paths=False)
    for own in (None, config):
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=who.mine_pub)
        if own is not None:
            verifier = verifier.set_hashing_config(own)
        verifier.verify(signed_run, signed_run / "signature/model.sig")
    payload = read_json(signed_run / "signature/model.sig")["dsseEnvelope"]["payload"]
    predicate = json.loads(base64.b64decode(payload))["predicate"]
    names = {resource["name"] for resource in predicate["resources"]}
    assert {"manifest.json", "passport.json", "README.md", "student/model.safetensors"} < names
    assert not [name for name in names if name.startswith(("signature", "claims"))]


def test_signing_again_does_not_sign_the_old_signature(sealed_run, who, tmp_path):  # noqa: F811
    """The library's own interface would digest the model.sig that lies there, and so sign what it then overwrites."""
    run = copied(sealed_run, tmp_path)
    sign(run, who.mine)
    first = (run / "signature/model.sig").read_bytes()
    (run / "signature/old.sig").write_text("left behind")
    sign(run, who.mine)
    assert (run / "signature/model.sig").read_bytes() != first  # ECDSA draws a number each time
    assert not (run / "signature/old.sig").exists()
    assert provenance.verify(run, Trust(key=who.mine_pub)) == []
    sign(run, who.other)
    assert provenance.verify(run, Trust(key=who.other_pub)) == []


def test_a_run_that_does_not_verify_is_not_signed(sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    (run / "student/half.tmp").write_text("x")
    with pytest.raises(FolderError, match="half.tmp was left by something interrupted. Finish that, or delete it"):
        sign(run, who.mine)
    (run / "student/half.tmp").unlink()
    (run / "report/report.html").write_text("other")
    with pytest.raises(CheckError, match=r"is not as it was sealed, and is not signed. report/report.html: changed"):
        sign(run, who.mine)
    assert not (run / "signature").exists()
    with pytest.raises(MissingFileError, match="nowhere does not exist"):
        sign(tmp_path / "nowhere", who.mine)


@pytest.mark.parametrize("module", ["model_signing", "securesystemslib", "in_toto_attestation.v1", "cryptography"])
def test_without_the_extra_its_name_is_said(module, sealed_run, signed_run, who, tmp_path, monkeypatch):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'stillroom\[sign\]'"):
        sign(run, who.mine)
    with pytest.raises(MissingExtraError, match=r"pip install 'stillroom\[sign\]'"):
        provenance.verify(signed_run)
    assert provenance.verify(copied(sealed_run, tmp_path / "again")) == []


# Certificates


def test_a_chain_of_certificates_up_to_the_root(sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    assert cli("sign", run, "--key", who.leaf_key, "--certificate", who.chain).exit_code == 0
    assert provenance.verify(run) == []
    assert signer_name(run) == "the certificate CN=Ada"
    done = cli("verify", run, "--certificate", who.root)
    assert done.exit_code == 0, done.output
    assert "It is signed by the certificate CN=Ada, whom you believe." in done.output
    (found,) = provenance.verify(run, Trust(key=who.mine_pub))[:1]
    assert str(found).startswith("signature/signer.pem: untrusted. The run is signed with a certificate. Give its root")


@pytest.mark.parametrize(
    ("chain", "root", "why"),
    [
        ("chain", "stranger", "certificate signature failure: CN=middle"),
        ("expired", "root", "certificate has expired: CN=Ada"),
        ("early", "root", "certificate is not yet valid or the system clock is incorrect: CN=Ada"),
        ("powerless", "root", "Signing certificate cannot be used for signing"),
    ],
)
def test_a_certificate_that_does_not_vouch(chain, root, why, sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    sign(run, who.leaf_key, getattr(who, chain))
    found = [str(mismatch) for mismatch in provenance.verify(run, Trust(certificate=getattr(who, root)))]
    assert any(line.startswith("signature/") and why in line for line in found), found
    assert all(line.startswith("signature/") for line in found)


def test_the_library_alone_takes_an_expired_certificate(sealed_run, who, tmp_path):  # noqa: F811
    """Why the time is checked here: model-signing looks at the moment when the certificate began. Ours looks at now."""
    run = copied(sealed_run, tmp_path)
    sign(run, who.leaf_key, who.expired)
    verifier = verifying.Config().use_certificate_verifier(certificate_chain=[who.root])
    verifier.verify(run, run / "signature/model.sig")
    assert provenance.verify(run, Trust(certificate=who.root))
    then = datetime.now(UTC) - timedelta(days=5)
    assert provenance.verify(run, Trust(certificate=who.root, at=then)) == []
    later = datetime.now(UTC) + timedelta(days=2000)
    sign(run, who.leaf_key, who.chain)
    assert provenance.verify(run, Trust(certificate=who.root)) == []
    assert provenance.verify(run, Trust(certificate=who.root, at=later))


def test_keys_and_certificates_must_be_a_pair(sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    with pytest.raises(UsageError, match="is not that of the key .* Give the two of a pair."):
        sign(run, who.mine, who.chain)
    sign(run, who.mine)
    (found, *_) = provenance.verify(run, Trust(certificate=who.root))
    assert str(found).startswith("signature/signer.pem: untrusted. The run is signed with the bare key ")


# The statement


def test_the_statement_is_in_toto_with_slsa_provenance(signed_run, who):  # noqa: F811
    """Read by the standard's own library, its envelope by another one; subjects and dependencies are the passport's."""
    passport, said = read_json(signed_run / "passport.json"), said_by(signed_run)
    message = json_format.ParseDict(said, statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    json_format.ParseDict(said["predicate"], provenance_pb2.Provenance())
    public = serialization.load_pem_public_key(who.mine_pub.read_bytes())
    envelope = read_json(signed_run / STATEMENT)
    key = SSlibKey.from_crypto(public, keyid=envelope["signatures"][0]["keyid"])
    assert Envelope.from_dict(envelope).verify([key], 1)
    entries = [*passport["student"]["artifacts"], *passport["exports"]]
    assert {s["name"]: s["digest"]["sha256"] for s in said["subject"]} == {e["path"]: e["sha256"] for e in entries}
    depends = said["predicate"]["buildDefinition"]["resolvedDependencies"]
    (teacher,) = [one for one in depends if one["annotations"]["role"] == "teacher"]
    assert teacher["name"] == "tiny teacher"
    assert teacher["digest"] == {"stillroomContent": passport["teachers"][0]["digest"]}
    assert teacher["annotations"]["access"]["route"] == "local-weights"
    assert teacher["annotations"]["terms"]["output_use"] == "unknown"
    roles = [one["annotations"]["role"] for one in depends]
    assert roles == ["teacher", "the teacher's answers", "data: training", "data: evaluation"]


def test_an_ensemble_s_members_and_parents_are_dependencies(sealed_run):  # noqa: F811
    passport = read_json(sealed_run / "passport.json")
    teacher = passport["teachers"][0]
    member = {name: value for name, value in teacher.items() if name not in ("signals", "recording", "requests")}
    teacher["parts"] = [{**member, "name": "one"}, {**member, "name": "two", "digest": None}]
    passport["teachers"].append({**teacher, "name": "second", "parts": [], "recording": None, "requests": None})
    passport["parents"] = [{"name": "grand", "passport_sha256": "a" * 64, "path": f"parents/{'a' * 64}.json"}]
    passport["student"] |= {"init": "pretrained", "init_from": "org/base"}
    assert provenance.validate(passport) == []
    said = attestation.statement(passport, dict.fromkeys(attestation.BYPRODUCTS, "b" * 64), None)
    attestation.check_form(said)
    depends = {one["name"]: one for one in said["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert depends["one"]["annotations"]["role"] == "member of tiny teacher"
    assert "digest" not in depends["two"]
    assert depends["second"]["annotations"]["role"] == "teacher"
    assert depends["org/base"]["annotations"]["role"] == "initial weights"
    assert depends["grand"]["digest"] == {"sha256": "a" * 64}


@pytest.mark.parametrize("value", [{}, [], None, {"_type": 3}, {"predicate": {"buildDefinition": 1}}, {"subject": "x"}])
def test_what_is_no_statement_is_refused(value):
    with pytest.raises(CheckError, match="not an in-toto statement"):
        attestation.check_form(value)


def forged(run, key, change):
    """Let the signer sign another statement over the same files."""
    said = said_by(run)
    change(said)
    (run / STATEMENT).write_bytes(seal(said, attestation.PAYLOAD_TYPE, keys.private_key(key)))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda said: said["predicate"]["buildDefinition"]["resolvedDependencies"].pop(0), "resolvedDependencies.0"),
        (lambda said: said["subject"].pop(), "subject"),
        (lambda said: said["predicate"]["buildDefinition"].update(buildType="urn:other"), "buildDefinition.buildType"),
        (lambda said: said["subject"][0]["digest"].update(sha256="0" * 64), "subject.0.digest.sha256"),
    ],
)
def test_a_statement_that_differs_from_the_passport_is_named(change, place, signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    forged(run, who.mine, change)
    (found,) = provenance.verify(run, Trust(key=who.mine_pub))
    assert found.path == STATEMENT
    assert "It says something else than the passport: " in found.detail
    assert place in found.detail


@pytest.mark.parametrize("value", [1, [], {}, {"predicate": None}, "x" * 100, {"_type": {"a": [[[]]]}}])
def test_a_signed_statement_of_any_shape_is_a_mismatch(value, signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    (run / STATEMENT).write_bytes(seal(value, attestation.PAYLOAD_TYPE, keys.private_key(who.mine)))
    assert STATEMENT in {mismatch.path for mismatch in provenance.verify(run, Trust(key=who.mine_pub))}


HOSTILE = [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"NaN",
           b'"\\ud800"', b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----",
           b'{"payload": 1, "payloadType": [], "signatures": {}}', b'{"payload": "", "signatures": []}',
           b'{"verificationMaterial": [], "dsseEnvelope": null}',
           b"-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["signature/model.sig", STATEMENT, "signature/signer.pem", "claims.jsonl", "claims.head.json"]
)
def test_garbage_in_a_signature_is_a_mismatch(name, signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    for content in HOSTILE:
        (run / name).write_bytes(content)
        for trust in (Trust(), Trust(key=who.mine_pub), Trust(certificate=who.root)):
            found = provenance.verify(run, trust)
            assert name in {mismatch.path for mismatch in found}, content[:40]
            assert all(str(mismatch).isprintable() and len(str(mismatch)) < 800 for mismatch in found)
        assert signer_name(run)


def test_an_envelope_holds_only_in_the_form_in_which_it_is_written(who):  # noqa: F811
    private, public = keys.private_key(who.mine), keys.public_key(who.mine_pub)
    sealed = seal({"a": 1}, "x/y", private)
    assert opened(sealed, "x/y", public) == {"a": 1}
    with pytest.raises(NotSignedError, match="it is not in the form in which envelopes are written"):
        opened(sealed, "x/z", public)
    with pytest.raises(NotSignedError, match="it is signed by another key than"):
        opened(sealed, "x/y", keys.public_key(who.other_pub))
    other = json.loads(seal({"a": 2}, "x/y", private))
    mixed = rfc8785.dumps({**json.loads(sealed), "signatures": other["signatures"]})
    with pytest.raises(NotSignedError, match="its signature does not hold"):
        opened(mixed, "x/y", public)
    with pytest.raises(NotSignedError, match="not in the form"):
        opened(json.dumps(json.loads(sealed)).encode(), "x/y", public)

"""The tamper matrix: each file of a signed run, each damage: `stillroom verify` names the file, exit code 1."""

import hashlib
import json
import random
import shutil

import pytest
from typer.testing import CliRunner

from provenance_run import copied, sealed_run  # noqa: F401
from signed_run import TERMS_FILE, another_run, signed_run, who  # noqa: F401
from stillroom import provenance
from stillroom.cli import app
from stillroom.files import read_json, write_json
from stillroom.provenance import claims
from stillroom.provenance.signed import Trust
from stillroom.provenance.signing import sign
from test_provenance_verify import encoded, files, flipped, mutated, truncated

OUTSIDE = ("signature/", "claims.")


def verified(run, who, *more):  # noqa: F811
    """Exit code and output of stillroom verify RUN --key."""
    done = CliRunner().invoke(app, ["verify", str(run), "--key", str(who.mine_pub), *map(str, more)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


def renamed(path):
    path.rename(path.with_name(path.name + ".moved"))


def linked(path):
    path.rename(path.with_name("outside.tmp"))
    path.symlink_to("outside.tmp")


def as_folder(path):
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


DAMAGES = [flipped, truncated, emptied, removed, renamed, linked, as_folder]


def test_an_untouched_signed_run_verifies(signed_run, who):  # noqa: F811
    code, said = verified(signed_run, who)
    assert code == 0, said
    assert "every file is as it was sealed" in said
    assert ", whom you believe." in said


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_every_damage_to_every_file_is_named(damage, signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    names = files(run)
    assert {"signature/model.sig", "signature/provenance.intoto.dsse.json", "signature/signer.pem", "claims.jsonl",
            "claims.head.json", "manifest.json", "passport.json", TERMS_FILE} < set(names)  # fmt: skip
    for name in names:
        path, before = run / name, (run / name).read_bytes()
        damage(path)
        code, said = verified(run, who)
        assert code == 1, (name, said)
        assert f"\n{name}: " in f"\n{said}" or f"\n{name}/inside: " in f"\n{said}", (name, said)
        if path.is_dir():
            shutil.rmtree(path)
        for left in (path, path.with_name(path.name + ".moved"), path.with_name("outside.tmp")):
            left.unlink(missing_ok=True)
        path.write_bytes(before)
    assert verified(run, who)[0] == 0


def test_a_file_swapped_with_another_run_s_is_named(signed_run, another_run, who, tmp_path):  # noqa: F811
    """Same recipe, another seed, the same signer: each file alone does not fit. Those that are equal are left out."""
    run = copied(signed_run, tmp_path)
    assert verified(another_run, who)[0] == 0
    swapped = 0
    for name in files(run):
        before, other = (run / name).read_bytes(), (another_run / name).read_bytes()
        if before == other:  # the recipe, the report made by hand, the signer
            continue
        (run / name).write_bytes(other)
        code, said = verified(run, who)
        assert code == 1, name
        assert f"\n{name}: " in f"\n{said}", (name, said)
        (run / name).write_bytes(before)
        swapped += 1
    assert swapped > 15


@pytest.mark.parametrize(
    "parts", [("signature",), ("signature", "manifest.json"), ("claims.jsonl", "claims.head.json")]
)
def test_another_run_s_signature_or_claims_do_not_fit(parts, signed_run, another_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    for part in parts:
        if (run / part).is_dir():
            shutil.rmtree(run / part)
            shutil.copytree(another_run / part, run / part)
        else:
            shutil.copy(another_run / part, run / part)
    code, said = verified(run, who)
    assert code == 1
    assert (
        "claims.jsonl: changed. Line 1 is about another passport" if "claims.jsonl" in parts else "passport.json: "
    ) in said


def test_a_swapped_terms_text_is_named(signed_run, who, tmp_path):  # noqa: F811
    """Another licence under the name of the one that was read, alone or sealed anew."""
    run = copied(signed_run, tmp_path)
    (run / TERMS_FILE).write_text("Everything is permitted.\n")
    assert f"{TERMS_FILE}: changed." in verified(run, who)[1]
    provenance.write_manifest(run)
    code, said = verified(run, who)
    assert code == 1
    assert f"{TERMS_FILE}: changed." in said


def test_files_of_a_run_swapped_with_each_other(signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    one, other = run / "student/model.safetensors", run / "seeds/1/student/model.safetensors"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    code, said = verified(run, who)
    assert code == 1
    assert "student/model.safetensors: changed" in said
    assert "seeds/1/student/model.safetensors: changed" in said


@pytest.mark.parametrize(
    "name",
    ["new.bin", "student/new.bin", "terms/new.txt", "signature/new.sig", "signature/deep/new.sig", ".gitignore",
     ".git/config", ".github/x.yml", "student/half.safetensors.tmp", "claims.jsonl.tmp", "policy.json"],
)  # fmt: skip
def test_an_added_file_is_named(name, signed_run, who, tmp_path):  # noqa: F811
    """Also what model signing leaves out by default (git's files), and temporary files."""
    run = copied(signed_run, tmp_path)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("x")
    code, said = verified(run, who)
    assert code == 1
    assert f"{name}: added." in said


@pytest.mark.parametrize("name", [TERMS_FILE, "student/model.safetensors", "report/report.html", "alone/history.jsonl"])
def test_whoever_seals_again_after_a_change_needs_the_key(name, signed_run, who, tmp_path):  # noqa: F811
    """Passport, card and manifest written anew hide the change where nothing is signed, and only there."""
    run = copied(signed_run, tmp_path)
    for outside in ("claims.jsonl", "claims.head.json"):
        (run / outside).unlink()
    (run / name).write_bytes((run / name).read_bytes() + b"\n")
    provenance.write(run)
    code, said = verified(run, who)
    assert code == 1
    assert f"\n{name}: changed. Its sha256 is " in f"\n{said}"
    assert "manifest.json: changed." in said
    shutil.rmtree(run / "signature")
    assert provenance.verify(run) == []


def test_the_removed_signature_is_missed_when_a_key_is_given(signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path, without="signature")
    code, said = verified(run, who)
    assert code == 1
    assert "signature/model.sig: removed. You gave whom to believe, and this run is not signed." in said


def test_another_signer_is_not_believed(signed_run, who, tmp_path):  # noqa: F811
    """Whoever signs again with a key of their own is named by its id."""
    run = copied(signed_run, tmp_path)
    sign(run, who.other)
    code, said = verified(run, who)
    assert code == 1
    for name in ("signer.pem", "model.sig", "provenance.intoto.dsse.json"):
        assert f"signature/{name}: untrusted." in said
    assert provenance.verify(run) == []  # it is whole, by the key that it names


def test_the_wrong_key_is_refused(signed_run, who):  # noqa: F811
    done = CliRunner().invoke(app, ["verify", str(signed_run), "--key", str(who.other_pub)])
    assert done.exit_code == 1
    assert "signature/signer.pem: untrusted. It is signed with the key " in done.output
    assert "signature/model.sig: untrusted. Its signature does not hold: Key mismatch" in done.output


def test_an_expired_certificate_is_refused(sealed_run, who, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    sign(run, who.leaf_key, who.expired)
    done = CliRunner().invoke(app, ["verify", str(run), "--certificate", str(who.root)])
    assert done.exit_code == 1
    assert (
        "signature/signer.pem: untrusted. The certificate does not vouch for it: certificate has expired: CN=Ada"
        in (done.output)
    )


def cut_last(lines):
    return lines[:-1]


def cut_middle(lines):
    return [lines[0], lines[2]]


def cut_first(lines):
    return lines[1:]


def reordered(lines):
    return [lines[1], lines[0], lines[2]]


def doubled(lines):
    return [*lines, lines[2]]


@pytest.mark.parametrize("change", [cut_last, cut_middle, cut_first, reordered, doubled], ids=lambda f: f.__name__)
def test_cut_and_reordered_claims_are_named(change, signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    lines = (run / "claims.jsonl").read_bytes().splitlines()
    assert len(lines) == 3
    (run / "claims.jsonl").write_bytes(b"".join(line + b"\n" for line in change(lines)))
    code, said = verified(run, who)
    assert code == 1
    assert "claims.jsonl: changed." in said


@pytest.mark.parametrize(
    "name", ["signature/model.sig", "signature/provenance.intoto.dsse.json", "signature/signer.pem", "claims.head.json"]
)
def test_no_single_byte_of_a_signature_can_change(name, signed_run, who, tmp_path):  # noqa: F811
    """Not even white space, or the spare bits of base64: every byte of these files counts. 60 places each."""
    run = copied(signed_run, tmp_path)
    before, draw = (run / name).read_bytes(), random.Random(3)
    for place in sorted({0, len(before) - 1, *(draw.randrange(len(before)) for _ in range(58))}):
        changed = bytearray(before)
        changed[place] ^= 1 << draw.randrange(8)
        (run / name).write_bytes(changed)
        found = provenance.verify(run, Trust(key=who.mine_pub))
        assert name in {mismatch.path for mismatch in found}, (place, before[place - 9 : place + 9])
        assert all(str(mismatch).isprintable() for mismatch in found)


def small(run, who, tmp_path):  # noqa: F811
    """A signed run of few files, so that many changes can be tried."""
    place = copied(run, tmp_path)
    for part in ("recording", "seeds", "alone", "signature", "claims.jsonl", "claims.head.json"):
        shutil.rmtree(place / part) if (place / part).is_dir() else (place / part).unlink()
    provenance.write(place)
    sign(place, who.mine)
    claims.append(place, "note", {"text": "seen"}, who.mine)
    return place


def changed_at_random(name, run, who, count, seed):  # noqa: F811
    """Change passport or manifest at random, as somebody would who can seal again but not sign; returns how many."""
    good, draw, trust = (run / name).read_bytes(), random.Random(seed), Trust(key=who.mine_pub)
    manifest, content, tried = read_json(run / "manifest.json"), json.loads(good), 0
    while tried < count:
        if tried % 4 < 3:
            changed = encoded(mutated(content, draw), draw)
        else:
            raw = bytearray(good)
            for _ in range(draw.randint(1, 4)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            changed = bytes(raw)
        if changed == good:
            continue
        (run / name).write_bytes(changed)
        if name == "passport.json" and tried % 2:
            entry = {"sha256": hashlib.sha256(changed).hexdigest(), "bytes": len(changed)}
            write_json(run / "manifest.json", {**manifest, "files": {**manifest["files"], name: entry}})
        found = provenance.verify(run, trust)
        assert found, changed[:2000]
        assert all(str(mismatch).isprintable() for mismatch in found)
        assert {name, "manifest.json"} & {mismatch.path for mismatch in found}
        write_json(run / "manifest.json", manifest)
        tried += 1
    return tried


@pytest.mark.parametrize("name", ["passport.json", "manifest.json"])
def test_no_random_change_passes_or_crashes(name, signed_run, who, tmp_path):  # noqa: F811
    assert changed_at_random(name, small(signed_run, who, tmp_path), who, 150, seed=11) == 150


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["passport.json", "manifest.json"])
def test_none_of_ten_thousand_random_changes_passes_or_crashes(name, signed_run, who, tmp_path):  # noqa: F811
    """5,000 of each: 10,000 in all."""
    assert changed_at_random(name, small(signed_run, who, tmp_path), who, 5000, seed=12) == 5000

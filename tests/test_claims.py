"""claims.jsonl: signed, chained, only added to; what was altered, moved, cut or added by a stranger is found out."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from provenance_run import copied, sealed_run  # noqa: F401
from signed_run import signed_run, who  # noqa: F401
from stillroom import provenance
from stillroom.cli import app
from stillroom.errors import CheckError, MissingFileError, UsageError
from stillroom.files import read_json
from stillroom.provenance import claims, keys
from stillroom.provenance.claims import CLAIM_TYPE, append, check, read
from stillroom.provenance.envelope import payload_of, seal
from stillroom.provenance.signed import Trust
from stillroom.provenance.signing import sign


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(sealed_run, tmp_path):  # noqa: F811
    return copied(sealed_run, tmp_path)


def lines_of(run):
    return (run / "claims.jsonl").read_bytes().splitlines()


def written(run, lines):
    (run / "claims.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def details(found):
    return [f"{mismatch.path}: {mismatch.what}. {mismatch.detail}" for mismatch in found]


def test_claims_are_added_and_read_from_the_command_line(run, who, tmp_path):  # noqa: F811
    """Each line says its number, the line before it, the passport and its signer; the run stays sealed."""
    body = tmp_path / "audit.json"
    body.write_text(json.dumps({"p": 0.025, "about": ["tiny teacher"]}))
    assert cli("claims", "list", run).output == "No claims.\n"
    for kind, key in (("audit", who.mine), ("reproduction", who.other)):
        done = cli("claims", "add", run, kind, body, "--key", key)
        assert done.exit_code == 0, done.output
        assert re.fullmatch(r"\d " + kind + r" \d{4}-.*Z by key [0-9a-f]{16} \(sha256 [0-9a-f]{64}\)\n", done.output)
    first, second = read(run)
    assert (first.number, first.prev_sha256, first.body) == (1, None, {"p": 0.025, "about": ["tiny teacher"]})
    assert (second.number, second.prev_sha256, second.kind) == (2, first.sha256, "reproduction")
    assert {first.passport_sha256, second.passport_sha256} == {provenance_sha(run)}
    assert first.signer == keys.public_key(who.mine_pub)
    done = cli("claims", "list", run)
    assert done.output == f"{first}\n{second}\n"
    assert provenance.verify(run) == []
    done = cli("verify", run)
    assert done.exit_code == 0
    assert f"claim {second}\n" in done.output


def provenance_sha(run):
    return read_json(run / "manifest.json")["files"]["passport.json"]["sha256"]


def test_what_cannot_be_claimed_is_refused(run, who, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="'audt' is no kind of claim; did you mean 'audit'"):
        append(run, "audt", {}, who.mine)
    with pytest.raises(UsageError, match="what a claim says is a JSON object, not list"):
        append(run, "note", [1], who.mine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="what a claim says must be plain JSON"):
        append(run, "note", {"x": float("nan")}, who.mine)
    with pytest.raises(MissingFileError, match="has no passport.json: there is nothing to make a claim about"):
        append(tmp_path, "note", {}, who.mine)
    with pytest.raises(UsageError, match="holds no private key"):
        append(run, "note", {}, who.mine_pub)
    assert not (run / "claims.jsonl").exists()


@pytest.fixture
def claimed(run, who):  # noqa: F811
    """A run with three claims: two by mine, the last by other."""
    for kind, key in (("audit", who.mine), ("reproduction", who.mine), ("note", who.other)):
        append(run, kind, {"kind": kind}, key)
    assert check(run) == []
    return run


def test_a_claim_of_whom_you_do_not_believe_is_untrusted(claimed, who):  # noqa: F811
    mine, other = keys.public_key(who.mine_pub), keys.public_key(who.other_pub)
    assert check(claimed, [mine, other]) == []
    (found,) = details(check(claimed, [mine]))
    assert found == (
        f"claims.jsonl: untrusted. Line 3 is signed by key {other.id[:16]}, which was not given. "
        "Give it (--claims-key) if you believe it."
    )
    done = cli("verify", claimed, "--claims-key", who.mine_pub)
    assert done.exit_code == 1
    assert found in done.output
    assert cli("verify", claimed, "--claims-key", who.mine_pub, "--claims-key", who.other_pub).exit_code == 0


def test_an_altered_claim_is_named_by_its_line(claimed, who):  # noqa: F811
    """Altered under the old signature, or signed anew by its own signer: the next line no longer follows it."""
    lines = lines_of(claimed)
    damaged = lines[1].replace(b'"payload":"e', b'"payload":"f')
    written(claimed, [lines[0], damaged, lines[2]])
    (found, *_) = details(check(claimed))
    assert found.startswith("claims.jsonl: changed. Line 2: it is no")
    said = payload_of(lines[1], CLAIM_TYPE)
    anew = seal({**said, "body": {"kind": "better"}}, CLAIM_TYPE, keys.private_key(who.mine))
    written(claimed, [lines[0], anew, lines[2]])
    assert details(check(claimed)) == [
        "claims.jsonl: changed. Line 3 does not follow the one before it: moved, cut or put in."
    ]


def test_moved_and_missing_lines_are_named(claimed):
    one, two, three = lines_of(claimed)
    follows = "does not follow the one before it: moved, cut or put in."
    for lines, number in (([two, one, three], 1), ([one, three], 2), ([two, three], 1), ([one, one, two, three], 2)):
        written(claimed, lines)
        assert f"claims.jsonl: changed. Line {number} {follows}" in details(check(claimed))


def test_a_cut_end_is_found_out_by_the_head(claimed):
    """Also half a line; and a head that was removed with it."""
    lines = lines_of(claimed)
    written(claimed, lines[:2])
    assert details(check(claimed)) == ["claims.jsonl: changed. It holds 2 claims, and there were 3: it was cut."]
    (claimed / "claims.jsonl").write_bytes(b"\n".join(lines))
    assert details(check(claimed)) == ["claims.jsonl: changed. Its last line is cut."]
    written(claimed, [])
    assert details(check(claimed)) == ["claims.jsonl: changed. It is empty."]
    (claimed / "claims.jsonl").unlink()
    assert details(check(claimed)) == ["claims.jsonl: removed. claims.head.json says that there were claims."]
    written(claimed, lines[:2])
    (claimed / "claims.head.json").unlink()
    assert details(check(claimed)) == ["claims.head.json: removed. Where there are claims, it says how many."]


def test_a_rollback_of_both_files_is_found_out_by_the_head_that_you_know(claimed, who, tmp_path):  # noqa: F811
    """As the docstring says: both files as they once were hold by themselves; a sha256 that you kept shows the cut."""
    kept = shutil.copytree(claimed, tmp_path / "before")
    last = append(claimed, "revocation", {"why": "leaked test rows"}, who.mine)
    for name in ("claims.jsonl", "claims.head.json"):
        shutil.copy(kept / name, claimed / name)
    assert check(claimed) == []  # nothing in the folder can tell
    assert details(check(claimed, head=last.sha256)) == [
        f"claims.jsonl: changed. It lacks the claim with sha256 {last.sha256}: it was cut or replaced."
    ]
    done = cli("verify", claimed, "--claims-head", last.sha256)
    assert done.exit_code == 1
    for name in ("claims.jsonl", "claims.head.json"):
        (claimed / name).unlink()
    assert check(claimed) == []
    assert [m.what for m in check(claimed, head=last.sha256)] == ["removed"]


def test_the_signed_statement_knows_the_claims_that_were_there(claimed, who):  # noqa: F811
    """Signing after the claims: neither the removal of both files nor another chain of the same length passes."""
    sign(claimed, who.mine)
    trust = Trust(key=who.mine_pub, claim_keys=(who.other_pub,))
    assert provenance.verify(claimed, trust) == []
    append(claimed, "note", {"later": True}, who.other)
    assert provenance.verify(claimed, trust) == []
    kept = {name: (claimed / name).read_bytes() for name in ("claims.jsonl", "claims.head.json")}
    for name in kept:
        (claimed / name).unlink()
    assert details(provenance.verify(claimed, trust)) == [
        "claims.jsonl: removed. There were claims when the run was signed, or that you know of."
    ]
    for number in range(4):
        append(claimed, "note", {"number": number}, who.mine)
    assert details(provenance.verify(claimed, trust)) == [
        "claims.jsonl: changed. It lacks claim 3, known when the run was signed."
    ]


def test_a_head_by_another_signer_or_of_another_claim_is_named(claimed, who):  # noqa: F811
    head = payload_of((claimed / "claims.head.json").read_bytes(), claims.HEAD_TYPE)
    mine = keys.public_key(who.mine_pub).pem.decode()
    for change in ({"signer": mine}, {"signer": mine, "count": 2}, {"signer": mine, "head_sha256": "0" * 64}):
        forged = seal({**head, **change}, claims.HEAD_TYPE, keys.private_key(who.mine))
        (claimed / "claims.head.json").write_bytes(forged)
        (found,) = details(check(claimed))
        assert found.startswith("claims.head.json: changed. Claim ")
        assert found.endswith("is not the one that it names.")


def test_a_head_that_lags_behind_is_well(claimed, who):  # noqa: F811
    """The head is written after the line: killed in between, the claims still hold, and go on."""
    before = (claimed / "claims.head.json").read_bytes()
    append(claimed, "note", {}, who.mine)
    (claimed / "claims.head.json").write_bytes(before)
    assert check(claimed) == []
    append(claimed, "note", {}, who.mine)
    assert len(read(claimed)) == 5


def test_nothing_is_added_to_claims_that_do_not_hold(claimed, who):  # noqa: F811
    written(claimed, lines_of(claimed)[1:])
    with pytest.raises(CheckError, match=r"nothing is added to claims that do not hold. claims.jsonl: changed. Line 1"):
        append(claimed, "note", {}, who.mine)
    with pytest.raises(CheckError, match=r"claims.jsonl: changed. Line 1"):
        read(claimed)
    done = cli("claims", "list", claimed)
    assert isinstance(done.exception, CheckError)
    assert done.exception.exit_code == 1


def test_two_who_write_at_once_break_the_chain_openly(claimed, who):  # noqa: F811
    """The same number twice: seen, not lost."""
    lines, head = lines_of(claimed), (claimed / "claims.head.json").read_bytes()
    append(claimed, "note", {"first": 1}, who.mine)
    one = lines_of(claimed)[-1]
    written(claimed, lines)
    (claimed / "claims.head.json").write_bytes(head)
    append(claimed, "note", {"second": 2}, who.mine)
    written(claimed, [*lines_of(claimed), one])
    assert any("Line 5 does not follow the one before it" in line for line in details(check(claimed)))


def test_a_revoked_run_exits_with_1(signed_run, who, tmp_path):  # noqa: F811
    run = copied(signed_run, tmp_path)
    append(run, "revocation", {"why": "trained on the test rows"}, who.mine)
    assert provenance.verify(run, Trust(key=who.mine_pub)) == []
    done = cli("verify", run, "--key", who.mine_pub)
    assert done.exit_code == 1
    assert 'REVOKED by claim 4: {"why": "trained on the test rows"}' in done.output


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"format": "stillroom-claim/2"}, {"kind": "praise"}, {"number": True}, {"number": "1"},
     {"created": 3}, {"created": "\x1b[31m"}, {"signer": "no key"}, {"signer": None},
     {"passport_sha256": []}, {"prev_sha256": {}}],
)  # fmt: skip
def test_a_signed_line_of_another_shape_is_no_claim(change, claimed, who):  # noqa: F811
    lines = lines_of(claimed)
    said = payload_of(lines[0], CLAIM_TYPE)
    written(claimed, [seal({**said, **change}, CLAIM_TYPE, keys.private_key(who.mine)), *lines[1:]])
    found = check(claimed)
    assert found
    assert all(str(mismatch).isprintable() for mismatch in found)
    assert "Line 1" in found[0].detail

"""verify() names every file that is not as it was sealed, and nothing that a file holds can stop it."""

import json
import os
import random
import shutil

import pytest
import rfc8785

from provenance_run import copied, sealed_run  # noqa: F401
from stillroom import provenance
from stillroom.errors import FolderError
from stillroom.files import read_json, write_json
from stillroom.provenance import Mismatch


def files(run):
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def grown(path):
    path.write_bytes(path.read_bytes() + b"\n")


def removed(path):
    path.unlink()


def renamed(path):
    path.rename(path.with_name(path.name + ".moved"))


def linked(path):
    outside = path.with_name(path.name + ".tmp")
    path.rename(outside)
    path.symlink_to(outside)


EXPECTED = {
    flipped: {"changed"}, truncated: {"changed"}, emptied: {"changed"}, grown: {"changed"},
    removed: {"removed"}, renamed: {"renamed"}, linked: {"removed", "added"},
}  # fmt: skip


@pytest.mark.parametrize("damage", list(EXPECTED), ids=lambda f: f.__name__)
def test_every_damage_to_every_file_is_named(damage, sealed_run, tmp_path):  # noqa: F811
    """The tamper matrix: each file of the run, each damage, is found and named by path."""
    run = copied(sealed_run, tmp_path)
    names = files(run)
    assert len(names) > 15
    for name in names:
        before = (run / name).read_bytes()
        damage(run / name)
        found = {m.path: m for m in provenance.verify(run)}
        assert name in found, (name, found)
        if name == "manifest.json":
            assert found[name].what in ("changed", "removed", "added")
        else:
            assert found[name].what in EXPECTED[damage]
            others = {"README.md"} if name == "passport.json" else set()
            assert set(found) <= {name, *others}, "no other file is accused"
        for left in (run / name, (run / name).with_name(name.rpartition("/")[2] + ".moved")):
            left.unlink(missing_ok=True)
        (run / f"{name}.tmp").unlink(missing_ok=True)
        (run / name).write_bytes(before)
    assert provenance.verify(run) == []


def test_added_files_are_named_and_temporary_ones_are_not(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    (run / "student" / "half.safetensors.tmp").write_bytes(b"x")
    assert provenance.verify(run) == []
    (run / "new" / "deep").mkdir(parents=True)
    (run / "new" / "deep" / "payload.bin").write_bytes(b"x")
    (run / "student" / ".hidden").write_bytes(b"")
    assert [(m.path, m.what) for m in provenance.verify(run)] == [
        ("new/deep/payload.bin", "added"),
        ("student/.hidden", "added"),
    ]


def test_a_renamed_file_says_where_it_is(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    (run / "alone/model.safetensors").rename(run / "alone/weights.safetensors")
    (found,) = provenance.verify(run)
    assert found == Mismatch("alone/model.safetensors", "renamed", "It is alone/weights.safetensors now.")
    assert str(found) == "alone/model.safetensors: renamed. It is alone/weights.safetensors now."


def test_swapped_files_are_both_named(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    first, second = run / "alone/model.safetensors", run / "student/model.safetensors"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert {m.path for m in provenance.verify(run)} == {"alone/model.safetensors", "student/model.safetensors"}


@pytest.mark.parametrize(
    "name",
    ["student/model.safetensors", "student/student.json", "recording/manifest.json", "report/report.json",
     "exports/onnx-fp32/model.onnx", "exports/onnx-fp32/verify.json", "alone/student.json", "recipe.yaml", "README.md"],
)  # fmt: skip
def test_a_new_manifest_does_not_hide_a_change_from_the_passport(name, sealed_run, tmp_path):  # noqa: F811
    """Whoever changes a file and digests again has still not changed what the passport says."""
    run = copied(sealed_run, tmp_path)
    grown(run / name)
    provenance.write_manifest(run)
    assert [(m.path, m.what) for m in provenance.verify(run)] == [(name, "changed")]
    (run / name).unlink()
    provenance.write_manifest(run)
    assert [(m.path, m.what) for m in provenance.verify(run)] == [(name, "removed")]


@pytest.mark.parametrize("change", ["unknown field", "other licence", "not canonical", "missing"])
def test_a_changed_passport_with_a_new_manifest(change, sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    path = run / "passport.json"
    passport = json.loads(path.read_bytes())
    if change == "unknown field":
        path.write_bytes(rfc8785.dumps({**passport, "blessed": True}))
    elif change == "other licence":
        passport["teachers"][0]["licence"] = "MIT"
        path.write_bytes(rfc8785.dumps(passport))
    elif change == "not canonical":
        path.write_text(json.dumps(passport, indent=1))
    else:
        path.unlink()
    provenance.write_manifest(run)
    found = provenance.verify(run)
    assert found
    expected = "README.md" if change == "other licence" else "passport.json"
    assert {m.path for m in found} == {expected}


GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "nested": b"[" * 200_000 + b"]" * 200_000,
    "nested objects": b'{"files":' * 50_000,
    "a list": b"[1, 2]",
    "null": b"null",
    "a number of many digits": b"1" * 10_000,
    "NaN": b'{"format": NaN}',
    "a lone surrogate": b'{"format": "\\ud800", "files": {"\\ud800": {"sha256": "\\udfff", "bytes": 1}}}',
    "wrong types": b'{"format": "stillroom-manifest/1", "files": [1]}',
    "entries of wrong types": (
        b'{"format": "stillroom-manifest/1", "files": {"recipe.yaml": 3, "README.md": {"sha256": [], "bytes": {}},'
        b' "passport.json": null, "x": {"sha256": {"a": []}, "bytes": 1e999}}}'
    ),
    "paths outside": (
        b'{"format": "stillroom-manifest/1", "files": {"../../etc/passwd": {"sha256": "0", "bytes": 1},'
        b' "/etc/passwd": {"sha256": "0", "bytes": 1}, "": 1, "\\u0000": 2, "a\\nb": 3}}'
    ),
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", ["manifest.json", "passport.json"])
@pytest.mark.parametrize("garbage", list(GARBAGE))
def test_garbage_is_a_mismatch_of_one_line(name, garbage, sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    (run / name).write_bytes(GARBAGE[garbage])
    found = provenance.verify(run)
    if name == "passport.json":
        provenance.write_manifest(run)
        found += provenance.verify(run)
    else:
        (run / "passport.json").unlink()
        found += provenance.verify(run)
    assert name in {m.path for m in found} or garbage in ("entries of wrong types", "paths outside")
    assert found
    for mismatch in found:
        line = str(mismatch)
        assert line.isprintable()
        assert len(line) < 800
        line.encode()


@pytest.mark.parametrize("missing", ["manifest.json", "passport.json", "README.md"])
def test_a_missing_seal_is_named(missing, sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path, without=missing)
    assert [(m.path, m.what) for m in provenance.verify(run)] == [(missing, "removed")]


def test_an_empty_folder_is_not_sealed(tmp_path):
    assert {m.path for m in provenance.verify(tmp_path)} == {"manifest.json", "passport.json"}


def test_links_are_not_followed(sealed_run, tmp_path):  # noqa: F811
    """A link, in or out, is refused when sealing and named when verifying; what it leads to is not read."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    for make in (
        lambda run: (run / "link").symlink_to(outside),
        lambda run: (run / "link").symlink_to(outside / "secret"),
        lambda run: (run / "link").symlink_to(run / "recipe.yaml"),
        lambda run: (run / "link").symlink_to("nowhere"),
        lambda run: (run / "link").symlink_to(run),
        lambda run: os.mkfifo(run / "link"),
    ):
        place = tmp_path / "copy"
        place.mkdir()
        run = copied(sealed_run, place)
        make(run)
        (found,) = provenance.verify(run)
        assert (found.path, found.what) == ("link", "added")
        with pytest.raises(FolderError, match="link"):
            provenance.write_manifest(run)
        shutil.rmtree(place)


def test_a_linked_manifest_or_passport_is_not_read(sealed_run, tmp_path):  # noqa: F811
    run = copied(sealed_run, tmp_path)
    for name in ("manifest.json", "passport.json"):
        (run / name).rename(tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    assert {m.path for m in provenance.verify(run)} >= {"manifest.json", "passport.json"}


def mutated(value, draw):
    """One random change somewhere in plain JSON."""
    odd = [None, True, -1, 2**60, 1e308, "", "\ud800", "x" * 5000, [], {}, [[[]]], {"a": {"b": []}}, "../../x", 0.5]
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        change = draw.random()
        if change < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.25:
            return {**value, draw.choice(["extra", "\ud800", "", key + "\n"]): draw.choice(odd)}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        index = draw.randrange(len(value))
        if draw.random() < 0.2:
            return [*value, *value]
        return [*value[:index], mutated(value[index], draw), *value[index + 1 :]]
    return draw.choice(odd)


def encoded(value, draw):
    """Bytes of it: canonical where that is possible, so that later checks are reached too."""
    try:
        return rfc8785.dumps(value)
    except ValueError:
        return json.dumps(value).encode()


@pytest.mark.parametrize("name", ["passport.json", "manifest.json"])
def test_no_random_change_passes_or_crashes(name, sealed_run, tmp_path):  # noqa: F811
    """300 random changes of structure and 100 of bytes: each is a mismatch, none an exception."""
    run = copied(sealed_run, tmp_path)
    for part in ("recording", "seeds", "alone"):  # fewer files to digest each time
        shutil.rmtree(run / part)
    provenance.write(run)
    good = (run / name).read_bytes()
    content, draw = json.loads(good), random.Random(7)
    for step in range(400):
        if step < 300:
            value = mutated(content, draw)
            if value == content:
                continue
            changed = encoded(value, draw)
        else:
            raw = bytearray(good)
            for _ in range(draw.randint(1, 4)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            changed = bytes(raw)
        if changed == good:
            continue
        (run / name).write_bytes(changed)
        if name == "passport.json":  # as if its forger had sealed the run again
            manifest = read_json(run / "manifest.json")
            manifest["files"][name] = {"sha256": _sha(changed), "bytes": len(changed)}
            write_json(run / "manifest.json", manifest)
        found = provenance.verify(run)
        assert all(str(m).isprintable() for m in found)
        if name == "manifest.json" or not _only_unseen(changed, content):
            assert found, changed[:2000]


def _sha(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _only_unseen(changed, content):
    """True when what changed is a claim that only a signature could protect: valid, and not shown in the card."""
    try:
        value = json.loads(changed)
    except (ValueError, RecursionError):
        return False
    from stillroom.provenance.card import render

    return provenance.validate(value) == [] and render(value) == render(content)

"""Does a run still hold what its gate decided: the texts, the waivers, the parents, and what the student must carry?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.provenance.manifest import Mismatch
from stillroom.provenance.passport import PASSPORT, without_places
from stillroom.provenance.policy import POLICY
from stillroom.provenance.terms.gate import key_of, worst
from stillroom.provenance.terms.obligations import MOST_BYTES, NOTICE, RESTRICTIONS, place_of, unmet
from stillroom.provenance.terms.waivers import holds

Digests = Mapping[str, str | None]


def entries(passport: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The files that a passport names by digest for its terms: path and sha256."""
    for sha256 in dict.fromkeys(_texts(passport["teachers"])):
        yield {"path": f"terms/{sha256}.txt", "sha256": sha256}
    for waiver in passport["policy"]["waivers"]:
        yield {"path": _waiver(waiver), "sha256": waiver["sha256"]}
        yield {"path": _signer(waiver), "sha256": waiver["signer"]}
    for parent in passport["parents"]:
        yield {"path": parent["path"], "sha256": parent["passport_sha256"]}


def check(folder: Path, passport: Mapping[str, Any], digests: Digests) -> Iterator[Mismatch]:
    """What of the decision does not hold: another policy.json, a decision that its reasons do not bear, duties undone.

    ``digests``: of every sealed file; no other file is opened.
    """
    policy = passport["policy"]
    if policy["decision"] == "not-asked":
        if POLICY in digests:
            yield Mismatch(PASSPORT, "changed", "It says that the gate was not asked; policy.json is there.")
        return
    if not _same(folder, policy, digests):
        yield Mismatch(PASSPORT, "changed", "What it says of the gate's decision is not what policy.json says.")
    covered = {cover for waiver in policy["waivers"] for cover in waiver["covers"]}
    reasons = [r for r in policy["reasons"] if key_of(r["about"], r["terms"], r["condition"]) not in covered]
    if worst(reason["outcome"] for reason in reasons) != policy["decision"]:
        yield Mismatch(PASSPORT, "changed", f"Its reasons do not lead to its decision, {policy['decision']}.")
    for waiver in policy["waivers"]:
        # a file that is not the one of the passport has been named already
        if digests.get(_waiver(waiver)) == waiver["sha256"] and digests.get(_signer(waiver)) == waiver["signer"]:
            wrong = holds(_read(folder / _waiver(waiver)), _read(folder / _signer(waiver)), waiver)
            if wrong:
                yield Mismatch(_waiver(waiver), "changed", wrong)
    yield from _duties(folder, passport, digests)


def _waiver(waiver: Mapping[str, Any]) -> str:
    return f"terms/waiver-{waiver['sha256']}.json"


def _signer(waiver: Mapping[str, Any]) -> str:
    return f"terms/signer-{waiver['signer']}.pem"


def _duties(folder: Path, passport: Mapping[str, Any], digests: Digests) -> Iterator[Mismatch]:
    exports = {
        path.rpartition("/")[0] for path in digests if path.startswith("exports/") and path.endswith("/verify.json")
    }
    for shipped in ("student", *sorted(exports)):
        inside = {
            path.removeprefix(f"{shipped}/"): said for path, said in digests.items() if path.startswith(f"{shipped}/")
        }
        contents = {name: _read(folder / shipped / name) for name in (NOTICE, RESTRICTIONS) if name in inside}
        for duty in passport["policy"]["obligations"]:
            lacks = unmet(duty, passport["name"], contents, inside)
            if lacks:
                place = place_of(duty)
                path = f"{shipped}/{place}" if place else PASSPORT
                what = "changed" if path in digests else "removed"
                yield Mismatch(path, what, f"The terms {duty['terms']} ask for it. {lacks}")


def _same(folder: Path, policy: Mapping[str, Any], digests: Digests) -> bool:
    """Whether policy.json says the same, but for what has been done since."""
    if POLICY not in digests:
        return False
    said = without_places(json.loads(_read(folder / POLICY)))
    duties = [{**duty, "done": False} for duty in policy["obligations"]]
    return all(said[part] == value for part, value in {**policy, "obligations": duties}.items())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return b""


def _texts(teachers: list[Mapping[str, Any]]) -> Iterator[str]:
    for teacher in teachers:
        if teacher["terms"]["text_sha256"] is not None:
            yield teacher["terms"]["text_sha256"]
        yield from _texts(teacher["parts"])

"""The passport of a run: what a student learned from, the card rendered from it, and the manifest that seals both."""

from pathlib import Path

from stillroom.provenance.card import write_card
from stillroom.provenance.check import verify
from stillroom.provenance.manifest import Mismatch, write_manifest
from stillroom.provenance.passport import build, write_passport
from stillroom.provenance.policy import read_policy
from stillroom.provenance.schema import validate
from stillroom.provenance.terms import obligations

__all__ = ["Mismatch", "build", "validate", "verify", "write", "write_card", "write_manifest", "write_passport"]


def write(run_folder: str | Path) -> Path:
    """What the terms ask for, passport, model card and manifest of a run, in this order. Returns passport.json's path.

    Whoever adds files afterwards (a report page) calls ``write_manifest`` again, last. Raises what ``build`` raises.
    """
    policy = read_policy(Path(run_folder)) or {}
    obligations.apply(Path(run_folder), policy.get("obligations") or ())
    path = write_passport(run_folder)
    write_card(run_folder)
    write_manifest(run_folder)
    return path

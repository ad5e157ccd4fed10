"""The command line of passports: sign, verify, keygen, and the groups ``passport`` and ``claims``. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

passport = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Read, check, compare and export a passport: a run's folder, or a passport.json.",
)
claims = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What was found out about a sealed run later: audits, reproductions, revocations. Signed, and only added to.",
)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/digits")]
Passport = Annotated[Path, typer.Argument(metavar="PASSPORT", help="a run's folder, or a passport.json")]
PrivateKey = Annotated[Path, typer.Option("--key", "-k", help="your private key, in PEM (stillroom keygen makes one)")]
PublicKey = Annotated[Path | None, typer.Option("--key", "-k", help="the public key that must have signed, in PEM")]
Root = Annotated[Path | None, typer.Option("--certificate", help="root certificates that must vouch, in PEM")]
ClaimKeys = Annotated[list[Path] | None, typer.Option("--claims-key", help="a public key whose claims you believe")]
Head = Annotated[str | None, typer.Option("--claims-head", help="the sha256 of the last claim that you know of")]


def keygen(path: Annotated[Path, typer.Argument(metavar="KEY", help="where the private key goes: key.pem")]) -> None:
    """Make a pair of keys to sign with (P-256): KEY stays with you, NAME.pub.pem goes to those who verify.

    Example:  stillroom keygen key.pem
    """
    from stillroom.provenance.keys import generate

    private, public = generate(path)
    typer.echo(f"{private}: keep it to yourself.\n{public}: give it to those who verify.")


def sign(
    folder: RunFolder,
    key: PrivateKey,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="the key's certificate, then those up to the root, in PEM")
    ] = None,
) -> None:
    """Sign a sealed run: its files (OpenSSF model signing) and a statement of what it learned from (in-toto, SLSA).

    Both go to RUN/signature. A run that does not verify is not signed. Nothing is sent anywhere.

    Example:  stillroom sign runs/digits --key key.pem
    """
    from stillroom.provenance.signing import sign as sign_run

    signer = sign_run(folder, key, certificate)
    typer.echo(f"{folder / 'signature'}: signed with the key {signer.id[:16]}. To check it: stillroom verify {folder}")


def verify(
    folder: RunFolder,
    key: PublicKey = None,
    certificate: Root = None,
    claims_keys: ClaimKeys = None,
    claims_head: Head = None,
) -> None:
    """Name every file of a run that was changed, added, removed or renamed since it was sealed. Exit code 1 if any.

    With --key or --certificate, the run must be signed by it, and its claims by it or by a --claims-key. Exit code 1
    too when it is not, or when one of those claims revokes the run.

    Example:  stillroom verify runs/digits --key key.pub.pem
    """
    from stillroom import provenance
    from stillroom.provenance.reading import verified
    from stillroom.provenance.signed import Trust

    trust = Trust(key, certificate, tuple(claims_keys or ()), claims_head)
    found = provenance.verify(folder, trust)
    for mismatch in found:
        typer.echo(str(mismatch))
    if found:
        raise typer.Exit(1)
    lines, holds = verified(folder, trust)
    typer.echo("\n".join([f"{folder}: every file is as it was sealed.", *lines]))
    if not holds:
        raise typer.Exit(1)


@passport.command()
def show(path: Passport) -> None:
    """Tell what a student learned from, under which terms, and what is unknown.

    Example:  stillroom passport show runs/digits
    """
    from stillroom.provenance.reading import open_passport, told

    typer.echo("\n".join(told(open_passport(path))))


@passport.command()
def validate(path: Passport) -> None:
    """Check a passport by its JSON Schema: each problem on a line. Exit code 1 if any. Signatures: stillroom verify.

    Example:  stillroom passport validate runs/digits
    """
    from stillroom.provenance.reading import problems_of

    found = problems_of(path)
    typer.echo("\n".join(found) if found else f"{path}: a valid passport.")
    if found:
        raise typer.Exit(1)


@passport.command()
def diff(path: Passport, other: Passport) -> None:
    """Say where two passports differ, a line each. Exit code 1 if they do.

    Example:  stillroom passport diff runs/digits runs/digits-again
    """
    from stillroom.provenance.reading import differences, open_passport

    found = list(differences(open_passport(path), open_passport(other)))
    typer.echo("\n".join(found) if found else "The two say the same.")
    if found:
        raise typer.Exit(1)


@passport.command()
def export(
    path: Passport,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="cyclonedx, spdx3, hf-card or eu-summary")],
    version: Annotated[str | None, typer.Option("--version", help="of cyclonedx: 1.7 (default) or 1.6")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="eu-summary as JSON, not Markdown")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="a file outside of the run; default: print it")
    ] = None,
) -> None:
    """Write a passport in a format that others read; it is checked by that standard's own library first.

    What the passport does not know is unknown there too. Keep the file outside of the run, whose files are sealed.

    Example:  stillroom passport export runs/digits --to cyclonedx --out digits.cdx.json
    """
    from stillroom.files import write_bytes
    from stillroom.provenance.reading import exported, open_passport

    text = exported(open_passport(path), to, version, as_json)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(out, text.encode())
        typer.echo(f"{out}")


@claims.command("list")
def show_claims(folder: RunFolder) -> None:
    """One line for each claim: number, kind, when, by which key, sha256. Exit code 1 when they do not hold.

    Whether you believe the keys is another question: stillroom verify RUN --claims-key KEY.

    Example:  stillroom claims list runs/digits
    """
    from stillroom.provenance.claims import read

    typer.echo("\n".join(str(claim) for claim in read(folder)) or "No claims.")


@claims.command()
def add(
    folder: RunFolder,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="audit, reproduction, revocation or note")],
    body: Annotated[Path, typer.Argument(metavar="FILE", help="what the claim says: a JSON object")],
    key: PrivateKey,
) -> None:
    """Add a signed claim about a run as it is now. Keep the sha256 that it prints: it shows later that none was cut.

    Example:  stillroom claims add runs/digits audit audits/digits/audit.json --key key.pem
    """
    from stillroom.files import read_json
    from stillroom.provenance.claims import append

    typer.echo(f"{append(folder, kind, read_json(body), key)}")

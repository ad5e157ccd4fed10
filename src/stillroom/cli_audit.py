"""The command line of audits: ``stillroom audit teacher | transcript | power``. No logic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Test what a student learned from, with p-values that are exact.

    A result rejects independence, or reads "no evidence at power x". It never says that a student did not learn from a
    teacher, and it misses diluted and paraphrased use.
    """,
)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/digits")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs whose teachers are the candidates")]
Student = Annotated[Path | None, typer.Option(help="the student's folder; default: that of the (first) run")]
Folder = Annotated[Path | None, typer.Option("--folder", "-f", help="where the audit lies; default: audits/NAME")]
Key = Annotated[Path | None, typer.Option(help="a private key: the result is added to the run's claims, signed")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
Alpha = Annotated[float, typer.Option(help="the level: the chance of a false rejection")]
Seed = Annotated[int, typer.Option(help="of inputs and decoys; choose it before you look")]


@app.command()
def teacher(
    runs: Runs,
    student: Student = None,
    decoys: Annotated[int, typer.Option(help="m; p can reach 1/(m + 1). 0: compare only, no p-value")] = 39,
    mode: Annotated[str, typer.Option(help="soft: it may have learned from probabilities; hard: from labels")] = "soft",
    rows: Annotated[int, typer.Option(help="declared and fresh inputs, of each so many")] = 1000,
    alpha: Alpha = 0.05,
    positives: Annotated[int, typer.Option(help="students made to measure the power of a non-rejection")] = 20,
    seed: Seed = 0,
    folder: Folder = None,
    key: Key = None,
    quiet: Quiet = False,
) -> None:
    """Does the student's likeness single out this teacher among decoys: its own recipe under other seeds?

    The teacher must be trained within its recipe, by a function with a parameter `seed`, or be a run's student. Several
    runs are several candidates, corrected by Holm. Refused: decoys of another recipe, and a teacher that is better,
    worse or surer than its decoys.

    Example:  stillroom audit teacher runs/digits --decoys 39
    """
    from stillroom.audits.teacher import Settings, audit_teachers

    settings = Settings(mode, decoys, rows, alpha, positives, seed)  # type: ignore[arg-type]
    place = folder or Path("audits") / runs[0].resolve().name
    _say(audit_teachers(runs, place, student, settings, progress=not quiet), runs, key)


@app.command()
def transcript(
    run: Run,
    student: Student = None,
    fresh: Annotated[int, typer.Option(help="K fresh transcripts; p can reach 1/(K + 1)")] = 99,
    alpha: Alpha = 0.05,
    positives: Annotated[int, typer.Option(help="students made to measure the power of a non-rejection")] = 10,
    seed: Seed = 0,
    folder: Folder = None,
    key: Key = None,
    quiet: Quiet = False,
) -> None:
    """Did the student learn from the very draws that the run recorded, or could fresh ones have taught it as well?

    For recordings of random draws (keep: sampled). Probabilities and likeliest labels have nothing to draw again.

    Example:  stillroom audit transcript runs/sampled --fresh 99
    """
    from stillroom.audits.transcript import Settings, audit_transcript

    place = folder or Path("audits") / f"{run.resolve().name}-transcript"
    settings = Settings(fresh, alpha, positives, seed)
    _say([audit_transcript(run, place, student, settings, progress=not quiet)], [run], key)


@app.command()
def power(
    effect: Annotated[float, typer.Option(help="from a pilot audit, in decoy standard deviations")] = 3.0,
    measured_on: Annotated[int, typer.Option(help="inputs of each set in the pilot")] = 1000,
    alpha: Alpha = 0.05,
    power: Annotated[float, typer.Option(help="the wanted share of positives found")] = 0.95,
    candidates: Annotated[int, typer.Option(help="how many teachers will be tested (Holm)")] = 1,
) -> None:
    """Plan an audit: how many decoys and inputs for a wanted level and power.

    Example:  stillroom audit power --effect 3 --power 0.95 --candidates 2
    """
    from stillroom.provenance.audit import design

    found = design(effect, measured_on=measured_on, alpha=alpha, power=power, candidates=candidates)
    typer.echo(found.text)


def _say(found: Sequence[Any], runs: Sequence[Path], key: Path | None) -> None:
    """Print what was found; with a key, append each result to the claims of its run."""
    for evidence, run in zip(found, runs, strict=True):
        typer.echo(evidence.text)
        if key is not None:
            from stillroom.provenance import claims

            typer.echo(f"claim {claims.append(run, 'audit', evidence.as_json(), key)}")

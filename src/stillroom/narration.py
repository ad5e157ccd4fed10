"""What a run says to the person at the terminal: checks, stages, scoreboard, artefacts and where everything lies."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillroom.checking import show
from stillroom.errors import CheckError, ParityError, UsageError
from stillroom.exporting import Exports, combinations
from stillroom.files import read_json
from stillroom.measures.artefacts import EXPORT_COLUMNS, chosen_int8, export_cells
from stillroom.provenance.manifest import MANIFEST
from stillroom.recipes.asked import MONEY, bill_line
from stillroom.recipes.gating import answer
from stillroom.run import Run

WIDTH = 120  # of the scoreboard, where there is no terminal to fit into
# soft_wrap: paths stay on one line, so that they can be copied
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)


def say(what: Any) -> None:
    """Print to standard output; what stands in brackets (a folder's name) is text, not markup."""
    console.print(what, markup=False)


def show_checks(run: Run) -> None:
    """Print the preflight; exit 1 when a check failed."""
    for part, pairs in run.shared.items():
        kept = run.recipe.data.duplicates == "allow"
        say(f"{len(pairs)} rows of {part} stand in test too: {'kept' if kept else 'left out'} (data.duplicates)")
    checks, estimate = run.check()
    say(show(checks, estimate))
    if not all(check.passed for check in checks):
        raise typer.Exit(CheckError.exit_code)


def ship(run: Run, to: str | None, precision: str | None, skip_unsupported: bool) -> None:
    """Export a run, print the table, and seal the run anew where it was sealed; exit 1 when an artefact failed."""
    if precision is not None and to is None:
        raise UsageError(f"--precision {precision} needs targets. Give --to, such as --to onnx.")
    wanted = None if to is None else combinations(_list(to), None if precision is None else _list(precision))
    made = run.export(wanted, skip_unsupported)
    show_exports(made)
    if (run.folder / MANIFEST).exists():
        run.seal()
        signed = (run.folder / "signature").exists()
        again = " Its signature is of the run as it was: sign it again." if signed else ""
        say(f"Passport, report and manifest of {run.folder} are written anew.{again}")
    if made.failures:
        raise typer.Exit(ParityError.exit_code)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def show_exports(made: Exports) -> None:
    """Print a line for each artefact from its verify.json, then what was chosen, the versions, and what failed."""
    if made.artifacts:
        table = Table(*EXPORT_COLUMNS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for artifact in made.artifacts:
            table.add_row(*export_cells(artifact.verify))
        say(table)
    for artifact in made.artifacts:
        if artifact.verify.get("unproven"):
            say(f"{artifact.target} {artifact.precision}: {artifact.verify['unproven']}")
        chosen = chosen_int8(artifact.verify)
        if chosen:
            say(f"{artifact.target} {artifact.precision} is {chosen}")
    for target, versions in {artifact.target: artifact.verify["versions"] for artifact in made.artifacts}.items():
        say(f"{target}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    for title, why in made.skipped.items():
        say(f"left out: {title}: {why}")
    for title, why in made.failures.items():
        say(f"FAILED: {title}: {why}")


def narrate(run: Run) -> None:
    """All stages in order, each announced; the scoreboard and the places at the end."""
    say(Text.assemble((run.recipe.name, "bold"), f"  {run.recipe.about}".rstrip()))
    _ = run.allowed  # a refusal ends here, with its reasons
    say(answer(run.question)[0][0])
    show_checks(run)
    run.record()
    run.fit()
    report = run.evaluate()
    made = run.export()
    run.seal()
    say(report.scoreboard())
    if (bill := run.folder / MONEY).is_file():
        say(bill_line(read_json(bill)))
    show_exports(made)
    say(Text(f"\nEverything lies in {run.folder}", "bold"))
    for name, about in _places(run):
        say(f"  {run.folder / name!s:<44} {about}")
    say(f"\nVerify it with:  stillroom verify {run.folder}")
    if made.failures:
        raise typer.Exit(ParityError.exit_code)


def _places(run: Run) -> list[tuple[str, str]]:
    places = [
        ("report/report.html", "the scoreboard, curves and disagreements: open it in a browser"),
        ("student", "the student: stillroom.load answers new inputs"),
        *((f"exports/{e.target}-{e.precision}", "what ships, with verify.json") for e in run.recipe.export),
        ("recording", "the teacher's answers"),
        ("passport.json", "what the student learned from"),
        ("README.md", "the model card"),
    ]
    return [(name, about) for name, about in places if (run.folder / name).exists()]

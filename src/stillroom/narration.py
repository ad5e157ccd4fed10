"""What a run says to the person at the terminal: checks, stages, scoreboard, artefacts and where everything lies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillroom.checking import show
from stillroom.errors import CheckError
from stillroom.exporting import Artifact
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
    for part, pairs in run.data["shared"].items():
        kept = run.recipe.data.duplicates == "allow"
        say(f"{len(pairs)} rows of {part} stand in test too: {'kept' if kept else 'left out'} (data.duplicates)")
    checks, estimate = run.check()
    say(show(checks, estimate))
    if not all(check.passed for check in checks):
        raise typer.Exit(CheckError.exit_code)


def show_exports(artifacts: Sequence[Artifact]) -> None:
    """Print one line for each artefact, from its verify.json."""
    table = Table("artefact", "bytes", "largest difference", "agreement", "quality", "latency, batch 1", box=None)
    for artifact in artifacts:
        said = artifact.verify
        quality, latency = said.get("quality"), said["latency"]
        table.add_row(
            f"{said['target']} {said['precision']}",
            f"{said['bytes']:,}",
            f"{said['largest_difference']:.2g}",
            f"{said['agreement']:.2%}" if said.get("agreement") is not None else "",
            f"{quality['metric']} {quality['value']:.4f} [{quality['low']:.4f}, {quality['high']:.4f}]"
            if quality
            else "",
            f"{latency['median_seconds'] * 1e6:.0f} us",
        )
    say(table)


def narrate(run: Run) -> None:
    """All stages in order, each announced; the scoreboard and the places at the end."""
    say(Text.assemble((run.recipe.name, "bold"), f"  {run.recipe.about}".rstrip()))
    _ = run.allowed  # a refusal ends here, with its reasons
    say(answer(run.question)[0][0])
    show_checks(run)
    run.record()
    run.fit()
    report = run.evaluate()
    artifacts = run.export()
    run.seal()
    say(report.scoreboard())
    if artifacts:
        show_exports(artifacts)
    say(Text(f"\nEverything lies in {run.folder}", "bold"))
    for name, about in _places(run):
        say(f"  {run.folder / name!s:<44} {about}")
    say(f"\nVerify it with:  stillroom verify {run.folder}")


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

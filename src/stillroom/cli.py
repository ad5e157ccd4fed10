"""The command line: one subcommand per stage, no logic. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom.cli_audit import app as audits
from stillroom.cli_passport import claims, keygen, passport, sign, verify
from stillroom.cli_serve import cascade, serve
from stillroom.cli_terms import app as terms
from stillroom.cli_terms import gate

if TYPE_CHECKING:
    from stillroom.run import Run

app = typer.Typer(
    name="stillroom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Distil a large model into a small one, measure what was kept, ship it, and prove what it learned from.

    Start with:  stillroom run examples/digits.yaml

    Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 conditions of a teacher's terms not met, 4 forbidden by them,
    5 a person must decide.
    """,
)
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML), or the folder of a run")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/digits")]
Folder = Annotated[Path | None, typer.Option("--folder", "-f", help="where the run lies; default: runs/NAME")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="override one setting of the recipe")
]
Files = Annotated[
    Path | None, typer.Option("--files", help="where the recipe's own files are looked up; default: beside the recipe")
]
To = Annotated[
    str | None, typer.Option("--to", metavar="TARGETS", help="onnx,openvino,...; a misspelt name lists what there is")
]
Precision = Annotated[
    str | None, typer.Option("--precision", "-p", metavar="PRECISIONS", help="fp32,int8,...: all that a target offers")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]


def _open(
    recipe: Path, folder: Path | None, overrides: list[str] | None, quiet: bool, files: Path | None = None
) -> Run:
    from stillroom.run import open_run

    return open_run(recipe, folder, tuple(overrides or ()), progress=not quiet, files=files)


@app.command()
def run(
    recipe: RecipeFile, folder: Folder = None, overrides: Set = None, files: Files = None, quiet: Quiet = False
) -> None:
    """Do all stages of a recipe in one folder: check, record, fit, evaluate, export, passport, report.

    A run that was interrupted goes on where it stopped; a folder that holds another recipe is refused.
    One setting of the recipe is changed by --set fit.learning_rate=1e-3, the place by --folder runs/other.

    Example:  stillroom run examples/digits.yaml
    """
    from stillroom.narration import narrate

    narrate(_open(recipe, folder, overrides, quiet, files))


@app.command()
def doctor(recipe: RecipeFile, folder: Folder = None, overrides: Set = None) -> None:
    """Check teacher, student and data before anything long starts, and estimate time, disk and memory.

    Exit code 1 when a check fails. Nothing is written, except that a paid endpoint's answers to a few examples, from
    which tokens and cost are estimated, are kept in its journal.

    Example:  stillroom doctor examples/digits.yaml
    """
    from stillroom.narration import show_checks
    from stillroom.run import open_run

    show_checks(open_run(recipe, folder, tuple(overrides or ()), claim=False))


@app.command()
def record(recipe: RecipeFile, folder: Folder = None, overrides: Set = None, quiet: Quiet = False) -> None:
    """Ask the teacher once about every example and keep its answers. Resumes.

    Example:  stillroom record examples/digits.yaml
    """
    from stillroom.narration import say

    found = _open(recipe, folder, overrides, quiet).record()
    say(f"{len(found)} answers in {found.folder}")


@app.command()
def fit(recipe: RecipeFile, folder: Folder = None, overrides: Set = None, quiet: Quiet = False) -> None:
    """Train the students, and their controls, from the recording. Resumes.

    Example:  stillroom fit examples/digits.yaml
    """
    from stillroom.narration import say

    opened = _open(recipe, folder, overrides, quiet)
    trained = opened.fit()
    say(f"{', '.join(f'{len(found)} x {role}' for role, found in trained.items() if found)} in {opened.folder}")


@app.command()
def evaluate(recipe: RecipeFile, folder: Folder = None, overrides: Set = None, quiet: Quiet = False) -> None:
    """Score teacher, student, control, baseline and untrained start on the test set.

    Example:  stillroom evaluate examples/digits.yaml
    """
    from stillroom.narration import say

    say(_open(recipe, folder, overrides, quiet).evaluate().scoreboard())


@app.command()
def export(
    recipe: RecipeFile,
    to: To = None,
    precision: Precision = None,
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="make the others where a target cannot take the student")
    ] = False,
    folder: Folder = None,
    overrides: Set = None,
    files: Files = None,
    quiet: Quiet = False,
) -> None:
    """Write the student for where it ships, and check each file on the whole test set in that target's own runtime.

    Every combination that a target offers among the precisions is made; without --precision each target's first,
    without --to the recipe's own list. What a target cannot take is said before any work (exit code 2). A file that
    differs from the student fails, is named at the end, and stops no other (exit code 1). A finished run gets its
    passport, report and manifest anew.

    Example:  stillroom export examples/digits.yaml
    """
    from stillroom.narration import ship

    ship(_open(recipe, folder, overrides, quiet, files), to, precision, skip_unsupported)


@app.command()
def replay(
    folder: RunFolder,
    count: Annotated[int, typer.Option("--count", "-n", help="observations asked of each artefact")] = 100_000,
    period: Annotated[
        float | None, typer.Option(help="seconds between two actions; marked in the figure; default: the task's")
    ] = None,
    starts: Annotated[int, typer.Option(help="of a control task: unseen starts that each drives from; 0: none")] = 20,
    files: Files = None,
    quiet: Quiet = False,
) -> None:
    """Ask every artefact of a run about recorded observations, one at a time, and report how long each answer took.

    The student in PyTorch and the teacher are asked too, a hundredth as often. Percentiles are printed; the histogram,
    with the control period marked, is in report/report.html. Times are reported, never judged. Of a control task, every
    artefact also drives in closed loop, beside the student in PyTorch.

    Example:  stillroom replay runs/ant --count 100000 --period 0.0165
    """
    from stillroom.narration import say
    from stillroom.replaying import replay_run, told

    opened = _open(folder, None, None, quiet, files)
    for part in told(replay_run(opened, count, period, starts)):
        say(part)
    say(f"The histogram is in {folder / 'report' / 'report.html'}")


@app.command()
def report(folder: RunFolder) -> None:
    """Write the passport, the model card, report.html and the manifest anew from a run's files.

    Example:  stillroom report runs/digits
    """
    from stillroom.narration import say
    from stillroom.run import seal

    say(f"{seal(folder)}")


@app.command()
def reproduce(
    folder: RunFolder,
    again: Annotated[Path | None, typer.Option("--folder", "-f", help="of the rerun; default: RUN-again")] = None,
    files: Annotated[Path, typer.Option("--files", help="where the recipe's own files are looked up")] = Path(),
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="compare with a run that is there; run nothing")
    ] = None,
    at_least: Annotated[str, typer.Option("--at-least", help="exit code 1 below this level")] = "R1",
    key: Annotated[Path | None, typer.Option(help="a private key: the result is added to the claims, signed")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a finished run's recipe again in a fresh process, and say how far the result is the same.

    R3: the same weights, bit for bit. R2: the same loss curve. R1: the metric within its interval. R0: only the recipe.
    Below R3 it says after which step the two part, and what was recorded of both and differs.

    Example:  stillroom reproduce runs/digits --files examples
    """
    from stillroom.narration import say
    from stillroom.provenance.reproduce import check_level, compare
    from stillroom.provenance.reproduce import reproduce as rerun

    check_level(at_least)
    place = again or folder.with_name(f"{folder.name}-again")
    result = compare(folder, against) if against else rerun(folder, place, files, quiet)
    say(str(result))
    if key is not None:
        from stillroom.provenance import claims

        say(f"claim {claims.append(folder, 'reproduction', result.describe(), key)}")
    if not result.reaches(at_least):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    Example:  stillroom schema > recipe.schema.json
    """
    import json

    from stillroom.recipes.recipe import Recipe

    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


app.command()(gate)
app.add_typer(terms, name="terms")
for command in (keygen, sign, verify, serve, cascade):
    app.command()(command)
app.add_typer(passport, name="passport")
app.add_typer(claims, name="claims")
app.add_typer(audits, name="audit")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors that a user can act on become one line and their exit code."""
    from stillroom.errors import StillroomError

    try:
        app(arguments)
    except StillroomError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if os.environ.get("STILLROOM_TRACEBACK"):
            raise
        what = " ".join(str(error).split()) or "no message"
        sys.stderr.write(f"error: {type(error).__name__}: {what} (STILLROOM_TRACEBACK=1 shows where)\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what was written is whole; the same command goes on from there.\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

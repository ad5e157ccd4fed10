"""The command line's part on terms: the table, the gate's answer, waivers. Heavy libraries are imported by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="What licences and providers say about training on outputs: rows, texts, waivers. No legal advice.",
    rich_markup_mode="markdown",
)
RowName = Annotated[str, typer.Argument(metavar="ID", help="a row's id or alias, such as Apache-2.0, gemma, llama3.1")]
Own = Annotated[Path | None, typer.Option("--table", help="a table of your own beside the shipped one")]


@app.command("list")
def show_rows(table: Own = None) -> None:
    """One line for each row: id, what outputs may do, and whether the text itself was read (primary).

    Example:  stillroom terms list
    """
    from stillroom.provenance.terms.table import lines, load_table

    found = load_table(table)
    for row, use, confidence, title in lines(found):
        typer.echo(f"{use:<12}{confidence:<11}{row:<50}{title}")
    typer.echo(f"{len(found.rows)} rows, version {found.version}. The table is no legal advice: read the texts.")


@app.command()
def show(row: RowName, table: Own = None) -> None:
    """A row as JSON: our paraphrase, the clauses, the conditions, the texts read and who read them.

    Example:  stillroom terms show gemma
    """
    from stillroom.provenance.terms.table import load_table

    typer.echo(load_table(table).get(row).model_dump_json(indent=2))


@app.command()
def check(
    text: Annotated[Path, typer.Argument(metavar="FILE", help="your copy of a licence or of terms")],
    row: Annotated[str | None, typer.Option("--row", help="the row that it should be the text of")] = None,
    table: Own = None,
) -> None:
    """Say which row of the table was read from this text. Exit code 1 when none was, or another than --row.

    Line breaks do not matter; any other word does.

    Example:  stillroom terms check LICENSE --row Apache-2.0
    """
    from stillroom.errors import MissingFileError
    from stillroom.provenance.terms.table import load_table
    from stillroom.provenance.terms.texts import file_digest, row_of

    if not text.is_file():
        raise MissingFileError(f"{text} does not exist. Name your copy of the terms.")
    known = load_table(table)
    wanted = known.get(row) if row else None
    found = row_of(text, known)
    typer.echo(f"{text}: sha256 {file_digest(text)}")
    if found is not None and (wanted is None or wanted.id == found.id):
        typer.echo(f"This is the text of {found.id} ({found.title}).")
        return
    other = f"It is the text of {found.id}." if found else "No row was read from this text; compare the clauses."
    typer.echo(f"{other} Expected: {wanted.id}." if wanted else other)
    raise typer.Exit(1)


@app.command()
def add(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="your own table; made where it is not")],
    row: Annotated[Path, typer.Argument(metavar="ROW", help="the row in YAML or JSON, as `terms show` prints one")],
    text: Annotated[Path | None, typer.Option("--text", help="the text that you read, for its digest")] = None,
) -> None:
    """Add a row of your own to a table beside your recipe, which names it with terms.table. Nothing is ever replaced.

    Example:  stillroom terms add my_terms.json row.yaml --text TERMS.txt
    """
    from datetime import UTC, datetime

    from stillroom.provenance.terms.table import add_row
    from stillroom.provenance.terms.texts import read_row

    today = datetime.now(UTC).date().isoformat()
    added = add_row(table, read_row(row, text, today), today)
    typer.echo(f"{table}: {added.id} added. Name the table in your recipe: terms: {{table: {table.name}}}")


@app.command()
def waive(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="where the waiver goes")],
    covers: Annotated[list[str], typer.Option("--covers", help="a reason, as `stillroom gate` prints it; repeatable")],
    key: Annotated[Path, typer.Option("--key", help="your private key: stillroom keygen")],
    who: Annotated[str, typer.Option("--who", help="who answers for it")],
    why: Annotated[str, typer.Option("--why", help="on what grounds, such as the number of a contract")],
    until: Annotated[str, typer.Option("--until", help="the last day on which it holds, at most a year from today")],
) -> None:
    """Sign a waiver: you answer for what the gate does not allow by itself. It stands in the passport by your name.

    The recipe names it (terms.waivers) and your public key (terms.signers). There is no other way past the gate.

    Example:  stillroom terms waive waiver.json --key key.pem --who "A. Person" --why "contract 17" --until 2027-01-31
    --covers "teacher gpt-4o / terms:openai-tou-2024-12-11 / no-competing-model"
    """
    from datetime import UTC, datetime

    from stillroom.provenance.terms.waivers import write_waiver

    write_waiver(out, key, who, why, until, covers, datetime.now(UTC).date())
    typer.echo(f"{out}: signed; it holds until {until}. Name it in your recipe: terms: {{waivers: [{out.name}]}}")


def gate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML), or the folder of a run")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="override one setting of the recipe")
    ] = None,
) -> None:
    """Say what the terms of a recipe's teachers, data and weights allow, and what the student must carry.

    Exit codes: 0 allowed, 3 conditions not met, 4 forbidden, 5 a person must decide. `run`, `record` and `fit` ask the
    same before anything else. What the recipe declares (terms: ...) counts; what nobody knows is never allowed.

    Example:  stillroom gate examples/digits.yaml
    """
    from stillroom.recipes.gating import answer
    from stillroom.run import open_run

    lines, code = answer(open_run(recipe, overrides=tuple(overrides or ()), claim=False).question)
    for line in lines:
        typer.echo(line)
    raise typer.Exit(code)

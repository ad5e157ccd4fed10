"""The command line of serving: ``stillroom serve RUN`` and ``stillroom cascade RUN``. No logic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/digits, or of a student")]
Risk = Annotated[float, typer.Option(help="the share of the student's kept answers that may be wrong")]
Sure = Annotated[float, typer.Option(help="the certainty with which the risk holds")]
Against = Annotated[
    str | None, typer.Option(help="what is wrong: another answer than the labels' (where there are) or the teacher's")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
Files = Annotated[Path | None, typer.Option("--files", help="where the recipe's own files are looked up")]


def serve(
    run: Run,
    artifact: Annotated[
        str | None, typer.Option(help="an export in place of the PyTorch student, such as exports/onnx-int8")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines ask: there is no password")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one")] = 8000,
    batch: Annotated[int, typer.Option(min=1, help="questions that are answered together, at most")] = 64,
    wait: Annotated[float, typer.Option(min=0, help="milliseconds that a question waits for others")] = 2.0,
    open_requests: Annotated[
        int, typer.Option("--open", min=1, help="requests at once; beyond that 503 with Retry-After")
    ] = 1024,
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
    cascade: Annotated[bool, typer.Option("--cascade", help="ask the teacher where the student is not sure")] = False,
    risk: Risk = 0.05,
    certainty: Sure = 0.95,
    against: Against = None,
    journal: Annotated[
        Path | None, typer.Option(help="where the teacher's answers are kept; default: RUN-journal.jsonl")
    ] = None,
    quiet: Quiet = False,
    files: Files = None,
) -> None:
    """Answer questions over HTTP with a run's student: POST /predict, documented at /docs; /health, /metrics.

    A language model gets OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models.

    Questions that come together are answered together. It listens on this machine only unless --host says otherwise,
    and on SIGTERM answers what is in flight before it ends. With --cascade the teacher is asked below a threshold of
    confidence (stillroom cascade), and its answers are kept in a journal that the next student can learn from.

    Example:  stillroom serve runs/digits --artifact exports/onnx-int8
    """
    import torch

    from stillroom.serving.server import serve as listen

    torch.set_num_threads(threads)
    gathered: dict[str, Any] = {"most": batch, "wait": wait / 1000, "open_requests": open_requests}
    choice = (risk, certainty, against, files, quiet) if cascade else None
    app, name = _application(run, artifact, gathered, choice, journal, files)

    def ready(address: str) -> None:
        typer.echo(f"serving {name} at {address} (its documentation: {address}/docs; end with Ctrl-C)")

    listen(app, host, port, ready)


def _application(
    run: Path, artifact: str | None, gathered: dict[str, Any], choice: Any, journal: Path | None, files: Path | None
) -> tuple[Any, str]:
    """The application of a run and its name."""
    from stillroom.errors import UsageError
    from stillroom.serving import opening
    from stillroom.serving.app import build_app
    from stillroom.serving.language import build_language_app

    if opening.is_language(run) and artifact is None:
        if choice is not None:
            raise UsageError("--cascade is for students with classes: a language model's answers have no confidence.")
        written = dataclasses.replace(opening.open_language(run, files), **gathered)
        return build_language_app(written), written.name
    served = dataclasses.replace(opening.open_serving(run, artifact, files), **gathered)
    if choice is not None:
        served = opening.with_teacher(served, run, _threshold(run, *choice)["threshold"], journal, files)
    return build_app(served), served.name


def cascade(
    run: Run,
    risk: Risk = 0.05,
    certainty: Sure = 0.95,
    against: Against = None,
    files: Files = None,
    quiet: Quiet = False,
) -> None:
    """Choose from which confidence on the student answers alone, and which questions still reach the teacher.

    The threshold is chosen on held-out rows so that, with the stated certainty, at most the stated share of the answers
    that the student keeps is wrong; quality and share are measured on other rows. Written to report/cascade.json, and
    drawn in report.html.

    Example:  stillroom cascade runs/digits --risk 0.05
    """
    _threshold(run, risk, certainty, against, files, quiet)


def _threshold(
    run: Path, risk: float, certainty: float, against: str | None, files: Path | None, quiet: bool
) -> dict[str, Any]:
    from stillroom.errors import UsageError
    from stillroom.serving.choosing import threshold_of, told

    if against not in (None, "labels", "teacher"):
        raise UsageError(f"--against {against} is unknown: choose labels or teacher.")
    found = threshold_of(run, risk, round(1 - certainty, 12), against, files, progress=not quiet)  # type: ignore[arg-type]
    typer.echo(told(found))
    return found

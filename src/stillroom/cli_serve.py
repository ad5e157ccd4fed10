"""The command line of serving: ``stillroom serve RUN``. No logic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/digits, or of a student")]
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
    files: Files = None,
) -> None:
    """Answer questions over HTTP with a run's student: POST /predict, documented at /docs; /health, /metrics.

    Questions that come together are answered together. It listens on this machine only unless --host says otherwise,
    and on SIGTERM answers what is in flight before it ends.

    Example:  stillroom serve runs/digits --artifact exports/onnx-int8
    """
    import torch

    from stillroom.serving.app import build_app
    from stillroom.serving.opening import open_serving
    from stillroom.serving.server import serve as listen

    torch.set_num_threads(threads)
    opened = open_serving(run, artifact, files)
    served = dataclasses.replace(opened, most=batch, wait=wait / 1000, open_requests=open_requests)

    def ready(address: str) -> None:
        typer.echo(f"serving {served.name} at {address} (its documentation: {address}/docs; end with Ctrl-C)")

    listen(build_app(served), host, port, ready)

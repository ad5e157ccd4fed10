"""What every server has: health, metrics, its documentation, and errors in one line."""

from collections.abc import Callable, Mapping
from typing import Any

from stillroom.errors import StillroomError
from stillroom.serving.counting import Counts
from stillroom.serving.door import RETRY
from stillroom.serving.page import page


class TeacherError(StillroomError):
    """The teacher could not be asked."""


def plain_routes(app: Any, counts: Counts, name: str, about: Mapping[str, Any]) -> None:
    """Add /health, /metrics, /docs and / to a FastAPI application."""
    from fastapi.responses import HTMLResponse, RedirectResponse, Response

    @app.get("/health", summary="Whether it answers, and what is served")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "name": name, **about}

    @app.get("/metrics", include_in_schema=False)
    async def metrics():
        content, kind = counts.text()
        return Response(content, media_type=kind)

    @app.get("/", include_in_schema=False)
    async def root():
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return HTMLResponse(page(name, app.openapi()))


def say_errors(app: Any, form: Callable[[str, int], Any] = lambda text, status: text) -> None:
    """One line for whatever is wrong with a request; ``form(text, status)`` makes it what clients read."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    def said(status: int, text: str, **headers: str) -> Any:
        return JSONResponse({"error": form(text, status)}, status, headers)

    async def unfit(_request: Any, error: Exception) -> Any:
        return said(422, "; ".join(_line(found) for found in error.errors()[:5]))  # type: ignore[attr-defined]

    async def unasked(_request: Any, error: Exception) -> Any:
        return said(503, str(error), **{"retry-after": str(RETRY)})

    async def known(_request: Any, error: Exception) -> Any:
        return said(422, str(error))

    async def unknown(_request: Any, error: Exception) -> Any:
        return said(500, "the student failed on this question; the server's log says why.")

    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(TeacherError, unasked)
    app.add_exception_handler(StillroomError, known)
    app.add_exception_handler(Exception, unknown)


def _line(found: Mapping[str, Any]) -> str:
    """'inputs.text: Field required'."""
    place = ".".join(str(part) for part in found["loc"] if part != "body")
    return f"{place}: {found['msg']}" if place else str(found["msg"])

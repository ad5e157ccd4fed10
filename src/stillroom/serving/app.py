"""The typed route of a student that is no language model: POST /predict, documented by its own columns.

Annotations are evaluated here, since FastAPI reads the question's model, which is made for each student.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pydantic import BaseModel, Field

from stillroom.errors import DataError, StillroomError, missing_extra
from stillroom.serving.batching import Batcher
from stillroom.serving.counting import Counts
from stillroom.serving.door import RETRY, Door
from stillroom.serving.page import page
from stillroom.serving.questions import Raw, batch_of, question_model
from stillroom.types import Batch, Dense, Signal

PATHS = frozenset({"/predict", "/health", "/metrics", "/openapi.json", "/docs", "/"})


class Answer(BaseModel):
    """What a student says of one question. Fields that it does not give are null."""

    label: str | None = Field(None, description="the likeliest class")
    confidence: float | None = Field(None, description="its probability")
    probabilities: dict[str, float] | None = Field(None, description="of every class")
    values: list[Any] | None = Field(None, description="the numbers of a regression or an embedding")
    by: str = Field("student", description="who answered: student, or teacher where the student was not sure")


class Wrong(BaseModel):
    """Why a request was not answered."""

    error: str


class TeacherError(StillroomError):
    """The teacher could not be asked."""


@dataclass(frozen=True)
class Serving:
    """What is served: a model that answers batches, what its questions look like, and how they are gathered."""

    name: str
    model: Callable[[Batch], Signal]
    columns: Sequence[Raw]
    classes: Sequence[str] | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of /health
    most: int = 64
    wait: float = 0.002
    open_requests: int = 1024
    second: Any = None  # a cascade: (questions, answers of the student) -> answers; asked where ``unsure(answer)``

    def answers(self, questions: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The student's answers to checked questions."""
        return answers_of(self.model(batch_of(self.columns, questions)), self.classes)


def answers_of(said: Signal, classes: Sequence[str] | None, by: str = "student") -> list[Answer]:
    """A signal as answers, one for each example."""
    if said.values is not None:
        return [Answer(values=row, by=by) for row in said.values.tolist()]  # type: ignore[call-arg]
    logits = said.need_logits("serving")
    if not isinstance(logits, Dense):
        raise DataError("only answers with all logits can be served.")
    shares = logits.values.float().softmax(-1)
    names = list(classes) if classes else [str(number) for number in range(shares.shape[-1])]
    found = []
    for row in shares.tolist():
        best = max(range(len(row)), key=row.__getitem__)
        known = dict(zip(names, row, strict=True))
        found.append(Answer(label=names[best], confidence=row[best], probabilities=known, by=by))  # type: ignore[call-arg]
    return found


def build_app(serving: Serving) -> Any:
    """The ASGI application (extra ``serve``): /predict, /health, /metrics, /docs, /openapi.json.

    422: a question that does not fit, with the column and what is wrong. 503 with Retry-After: more requests are open
    than ``serving.open_requests``, or the teacher cannot be asked. 500 says nothing of the inside.
    """
    try:
        from fastapi import FastAPI
        from fastapi.responses import HTMLResponse, RedirectResponse, Response
    except ImportError as error:
        raise missing_extra("fastapi", "serve") from error
    counts, state = Counts(), {}
    asked = question_model(serving.columns)

    @asynccontextmanager
    async def life(app: Any):
        state["student"] = Batcher(serving.answers, serving.most, serving.wait, counts.batches.observe)
        if serving.second is not None:
            state["second"] = Batcher(serving.second.answers, serving.most, serving.wait)
        yield
        for batcher in state.values():
            await batcher.close()
        if serving.second is not None:
            serving.second.close()

    app = FastAPI(
        title=f"stillroom: {serving.name}",
        version=metadata.version("stillroom"),
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )

    async def predict(question):
        inputs = question.inputs.model_dump()
        answer = await state["student"].ask(inputs)
        if serving.second is not None and serving.second.unsure(answer):
            answer = await state["second"].ask(inputs)
        counts.answers.labels(answer.by).inc()
        return answer

    predict.__annotations__ = {"question": asked, "return": Answer}
    wrong: dict[int | str, dict[str, Any]] = {code: {"model": Wrong} for code in (413, 422, 503)}
    app.post("/predict", responses=wrong, summary="Ask the student one question")(predict)

    @app.get("/health", summary="Whether it answers, and what is served")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "name": serving.name, **serving.about}

    @app.get("/metrics", include_in_schema=False)
    async def metrics():
        content, kind = counts.text()
        return Response(content, media_type=kind)

    @app.get("/", include_in_schema=False)
    async def root():
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return HTMLResponse(page(serving.name, app.openapi()))

    say_errors(app)
    return Door(app, counts, PATHS, serving.open_requests)


def say_errors(app: Any) -> None:
    """One line for whatever is wrong with a request, in place of a list of lists."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    def said(status: int, text: str, **headers: str) -> Any:
        return JSONResponse({"error": text}, status, headers)

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

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

from stillroom.errors import DataError, missing_extra
from stillroom.serving.batching import Batcher
from stillroom.serving.counting import Counts
from stillroom.serving.door import Door
from stillroom.serving.questions import Raw, batch_of, question_model
from stillroom.serving.routes import plain_routes, say_errors
from stillroom.types import Batch, Dense, Signal

MEANS = {
    413: "the body is larger than 4 MiB",
    422: "the question does not fit: which column, and what is wrong with it",
    503: "too many requests are open, or the teacher cannot be asked: come again after Retry-After seconds",
}
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
    wrong: dict[int | str, dict[str, Any]] = {
        code: {"model": Wrong, "description": means} for code, means in MEANS.items()
    }
    app.post("/predict", responses=wrong, summary="Ask the student one question")(predict)

    plain_routes(app, counts, serving.name, serving.about)
    say_errors(app)
    return Door(app, counts, PATHS, serving.open_requests)

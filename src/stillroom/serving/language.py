"""The OpenAI-compatible routes of a language model: models, chat completions and completions, streamed or whole."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from stillroom.errors import UsageError, missing_extra
from stillroom.serving.batching import Batcher
from stillroom.serving.counting import Counts
from stillroom.serving.door import Door
from stillroom.serving.requests import MOST_TEXTS, ChatRequest, TextRequest
from stillroom.serving.routes import plain_routes, say_errors
from stillroom.serving.writer import Asked, Pieces, Text, Writer

PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json", "/docs", "/"}
)
END = object()


@dataclass(frozen=True)
class LanguageServing:
    """What is served: a writer under a name, and how its questions are gathered."""

    name: str
    writer: Writer
    about: Mapping[str, Any]
    most: int = 16
    wait: float = 0.005
    open_requests: int = 1024


@dataclass(frozen=True)
class _Kind:
    """How one of the two routes names its things."""

    object: str
    piece: str
    prefix: str

    def choice(self, index: int, text: str, why: str | None, streamed: bool) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": index, "finish_reason": why, "logprobs": None}
        if self.prefix == "cmpl":
            return {**shown, "text": text}
        return {**shown, "delta" if streamed else "message": {"role": "assistant", "content": text}}


CHAT = _Kind("chat.completion", "chat.completion.chunk", "chatcmpl")
TEXT = _Kind("text_completion", "text_completion", "cmpl")


def build_language_app(serving: LanguageServing) -> Any:
    """The ASGI application (extra ``serve``). Errors have the form that OpenAI's clients read."""
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise missing_extra("fastapi", "serve") from error
    counts, state = Counts(), {}
    writer = serving.writer

    @asynccontextmanager
    async def life(app: Any):
        state["batcher"] = Batcher(writer.answers, serving.most, serving.wait, counts.batches.observe)
        yield
        await state["batcher"].close()

    app = FastAPI(
        title=f"stillroom: {serving.name}",
        version=metadata.version("stillroom"),
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )

    async def answered(request: ChatRequest | TextRequest, prompts: Sequence[tuple[int, ...]], kind: _Kind) -> Any:
        asked = [_asked(writer, request, prompt, number) for number, prompt in enumerate(prompts)]
        counts.answers.labels("student").inc(len(asked))
        if request.stream:
            return _streamed(serving, state["batcher"], asked, request.counted, kind)
        texts = await asyncio.gather(*(state["batcher"].ask(one) for one in asked))
        choices = [kind.choice(n, text.text, text.why, False) for n, text in enumerate(texts)]
        return {**_head(serving, kind.object, kind), "choices": choices, "usage": _usage(asked, texts)}

    @app.post("/v1/chat/completions", summary="Go on with a conversation")
    async def chat(request: ChatRequest) -> Any:
        return await answered(request, [writer.chat([said.plain() for said in request.messages])], CHAT)

    @app.post("/v1/completions", summary="Go on with a text")
    async def complete(request: TextRequest) -> Any:
        return await answered(request, _prompts(writer, request.prompt), TEXT)

    @app.get("/v1/models", summary="What is served: one student")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(serving.name)]}

    @app.get("/v1/models/{name:path}", include_in_schema=False)
    async def model(name: str) -> dict[str, Any]:
        if name != serving.name:
            raise UsageError(f"{name!r} is not served here; {serving.name!r} is.")
        return _model(serving.name)

    plain_routes(app, counts, serving.name, serving.about)
    say_errors(app, _wrong)
    return Door(app, counts, PATHS, serving.open_requests)


def _wrong(text: str, status: int) -> dict[str, str]:
    return {"message": text, "type": "invalid_request_error" if status < 500 else "server_error"}


def _prompts(writer: Writer, given: str | list[int] | list[str]) -> list[tuple[int, ...]]:
    if isinstance(given, str):
        return [writer.prompt(given)]
    if not given or (isinstance(given[0], str) and len(given) > MOST_TEXTS):
        raise UsageError(f"prompt holds {len(given)} texts; ask for 1 to {MOST_TEXTS}.")
    if isinstance(given[0], str):
        return [writer.prompt(str(text)) for text in given]
    size = writer.net.get_output_embeddings().weight.shape[0]
    ids = tuple(int(token) for token in given)
    if not all(0 <= token < size for token in ids):
        raise UsageError(f"prompt holds ids outside 0 to {size - 1}.")
    return [ids]


def _asked(writer: Writer, request: ChatRequest | TextRequest, prompt: tuple[int, ...], number: int) -> Asked:
    # several prompts of one request do not share their draws
    seed = None if request.seed is None else request.seed + number
    most = writer.most(prompt, request.most)
    return Asked(prompt, most, request.temperature, request.top_p, seed, request.stops)


def _streamed(serving: LanguageServing, batcher: Batcher, asked: Sequence[Asked], counted: bool, kind: _Kind) -> Any:
    from fastapi.responses import StreamingResponse

    if len(asked) != 1:
        raise UsageError("stream: one prompt at a time is streamed.")
    return StreamingResponse(_events(serving, batcher, asked[0], counted, kind), media_type="text/event-stream")


async def _events(
    serving: LanguageServing, batcher: Batcher, asked: Asked, counted: bool, kind: _Kind
) -> AsyncIterator[str]:
    """Server-sent events: a piece of text as soon as it is certain, then why it ended, then [DONE]."""
    loop, coming = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def heard(token: int) -> None:
        loop.call_soon_threadsafe(coming.put_nowait, token)

    pieces, head = Pieces(serving.writer.tokenizer, asked.stops), _head(serving, kind.piece, kind)
    whole = loop.create_task(batcher.ask(replace(asked, heard=heard)))
    whole.add_done_callback(lambda _: coming.put_nowait(END))
    while (token := await coming.get()) is not END:
        if piece := pieces.add(token):
            yield _event({**head, "choices": [kind.choice(0, piece, None, True)]})
    text: Text = await whole
    yield _event({**head, "choices": [kind.choice(0, pieces.rest(text.text), text.why, True)]})
    if counted:
        yield _event({**head, "choices": [], "usage": _usage([asked], [text])})
    yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(serving: LanguageServing, what: str, kind: _Kind) -> dict[str, Any]:
    name = f"{kind.prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": what, "created": int(time.time()), "model": serving.name}


def _usage(asked: Sequence[Asked], texts: Sequence[Text]) -> dict[str, int]:
    read, written = sum(len(one.prompt) for one in asked), sum(text.tokens for text in texts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "stillroom"}

"""The OpenAI-compatible questions: what is read of them, and what is refused because it would change the answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TEXTS = 64  # prompts of one request
# accepted by the API and not served here; at these values they change nothing
UNCHANGED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class _Drawn(BaseModel):
    """What both kinds of request share. Unknown fields are left out of account, as clients send their own."""

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(None, description="any name: one student is served")
    temperature: float = Field(1.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, description="the same seed and request give the same text, whoever else asks")
    stop: str | list[str] | None = Field(None, description="the text ends before the first of these")
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _served(self) -> _Drawn:
        for name, value in (self.model_extra or {}).items():
            if name in UNCHANGED and value not in UNCHANGED[name]:
                raise ValueError(f"{name} is not served here: leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def counted(self) -> bool:
        """Whether the last piece of a stream tells the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Said(BaseModel):
    """One message."""

    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """The message with its content as one text."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


class ChatRequest(_Drawn):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello"}]}]}
    )
    messages: list[Said] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most(self) -> int | None:
        """The tokens asked for at most."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Drawn):
    """POST /v1/completions."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"prompt": "The wheat harvest"}]})
    prompt: str | list[int] | list[str] = Field(description="a text, several, or the ids of one")

    @property
    def most(self) -> int | None:
        """The tokens asked for at most."""
        return self.max_tokens

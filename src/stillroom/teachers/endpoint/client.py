"""One request to a server, and what its answer means: all that knows the ``openai`` client.

Retries are not the client's (``max_retries=0``): what to ask again, and when, is decided in one place, ``asking``. A
connection serves one request: a server that answers twice, or late, cannot answer the next question on it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stillroom.errors import UsageError, missing_extra
from stillroom.places import without_credentials
from stillroom.teachers.endpoint.keys import key_of
from stillroom.teachers.endpoint.said import parse

QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "quota_exceeded")
REFUSED = (400, 413, 422)  # of this one question: it is too long, or its content is not allowed
LATER = (408, 409, 425, 429)
SHOWN = 200  # characters of a server's own words in a message


class AskAgain(Exception):
    """No answer this time. ``after``: seconds that the server asks to wait; ``crowded``: it has too much to do."""

    def __init__(self, why: str, after: float | None = None, crowded: bool = False) -> None:
        super().__init__(why)
        self.after, self.crowded = after, crowded


class NeverAnswers(Exception):
    """The server refuses this question, whoever asks it how often."""


class Closed(Exception):
    """The server refuses everything: key, quota, address."""


@dataclass(frozen=True)
class Server:
    """Where to ask. ``url`` up to and with /v1; credentials in it are stripped. ``key``: the name of the environment
    variable that holds the key, or keyring:SERVICE/USER. ``name``: how the server is called in recordings and
    passports, by default its host.

    Raises UsageError for an address that is none, and for a key that would travel unencrypted to a public address.
    """

    url: str = field(repr=False)  # an address has no place in a run's folder
    key: str | None = field(default=None, repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        url = without_credentials(self.url).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"url={url!r} is no address of a server: write https://host/v1, or http://127.0.0.1:8080/v1."
            )
        if self.key is not None and parts.scheme == "http" and not _near(parts.hostname):
            raise UsageError(f"the key would travel unencrypted to {parts.hostname}: use https://.")
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "name", self.name or parts.hostname)


@dataclass(frozen=True)
class Reply:
    """What a server answered: a Said as plain JSON, and the headers by which it limits."""

    said: dict[str, Any]
    headers: Mapping[str, str]


class Client:
    """The open connection to a server. Use as ``async with``."""

    def __init__(self, server: Server, seconds: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise missing_extra("openai", "endpoint") from error
        self._library, self._seconds = openai, seconds
        self._key = key_of(server.key)
        http = openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not _near(urlsplit(server.url).hostname)
        )
        self._client = openai.AsyncOpenAI(
            base_url=server.url, api_key=self._key or "none", max_retries=0, timeout=seconds, http_client=http,
            default_headers={"Connection": "close"},
        )  # fmt: skip
        self._root = server.url.removesuffix("/v1")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, route: str, body: Mapping[str, Any]) -> Reply:
        """One attempt. Raises AskAgain, NeverAnswers or Closed.

        ``route``: chat, completions, or tokenize (which is no part of OpenAI's interface: llama.cpp and vLLM have it).
        """
        library = self._library
        try:
            async with asyncio.timeout(self._seconds):  # the client's own timeout begins anew with every byte
                content, headers = await self._sent(route, dict(body))
        except library.APIStatusError as error:
            raise self._refusal(error.response.status_code, error.response.text, error.response.headers) from None
        except (library.APITimeoutError, TimeoutError):
            raise AskAgain(f"no answer within {self._seconds:g} s", crowded=True) from None
        except (library.APIConnectionError, library.APIError, OSError) as error:
            raise AskAgain(self._scrubbed(str(error.__cause__ or error) or type(error).__name__)) from None
        return Reply(self._parsed(route, content), {name.lower(): value for name, value in headers.items()})

    async def _sent(self, route: str, body: dict[str, Any]) -> tuple[bytes, Mapping[str, str]]:
        if route == "tokenize":
            found = await self._client.post(f"{self._root}/tokenize", cast_to=object, body=body)
            return json.dumps(found).encode(), {}
        if route == "chat":
            create, asked = self._client.chat.completions.with_raw_response.create, "messages"
        else:
            create, asked = self._client.completions.with_raw_response.create, "prompt"
        model, prompt = body.pop("model"), body.pop(asked)
        answer: Any = await create(model=model, extra_body=body, **{asked: prompt})
        return answer.http_response.content, answer.http_response.headers

    def _parsed(self, route: str, content: bytes) -> dict[str, Any]:
        try:
            return parse(route, json.loads(content))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise AskAgain(f"the answer is not of the form of {route}: {self._scrubbed(str(error))}") from None

    def _refusal(self, status: int, text: str, headers: Mapping[str, str]) -> Exception:
        code, message = _error_in(text)
        said = self._scrubbed(f"{status}: {message}")
        if status in (401, 402, 403, 404) or (status == 429 and code in QUOTA):
            return Closed(said)
        if status in REFUSED:
            return NeverAnswers(said)
        return AskAgain(said, after_seconds(headers), crowded=status in LATER or status >= 500)

    def _scrubbed(self, text: str) -> str:
        """A server's own words, one line, never with the key."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:SHOWN]


def _error_in(text: str) -> tuple[str, str]:
    """Code and message of an error in OpenAI's form, or what there is."""
    try:
        error = json.loads(text)["error"]
        return str(error.get("code") or error.get("type") or ""), str(error.get("message") or error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", text


def after_seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds (a number; OpenAI's retry-after-ms first). None where there is none, or a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return None


def _near(host: str | None) -> bool:
    """On this machine or a private network, where servers have no certificates."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_private
    except ValueError:
        return False


def has_key(server: Server) -> bool:
    """Whether the key that is named is there: looked at, not read out."""
    return server.key is None or server.key.startswith("keyring:") or bool(os.environ.get(server.key))

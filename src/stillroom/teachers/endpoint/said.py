"""What a server said, as plain JSON: the same form for chat and completions, whoever the server is.

{"text", "finish", "id", "model", "input_tokens", "output_tokens", "tokens": [TOKEN ...], "prompt": [[text, log-prob]
...]} with TOKEN = [text, id or null, log-prob, [[text, id or null, log-prob] ...]], the likeliest at its place. A
question that the server refuses for good is kept as {"refused": why}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "token_id:"  # how vLLM writes a token as its number


def parse(route: str, answer: Any) -> dict[str, Any]:
    """A server's JSON as a Said. Raises ValueError, KeyError, TypeError, IndexError, AttributeError for others."""
    if route == "tokenize":
        return _pieces(answer)
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    text = choice["message"]["content"] if route == "chat" else choice["text"]
    if text is None and (choice["message"].get("refusal") or choice.get("finish_reason") == "content_filter"):
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"its text is {type(text).__name__}")
    finish = choice["finish_reason"]
    if not isinstance(finish, str):
        raise ValueError("it does not say why it ended")
    told = choice.get("logprobs") or {}
    return {
        "text": text,
        "finish": finish,
        "id": answer.get("id"),
        "model": answer.get("model"),
        "input_tokens": int(usage.get("prompt_tokens") or 0),
        "output_tokens": int(usage.get("completion_tokens") or 0),
        "tokens": _tokens(told),
        "prompt": _prompt(choice, told, int(usage.get("prompt_tokens") or 0)),
    }


def _tokens(told: Mapping[str, Any]) -> list[list[Any]]:
    """The tokens that were written: OpenAI's chat form (llama.cpp's for completions too), or the older one."""
    if told.get("content"):
        return [
            [each["token"], _id(each), float(each["logprob"]), [
                [one["token"], _id(one), -1e4 if one["logprob"] is None else float(one["logprob"])]
                for one in each.get("top_logprobs") or ()
            ]]
            for each in told["content"]
        ]  # fmt: skip
    tops = told.get("top_logprobs") or []
    if told.get("tokens") and len(tops) == len(told["tokens"]):
        return [
            [token, _id({"token": token}), float(value or 0.0), [
                [name, _id({"token": name}), float(one)] for name, one in (top or {}).items()
            ]]
            for token, value, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
        ]  # fmt: skip
    return []


def _prompt(choice: Mapping[str, Any], told: Mapping[str, Any], count: int) -> list[list[Any]]:
    """Text and log-probability of the prompt's own tokens, the first one's being null, in either of vLLM's forms."""
    if native := choice.get("prompt_logprobs"):
        return [_sent(place) for place in native]
    if told.get("token_logprobs") and told["token_logprobs"][0] is None:
        pairs = zip(told["tokens"], told["token_logprobs"], strict=True)
        return [[token, value] for token, value in pairs][: count or None]
    return []


def _sent(place: Mapping[str, Any] | None) -> list[Any]:
    """The token that stands in the prompt: vLLM names it first, the likeliest others after it."""
    if not place:
        return ["", None]
    first = next(iter(place.values()))
    return [str(first.get("decoded_token") or ""), float(first["logprob"])]


def _pieces(answer: Any) -> dict[str, Any]:
    """The texts of tokens: llama.cpp's {"tokens": [{"piece"}]} or vLLM's {"token_strs"}."""
    pieces = answer.get("token_strs") or [one["piece"] for one in answer["tokens"]]
    if not pieces:
        raise ValueError("no tokens")
    return {
        "pieces": [piece if isinstance(piece, str) else bytes(piece).decode("utf-8", "replace") for piece in pieces]
    }


def _id(token: Mapping[str, Any]) -> int | None:
    if isinstance(token.get("id"), int):
        return token["id"]
    name = str(token["token"])
    return int(name.removeprefix(MARK)) if name.startswith(MARK) else None

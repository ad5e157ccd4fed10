"""From the settings of a recipe to an Endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import UsageError, nearest
from stillroom.language.prompts import Prompt
from stillroom.teachers.endpoint.client import Server
from stillroom.teachers.endpoint.keys import check_name
from stillroom.teachers.endpoint.money import Price
from stillroom.teachers.endpoint.pace import Limits
from stillroom.teachers.endpoint.reading import Choice, Label, Reading, Score, Text, Tokens
from stillroom.teachers.endpoint.teacher import Endpoint

LONGEST = {"choice": 1, "label": 64, "text": 512, "tokens": 64, "score": 1}  # tokens of an answer


def endpoint(
    url: str,
    model: str,
    prompt: str,
    reads: str = "choice",
    *,
    system: str | None = None,
    words: Mapping[str, str] | None = None,
    prior: Mapping[str, float] | None = None,
    route: str = "chat",
    key: str | None = None,
    name: str = "",
    temperature: float | None = 0.0,
    max_tokens: int | None = None,
    top: int = 20,
    least: float = 0.01,
    schema: Mapping[str, Any] | None = None,
    field: str = "label",
    constrain: bool = True,
    vocabulary: int | None = None,
    length: int = 512,
    samples: int = 1,
    seed: int = 0,
    attempts: int = 3,
    extra: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    price: Mapping[str, Any] | None = None,
    budget: float | None = None,
    journal: str = "runs/journal.sqlite",
    licence: str = "unknown",
    classes: Sequence[str] | None = None,
    progress: bool = True,
) -> Endpoint:
    """Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, hosted): ``{use: endpoint, url, model, prompt}``.

    ``prompt``, ``system``: Jinja2 templates over the columns of an example. ``reads``: ``choice`` (class probabilities
    from the first token's top log-probs; ``prior``: what the model leans to, by class, is divided out), ``label`` (the
    class named in the answer; shares of ``samples`` draws), ``text``, ``tokens`` (log-probs of what was written; needs
    ``vocabulary``) or ``score`` (of the prompt itself; vLLM). ``schema``: JSON Schema of the answer; what does not
    satisfy it is asked again, ``attempts`` times in all, then set aside. ``key``: the name of an environment variable,
    or keyring:SERVICE/USER. ``extra``: further parameters of requests. ``limits``: see ``pace.Limits``; ``price``: see
    ``money.Price``; ``budget``: a hard stop, in the price's currency.

    Raises UsageError for settings that do not fit together.
    """
    _check(key, route, system, samples, attempts)
    _check_draws(samples, reads, temperature)
    names, kind = tuple(classes or ()), "completions" if reads == "score" else route
    longest = max_tokens if max_tokens is not None else LONGEST.get(reads)
    make: dict[str, Callable[[], Reading]] = {
        "choice": lambda: Choice(_words(names, words), top, least, _of_classes("prior", names, prior)),
        "label": lambda: Label(_words(names, words), schema, field, constrain),
        "text": lambda: Text(schema, constrain),
        "tokens": lambda: Tokens(_needed(vocabulary), longest or 1, top),
        "score": lambda: Score(length),
    }
    if reads not in make:
        raise UsageError(f"reads={reads!r}{nearest(reads, make)}")
    reading = make[reads]()
    return Endpoint(
        Server(url, key, name), model, Prompt(prompt, system), reading,
        _decoding(reading, temperature, longest, kind, extra),
        kind, samples, seed, attempts if reads in ("label", "text") else 1,  # type: ignore[arg-type]
        limits=_settings(Limits, limits, "limits"), price=_settings(Price, price, "price"), budget=budget,
        journal=Path(journal), classes=names or None, licence=licence, progress=progress,
    )  # fmt: skip


def _check(key: str | None, route: str, system: str | None, samples: int, attempts: int) -> None:
    if key is not None:
        check_name(key)
    if route not in ("chat", "completions") or (route == "completions" and system is not None):
        raise UsageError(f"route={route!r}: chat, or completions without a system text.")
    if samples < 1 or attempts < 1:
        raise UsageError(f"samples={samples} and attempts={attempts} must be 1 or more.")


def _check_draws(samples: int, reads: str, temperature: float | None) -> None:
    if samples > 1 and (reads != "label" or not temperature):
        raise UsageError(f"samples={samples} are draws: for reads: label at a temperature above 0 only.")


def _decoding(
    reading: Reading, temperature: float | None, longest: int | None, kind: str, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The parameters of a request: what the reading needs, what was asked for, and further ones."""
    decoding: dict[str, Any] = {} if temperature is None else {"temperature": float(temperature)}
    if longest is not None and "max_completion_tokens" not in (extra or {}):
        decoding["max_tokens"] = longest
    return {**decoding, **_for_route(reading.decoding(), kind), **(extra or {})}


def _for_route(decoding: dict[str, Any], route: str) -> dict[str, Any]:
    """/v1/completions takes the number of log-probabilities in ``logprobs``."""
    if route == "completions" and "top_logprobs" in decoding:
        return {**{k: v for k, v in decoding.items() if k != "top_logprobs"}, "logprobs": decoding["top_logprobs"]}
    return decoding


def _words(classes: Sequence[str], words: Mapping[str, str] | None) -> tuple[str, ...]:
    if not classes:
        raise UsageError("the data has no classes, so there is nothing to choose from: use reads: text.")
    found = _of_classes("words", classes, words)
    return tuple(classes) if found is None else tuple(map(str, found))


def _of_classes(what: str, classes: Sequence[str], given: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """What is given for each class, in their order. Raises UsageError for one too many or too few."""
    if given is None:
        return None
    for name in given:
        if name not in classes:
            raise UsageError(f"{what} names {name!r}, which is no class{nearest(str(name), classes)}")
    if lacking := [name for name in classes if name not in given]:
        raise UsageError(f"{what} has none for {', '.join(lacking[:6])}.")
    return tuple(given[name] for name in classes)


def _needed(vocabulary: int | None) -> int:
    if vocabulary is None:
        raise UsageError("reads: tokens needs vocabulary: how many ids the server's model has.")
    return vocabulary


def _settings(kind: Any, given: Mapping[str, Any] | None, what: str) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given or {}:
        if name not in known:
            raise UsageError(f"{what} has no {name!r}{nearest(name, known)}")
    return kind(**(given or {}))

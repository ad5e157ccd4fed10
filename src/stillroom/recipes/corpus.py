"""The texts of a recipe as rows of tokens, in the vocabulary that teacher, student and data share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.data import Packed, Table, pack
from stillroom.errors import DataError, UsageError
from stillroom.files import read_json, write_json
from stillroom.language.chat import Chat
from stillroom.recipes.recipe import Tokens
from stillroom.students.pruned import cut_vocabulary
from stillroom.teachers.causal import from_causal
from stillroom.teachers.networks import Network

SAMPLED = 64  # training texts on which the mass outside the kept ids is measured


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows by part (train, validation, test), and the teacher in their vocabulary."""

    teacher: Network
    parts: Mapping[str, Packed]
    vocabulary: Mapping[str, Any] | None  # what a cut kept and lost; None where it was not cut


def corpus_of(tables: Mapping[str, Table], teacher: Any, settings: Tokens, folder: Path | None) -> Corpus:
    """Tokenise every part. Training rows hold several documents; test and validation rows one each.

    ``settings.vocabulary``: the teacher is cut to the ids that the training texts need, so that recording, student and
    data speak one vocabulary. ``folder``: where rows are kept; None in memory.
    Raises UsageError for a teacher that is no language model, DataError for a missing column.
    """
    if getattr(teacher, "tokenizer", None) is None:
        raise UsageError("tokens: the teacher is no causal language model. Use {use: causal_lm, model: ...}.")
    if settings.chat is not None and settings.vocabulary is not None:
        raise UsageError("tokens: a vocabulary is cut to plain texts only; leave out chat or vocabulary.")
    cut = None
    if settings.vocabulary is not None:
        teacher, cut = _in_fewer_ids(tables["train"], teacher, settings, folder)
    chat = None if settings.chat is None else Chat(**settings.chat.model_dump())
    parts = {
        name: pack(
            _documents(table, settings),
            teacher.tokenizer,
            settings.length,
            None if folder is None else folder / name,
            chat=chat,
            together=name == "train",
            too_long=settings.too_long,
            name=table.name,
            licence=table.licence,
            source=table.source,
        )
        for name, table in tables.items()
    }
    return Corpus(teacher, parts, cut)


def _in_fewer_ids(
    train: Table, teacher: Network, settings: Tokens, folder: Path | None
) -> tuple[Network, Mapping[str, Any]]:
    """The teacher over the ids that the training texts need, and what that kept and lost (vocabulary.json)."""
    texts = dict(_documents(train, settings))
    kept = None if folder is None else folder / "vocabulary.json"
    known = kept is not None and kept.is_file()
    sample = None if known else pack(list(texts.items())[:SAMPLED], teacher.tokenizer, settings.length)
    made = cut_vocabulary(teacher.net, teacher.tokenizer, texts.values(), settings.vocabulary, examples=sample)
    record = read_json(kept) if known and kept is not None else made.record
    if kept is not None and not known:
        write_json(kept, record)
    before, after = teacher.identity, from_causal(made.net, made.tokenizer)
    # the same teacher, restricted: it keeps its name and origin, and says so
    identity = dataclasses.replace(
        after.identity,
        name=f"{before.name}, {len(made.tokenizer):,} ids",
        licence=before.licence,
        source=before.source,
        revision=before.revision,
        parts=(before,),
    )
    return dataclasses.replace(after, identity=identity), record


def _documents(table: Table, settings: Tokens) -> Iterable[tuple[str, Any]]:
    texts = table.column(settings.column)
    if not isinstance(texts, tuple):
        raise DataError(f"tokens: column {settings.column!r} holds numbers; name the column of texts (tokens.column).")
    pairs = zip(table.ids, texts, strict=True)
    return pairs if settings.chat is None else ((name, _messages(name, text)) for name, text in pairs)


def _messages(name: str, text: str) -> list[dict[str, Any]]:
    """A conversation from JSON: [{"role": "user", "content": "..."}, ...]."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"conversation {name!r} is not JSON ({error}).") from None
    if not isinstance(found, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
        raise DataError(f'conversation {name!r} is no list of messages {{"role": ..., "content": ...}}.')
    return found

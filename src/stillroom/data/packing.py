"""Texts and conversations into rows of tokens, in memory or in files that are read by memory map.

Labels are shifted here, once: nothing that comes later moves anything by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillroom.data.tokens import PADDING, Packed
from stillroom.digests import data_description, file_digest
from stillroom.errors import DataError, FolderError, MissingFileError, UsageError
from stillroom.files import read_json, write_json
from stillroom.language import boundaries, byte_lengths, tokenizer_digest
from stillroom.language.chat import Chat
from stillroom.progress import bar
from stillroom.types import UNLABELLED

FORMAT = "stillroom-tokens/1"
FILES = ("tokens", "labels", "documents")  # each int32 [N, T]
OPEN_ROWS = 32  # rows that a document may still be put into: few enough to stream, enough to leave little padding
TooLong = Literal["split", "refuse"]


def pack(
    documents: Iterable[str | tuple[str, Any]],
    tokenizer: Any,
    length: int = 512,
    folder: str | Path | None = None,
    *,
    chat: Chat | None = None,
    together: bool = True,
    too_long: TooLong = "split",
    name: str = "texts",
    licence: str = "unknown",
    source: str = "unknown",
    progress: bool = False,
) -> Packed:
    """Texts (or (id, text) pairs, or with ``chat`` (id, messages) pairs) as rows of ``length`` tokens.

    A pair (ids, which of them are learned) in place of a text is taken as it is, its marks included.

    ``together=False``: one document per row, under its own id: for intervals over documents. A document longer than
    a row is split into pieces that share no context (``too_long='split'``, counted in ``facts``), or refused.
    ``folder``: rows are written there as they come and read by memory map, so the corpus may be larger than memory;
    a folder that is complete is opened when it is of the same tokenizer and settings.

    Raises DataError, naming the document, for one without a token, too long, or of no known kind.
    """
    if length < 2:
        raise UsageError(f"length={length} cannot be used: a row needs 2 tokens or more.")
    settings = {
        "tokenizer": tokenizer_digest(tokenizer),
        "template": None if chat is None else chat.digest(tokenizer),
        "rendering": None if chat is None else chat.rendering(tokenizer),
        "length": length,
        "together": together,
        "too_long": too_long,
        "name": name,
        "licence": licence,
        "source": source,
    }
    about = {"byte_lengths": byte_lengths(tokenizer)}
    if folder is not None and (Path(folder) / "manifest.json").exists():
        return _opened(Path(folder), settings, about)
    encoded = _encoded(documents, tokenizer, chat, progress)
    rows = _Rows(length, boundaries(tokenizer)[1], together, too_long)
    if folder is None:
        return _in_memory(rows.fill(encoded), rows, settings, about)
    _write(Path(folder), rows.fill(encoded), rows, settings, about)
    return _opened(Path(folder), settings, about)


Encoded = tuple[str, list[int], list[bool]]  # id, ids, which of them count as labels
Piece = tuple[list[int], list[int]]  # tokens, labels
Row = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # id, tokens, labels, documents, each int32 [T]


def _encoded(documents: Iterable[Any], tokenizer: Any, chat: Chat | None, progress: bool) -> Iterator[Encoded]:
    begin, end = boundaries(tokenizer)
    unseen = {tokenizer.pad_token_id, begin, end}
    with bar("tokenise", 0, shown=progress) as step:
        for number, given in enumerate(documents):
            name, content = _named(number, given)
            if chat is not None:
                ids, counted = chat(tokenizer, content, name)
            elif isinstance(content, str):
                inner = tokenizer(content, add_special_tokens=False)["input_ids"]
                ids, counted = [begin, *inner, end], [False, *([True] * len(inner)), True]
                if all(token in unseen for token in inner):
                    raise DataError(f"document {name!r} holds no text (empty, or only padding). Leave it out.")
            elif isinstance(content, tuple):
                ids, counted = list(content[0]), list(content[1])
            else:
                raise DataError(
                    f"document {name!r} is {type(content).__name__}; give a text, or chat=Chat() for chats."
                )
            if len(ids) < 2 or not any(counted):
                raise DataError(f"document {name!r} has no token to predict. Leave it out.")
            yield name, ids, counted
            step(1)


def _named(number: int, given: Any) -> tuple[str, Any]:
    return (f"{number:08d}", given) if isinstance(given, str) else (str(given[0]), given[1])


class _Rows:
    """Documents into rows: first fit among a few open rows, in order, so that it is the same every time."""

    def __init__(self, length: int, filler: int, together: bool, too_long: TooLong) -> None:
        self.length, self.filler, self.together, self.too_long = length, filler, together, too_long
        self.documents = self.split = self.rows = self.held = 0

    def fill(self, encoded: Iterable[Encoded]) -> Iterator[Row]:
        """The rows, each as soon as it is full or enough others are open."""
        waiting: list[tuple[str, list[tuple[int, list[int], list[int]]], int]] = []  # id, pieces, room
        for name, ids, counted in encoded:
            number, self.documents = self.documents, self.documents + 1
            for piece_name, piece in self._pieces(name, ids, counted):
                size = len(piece[0])
                fits = (n for n, (_, _, room) in enumerate(waiting) if room >= size)
                at = next(fits, None) if self.together else None
                if at is None:
                    at = len(waiting)
                    waiting.append((piece_name, [], self.length))
                first, pieces, room = waiting[at]
                pieces.append((number, *piece))
                waiting[at] = (first, pieces, room - size)
                if room - size < 2 or not self.together:
                    yield self._row(*waiting.pop(at)[:2])
                elif len(waiting) > OPEN_ROWS:
                    yield self._row(*waiting.pop(0)[:2])
        for first, pieces, _ in waiting:
            yield self._row(first, pieces)

    def _pieces(self, name: str, ids: list[int], counted: list[bool]) -> Iterator[tuple[str, Piece]]:
        # the last token is a label only; a piece's last label is the first token of the next piece, so each is
        # predicted once
        labels = [token if counts else UNLABELLED for token, counts in zip(ids[1:], counted[1:], strict=True)]
        inputs = ids[:-1]
        if len(inputs) > self.length:
            if self.too_long == "refuse":
                raise DataError(
                    f"document {name!r} has {len(ids)} tokens, but a row holds {self.length}. Raise length, cut the "
                    "document, or allow too_long='split' (its pieces then share no context)."
                )
            self.split += 1
        for number, start in enumerate(range(0, len(inputs), self.length)):
            part = slice(start, start + self.length)
            yield name if number == 0 else f"{name}#{number + 1}", (inputs[part], labels[part])

    def _row(self, first: str, pieces: Sequence[tuple[int, list[int], list[int]]]) -> Row:
        tokens = np.full(self.length, self.filler, dtype=np.int32)
        labels = np.full(self.length, UNLABELLED, dtype=np.int32)
        documents = np.full(self.length, PADDING, dtype=np.int32)
        at = 0
        for number, inputs, wanted in pieces:
            part = slice(at, at + len(inputs))
            tokens[part], labels[part], documents[part] = inputs, wanted, number
            at += len(inputs)
        name = f"row {self.rows:08d}" if self.together else first
        self.rows += 1
        self.held += at
        return name, tokens, labels, documents

    def facts(self) -> dict[str, Any]:
        padding = 1 - self.held / (self.rows * self.length) if self.rows else 0.0
        return {"documents": self.documents, "split": self.split, "tokens": self.held, "padding": round(padding, 4)}


def _in_memory(found: Iterator[Row], rows: _Rows, settings: dict[str, Any], about: dict[str, Any]) -> Packed:
    every = list(found)
    if not every:
        raise DataError("there are no documents. Check the path, the split and the filter.")
    ids, *arrays = zip(*every, strict=True)
    tokens, labels, documents = (np.stack(column) for column in arrays)
    kept = {key: settings[key] for key in ("tokenizer", "template", "name", "licence", "source")}
    return Packed(tokens, labels, documents, tuple(ids), **about, **kept, facts=rows.facts())


def _write(folder: Path, found: Iterator[Row], rows: _Rows, settings: dict[str, Any], about: dict[str, Any]) -> None:
    """Rows appended to three plain files of int32 [N, T]; the manifest, written last, makes them a corpus.

    It holds the digests that a training or recording asks for, so that these need not read a large corpus first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.i32", "wb")) for name in FILES]
        for name, *arrays in found:
            ids.append(name)
            for file, array in zip(files, arrays, strict=True):
                file.write(array.astype("<i4").tobytes())
    if not ids:
        raise DataError("there are no documents. Check the path, the split and the filter.")
    shown = None if rows.together else ids
    digests = {name: file_digest(folder / f"{name}.i32") for name in FILES}
    manifest = {"format": FORMAT, **settings, "rows": len(ids), "ids": shown, "facts": rows.facts(), "sha256": digests}
    known = data_description(_mapped(folder, manifest, about))
    manifest["described"] = {key: known[key] for key in ("digest", "labelled", "labels_digest")}
    write_json(folder / "manifest.json", manifest)


def _opened(folder: Path, settings: dict[str, Any], about: dict[str, Any]) -> Packed:
    manifest = read_json(folder / "manifest.json")
    different = [key for key, value in settings.items() if manifest.get(key) != value]
    if manifest.get("format") != FORMAT or different:
        raise FolderError(f"{folder} holds tokens of other settings ({', '.join(different)}). Choose another folder.")
    return _mapped(folder, manifest, about)


def _mapped(folder: Path, manifest: dict[str, Any], about: dict[str, Any]) -> Packed:
    shape = (manifest["rows"], manifest["length"])
    arrays = {}
    for name in FILES:
        path = folder / f"{name}.i32"
        if not path.is_file() or path.stat().st_size != 4 * shape[0] * shape[1]:
            raise MissingFileError(f"{path} is missing or cut. Delete {folder} and pack again.")
        arrays[name] = np.memmap(path, dtype="<i4", mode="r", shape=shape)
    ids = manifest["ids"] or [f"row {number:08d}" for number in range(shape[0])]
    kept = {key: manifest[key] for key in ("tokenizer", "template", "name", "licence", "source", "facts")}
    return Packed(**arrays, ids=tuple(ids), **about, **kept, described=manifest.get("described"))

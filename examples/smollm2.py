"""The texts of smollm2.yaml: the Python language reference that ships inside every Python (pydoc's help topics)."""

import hashlib
import platform
import re
from pydoc_data.topics import topics
from typing import Literal

from stillroom.data import Table
from stillroom.errors import UsageError

SECTION = 1200  # characters after which a new document begins
SHORTEST = 200
SHARES = {"train": 0.75, "validation": 0.85, "test": 1.0}  # up to which share of the text, topic by topic


def reference(part: Literal["train", "validation", "test"], documents: int | None = None) -> Table:
    """One part of the reference, in documents of a few paragraphs: about 75 % of the text, 10 %, 15 %.

    ``documents``: the first so many of the part; None: all. Whole topics are in one part. The reference repeats itself:
    a paragraph that stood in an earlier document is left out everywhere, so no test paragraph was trained on.
    """
    if part not in SHARES:
        raise UsageError(f"part {part!r} is unknown: choose {', '.join(SHARES)}.")
    seen: set[str] = set()
    found = {topic: _documents(topic, text, seen) for topic, text in sorted(topics.items())}
    total = sum(len(body) for documents in found.values() for _, body in documents)
    chosen: list[tuple[str, str]] = []
    before = 0
    for topic in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if next(name for name, share in SHARES.items() if before < share * total) == part:
            chosen += found[topic]
        before += sum(len(body) for _, body in found[topic])
    chosen = chosen[:documents]
    return Table(
        {"text": tuple(body for _, body in chosen)},
        ids=tuple(name for name, _ in chosen),
        name=f"Python language reference, {part}",
        licence="PSF-2.0",
        source=f"pydoc_data.topics of Python {platform.python_version()}",
    )


def _documents(topic: str, text: str, seen: set[str]) -> list[tuple[str, str]]:
    found: list[str] = []
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        plain = " ".join(re.findall(r"\w+", paragraph.lower()))
        if plain and plain not in seen:
            seen.add(plain)
            paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) > SECTION:
            found.append("\n\n".join(paragraphs))
            paragraphs = []
    if sum(map(len, paragraphs)) > SHORTEST:
        found.append("\n\n".join(paragraphs))
    return [(f"{topic}/{number}", body) for number, body in enumerate(found)]

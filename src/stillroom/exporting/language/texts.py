"""Does the shipped tokenizer give the ids that the student learned? Real texts, and texts that are hard to cut."""

from __future__ import annotations

from typing import Any

from stillroom.exporting.artifact import Artifact
from stillroom.students.networks import Student
from stillroom.types import Examples

TEXTS = 64  # of the examples, at most
CHARACTERS = 4000  # of each
HARD = (
    "  two  spaces,\ttabs\t\tand\n\n\n newlines \r\n at   the end   ",
    "1 12 123 1234 12345, 3.14159; 1e-5 and 0x7F on 2024-12-31",
    "don't we'll I'M THEY'RE it's 'quoted' \"double\" (brackets) [x] {y} a_b-c/d\\e",
    "Grüße, façade, naïve, Ελληνικά, кириллица, עברית, العربية, हिन्दी, 日本語, 한국어, ไทย",
    "emoji 🙂🙂👩‍👩‍👧 and signs ©™€±∑√∞ ½ ² –— …",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # code\n",
    "a" * 50 + " " + "!" * 20 + " " * 30 + "end",
)


def compare_token_ids(student: Student, artifact: Artifact, examples: Examples) -> tuple[dict[str, Any], list[str]]:
    """What verify.json says of the tokenizer, and a sentence when one text has other ids.

    The texts are rows of the examples, decoded, each mark of the tokenizer between two words, its chat template where
    it has one, and the hard ones above. A runtime without a tokenizer is not asked: {"texts": 0}.
    """
    ask = getattr(artifact.run, "token_ids", None)
    if ask is None or student.tokenizer is None:
        return {"tokenizer": {"texts": 0, "different": 0}}, []
    texts, different = _texts(student.tokenizer, examples), []
    for text in texts:
        ours = student.tokenizer(text, add_special_tokens=False).input_ids
        theirs = list(ask(text))
        if ours != theirs:
            at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            different.append((text, ours[at : at + 4], theirs[at : at + 4]))
    said = {"tokenizer": {"texts": len(texts), "different": len(different)}}
    if not different:
        return said, []
    text, ours, theirs = different[0]
    return said, [
        f"its tokenizer gives {len(different)} of {len(texts)} texts other ids: {text[:60]!r} becomes {theirs} where "
        f"the student's gives {ours}"
    ]


def _texts(tokenizer: Any, examples: Examples) -> list[str]:
    count = min(len(examples), TEXTS)
    rows = [index * len(examples) // count for index in range(count)]
    tokens: Any = examples.batch(rows, None).inputs["tokens"]
    texts = [tokenizer.decode(row)[:CHARACTERS] for row in tokens.tolist()]
    texts += [f"one {token} two" for token in tokenizer.all_special_tokens]
    if getattr(tokenizer, "chat_template", None):
        talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "12 or 13."}]
        texts.append(tokenizer.apply_chat_template(talk, tokenize=False))
    return [text for text in (*texts, *HARD) if text]

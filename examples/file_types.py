"""Files of this Debian system for magika.yaml: which, of which package, what magika sees of each; a small student.

Nothing but regular files that dpkg lists is read. What is there differs between machines: ids are paths, and the run's
folder says which were used.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom import Table
from stillroom.errors import DataError
from stillroom.places import locate
from stillroom.provenance.audit.power import wilson
from stillroom.run import open_run
from stillroom.teachers.onnx import OnnxTeacher, from_onnx

MODEL = "package:magika/models/standard_v3_3"
LARGEST = 4 << 20  # bytes; a larger file is left out
BLOCK, HALF, PADDING = 4096, 1024, 256  # magika's own, as in its config.min.json
LEAST = 8  # bytes that it asks its model for
PER_PACKAGE = 12  # files of one ending from one package, at most: 23,000 manual pages would drown the rest
TEST = 0.3  # share of the source packages

# What a file's name says, where one ending means one type. Neither magika nor its answers were asked for it. Endings
# that mean several things (.h, .in, .m) are left unlabelled, and so is a file without one.
ENDINGS = {
    "bmp": "bmp", "c": "c", "cc": "cpp", "cpp": "cpp", "hpp": "cpp", "cmake": "cmake", "crt": "pem", "css":
    "css", "csv": "csv", "diff": "diff", "patch": "diff", "exe": "pebin", "gif": "gif", "go": "go", "gz":
    "gzip", "html": "html", "ico": "ico", "ini": "ini", "jar": "jar", "java": "java", "class": "javabytecode",
    "jpg": "jpeg", "js": "javascript", "json": "json", "lua": "lua", "m4": "m4", "md": "markdown", "pdf": "pdf",
    "pem": "pem", "php": "php", "pl": "perl", "pm": "perl", "png": "png", "po": "po", "ps": "postscript", "ps1":
    "powershell", "py": "python", "pyc": "pythonbytecode", "rb": "ruby", "rst": "rst", "sh": "shell", "so":
    "elf", "o": "elf", "debug": "elf", "sql": "sql", "svg": "svg", "tcl": "tcl", "toml": "toml", "ttf": "ttf",
    "txt": "txt", "whl": "zip", "xml": "xml", "xz": "xz", "yaml": "yaml", "yml": "yaml", "zip": "zip",
}  # fmt: skip


def content_types() -> tuple[str, ...]:
    """The order of magika's outputs, from its own configuration."""
    config = json.loads((Path(locate(MODEL).name) / "config.min.json").read_text())
    return tuple(config["target_labels_space"])


def files(part: Literal["train", "test"], classes: list[str], most: int = 20000) -> Table:
    """The files of one part, with a label where the name says one of ``classes``; the last of them is for all others.

    Parts share no source package, so the twins of a file that its package ships stand on one side; files of equal
    content are taken once.
    """
    rows = [(path, seen) for source, path, seen in _all() if (_share(source) < TEST) == (part == "test")][:most]
    if not rows:
        raise DataError("there are no files of Debian packages here (/var/lib/dpkg is missing or empty).")
    named = [ENDINGS.get(path.suffix[1:].lower(), "") for path, _ in rows]
    known = {name: number for number, name in enumerate(classes[:-1])}
    return Table(
        {"bytes": torch.stack([seen for _, seen in rows])},
        ids=tuple(str(path) for path, _ in rows),
        labels=torch.tensor([known.get(name, -100) for name in named]),
        classes=tuple(classes),
        name=f"files of this Debian system, {part}",
        source=f"Debian {Path('/etc/debian_version').read_text().strip()}, each package's own licence",
    )


@cache
def _all() -> tuple[tuple[str, Path, Tensor], ...]:
    """(source package, path, what magika sees) of every file that is used, in an order that does not follow names."""
    found: dict[bytes, tuple[str, Path, Tensor]] = {}
    for source, path in _chosen():
        try:
            content = path.read_bytes()
        except OSError:
            continue
        seen = features(content)
        if seen is not None:
            found.setdefault(hashlib.sha256(content).digest(), (source, path, seen))
    return tuple(found[digest] for digest in sorted(found))


def _chosen() -> Iterator[tuple[str, Path]]:
    """Regular files of packages, at most PER_PACKAGE of one ending each."""
    for package, source in sorted(_sources().items()):
        kinds: dict[str, list[Path]] = defaultdict(list)
        for path in _listed(package):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
                kinds[path.suffix.lower()].append(path)
        for paths in kinds.values():
            yield from ((source, path) for path in sorted(paths, key=_order)[:PER_PACKAGE])


def _sources() -> dict[str, str]:
    """Installed package -> source package, as dpkg knows them."""
    found = {}
    status = Path("/var/lib/dpkg/status")
    for entry in (status.read_text(errors="replace") if status.is_file() else "").split("\n\n"):
        field = dict(re.findall(r"^(Package|Source|Architecture|Status): (\S+)", entry, re.MULTILINE))
        if field.get("Package"):
            found[field["Package"]] = field.get("Source", field["Package"])
    return found


def _listed(package: str) -> list[Path]:
    lists = sorted(Path("/var/lib/dpkg/info").glob(f"{package}*.list"))
    exact = [path for path in lists if path.name in (f"{package}.list",) or path.name.startswith(f"{package}:")]
    return [Path(line) for path in exact for line in path.read_text().splitlines()]


def _order(path: Path) -> bytes:
    return hashlib.sha256(str(path).encode()).digest()


def _share(source: str) -> float:
    """A number from 0 to 1 that follows from the name."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") / 2**32


def features(content: bytes) -> Tensor | None:
    """What magika's model sees of a file: int16 [2048], bytes 0 to 255 of its beginning and end, 256 = padding.

    White space at both ends of the first and last block is left out (magika.py, _extract_features_from_seekable).
    None for a file that is too short to ask about.
    """
    if len(content) < LEAST:
        return None
    head, tail = content[:BLOCK].lstrip()[:HALF], content[-BLOCK:].rstrip()[-HALF:]
    if len(head) < LEAST:
        return None
    row = [*head, *[PADDING] * (HALF - len(head)), *[PADDING] * (HALF - len(tail)), *tail]
    return torch.tensor(row, dtype=torch.int16)


class GramNet(nn.Module):
    """bytes [B, 2048] -> logits [B, V], from the first ``head`` and the last ``tail`` bytes alone.

    Every two and every three bytes that follow each other are hashed into ``buckets`` embeddings; of either end their
    mean (how often) and largest (whether at all) count. The first FIRST bytes also count at their places, since a
    magic number is a matter of where it stands.
    """

    FIRST = 16

    def __init__(self, classes: int, head: int = 768, tail: int = 256, buckets: int = 8192, width: int = 16):
        super().__init__()
        self.head, self.tail, self.buckets = head, tail, buckets
        self.grams = nn.ModuleList(nn.Embedding(buckets, width) for _ in (2, 3))
        self.first = nn.Embedding(PADDING + 1, 8)
        self.answer = nn.Sequential(
            nn.Linear(8 * width + 8 * self.FIRST, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes)
        )
        for table in self.grams:
            assert isinstance(table, nn.EmbeddingBag | nn.Embedding)
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, bytes: Tensor) -> Tensor:
        places = bytes.long()
        found = [self.first(places[:, : self.FIRST]).flatten(1)]
        for end in (places[:, : self.head], places[:, -self.tail :]):
            two = end[:, :-1] * 257 + end[:, 1:]
            three = two[:, :-1] * 257 + end[:, 2:]
            for number, table in zip((two, three), self.grams, strict=True):
                gram = table(number * 40503 % 1000003 % self.buckets)
                found += [gram.mean(1), gram.amax(1)]
        return self.answer(torch.cat(found, -1))


def magika(classes: list[str]) -> OnnxTeacher:
    """magika, asked about its own inputs: all of ``classes`` but the last, and in the last the mass of all others."""
    return from_onnx(
        f"{MODEL}/model.onnx",
        gives="probabilities",
        classes=content_types(),
        only=classes[:-1],
        others=classes[-1],
        rows=256,
        name="magika standard_v3_3",
    )


def by_type(folder: str = "runs/magika", least: int = 15) -> Iterator[str]:
    """Lines of a table: how a run's student agrees with magika, by the type that magika says (``least`` test files).

    PYTHONPATH=examples python -c "import file_types; print(*file_types.by_type('runs/magika'), sep=chr(10))"
    """
    run = open_run(folder, claim=False, files=Path())
    rows, student = run.test, run.trained()["student"][0]
    parts = [rows.batch(range(at, min(at + 256, len(rows)))) for at in range(0, len(rows), 256)]
    models: list[Any] = [run.teacher, student.predict]
    truth, said = (torch.cat([model(part).logits.values.argmax(-1) for part in parts]) for model in models)
    yield "| magika says | files | the student says so too | what else it says most |"
    yield "|---|---|---|---|"
    for number in truth.bincount(minlength=len(rows.classes)).argsort(descending=True, stable=True).tolist():
        here = truth == number
        total, same = int(here.sum()), int((here & (said == number)).sum())
        if total < least:
            continue
        low, high = wilson(same, total)
        other = said[here & (said != number)]
        most = rows.classes[int(other.mode().values)] if len(other) else ""
        yield f"| {rows.classes[number]} | {total} | {same / total:.2f} ({low:.2f} to {high:.2f}) | {most} |"

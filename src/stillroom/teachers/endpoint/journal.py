"""The journal: every paid answer, on disk before it is used, and who is asking what right now. SQLite in WAL mode.

One row for each request, by its digest. A row is *leased* while a process asks, *answered* from then on, for good. A
lease holds until its time is over or its process is gone, so two processes on one journal share the work and neither
asks what the other has asked. Keys, headers and addresses are never written.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import rfc8785

from stillroom.digests import json_digest
from stillroom.errors import FolderError

VERSION = 1
WAIT = 60.0  # seconds for another process's transaction
MANY = 500  # digests in one question to SQLite
TABLE = """
CREATE TABLE IF NOT EXISTS answers (
  digest TEXT PRIMARY KEY,   -- of the request: see Request.digest
  teacher TEXT NOT NULL,     -- whose budget it counts to
  request TEXT NOT NULL,     -- canonical JSON
  answer TEXT,               -- JSON; null while it is only leased
  said_id TEXT,              -- the server's own name of the answer
  input_tokens INTEGER NOT NULL DEFAULT 0,
  output_tokens INTEGER NOT NULL DEFAULT 0,
  seconds REAL NOT NULL DEFAULT 0,
  owner TEXT,
  until REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_teacher ON answers (teacher);
CREATE INDEX IF NOT EXISTS by_said_id ON answers (said_id) WHERE said_id IS NOT NULL;
"""


@dataclass(frozen=True, eq=False)
class Request:
    """One question: who is asked (server and model), what, with which decoding parameters, and the number of the draw.

    ``body`` is what is sent: ``prompt`` (messages or a text) and ``decoding`` in one. ``teacher``: digest of the whole
    teacher, for budgets; no part of the request's own digest, so that another template shares equal questions.
    """

    server: str
    route: str
    model: str
    prompt: Mapping[str, Any]
    decoding: Mapping[str, Any]
    sample: int = 0
    teacher: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 over canonical JSON of all but ``teacher``."""
        return json_digest(self.described)

    @property
    def described(self) -> dict[str, Any]:
        """The request as the journal keeps it."""
        names = ("server", "route", "model", "prompt", "decoding", "sample")
        return {name: getattr(self, name) for name in names}

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"model": self.model, **self.prompt, **self.decoding}

    @property
    def characters(self) -> int:
        """Length of what is sent, for estimates of its tokens."""
        return len(json.dumps(self.prompt, ensure_ascii=False))


@dataclass(frozen=True)
class Totals:
    """What a teacher's answers in a journal cost so far. ``seconds``: summed over requests, waiting included."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


class Journal:
    """An opened journal. Give it up with ``close``. Raises FolderError for a file that is no journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}/{uuid.uuid4().hex}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # an answer that was paid survives a power cut
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN IMMEDIATE; {TABLE} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.DatabaseError as error:
            raise FolderError(f"{path} cannot be used as a journal ({error}). Name another file (journal).") from None
        if version not in (0, VERSION):
            raise FolderError(f"{path} is a journal of version {version}; this one knows {VERSION}. Name another file.")

    def close(self) -> None:
        self._db.close()

    def claim(self, asked: Sequence[Request], seconds: float, most: int) -> list[Request]:
        """Up to ``most`` of these that nobody has asked and nobody is asking: ours to ask for the next ``seconds``."""
        now, ours = time.time(), []
        with self._writing():
            for request in asked:
                if len(ours) == most:
                    break
                found = self._db.execute(
                    "SELECT answer, owner, until FROM answers WHERE digest = ?", (request.digest,)
                ).fetchone()
                if found is not None and (found[0] is not None or _held(found[1], found[2], now)):
                    continue
                self._db.execute(
                    "INSERT INTO answers (digest, teacher, request, owner, until) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (digest) DO UPDATE SET owner = excluded.owner, until = excluded.until",
                    (request.digest, request.teacher, _json(request.described), self.owner, now + seconds),
                )
                ours.append(request)
        return ours

    def renew(self, digest: str, seconds: float) -> None:
        """Hold a lease of ours for the next ``seconds``."""
        self._db.execute(
            "UPDATE answers SET until = ? WHERE digest = ? AND owner = ? AND answer IS NULL",
            (time.time() + seconds, digest, self.owner),
        )

    def settle(self, request: Request, answer: Mapping[str, Any], seconds: float) -> None:
        """Keep an answer, committed to disk before this returns. One that is there already stays."""
        known = (answer.get("id"), answer.get("input_tokens", 0), answer.get("output_tokens", 0), seconds)
        self._db.execute(
            "UPDATE answers SET answer = ?, said_id = ?, input_tokens = ?, output_tokens = ?, seconds = ?, "
            "owner = NULL, until = 0 WHERE digest = ? AND answer IS NULL",
            (json.dumps(answer, ensure_ascii=False), *known, request.digest),
        )

    def release(self, requests: Iterable[Request]) -> None:
        """Give up leases of ours that were not asked."""
        with self._writing():
            self._db.executemany(
                "DELETE FROM answers WHERE digest = ? AND owner = ? AND answer IS NULL",
                [(request.digest, self.owner) for request in requests],
            )

    def answers(self, digests: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The answers that are there, by the digest of their request."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(digests), MANY):
            some = digests[start : start + MANY]
            marks = ",".join("?" * len(some))
            rows = self._db.execute(
                f"SELECT digest, answer FROM answers WHERE answer IS NOT NULL AND digest IN ({marks})", some
            )
            found |= {digest: json.loads(answer) for digest, answer in rows}
        return found

    def unanswered(self, requests: Sequence[Request]) -> list[Request]:
        """Those that nobody has an answer to."""
        there: set[str] = set()
        for start in range(0, len(requests), MANY):
            some = [request.digest for request in requests[start : start + MANY]]
            marks = ",".join("?" * len(some))
            there |= {
                digest
                for (digest,) in self._db.execute(
                    f"SELECT digest FROM answers WHERE answer IS NOT NULL AND digest IN ({marks})", some
                )
            }
        return [request for request in requests if request.digest not in there]

    def knows(self, said_id: str, other_than: str) -> bool:
        """Whether an answer of this name was given to another request already."""
        found = self._db.execute(
            "SELECT 1 FROM answers WHERE said_id = ? AND digest != ? LIMIT 1", (said_id, other_than)
        )
        return found.fetchone() is not None

    def totals(self, teacher: str) -> Totals:
        """What all answers of a teacher cost so far, invalid ones too."""
        found = self._db.execute(
            "SELECT count(*), total(input_tokens), total(output_tokens), total(seconds) FROM answers "
            "WHERE teacher = ? AND answer IS NOT NULL",
            (teacher,),
        ).fetchone()
        return Totals(int(found[0]), int(found[1]), int(found[2]), float(found[3]))

    @contextmanager
    def _writing(self) -> Any:
        """One transaction that no other process writes into."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


@contextmanager
def opened(path: Path) -> Any:
    """A Journal for the length of a ``with``."""
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()


def _json(value: Any) -> str:
    return rfc8785.dumps(value).decode()


def _held(owner: str | None, until: float, now: float) -> bool:
    """Whether a lease still stands: its time is not over, and its process, where it can be seen from here, lives."""
    if owner is None or until <= now:
        return False
    host, pid, started, _ = owner.rsplit("/", 3)
    return host != socket.gethostname() or (_alive(int(pid)) and _started(int(pid)) == started)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot: a number that is used again is another process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"

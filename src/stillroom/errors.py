"""Every error that a user can act on. Each message says what was wrong, with the value, and what to do."""

from __future__ import annotations


class StillroomError(Exception):
    """The root of every error below. The command line prints it as one line; ``exit_code`` is what it returns."""

    exit_code = 2


class UsageError(StillroomError, ValueError):
    """A setting, name or argument that cannot be used."""


class MissingExtraError(StillroomError, ImportError):
    """An optional library is not installed; the message names the extra to install."""


class MissingFileError(StillroomError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class DataError(StillroomError, ValueError):
    """Examples, labels or masks that cannot be used; the message names the example."""


class SignalError(StillroomError, ValueError):
    """A model does not give what an objective, metric or recording needs, or gives something unusable."""


class ShapeError(StillroomError, ValueError):
    """Two tensors that must fit do not; the message shows both shapes."""


class PairError(StillroomError, ValueError):
    """Teacher, student, data or recording do not belong together; the message shows both sides."""


class RecordingError(StillroomError, ValueError):
    """A recording is damaged, incomplete, or lacks an answer; the message names the shard or the example."""


class FolderError(StillroomError, ValueError):
    """A folder already holds something else; nothing in it was touched."""


class ParityError(StillroomError, ValueError):
    """An exported artefact differs from its student beyond tolerance; the message names the worst examples."""

    exit_code = 1


class CheckError(StillroomError, ValueError):
    """A check (preflight, verify) failed."""

    exit_code = 1


class EndpointError(StillroomError, ConnectionError):
    """A server that is asked refuses (key, quota, address) or stays silent; what was answered is in the journal."""


class BudgetError(StillroomError, RuntimeError):
    """The next question could cost more than the recipe's budget leaves; what was answered is in the journal."""

    exit_code = 1


class ConditionsError(StillroomError, ValueError):
    """Conditions of the teacher's terms are not met; the message names them and how to meet them."""

    exit_code = 3


class ForbiddenError(StillroomError, ValueError):
    """The terms forbid it; the message names them and the clause."""

    exit_code = 4


class UndecidedError(StillroomError, ValueError):
    """What the terms allow is not known, or not declared: a person must decide."""

    exit_code = 5


def missing_extra(library: str, extra: str) -> MissingExtraError:
    """The error for an optional ``library``; raised by the one file that is named after it."""
    return MissingExtraError(f"{library} is not installed. Install it with: pip install 'stillroom[{extra}]'")


def nearest(name: str, known: object) -> str:
    """'; did you mean X?' when a known name is close to ``name``, else the known names."""
    import difflib

    names = [str(k) for k in known]  # type: ignore[attr-defined]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}." if names else "."

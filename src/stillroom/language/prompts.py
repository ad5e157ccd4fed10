"""Prompts: Jinja2 templates out of the recipe, in its sandbox, filled with the columns of one example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stillroom.digests import json_digest
from stillroom.errors import DataError, UsageError
from stillroom.types import Batch

SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


@dataclass(frozen=True)
class Prompt:
    """``user`` and ``system``: templates. They see the columns of the example, ``classes`` and ``words``; no label."""

    user: str
    system: str | None = None

    def __post_init__(self) -> None:
        for name, source in (("prompt", self.user), ("system", self.system or "")):
            try:
                SANDBOX.from_string(source)
            except TemplateError as error:
                raise UsageError(f"{name} is no Jinja2 template: {error}.") from None

    @property
    def digest(self) -> str:
        return json_digest({"user": self.user, "system": self.system})

    def fill(self, batch: Batch, row: int, known: Mapping[str, Any]) -> list[dict[str, str]]:
        """The messages for one example. Raises DataError for a name that no column has, UsageError for a break-out."""
        columns = {name: _plain(column, row) for name, column in batch.inputs.items()}
        parts = [("system", self.system), ("user", self.user)]
        try:
            return [
                {"role": role, "content": SANDBOX.from_string(source).render({**known, **columns})}
                for role, source in parts
                if source is not None
            ]
        except SecurityError as error:
            raise UsageError(f"the prompt's template does what its sandbox forbids: {error}.") from None
        except UndefinedError as error:
            has = ", ".join([*columns, *known])
            raise DataError(f"the prompt for example {batch.ids[row]!r}: {error}; the template has {has}.") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"the prompt for example {batch.ids[row]!r} cannot be written: {error}.") from None


def _plain(column: Any, row: int) -> Any:
    value = column[row]
    return value if isinstance(value, str) else value.tolist()

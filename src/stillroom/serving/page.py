"""The page at /docs: what can be asked, with an example that runs. One file, no other server is contacted.

FastAPI's own page loads its scripts from a stranger's network, so it is blank behind a firewall.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(name: str, schema: Mapping[str, Any]) -> str:
    """The documentation of an OpenAPI schema as HTML."""
    environment = Environment(
        loader=PackageLoader("stillroom.serving", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    routes = [
        _route(schema, path, verb, told) for path, verbs in schema["paths"].items() for verb, told in verbs.items()
    ]
    return environment.get_template("page.html.j2").render(name=name, routes=routes)


def _route(schema: Mapping[str, Any], path: str, verb: str, told: Mapping[str, Any]) -> dict[str, Any]:
    body = told.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    asked = _followed(schema, body) if body else None
    examples = (asked or {}).get("examples") or []
    return {
        "path": path,
        "verb": verb.upper(),
        "summary": told.get("summary", ""),
        "fields": [] if asked is None else _fields(schema, asked),
        "example": json.dumps(examples[0], ensure_ascii=False) if examples else "",
        "answers": [(code, said.get("description", "")) for code, said in told.get("responses", {}).items()],
    }


def _fields(schema: Mapping[str, Any], model: Mapping[str, Any], before: str = "") -> list[tuple[str, str, str]]:
    """(name, type, description) of every field, inner ones by their dotted names."""
    found = []
    for name, said in model.get("properties", {}).items():
        inner = _followed(schema, said)
        if inner.get("properties"):
            found += _fields(schema, inner, f"{before}{name}.")
        else:
            found.append((before + name, _type(inner), inner.get("description", "")))
    return found


def _type(said: Mapping[str, Any]) -> str:
    """'list of 64 (number)', 'string', 'string or null'."""
    if "anyOf" in said:
        return " or ".join(_type(one) for one in said["anyOf"])
    if said.get("type") == "array":
        size = said.get("minItems")
        return f"list of {size if size == said.get('maxItems') else 'any length'} ({_type(said.get('items', {}))})"
    return str(said.get("type", "any"))


def _followed(schema: Mapping[str, Any], said: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in said:
        said = schema["components"]["schemas"][said["$ref"].rpartition("/")[2]]
    return said

"""The reference of the API: its OpenAPI document, and a page that needs neither scripts nor the internet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from turret_server.web.bodies import Body

_TITLE = "Turret"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "code{background:#8882;padding:0 .2em}table{border-collapse:collapse}"
    "td,th{text-align:left;vertical-align:top;padding:.2em 1em .2em 0;border-bottom:1px solid #8884}"
)


@dataclass(frozen=True, slots=True)
class Operation:
    """A method on a path. The first line of the handler's docstring says what it does. One that streams reads
    a body of any size itself.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    body: type[Body] | None = None
    is_public: bool = False
    streams: bool = False

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").partition("\n")[0]


class Docs:
    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = tuple(operations)

    async def schema(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse(openapi(self._operations))

    async def page(self, request: Request) -> Response:  # noqa: ARG002
        return HTMLResponse(_page(self._operations), headers={"content-security-policy": _POLICY})


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def openapi(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI document."""
    bodies: list[type[BaseModel]] = [each.body for each in operations if each.body]
    references, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        path = each.path.replace(":path}", "}")
        described: dict[str, Any] = {
            "summary": each.summary,
            "operationId": each.handler.__qualname__.replace(".", "_"),
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in _parameters(path)
            ],
            "responses": {
                "200": {"description": "The answer."},
                "default": {"description": 'An error: {"error": {"message", "type", "param", "code"}}.'},
            },
        }
        if each.body:
            content = {"application/json": {"schema": references[each.body, "validation"]}}
            described["requestBody"] = {"required": True, "content": content}
        if each.streams:
            content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
            described["requestBody"] = {"required": True, "content": content}
        if each.is_public:
            described["security"] = []
        paths.setdefault(path, {})[each.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": version("turret")},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _parameters(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _page(operations: Sequence[Operation]) -> str:
    parts = [f"<h1>{_TITLE} {escape(version('turret'))}</h1>"]
    parts.append("<p>The same for programs: <a href='openapi.json'>openapi.json</a>.</p>")
    for each in operations:
        parts.append(f"<h2>{each.method} <code>{escape(each.path)}</code></h2><p>{escape(each.summary)}</p>")
        if each.body:
            parts.append(_table(each.body))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_TITLE}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>"
    )


def _table(body: type[Body]) -> str:
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field.annotation))}</td>"
        f"<td>{escape(field.description or '')}</td></tr>"
        for name, field in body.model_fields.items()
    ]
    rows += [
        f"<tr><td><code>{escape(name)}</code></td><td></td><td>Refused: {escape(why)}.</td></tr>"
        for name, (why, _) in sorted(body.refused.items())
    ]
    return f"<table>{''.join(rows)}</table>"


def _kind(annotation: Any) -> str:
    named = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
    return (named or str(annotation)).replace("typing.", "").replace("turret_server.web.", "")

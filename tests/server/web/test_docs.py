"""The reference of the API says of each operation what it takes, and who may call it."""

from __future__ import annotations

from html import escape
from importlib.metadata import version
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response

from turret_server.web.bodies import Body
from turret_server.web.docs import Docs, Operation, openapi


class ThingBody(Body):
    refused: ClassVar = {"colour": ("it has <none>", None)}

    text: str
    """What <it> says."""
    number: int | None = None


async def get(request: Request) -> Response:  # noqa: ARG001
    """Get a thing.

    Or not.
    """
    return Response()


async def put(request: Request) -> Response:  # noqa: ARG001
    """Make a <thing>."""
    return Response()


OPERATIONS = (
    Operation("GET", "/things/{name:path}", get),
    Operation("PUT", "/things/{name:path}", put, ThingBody),
    Operation("PUT", "/{one}/{two}", put, streams=True, is_public=True),
)
RESPONSES = {
    "200": {"description": "The answer."},
    "default": {"description": 'An error: {"error": {"message", "type", "param", "code"}}.'},
}


def parameter(name: str) -> dict[str, object]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def taking(kind: str, schema: dict[str, str]) -> dict[str, object]:
    return {"required": True, "content": {kind: {"schema": schema}}}


def test_the_document_has_every_operation():
    found = openapi(OPERATIONS)
    assert found["openapi"] == "3.1.0"
    assert found["info"] == {"title": "Turret", "version": version("turret")}
    assert found["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert found["security"] == [{"key": []}, {}]
    assert found["paths"] == {
        "/things/{name}": {
            "get": {
                "summary": "Get a thing.",
                "operationId": "get",
                "parameters": [parameter("name")],
                "responses": RESPONSES,
            },
            "put": {
                "summary": "Make a <thing>.",
                "operationId": "put",
                "parameters": [parameter("name")],
                "responses": RESPONSES,
                "requestBody": taking("application/json", {"$ref": "#/components/schemas/ThingBody"}),
            },
        },
        "/{one}/{two}": {
            "put": {
                "summary": "Make a <thing>.",
                "operationId": "put",
                "parameters": [parameter("one"), parameter("two")],
                "responses": RESPONSES,
                "requestBody": taking("application/octet-stream", {"type": "string", "format": "binary"}),
                "security": [],
            }
        },
    }
    schema = found["components"]["schemas"]["ThingBody"]
    assert (schema["required"], schema["properties"]["text"]["description"]) == (["text"], "What <it> says.")


async def test_the_page_says_the_same_without_scripts():
    response = await Docs(OPERATIONS).page(Request({"type": "http"}))
    assert response.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    page = response.body.decode()
    assert f"<h1>Turret {version('turret')}</h1>" in page
    assert page.count("<h2>") == len(OPERATIONS)
    assert "<h2>PUT <code>/things/{name:path}</code></h2><p>Make a &lt;thing&gt;.</p><table>" in page
    assert page.count("<table>") == 1
    for row in (
        "<td><code>text</code></td><td>str</td><td>What &lt;it&gt; says.</td>",
        "<td><code>number</code></td><td>int | None</td><td></td>",
        "<td><code>colour</code></td><td></td><td>Refused: it has &lt;none&gt;.</td>",
    ):
        assert f"<tr>{row}</tr>" in page


async def test_every_operation_of_the_server_is_in_its_own_reference(door):
    document = (await door.get("/openapi.json")).json()
    assert document["paths"]["/v1/adapters/{name}"].keys() == {"get", "put", "delete"}
    summaries = [each["summary"] for path in document["paths"].values() for each in path.values()]
    assert all(summaries)
    page = (await door.get("/docs")).text
    assert all(escape(summary) in page for summary in summaries)

"""What the server serves: models, their tokens, and how it is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turret_adapters.errors import AdapterNotFoundError
from turret_server.doors.caller import caller
from turret_server.doors.health import Health
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.adapter_info import AdapterInfo
from turret_server.lifecycle.administration import MAX_PAGE_SIZE, AdapterAdministration
from turret_server.serving.request import GenerationRequest
from turret_server.serving.tokens import TokenService
from turret_server.web.bodies import Body, TokenIds, parse
from turret_server.web.chat import ChatBody, Messages, Tools
from turret_server.web.logprobs import text_of
from turret_server.web.names import ModelNames

_OWNER = "turret"


class TokenizeBody(Body):
    """`prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    """Return the text of each token."""


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


class Models:
    def __init__(
        self, administration: AdapterAdministration, tokens: TokenService, names: ModelNames
    ) -> None:
        self._administration = administration
        self._tokens = tokens
        self._names = names

    async def list(self, request: Request) -> Response:  # noqa: ARG002
        """List the base and the adapters that the caller may use."""
        found, token = [self._base()], None
        while token != "":
            page = await self._administration.list(MAX_PAGE_SIZE, token or "", caller())
            found += [self._adapter(info) for info in page.adapters if info.revision]
            token = page.next_page_token
        return JSONResponse({"object": "list", "data": found})

    async def get(self, request: Request) -> Response:
        """Get the base or an adapter."""
        refs = self._names.adapters_of(request.path_params["model"])
        if not refs:
            return JSONResponse(self._base())
        name, _, revision = refs[0].name.partition("@")
        info = await self._administration.get(name, caller())
        known = (info.revision, *(each.revision for each in info.history))
        if revision and not any(each.startswith(revision) for each in known):
            raise AdapterNotFoundError(f"adapter {name!r} has no revision that begins with {revision[:64]!r}")
        return JSONResponse(self._adapter(info))

    async def tokenize(self, request: Request) -> Response:
        """Get the tokens of a text or a chat."""
        body = await parse(TokenizeBody, request)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", field="prompt")
        prompt = body.prompt if body.messages is None else _chat_of(body).chat()
        special = True if body.add_special_tokens is None else body.add_special_tokens
        wanted = GenerationRequest(
            prompt=prompt, adapters=self._names.adapters_of(body.model), add_special_tokens=special
        )
        found = await self._tokens.tokens(wanted, caller())
        answer = {
            "count": len(found.token_ids),
            "max_model_len": self._names.max_context,
            "tokens": found.token_ids,
            "token_strs": list(map(text_of, found.parts)) if body.return_token_strs else None,
        }
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        """Get the text of tokens."""
        body = await parse(DetokenizeBody, request)
        wanted = GenerationRequest(prompt=body.tokens, adapters=self._names.adapters_of(body.model))
        found = await self._tokens.tokens(wanted, caller())
        return JSONResponse({"prompt": found.text})

    def _base(self) -> dict[str, Any]:
        return {
            "id": self._names.base,
            "object": "model",
            "created": self._names.created,
            "owned_by": _OWNER,
            "root": self._names.base,
            "parent": None,
            "max_model_len": self._names.max_context,
        }

    def _adapter(self, info: AdapterInfo) -> dict[str, Any]:
        published = info.history[0] if info.history else None
        return {
            "id": info.name,
            "object": "model",
            "created": int(published.published_at) if published else self._names.created,
            "owned_by": _OWNER,
            "root": (published and published.source) or info.name,
            "parent": self._names.base,
            "revision": info.revision,
        }


def _chat_of(body: TokenizeBody) -> ChatBody:
    fields = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    return ChatBody.model_construct(**{name: getattr(body, name) for name in fields})


class Status:
    """What anybody may know of the server."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """Whether the server can take requests; 503 if not."""
        return Response(status_code=200 if self._health.is_serving else 503)

    async def ping(self, request: Request) -> Response:  # noqa: ARG002
        """Whether the process is alive; 503 means that it should be restarted."""
        return Response(status_code=200 if self._health.is_alive else 503)

    async def version(self, request: Request) -> Response:  # noqa: ARG002
        """Get the version of the server."""
        return JSONResponse({"version": version("turret")})

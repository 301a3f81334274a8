"""The HTTP door: every operation with its path, and the way to it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from turret_server.doors.caller import REQUEST_ID
from turret_server.doors.health import Health
from turret_server.doors.running import RunningCalls
from turret_server.lifecycle.administration import AdapterAdministration
from turret_server.serving.generation import GenerationService
from turret_server.serving.pooling import PoolingService
from turret_server.serving.tokens import TokenService
from turret_server.tenancy.auth import Authenticator
from turret_server.web.adapters import (
    Adapters,
    LoadLoraBody,
    RollbackBody,
    SourceBody,
    SplitBody,
    UnloadLoraBody,
)
from turret_server.web.chat import ChatBody, ChatCompletions
from turret_server.web.completions import CompletionBody, Completions
from turret_server.web.docs import Docs, Operation
from turret_server.web.gate import Gate
from turret_server.web.models import DetokenizeBody, Models, Status, TokenizeBody
from turret_server.web.names import ModelNames
from turret_server.web.pooling import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody, TextNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the door translates for."""

    generation: GenerationService
    tokens: TokenService
    pooling: PoolingService
    administration: AdapterAdministration
    health: Health
    names: ModelNames


def make_app(
    services: Services,
    authenticator: Authenticator,
    calls: RunningCalls,
    *,
    origins: tuple[str, ...] = (),
) -> ASGIApp:
    """The ASGI application. `calls` are counted in it; pages of `origins` may call it from a browser."""
    operations = _operations(services)
    docs = Docs(operations)
    operations += [
        Operation("GET", "/openapi.json", docs.schema, is_public=True),
        Operation("GET", "/docs", docs.page, is_public=True),
    ]
    routes = [Route(each.path, each.handler, methods=[each.method]) for each in operations]
    app: ASGIApp = Gate(
        Router(routes, redirect_slashes=False, default=_not_found),
        authenticator,
        calls,
        public=frozenset(each.path for each in operations if each.is_public),
        streamed=frozenset(each.path.rpartition("/")[2] for each in operations if each.streams),
        origins=origins,
    )
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    return app


def _operations(services: Services) -> list[Operation]:
    chat = ChatCompletions(services.generation, services.names)
    completions = Completions(services.generation, services.tokens, services.names)
    models = Models(services.administration, services.tokens, services.names)
    texts = TextNumbers(services.pooling, services.names)
    adapters, status = Adapters(services.administration), Status(services.health)
    return [
        Operation("POST", "/v1/chat/completions", chat.create, ChatBody),
        Operation("POST", "/v1/completions", completions.create, CompletionBody),
        Operation("POST", "/v1/embeddings", texts.embed, EmbeddingBody),
        Operation("POST", "/classify", texts.classify, ClassifyBody),
        Operation("POST", "/score", texts.score, ScoreBody),
        Operation("POST", "/v1/score", texts.score, ScoreBody),
        Operation("POST", "/rerank", texts.rerank, RerankBody),
        Operation("POST", "/v1/rerank", texts.rerank, RerankBody),
        Operation("POST", "/v2/rerank", texts.rerank, RerankBody),
        Operation("GET", "/v1/models", models.list),
        Operation("GET", "/v1/models/{model:path}", models.get),
        Operation("POST", "/tokenize", models.tokenize, TokenizeBody),
        Operation("POST", "/detokenize", models.detokenize, DetokenizeBody),
        Operation("GET", "/v1/adapters", adapters.list),
        Operation("GET", "/v1/adapters/{name}", adapters.get),
        Operation("PUT", "/v1/adapters/{name}", adapters.load, SourceBody),
        Operation("DELETE", "/v1/adapters/{name}", adapters.unload),
        Operation("PUT", "/v1/adapters/{name}/archive", adapters.upload, streams=True),
        Operation("GET", "/v1/adapters/{name}/revisions", adapters.revisions),
        Operation("POST", "/v1/adapters/{name}/rollback", adapters.rollback, RollbackBody),
        Operation("PUT", "/v1/adapters/{name}/split", adapters.split, SplitBody),
        Operation("DELETE", "/v1/adapters/{name}/split", adapters.unsplit),
        Operation("GET", "/v1/downloads", adapters.downloads),
        Operation("POST", "/v1/load_lora_adapter", adapters.load_lora, LoadLoraBody),
        Operation("POST", "/v1/unload_lora_adapter", adapters.unload_lora, UnloadLoraBody),
        Operation("GET", "/health", status.health, is_public=True),
        Operation("GET", "/ping", status.ping, is_public=True),
        Operation("GET", "/version", status.version, is_public=True),
    ]


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    raise HTTPException(
        404,
        f"{scope['method']} {scope['path'][:200]} is not served; /v1/chat/completions, /v1/completions, "
        "/v1/embeddings and /v1/models are, with /classify, /score, /v1/rerank, /tokenize, /detokenize and "
        "/v1/adapters; /docs lists all",
    )

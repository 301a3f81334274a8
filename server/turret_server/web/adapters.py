"""Administration of adapters: resources below /v1/adapters, and vLLM's two calls."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from turret_adapters.errors import AdapterNotFoundError
from turret_server.doors.caller import caller
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterRevision
from turret_server.lifecycle.administration import AdapterAdministration
from turret_server.web.bodies import Body, Int32, parse


class SourceBody(Body):
    source: str
    """A folder of the server, or a URL."""


class RollbackBody(Body):
    revision: str | None = None
    """An earlier revision, at least its first 8 digits. Default: the one before the current."""


class SplitBody(Body):
    revision: str
    """Another revision of the history, at least its first 8 digits."""
    percent: Int32
    """The share of the requests that it gets, from 1 to 100."""


class LoadLoraBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    """Replace the adapter that has the name."""
    base_model_name: str | None = None


class UnloadLoraBody(Body):
    lora_name: str
    lora_int_id: Int32 | None = None


class Adapters:
    def __init__(self, administration: AdapterAdministration) -> None:
        self._administration = administration

    async def list(self, request: Request) -> Response:
        """List the adapters that the caller may use, in pages."""
        size = request.query_params.get("page_size", "0")
        if not (size.isascii() and size.isdigit() and len(size) < 10):
            raise InvalidRequestError(f"page_size is a number; found {size[:50]!r}", field="page_size")
        page = await self._administration.list(
            int(size), request.query_params.get("page_token", ""), caller()
        )
        return JSONResponse(
            {
                "adapters": [_as_json(info) for info in page.adapters],
                "next_page_token": page.next_page_token or None,
            }
        )

    async def get(self, request: Request) -> Response:
        """Get an adapter with the history of its revisions."""
        return _shown(await self._administration.get(_name(request), caller()))

    async def load(self, request: Request) -> Response:
        """Load an adapter from a source, in place of the one that has the name."""
        body = await parse(SourceBody, request)
        return _shown(await self._administration.load(_name(request), body.source, caller()))

    async def upload(self, request: Request) -> Response:
        """Load an adapter from the archive in the body, .zip or .tar.gz."""
        chunks = (chunk async for chunk in request.stream() if chunk)
        async with aclosing(chunks):
            return _shown(await self._administration.upload_archive(_name(request), chunks, caller()))

    async def unload(self, request: Request) -> Response:
        """Take a name away from new requests."""
        return _shown(await self._administration.unload(_name(request), caller()))

    async def rollback(self, request: Request) -> Response:
        """Serve an earlier revision."""
        body = await parse(RollbackBody, request) if await request.body() else RollbackBody()
        return _shown(await self._administration.rollback(_name(request), body.revision, caller()))

    async def split(self, request: Request) -> Response:
        """Send a share of the requests to another revision."""
        body = await parse(SplitBody, request)
        if body.percent == 0:
            raise InvalidRequestError("percent is from 1 to 100; DELETE ends the split", field="percent")
        info = await self._administration.split(_name(request), body.revision, body.percent, caller())
        return _shown(info)

    async def unsplit(self, request: Request) -> Response:
        """Send all requests to the current revision."""
        return _shown(await self._administration.split(_name(request), "", 0, caller()))

    async def revisions(self, request: Request) -> Response:
        """List the revisions of an adapter, newest first."""
        info = await self._administration.get(_name(request), caller())
        return JSONResponse({"revisions": list(map(_revision, info.history))})

    async def downloads(self, request: Request) -> Response:  # noqa: ARG002
        """List the adapters that are on their way from their sources."""
        found = [
            {"name": each.name, "done_bytes": each.num_done, "total_bytes": each.num_total}
            for each in self._administration.downloads(caller())
        ]
        return JSONResponse({"downloads": found})

    async def load_lora(self, request: Request) -> Response:
        """Load an adapter as vLLM does."""
        body = await parse(LoadLoraBody, request)
        if not body.load_inplace and await self._is_loaded(body.lora_name):
            raise InvalidRequestError(
                f"the adapter {body.lora_name[:128]!r} is loaded already; replace it with load_inplace: true",
                field="lora_name",
            )
        await self._administration.load(body.lora_name, body.lora_path, caller())
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_lora(self, request: Request) -> Response:
        """Unload an adapter as vLLM does."""
        body = await parse(UnloadLoraBody, request)
        await self._administration.unload(body.lora_name, caller())
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _is_loaded(self, name: str) -> bool:
        try:
            return bool((await self._administration.get(name, caller())).revision)
        except AdapterNotFoundError:
            return False


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _shown(info: AdapterInfo) -> Response:
    return JSONResponse(_as_json(info))


def _as_json(info: AdapterInfo) -> dict[str, Any]:
    return asdict(info) | {
        "state": info.state.value,
        "method": info.method.value if info.method else None,
        "split": {"revision": info.split.revision, "percent": info.split.percent} if info.split else None,
        "history": list(map(_revision, info.history)),
    }


def _revision(each: AdapterRevision) -> dict[str, Any]:
    return {"revision": each.revision, "source": each.source, "published_at": each.published_at}

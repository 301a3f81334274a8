"""From a call to a request of the engine: what generating and pinning have in common."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from turret.v1 import inference_pb2
from turret_adapters.registry import AdapterRegistry, Lease, Named
from turret_server import logs
from turret_server.engine.request import AdapterUse, Output, PromptPin, Request
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.lazy import LazyAdapters
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.threads import to_its_end
from turret_server.observability.usage_metrics import UsageMetrics
from turret_server.rpc.auth import caller
from turret_server.serving.text import TextCodec
from turret_server.serving.validation import (
    check_adapters,
    check_cache_salt,
    check_length,
    check_priority,
    check_routing_key,
    check_token_ids,
    sampling_params,
)
from turret_server.tenancy.access import check_use, errors_visible_to
from turret_server.tenancy.quotas import Charge, Quotas

# Revisions that are read from the store at once for requests that name them.
_MAX_READERS = 2

_PLACE_BYTES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What of the base model a request is checked against."""

    vocab_size: int
    max_context: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that may be submitted; what comes of it arrives in `outputs`. Whoever submits it sets
    `charge.begun`.
    """

    request: Request | PromptPin
    charge: Charge
    lease: Lease
    outputs: asyncio.Queue[Output]


class RequestFactory:
    """Checks what a call asks for and makes a request of it, each with an id of its own."""

    def __init__(
        self,
        *,
        registry: AdapterRegistry,
        lifecycle: AdapterLifecycle,
        codec: TextCodec,
        model: ModelInfo,
        usage: UsageMetrics,
        lazy: LazyAdapters | None = None,
    ) -> None:
        self._registry = registry
        self._lazy = lazy
        self._lifecycle = lifecycle
        self._readers = ThreadPoolExecutor(_MAX_READERS, "turret-revision")
        self._codec = codec
        self._model = model
        self._quotas = Quotas()
        self._usage = usage
        self._request_ids = itertools.count(1)

    async def prepare(
        self, message: inference_pb2.GenerateRequest, context: Any, *, pinned: bool = False
    ) -> Prepared:
        """Make a request of a message. Its adapters stay until the call is over, however it ends.

        Raises:
            InvalidRequestError: something in it cannot be.
            PromptTooLongError: it does not fit into the model's context.
            AdapterError: an adapter is not there, or cannot be used like this.
            QuotaExceededError: the tenant has used as much as it may for now.
        """
        tenant = caller().tenant
        priority, cache_salt = check_priority(message), check_cache_salt(message)
        named, key = check_adapters(message), check_routing_key(message)
        if not pinned:
            named = [_placed(each, key) for each in named]
        check_use(tenant, [each.name for each in named])
        token_ids = await self._token_ids(message)
        with errors_visible_to(tenant):
            lease = await self._acquire(named)
        when_over(context, partial(self._registry.release, lease))
        if named:
            logs.bind(adapter="+".join(each.name for each in named), revision=lease.revision)
        if pinned:
            self._check_served(lease)
        uses = tuple(AdapterUse(spec, weight) for spec, weight in lease.uses)
        num_virtual = sum(use.spec.num_virtual_tokens for use in uses)
        remaining = context.time_remaining()
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        sampling = sampling_params(
            message, num_context=len(token_ids) + num_virtual, max_context=self._model.max_context
        )
        charge = Charge(len(token_ids), 0 if pinned else sampling.max_tokens)
        make: Callable[..., Request | PromptPin] = (
            PromptPin
            if pinned
            else partial(Request, sampling=sampling, stop_token_ids=self._model.stop_token_ids)
        )
        request = make(
            request_id=next(self._request_ids),
            prompt_token_ids=tuple(token_ids),
            adapters=uses,
            deadline=None if remaining is None else time.monotonic() + remaining,
            sink=partial(_hand_over, asyncio.get_running_loop(), outputs, charge),
            tenant=tenant.name,
            priority=priority,
            # No two tenants come to the same by a salt of their choice: no tenant's name has a slash.
            cache_salt=f"{tenant.cache_domain}/{cache_salt}",
            about=logs.bound(),
        )
        when_over(context, self._quotas.enter(tenant, charge))
        when_over(context, partial(self._count, tenant.name, [each.name for each in named], charge))
        return Prepared(request=request, charge=charge, lease=lease, outputs=outputs)

    async def _acquire(self, named: list[Named]) -> Lease:
        if self._lazy:
            await self._lazy.ensure_loaded(each.name for each in named)
        if all(each.revision is None for each in named):
            return self._registry.acquire(named)
        acquire = partial(self._lifecycle.acquire, named)
        return await to_its_end(acquire, undo=self._registry.release, executor=self._readers)

    def _count(self, tenant: str, adapters: list[str], charge: Charge) -> None:
        if charge.begun:
            self._usage.add(tenant, adapters, prompt=charge.num_prompt, generated=charge.num_generated)

    def _check_served(self, lease: Lease) -> None:
        for name, spec in lease.pins:
            if not self._registry.serves(name, spec.revision):
                raise InvalidRequestError(
                    f"a prompt stays pinned as long as the name serves its revision, and {name!r} serves "
                    f"another than {spec.revision}; roll back to it first",
                    field="adapters",
                )

    async def _token_ids(self, message: inference_pb2.GenerateRequest) -> list[int]:
        match message.WhichOneof("prompt"):
            case "text":
                # A long text takes a while, and other streams go on meanwhile.
                token_ids = await asyncio.to_thread(self._codec.encode, message.text)
            case "token_ids":
                check_length(len(message.token_ids.ids), self._model.max_context)
                token_ids = list(message.token_ids.ids)
            case _:
                raise InvalidRequestError("the request has no prompt; set text or token_ids", field="prompt")
        return check_token_ids(token_ids, self._model.vocab_size)


def _placed(named: Named, key: str) -> Named:
    """Where it stands among the requests for the adapter: with a key always in the same place."""
    if not key:
        return replace(named, place=random.random())  # noqa: S311 (no secret)
    digest = hashlib.blake2b(f"{named.name}\0{key}".encode(), digest_size=_PLACE_BYTES).digest()
    return replace(named, place=int.from_bytes(digest, "big") / 256**_PLACE_BYTES)


def when_over(context: Any, call: Callable[[], None]) -> None:
    """Call back when the call has ended in whatever way: answered, failed, cancelled, disconnected."""

    def over(_: object) -> None:
        call()

    context.add_done_callback(over)


def _hand_over(
    loop: asyncio.AbstractEventLoop, outputs: asyncio.Queue[Output], charge: Charge, output: Output
) -> None:
    """From the engine's thread to the call's; a loop that has closed has nobody waiting."""
    charge.num_generated += output.token_id is not None
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(outputs.put_nowait, output)

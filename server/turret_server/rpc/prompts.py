"""PromptService: prompts whose blocks stay in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc

from turret.v1 import inference_pb2, prompts_pb2, prompts_pb2_grpc
from turret_server.engine.loop import Engine
from turret_server.engine.request import PromptPin
from turret_server.errors import InvalidRequestError, PromptNotFoundError, QuotaExceededError
from turret_server.observability.request_log import RequestRecords
from turret_server.rpc.auth import caller
from turret_server.serving.requests import Prepared, RequestFactory, when_over
from turret_server.tenancy.tenants import Tenant, check_name

log = logging.getLogger(__name__)


# Whose pin it is, and its name: tenants do not see each other's, and on an open server all are everybody's.
_Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Pin:
    key: _Key
    tenant: str
    request_id: int
    message: prompts_pb2.PinnedPrompt


class PromptServicer(prompts_pb2_grpc.PromptServiceServicer):
    """Knows pinned prompts by their names; the engine knows them by the ids of their requests.

    A pin holds no adapter in the registry, or a replaced revision would never go: the engine unpins by itself
    what belongs to a revision that goes, and the name is forgotten when that is noticed.
    """

    def __init__(
        self, *, engine: Engine, requests: RequestFactory, records: RequestRecords, block_size: int
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._records = records
        self._block_size = block_size
        self._pins: dict[_Key, _Pin] = {}
        # Tokens of each tenant that are on their way to be pinned.
        self._pinning: Counter[str] = Counter()

    async def PinPrompt(
        self, request: prompts_pb2.PinPromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.PinPromptResponse:
        name = check_name(request.name, of="a pinned prompt")
        async with self._records.follow(context) as record:
            prepared = await self._requests.prepare(_as_generation(request), context, pinned=True)
            self._check(prepared)
            running = prepared.request
            pin = _Pin(
                (_owner(), name),
                running.tenant,
                running.request_id,
                prompts_pb2.PinnedPrompt(
                    name=name, revision=prepared.lease.revision, prompt_tokens=len(running.prompt_token_ids)
                ),
            )
            assert isinstance(running, PromptPin)
            with self._room(pin, caller().tenant):
                self._engine.pin_prompt(running)
                record.begin(prepared)
                prepared.charge.begun = True
                when_over(context, partial(self._abandon, pin))
                output = await prepared.outputs.get()
                if output.error:
                    raise output.error
                record.cached_tokens = output.cached_tokens
                await self._records.finish(record, "pinned")
                before = self._pins.get(pin.key)
                self._pins[pin.key] = pin
        if before:
            self._engine.unpin_prompt(before.request_id)
        self._forget_gone()
        log.info("pinned prompt %s, %d tokens", name, pin.message.prompt_tokens)
        return prompts_pb2.PinPromptResponse(prompt=pin.message)

    async def UnpinPrompt(
        self, request: prompts_pb2.UnpinPromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.UnpinPromptResponse:
        name = check_name(request.name, of="a pinned prompt")
        self._forget_gone()
        pin = self._pins.pop((_owner(), name), None)
        if pin is None:
            raise PromptNotFoundError(
                f"no prompt is pinned under the name {name!r}; it may have gone with its adapter's revision",
                prompt=name,
            )
        self._engine.unpin_prompt(pin.request_id)
        log.info("unpinned prompt %s", name)
        return prompts_pb2.UnpinPromptResponse()

    async def ListPinnedPrompts(
        self, request: prompts_pb2.ListPinnedPromptsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.ListPinnedPromptsResponse:
        self._forget_gone()
        owner = _owner()
        return prompts_pb2.ListPinnedPromptsResponse(
            prompts=[pin.message for key, pin in sorted(self._pins.items()) if key[0] == owner]
        )

    @contextmanager
    def _room(self, pin: _Pin, tenant: Tenant) -> Iterator[None]:
        """Keep the tokens of a pin for it for as long as the block takes. Those of the one that it replaces
        count no more.
        """
        self._forget_gone()
        most, tokens = tenant.max_pinned_tokens, pin.message.prompt_tokens
        others = [one for one in self._pins.values() if one.tenant == tenant.name and one.key != pin.key]
        taken = sum(one.message.prompt_tokens for one in others) + self._pinning[tenant.name]
        if most is not None and taken + tokens > most:
            raise QuotaExceededError(
                f"prompts of {taken} tokens of tenant {tenant.name!r} are pinned, {most} may be, and this "
                f"one has {tokens}; unpin one",
                tenant=tenant.name,
                quota="max_pinned_tokens",
            )
        self._pinning[tenant.name] += tokens
        try:
            yield
        finally:
            self._pinning[tenant.name] -= tokens
            if not self._pinning[tenant.name]:
                del self._pinning[tenant.name]

    def _check(self, prepared: Prepared) -> None:
        if prepared.lease.joined:
            # Several prefixes in one are gone as soon as no request names them together.
            raise InvalidRequestError(
                "a prompt is pinned with one prefix at most; name one, and LoRAs beside it", field="adapters"
            )
        missing = self._block_size - prepared.request.num_virtual_tokens % self._block_size
        found = len(prepared.request.prompt_token_ids)
        if found < missing:
            raise InvalidRequestError(
                f"only whole blocks of {self._block_size} tokens are kept, and {found} tokens fill none; "
                f"give at least {missing}",
                field="prompt",
            )

    def _abandon(self, pin: _Pin) -> None:
        """The call is over; unless its prompt was pinned under the name, nobody could ever unpin it."""
        if self._pins.get(pin.key) is not pin:
            # In this order: it may be pinned before the cancellation arrives.
            self._engine.cancel(pin.request_id)
            self._engine.unpin_prompt(pin.request_id)

    def _forget_gone(self) -> None:
        for key, pin in list(self._pins.items()):
            if not self._engine.is_prompt_pinned(pin.request_id):
                del self._pins[key]


def _owner() -> str:
    tenant = caller().tenant
    return tenant.name if tenant.proven else ""


def _as_generation(request: prompts_pb2.PinPromptRequest) -> inference_pb2.GenerateRequest:
    """To pin is to generate, as far as the prompt goes."""
    message = inference_pb2.GenerateRequest(
        adapters=request.adapters, cache_salt=request.cache_salt, max_tokens=1
    )
    match request.WhichOneof("prompt"):
        case "text":
            message.text = request.text
        case "token_ids":
            message.token_ids.CopyFrom(request.token_ids)
    return message

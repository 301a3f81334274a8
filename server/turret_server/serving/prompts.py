"""Pinned prompts: prompts whose blocks stay in the prefix cache until they are unpinned."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from turret_adapters.registry import AdapterRegistry
from turret_server import logs
from turret_server.engine.loop import Engine
from turret_server.engine.request import Output, PromptPin
from turret_server.errors import InvalidRequestError, PromptNotFoundError, QuotaExceededError
from turret_server.observability.request_log import RequestLog
from turret_server.serving.jobs import Jobs, Outputs, Prepared
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.request import PinnedPrompt, PinRequest
from turret_server.serving.validation import validate
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant, check_name

log = logging.getLogger(__name__)

# Owner and name: tenants do not see each other's pins; on an open server all pins have the owner "".
_Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Pin:
    key: _Key
    tenant: str
    request_id: int
    prompt: PinnedPrompt


class PromptService:
    """Names of pinned prompts; the engine knows them by the ids of their jobs. Used on one event loop.

    A pin holds no lease of its adapters, or a replaced revision would never be freed: the engine unpins the
    prompts of a revision that is dropped, and the name is removed here when that is noticed.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        jobs: Jobs,
        model: ModelInfo,
        request_log: RequestLog,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._jobs = jobs
        self._model = model
        self._request_log = request_log
        self._pins: dict[_Key, _Pin] = {}
        # Tokens of prompts that are being pinned, by tenant.
        self._pinning: Counter[str] = Counter()

    async def pin(self, request: PinRequest, caller: Caller) -> PinnedPrompt:
        """Compute a prompt and keep its whole blocks, in place of the one that has the name now.

        Raises:
            InvalidRequestError: a field is invalid, or the prompt fills no block.
            PromptTooLongError: the prompt does not fit into the context.
            AdapterError: an adapter does not exist, or its use is invalid.
            QuotaExceededError: the tenant has used its quota.
            TurretError: the engine refuses the prompt, or computing it fails.
        """
        name = check_name(request.name, of="a pinned prompt")
        async with self._request_log.follow(caller, request.deadline) as record:
            adapters = validate(request)
            async with self._jobs.prepare(request, adapters, caller) as prepared:
                self._check(prepared)
                outputs: Outputs[Output] = Outputs()
                job = PromptPin(**prepared.fields, sink=outputs.sink(_succeeded), about=logs.bound())
                pinned = PinnedPrompt(
                    name=name, revision=prepared.lease.revision, prompt_tokens=len(job.prompt_token_ids)
                )
                pin = _Pin((_owner(caller.tenant), name), job.tenant, job.request_id, pinned)
                with (
                    self._reserved(pin, caller.tenant),
                    self._abandoned(pin),
                    self._jobs.submit(prepared, [job], record, self._engine.pin_prompt),
                ):
                    output = await outputs.get()
                    record.cached_tokens = output.cached_tokens
                    await self._request_log.finish(record, "pinned")
                    before = self._pins.get(pin.key)
                    self._pins[pin.key] = pin
        if before:
            self._engine.unpin_prompt(before.request_id)
        self._remove_gone()
        log.info("pinned prompt %s, %d tokens", name, pinned.prompt_tokens)
        return pinned

    def unpin(self, name: str, caller: Caller) -> None:
        """Let the blocks of a prompt be evicted like any other.

        Raises:
            PromptNotFoundError: no prompt is pinned under the name.
        """
        check_name(name, of="a pinned prompt")
        self._remove_gone()
        pin = self._pins.pop((_owner(caller.tenant), name), None)
        if pin is None:
            raise PromptNotFoundError(
                f"no prompt is pinned under the name {name!r}; it may have gone with its adapter's revision",
                prompt=name,
            )
        self._engine.unpin_prompt(pin.request_id)
        log.info("unpinned prompt %s", name)

    def list(self, caller: Caller) -> list[PinnedPrompt]:
        """The caller's pinned prompts in the order of their names."""
        self._remove_gone()
        owner = _owner(caller.tenant)
        return [pin.prompt for key, pin in sorted(self._pins.items()) if key[0] == owner]

    @contextmanager
    def _reserved(self, pin: _Pin, tenant: Tenant) -> Iterator[None]:
        """Count the tokens of a pin while it is computed. The pin that it replaces counts no more."""
        self._remove_gone()
        most, tokens = tenant.max_pinned_tokens, pin.prompt.prompt_tokens
        others = [one for one in self._pins.values() if one.tenant == tenant.name and one.key != pin.key]
        taken = sum(one.prompt.prompt_tokens for one in others) + self._pinning[tenant.name]
        if most is not None and taken + tokens > most:
            raise QuotaExceededError(
                f"tenant {tenant.name!r} may pin prompts of {most} tokens; {taken} are pinned and this "
                f"prompt has {tokens}; unpin one",
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

    @contextmanager
    def _abandoned(self, pin: _Pin) -> Iterator[None]:
        """Unpin a prompt that did not get its name: nobody could ever unpin it. The block cancels the job
        first, which may be pinned before the cancellation arrives.
        """
        try:
            yield
        finally:
            if self._pins.get(pin.key) is not pin:
                self._engine.unpin_prompt(pin.request_id)

    def _check(self, prepared: Prepared) -> None:
        for name, spec in prepared.lease.pins:
            if not self._registry.serves(name, spec.revision):
                raise InvalidRequestError(
                    f"a prompt is pinned for a revision that the name serves; {name!r} does not serve "
                    f"{spec.revision}; roll back to it first",
                    field="adapters",
                )
        if prepared.lease.joined:
            # The joined prefix is freed as soon as no request names its parts together.
            raise InvalidRequestError(
                "a prompt is pinned with one prefix at most; name one, and LoRAs beside it", field="adapters"
            )
        found = len(prepared.fields["prompt_token_ids"])
        self._model.check_room(prepared.num_context)
        missing = self._model.block_size - (prepared.num_context - found) % self._model.block_size
        if found < missing:
            raise InvalidRequestError(
                f"whole blocks of {self._model.block_size} tokens are pinned, and {found} tokens fill none; "
                f"give at least {missing}",
                field="prompt",
            )

    def _remove_gone(self) -> None:
        for key, pin in list(self._pins.items()):
            if not self._engine.is_prompt_pinned(pin.request_id):
                del self._pins[key]


def _succeeded(output: Output, _: float) -> Output:
    """Raises the error of a job that failed."""
    if output.error:
        raise output.error
    return output


def _owner(tenant: Tenant) -> str:
    return tenant.name if tenant.proven else ""

"""The whole service in this process, without any transport."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace

import pytest

from support.prompts import PROMPT, until
from turret_server.app.assembly import assemble
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, PromptNotFoundError, QuotaExceededError
from turret_server.serving.request import AdapterRef, FinishReason, GenerationRequest, PinRequest
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant

ADMIN = Caller(tenant=Tenant(name="acme", limits=TenantLimits(), admin=True), request_id="request-1")
REQUEST = GenerationRequest(prompt=PROMPT, max_tokens=8)


@pytest.fixture(scope="module")
def parts(base_of, adapter_of, quantised_cache, tmp_path_factory):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        cache=quantised_cache,
        store=tmp_path_factory.mktemp("store"),
    )
    with assemble(config) as parts:
        parts.lifecycle.load("lora", str(adapter_of("llama", "lora")))
        yield parts


async def answer(parts, request, caller=ADMIN):
    async with aclosing(parts.generation.generate(request, caller)) as chunks:
        return [chunk async for chunk in chunks]


def counted(parts, outcome):
    return parts.metrics.get_sample_value("turret_requests_total", {"outcome": outcome}) or 0.0


def held(parts):
    return parts.metrics.get_sample_value("turret_arena_pages", {"owner": "sequence"})


async def until_idle(parts):
    """The engine has taken in what was posted to it, and holds no page for a request."""
    await asyncio.to_thread(parts.engine.check_integrity)
    await asyncio.to_thread(until, lambda: not held(parts))


def test_the_service_imports_no_transport():
    script = (
        "import sys, turret_server.serving.generation, turret_server.serving.prompts\n"
        "sys.exit(str({'grpc', 'turret', 'aiohttp', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    found = subprocess.run(  # noqa: S603 (this test's own script)
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert found.stderr.strip() == "set()"


async def test_an_answer_comes_in_chunks_and_ends_with_its_usage(parts):
    chunks = await answer(parts, replace(REQUEST, adapters=(AdapterRef(name="lora"),)))
    assert [chunk.finish_reason for chunk in chunks] == [None] * 7 + [FinishReason.LENGTH]
    assert chunks[-1].usage.prompt_tokens == len(parts.loaded.tokenizer.live.encode(PROMPT))
    assert chunks[-1].usage.generated_tokens == sum(len(chunk.token_ids) for chunk in chunks) == 8
    assert {chunk.revision for chunk in chunks} == {parts.registry.status("lora").spec.revision}
    base = await answer(parts, REQUEST)
    assert [chunk.token_ids for chunk in base] != [chunk.token_ids for chunk in chunks]


async def test_closing_the_answer_cancels_the_request_and_releases_its_adapter(parts):
    before = counted(parts, "cancelled")
    request = replace(REQUEST, adapters=(AdapterRef(name="lora"),), max_tokens=200)
    async with aclosing(parts.generation.generate(request, ADMIN)) as chunks:
        async for chunk in chunks:
            assert parts.registry.status("lora").active_requests == 1
            assert chunk.finish_reason is None
            break
    assert parts.registry.status("lora").active_requests == 0
    assert counted(parts, "cancelled") == before + 1
    await until_idle(parts)


async def test_cancelling_the_task_cancels_the_request(parts):
    before = counted(parts, "cancelled")
    begun = asyncio.Event()

    async def read():
        request = replace(REQUEST, adapters=(AdapterRef(name="lora"),), max_tokens=200)
        async with aclosing(parts.generation.generate(request, ADMIN)) as chunks:
            async for _ in chunks:
                begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert parts.registry.status("lora").active_requests == 0
    assert counted(parts, "cancelled") == before + 1
    await until_idle(parts)


async def test_a_client_that_closes_after_the_last_chunk_has_its_whole_answer(parts):
    before = counted(parts, "ok"), counted(parts, "cancelled")
    async with aclosing(parts.generation.generate(REQUEST, ADMIN)) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason:
                break
    assert (counted(parts, "ok"), counted(parts, "cancelled")) == (before[0] + 1, before[1])


async def test_an_invalid_request_is_refused_before_its_prompt_is_looked_at(parts):
    with pytest.raises(InvalidRequestError) as refused:
        await answer(parts, replace(REQUEST, prompt=None, top_p=2.0))
    assert refused.value.metadata == {"field": "top_p"}
    with pytest.raises(InvalidRequestError, match="has no prompt"):
        await answer(parts, replace(REQUEST, prompt=None))


async def test_a_quota_is_charged_and_the_rest_given_back(parts):
    limited = Tenant(name="small", limits=TenantLimits(), admin=True, max_concurrent_requests=1)
    caller = Caller(tenant=limited, request_id="request-2")
    async with aclosing(parts.generation.generate(replace(REQUEST, max_tokens=200), caller)) as chunks:
        await anext(chunks)
        with pytest.raises(QuotaExceededError):
            await answer(parts, REQUEST, caller)
    assert len(await answer(parts, REQUEST, caller)) == 8


async def test_a_prompt_is_pinned_for_its_tenant_and_unpinned_by_its_name(parts):
    other = Caller(tenant=Tenant(name="other", limits=TenantLimits(), admin=True), request_id="request-3")
    prompt = tuple(range(1, 41))
    pinned = await parts.prompts.pin(PinRequest(name="rules", prompt=prompt), ADMIN)
    assert (pinned.name, pinned.prompt_tokens) == ("rules", 40)
    assert parts.prompts.list(ADMIN) == [pinned]
    assert parts.prompts.list(other) == []
    found = await answer(parts, replace(REQUEST, prompt=(*prompt, 5)))
    assert found[-1].usage.cached_tokens == 32
    with pytest.raises(PromptNotFoundError):
        parts.prompts.unpin("rules", other)
    parts.prompts.unpin("rules", ADMIN)
    assert parts.prompts.list(ADMIN) == []
    await until_idle(parts)

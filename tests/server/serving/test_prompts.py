from __future__ import annotations

import asyncio

import pytest

from support.fake_device import make_spec
from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.host import HostAdapter
from turret_adapters.spec import Split
from turret_server import logs
from turret_server.engine.request import FinishReason, Output
from turret_server.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    PromptNotFoundError,
    PromptTooLongError,
    QuotaExceededError,
)
from turret_server.serving.request import AdapterRef, PinnedPrompt, PinRequest

PINNED = Output(finish_reason=FinishReason.PINNED, cached_tokens=3)


@pytest.fixture(autouse=True)
def pinned_at_once(services):
    services.engine.outputs = [PINNED]


def request_of(name="rules", num_tokens=8, **fields):
    return PinRequest(name=name, prompt=[5] * num_tokens, **fields)


def calls(services, what):
    return [request_id for kind, request_id in services.engine.calls if kind == what]


async def test_a_prompt_is_computed_pinned_and_logged(services, admin, caplog):
    caplog.set_level("INFO")
    request = request_of(adapters=[AdapterRef(name="poet")], cache_salt="salt", deadline=12.0)
    with logs.about({"request_id": "request-1"}):
        pinned = await services.prompts.pin(request, admin)
    assert pinned == PinnedPrompt(name="rules", revision="1" * 32, prompt_tokens=8)
    [job] = services.engine.jobs
    assert (job.prompt_token_ids, job.deadline, job.cache_salt) == ((5,) * 8, 12.0, "acme/salt")
    assert (job.about["request_id"], job.about["adapter"]) == ("request-1", "poet")
    [entry] = services.usage.entries
    assert (entry["finish_reason"], entry["cached_tokens"], entry["prompt_tokens"]) == ("pinned", 3, 8)
    assert services.count("ok") == 1
    assert "pinned prompt rules, 8 tokens" in caplog.messages
    assert services.prompts.list(admin) == [pinned]
    assert calls(services, "unpin") == []


async def test_a_pin_holds_no_adapter(services, admin):
    """Or a replaced revision would never be freed."""
    await services.prompts.pin(request_of(adapters=[AdapterRef(name="poet")]), admin)
    assert services.registry.status("poet").active_requests == 0


async def test_a_name_that_is_pinned_again_lets_the_former_prompt_go(services, admin):
    await services.prompts.pin(request_of(num_tokens=8), admin)
    await services.prompts.pin(request_of(num_tokens=12), admin)
    first, second = calls(services, "submit")
    assert (calls(services, "unpin"), services.engine.pinned) == ([first], {second})
    assert [each.prompt_tokens for each in services.prompts.list(admin)] == [12]


async def test_prompts_are_listed_by_name(services, admin):
    for name in ("b", "a", "c"):
        await services.prompts.pin(request_of(name), admin)
    assert [each.name for each in services.prompts.list(admin)] == ["a", "b", "c"]


async def test_a_prompt_is_unpinned_once(services, admin, caplog):
    caplog.set_level("INFO")
    await services.prompts.pin(request_of(), admin)
    services.prompts.unpin("rules", admin)
    assert calls(services, "unpin") == calls(services, "submit")
    assert "unpinned prompt rules" in caplog.messages
    with pytest.raises(PromptNotFoundError) as missing:
        services.prompts.unpin("rules", admin)
    assert missing.value.metadata == {"prompt": "rules"}
    assert services.prompts.list(admin) == []


async def test_tenants_do_not_see_each_others_prompts(services, admin, caller_of):
    other = caller_of("bolt")
    await services.prompts.pin(request_of(num_tokens=8), admin)
    await services.prompts.pin(request_of(num_tokens=12), other)
    assert [each.prompt_tokens for each in services.prompts.list(admin)] == [8]
    services.prompts.unpin("rules", other)
    assert [each.prompt_tokens for each in services.prompts.list(admin)] == [8]
    with pytest.raises(PromptNotFoundError):
        services.prompts.unpin("rules", other)


async def test_on_an_open_server_all_have_the_same_prompts(services, caller_of):
    acme, bolt = (caller_of(name, proven=False) for name in ("acme", "bolt"))
    await services.prompts.pin(request_of(), acme)
    assert [each.name for each in services.prompts.list(bolt)] == ["rules"]
    services.prompts.unpin("rules", bolt)
    assert services.prompts.list(acme) == []


async def test_a_prompt_that_the_engine_let_go_has_no_name_any_more(services, caller_of):
    caller = caller_of(max_pinned_tokens=8)
    await services.prompts.pin(request_of("first"), caller)
    services.engine.pinned.clear()
    await services.prompts.pin(request_of("second"), caller)
    assert [each.name for each in services.prompts.list(caller)] == ["second"]
    services.engine.pinned.clear()
    assert services.prompts.list(caller) == []
    with pytest.raises(PromptNotFoundError, match="gone with its adapter"):
        services.prompts.unpin("second", caller)
    assert calls(services, "unpin") == []


async def test_a_prompt_that_goes_as_it_is_pinned_is_not_kept(services, admin):
    """Its adapter may be replaced while it is computed."""
    services.engine.is_prompt_pinned = lambda _: False
    await services.prompts.pin(request_of(), admin)
    assert services.prompts._pins == {}


async def test_a_tenant_pins_so_many_tokens_and_no_more(services, caller_of):
    caller, other = caller_of(max_pinned_tokens=20), caller_of("bolt", max_pinned_tokens=20)
    await services.prompts.pin(request_of("first", 12), caller)
    with pytest.raises(QuotaExceededError, match="prompts of 20 tokens; 12 are pinned and this prompt has 9"):
        await services.prompts.pin(request_of("second", 9), caller)
    await services.prompts.pin(request_of("second", 8), caller)
    # What a name had does not count when it is pinned again, and neither do the prompts of others.
    await services.prompts.pin(request_of("first", 12), caller)
    await services.prompts.pin(request_of("first", 20), other)
    with pytest.raises(QuotaExceededError) as refused:
        await services.prompts.pin(request_of("first", 13), caller)
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_pinned_tokens"}
    assert [each.prompt_tokens for each in services.prompts.list(caller)] == [12, 8]
    services.prompts.unpin("second", caller)
    await services.prompts.pin(request_of("first", 20), caller)


async def test_prompts_that_are_being_computed_count_until_they_fail(services, caller_of):
    caller = caller_of(max_pinned_tokens=20)
    services.engine.outputs = []
    pinning = [asyncio.create_task(services.prompts.pin(request_of(name, 8), caller)) for name in "ab"]
    first, second = [await services.engine.arrivals.get() for _ in pinning]
    with pytest.raises(QuotaExceededError, match="16 are pinned"):
        await services.prompts.pin(request_of("c", 5), caller)
    first.sink(PINNED)
    second.sink(Output(error=OutOfMemoryError("no memory"), finish_reason=FinishReason.FAILED))
    await pinning[0]
    with pytest.raises(OutOfMemoryError):
        await pinning[1]
    services.engine.outputs = [PINNED]
    await services.prompts.pin(request_of("c", 12), caller)
    assert services.prompts._pinning == {}


async def test_a_prompt_that_fails_is_cancelled_and_then_unpinned_and_the_former_stays(services, admin):
    await services.prompts.pin(request_of(num_tokens=8), admin)
    services.engine.outputs = [Output(error=OutOfMemoryError("no"), finish_reason=FinishReason.FAILED)]
    with pytest.raises(OutOfMemoryError):
        await services.prompts.pin(request_of(num_tokens=12), admin)
    first, second = calls(services, "submit")
    assert services.engine.calls[-2:] == [("cancel", second), ("unpin", second)]
    assert services.engine.pinned == {first}
    assert [each.prompt_tokens for each in services.prompts.list(admin)] == [8]


async def test_a_call_that_ends_early_leaves_no_prompt(services, admin):
    services.engine.outputs = []
    pinning = asyncio.create_task(services.prompts.pin(request_of(), admin))
    job = await services.engine.arrivals.get()
    pinning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pinning
    assert services.engine.calls[-2:] == [("cancel", job.request_id), ("unpin", job.request_id)]
    assert services.prompts.list(admin) == []
    assert services.count("cancelled") == 1


async def test_a_prompt_fills_a_block_with_the_virtual_tokens_before_it(services, admin):
    """Of blocks of four tokens."""
    prefix = [AdapterRef(name="first")]
    for least, adapters in ((4, []), (2, prefix)):
        with pytest.raises(
            InvalidRequestError, match=f"blocks of 4 tokens .* give at least {least}$"
        ) as small:
            await services.prompts.pin(request_of(num_tokens=least - 1, adapters=adapters), admin)
        assert small.value.metadata == {"field": "prompt"}
        await services.prompts.pin(request_of(num_tokens=least, adapters=adapters), admin)


async def test_a_prompt_and_its_virtual_tokens_leave_room_for_an_answer(services, admin):
    prefix = [AdapterRef(name="first")]
    await services.prompts.pin(request_of(num_tokens=61, adapters=prefix), admin)
    with pytest.raises(PromptTooLongError):
        await services.prompts.pin(request_of(num_tokens=62, adapters=prefix), admin)


async def test_joined_prefixes_are_refused(services, admin):
    poet, first, second = (AdapterRef(name=name) for name in ("poet", "first", "second"))
    await services.prompts.pin(request_of(adapters=[poet, first]), admin)
    with pytest.raises(InvalidRequestError, match="one prefix at most") as refused:
        await services.prompts.pin(request_of(adapters=[second, first]), admin)
    assert refused.value.metadata == {"field": "adapters"}


async def test_a_prompt_is_pinned_only_for_a_revision_that_its_name_serves(services, admin):
    earlier = HostAdapter(spec=make_spec("9" * 32, slab_pages=1), deltas={})
    services.registry.add(earlier)
    request = request_of(adapters=[AdapterRef(name="poet@" + "9" * 32)])
    with pytest.raises(InvalidRequestError, match=r"'poet' does not serve 9{32}") as refused:
        await services.prompts.pin(request, admin)
    assert refused.value.metadata == {"field": "adapters"}
    services.registry.split("poet", Split("9" * 32, 1))
    assert (await services.prompts.pin(request, admin)).revision == "9" * 32


@pytest.mark.parametrize("name", ["", "a b", "x" * 129])
async def test_a_name_that_is_invalid_is_refused(services, admin, name):
    with pytest.raises(InvalidRequestError, match="a pinned prompt's name"):
        await services.prompts.pin(request_of(name), admin)
    with pytest.raises(InvalidRequestError, match="a pinned prompt's name"):
        services.prompts.unpin(name, admin)
    assert services.engine.calls == []


async def test_what_is_refused_is_counted(services, admin, caller_of):
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        await services.prompts.pin(request_of(cache_salt="x" * 129), admin)
    with pytest.raises(AdapterNotFoundError):
        await services.prompts.pin(
            request_of(adapters=[AdapterRef(name="poet")]), caller_of(admin=False, use=("bard",))
        )
    assert (services.count("invalid_request"), services.count("adapter_not_found")) == (1, 1)

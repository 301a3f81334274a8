from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from support.fake_device import make_spec
from turret_adapters.errors import AdapterNotFoundError, StoreFailedError
from turret_adapters.host import HostAdapter
from turret_adapters.registry import Named
from turret_adapters.spec import Split
from turret_server import logs
from turret_server.engine.request import FinishReason, Output, PromptPin, Request, SamplingParams
from turret_server.errors import (
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    QuotaExceededError,
)
from turret_server.serving.jobs import Outputs, _positioned
from turret_server.serving.request import GenerationRequest, PinRequest

REQUEST = GenerationRequest(prompt=[5, 6, 7])


def place(name: str, key: str) -> float:
    return _positioned(Named(name), key).place


def test_a_routing_key_has_one_place_for_each_adapter():
    assert place("poet", "user-1") == place("poet", "user-1")
    assert len({place("poet", "user-1"), place("poet", "user-2"), place("bard", "user-1")}) == 3


@pytest.mark.parametrize("key", ["", "user-{}"])
def test_places_are_spread_evenly(key):
    places = [place("poet", key.format(number)) for number in range(2000)]
    assert all(0 <= each < 1 for each in places)
    for percent in (10, 50, 90):
        assert sum(each < percent / 100 for each in places) == pytest.approx(20 * percent, abs=150)


def test_a_place_changes_nothing_else_of_an_adapter():
    for key in ("", "user-1"):
        named = _positioned(Named("poet", 0.5, 2, "3f9a1c07"), key)
        assert (named.name, named.weight, named.task, named.revision) == ("poet", 0.5, 2, "3f9a1c07")


async def test_a_job_has_what_its_request_and_its_caller_determine(services, caller_of):
    request = GenerationRequest(prompt=[5, 6], cache_salt="salt", deadline=12.0)
    caller, named = caller_of("acme"), [Named("poet", 0.5), Named("first")]
    async with services.jobs.prepare(request, named, caller) as prepared:
        fields, lease = prepared.fields, prepared.lease
        assert fields["prompt_token_ids"] == (5, 6)
        assert [(use.spec, use.weight) for use in fields["adapters"]] == list(lease.uses)
        assert fields["adapters"][0].weight == 0.5
        assert (fields["deadline"], fields["tenant"], fields["cache_salt"]) == (12.0, "acme", "acme/salt")
        assert prepared.caller is caller
        assert prepared.num_context == 4  # two of the prefix


async def test_tenants_that_share_the_cache_have_the_same_domain(services, caller_of):
    salts = set()
    for name in ("acme", "bolt"):
        async with services.jobs.prepare(REQUEST, [], caller_of(name, share_cache=True)) as prepared:
            salts.add(prepared.fields["cache_salt"])
    assert salts == {"/"}


async def test_every_job_has_an_id_of_its_own(services, admin):
    async with (
        services.jobs.prepare(REQUEST, [], admin) as first,
        services.jobs.prepare(REQUEST, [], admin) as second,
    ):
        assert first.fields["request_id"] != second.fields["request_id"]


async def test_log_lines_name_the_adapters_and_their_revisions(services, admin):
    with logs.about({}):
        async with services.jobs.prepare(REQUEST, [], admin):
            assert "adapter" not in logs.bound()
        async with services.jobs.prepare(REQUEST, [Named("poet"), Named("bard")], admin):
            assert logs.bound()["adapter"] == "poet+bard"
            assert logs.bound()["revision"] == "1" * 32 + "+" + "2" * 32


async def test_a_prompt_is_text_or_token_ids(services, admin, codec):
    for prompt in ("the fox", codec.encode("the fox", 64)):
        async with services.jobs.prepare(GenerationRequest(prompt=prompt), [], admin) as prepared:
            assert prepared.fields["prompt_token_ids"] == tuple(codec.encode("the fox", 64))


async def test_a_text_far_too_long_is_refused_with_the_reason_for_the_contexts_length(
    services, admin, monkeypatch
):
    note = ", beyond which it would change"
    monkeypatch.setattr(services.jobs, "_model", replace(services.jobs._model, context_note=note))
    request = GenerationRequest(prompt="the " * 10_000)
    with pytest.raises(PromptTooLongError, match=f"tokens{note}; the prompt of 40000 characters"):
        async with services.jobs.prepare(request, [], admin):
            pass


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([320], InvalidRequestError),
        ([], InvalidRequestError),
        ("", InvalidRequestError),
        # What is too long is not looked through.
        ([320] * 64, PromptTooLongError),
    ],
)
async def test_an_invalid_prompt_is_refused_and_leases_nothing(services, admin, prompt, error):
    with pytest.raises(error):
        async with services.jobs.prepare(GenerationRequest(prompt=prompt), [Named("poet")], admin):
            pass
    assert services.registry.status("poet").active_requests == 0


async def test_permission_is_asked_before_the_prompt_is_looked_at(services, caller_of):
    caller = caller_of(admin=False, use=("poet",))
    with pytest.raises(AdapterNotFoundError):
        async with services.jobs.prepare(GenerationRequest(prompt=[320]), [Named("bard")], caller):
            pass


async def test_adapters_are_leased_as_long_as_the_block_runs(services, admin):
    for error in (None, ZeroDivisionError):
        try:
            async with services.jobs.prepare(REQUEST, [Named("poet")], admin):
                assert services.registry.status("poet").active_requests == 1
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert services.registry.status("poet").active_requests == 0


async def test_a_split_is_for_requests_with_a_routing_key_and_others_use_the_current_revision(
    services, admin
):
    other = HostAdapter(spec=make_spec("9" * 32, slab_pages=1), deltas={})
    services.registry.add(other)
    services.registry.split("poet", Split("9" * 32, 100))
    revisions = []
    for key in (None, "", "user-1"):
        async with services.jobs.prepare(REQUEST, [Named("poet")], admin, key) as prepared:
            revisions.append(prepared.lease.revision[0])
    assert revisions == ["1", "9", "9"]


async def test_only_named_revisions_are_looked_for_on_disk(services, admin):
    async with services.jobs.prepare(REQUEST, [Named("poet"), Named("bard")], admin):
        assert services.revisions.asked == []
    named = [Named("bard"), Named("poet", revision="1" * 32)]
    async with services.jobs.prepare(REQUEST, named, admin) as prepared:
        assert services.revisions.asked == [named]
        assert prepared.lease.revision == "2" * 32 + "+" + "1" * 32


async def test_a_revision_that_is_read_for_nobody_is_released(services, admin):
    reading, go_on = threading.Event(), threading.Event()

    def acquire(named):
        reading.set()
        go_on.wait()
        return services.registry.acquire([Named(each.name) for each in named])

    services.revisions.acquire = acquire

    async def prepare():
        async with services.jobs.prepare(REQUEST, [Named("poet", revision="1" * 32)], admin):
            raise AssertionError

    task = asyncio.create_task(prepare())
    await asyncio.to_thread(reading.wait)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert services.registry.status("poet").active_requests == 0


async def test_revisions_that_are_read_slowly_delay_nothing_else(services, admin):
    go_on = threading.Event()

    def acquire(named):
        assert go_on.wait(60)
        return services.registry.acquire([Named(each.name) for each in named])

    services.revisions.acquire = acquire

    async def prepare():
        async with services.jobs.prepare(REQUEST, [Named("poet", revision="1" * 32)], admin) as prepared:
            return prepared.lease.revision

    reading = [asyncio.create_task(prepare()) for _ in range(40)]
    await asyncio.sleep(0)
    try:
        # In the default executor they would leave it no thread.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 30) == "done"
    finally:
        go_on.set()
    assert await asyncio.gather(*reading) == ["1" * 32] * len(reading)


async def test_names_are_loaded_on_demand_before_they_are_leased(services, admin):
    async def ensure_loaded(names):
        for name in names:
            services.registry.publish(name, HostAdapter(spec=make_spec("7" * 32, slab_pages=1), deltas={}))

    services.jobs._lazy = SimpleNamespace(ensure_loaded=ensure_loaded)
    async with services.jobs.prepare(REQUEST, [Named("new")], admin) as prepared:
        assert prepared.lease.revision == "7" * 32


@pytest.mark.parametrize(
    "error", [AdapterNotFoundError("none", name="new", why="/srv/secret"), StoreFailedError("/srv/secret")]
)
async def test_why_an_adapter_is_missing_is_for_those_who_may_load_it(services, admin, caller_of, error):
    async def ensure_loaded(_):
        raise error

    services.jobs._lazy = SimpleNamespace(ensure_loaded=ensure_loaded)
    for caller, is_seen in ((admin, True), (caller_of(admin=False, use=("*",)), False)):
        with pytest.raises(type(error)) as raised:
            async with services.jobs.prepare(REQUEST, [Named("new")], caller):
                pass
        assert ("secret" in str(raised.value)) == is_seen


class Record:
    """Notes what begins."""

    def __init__(self, generated=0):
        self.begun = []
        self.generated_tokens = generated

    def begin(self, job, pins, prompt_tokens):  # noqa: ARG002
        self.begun.append((job.request_id, [name for name, _ in pins]))


def of_same_prompt(job, request_id):
    return replace(job, request_id=request_id, leader=job.request_id)


def generation(prepared, max_tokens=10):
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(**prepared.fields, sink=lambda _: None, sampling=sampling, stop_token_ids=frozenset())


async def submitted(services, caller, *, generated=0, max_tokens=10, named=()):
    """Submit a job of three tokens, which generates some before its block ends; returns its record."""
    record = Record(generated)
    async with services.jobs.prepare(REQUEST, named, caller) as prepared:
        job = generation(prepared, max_tokens)
        with services.jobs.submit(prepared, [job], record, services.engine.submit):
            pass
    return record


async def test_a_job_is_cancelled_when_its_block_ends(services, admin):
    record = await submitted(services, admin, named=[Named("poet"), Named("bard")])
    [(_, request_id), _] = services.engine.calls
    assert services.engine.calls == [("submit", request_id), ("cancel", request_id)]
    assert record.begun == [(request_id, ["poet", "bard"])]


async def test_a_job_whose_block_fails_is_cancelled_as_well(services, admin):
    async with services.jobs.prepare(REQUEST, [], admin) as prepared:
        submit = services.jobs.submit(prepared, [generation(prepared)], Record(), services.engine.submit)
        with pytest.raises(ZeroDivisionError), submit:
            raise ZeroDivisionError
    assert [what for what, _ in services.engine.calls] == ["submit", "cancel"]


async def test_usage_is_counted_for_tenant_and_adapters_when_a_job_ends(services, admin):
    await submitted(services, admin, generated=2, named=[Named("poet"), Named("bard")])
    assert services.used("acme", "poet+bard", "prompt") == 3
    assert services.used("acme", "poet+bard", "generated") == 2


async def test_a_quota_is_charged_for_the_most_and_what_was_not_generated_given_back(services, caller_of):
    caller = caller_of(tokens_per_minute=20)
    await submitted(services, caller, generated=4, max_tokens=17)
    with pytest.raises(QuotaExceededError, match="has 13 of its 20 tokens"):
        await submitted(services, caller, max_tokens=11)
    await submitted(services, caller, max_tokens=10)


async def test_a_job_that_the_engine_refuses_costs_nothing_and_leaves_nothing(services, caller_of):
    caller = caller_of(tokens_per_minute=13)
    services.engine.refusal = QueueFullError("full", retry_after=1.0)
    with pytest.raises(QueueFullError):
        await submitted(services, caller)
    assert services.engine.calls == []
    assert services.used("acme", "", "prompt") is None
    services.engine.refusal = None
    await submitted(services, caller)


async def test_several_jobs_pay_for_their_prompt_once_and_for_every_answer(services, caller_of):
    caller = caller_of(tokens_per_minute=33)
    async with services.jobs.prepare(REQUEST, [], caller) as prepared:
        jobs = [generation(prepared), of_same_prompt(generation(prepared), services.jobs.next_id())]
        with (
            services.jobs.submit(prepared, jobs, Record(generated=7), services.engine.submit),
            pytest.raises(QuotaExceededError, match="has 10 of its 33 tokens"),
        ):
            await submitted(services, caller, max_tokens=8)
        ids = [job.request_id for job in jobs]
        assert len(set(ids)) == 2
        assert services.engine.calls == [
            *(("submit", each) for each in ids),
            *(("cancel", each) for each in ids),
        ]
    with pytest.raises(QuotaExceededError, match="has 23 of its 33 tokens"):
        await submitted(services, caller, max_tokens=21)


async def test_if_the_engine_refuses_one_of_several_jobs_none_is_left(services, caller_of):
    caller = caller_of(tokens_per_minute=23)

    def begin(job):
        if services.engine.jobs:
            raise QueueFullError("full", retry_after=1.0)
        services.engine.submit(job)

    async with services.jobs.prepare(REQUEST, [], caller) as prepared:
        jobs = [generation(prepared), of_same_prompt(generation(prepared), services.jobs.next_id())]
        with (
            pytest.raises(QueueFullError),
            services.jobs.submit(prepared, jobs, Record(), begin),
        ):
            pass
    assert services.engine.calls == [("submit", jobs[0].request_id), ("cancel", jobs[0].request_id)]
    await submitted(services, caller, max_tokens=20)


async def test_a_prompt_that_is_pinned_is_charged_without_an_answer(services, caller_of):
    caller = caller_of(tokens_per_minute=3)
    async with services.jobs.prepare(PinRequest(name="rules", prompt=[5, 6, 7]), [], caller) as prepared:
        pin = PromptPin(**prepared.fields, sink=lambda _: None)
        with services.jobs.submit(prepared, [pin], Record(), services.engine.pin_prompt):
            pass
    assert services.used("acme", "", "prompt") == 3
    with pytest.raises(QuotaExceededError, match="has 0 of its 3 tokens"):
        await submitted(services, caller)


def token_of(output, _):
    if output.error:
        raise output.error
    return output.token_id


async def test_outputs_come_in_their_order_and_an_error_is_raised():
    outputs = Outputs()
    put = outputs.sink(token_of)
    put(Output(token_id=0))
    put(Output(finish_reason=FinishReason.CANCELLED))
    put(Output(error=QueueFullError("full", retry_after=1.0), finish_reason=FinishReason.FAILED))
    assert await outputs.get() == 0
    with pytest.raises(QueueFullError):
        await outputs.get()


async def test_outputs_come_from_another_thread_with_their_time_and_before_they_are_read():
    received = []
    put = Outputs().sink(lambda output, emitted: received.append((output.token_id, emitted)))
    times = [time.monotonic()]
    for token_id in range(3):
        await asyncio.to_thread(put, Output(token_id=token_id))
        times.append(time.monotonic())
    await asyncio.sleep(0)
    assert [token_id for token_id, _ in received] == [0, 1, 2]
    for (before, after), (_, emitted) in zip(pairwise(times), received, strict=True):
        assert before <= emitted <= after


def test_an_output_for_a_loop_that_is_closed_is_dropped():
    async def make():
        return Outputs().sink(token_of)

    asyncio.run(make())(Output(token_id=0))

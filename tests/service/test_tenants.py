"""For whom a request is made reaches the engine: tenants have queues and priorities of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from support.prompts import PROMPT, until
from support.serving import serving
from turret.v1 import inference_pb2
from turret_client import Client, InvalidArgumentError, ResourceExhaustedError
from turret_server.config import ServerConfig

HANG_S = 60
"""Only so that a failing test ends."""


@pytest.fixture(scope="module")
def served(base_of, quantised_cache, tmp_path_factory, gate):
    """A server that runs one request at a time."""
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    tenants.write_text(
        """
        [tenants.small]
        max_queued_requests = 1
        [tenants.short]
        max_queued_tokens = 100
        """
    )
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="2MiB",
        max_batch_requests=1,
        tenants=tenants,
        cache=quantised_cache,
        store=tmp_path_factory.mktemp("store"),
    )
    with serving(config, gate) as served:
        yield served
        served.parts.engine.check_integrity()


@pytest.fixture
def queue(served, gate):
    """Queues requests, one after the other, behind one that runs until the block ends."""

    @contextmanager
    def queueing():
        with ThreadPoolExecutor(16) as pool, gate.closed():
            futures = [pool.submit(ask, served.address, None)]
            gate.wait()

            def add(tenant: str | None, **options):
                before = num_queued(served)
                future = pool.submit(ask, served.address, tenant, **options)
                futures.append(future)
                until(lambda: num_queued(served) > before or future.done())
                return future

            yield add
        for future in futures:
            if not future.exception():
                assert len(future.result().token_ids) == 2

    return queueing


def ask(address: str, tenant: str | None, **options):
    with Client(address, tenant=tenant) as client:
        return client.generate(PROMPT, **{"max_tokens": 2, "timeout": HANG_S} | options)


def num_queued(served) -> int:
    """Requests in the queue, as the engine counts them now."""
    return served.parts.engine._admission.num_queued


def test_the_queue_of_a_tenant_is_limited_with_retry_after(queue):
    with queue() as add:
        waiting = add("small")
        refused = add("small").exception(timeout=HANG_S)
        others = [add("other") for _ in range(3)]
    assert isinstance(refused, ResourceExhaustedError)
    assert refused.reason == "QUEUE_FULL"
    assert refused.metadata == {"tenant": "small"}
    assert 0 < refused.retry_after <= HANG_S
    assert f"try again in {refused.retry_after:.1f} s" in refused.message
    assert not any(future.exception() for future in [waiting, *others])


def test_a_tenant_may_queue_as_many_tokens_as_its_table_says(queue):
    with queue() as add:
        waiting = add("short")
        refused = add("short", max_tokens=90).exception(timeout=HANG_S)
        other = add("other", max_tokens=2)
    assert isinstance(refused, ResourceExhaustedError)
    assert "(limit 100 tokens)" in refused.message
    assert refused.retry_after > 0
    assert not any(future.exception() for future in [waiting, other])


def test_pinning_waits_in_its_tenants_queue(queue, served):
    with queue() as add:
        add("small")
        with Client(served.address, tenant="small") as client, pytest.raises(ResourceExhaustedError):
            client.pin_prompt("rules", list(range(5, 60)))
    with Client(served.address, tenant="small") as client:
        client.pin_prompt("rules", list(range(5, 60)))
        client.unpin_prompt("rules")


def test_the_more_important_of_a_tenants_requests_goes_first(queue, gate):
    with queue() as add:
        for priority in (-10, 0, 10):
            add("acme", priority=priority)
    *_, first, second, third = gate.order
    # Requests have ids in the order in which they came.
    assert first > second > third


@pytest.mark.parametrize("tenant", ["a b", ".hidden", "x" * 129])
def test_a_tenant_that_cannot_be_is_refused_by_every_method_that_queues(served, tenant):
    with Client(served.address, tenant=tenant) as client:
        for call in (
            lambda: client.generate(PROMPT),
            lambda: list(client.stream(PROMPT)),
            lambda: client.pin_prompt("rules", PROMPT),
        ):
            with pytest.raises(InvalidArgumentError, match="a tenant's name") as refused:
                call()
            assert refused.value.metadata == {"field": "turret-tenant"}


def test_a_call_for_two_tenants_is_refused(served):
    with grpc.insecure_channel(served.address) as channel:
        call = channel.unary_unary("/turret.v1.InferenceService/Generate").future(
            inference_pb2.GenerateRequest(text=PROMPT).SerializeToString(),
            metadata=(("turret-tenant", "acme"), ("turret-tenant", "other")),
        )
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "one tenant" in call.details()


@pytest.mark.parametrize(
    ("options", "field"), [({"priority": 11}, "priority"), ({"cache_salt": "x" * 129}, "cache_salt")]
)
def test_what_is_out_of_range_is_named(served, options, field):
    with Client(served.address) as client, pytest.raises(InvalidArgumentError, match=field) as refused:
        client.generate(PROMPT, **options)
    assert refused.value.metadata == {"field": field}

"""Tenants with keys: who is not known gets nothing, and nobody finds out what another has."""

from __future__ import annotations

import shutil
from contextlib import closing
from functools import partial
from itertools import islice

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.prompts import LONG, PROMPT, until
from support.serving import serving
from turret.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    model_pb2_grpc,
    pooling_pb2_grpc,
    prompts_pb2_grpc,
)
from turret_client import (
    AdapterState,
    Client,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TurretError,
    UnauthenticatedError,
)
from turret_server.config import ServerConfig
from turret_server.tenancy.keys import digest_of

SHARES = "share_cache = true"
TENANTS = {
    "acme": 'use = ["acme-*", "shared"]\nload = ["acme-*"]\nunload = ["acme-*"]',
    "bolt": 'use = ["bolt-*", "shared"]',
    "one": f'use = ["shared"]\n{SHARES}',
    "two": f'use = ["shared"]\n{SHARES}',
    "small": "max_concurrent_requests = 1",
    "poor": "tokens_per_minute = 60",
    "operator": f"admin = true\n{SHARES}",
}


def write(path, sources, **changes: str) -> None:
    tables = TENANTS | {"acme": f'{TENANTS["acme"]}\nsources = ["{sources}"]'} | changes
    path.write_text(
        "".join(f'[tenants.{name}]\nkeys = ["{digest_of(name)}"]\n{more}\n' for name, more in tables.items())
    )


@pytest.fixture(scope="module")
def sources(adapter_of, tmp_path_factory):
    """The folder from which acme may load."""
    folder = tmp_path_factory.mktemp("acme")
    shutil.copytree(adapter_of("llama", "lora", seed=5), folder / "one")
    return folder


@pytest.fixture(scope="module")
def file(sources, tmp_path_factory):
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    write(path, sources)
    return path


@pytest.fixture(scope="module")
def served(base_of, adapter_of, quantised_cache, file):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        tenants=file,
        cache=quantised_cache,
    )
    with serving(config) as served:
        for name in ("acme-lora", "bolt-lora", "shared"):
            served.parts.lifecycle.load(name, str(adapter_of("llama", "lora")))
        yield served


@pytest.fixture
def client_of(served):
    """A client of a tenant; each one's key is its name here."""
    clients: dict[str, Client] = {}

    def client_of(name: str) -> Client:
        if name not in clients:
            clients[name] = Client(served.address, api_key=name)
        return clients[name]

    yield client_of
    for client in clients.values():
        client.close()
    served.parts.engine.check_integrity()


METHODS = [
    f"/turret.v1.{service}/{method}"
    for service, servicer in {
        "InferenceService": inference_pb2_grpc.InferenceServiceServicer,
        "AdapterService": adapters_pb2_grpc.AdapterServiceServicer,
        "PromptService": prompts_pb2_grpc.PromptServiceServicer,
        "ModelService": model_pb2_grpc.ModelServiceServicer,
        "PoolingService": pooling_pb2_grpc.PoolingServiceServicer,
    }.items()
    for method in vars(servicer)
    if method[0].isupper()
]
STREAMS = {"GenerateStream", "WatchAdapters"}


STRANGERS = [(), (("authorization", "Bearer nobody"),), (("turret-tenant", "acme"),)]


@pytest.mark.parametrize("metadata", STRANGERS)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_answers_who_is_not_known(served, method, metadata):
    with grpc.insecure_channel(served.address) as channel:
        name = method.rpartition("/")[2]
        if name.startswith("Upload"):
            call = iter(channel.stream_stream(method)(iter([b""]), metadata=metadata))
        elif name in STREAMS:
            call = iter(channel.unary_stream(method)(b"", metadata=metadata))
        else:
            call = map(partial(channel.unary_unary(method), metadata=metadata), [b""])
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_there_are_methods_to_try():
    assert len(METHODS) >= 14


def test_the_refusal_says_what_to_do(served, monkeypatch):
    monkeypatch.delenv("TURRET_API_KEY", raising=False)
    with (
        Client(served.address) as client,
        pytest.raises(UnauthenticatedError, match="an API key is required") as refused,
    ):
        client.generate(PROMPT)
    assert refused.value.reason == "UNAUTHENTICATED"


def test_health_and_reflection_stay_open(served):
    with grpc.insecure_channel(served.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [listed] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        assert listed.list_services_response.service


def test_the_key_comes_from_the_environment_too(served, monkeypatch):
    monkeypatch.setenv("TURRET_API_KEY", "acme")
    with Client(served.address) as client:
        assert client.generate(PROMPT, adapter="acme-lora", max_tokens=1).token_ids


def test_a_key_does_not_open_the_way_to_another_tenant(served):
    with (
        Client(served.address, api_key="acme", tenant="bolt") as client,
        pytest.raises(UnauthenticatedError, match="different tenants"),
    ):
        client.generate(PROMPT)
    with Client(served.address, api_key="acme", tenant="acme") as client:
        assert client.generate(PROMPT, max_tokens=1).token_ids


def test_a_tenant_sees_what_it_may_use(client_of):
    assert [adapter.name for adapter in client_of("acme").list_adapters()] == ["acme-lora", "shared"]
    assert [adapter.name for adapter in client_of("bolt").list_adapters()] == ["bolt-lora", "shared"]
    assert [adapter.name for adapter in client_of("small").list_adapters()] == []
    assert len(client_of("operator").list_adapters()) == 3
    with closing(client_of("acme").watch_adapters()) as changes:
        assert {adapter.name for adapter in islice(changes, 2)} == {"acme-lora", "shared"}


def test_the_source_of_an_adapter_is_shown_only_to_tenants_that_may_load_it(client_of):
    assert [each.source for each in client_of("bolt").get_adapter("bolt-lora").history] == [""]
    assert client_of("acme").get_adapter("acme-lora").history[0].source
    assert client_of("operator").get_adapter("bolt-lora").history[0].source


def test_a_watch_omits_adapters_that_the_tenant_may_not_use(client_of, adapter_of):
    with closing(client_of("bolt").watch_adapters()) as changes:
        list(islice(changes, 2))
        client_of("operator").load_adapter("acme-new", str(adapter_of("llama", "lora", seed=1)))
        client_of("operator").unload_adapter("acme-new")
        client_of("operator").load_adapter("bolt-new", str(adapter_of("llama", "lora", seed=1)))
        assert next(changes).name == "bolt-new"
    client_of("operator").unload_adapter("bolt-new")


def test_another_tenants_adapter_is_answered_like_one_that_is_not_there(client_of, sources):
    client = client_of("bolt")
    revision = client_of("operator").get_adapter("acme-lora").revision

    def answers(name: str) -> list[tuple[str, str, str]]:
        found = []
        for call in (
            lambda: client.generate(PROMPT, adapter=name),
            lambda: list(client.stream(PROMPT, adapter=name)),
            lambda: client.generate(PROMPT, adapter=["shared", name]),
            lambda: client.generate(PROMPT, adapter=f"{name}@{revision[:8]}"),
            lambda: client.get_adapter(name),
            lambda: client.load_adapter(name, str(sources / "one")),
            lambda: client.unload_adapter(name),
            lambda: client.rollback_adapter(name),
            lambda: client.upload_adapter(name, sources / "one"),
            lambda: client.pin_prompt("p", LONG, adapter=name),
        ):
            with pytest.raises(TurretError) as refused:
                call()
            found.append(
                (type(refused.value), refused.value.reason, refused.value.message.replace(name, "X"))
            )
        return found

    assert answers("acme-lora") == answers("acme-none")
    assert {(kind, reason) for kind, reason, _ in answers("acme-lora")} == {
        (NotFoundError, "ADAPTER_NOT_FOUND")
    }


def test_a_tenant_loads_and_unloads_within_its_patterns_and_places(client_of, sources, adapter_of):
    client = client_of("acme")
    loaded = client.load_adapter("acme-two", str(sources / "one"))
    assert client.generate(PROMPT, adapter="acme-two", max_tokens=1).revision == loaded.revision
    with pytest.raises(PermissionDeniedError, match="but not load it"):
        client.load_adapter("shared", str(sources / "one"))
    with pytest.raises(PermissionDeniedError, match="but not unload it"):
        client.unload_adapter("shared")
    with pytest.raises(PermissionDeniedError) as refused:
        client.load_adapter("acme-two", str(adapter_of("llama", "lora")))
    assert refused.value.reason == "SOURCE_FORBIDDEN"
    client.unload_adapter("acme-two")


def test_cached_prompts_are_found_only_by_their_tenant_and_by_those_who_share(client_of):
    prompt = [7, *range(20, 84)]

    def cached(tenant: str, **options: str) -> int:
        return client_of(tenant).generate(prompt, max_tokens=1, **options).usage.cached_tokens

    assert cached("acme") == 0
    assert cached("acme") > 0
    assert cached("bolt") == 0
    assert cached("bolt", cache_salt="acme/") == 0
    assert cached("one") == 0
    assert cached("one", cache_salt="acme") == 0
    assert cached("two") > 0


def test_pinned_prompts_belong_to_their_tenant(client_of):
    acme, bolt = client_of("acme"), client_of("bolt")
    acme.pin_prompt("rules", LONG)
    assert bolt.list_pinned_prompts() == client_of("operator").list_pinned_prompts() == []
    with pytest.raises(NotFoundError):
        bolt.unpin_prompt("rules")
    bolt.pin_prompt("rules", PROMPT * 4)
    [pin] = acme.list_pinned_prompts()
    assert pin.prompt_tokens != bolt.list_pinned_prompts()[0].prompt_tokens
    for client in (acme, bolt):
        client.unpin_prompt("rules")
        assert client.list_pinned_prompts() == []


def test_what_an_operator_pins_is_found_by_all_that_share(client_of):
    client_of("operator").pin_prompt("rules", LONG)
    assert client_of("two").generate(LONG, max_tokens=1).usage.cached_tokens > 0
    client_of("operator").unpin_prompt("rules")


def test_a_tenant_runs_as_many_requests_at_once_as_it_may(client_of):
    client = client_of("small")
    stream = client.stream(PROMPT, max_tokens=100)
    next(stream)
    with pytest.raises(ResourceExhaustedError) as refused:
        client.generate(PROMPT)
    assert refused.value.reason == "QUOTA_EXCEEDED"
    assert refused.value.retry_after
    assert client_of("bolt").generate(PROMPT, max_tokens=1).token_ids
    stream.close()

    def again() -> bool:
        try:
            return bool(client.generate(PROMPT, max_tokens=1).token_ids)
        except ResourceExhaustedError:
            return False

    until(again)


def test_a_tenant_has_as_many_tokens_a_minute_as_it_may(client_of):
    client = client_of("poor")
    for _ in range(2):
        assert len(client.generate([5] * 20, max_tokens=5).token_ids) == 5
    with pytest.raises(ResourceExhaustedError, match="of its 60 tokens a minute left") as refused:
        client.generate([5] * 20, max_tokens=40)
    assert refused.value.reason == "QUOTA_EXCEEDED"
    assert refused.value.metadata == {"tenant": "poor", "quota": "tokens_per_minute"}
    # 50 of 60 are used, 60 are wanted, and one comes back a second.
    assert 0 < refused.value.retry_after <= 50


def test_what_a_tenant_used_is_counted_under_its_name(served, client_of):
    def counted(kind: str) -> float:
        labels = {"tenant": "bolt", "adapter": "bolt-lora", "kind": kind}
        return served.metric("turret_usage_tokens_total", **labels)

    before = {kind: counted(kind) for kind in ("prompt", "generated")}
    client_of("bolt").generate([5] * 20, adapter="bolt-lora", max_tokens=3)
    until(lambda: counted("prompt") - before["prompt"] == 20)
    assert counted("generated") - before["generated"] == 3


def test_a_key_that_is_taken_out_of_the_file_opens_nothing_any_more(client_of, file, sources):
    client = client_of("late")

    def let_in() -> bool:
        try:
            client.list_adapters()
        except UnauthenticatedError:
            return False
        return True

    assert not let_in()
    write(file, sources, late='use = ["late-*"]')
    until(let_in)
    with closing(client.watch_adapters()) as changes:
        client_of("operator").load_adapter("late-one", str(sources / "one"))
        assert next(changes).name == "late-one"
        write(file, sources)
        until(lambda: not let_in())
        # What runs ends with the next thing that it would tell.
        client_of("operator").unload_adapter("late-one")
        with pytest.raises(UnauthenticatedError):
            next(change for change in changes if change.state is AdapterState.UNLOADED)
    with pytest.raises(UnauthenticatedError):
        client.generate(PROMPT)

"""`turret serve` as a user runs it: a process of its own, spoken to over its ports and signals only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.prompts import PROMPT, until
from support.serving import TURRET, server_process
from turret_client import AdapterState, Client, NotFoundError

SERVICES = {f"turret.v1.{name}Service" for name in ("Inference", "Adapter", "Prompt", "Model")}


@pytest.fixture(scope="module")
def folder(adapter_of, tmp_path_factory):
    """What `--adapters` is given: two adapters, and one that is broken."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("lora", "p-tuning"):
        shutil.copytree(adapter_of("llama", name), folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "broken" / "adapter_model.safetensors").touch()
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("process-cache")


@pytest.fixture(scope="module")
def server(base_of, folder, cache):
    with server_process(base_of("llama"), cache, "--adapters", str(folder), "--memory", "8MiB") as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_folders_are_served_under_their_names_and_a_broken_one_is_listed(client):
    states = {adapter.name: adapter for adapter in client.list_adapters()}
    assert list(states) == ["broken", "lora", "p-tuning"]
    assert states["broken"].state is AdapterState.FAILED
    assert "peft_type" in states["broken"].error
    for name in ("lora", "p-tuning"):
        assert client.generate(PROMPT, adapter=name, max_tokens=3).revision == states[name].revision
    with pytest.raises(NotFoundError, match="could not be loaded"):
        client.generate(PROMPT, adapter="broken")


def test_health_and_reflection_answer(server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [listed] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in listed.list_services_response.service}
        assert names >= SERVICES


def test_metrics_tell_what_happened(server, client):
    before = server.metrics()
    for _ in range(2):
        client.generate(list(range(10, 60)), adapter="p-tuning", max_tokens=7)
    with pytest.raises(NotFoundError):
        client.generate(PROMPT, adapter="nobody")
    until(lambda: server.metrics()["turret_running_requests"] == 0)
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown('turret_requests_total{outcome="ok"}') == 2
    assert grown('turret_requests_total{outcome="adapter_not_found"}') == 1
    assert grown("turret_prompt_tokens_total") == 100
    assert grown("turret_generated_tokens_total") == 14
    # Nine virtual tokens the first time, three whole blocks of 16 the second.
    assert grown("turret_cached_tokens_total") == 9 + 48
    assert grown("turret_time_to_first_token_seconds_count") == 2
    assert grown("turret_inter_token_seconds_count") == 12
    assert grown("turret_step_seconds_count") == grown("turret_batch_requests_count") >= 14
    assert after["turret_waiting_requests"] == 0
    assert after['turret_adapters{state="failed"}'] == 1
    owners = {owner: after[f'turret_arena_pages{{owner="{owner}"}}'] for owner in
              ("lora", "prefix", "cache", "free", "sequence")}  # fmt: skip
    assert owners["lora"] > 0
    assert owners["prefix"] == 1
    assert owners["cache"] > 0
    assert owners["sequence"] == 0
    assert sum(owners.values()) * after["turret_arena_page_bytes"] <= 8 * 2**20


def test_the_command_line_speaks_to_it(server):
    def turret(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [TURRET, *arguments, "--server", server.address]
        return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603

    streamed = turret("generate", "--adapter", "lora", "--max-tokens", "8", PROMPT)
    whole = turret("generate", "--adapter", "lora", "--max-tokens", "8", "--no-stream", "--json", PROMPT)
    assert streamed.returncode == whole.returncode == 0
    assert json.loads(whole.stdout)["text"] == streamed.stdout.removesuffix("\n")
    listed = turret("adapters", "list")
    assert "broken" in listed.stdout
    missing = turret("generate", "--adapter", "nobody", PROMPT)
    assert missing.returncode == 1
    assert "ADAPTER_NOT_FOUND" in missing.stderr


def test_the_start_says_how_much_fits(server):
    [line] = [line for line in server.log if "room for" in line]
    assert re.search(r"room for \d+ tokens, or \d+ LoRA adapters of rank 16 on every linear", line)


@pytest.mark.slow
def test_a_second_start_reads_the_quantised_copy_and_answers_the_same(server, client, base_of, cache):
    expected = client.generate(PROMPT, max_tokens=10)
    assert any("quantising" in line for line in server.log)
    with server_process(base_of("llama"), cache) as second, Client(second.address) as other:
        assert any("from its quantised copy" in line for line in second.log)
        assert not any("quantising" in line for line in second.log)
        assert other.generate(PROMPT, max_tokens=10) == expected
        assert second.stop() == 0
        assert second.log[-1].endswith("stopped\n")


@pytest.mark.slow
def test_sigterm_lets_running_requests_finish(base_of, cache):
    with server_process(base_of("llama"), cache) as server, Client(server.address) as client:
        stream = client.stream(PROMPT, max_tokens=100)
        next(stream)
        statuses: list[int] = []
        stopper = threading.Thread(target=lambda: statuses.append(server.stop()))
        stopper.start()
        assert len(list(stream)) == 99
        stopper.join()
        assert statuses == [0]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--model", "/nowhere"), 2, "no such folder"),
        (("--memory", "plenty"), 2, "--memory plenty"),
        (("--memory", "1KiB"), 2, "less than one page"),
        (("--max-batch-requests", "9", "--max-batch-tokens", "8"), 2, "--max-batch-requests"),
        (("--listen", "nowhere"), 2, "HOST:PORT"),
        (("--listen", "0.0.0.0:0"), 2, "--allow-unauthenticated"),
        (("--listen", "[::]:0"), 2, "--allow-unauthenticated"),
        (("--http", "0.0.0.0:0"), 2, "--http 0.0.0.0:0: other machines could"),
        (("--tls-cert", __file__), 2, "--tls-cert and --tls-key belong together"),
        (("--tls-cert", __file__, "--tls-key", __file__), 2, "expected PEM files"),
        (("--tenants", __file__), 2, "expected a TOML file"),
    ],
)
def test_a_wrong_setting_is_an_error_of_one_line(base_of, cache, arguments, status, said):
    command = [TURRET, "serve", "--cache", str(cache)]
    defaults = [
        "--model",
        str(base_of("llama")),
        "--metrics",
        "none",
        "--http",
        "none",
        "--listen",
        "127.0.0.1:0",
    ]
    done = subprocess.run(  # noqa: S603
        [*command, *defaults, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last

"""A step that fails: the request at fault gets an error, its neighbours get their answers."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

from support.prompts import PROMPT, until
from support.serving import Served, server_process, serving
from turret_client import (
    Client,
    FailedPreconditionError,
    InternalError,
    ResourceExhaustedError,
    TurretError,
)
from turret_server.config import ServerConfig
from turret_server.engine.step import SequenceStep, Step, StepResult
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

TOKENS = 24
OTHERS = (None, "lora", "prefix")
GUILTY = 77


class Sabotage(Sampler):
    """Fails steps in which a prompt of the guilty token is."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.held = threading.Event()
        self.held.set()
        self.guilty: set[int] = set()

    def sample(self, logits_SV: torch.Tensor, sequences: list[SequenceStep]) -> StepResult:
        assert self.held.wait(60)
        self.guilty |= {part.sequence_id for part in sequences if GUILTY in part.token_ids and not part.start}
        if self.error and self.guilty & {part.sequence_id for part in sequences}:
            raise self.error
        return super().sample(logits_SV, sequences)


@pytest.fixture(scope="module")
def huge(adapter_of, tmp_path_factory) -> Path:
    """An adapter whose numbers are all finite, and whose products are not."""
    folder = shutil.copytree(adapter_of("llama", "lora", 2), tmp_path_factory.mktemp("huge") / "huge")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: 1e25 * tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sampler() -> Sabotage:
    return Sabotage()


@pytest.fixture(scope="module")
def served(base_of, adapter_of, huge, quantised_cache, sampler) -> Iterator[Served]:
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="4MiB",
        cache=quantised_cache,
    )
    with serving(config, sampler) as served:
        for name in ("lora", "prefix"):
            served.parts.lifecycle.load(name, str(adapter_of("llama", name)))
        served.parts.lifecycle.load("huge", str(huge))
        yield served


@pytest.fixture
def client(served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client
    served.parts.engine.check_integrity()


def answer(client: Client, adapter: str | None) -> tuple[int, ...]:
    return client.generate(PROMPT, adapter=adapter, max_tokens=TOKENS).token_ids


@pytest.fixture(scope="module")
def expected(served) -> dict[str | None, tuple[int, ...]]:
    with Client(served.address) as client:
        return {name: answer(client, name) for name in OTHERS}


def beside(
    client: Client,
    sampler: Sabotage,
    expected: dict[str | None, tuple[int, ...]],
    ask: Callable[[], object],
    most: type[TurretError],
) -> TurretError:
    """The error of a request that runs in the same steps as others, whose answers are looked at."""
    sampler.held.clear()
    with ThreadPoolExecutor() as pool:
        neighbours = {name: pool.submit(answer, client, name) for name in OTHERS}
        guilty = pool.submit(ask)
        sampler.held.set()
        assert {name: found.result() for name, found in neighbours.items()} == expected
        with pytest.raises(most) as failed:
            guilty.result()
    return failed.value


def test_logits_that_are_not_finite_fail_their_request_alone(client, served, sampler, expected, caplog):
    prompt = list(range(3, 60))
    before = served.metric("turret_requests_total", outcome="non_finite_logits")
    for _ in range(2):
        error = beside(
            client,
            sampler,
            expected,
            lambda: client.generate(prompt, adapter="huge", max_tokens=8),
            FailedPreconditionError,
        )
        assert error.reason == "NON_FINITE_LOGITS"
        assert "Logits are not finite with these adapters" in str(error)
    until(lambda: served.metric("turret_running_requests") == 0)
    assert served.metric("turret_requests_total", outcome="non_finite_logits") == before + 2
    assert "NON_FINITE_LOGITS" in caplog.text
    # Nor does what is left in its pages reach who gets them next.
    for name in OTHERS:
        assert answer(client, name) == expected[name]
    assert client.generate(prompt, max_tokens=3).usage.cached_tokens == 0


def test_what_was_not_finite_is_not_kept_for_others(client, served):
    cached = served.metric("turret_arena_pages", owner="cache")
    with pytest.raises(FailedPreconditionError):
        client.generate([5] * 100, adapter="huge")
    until(lambda: served.metric("turret_running_requests") == 0)
    assert served.metric("turret_arena_pages", owner="cache") == cached


@pytest.mark.parametrize(
    ("error", "told", "reason"),
    [
        (ValueError("broken"), InternalError, "GENERATION_FAILED"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceExhaustedError, "OUT_OF_MEMORY"),
        (MemoryError(), ResourceExhaustedError, "OUT_OF_MEMORY"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceExhaustedError, "OUT_OF_MEMORY"),
    ],
)
def test_a_step_that_fails_over_one_request_fails_no_other(
    client, served, sampler, expected, error, told, reason, caplog
):
    before = served.metric("turret_step_failures_total")
    sampler.error = error
    try:
        failed = beside(client, sampler, expected, lambda: client.generate([GUILTY, 5], max_tokens=8), told)
    finally:
        sampler.error = None
    assert failed.reason == reason
    assert reason in caplog.text
    assert served.metric("turret_step_failures_total") > before
    assert served.metric("turret_requests_total", outcome=reason.lower()) >= 1
    assert client.generate([GUILTY, 5], max_tokens=8).token_ids


def test_draws_are_the_same_when_a_step_is_computed_again(client, sampler):
    def draw() -> tuple[int, ...]:
        return client.generate(PROMPT, max_tokens=TOKENS, temperature=1.0, seed=4, top_p=0.9).token_ids

    alone = draw()
    sampler.error = ValueError("broken")
    sampler.held.clear()
    try:
        with ThreadPoolExecutor() as pool:
            drawn = [pool.submit(draw) for _ in range(3)]
            guilty = pool.submit(client.generate, [GUILTY, 6], max_tokens=8)
            sampler.held.set()
            assert [each.result() for each in drawn] == [alone] * 3
            assert isinstance(guilty.exception(), InternalError)
    finally:
        sampler.error = None


def test_a_lost_device_is_distinguished_from_a_failed_step(served, monkeypatch):
    """Every later call fails after it, so that nothing is left but to start again."""
    from turret_server.engine.step import DeviceLostError  # noqa: PLC0415

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(ModelRunner, "_forward", fail)
    runner = served.parts.engine._runner._runner
    with pytest.raises(DeviceLostError, match="illegal memory"):
        runner.run(Step(sequences=(SequenceStep(sequence_id=1, token_ids=(1,), start=0, block_table=(0,)),)))


BROKEN_SERVER = """
import sys
from turret_cli.main import main
from turret_server.engine.scheduler import Scheduler

update = Scheduler.update

def fail(self, step, result, seconds):
    assert all(77 not in part.token_ids for part in step.sequences), "page 3 is free"
    update(self, step, result, seconds)

Scheduler.update = fail
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_fatal_error_of_the_engine_fails_its_requests_and_ends_the_process(base_of, tmp_path):
    script = tmp_path / "broken_server.py"
    script.write_text(BROKEN_SERVER)
    program = (sys.executable, str(script))
    with (
        server_process(base_of("llama"), tmp_path / "cache", program=program) as server,
        Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = client.stream(PROMPT, max_tokens=200)
        next(stream)
        healths = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(healths).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(InternalError) as guilty:
            client.generate([GUILTY], max_tokens=2)
        assert guilty.value.reason == "GENERATION_FAILED"
        assert "page 3 is free" in str(guilty.value)
        with pytest.raises(InternalError):
            list(stream)
        assert next(healths).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.wait() == 1
        assert any("the engine failed, and serves no more" in line for line in server.log)
        assert server.log[-1].startswith("error: the engine failed")

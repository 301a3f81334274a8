"""The server computes what peft computes on the same NF4 base, whoever shares the batch.

The tolerance is absolute, on logits whose standard deviation is above 1: float32 sums
come in different orders.
Tokens must be equal wherever the best logit leads the second by more than twice the tolerance.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from support.adapters import KINDS
from support.models import FAMILIES, VOCAB_SIZE
from support.oracle import Oracle
from support.running import RecordingSampler, Running, submit, wait
from turret_server.config import ServerConfig
from turret_server.serve import Parts, assemble

TOLERANCE = 1e-3
# Smaller than most prompts: they enter in chunks, beside sequences that decode.
CHUNK = 24


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sampler() -> RecordingSampler:
    return RecordingSampler()


@pytest.fixture(scope="module")
def parts(family, base_of, adapter_of, quantised_cache, sampler):
    config = ServerConfig(
        model=str(base_of(family)),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        max_batch_tokens=CHUNK,
        max_batch_requests=16,
        cache=quantised_cache,
    )
    with assemble(config, sampler) as parts:
        for kind in KINDS:
            parts.adapters.load(kind, str(adapter_of(family, kind)))
        yield parts


@pytest.fixture(scope="module")
def oracle(family, base_of, adapter_of) -> Oracle:
    return Oracle(base_of(family), {kind: Path(adapter_of(family, kind)) for kind in KINDS})


def prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randint(3, 60))] for _ in range(count)]


def check(oracle: Oracle, sampler: RecordingSampler, requests: list[Running]) -> None:
    by_adapter = defaultdict(list)
    for running in requests:
        by_adapter[running.adapter].append(running)
    num_compared = 0
    for adapter, group in by_adapter.items():
        found = oracle.logits(adapter, [(running.prompt, running.token_ids) for running in group])
        for running, expected in zip(group, found, strict=True):
            actual = torch.stack(sampler.logits[running.request_id])
            assert expected.std() > 1
            torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
            best = expected.topk(2).values
            certain = best[:, 0] - best[:, 1] > 2 * TOLERANCE
            num_compared += int(certain.sum())
            tokens = torch.tensor(running.token_ids)
            assert torch.equal(tokens[certain], expected.argmax(dim=-1)[certain]), adapter
    assert num_compared > 0.9 * sum(len(running.token_ids) for running in requests)


@pytest.mark.parametrize("adapter", [None, *KINDS])
def test_alone(adapter: str | None, parts: Parts, oracle: Oracle, sampler: RecordingSampler) -> None:
    requests = []
    for prompt in prompts(2, seed=1):
        requests.append(submit(parts, prompt, adapter))
        wait(requests[-1])
    check(oracle, sampler, requests)
    parts.engine.check_integrity()


def test_mixed_in_one_batch_arriving_at_different_times(
    parts: Parts, oracle: Oracle, sampler: RecordingSampler
) -> None:
    requests: list[Running] = []
    for index, prompt in enumerate(prompts(2 * (len(KINDS) + 1), seed=2)):
        adapter = [None, *KINDS][index % (len(KINDS) + 1)]
        requests.append(submit(parts, prompt, adapter, max_tokens=16))
        if index % 3 == 2:
            requests[-2].reached.wait(timeout=60)
    wait(*requests)
    check(oracle, sampler, requests)
    parts.engine.check_integrity()


def test_the_adapters_differ(oracle: Oracle) -> None:
    """Otherwise the tests above would pass with the adapters switched off."""
    prompt, generated = prompts(2, seed=3)
    base = oracle.logits(None, [(prompt, generated)])[0]
    for kind in KINDS:
        assert (oracle.logits(kind, [(prompt, generated)])[0] - base).abs().max() > 100 * TOLERANCE, kind

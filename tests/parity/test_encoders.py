"""Heads and vectors are those of peft on the same NF4 base, whoever shares the batch.

The tolerance is absolute, on numbers whose standard deviation is above 0.1.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.encoders import (
    FAMILIES,
    KINDS,
    TaskOracle,
    params_of,
    pool,
    runs,
    save_base,
    save_task_adapter,
)
from support.running import submit, wait
from support.tokenizers import VOCAB_SIZE
from turret_adapters.registry import Named
from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.config import ServerConfig
from turret_server.engine.pooling import Pooling, PoolingParams

TOLERANCE = 1e-3
CASES = [
    *((kind, "SEQ_CLS") for kind in KINDS),
    *((kind, task) for task in ("TOKEN_CLS", "QUESTION_ANS") for kind in ("lora", "prefix", "prompt")),
]
_QUICK = {"bert"}


def _marks(family: str) -> list[pytest.MarkDecorator]:
    """A family's tests share a worker and its model."""
    return [pytest.mark.xdist_group(family), *([] if family in _QUICK else [pytest.mark.slow])]


@pytest.fixture(scope="module", params=[pytest.param(family, marks=_marks(family)) for family in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def adapters(
    family: str, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        (kind, task): save_task_adapter(kind, task, family, base, folder / f"{kind}-{task}")
        for kind, task in CASES
        if runs(family, kind, task)
    }


@pytest.fixture(scope="module")
def parts(base: Path, adapters: dict[tuple[str, str], Path], quantised_cache: Path) -> Iterator[Parts]:
    config = ServerConfig(
        model=str(base),
        dtype="float32",
        device=os.environ.get("TEST_DEVICE", "cpu"),
        memory="64MiB",
        cache=quantised_cache,
    )
    with assemble(config) as parts:
        for (kind, task), folder in adapters.items():
            parts.lifecycle.load(f"{kind}-{task}", str(folder))
        yield parts


@pytest.fixture(scope="module")
def oracle(base: Path) -> TaskOracle:
    return TaskOracle(base)


def texts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(50, VOCAB_SIZE) for _ in range(chance.randint(1, 60))] for _ in range(count)]


def check(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def test_vectors_are_those_of_the_base(parts: Parts, oracle: TaskOracle) -> None:
    asked = texts(3, seed=1)
    expected = oracle.numbers("FEATURE_EXTRACTION", None, asked)
    for text, states in zip(asked, expected, strict=True):
        position = torch.arange(1, len(text) + 1)[:, None]
        vectors = {
            Pooling.CLS: states[0],
            Pooling.LAST: states[-1],
            Pooling.MEAN: states.mean(0),
            Pooling.WEIGHTED_MEAN: (states * position).sum(0) / position.sum(),
        }
        for pooling, vector in vectors.items():
            found = pool(parts, text, params=PoolingParams(pooling=pooling)).numbers
            assert check(found[0], vector) < TOLERANCE
    parts.engine.check_integrity()


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_alone(
    kind: str, task: str, family: str, parts: Parts, adapters, oracle: TaskOracle, record_property
) -> None:
    if not runs(family, kind, task):
        pytest.skip("peft does not run it")
    asked = texts(2, seed=2)
    expected = oracle.numbers(task, adapters[kind, task], asked)
    found = [pool(parts, text, Named(f"{kind}-{task}"), params=params_of(task)).numbers for text in asked]
    assert torch.cat(expected).std() > 0.1
    largest = max(map(check, found, expected))
    record_property("alone", largest)
    assert largest < TOLERANCE


def test_mixed_in_one_batch(parts: Parts, adapters) -> None:
    """To the bit what each gets alone; a decoder writes meanwhile."""
    cases = [*adapters, None]
    asked = texts(3 * len(cases), seed=3)
    writing = [] if parts.loaded.base.is_encoder else [submit(parts, text) for text in asked[:5]]
    running = []
    for index, text in enumerate(asked):
        case = cases[index % len(cases)]
        named = (Named("-".join(case)),) if case else ()
        params = params_of(case[1]) if case else PoolingParams(pooling=Pooling.MEAN)
        running.append((text, named, params, pool(parts, text, *named, params=params)))
    for text, named, params, one in running:
        assert torch.equal(pool(parts, text, *named, params=params).numbers, one.numbers)
    for one in writing:
        wait(one)
        alone = submit(parts, one.prompt)
        wait(alone)
        assert one.token_ids == alone.token_ids

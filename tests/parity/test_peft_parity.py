"""The server computes what peft computes on the same NF4 base, whoever shares the batch.

Rows are adapters, columns families of bases; `matrix.py` prints what these tests measure. The tolerance is
absolute, on logits whose standard deviation is above 1: float32 sums come in different orders. Tokens must be
equal wherever the best logit leads the second by more than twice the tolerance.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from support.adapters import INVOCATION, KINDS, MIXTURE_KINDS, NUM_TASKS, VOCABULARIES, kinds_of
from support.models import FAMILIES, VOCAB_SIZE
from support.oracle import Oracle
from support.running import RecordingSampler, Running, submit, wait
from turret_adapters.registry import Named
from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.config import ServerConfig

TOLERANCE = 1e-3
# Smaller than most prompts: they enter in chunks, beside sequences that decode.
CHUNK = 48


@dataclass(frozen=True)
class Case:
    """What a request names, and how peft says what it answers."""

    name: str
    named: tuple[Named, ...]
    ask: Callable[[Oracle, Sequence[tuple[Sequence[int], Sequence[int]]]], list[torch.Tensor]] = field(
        compare=False
    )


def _one(kind: str | None) -> Case:
    named = (Named(kind),) if kind else ()
    return Case(kind or "base", named, lambda oracle, asked: oracle.logits(kind, asked))


def _task(task: int) -> Case:
    return Case(
        f"multitask, task {task}",
        (Named("multitask", task=task),),
        lambda oracle, asked: oracle.logits("multitask", asked, task=task),
    )


CASES = [
    _one(None),
    *(_one(kind) for kind in KINDS | MIXTURE_KINDS if kind != "multitask"),
    *(_task(task) for task in range(NUM_TASKS)),
    Case(
        "three weighted LoRAs",
        (Named("lora", 0.5), Named("rslora", 0.25), Named("lora-attention", -1.5)),
        lambda oracle, asked: oracle.composed({"lora": 0.5, "rslora": 0.25, "lora-attention": -1.5}, asked),
    ),
    Case(
        "prefix and LoRA",
        (Named("prefix"), Named("lora")),
        lambda oracle, asked: oracle.prefixed(["prefix"], "lora", asked),
    ),
    Case(
        "two prefixes",
        (Named("p-tuning-v2"), Named("prefix")),
        lambda oracle, asked: oracle.prefixed(["p-tuning-v2", "prefix"], None, asked),
    ),
    Case(
        "prompt, prefix and prompt",
        (Named("prompt"), Named("prefix"), Named("p-tuning")),
        lambda oracle, asked: oracle.prefixed(["prompt", "prefix", "p-tuning"], None, asked),
    ),
]


# The others run in `make test-all`.
_QUICK = {"llama"}


def _marks(family: str) -> list[pytest.MarkDecorator]:
    """A family's tests share a worker and its model."""
    return [pytest.mark.xdist_group(family), *([] if family in _QUICK else [pytest.mark.slow])]


def cases_of(family: str) -> list[Case]:
    kinds = kinds_of(family)
    return [case for case in CASES if all(named.name in kinds for named in case.named)]


@pytest.fixture(params=[pytest.param(family, marks=_marks(family)) for family in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sampler() -> RecordingSampler:
    return RecordingSampler()


@pytest.fixture(scope="module")
def serve(base_of, adapter_of, quantised_cache, sampler) -> Iterator[Callable[[str], Parts]]:
    """The server of a family, which runs until that of another is asked for: starting one takes seconds."""
    running: dict[str, Parts] = {}
    with ExitStack() as stack:

        def serve(family: str) -> Parts:
            if family not in running:
                running.clear()
                stack.close()
                config = ServerConfig(
                    model=str(base_of(family)),
                    dtype="float32",
                    device=os.environ.get("TEST_DEVICE", "cpu"),
                    memory="64MiB",
                    max_batch_tokens=CHUNK,
                    max_batch_requests=40,
                    cache=quantised_cache,
                )
                running[family] = stack.enter_context(assemble(config, sampler))
                for kind in kinds_of(family):
                    running[family].lifecycle.load(kind, str(adapter_of(family, kind)))
            return running[family]

        yield serve


@pytest.fixture
def parts(family: str, serve: Callable[[str], Parts]) -> Parts:
    return serve(family)


@pytest.fixture
def oracle(family, base_of, adapter_of) -> Oracle:
    folders = {kind: Path(adapter_of(family, kind)) for kind in kinds_of(family)}
    return Oracle(base_of(family), folders, vocabularies=VOCABULARIES)


def in_vocabulary(case: Case, prompt: list[int]) -> list[int]:
    """The prompt in the tokens of the case's adapter, with those that only it has."""
    vocab_size = VOCABULARIES.get(case.name, VOCAB_SIZE)
    return [token_id % vocab_size for token_id in prompt] + list(range(VOCAB_SIZE, vocab_size)) + prompt[:1]


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random ones; most hold what activates an activated LoRA, some near their end."""
    chance = random.Random(seed)
    found = [[chance.randrange(50, VOCAB_SIZE) for _ in range(chance.randint(3, 60))] for _ in range(count)]
    for prompt in found[: -(-count * 3 // 4)]:
        at = chance.randint(0, len(prompt))
        prompt[at:at] = INVOCATION
    return found


def check(oracle: Oracle, sampler: RecordingSampler, case: Case, requests: list[Running]) -> float:
    """Compare; the largest difference of a logit."""
    found = case.ask(oracle, [(running.prompt, running.token_ids) for running in requests])
    largest, num_certain = 0.0, 0
    for running, expected in zip(requests, found, strict=True):
        actual = torch.stack(sampler.logits[running.request_id])
        assert actual.shape == expected.shape, case.name
        assert expected.std() > 1
        largest = max(largest, float((actual - expected).abs().max()))
        assert largest < TOLERANCE, case.name
        best = expected.topk(2).values
        certain = best[:, 0] - best[:, 1] > 2 * TOLERANCE
        tokens = torch.tensor(running.token_ids)
        assert torch.equal(tokens[certain], expected.argmax(dim=-1)[certain]), case.name
        num_certain += int(certain.sum())
    assert num_certain > 0.9 * sum(len(running.token_ids) for running in requests)
    return largest


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, id=f"{family}-{case.name}", marks=_marks(family))
        for family in FAMILIES
        for case in cases_of(family)
    ],
    indirect=["family"],
)
def test_alone(case: Case, parts: Parts, oracle: Oracle, sampler: RecordingSampler, record_property) -> None:
    requests = []
    for prompt in prompts(2, seed=1):
        requests.append(submit(parts, in_vocabulary(case, prompt), *case.named))
        wait(requests[-1])
    record_property("alone", check(oracle, sampler, case, requests))
    parts.engine.check_integrity()


def test_mixed_in_one_batch_arriving_at_different_times(
    family: str, parts: Parts, oracle: Oracle, sampler: RecordingSampler, record_property
) -> None:
    cases = cases_of(family)
    submitted: dict[Case, list[Running]] = {case: [] for case in cases}
    sampler.revisions.clear()
    for index, prompt in enumerate(prompts(2 * len(cases), seed=2)):
        case = cases[index % len(cases)]
        prompt = in_vocabulary(case, prompt)  # noqa: PLW2901
        submitted[case].append(submit(parts, prompt, *case.named, max_tokens=16))
        if index % 8 == 7:
            submitted[case][-1].reached.wait(timeout=60)
    for requests in submitted.values():
        wait(*requests)
    for case, requests in submitted.items():
        record_property(case.name, check(oracle, sampler, case, requests))
    assert max(len(revisions) for revisions in sampler.revisions) > 12, "they were not batched"
    parts.engine.check_integrity()


def test_every_case_differs_from_the_base(family: str, oracle: Oracle) -> None:
    """Otherwise the tests above would pass with the adapters switched off."""
    asked = [(prompts(1, seed=3)[0], prompts(1, seed=4)[0])]
    base = oracle.logits(None, asked)[0]
    for case in cases_of(family)[1:]:
        own = case.ask(oracle, [tuple(in_vocabulary(case, each) for each in asked[0])])[0]
        both = min(len(own[0]), len(base[0]))
        assert (own[: len(base), :both] - base[:, :both]).abs().max() > 50 * TOLERANCE, case.name

"""Whatever the engine does to a request, its tokens stay the same, greedy and with a seed.

The same requests run alone with room for everything, where many find the beginnings of their prompts in the
cache, and all at once where pages, adapters' places in the arena and in host memory, tokens of a step and
places in the batch are short, so that hardly any does, while adapters are swapped.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from support.running import Running, submit, wait
from turret_adapters.registry import Named
from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.config import ServerConfig
from turret_server.engine.request import LogitAdjustment
from turret_server.kernels import has_avx512bf16

KINDS = ("lora", "rslora", "lora-all-linear", "lora-layers", "prefix", "p-tuning-v2", "prompt", "p-tuning")
DTYPES = ["float32"] + ["bfloat16"] * has_avx512bf16()


SAMPLED = [
    {},
    {"adjustment": LogitAdjustment(repetition_penalty=1.2, presence_penalty=0.5)},
    {"min_p": 0.05},
    {"prompt_logprobs": 2, "logprobs": 2},
    {"adjustment": LogitAdjustment(frequency_penalty=0.4, logit_bias={60: 1.0}), "logprobs": 0},
]


def questions() -> list[dict]:
    """Prompts of which many begin alike, each with an adapter or none, half of them greedy. Every seventh is
    another answer to the prompt of the one before.
    """
    chance = random.Random(5)
    beginnings = [[chance.randrange(50, 250) for _ in range(40)] for _ in range(3)]
    asked = []
    for index in range(36):
        end = [chance.randrange(50, 250) for _ in range(chance.randint(1, 12))]
        kind = (None, *KINDS)[index % (len(KINDS) + 1)]
        asked.append(
            {
                "prompt": [*beginnings[index % 3][: chance.choice([8, 40, 40])], *end],
                "named": () if kind is None else (Named(kind),),
                "max_tokens": chance.randint(8, 40),
                "temperature": 0.0 if index % 2 else 0.8,
                "seed": index,
                **SAMPLED[index % len(SAMPLED)],
            }
        )
        if index % 7 == 6:
            shared = {name: asked[-2][name] for name in ("prompt", "named")}
            asked[-1] = {**shared, "max_tokens": 20, "temperature": 0.8, "seed": index, "follows": True}
    return asked


def ask(parts: Parts, question: dict, before: list[Running]) -> Running:
    rest = {key: value for key, value in question.items() if key not in {"prompt", "named", "follows"}}
    leader = before[-1].request_id if question.get("follows") else None
    return submit(parts, question["prompt"], *question["named"], leader=leader, **rest)


def load(parts: Parts, adapter_of, name: str, seed: int = 0) -> None:
    parts.lifecycle.load(name, str(adapter_of("llama", name, seed)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_a_request_alone_with_room_for_everything(
    dtype, base_of, adapter_of, quantised_cache, tmp_path
):
    roomy = ServerConfig(
        model=str(base_of("llama")),
        dtype=dtype,
        device="cpu",
        memory="64MiB",
        cache=quantised_cache,
        store=tmp_path / "roomy",
    )
    asked = questions()
    with assemble(roomy, None) as parts:
        for kind in KINDS:
            load(parts, adapter_of, kind)
        alone = []
        for question in asked:
            alone.append(ask(parts, question, alone))
            wait(alone[-1])
        page_bytes = parts.arena.page_bytes
        assert any(running.outputs[-1].cached_tokens >= 32 for running in alone)
        assert parts.metrics.get_sample_value("turret_preemptions_total") == 0
        assert parts.metrics.get_sample_value("turret_adapter_evictions_total") == 0
    short = replace(
        roomy,
        memory=str(28 * page_bytes),
        host_memory="40KiB",
        store=tmp_path / "short",
        max_batch_tokens=13,
        max_batch_requests=12,
    )
    with assemble(short, None) as parts:
        for kind in KINDS:
            load(parts, adapter_of, kind)
        together: list[Running] = []
        for question in asked:
            together.append(ask(parts, question, together))
        # Those that were taken stay with the revision of then.
        for kind in KINDS:
            load(parts, adapter_of, kind, seed=1)
        wait(*together)
        parts.engine.check_integrity()
        value = parts.metrics.get_sample_value
        assert value("turret_preemptions_total") > 0
        assert value("turret_adapter_evictions_total") > 0
        assert value("turret_adapter_disk_reads_total") > 0
        assert value("turret_host_adapter_bytes") <= 40 * 2**10
    assert [running.token_ids for running in together] == [running.token_ids for running in alone]
    for found, expected in zip(together, alone, strict=True):
        assert scores(found) == pytest.approx(scores(expected), abs=1e-3 if dtype == "float32" else 0.1)


def scores(running: Running) -> list[float]:
    """The log probabilities of the prompt's tokens and of the answer's, where they are wanted."""
    found = [*running.outputs[0].prompt_logprobs, *(output.logprob for output in running.outputs)]
    return [each.logprob for each in found if each is not None]

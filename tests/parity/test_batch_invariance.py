"""On a CPU, what a request gets does not depend on its company, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from support.running import RecordingSampler, Running, submit, wait
from support.tokenizers import save_tokenizer
from turret_adapters.registry import Named
from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.config import ServerConfig
from turret_server.engine.request import LogitAdjustment

NAMED = [(), (Named("lora-all-linear"),), (Named("rslora"),), (Named("p-tuning-v2"),), (Named("dora"),)]
SAMPLED: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"temperature": 0.9, "min_p": 0.02, "prompt_logprobs": 1},
    {"adjustment": LogitAdjustment(repetition_penalty=1.5, frequency_penalty=0.5)},
    {"temperature": 0.7, "adjustment": LogitAdjustment(logit_bias={9: 3.0}), "logprobs": 0},
    {"prompt_logprobs": 0, "adjustment": LogitAdjustment(presence_penalty=1.0), "logprobs": 20},
]
each_dtype = pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])


@each_dtype
def test_logits_alone_are_those_in_company_to_the_bit(dtype, base_of, adapter_of, quantised_cache):
    def load(parts: Parts) -> None:
        for name in {each.name for named in NAMED for each in named}:
            parts.lifecycle.load(name, str(adapter_of("llama", name)))

    compare(dtype, base_of("llama"), quantised_cache, load)


@each_dtype
def test_nor_do_wide_logits_depend_on_company(dtype, tmp_path, quantised_cache):
    """So wide that matrix libraries multiply one row in another order than several."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=2048,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    compare(dtype, tmp_path, quantised_cache, lambda _: None, [() for _ in NAMED])


def compare(
    dtype: str,
    model: Path,
    cache: Path,
    load: Callable[[Parts], None],
    named: Sequence[tuple[Named, ...]] = NAMED,
) -> None:
    """Ask for five answers, one after another and all together."""
    sampler = RecordingSampler()
    config = ServerConfig(
        model=str(model),
        dtype=dtype,
        device="cpu",
        memory="8MiB",
        max_batch_tokens=32,
        max_batch_requests=8,
        cache=cache,
    )
    prompts = [list(range(start, start + 45)) for start in range(10, 210, 40)]
    with assemble(config, sampler) as parts:
        load(parts)

        def ask(index: int) -> Running:
            return submit(parts, prompts[index], *named[index], max_tokens=12, **SAMPLED[index])

        alone = []
        for index in range(len(named)):
            alone.append(ask(index))
            wait(alone[-1])
        company = [ask(index) for index in range(len(named))]
        wait(*company)
    for single, together in zip(alone, company, strict=True):
        assert single.token_ids == together.token_ids
        assert scores(single) == scores(together)
        for one, other in zip(
            sampler.logits[single.request_id], sampler.logits[together.request_id], strict=True
        ):
            assert torch.equal(one, other)


def scores(running: Running) -> list[object]:
    return [(output.logprob, output.prompt_logprobs) for output in running.outputs]

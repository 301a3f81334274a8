"""In bfloat16 on a CPU with AVX512-BF16, what a request gets does not depend on its company, to the bit."""

from __future__ import annotations

import pytest
import torch

from support.running import RecordingSampler, Running, submit, wait
from turret_adapters.registry import Named
from turret_server.config import ServerConfig
from turret_server.kernels import has_avx512bf16
from turret_server.serve import assemble

NAMED = [(), (Named("lora-all-linear"),), (Named("rslora"),), (Named("p-tuning-v2"),), (Named("dora"),)]


@pytest.mark.skipif(not has_avx512bf16(), reason="the CPU has no AVX512-BF16")
def test_logits_alone_are_those_in_company_to_the_bit(base_of, adapter_of, quantised_cache):
    sampler = RecordingSampler()
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="bfloat16",
        device="cpu",
        memory="8MiB",
        max_batch_tokens=32,
        max_batch_requests=8,
        cache=quantised_cache,
    )
    prompts = [list(range(start, start + 45)) for start in range(10, 210, 40)]
    with assemble(config, sampler) as parts:
        for name in {each.name for named in NAMED for each in named}:
            parts.adapters.load(name, str(adapter_of("llama", name)))

        def ask(index: int) -> Running:
            return submit(parts, prompts[index], *NAMED[index], max_tokens=12)

        alone = []
        for index in range(len(NAMED)):
            alone.append(ask(index))
            wait(alone[-1])
        company = [ask(index) for index in range(len(NAMED))]
        wait(*company)
    for single, together in zip(alone, company, strict=True):
        assert single.token_ids == together.token_ids
        for one, other in zip(
            sampler.logits[single.request_id], sampler.logits[together.request_id], strict=True
        ):
            assert torch.equal(one, other)

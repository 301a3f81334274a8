"""Where the time of a step goes: one that decodes, as a CUDA graph, and one that also computes a prompt.

cd tests && python -m gpu.profile_steps
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.bench_decode import BATCHES, CONFIG, CONTEXT, REAL, decoding, say, world_of_loras
from support.decoding import World
from turret_server.engine.step import SequenceStep, Step

PROMPT_TOKENS = 512 if REAL else 20
ROUNDS = 3
ROWS = 25


def with_prompt(made: World, step: Step) -> Step:
    """The step, whose last sequence computes a prompt instead."""
    *others, last = step.sequences
    num_pages = -(-PROMPT_TOKENS // made.arena.block_size)
    prompt = SequenceStep(
        sequence_id=last.sequence_id,
        token_ids=tuple(random.choices(range(CONFIG.vocab_size), k=PROMPT_TOKENS)),
        start=0,
        block_table=last.block_table[:num_pages],
        adapters=last.adapters,
        sampling=last.sampling,
    )
    return replace(step, sequences=(*others, prompt))


def show(made: World, name: str, step: Step) -> None:
    for _ in range(ROUNDS):
        made.runner.run(step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if REAL else [])]
    with profile(activities=activities) as profiled:
        made.runner.run(step)
    key = "self_cuda_time_total" if REAL else "self_cpu_time_total"
    say(f"{name}\n{profiled.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)}")


def main() -> None:
    assert PROMPT_TOKENS <= CONTEXT
    with world_of_loras() as made, torch.inference_mode():
        batch = BATCHES[-1]
        step = decoding(made, batch, batch)
        show(made, f"{batch} sequences decode, each with a LoRA", step)
        show(made, f"one of them computes a prompt of {PROMPT_TOKENS} tokens", with_prompt(made, step))


if __name__ == "__main__":
    main()

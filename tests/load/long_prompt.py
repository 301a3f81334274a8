"""How long the tokens of running streams let wait for them while a prompt of 2,000 tokens enters.

`make load` writes LONG_PROMPT.md: four streams on the 1.1 B shape of the benchmark, with half the default
longest step, the default, and one so long that only --max-batch-tokens bounds a step.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import click

from bench.layout import TINY_LLAMA
from bench.models import make_models
from bench.turret import Turret
from turret_client import AsyncClient

RESULTS = Path(__file__).with_name("LONG_PROMPT.md")
NUM_STREAMS, FIRST_TOKENS, STREAM_TOKENS, LONG_PROMPT = 4, 40, 400, 2000
ABOUT = f"""\
# A long prompt beside running streams

`make load`: {NUM_STREAMS} streams on a base of TinyLlama-1.1B's shape, on {os.cpu_count()} cores, while a
prompt of {LONG_PROMPT} tokens enters; seconds between two tokens of a stream.
"""
SETTINGS = {f"{longest} s": ("--max-step-seconds", longest) for longest in ("0.25", "0.5", "1000")}


async def measure(address: str, seed: int) -> dict[str, float]:
    """Gaps between tokens before and while the long prompt is computed, in seconds."""
    times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]

    under_way = asyncio.Event()

    async def stream(client: AsyncClient, index: int) -> None:
        prompt = list(range(100 + index, 164 + index))
        async for chunk in client.stream(prompt, max_tokens=STREAM_TOKENS):
            times[index] += [time.perf_counter()] * len(chunk.token_ids)
            if min(map(len, times)) >= FIRST_TOKENS:
                under_way.set()

    async with AsyncClient(address) as client:
        streams = [asyncio.create_task(stream(client, index)) for index in range(NUM_STREAMS)]
        await under_way.wait()
        began = time.perf_counter()
        async for _ in client.stream(
            random.Random(seed).choices(range(16, 256), k=LONG_PROMPT), max_tokens=1
        ):
            pass
        ended = time.perf_counter()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    gaps = [(a, b - a) for line in times for a, b in pairwise(line)]
    before = [gap for start, gap in gaps if start + gap <= began]
    during = [gap for start, gap in gaps if start + gap > began and start < ended]
    return {
        "before, median": statistics.median(before),
        "meanwhile, median": statistics.median(during),
        "meanwhile, largest": max(during),
        "long prompt to its first token": ended - began,
    }


def main() -> None:
    make_models(TINY_LLAMA)
    columns = {}
    for name, options in SETTINGS.items():
        with closing(Turret(TINY_LLAMA, *options, name="long-prompt")) as server:
            asyncio.run(measure(server.address, seed=1))
            columns[name] = asyncio.run(measure(server.address, seed=2))
    rows = next(iter(columns.values()))
    table = [
        f"| longest step | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {row} | {' | '.join(f'{column[row]:.2f} s' for column in columns.values())} |" for row in rows),
    ]
    RESULTS.write_text("\n".join([ABOUT, *table, ""]))
    click.echo(RESULTS.read_text())


if __name__ == "__main__":
    main()

"""What the demo asks of the server: held-out prompts in concurrent batches, and streams during a swap."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from turret_client import Client, Generation, TurretError

_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Ask:
    adapter: str | None
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """A stream that began and ended at these times of `time.monotonic`; `error` where it failed."""

    ask: Ask
    began: float
    ended: float
    text: str
    revision: str
    error: str = ""


def ask_all(client: Client, asks: Sequence[Ask]) -> list[Generation]:
    """Send all of them at once and wait for all."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return list(
            pool.map(
                lambda ask: client.generate(ask.prompt, adapter=ask.adapter, max_tokens=_MAX_TOKENS), asks
            )
        )


def exact_match(asks: Iterable[Ask], answers: Iterable[Generation]) -> float:
    hits = [generation.text == ask.answer for ask, generation in zip(asks, answers, strict=True)]
    return sum(hits) / len(hits)


def seconds_per_token(
    client: Client, adapters: Sequence[str | None], prompts: Sequence[str]
) -> dict[str | None, float]:
    """Median time between two tokens of a lone stream, the adapters in turn so that drift hits all."""
    gaps: dict[str | None, list[float]] = {adapter: [] for adapter in adapters}
    for prompt in prompts:
        for adapter in adapters:
            times = [
                time.perf_counter() for _ in client.stream(prompt, adapter=adapter, max_tokens=_MAX_TOKENS)
            ]
            gaps[adapter] += [after - before for before, after in pairwise(times)]
    return {adapter: statistics.median(found) for adapter, found in gaps.items()}


def stream_during(
    client: Client, asks: Sequence[Ask], event: Callable[[], None], num_streams: int, seconds: float
) -> list[Streamed]:
    """Keep `num_streams` streams running for `seconds` before `event` and as long after it."""
    over = threading.Event()
    streamed: list[Streamed] = []

    def run(start: int) -> None:
        index = start
        while not over.is_set():
            streamed.append(_stream(client, asks[index % len(asks)]))
            index += num_streams

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(seconds)
        event()
        time.sleep(seconds)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return streamed


def _stream(client: Client, ask: Ask) -> Streamed:
    began = time.monotonic()
    text, revision, error = "", "", ""
    try:
        for chunk in client.stream(ask.prompt, adapter=ask.adapter, max_tokens=_MAX_TOKENS):
            text += chunk.text
            revision = chunk.revision
    except TurretError as failure:
        error = str(failure)
    return Streamed(ask=ask, began=began, ended=time.monotonic(), text=text, revision=revision, error=error)

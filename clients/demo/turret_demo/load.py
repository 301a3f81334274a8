"""What the demo asks of the server: held-out prompts in concurrent batches, and streams during a swap."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, pairwise

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
    client: Client, asks: Sequence[Ask], event: Callable[[], None], num_streams: int
) -> list[Streamed]:
    """Keep `num_streams` streams running: each that ends is followed by another. `event` comes once as many
    have ended, and each that runs when it is over is followed by one more.
    """
    ended, happened = threading.Semaphore(0), threading.Event()
    streamed: list[Streamed] = []

    def run(start: int) -> None:
        is_after = False
        for index in count(start, num_streams):
            if is_after:
                return
            is_after = happened.is_set()
            try:
                streamed.append(_stream(client, asks[index % len(asks)]))
            finally:
                ended.release()

    with ThreadPoolExecutor(num_streams) as pool:
        running = [pool.submit(run, start) for start in range(num_streams)]
        try:
            for _ in range(num_streams):
                ended.acquire()
            event()
        finally:
            happened.set()
    for each in running:
        each.result()
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

"""How long a light tenant waits beside 16 long answers of another, which fill the batch.

    PYTHONPATH=tests python -m service.measure_light_tenant

On the real model. The heavy tenant has 16 answers running all the time. Alone and with the light one, which
asks every two seconds, take turns. It prints the tokens per second of both kinds of turns, and the times to
the light tenant's first tokens.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from support.real_model import real_model
from support.serving import server_process
from turret_client import Chunk, Client

_NUM_LONG = 16
_LONG_TOKENS = 400
_SHORT_TOKENS = 8
_NUM_TURNS = 5
_TURN_SECONDS = 20.0
_SECONDS_BETWEEN = 2.0
_PROMPT = "Chapter {}. It was a dark and stormy night, and the travellers began to tell a story:"


class Load:
    """Counts the tokens that arrive, of both tenants."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = count()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.num_tokens = 0
        self.waits: list[float] = []

    def end(self) -> None:
        self._ended.set()

    def heavy(self) -> None:
        """One long answer after another. The first ones differ in length, so that they end at all times."""
        with Client(self._address, tenant="heavy") as client:
            number = next(self._numbers)
            length = _LONG_TOKENS * (number + 1) // _NUM_LONG
            while not self._ended.is_set():
                for chunk in client.stream(
                    _PROMPT.format(number), max_tokens=length, temperature=1.0, seed=number
                ):
                    self._count(chunk)
                    if self._ended.is_set():
                        return
                number, length = next(self._numbers), _LONG_TOKENS

    def _count(self, chunk: Chunk) -> None:
        with self._lock:
            self.num_tokens += len(chunk.token_ids)

    def light(self) -> None:
        """Short answers for the length of a turn."""
        with Client(self._address, tenant="light") as client:
            ends = time.monotonic() + _TURN_SECONDS
            while (began := time.monotonic()) < ends:
                for index, chunk in enumerate(
                    client.stream("What is the capital of France?", max_tokens=_SHORT_TOKENS)
                ):
                    if not index:
                        self.waits.append(time.monotonic() - began)
                    self._count(chunk)
                time.sleep(max(0.0, min(began + _SECONDS_BETWEEN, ends) - time.monotonic()))


def main() -> None:
    options = ("--memory", "512MiB", "--max-batch-requests", str(_NUM_LONG))
    with TemporaryDirectory() as cache, server_process(real_model(), Path(cache), *options) as server:
        load = Load(server.address)
        with ThreadPoolExecutor(_NUM_LONG) as pool:
            running = [pool.submit(load.heavy) for _ in range(_NUM_LONG)]
            time.sleep(_TURN_SECONDS)  # compiles and warms everything
            load.light()
            load.waits.clear()
            alone, both = [], []
            for _ in range(_NUM_TURNS):
                alone.append(_rate(load, lambda: time.sleep(_TURN_SECONDS)))
                both.append(_rate(load, load.light))
            load.end()
            for future in running:
                future.result()
        server.stop()
    loss = statistics.median(b / a - 1 for a, b in zip(alone, both, strict=True))
    sys.stdout.write(
        f"alone: {statistics.median(alone):.1f} tokens/s; both: {statistics.median(both):.1f} tokens/s "
        f"({loss:+.1%}, median of {_NUM_TURNS} pairs)\n"
        f"first tokens of the light tenant: {len(load.waits)}, median {statistics.median(load.waits):.2f} s, "
        f"longest {max(load.waits):.2f} s\n"
    )


def _rate(load: Load, turn: Callable[[], None]) -> float:
    """Tokens per second while `turn` runs."""
    before, began = load.num_tokens, time.monotonic()
    turn()
    return (load.num_tokens - before) / (time.monotonic() - began)


if __name__ == "__main__":
    main()

"""How long a light tenant waits beside 16 long answers of another, which fill the batch.

    PYTHONPATH=tests python -m service.measure_light_tenant

On the real model. The heavy tenant has 16 answers running all the time. Every two seconds a short question
comes as well: in turns from the heavy tenant, so that it waits for an answer to end, and from a light one. It
prints the tokens per second of all answers and the times to the short ones' first tokens.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from support.serving import server_process
from turret_client import Chunk, Client
from turret_demo.real_model import real_model

_NUM_LONG = 16
_LONG_TOKENS = 400
_SHORT_TOKENS = 8
_NUM_TURNS = 5
_NUM_SHORT = 10
_SECONDS_BETWEEN = 2.0
_PROMPT = "Chapter {}. It was a dark and stormy night, and the travellers began to tell a story:"
_SHORT_PROMPT = "What is the capital of France?"


@dataclass(frozen=True)
class Turn:
    """Tokens per second of all answers, and the seconds to the first tokens of the short ones."""

    rate: float
    waits: list[float]


class Load:
    """Counts the tokens that arrive, of both tenants."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = count()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.num_tokens = 0

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

    def turn(self, tenant: str) -> Turn:
        """A short answer every two seconds."""
        waits: list[float] = []

        def ask(client: Client) -> None:
            asked = time.monotonic()
            for index, chunk in enumerate(client.stream(_SHORT_PROMPT, max_tokens=_SHORT_TOKENS)):
                if not index:
                    waits.append(time.monotonic() - asked)
                self._count(chunk)

        began, num_before = time.monotonic(), self.num_tokens
        with Client(self._address, tenant=tenant) as client, ThreadPoolExecutor(_NUM_SHORT) as pool:
            asks = []
            for _ in range(_NUM_SHORT):
                asks.append(pool.submit(ask, client))
                time.sleep(_SECONDS_BETWEEN)
            rate = (self.num_tokens - num_before) / (time.monotonic() - began)
            for each in asks:
                each.result()
        return Turn(rate, waits)


def main() -> None:
    options = ("--memory", "512MiB", "--max-batch-requests", str(_NUM_LONG))
    turns: dict[str, list[Turn]] = {"heavy": [], "light": []}
    with TemporaryDirectory() as cache, server_process(real_model(), Path(cache), *options) as server:
        load = Load(server.address)
        with ThreadPoolExecutor(_NUM_LONG) as pool:
            running = [pool.submit(load.heavy) for _ in range(_NUM_LONG)]
            load.turn("light")  # compiles and warms everything
            for _ in range(_NUM_TURNS):
                for tenant, measured in turns.items():
                    measured.append(load.turn(tenant))
            load.end()
            for future in running:
                future.result()
        server.stop()
    for tenant, measured in turns.items():
        waits = [wait for turn in measured for wait in turn.waits]
        sys.stdout.write(
            f"short answers of the {tenant} tenant: "
            f"{statistics.median(turn.rate for turn in measured):.1f} tokens/s in all; first tokens after "
            f"{statistics.median(waits):.2f} s, {max(waits):.2f} s at most ({len(waits)} answers)\n"
        )
    changes = [b.rate / a.rate - 1 for a, b in zip(turns["heavy"], turns["light"], strict=True)]
    sys.stdout.write(f"throughput: {statistics.median(changes):+.1%} (median of {_NUM_TURNS} pairs)\n")


if __name__ == "__main__":
    main()

"""How long a light tenant waits beside 16 long answers of another, which fill the batch.

    PYTHONPATH=tests python -m service.measure_light_tenant

On the real model. It prints the tokens per second of the heavy tenant alone, then those of both together,
while the light one asks every two seconds, and the times to its first tokens.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from support.real_model import real_model
from support.serving import server_process
from turret_client import Client

_NUM_LONG = 16
_LONG_TOKENS = 200
_SHORT_TOKENS = 8
_SECONDS_BETWEEN = 2.0
_PROMPT = "Chapter 1. It was a dark and stormy night, and number {} of the travellers began to tell a story:"


def main() -> None:
    with TemporaryDirectory() as cache:
        options = ("--memory", "512MiB", "--max-batch-requests", str(_NUM_LONG))
        with server_process(real_model(), Path(cache), *options) as server:
            _run(server.address, 2)  # compiles and warms everything
            alone = _run(server.address, _LONG_TOKENS)
            waits: list[float] = []
            num_short = [0]

            def light(ended: threading.Event) -> None:
                with Client(server.address, tenant="light") as client:
                    while not ended.wait(_SECONDS_BETWEEN):
                        began = time.monotonic()
                        stream = client.stream("What is the capital of France?", max_tokens=_SHORT_TOKENS)
                        for index, _ in enumerate(stream):
                            if not index:
                                waits.append(time.monotonic() - began)
                            num_short[0] += 1

            both = _run(server.address, _LONG_TOKENS, light, num_short)
            server.stop()
    sys.stdout.write(
        f"alone: {alone:.1f} tokens/s; both: {both:.1f} tokens/s ({both / alone - 1:+.1%})\n"
        f"first tokens of the light tenant: {len(waits)}, median {statistics.median(waits):.2f} s, "
        f"longest {max(waits):.2f} s\n"
    )


def _run(
    address: str,
    num_tokens: int,
    beside: Callable[[threading.Event], None] = lambda _: None,
    num_beside: Sequence[int] = (),
) -> float:
    """Tokens per second of 16 long answers and of what ran beside them."""
    ended = threading.Event()
    thread = threading.Thread(target=beside, args=(ended,))
    with Client(address, tenant="heavy") as client, ThreadPoolExecutor(_NUM_LONG) as pool:

        def answer(number: int) -> int:
            prompt = _PROMPT.format(number)
            return client.generate(
                prompt, max_tokens=num_tokens, temperature=1.0, seed=number
            ).usage.generated_tokens

        began = time.monotonic()
        thread.start()
        generated = sum(pool.map(answer, range(_NUM_LONG)))
        seconds = time.monotonic() - began
        ended.set()
        thread.join()
    return (generated + sum(num_beside)) / seconds


if __name__ == "__main__":
    main()

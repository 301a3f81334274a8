"""Memory of a server that is sent prompts of 4 MB: six at once, then hundreds by 24 clients.

    PYTHONPATH=tests python -m service.measure_long_prompts

It prints the resident memory before, the most meanwhile, and after, and how each prompt was answered.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from support.models import save_model
from support.serving import server_process
from turret_client import Client, TurretError

_NUM_PROMPTS = 6
_NUM_CLIENTS, _NUM_MANY = 24, 144
# What is freed is given back to the system a moment later.
_SETTLE_SECONDS = 4.0
# Just below the largest message.
_NUM_CHARACTERS = (4 << 20) - 1024
_MIB = 2**20


def main() -> None:
    texts = {
        "words": "the quick brown fox " * (_NUM_CHARACTERS // 20),
        "one word": "x" * _NUM_CHARACTERS,
        "characters without a token": "🙂" * (_NUM_CHARACTERS // 4),
    }
    with TemporaryDirectory() as folder:
        model, cache = save_model("llama", Path(folder) / "model"), Path(folder) / "cache"
        with server_process(model, cache) as server:
            process = psutil.Process(server.process.pid)
            for what, text in texts.items():
                _measure(what, text, server.address, process, _NUM_PROMPTS, _NUM_PROMPTS)
            for what, text in texts.items():
                _measure(what, text, server.address, process, _NUM_CLIENTS, _NUM_MANY)
            server.stop()


def _measure(
    what: str, text: str, address: str, process: psutil.Process, num_clients: int, num_prompts: int
) -> None:
    before = process.memory_info().rss
    most, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(num_clients) as pool, Client(address) as client:
        answers = {each.result() for each in [pool.submit(_send, client, text) for _ in range(num_prompts)]}
    time.sleep(_SETTLE_SECONDS)
    ended.set()
    watcher.join()
    after = process.memory_info().rss
    sys.stdout.write(
        f"{num_prompts} of {what}, {num_clients} at once: {before / _MIB:.0f} MiB before, "
        f"{max(most) / _MIB:.0f} MiB at most, "
        f"{after / _MIB:.0f} MiB after; {', '.join(answers)}\n"
    )


def _send(client: Client, text: str) -> str:
    try:
        return client.generate(text, max_tokens=1).text
    except TurretError as error:
        return type(error).__name__


if __name__ == "__main__":
    main()

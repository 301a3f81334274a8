"""Runs `turret` and writes the number of threads in its pools, and the pools' maxima, to a file every second.

A ThreadPoolExecutor starts a thread when none is idle, up to its maximum, and keeps it. From outside the
process, a pool that fills num_checks like a leak of threads.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakSet

from turret_cli.main import main

_SECONDS = 1.0


@dataclass(frozen=True)
class Pools:
    """Number of threads in the pools of a process, and the sum of the pools' maxima."""

    threads: int
    capacity: int


def count_pools() -> Callable[[], Pools]:
    """Return a function that counts the pools created from now on, except those that were shut down."""
    pools: WeakSet[ThreadPoolExecutor] = WeakSet()
    lock = threading.Lock()
    make = ThreadPoolExecutor.__init__

    def make_and_add(self, *arguments, **keywords):
        make(self, *arguments, **keywords)
        with lock:
            pools.add(self)

    def count() -> Pools:
        with lock:
            open_pools = [pool for pool in pools if not pool._shutdown]
        return Pools(
            sum(len(pool._threads) for pool in open_pools), sum(pool._max_workers for pool in open_pools)
        )

    ThreadPoolExecutor.__init__ = make_and_add
    return count


def write_pools(pools: Pools, file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(asdict(pools)))
    new.replace(file)


def read_pools(file: Path) -> Pools:
    return Pools(**json.loads(file.read_text()))


def _serve(file: Path) -> None:
    count, over = count_pools(), threading.Event()

    def write_until_over() -> None:
        while not over.wait(_SECONDS):
            write_pools(count(), file)

    write_pools(count(), file)
    threading.Thread(target=write_until_over, daemon=True).start()
    try:
        main()
    finally:
        over.set()


if __name__ == "__main__":
    _serve(Path(sys.argv.pop(1)))

"""`turret` with a file that says, every second, how many threads its pools have and how many they may have.

A ThreadPoolExecutor starts a thread when a call finds none idle, up to its maximum, and keeps it. Threads of
pools that fill are no leak; seen from outside the process they look like one.
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
    """Threads that the pools of a process have, and the sum of the pools' maxima."""

    threads: int
    capacity: int


def count_pools() -> Callable[[], Pools]:
    """A function that counts the pools that are made from now on and are not shut down."""
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

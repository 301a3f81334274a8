"""The longest gap between tokens while something holds the store or its database, and a revision is released.

    PYTHONPATH=tests python -m service.measure_lock_stall

A server with a small model runs in this process, which holds the locks; streams run in another one. While a
lock is held, a request ends on a replaced revision whose files are no longer needed. The same is measured
without a lock. Exits with 1 if a lock makes the longest gap larger than 0.1 s and than twice that without.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from support.adapters import save_adapter
from support.models import save_model
from support.serving import Served, serving
from turret_client import AsyncClient, Client
from turret_server.config import ServerConfig

HELD_SECONDS = 5.0
MAX_GAP_SECONDS = 0.1
NUM_STREAMS = 2
TENANTS = "[tenants.acme]\nmax_adapter_bytes = 60_000\n"


@contextmanager
def nothing_held(_: Served, __: Path) -> Iterator[None]:
    yield


@contextmanager
def store_held(served: Served, _: Path) -> Iterator[None]:
    with served.parts.lifecycle._library.store._lock:
        yield


@contextmanager
def database_held(_: Served, store: Path) -> Iterator[None]:
    with closing(sqlite3.connect(store / "names.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


async def longest_gap(address: str) -> float:
    """Of streams that follow each other for as long as a lock is held; the time to the first token counts."""
    ends = time.perf_counter() + HELD_SECONDS
    longest = 0.0

    async def run(client: AsyncClient, index: int) -> None:
        nonlocal longest
        last = time.perf_counter()
        while last < ends:
            async for _ in client.stream([3 + index, 5, 7], max_tokens=200):
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

    async with AsyncClient(address) as client:
        await asyncio.gather(*(run(client, index) for index in range(NUM_STREAMS)))
    return longest


def measure(served: Served, store: Path, hold, sources: list[Path]) -> float:
    with Client(served.address, tenant="acme") as client:
        client.load_adapter("poet", str(sources[0]))
        stream = client.stream([3, 5, 7], adapter="poet", max_tokens=200)
        next(stream)
        client.load_adapter("poet", str(sources[1]))
        streams = subprocess.Popen(  # noqa: S603 (this program)
            [sys.executable, "-m", "service.measure_lock_stall", served.address],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert streams.stdout
        assert streams.stdout.readline() == "ready\n"
        with hold(served, store):
            stream.close()
            longest = float(streams.stdout.readline())
        streams.wait()
        client.unload_adapter("poet")
    return longest


def main() -> int:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        model = save_model("llama", root / "model")
        sources = [save_adapter("lora", "llama", model, root / f"adapter-{seed}", seed) for seed in (1, 2)]
        (root / "tenants.toml").write_text(TENANTS)
        config = ServerConfig(
            model=str(model),
            store=root / "store",
            cache=root / "cache",
            tenants=root / "tenants.toml",
            dtype="float32",
            device="cpu",
            memory="8MiB",
        )
        with serving(config) as served:
            gaps = {
                hold.__name__: measure(served, root / "store", hold, sources)
                for hold in (nothing_held, store_held, database_held)
            }
    for name, gap in gaps.items():
        print(f"{name}: longest gap {gap * 1000:.0f} ms")  # noqa: T201
    most = max(MAX_GAP_SECONDS, 2 * gaps.pop("nothing_held"))
    return int(max(gaps.values()) > most)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("ready", flush=True)  # noqa: T201
        print(asyncio.run(longest_gap(sys.argv[1])), flush=True)  # noqa: T201
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.exit(main())

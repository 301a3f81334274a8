"""Turret: `turret serve` as a process of its own, driven over gRPC by its own load generator."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.layout import BENCH, Shape
from bench.process import LoggedProcess
from bench.work import Batch, NotRunError, TokenTimes
from turret_client import AsyncClient, Client
from turret_client.bench import LoadGenerator, Popularity, Workload

_TURRET = Path(sys.executable).with_name("turret")


class Turret:
    """A server on ports that the system chooses. The first start of a model quantises it.

    Attributes:
        address: Where it answers gRPC.
        start_seconds: From its start to the first token of a request that was sent as soon as could be.
    """

    def __init__(self, shape: Shape, *options: str, name: str = "turret") -> None:
        self._shape = shape
        command = [
            _TURRET,
            "serve",
            "--model",
            shape.model,
            "--cache",
            BENCH / "cache",
            "--store",
            BENCH / "store",
            *options,
        ]
        ports = ("--listen", "127.0.0.1:0", "--http", "none", "--metrics", "127.0.0.1:0")
        self._process = LoggedProcess(f"{name}-{shape.name}", [*command, *ports], os.environ)
        try:
            self.address = self._process.wait_for(r"serving on (\S+)")
            self._metrics_url = self._process.wait_for(r"metrics on (\S+)")
            with Client(self.address) as client:
                next(client.stream(list(range(16)), max_tokens=1))
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - self._process.started

    def load(self, names: Sequence[str]) -> None:
        """Load adapters of the shape's folder, where the server was started without it."""
        with Client(self.address) as client:
            for name in names:
                client.load_adapter(name, str(self._shape.adapters / name))

    def run(self, batch: Batch) -> TokenTimes:
        named = [name for name in batch.adapters if name]
        assert len(named) in (0, len(batch.adapters)), "the load generator mixes no base into adapters"
        workload = Workload(
            concurrency=len(batch.adapters),
            num_requests=len(batch.adapters),
            adapters=tuple(named),
            popularity=Popularity(round_robin=True),
            prompt_tokens=(batch.prompt_tokens, batch.prompt_tokens),
            max_tokens=batch.max_tokens,
            seed=batch.seed,
        )

        async def generate() -> LoadGenerator:
            async with AsyncClient(self.address) as client:
                generator = LoadGenerator(client, workload)
                await generator.run()
                return generator

        records = asyncio.run(generate()).records
        if errors := {record.error for record in records if record.error}:
            raise NotRunError(f"failed: {', '.join(sorted(errors))}; see {self._process.log}")
        return [record.token_seconds for record in records]

    def metrics(self) -> dict[str, float]:
        """Every sample that Prometheus would scrape now."""
        with urllib.request.urlopen(self._metrics_url) as response:  # noqa: S310 (loopback)
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def arena_bytes(self) -> int:
        """What is in use of the arena, kept prefixes included."""
        samples = self.metrics()
        pages = sum(
            count
            for name, count in samples.items()
            if name.startswith("turret_arena_pages{") and 'owner="free"' not in name
        )
        return int(pages * samples["turret_arena_page_bytes"])

    def resident_bytes(self) -> int:
        return int(psutil.Process(self._process.process.pid).memory_info().rss)

    def close(self) -> None:
        self._process.close()
